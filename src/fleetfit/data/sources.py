"""Where samples come from: a job -> all its samples, as its model takes them."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.config.job import Job
from fleetfit.core.files import content_hash
from fleetfit.core.progress import Progress, silent
from fleetfit.core.randomness import named_generator
from fleetfit.core.records import DataSummary, counted
from fleetfit.data.columns import Column, Kind, draw_by_class, find_columns, read_users
from fleetfit.data.image_forms import image_form
from fleetfit.data.inputs import CHUNK, Made, make_images, make_texts, read_texts
from fleetfit.data.labels import Labels, read_labels
from fleetfit.data.partition import cut_tiers
from fleetfit.data.preprocessing import Preprocessing
from fleetfit.data.samples import Inputs, Samples
from fleetfit.data.tables import Table, open_table
from fleetfit.data.text_forms import text_form
from fleetfit.models.families import family_of
from fleetfit.models.pretrained import read_config_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where samples came from, value by value, before they became inputs.

    Attributes:
        chunks: Values of some rows of the source, in order, a few at a time.
        rows: The source's row of each row of the samples' store.
        folder: What relative paths in the values start from.
        number_kind: What numbers arrays among the values hold, where they do not say it themselves.
    """

    chunks: Callable[[list[int]], Iterator[list[Any]]]
    rows: Int[Tensor, " stored"]
    folder: Path | None = None
    number_kind: "np.dtype[Any] | None" = None

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
    cache = job.run.cache_folder
    table = open_table(job.data, cache, lambda words: progress("data", 0, 1, words))
    column, label_column = find_columns(table, job.data, kind)
    table = table.with_files_of(column.name) if kind == "image" else table
    labels = read_labels(table, label_column.name, job.data)
    users = read_users(table, job.data.user_column) if job.data.user_column else None
    rows = _drawn(labels.numbers, job)
    found = MADE[kind](job, table, column, rows, cache, progress)
    used = rows[found.rows]
    if len(set(labels.numbers[used].tolist())) < 2:
        raise ValueError(f"data.source = {job.data.source!r}: the samples that are left are of one class")
    summary = summary_of(job.data.source, kind, table, (column, label_column), labels, used, found)
    undrawn = len(labels.numbers) - labels.num_missing - len(rows)
    if undrawn:
        summary = summary.model_copy(update={"left_out": {**summary.left_out, "not drawn (data.limit)": undrawn}})
    samples = Samples(
        found.inputs,
        labels.numbers[used],
        labels.names,
        found.bytes_per_sample,
        users=None if users is None else users[used],
        fingerprint=content_hash(summary.fingerprint, summary.form),
        summary=summary,
    )
    stored = torch.zeros(len(found.inputs.store), dtype=torch.long)
    stored[found.inputs.index] = used
    kind_of_numbers = table.number_kind(column.name)
    return samples, Origin(
        lambda chosen: table.chunks(column.name, chosen, CHUNK), stored, table.folder, kind_of_numbers
    )


def summary_of(
    source: str,
    kind: Kind,
    table: Table,
    columns: tuple[Column, Column],
    labels: Labels,
    used: Int[Tensor, " row"],
    made: Made,
) -> DataSummary:
    """What was read of a table, and what was left out and why; logged, too.

    Of rows without a label, those among the ``used`` ones are no samples, but kept.
    """
    column, label_column = columns
    by_folder = bool(table.class_rule) and label_column.why == table.class_rule  # there are no columns, for a person
    left_out = dict(table.left_out)
    has_label = labels.numbers[used] >= 0
    num_unlabelled = int((~has_label).sum())
    if missing := labels.num_missing - num_unlabelled:
        left_out["samples without a label"] = missing
    left_out |= made.left_out
    counts = torch.bincount(labels.numbers[used][has_label], minlength=len(labels.names)).tolist()
    kept = counted(num_unlabelled, "samples without a label")
    unlabelled = (f"{kept} kept: class shares are estimated on them",) if num_unlabelled else ()
    content = [table.fingerprint, column.name, label_column.name, used.tolist(), labels.numbers[used].tolist()]
    summary = DataSummary(
        source=source,
        origin=table.origin,
        kind=kind,
        num_files=table.num_files,
        num_rows=len(table.rows) + table.left_out.get("blank rows", 0),
        num_samples=int(has_label.sum()),
        left_out=left_out,
        input_column="" if by_folder else column.name,
        input_why=column.why,
        label_column="" if by_folder else label_column.name,
        label_why=label_column.why,
        classes=dict(zip(labels.names, counts, strict=True)),
        values=dict(made.values),
        notes=(*table.notes, *labels.notes, *made.notes, *unlabelled),
        fingerprint=hashlib.sha256(json.dumps([content, labels.names]).encode()).hexdigest(),
        form=content_hash(made.inputs.form and made.inputs.form.model_dump()),
    )
    for why, number in left_out.items():
        log.info("%s: left out %d %s", table.origin, number, why)
    for note in summary.notes:
        log.info("%s: %s", table.origin, note)
    return summary


