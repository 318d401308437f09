"""Where samples come from: a job -> all its samples, as its model takes them."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.config import Job
from fleetfit.data.columns import Kind, draw_by_class, find_columns, read_labels, read_users
from fleetfit.data.image_forms import image_form
from fleetfit.data.partition import cut_tiers
from fleetfit.data.pixel_store import pixel_store
from fleetfit.data.preprocessing import Preprocessing
from fleetfit.data.samples import Inputs, Samples
from fleetfit.data.tables import Table, open_table
from fleetfit.data.text_forms import text_form
from fleetfit.messages import Progress, silent
from fleetfit.models.families import family_of
from fleetfit.models.pretrained import read_config_of
from fleetfit.randomness import named_generator

log = logging.getLogger(__name__)

CHUNK = 1000


@dataclass(frozen=True)
class Origin:
    """Where samples came from, value by value, before they became inputs.

    Attributes:
        chunks: Values of some rows of the source, in order, a few at a time.
        rows: The source's row of each row of the samples' store.
        folder: What relative paths in the values start from.
    """

    chunks: Callable[[list[int]], Iterator[list[Any]]]
    rows: Int[Tensor, " stored"]
    folder: Path | None = None

    def values(self, samples: Samples) -> Iterator[Any]:
        """The values that some of the samples were made of; images may be encoded, paths, or arrays of bytes."""
        for part in self.chunks(self.rows[samples.inputs.index].tolist()):
            yield from part


def load_samples(job: Job, progress: Progress = silent) -> Samples:
    """All samples of the job's source; ``load_source`` without where each came from."""
    return load_source(job, progress)[0]


def load_source(job: Job, progress: Progress = silent) -> tuple[Samples, Origin]:
    """All samples of the job's source, and where each came from.

    Args:
        job: The resolved job: where from, for which model, and where the cache is.
        progress: Told how far the phase "data" is, but not that it is done.

    Raises:
        ValueError: no such source, no network, columns that are not found, labels that are missing or do not match,
            too many images that cannot be read or texts that are empty; a pre-trained model that is not there.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    kind = family_of(job.model.family).kind
    if job.data.source == "digits":
        if kind == "text":
            raise ValueError(f"data.source = 'digits' has images, but model.family = {job.model.family!r} reads texts")
        digits = _digits()
        store = digits.inputs.store.numpy()
        origin = Origin(lambda rows: iter([list(store[rows])]), torch.arange(len(store)))
        return _some(digits, job), origin
    if job.model.pretrained:
        read_config_of(job.model.pretrained, job.model.family)  # is it there, and does it read what the family reads?
    cache = Path(job.run.cache).expanduser()
    table = open_table(job.data, cache, lambda words: progress("data", 0, 1, words))
    column, label_column = find_columns(table, job.data, kind)
    labels, names = read_labels(table, label_column, job.data)
    users = read_users(table, job.data.user_column) if job.data.user_column else None
    rows = _drawn(labels, job)
    found = MADE[kind](job, table, column, rows, cache, progress)
    used = rows[found.rows]
    if len(set(labels[used].tolist())) < 2:
        raise ValueError(f"data.source = {job.data.source!r}: the samples that are left are of one class")
    form = found.inputs.form
    content = (table.fingerprint, column, used.tolist(), labels[used].tolist(), names, form and form.model_dump())
    samples = Samples(
        found.inputs,
        labels[used],
        names,
        found.bytes_per_sample,
        users=None if users is None else users[used],
        fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        notes=(f"from {table.origin}", *found.notes),
    )
    stored = torch.zeros(len(found.inputs.store), dtype=torch.long)
    stored[found.inputs.index] = used
    return samples, Origin(lambda chosen: table.chunks(column, chosen, CHUNK), stored, table.folder)


@dataclass(frozen=True)
class _Made:
    """What became of the rows that were asked for: inputs, and which of the rows they are; the others are no good."""

    inputs: Inputs
    rows: Int[Tensor, " row"]
    bytes_per_sample: int
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
    index = good.nonzero().flatten()
    return _Made(Inputs(store.pixels, index, form, path=store.path), index, store.bytes_per_image, store.notes)


def _texts(job: Job, table: Table, column: str, rows: Int[Tensor, " row"], cache: Path, progress: Progress) -> _Made:
    """Token numbers of all texts; how they are made is decided on the public ones alone."""
    texts, good = [], []
    for number, text in enumerate(text for part in table.chunks(column, rows.tolist(), CHUNK) for text in part):
        if not isinstance(text, str | None):
            raise ValueError(f"data.input_column = {column!r} must hold texts, got {text!r} in row {int(rows[number])}")
        if text is not None and text.strip():
            texts.append(text)
            good.append(number)
    empty = len(rows) - len(good)
    if empty > job.data.empty_text_share * len(rows):
        raise ValueError(
            f"data.input_column = {column!r}: {empty:,} of {len(rows):,} texts are empty, and data.empty_text_share = "
            f"{job.data.empty_text_share:g} of all is the most"
        )
    public = cut_tiers(texts, job.data, job.seed)[1]
    progress("data", 0, len(texts) + 1, "making the tokenizer")
    form = text_form(job.model, [texts[row] for row in public], job.data.max_tokens)
    store = torch.empty(len(texts), form.num_tokens, dtype=torch.int32)
    num_cut = 0
    for start in range(0, len(texts), CHUNK):
        part = texts[start : start + CHUNK]
        store[start : start + len(part)] = torch.from_numpy(form.apply(part))
        num_cut += form.num_too_long(part)
        progress("data", start + len(part), len(texts) + 1, f"{start + len(part):,} of {len(texts):,} texts encoded")
    notes = []
    if empty:
        notes.append(f"{empty:,} empty texts are left out")
        log.warning("%d of %d texts are empty and left out", empty, len(rows))
    if num_cut:
        notes.append(f"{num_cut:,} texts are cut to {form.num_tokens} tokens")
    weight = round(sum(len(text.encode()) for text in texts) / len(texts))
    return _Made(Inputs.of(store, form), torch.tensor(good, dtype=torch.long), weight, tuple(notes))


MADE: dict[Kind, Callable[[Job, Table, str, Int[Tensor, " row"], Path, Progress], _Made]] = {
    "image": _images,
    "text": _texts,
}


def _drawn(labels: Int[Tensor, " sample"], job: Job) -> Int[Tensor, " row"]:
    if job.data.limit is None or job.data.limit >= len(labels):
        return torch.arange(len(labels))
    return draw_by_class(labels, job.data.limit, named_generator(job.seed, "data", "limit"))


def _some(digits: Samples, job: Job) -> Samples:
    for key in ("input_column", "label_column", "user_column"):
        if getattr(job.data, key):
            raise ValueError(f"data.{key} = {getattr(job.data, key)!r}: data.source = 'digits' has no columns")
    if job.data.limit is None:
        return digits
    return replace(digits.rows(_drawn(digits.labels, job)), fingerprint=f"digits {job.data.limit} {job.seed}")


def _digits() -> Samples:
    from sklearn.datasets import load_digits

    digits = load_digits()
    form = Preprocessing(size=(8, 8), channels=1, maximum=16, mean=(0.5,), std=(0.5,))
    pixels = torch.from_numpy(digits.images[:, None].astype("uint8"))
    labels = torch.tensor(digits.target, dtype=torch.long)
    names = tuple(str(d) for d in range(10))
    # One byte a pixel is what they need at rest.
    return Samples(Inputs.of(pixels, form), labels, names, raw_bytes_per_sample=64, fingerprint="digits")
