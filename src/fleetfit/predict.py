"""Labels for files, by a device's model or by one that was exported to ONNX."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32

from fleetfit.artifacts import ONNX_FILE, load_model, read_card
from fleetfit.data.preprocessing import Preprocessing
from fleetfit.data.sample_files import read_samples
from fleetfit.onnx_model import OnnxModel
from fleetfit.records import Record

BATCH = 256


class Prediction(Record):
    """The likeliest label of one sample; ``row`` counts the samples of a file from 0."""

    input: str
    row: int
    label: str
    probability: float


def predict(folder: Path, inputs: Sequence[Path]) -> list[Prediction]:
    """Predict every sample of some files; all files are read before the first prediction.

    Args:
        folder: A device's folder, or one of ``fleetfit export``.
        inputs: Image files, or .npy files of raw values.

    Raises:
        ValueError: no model there, one that does not say what its inputs are, or a file that is no sample of its kind.
        OSError: a file cannot be opened.
        ImportError: the model is in ONNX, and ONNX Runtime is not installed.
    """
    logits_of, labels, form = _model(folder)
    if form is None:
        raise ValueError(f"{folder} does not say how images become its inputs: written by an older fleetfit?")
    files = [read_samples(path, form) for path in inputs]
    predictions = []
    for path, samples in zip(inputs, files, strict=True):
        parts = [logits_of(form.apply(samples[i : i + BATCH])) for i in range(0, len(samples), BATCH)]
        for row, shares in enumerate(_probabilities(np.concatenate(parts))):
            if not np.isfinite(shares).all():
                raise ValueError(f"{folder}: the model's output for {path} is not finite: its weights are damaged")
            best = int(shares.argmax())
            found = Prediction(input=str(path), row=row, label=labels[best], probability=float(shares[best]))
            predictions.append(found)
    return predictions


Logits = Callable[[Float32[np.ndarray, "sample ..."]], Float32[np.ndarray, "sample class"]]


def _model(folder: Path) -> tuple[Logits, tuple[str, ...], Preprocessing | None]:
    if (folder / ONNX_FILE).exists():
        exported = OnnxModel(folder / ONNX_FILE)
        return exported.logits, exported.card.labels, exported.card.preprocessing
    model, card = load_model(folder), read_card(folder)

    @torch.no_grad()
    def logits(inputs: Float32[np.ndarray, "sample ..."]) -> Float32[np.ndarray, "sample class"]:
        result: np.ndarray = model(torch.from_numpy(inputs)).numpy()
        return result

    return logits, card.labels, card.preprocessing


def _probabilities(logits: Float32[np.ndarray, "sample class"]) -> Float32[np.ndarray, "sample class"]:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(1, keepdims=True)
    return shares
