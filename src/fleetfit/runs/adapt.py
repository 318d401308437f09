"""Class shares of a shipped model, estimated anew on inputs without labels, where the device is used (Beyond).

Only what the last bias takes for granted moves (label shift: classes look as in training, and come with other shares).
No label is needed and no weight is trained; the weights file stays as it is, and ``undo`` forgets the estimate.
"""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fleetfit.config.job import Job
from fleetfit.config.sections import DataConfig
from fleetfit.core.progress import Progress, silent
from fleetfit.core.records import Record, counted
from fleetfit.data.image_folder import files_below, is_picture
from fleetfit.data.participant import inputs_of
from fleetfit.data.pixel_range import WHITE
from fleetfit.data.preprocessing import Form, Preprocessing, TextPreprocessing
from fleetfit.data.sample_files import read_samples, read_texts
from fleetfit.method.class_prior import ShiftPrior, held_out_gain, new_shares
from fleetfit.runs.device_folder import (
    EXPORT_FILE,
    ONNX_FILE,
    TORCH_FILE,
    Adaptation,
    ModelCard,
    load_model,
    read_card,
    write_card,
)
from fleetfit.runs.predict import BATCH, Logits, logits_of_model, need_form

FEWEST = 20  # inputs; of fewer, shares are mostly chance
ERRORS = 2.0  # standard errors by which inputs must have become likelier


class ClassShare(Record):
    """A class, and its share as the model expects it, 0..1."""

    label: str
    shipped: float
    before: float
    now: float


class Adapted(Record):
    """What came of it; ``adapted`` is None where the model is, or is again, as it was shipped."""

    device_id: str
    num_inputs: int
    classes: tuple[ClassShare, ...]
    adapted: Adaptation | None
    gain: float
    gain_error: float
    notes: tuple[str, ...] = ()


def adapt_folder(
    folder: Path, sources: Sequence[str], data: DataConfig | None = None, progress: Progress = silent
) -> Adapted:
    """Estimate the class shares of a device's data anew, and let its model expect them from now on.

    It always begins at the model as it was shipped, so the same inputs give the same result. The estimate is kept only
    where inputs that it was not made on become clearly likelier by it; else the model is as it was shipped.

    Args:
        folder: A device's folder.
        sources: Inputs: images and .npy files, .txt files with a text in each line, folders of these, or tables as
            ``data.source`` of a job may be. Labels that they have are not read.
        data: How tables are read, where that is not found by itself.
        progress: Told how far it is.

    Raises:
        ValueError: no device folder, a model that does not say which shares it expects or cannot be trusted with
            others, too few inputs, or inputs that cannot be read.
        OSError: a file cannot be read or written.
    """
    card, weights = _card(folder), _stamp(folder)
    if not all(sources):
        raise ValueError("--data must name a file or a folder, got an empty name")
    if not card.expected_shares:
        raise ValueError(
            f"{folder / 'model.json'} does not say which class shares the model expects: a job with [privacy], or an "
            "earlier fleetfit, keeps them out, and so does a copy of the model that is not the device's own"
        )
    if not card.shifts:
        raise ValueError(
            "this model is not adapted without labels: tried on the device's own samples, whose labels are known, that "
            "made their labels less likely, so what it takes for other shares may be its own mistakes"
        )
    logits_of, form = logits_of_model(load_model(folder, as_shipped=True)), need_form(card.preprocessing, folder)
    notes: list[str] = []
    job = Job(data=data or DataConfig())
    logits, different = _logits(logits_of, _inputs(dict.fromkeys(sources), form, job, notes, progress), progress)
    if different < FEWEST:
        alike = f", of which {different} are different" if different < len(logits) else ""
        raise ValueError(
            f"--data: at least {FEWEST} inputs are needed to estimate class shares, got {len(logits)}{alike}"
        )
    if not bool(logits.isfinite().all()):
        raise ValueError(f"{folder}: the model's output is not finite: its weights are damaged")
    shares = torch.tensor(card.expected_shares, dtype=logits.dtype)
    adapted, gain, error = estimate(logits, shares, card.shifts)
    if _card(folder) != card or _stamp(folder) != weights:
        raise ValueError(f"{folder}: the model there was replaced in the meantime; nothing was changed, adapt it again")
    if adapted != card.adapted:
        write_card(folder, card.model_copy(update={"adapted": adapted}))
    return Adapted(
        device_id=card.device_id,
        num_inputs=len(logits),
        classes=_classes(card, adapted),
        adapted=adapted,
        gain=gain,
        gain_error=error,
        notes=tuple(notes),
    )


def estimate(
    logits: Float[Tensor, "sample class"], shares: Float[Tensor, " class"], known: Sequence[ShiftPrior]
) -> tuple[Adaptation | None, float, float]:
    """The class shares that inputs speak for, if held-out ones become clearly likelier by them.

    How much the shares expected before say of the new ones is what makes held-out inputs likeliest.

    Args:
        logits: Of the model as it was shipped.
        shares: What it expects.
        known: How much these may say of the new ones.

    Returns:
        The estimate or None, and the gain on held-out inputs with its standard error (nats an input).
    """
    gains = {one: held_out_gain(logits, shares, one) for one in known}
    best = max(gains, key=lambda one: gains[one][0])
    gain, error = gains[best]
    if not (error > 0 and gain > ERRORS * error):  # without any spread these are no samples of what is to come
        return None, gain, error
    now = (shares.log() + new_shares(logits, shares, best)).softmax(-1)
    found = Adaptation(
        class_shares=tuple(now.tolist()),
        num_inputs=len(logits),
        strength=best.strength,
        concentration=best.concentration,
        gain=gain,
        gain_error=error,
    )
    return found, gain, error


