"""The samples of one owner in files of its own: an edge's, a device's, or the cloud's public ones.

What labels there are, and how inputs are made, is decided for the whole fleet and given; no owner decides it alone.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.config import Job
from fleetfit.data.columns import Kind, find_columns
from fleetfit.data.partition import Split, split_rows
from fleetfit.data.pixel_store import pixel_store
from fleetfit.data.pixels import as_image
from fleetfit.data.preprocessing import Preprocessing, TextPreprocessing
from fleetfit.data.samples import Inputs, Samples
from fleetfit.data.sources import Origin
from fleetfit.data.tables import Table, open_table
from fleetfit.messages import Progress, silent
from fleetfit.models.families import family_of

Cut = Literal["given", "own"]
PARTS = ("train", "validation", "test")
SHOWN = 5
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

    Raises:
        ValueError: no such source, columns that are not found, labels that the job does not know, inputs that cannot
            be read.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    if cut == "own":
        samples = _part(job, source, (), labels, form, progress)
        return split_rows(samples, torch.arange(len(samples)), job.data, test_share, job.seed, *names)
    there = _splits_of(Path(source))
    if "train" not in there:
        raise ValueError(f"data.source = {source!r} must have a split train, with data.cut = 'given'")
    parts = {name: _part(job, source, (name,), labels, form, progress) for name in PARTS if name in there}
    nothing = parts["train"].rows(torch.arange(0))
    return Split(*(parts.get(name, nothing) for name in PARTS))


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
            values = [{"bytes": _encoded(value, origin.folder), "path": None} for value in values]
        feature = Image() if kind == "image" else Value("string")
        features = Features({column: feature, label: ClassLabel(names=list(samples.label_names))})
        rows = Dataset.from_dict({column: values, label: samples.labels.tolist()}, features=features)
        rows.to_parquet(str(folder / f"{name}.parquet"))


def _splits_of(folder: Path) -> tuple[str, ...]:
    return tuple(name for name in PARTS if (folder / f"{name}.parquet").is_file())


def _part(
    job: Job,
    source: str,
    splits: tuple[str, ...],
    labels: tuple[str, ...],
    form: Preprocessing | TextPreprocessing,
    progress: Progress,
) -> Samples:
    given = {"source": source, "root": "", "subset": "", "splits": splits, "user_column": "", "label_names": ()}
    config = job.data.model_copy(update=given)
    cache = Path(job.run.cache).expanduser()
    table = open_table(config, cache, lambda words: progress("data", 0, 1, words))
    kind: Kind = "text" if isinstance(form, TextPreprocessing) else "image"
    column, label_column = find_columns(table, config, kind)
    numbers = _labels(table, label_column, labels)
    inputs, index, weight = _inputs(job, table, column, form, cache)
    content = (table.fingerprint, column, index.tolist(), numbers.tolist(), labels, form.model_dump())
    return Samples(
        inputs,
        numbers[index],
        labels,
        weight,
        fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        notes=(f"from {table.origin}",),
    )


def _inputs(
    job: Job, table: Table, column: str, form: Preprocessing | TextPreprocessing, cache: Path
) -> tuple[Inputs, Int[Tensor, " row"], int]:
    """Inputs, the rows that they are of, and what one weighs."""
    rows = list(range(len(table.rows)))
    if isinstance(form, Preprocessing):
        threads, share = job.run.threads, job.data.bad_image_share
        try:
            store = pixel_store(table, column, rows, form, cache, share, threads, lambda done, total: None)
        except ValueError as error:
            raise ValueError(f"data.source = {table.origin}: {error}") from error
        good = torch.ones(len(rows), dtype=torch.bool)
        good[list(store.bad)] = False
        index = good.nonzero().flatten()
        return Inputs(store.pixels, index, form), index, store.bytes_per_image
    texts = [text for part in table.chunks(column, rows, 1000) for text in part]
    index = torch.tensor([row for row, text in enumerate(texts) if isinstance(text, str) and text.strip()])
    missing = len(texts) - len(index)
    if missing > job.data.empty_text_share * len(texts):
        raise ValueError(
            f"data.source = {table.origin}: {missing:,} of {len(texts):,} rows hold no text, and data.empty_text_share "
            f"= {job.data.empty_text_share:g} of all is the most"
        )
    kept = [texts[row] for row in index.tolist()]
    store_of_texts = torch.from_numpy(form.apply(kept).astype(np.int32))
    return Inputs.of(store_of_texts, form), index, round(sum(len(t.encode()) for t in kept) / max(1, len(kept)))


def _labels(table: Table, column: str, names: tuple[str, ...]) -> Int[Tensor, " row"]:
    """Labels as numbers of the fleet's classes: from names; from numbers that are names, or else count the classes.

    Raises:
        ValueError: labels that are missing, or that the fleet does not know.
    """
    from datasets import ClassLabel

    said = f"data.source = {table.origin}: the labels in column {column!r}"
    feature = table.rows.features.get(column)
    values: list[Any] = table.column(column)
    if isinstance(feature, ClassLabel):
        values = [feature.names[v] if v is not None and v >= 0 else None for v in values]
    missing = sum(v is None or v != v or v == "" for v in values)
    if missing:
        raise ValueError(f"{said}: {missing:,} of {len(values):,} are missing")
    number: Mapping[Any, int] = {name: i for i, name in enumerate(names)}
    if not any(isinstance(v, str) for v in values):
        numbered = all(name.removeprefix("-").isdecimal() for name in names)
        place = {int(name): i for i, name in enumerate(names)} if numbered else {i: i for i in range(len(names))}
        number = {v: place[int(v)] for v in values if v == int(v) and int(v) in place}
    unknown = sorted({str(v) for v in values if v not in number})
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        listed = ", ".join(repr(v) for v in unknown[:SHOWN])
        known = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        raise ValueError(f"{said} have {listed}{more}, which the job does not know; its {len(names)} are {known}")
    return torch.tensor([number[v] for v in values], dtype=torch.long)


def _encoded(value: Any, folder: Path | None) -> bytes:
    """An image as the bytes of a file: those that it has, or else a PNG of its pixels."""
    from PIL import Image

    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (str, Path)):
        return Path(folder or ".", value).read_bytes()
    if isinstance(value, bytes):
        return value
    file = io.BytesIO()
    (value if isinstance(value, Image.Image) else as_image(value)).save(file, format="PNG")
    return file.getvalue()
