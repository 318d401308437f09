"""A device's folder: model.safetensors, and model.json, which makes the tensors loadable."""

import json
from pathlib import Path

import safetensors.torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError

from fleetfit.data.preprocessing import Form, TextPreprocessing
from fleetfit.data.tokenizer_files import tokenizer_files, with_tokenizer
from fleetfit.files import write_atomically
from fleetfit.messages import first_problem, take
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import backbone_from_state
from fleetfit.models.header import header_from_state
from fleetfit.models.weights import first_few, not_finite
from fleetfit.records import HeaderSpec, JsonDict, Record

MODEL_FORMAT = 1
ONNX_FILE = "model.onnx"
TORCH_FILE = "model.pt2"


class ModelCard(Record):
    """model.json: all that rebuilds and uses a device's model beside its tensors."""

    format: int = MODEL_FORMAT
    device_id: str
    cluster: str
    family: str
    config: JsonDict
    header: HeaderSpec
    labels: tuple[str, ...]
    width: float
    depth: int
    inputs: str = Field(description="what the model expects")
    preprocessing: Form | None = Field(None, description="the same for programs; None: not known")
    size_bytes: int
    limit_bytes: int
    accuracy: float | None = Field(description="on the device's private test split")
    trained_on: tuple[str, ...] = Field((), description="classes in the device's training data; empty: not said")


def write_model(folder: Path, model: Classifier, card: ModelCard) -> None:
    """Write a device's model: the tensors first, then the card that makes them loadable.

    The tokenizer of a text model goes into files of its own, not into the card.
    """
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"}))
    if isinstance(card.preprocessing, TextPreprocessing):
        for name, content in tokenizer_files(card.preprocessing).items():
            write_atomically(folder / name, content)
    fields = card.model_dump_json(indent=2, exclude={"preprocessing": {"tokenizer"}})
    write_atomically(folder / "model.json", fields + "\n")


def load_model(folder: str | Path) -> Classifier:
    """Rebuild a device's model from its folder: inputs -> logits [sample class].

    Inputs are pixels [sample channel row column], or the numbers of texts' tokens [sample token].

    Raises:
        ValueError: a file is missing, corrupt or of another format, or a weight is not finite; the folder holds an
            export that needs no fleetfit.
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").exists():
        for name, how in (
            (ONNX_FILE, "run it with onnxruntime, as the README.md beside it shows, or use `fleetfit predict`"),
            (TORCH_FILE, "it may hold pickles, which can run code; if you trust it, torch.export.load(...).module()"),
        ):
            if (folder / name).exists():
                raise ValueError(f"{folder / name} is an exported model: {how}")
    card = read_card(folder)
    path = folder / "model.safetensors"
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (SafetensorError, KeyError, RuntimeError) as error:  # an unknown dtype, or sizes beyond 64 bits
        raise ValueError(f"{path} is corrupt: {error}") from None
    try:
        for name in tensors:
            if not name.startswith(("backbone.model.", "header.")):
                raise ValueError(f"tensor {name!r} is unexpected")
        backbone = backbone_from_state(card.family, card.config, take(tensors, "backbone.model"))
        header = header_from_state(card.header, backbone.feature_shape, len(card.labels), take(tensors, "header"))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit {folder / 'model.json'}: {error}") from None
    if wrong := not_finite(tensors):
        raise ValueError(f"{path} has wrong weights: {first_few(wrong)}")
    return Classifier(backbone, header).eval()


def read_card(folder: Path) -> ModelCard:
    """model.json of a device's folder.

    Raises:
        ValueError: missing, not JSON, or not a model card of this format.
    """
    path = folder / "model.json"
    try:
        card = ModelCard.model_validate_json(_with_tokenizer(path.read_text(encoding="utf-8"), folder))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no device folder: {path} is missing") from None
    except ValidationError as error:
        raise ValueError(f"{path} is not a model card: {first_problem(error)}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a model card: {error}") from None
    if card.format != MODEL_FORMAT:
        raise ValueError(f"{path} has format {card.format}, this fleetfit reads {MODEL_FORMAT}")
    return card


def _with_tokenizer(text: str, folder: Path) -> str:
    try:
        fields = json.loads(text)
    except ValueError:
        return text  # told by the one who validates it
    if not isinstance(fields, dict) or "preprocessing" not in fields:
        return text
    return json.dumps({**fields, "preprocessing": with_tokenizer(fields["preprocessing"], folder)})
