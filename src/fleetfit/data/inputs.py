"""Rows of a table -> a model's inputs; the same for the cloud's data and for an owner's."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.config.job import Job
from fleetfit.data.columns import Column, as_texts
from fleetfit.data.pixel_store import pixel_store
from fleetfit.data.preprocessing import Preprocessing, TextPreprocessing
from fleetfit.data.samples import Inputs
from fleetfit.data.tables import Table

CHUNK = 1000

Told = Callable[[int, int, str], None]  # done, total, in words


@dataclass(frozen=True)
class Made:
    """What became of the rows that were asked for.

    Attributes:
        inputs: Of those that are good.
        rows: Which of the rows asked for these are.
        bytes_per_sample: What one weighs at rest, on average.
        left_out: How many of the others, by why.
        values: What a person should see of the values: smallest and largest pixel; lengths of texts.
        notes: What else.
    """

    inputs: Inputs
    rows: Int[Tensor, " row"]
    bytes_per_sample: int
    left_out: dict[str, int]
    values: Mapping[str, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Texts:
    """Texts of the rows that have one, and which of the rows these are."""

    texts: list[str]
    rows: list[int]
    num_empty: int


def make_images(
    job: Job, table: Table, column: Column, rows: Int[Tensor, " row"], form: Preprocessing, cache: Path, told: Told
) -> Made:
    """Images, decoded at the form's size.

    Raises:
        ValueError: too many cannot be read.
    """

    def tell(done: int, total: int) -> None:
        told(done, total + 1, f"{done:,} of {total:,} images decoded")

    share, threads = job.data.bad_image_share, job.run.threads
    try:
        store = pixel_store(table, column.name, rows.tolist(), form, cache, share, threads, tell)
    except ValueError as error:
        raise ValueError(f"data.source = {table.origin}: {error}") from error
    good = torch.ones(len(rows), dtype=torch.bool)
    good[list(store.bad)] = False
    index = good.nonzero().flatten()
    left_out = {"images that cannot be read": len(store.bad)} if store.bad else {}
    inputs = Inputs(store.pixels, index, form, path=store.path)
    colours = "grey" if form.channels == 1 else "in colour"
    size = f"images are brought to {form.size[0]} x {form.size[1]} pixels, {colours}"
    values = {"smallest pixel": store.range[0], "largest": store.range[1]}
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in store.kinds.items())
    return Made(
        inputs, index, store.bytes_per_image, left_out, values, (size, *([kinds] if kinds else []), *store.notes)
    )


def read_texts(job: Job, table: Table, column: Column, rows: Int[Tensor, " row"]) -> Texts:
    """The texts of some rows, without those of nothing but space.

    Raises:
        ValueError: a value is no text, or too many are empty.
    """
    said = f"data.input_column = {column.name!r}"
    texts, good = [], []
    values = (v for part in table.chunks(column.name, rows.tolist(), CHUNK) for v in as_texts(part))
    for number, text in enumerate(values):
        if not isinstance(text, str | None):
            raise ValueError(f"{said} must hold texts, got {text!r} in row {int(rows[number])}")
        if text is not None and text.strip():
            texts.append(text)
            good.append(number)
    empty = len(rows) - len(good)
    if empty > job.data.empty_text_share * len(rows):
        raise ValueError(
            f"data.source = {table.origin}: {said}: {empty:,} of {len(rows):,} texts are empty, and "
            f"data.empty_text_share = {job.data.empty_text_share:g} of all is the most"
        )
    return Texts(texts, good, empty)


def make_texts(read: Texts, form: TextPreprocessing, told: Told) -> Made:
    """Token numbers of texts."""
    texts, number = read.texts, len(read.texts)
    store = torch.empty(number, form.num_tokens, dtype=torch.int32)
    num_cut = 0
    for start in range(0, number, CHUNK):
        part = texts[start : start + CHUNK]
        store[start : start + len(part)] = torch.from_numpy(form.apply(part).astype(np.int32))
        num_cut += form.num_too_long(part)
        told(start + len(part), number + 1, f"{start + len(part):,} of {number:,} texts encoded")
    notes = (f"{num_cut:,} texts are cut to {form.num_tokens} tokens",) if num_cut else ()
    left_out = {"empty texts": read.num_empty} if read.num_empty else {}
    weight = round(sum(len(text.encode()) for text in texts) / max(1, number))
    good = torch.tensor(read.rows, dtype=torch.long)
    return Made(Inputs.of(store, form), good, weight, left_out, _lengths(texts), notes)


def _lengths(texts: Sequence[str]) -> dict[str, float]:
    lengths = [len(text) for text in texts] or [0]
    return {
        "shortest text, characters": min(lengths),
        "median": statistics.median(lengths),
        "longest": max(lengths),
    }
