"""The header that a checkpoint folder may hold beside its base model: header.safetensors."""

import json
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open

from fleetfit.core.records import HeaderSpec
from fleetfit.models.features import FeatureShape
from fleetfit.models.header import Header, header_from_state
from fleetfit.models.weights import first_few, not_finite

HEADER_FILE = "header.safetensors"


def header_bytes(header: Header, labels: Sequence[str]) -> bytes:
    """Content of the file: tensors, and in the metadata what the header is and the names of its classes in order."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in header.state_dict().items()}
    metadata = {"format": "pt", "spec": header.spec.model_dump_json(), "labels": json.dumps(list(labels))}
    content: bytes = safetensors.torch.save(tensors, metadata=metadata)
    return content


def load_header(name: str, spec: HeaderSpec, shape: FeatureShape, labels: Sequence[str]) -> Header | None:
    """The header of a folder, if it has one of this kind for just these classes in this order.

    Args:
        name: ``model.pretrained``; a model of the hub has none.
        spec: What the header has to be.
        shape: What features look like.
        labels: Names of the classes.

    Raises:
        ValueError: the file is corrupt, its tensors do not fit the base model, or hold values that are not finite.
    """
    path = Path(name).expanduser() / HEADER_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        own_spec, own_labels = (json.loads(metadata.get(key, "null")) for key in ("spec", "labels"))
        if own_labels != list(labels) or own_spec != spec.model_dump(mode="json"):
            return None
        if wrong := not_finite(tensors):
            raise ValueError(first_few(wrong))
        return header_from_state(spec, shape, len(labels), tensors)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"model.pretrained = {name!r}: {HEADER_FILE} is no header for it: {error}") from error
