"""The samples of one owner in files of its own: an edge's, a device's, or the cloud's public ones.

What labels there are, and how inputs are made, is decided for the whole fleet and given; no owner decides it alone.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.config.job import Job
from fleetfit.config.sections import DataConfig
from fleetfit.core.files import content_hash
from fleetfit.core.progress import Progress, silent
from fleetfit.core.records import DataSummary, counted
from fleetfit.data.columns import Column, Kind, find_columns, find_input
from fleetfit.data.inputs import Made, make_images, make_texts, read_texts
from fleetfit.data.labels import read_known_labels
from fleetfit.data.named_files import locate
from fleetfit.data.partition import Split, split_rows
from fleetfit.data.pixels import as_image
from fleetfit.data.preprocessing import Preprocessing, TextPreprocessing
from fleetfit.data.samples import Inputs, Samples
from fleetfit.data.sources import Origin, summary_of
from fleetfit.data.tables import Table, open_table
from fleetfit.models.families import family_of

Cut = Literal["given", "own"]
PARTS = ("train", "validation", "test")
INPUT_COLUMN: dict[Kind, str] = {"image": "image", "text": "text"}


def load_owned(
    job: Job,
    source: str,
    cut: Cut,
    labels: tuple[str, ...],
    form: Preprocessing | TextPreprocessing,
    test_share: float,
    names: tuple[str, ...],
    progress: Progress = silent,
    unlabelled: bool = False,
) -> Split:
    """One owner's samples.

    Args:
        job: The resolved job: columns, shares, the cache.
        source: The owner's file or folder, or what else ``data.source`` may be.
        cut: given: the source has splits train, validation and test; own: all of it is cut by the job's shares.
        labels: Names of all classes of the fleet's task.
        form: How inputs are made.
        test_share: What is held out of data that is not cut yet.
        names: Who the owner is, so that the cut is its own.
        progress: Told how far the phase "data" is, but not that it is done.
        unlabelled: Keep inputs without a label of what is for training and validation, beside the samples. Of a test
            split that was given they are left out: it is only reported.

    Raises:
        ValueError: no such source, columns that are not found, labels that the job does not know, inputs that cannot
            be read.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    if cut == "own":
        samples, more = with_inputs_alone(job, source, (), labels, form, progress, unlabelled)
        split = split_rows(samples, torch.arange(len(samples)), job.data, test_share, job.seed, *names)
        return replace(split, summary=samples.summary, unlabelled=more)
    there = _splits_of(Path(source))
    if "train" not in there:
        raise ValueError(f"data.source = {source!r} must have a split train, with data.cut = 'given'")
    read = {
        name: with_inputs_alone(
            job, source, (name,), labels, form, progress, unlabelled and name != "test", unlabelled, name == "train"
        )
        for name in PARTS
        if name in there
    }
    parts = {name: samples for name, (samples, _) in read.items()}
    nothing = parts["train"].rows(torch.arange(0))
    summary = _joined([part.summary for part in parts.values() if part.summary is not None])
    train, validation, test = (parts.get(name, nothing) for name in PARTS)
    return Split(train, validation, test, summary, _together([more for _, more in read.values() if more is not None]))


def write_owned(folder: Path, job: Job, split: Split, origin: Origin) -> None:
    """Write one owner's part of a source as Parquet files, one a split, as the source has them; none that is empty.

    Args:
        folder: Where the files go.
        job: The resolved job: names of columns.
        split: The owner's samples.
        origin: Where they came from.
    """
    from datasets import ClassLabel, Dataset, Features, Image, Value

    kind = family_of(job.model.family).kind
    column, label = job.data.input_column or INPUT_COLUMN[kind], job.data.label_column or "label"
    folder.mkdir(parents=True)
    for name in PARTS:
        samples: Samples = getattr(split, name)
        if not len(samples):
            continue
        values = list(origin.values(samples))
        if kind == "image":
            values = [{"bytes": _encoded(value, origin), "path": None} for value in values]
        feature = Image() if kind == "image" else Value("string")
        features = Features({column: feature, label: ClassLabel(names=list(samples.label_names))})
        rows = Dataset.from_dict({column: values, label: samples.labels.tolist()}, features=features)
        rows.to_parquet(str(folder / f"{name}.parquet"))


def _splits_of(folder: Path) -> tuple[str, ...]:
    return tuple(name for name in PARTS if (folder / f"{name}.parquet").is_file())


def labelled(
    job: Job,
    source: str,
    splits: tuple[str, ...],
    labels: tuple[str, ...],
    form: Preprocessing | TextPreprocessing,
    progress: Progress = silent,
) -> Samples:
    """Samples of a source with their labels, as ``load_owned`` reads each part; those without one are left out.

    Args:
        job: Columns and how files are read; the cache.
        source: The file or folder.
        splits: Which of its splits; none: all.
        labels: Names of all classes.
        form: How inputs are made.
        progress: Told how far the phase "data" is.

    Raises:
        ValueError: as ``load_owned``.
        OSError: as ``load_owned``.
    """
    return with_inputs_alone(job, source, splits, labels, form, progress, keep=False)[0]