def undo(folder: Path) -> tuple[ClassShare, ...]:
    """Let a device's model be as it was shipped.

    Returns:
        Its classes; none where it was so already.

    Raises:
        ValueError: no device folder.
        OSError: it cannot be written.
    """
    card = _card(folder)
    if card.adapted is None:
        return ()
    write_card(folder, card.model_copy(update={"adapted": None}))
    return _classes(card, None)


def _card(folder: Path) -> ModelCard:
    for name in (ONNX_FILE, TORCH_FILE, EXPORT_FILE):
        if (folder / name).exists():
            raise ValueError(
                f"{folder / name} is an export, and stays as it is: adapt the device's folder, and export it"
            )
    return read_card(folder)


def _stamp(folder: Path) -> tuple[int, ...]:
    """Changes when the weights are written anew."""
    status = (folder / "model.safetensors").stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _classes(card: ModelCard, adapted: Adaptation | None) -> tuple[ClassShare, ...]:
    before = card.adapted.class_shares if card.adapted else card.expected_shares
    now = adapted.class_shares if adapted else card.expected_shares
    rows = zip(card.labels, card.expected_shares, before, now, strict=True)
    return tuple(ClassShare(label=name, shipped=s, before=b, now=n) for name, s, b, n in rows)


def _logits(
    logits_of: Logits, batches: Iterator[np.ndarray], progress: Progress
) -> tuple[Float[Tensor, "sample class"], int]:
    """Of all inputs, and how many of these are different from each other."""
    parts, done = [], 0
    different: set[bytes] = set()
    for batch in batches:
        different.update(hashlib.sha256(one.tobytes()).digest() for one in batch)
        parts.append(torch.from_numpy(logits_of(batch)).double())
        done += len(batch)
        progress("adapt", 0, 1, f"{done:,} inputs")
    progress("adapt", 1, 1, "")
    return torch.cat(parts) if parts else torch.empty(0, 1, dtype=torch.float64), len(different)


def _inputs(
    sources: Sequence[str] | dict[str, None], form: Form, job: Job, notes: list[str], progress: Progress
) -> Iterator[np.ndarray]:
    """Prepared inputs in batches; what a person should know is noted."""
    seen: set[Path] = set()
    for source in sources:
        path = Path(source).expanduser()
        if not (path.exists() or glob.glob(str(path))):
            raise ValueError(f"--data: {source}: no such file or folder")
        found = _loose(path, form)
        files = [file for file in found if file.resolve() not in seen]
        seen.update(file.resolve() for file in files)
        if found and path.is_dir() and (others := len(files_below(path)) - len(found)):
            notes.append(f"{path}: {counted(others, 'files')} beside these are of another kind, and were not read")
        if found and len(files) < len(found):
            notes.append(f"{path}: {counted(len(found) - len(files), 'files')} were given before, and count once")
        if not found and path.exists():
            if path.resolve() in seen:
                notes.append(f"{path} was given before, and counts once")
                continue
            seen.add(path.resolve())
        if not found:
            yield from _of_table(source, form, job, notes, progress)
        elif isinstance(form, TextPreprocessing):
            for file in files:
                texts = list(read_texts(str(file)).values())
                for start in range(0, len(texts), BATCH):
                    yield form.apply(texts[start : start + BATCH])
        else:
            yield from _of_pictures(files, path, form, job, notes)


def _loose(path: Path, form: Form) -> list[Path]:
    """The files of a source that hold inputs and nothing else; none of a table."""
    files = files_below(path) if path.is_dir() else [path] if path.is_file() else []
    if isinstance(form, TextPreprocessing):
        return [file for file in files if file.suffix.lower() == ".txt"]
    return [file for file in files if file.suffix.lower() == ".npy" or is_picture(file)]


def _of_pictures(
    files: Sequence[Path], path: Path, form: Preprocessing, job: Job, notes: list[str]
) -> Iterator[np.ndarray]:
    unread: list[str] = []
    told: list[str] = []
    waiting: list[np.ndarray] = []
    for file in files:
        try:
            samples, done = read_samples(file, form)
        except ValueError as error:
            unread.append(str(error))
            continue
        if done:
            told.append(f"{file.name}: {done}")
        waiting.append(samples)
        if sum(map(len, waiting)) >= BATCH:
            yield form.apply(np.concatenate(waiting))
            waiting = []
    if len(unread) > job.data.bad_image_share * len(files):
        raise ValueError(
            f"{path}: {counted(len(unread), 'files')} of {len(files):,} cannot be read, and the most is "
            f"{job.data.bad_image_share:g} of all; the first: {unread[0]}"
        )
    if unread:
        notes.append(f"left out {counted(len(unread), 'files')} that cannot be read, the first: {unread[0]}")
    if told:
        notes.append(
            f"{path}: {told[0]}" + (f"; so it is with {len(told):,} of {len(files):,}" if len(told) > 1 else "")
        )
    if waiting:
        yield form.apply(np.concatenate(waiting))


def _of_table(source: str, form: Form, job: Job, notes: list[str], progress: Progress) -> Iterator[np.ndarray]:
    inputs, told = inputs_of(job, source, form, progress)
    if isinstance(form, Preprocessing) and len(inputs) and float(inputs.store.max()) > form.maximum:
        inputs, told = inputs_of(job, source, form.model_copy(update={"maximum": float(WHITE)}), progress)
    notes += told
    for batch in inputs.batches(BATCH):
        yield batch.numpy()