def _images(job: Job, table: Table, column: Column, rows: Int[Tensor, " row"], cache: Path, progress: Progress) -> Made:
    return make_images(job, table, column, rows, image_form(job.model), cache, _told(progress))


def _texts(job: Job, table: Table, column: Column, rows: Int[Tensor, " row"], cache: Path, progress: Progress) -> Made:
    """Token numbers of all texts; how they are made is decided on the public ones alone."""
    read = read_texts(job, table, column, rows)
    public = cut_tiers(read.texts, job.data, job.seed)[1]
    progress("data", 0, len(read.texts) + 1, "making the tokenizer")
    notes: list[str] = []
    form = text_form(job.model, [read.texts[row] for row in public], job.data.max_tokens, notes.append)
    made = make_texts(read, form, _told(progress))
    return replace(made, notes=(*notes, *made.notes))


def _told(progress: Progress) -> Callable[[int, int, str], None]:
    return lambda done, total, words: progress("data", done, total, words)


MADE: dict[Kind, Callable[[Job, Table, Column, Int[Tensor, " row"], Path, Progress], Made]] = {
    "image": _images,
    "text": _texts,
}


def _drawn(labels: Int[Tensor, " sample"], job: Job) -> Int[Tensor, " row"]:
    """Rows with a label, or some of them."""
    there = (labels >= 0).nonzero().flatten()
    if job.data.limit is None or job.data.limit >= len(there):
        return there
    return there[draw_by_class(labels[there], job.data.limit, named_generator(job.seed, "data", "limit"))]


def _some(digits: Samples, job: Job) -> Samples:
    for key in ("input_column", "label_column", "user_column"):
        if getattr(job.data, key):
            raise ValueError(f"data.{key} = {getattr(job.data, key)!r}: data.source = 'digits' has no columns")
    some = digits
    if job.data.limit is not None:
        some = replace(digits.rows(_drawn(digits.labels, job)), fingerprint=f"digits {job.data.limit} {job.seed}")
    left_out = {"not drawn (data.limit)": len(digits) - len(some)} if len(some) < len(digits) else {}
    summary = DataSummary(
        source="digits",
        origin="scikit-learn's handwritten digits",
        kind="image",
        num_rows=len(digits),
        num_samples=len(some),
        left_out=left_out,
        classes=dict(zip(some.label_names, torch.bincount(some.labels, minlength=10).tolist(), strict=True)),
        values={"smallest pixel": 0, "largest": 16},
        fingerprint=some.fingerprint,
    )
    return replace(some, summary=summary)


def _digits() -> Samples:
    from sklearn.datasets import load_digits

    digits = load_digits()
    form = Preprocessing(size=(8, 8), channels=1, maximum=16, mean=(0.5,), std=(0.5,))
    pixels = torch.from_numpy(digits.images[:, None].astype("uint8"))
    labels = torch.tensor(digits.target, dtype=torch.long)
    names = tuple(str(d) for d in range(10))
    # One byte a pixel is what they need at rest.
    return Samples(Inputs.of(pixels, form), labels, names, raw_bytes_per_sample=64, fingerprint="digits")