def with_inputs_alone(
    job: Job,
    source: str,
    splits: tuple[str, ...],
    labels: tuple[str, ...],
    form: Preprocessing | TextPreprocessing,
    progress: Progress,
    keep: bool,
    any_number: bool | None = None,
    some: bool = True,
) -> tuple[Samples, Samples | None]:
    """The same, and beside them the samples without a label (-1 stands for it) where they are to be kept.

    ``any_number`` of them may be, by default where they are kept; ``some`` labels are needed.
    """
    config = _of_source(job, source, splits)
    cache, table = _opened(job, config, labels, progress)
    kind: Kind = "text" if isinstance(form, TextPreprocessing) else "image"
    column, label_column = find_columns(table, config, kind)
    table = table.with_files_of(column.name) if kind == "image" else table
    known = config.model_copy(update={"missing_label_share": 1.0}) if keep or any_number else config
    found = read_known_labels(table, label_column.name, labels, known)
    if keep and some and found.num_missing == len(found.numbers):
        raise ValueError(f"data.source = {table.origin}: no label in column {label_column.name!r}, and some are needed")
    rows = torch.arange(len(found.numbers)) if keep else (found.numbers >= 0).nonzero().flatten()
    made = _made(job, table, column, rows, form, cache, progress)
    used = rows[made.rows]
    summary = summary_of(source, kind, table, (column, label_column), found, used, made)
    fingerprint = content_hash(summary.fingerprint, summary.form)
    samples = Samples(made.inputs, found.numbers[used], labels, made.bytes_per_sample, fingerprint=fingerprint)
    has_label = found.numbers[used] >= 0
    more = None if bool(has_label.all()) else samples.rows((~has_label).nonzero().flatten())
    return replace(samples.rows(has_label.nonzero().flatten()), summary=summary), more


def inputs_of(
    job: Job, source: str, form: Preprocessing | TextPreprocessing, progress: Progress = silent
) -> tuple[Inputs, tuple[str, ...]]:
    """All inputs of a source, in the order of its rows; labels that it may have are not read.

    Args:
        job: Columns and how files are read; the cache.
        source: The file or folder.
        form: How inputs are made.
        progress: Told how far the phase "data" is.

    Returns:
        The inputs, and in words what was read and left out.

    Raises:
        ValueError: no such source, no column of inputs, or inputs that cannot be read.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    config = _of_source(job, source, job.data.splits)
    cache, table = _opened(job, config, (), progress)
    kind: Kind = "text" if isinstance(form, TextPreprocessing) else "image"
    column = find_input(table, config, kind)
    table = table.with_files_of(column.name) if kind == "image" else table
    made = _made(job, table, column, torch.arange(len(table.rows)), form, cache, progress)
    left_out = {**table.left_out, **made.left_out}
    left = (f"left out {', '.join(counted(number, why) for why, number in left_out.items())}",) if left_out else ()
    return made.inputs, (f"inputs from column {column.name!r} ({column.why})", *left, *table.notes, *made.notes)


def _of_source(job: Job, source: str, splits: tuple[str, ...]) -> DataConfig:
    given = {"source": source, "root": "", "subset": "", "splits": splits, "user_column": ""}
    return job.data.model_copy(update=given)


def _opened(job: Job, config: DataConfig, labels: tuple[str, ...], progress: Progress) -> tuple[Path, Table]:
    cache = job.run.cache_folder
    return cache, open_table(config, cache, lambda words: progress("data", 0, 1, words), labels)


def _made(
    job: Job,
    table: Table,
    column: Column,
    rows: Int[Tensor, " row"],
    form: Preprocessing | TextPreprocessing,
    cache: Path,
    progress: Progress,
) -> Made:
    def told(done: int, total: int, words: str) -> None:
        progress("data", done, total, words)

    if isinstance(form, Preprocessing):
        return make_images(job, table, column, rows, form, cache, told)
    return make_texts(read_texts(job, table, column, rows), form, told)


def _together(parts: Sequence[Samples]) -> Samples | None:
    """The samples of several reads; their inputs are looked up once, as each read has a store of its own."""
    if len(parts) < 2:
        return parts[0] if parts else None
    stores = [part.inputs.store[part.inputs.index] for part in parts]
    inputs = Inputs.of(torch.cat(stores), parts[0].inputs.form)
    weight = round(sum(part.raw_bytes_per_sample * len(part) for part in parts) / sum(map(len, parts)))
    return replace(
        parts[0], inputs=inputs, labels=torch.cat([part.labels for part in parts]), raw_bytes_per_sample=weight
    )


def _joined(parts: Sequence[DataSummary]) -> DataSummary:
    """What was read of an owner's files together."""
    first = parts[0]
    left_out: dict[str, int] = {}
    for part in parts:
        left_out = {why: left_out.get(why, 0) + part.left_out.get(why, 0) for why in {**left_out, **part.left_out}}
    return first.model_copy(
        update={
            "num_files": len(parts),
            "num_rows": sum(part.num_rows for part in parts),
            "num_samples": sum(part.num_samples for part in parts),
            "left_out": left_out,
            "classes": {name: sum(part.classes[name] for part in parts) for name in first.classes},
            "notes": tuple(dict.fromkeys(note for part in parts for note in part.notes)),
            "fingerprint": content_hash(*(part.fingerprint for part in parts)),
        }
    )


def _encoded(value: Any, origin: Origin) -> bytes:
    """An image as the bytes of a file: those that it has, or else a PNG of its pixels."""
    from PIL import Image

    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (str, Path)):
        return locate(origin.folder, value).read_bytes()
    if isinstance(value, bytes):
        return value
    if isinstance(value, list) and origin.number_kind is not None:
        value = np.asarray(value, origin.number_kind)
    file = io.BytesIO()
    (value if isinstance(value, Image.Image) else as_image(value)).save(file, format="PNG")
    return file.getvalue()
