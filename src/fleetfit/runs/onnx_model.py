"""A model in ONNX as fleetfit exports it: what its metadata says, and how ONNX Runtime runs it. Needs no torch."""

import importlib
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Shaped

from fleetfit.core.records import Record
from fleetfit.data.preprocessing import Form
from fleetfit.data.tokenizer_files import with_tokenizer

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "inputs", "logits"


def need(*packages: str) -> None:
    """Make sure that optional packages are there.

    Raises:
        ImportError: one is not; with the command that installs all of them.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"ONNX needs {package}: {error}; pip install {' '.join(PACKAGES)}") from error


class OnnxCard(Record):
    """The metadata inside the file: all that one needs to use it."""

    device_id: str
    labels: tuple[str, ...]
    inputs: str
    preprocessing: Form | None
    fleetfit_version: str

    def to_metadata(self) -> dict[str, str]:
        """Texts by key: labels and preprocessing as JSON, the others as they are; a tokenizer stays outside."""
        fields = self.model_dump(mode="json", exclude={"preprocessing": {"tokenizer"}})
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], folder: Path) -> "OnnxCard":
        """Read back; a tokenizer from the folder that the model is in.

        Raises:
            ValueError: not what ``to_metadata`` writes, or the tokenizer is missing.
        """
        parsed = {key: json.loads(metadata.get(key, "null")) for key in ("labels", "preprocessing")}
        parsed["preprocessing"] = with_tokenizer(parsed["preprocessing"], folder)
        texts = {key: metadata.get(key) for key in ("device_id", "inputs", "fleetfit_version")}
        return cls.model_validate({**parsed, **texts})


class OnnxModel:
    """An exported model in ONNX Runtime, on one CPU thread.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ValueError: the file is corrupt, or not from fleetfit; names it.
    """

    def __init__(self, path: Path) -> None:
        need("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong is raised as well
        try:
            self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except OSError:
            raise
        except Exception as error:  # ONNX Runtime has exceptions of its own, without a common base
            raise ValueError(f"{path} is corrupt: {error}") from None
        try:
            self.card = OnnxCard.from_metadata(self._session.get_modelmeta().custom_metadata_map, path.parent)
        except ValueError as error:
            raise ValueError(f"{path} is no model that fleetfit exported: {error}") from None

    def logits(self, inputs: Shaped[np.ndarray, "sample *shape"]) -> Float32[np.ndarray, "sample class"]:
        """Logits."""
        result: np.ndarray = self._session.run([OUTPUT], {INPUT: np.ascontiguousarray(inputs)})[0]
        return result
