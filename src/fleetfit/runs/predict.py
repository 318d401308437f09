"""Labels for files and texts, by a device's model or by one that was exported to ONNX."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Shaped

from fleetfit.core.records import Record
from fleetfit.data.preprocessing import Form, TextPreprocessing
from fleetfit.data.sample_files import read_samples, read_texts
from fleetfit.models.classifier import Classifier
from fleetfit.runs.device_folder import ONNX_FILE, load_model, read_card
from fleetfit.runs.onnx_model import OnnxModel

BATCH = 256


class Prediction(Record):
    """The likeliest label of one sample.

    ``row`` counts the samples of a file from 0, of a .txt file its lines; ``note`` is what had to be done to read it.
    """

    input: str
    row: int
    label: str
    probability: float
    note: str = ""


def predict(folder: Path, inputs: Sequence[str | Path]) -> list[Prediction]:
    """Predict every sample of some inputs; all are read before the first prediction.

    Args:
        folder: A device's folder, or one of ``fleetfit export``.
        inputs: Of a model that reads images: image files, or .npy files of raw values. Of one that reads texts: .txt
            files with a text in each line (that ends in LF or CR LF), or texts themselves.

    Raises:
        ValueError: no model there, one that does not say what its inputs are, a file that is no sample of its kind, or
            an empty text.
        OSError: a file cannot be opened.
        ImportError: the model is in ONNX, and ONNX Runtime is not installed.
    """
    logits_of, labels, form = model_in(folder)
    read = [_read(name, form) for name in inputs]
    predictions = []
    for name, (rows, samples, note) in zip(inputs, read, strict=True):
        parts = [logits_of(_ready(samples[i : i + BATCH], form)) for i in range(0, len(samples), BATCH)]
        for row, shares in zip(rows, probabilities(np.concatenate(parts)), strict=True):
            if not np.isfinite(shares).all():
                raise ValueError(f"{folder}: the model's output for {name} is not finite: its weights are damaged")
            best = int(shares.argmax())
            share = float(shares[best])
            predictions.append(Prediction(input=str(name), row=row, label=labels[best], probability=share, note=note))
    return predictions


def _read(name: str | Path, form: Form) -> tuple[Sequence[int], Any, str]:
    """The numbers of one input's samples in it, the samples, and what had to be done for them."""
    if isinstance(form, TextPreprocessing):
        texts = read_texts(str(name))
        return list(texts), list(texts.values()), ""
    samples, note = read_samples(Path(name), form)
    return range(len(samples)), samples, note


def _ready(samples: Any, form: Form) -> Shaped[np.ndarray, "sample ..."]:
    return form.apply(samples)


def unseen_classes(folder: Path) -> tuple[str, ...] | None:
    """Classes that were not in the device's training data; None where its folder does not say."""
    if not (folder / "model.json").exists():
        return None
    card = read_card(folder)
    if not card.trained_on:
        return None
    return tuple(label for label in card.labels if label not in card.trained_on)


Logits = Callable[[Shaped[np.ndarray, "sample ..."]], Float32[np.ndarray, "sample class"]]


def model_in(folder: Path) -> tuple[Logits, tuple[str, ...], Form]:
    """What makes logits of prepared samples, the labels, and how inputs are made.

    Raises:
        ValueError: no model there, or one that does not say what its inputs are.
        ImportError: the model is in ONNX, and ONNX Runtime is not installed.
    """
    if (folder / ONNX_FILE).exists():
        exported = OnnxModel(folder / ONNX_FILE)
        return exported.logits, exported.card.labels, need_form(exported.card.preprocessing, folder)
    model, card = load_model(folder), read_card(folder)
    return logits_of_model(model), card.labels, need_form(card.preprocessing, folder)


def need_form(form: Form | None, folder: Path) -> Form:
    """How inputs are made of what people have.

    Raises:
        ValueError: the folder does not say.
    """
    if form is None:
        raise ValueError(f"{folder} does not say how images become its inputs: written by an older fleetfit?")
    return form


def logits_of_model(model: Classifier) -> Logits:
    """What makes logits of prepared samples."""

    @torch.no_grad()
    def logits(inputs: Shaped[np.ndarray, "sample ..."]) -> Float32[np.ndarray, "sample class"]:
        result: np.ndarray = model(torch.from_numpy(inputs)).numpy()
        return result

    return logits


def probabilities(logits: Float32[np.ndarray, "sample class"]) -> Float32[np.ndarray, "sample class"]:
    """Softmax of each row."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(1, keepdims=True)
    return shares
