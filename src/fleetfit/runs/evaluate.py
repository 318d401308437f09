"""How good a device's model, or an export of it, is on labelled data: accuracy, confusion, and each class."""

from pathlib import Path

import numpy as np
import torch

from fleetfit.config.job import Job
from fleetfit.config.sections import DataConfig
from fleetfit.core.progress import Progress, silent
from fleetfit.core.records import DataSummary, Record
from fleetfit.data.participant import labelled
from fleetfit.data.pixel_range import WHITE
from fleetfit.data.preprocessing import Form, Preprocessing
from fleetfit.data.samples import Samples
from fleetfit.runs.predict import BATCH, model_in, probabilities


class ClassScore(Record):
    """One class; shares in 0..1, None where there is nothing to divide by."""

    label: str
    support: int
    predicted: int
    precision: float | None
    recall: float | None


class Evaluation(Record):
    """What came of it. ``confusion[i][j]``: samples of class i that were labelled j, both as in ``classes``."""

    samples: int
    correct: int
    accuracy: float
    loss: float
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    data: DataSummary | None


def evaluate_folder(
    folder: Path, source: str, data: DataConfig | None = None, progress: Progress = silent
) -> Evaluation:
    """Label every sample of a source, and compare with its own labels.

    Args:
        folder: A device's folder, or one of ``fleetfit export``.
        source: Labelled samples: a file, a folder, or what else ``data.source`` of a job may be.
        data: How it is read, where that is not found by itself: columns, separator, encoding.
        progress: Told how far it is.

    Raises:
        ValueError: no model there, no such data, or labels that the model does not know.
        OSError: a file cannot be read.
        ImportError: the model is in ONNX, and ONNX Runtime is not installed.
    """
    logits_of, labels, form = model_in(folder)
    job = Job(data=data or DataConfig())
    samples = _read(job, source, labels, form, progress)
    if not len(samples):
        raise ValueError(f"{source}: there is no sample with a label")
    truth, shares = samples.labels.numpy(), []
    for start in range(0, len(samples), BATCH):
        rows = torch.arange(start, min(start + BATCH, len(samples)))
        shares.append(probabilities(logits_of(samples.inputs[rows].numpy())))
        progress("evaluate", min(start + BATCH, len(samples)), len(samples), "")
    likely = np.concatenate(shares)
    if not np.isfinite(likely).all():
        raise ValueError(f"{folder}: the model's output is not finite: its weights are damaged")
    found = likely.argmax(1)
    confusion = np.zeros((len(labels), len(labels)), dtype=int)
    np.add.at(confusion, (truth, found), 1)
    right = np.diag(confusion)
    return Evaluation(
        samples=len(truth),
        correct=int(right.sum()),
        accuracy=float((truth == found).mean()),
        loss=float(-np.log(np.maximum(likely[np.arange(len(truth)), truth], 1e-12)).mean()),
        classes=tuple(
            ClassScore(
                label=label,
                support=int(confusion[i].sum()),
                predicted=int(confusion[:, i].sum()),
                precision=_share(right[i], confusion[:, i].sum()),
                recall=_share(right[i], confusion[i].sum()),
            )
            for i, label in enumerate(labels)
        ),
        confusion=tuple(tuple(int(n) for n in row) for row in confusion),
        data=samples.summary,
    )


def _read(job: Job, source: str, labels: tuple[str, ...], form: Form, progress: Progress) -> Samples:
    """Samples as ``fleetfit predict`` takes them: pictures are scaled to the range of the model's pixels.

    A kit's own files hold pixels as the model's source had them, which is told by none being larger.
    """
    samples = labelled(job, source, job.data.splits, labels, form, progress)
    if not isinstance(form, Preprocessing) or not len(samples) or float(samples.inputs.store.max()) <= form.maximum:
        return samples
    return labelled(job, source, job.data.splits, labels, form.model_copy(update={"maximum": float(WHITE)}), progress)


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
