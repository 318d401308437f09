"""Where samples come from: a job -> all its samples, as its model takes them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.config import Job
from fleetfit.data.columns import draw_by_class, find_columns, read_labels, read_users
from fleetfit.data.image_forms import image_form
from fleetfit.data.pixel_store import pixel_store
from fleetfit.data.preprocessing import Preprocessing
from fleetfit.data.samples import Inputs, Samples
from fleetfit.data.tables import Table, open_table
from fleetfit.messages import Progress, silent
from fleetfit.randomness import named_generator


def load_samples(job: Job, progress: Progress = silent) -> Samples:
    """All samples of the job's source.

    Args:
        job: The resolved job: where from, for which model, and where the cache is.
        progress: Told how far the phase "data" is, but not that it is done.

    Raises:
        ValueError: no such source, no network, columns that are not found, labels that are missing or do not match,
            too many images that cannot be read.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    if job.data.source == "digits":
        return _digits()
    cache = Path(job.run.cache).expanduser()
    table = open_table(job.data, cache, lambda words: progress("data", 0, 1, words))
    column, label_column = find_columns(table, job.data, "image")
    labels, names = read_labels(table, label_column, job.data)
    users = read_users(table, job.data.user_column) if job.data.user_column else None
    rows = torch.arange(len(labels))
    if job.data.limit is not None and job.data.limit < len(labels):
        rows = draw_by_class(labels, job.data.limit, named_generator(job.seed, "data", "limit"))
    made = _images(job, table, column, rows, cache, progress)
    used = rows[made.inputs.index]
    notes = [f"from {table.origin}", *made.notes]
    if len(set(labels[used].tolist())) < 2:
        raise ValueError(f"data.source = {job.data.source!r}: the samples that are left are of one class")
    return Samples(
        made.inputs,
        labels[used],
        names,
        made.bytes_per_sample,
        users=None if users is None else users[used],
        fingerprint=_hash(table.fingerprint, column, labels[used].tolist(), names, rows.tolist(), made.form),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Made:
    """What became of the rows that were asked for; rows that are no good are not in the inputs' index."""

    inputs: Inputs
    bytes_per_sample: int
    form: str
    notes: tuple[str, ...]


def _images(job: Job, table: Table, column: str, rows: Int[Tensor, " row"], cache: Path, progress: Progress) -> _Made:
    form = image_form(job.model)

    def tell(done: int, total: int) -> None:
        progress("data", done, total + 1, f"{done:,} of {total:,} images decoded")

    share, threads = job.data.bad_image_share, job.run.threads
    try:
        store = pixel_store(table, column, rows.tolist(), form, cache, share, threads, tell)
    except ValueError as error:
        raise ValueError(f"data.source = {job.data.source!r}: {error}") from error
    good = torch.ones(len(rows), dtype=torch.bool)
    good[list(store.bad)] = False
    inputs = Inputs(store.pixels, good.nonzero().flatten(), form)
    notes = (f"{len(store.bad):,} images that cannot be read are left out",) if store.bad else ()
    return _Made(inputs, store.bytes_per_image, form.model_dump_json(), notes)


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digits() -> Samples:
    from sklearn.datasets import load_digits

    digits = load_digits()
    form = Preprocessing(size=(8, 8), channels=1, maximum=16, mean=(0.5,), std=(0.5,))
    pixels = torch.from_numpy(digits.images[:, None].astype("uint8"))
    labels = torch.tensor(digits.target, dtype=torch.long)
    names = tuple(str(d) for d in range(10))
    # One byte a pixel is what they need at rest.
    return Samples(Inputs.of(pixels, form), labels, names, raw_bytes_per_sample=64, fingerprint="digits")
