"""Encoded images -> one file of bytes at the model's size, decoded once, memory-mapped ever after.

The folder ``<cache>/images/<hash of content and form>/`` appears whole or not at all:

pixels.npy    uint8 [row channel row column]; an image that cannot be read leaves its row zero
rows.json     which rows these are and what an image weighed, encoded
"""

import hashlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from fleetfit.data.pixels import Pixels, as_image, to_pixels
from fleetfit.data.preprocessing import Preprocessing
from fleetfit.data.tables import Table

log = logging.getLogger(__name__)

FORMAT = 1
CHUNK = 512


@dataclass(frozen=True)
class PixelStore:
    """Images of a source at one size.

    Attributes:
        pixels: One row for each image that was asked for; memory-mapped, not to be written to.
        bad: Rows whose image cannot be read.
        bytes_per_image: What an encoded image weighs, on average.
        path: The file of the pixels.
    """

    pixels: UInt8[Tensor, "image channel row column"]
    bad: tuple[int, ...]
    bytes_per_image: int
    path: Path


def pixel_store(
    table: Table,
    column: str,
    rows: Sequence[int],
    form: Preprocessing,
    cache: Path,
    bad_share: float,
    threads: int,
    progress: Callable[[int, int], None],
) -> PixelStore:
    """The images of some rows, from the cache if they were decoded before.

    Args:
        table: Where the images are.
        column: Which column they are in.
        rows: Which rows.
        form: The size and the colours.
        cache: The job's cache folder.
        bad_share: The share of unreadable images that is borne.
        threads: How many images are decoded at a time.
        progress: Told (done, total), often.

    Raises:
        ValueError: too many images cannot be read; tells the first.
        OSError: the cache cannot be written.
    """
    size = form.model_dump(include={"size", "channels", "resample", "resize"})
    parts = [FORMAT, table.fingerprint, column, hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest(), size]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    folder = cache / "images" / name
    store = _read(folder, (len(rows), *form.shape))
    if store is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            with (new / "pixels.npy").open("wb") as file:
                told = _decode(table, column, rows, form, file, bad_share, threads, progress)
            (new / "rows.json").write_text(json.dumps(told))
            if folder.exists():  # damaged, or made by another process meanwhile
                folder.rename(Path(temporary, "old"))
            new.rename(folder)
        store = _read(folder, (len(rows), *form.shape))
        assert store is not None
    allowed = bad_share * len(rows)
    if len(store.bad) > allowed:  # the job that decoded them bore more
        raise ValueError(_too_many(len(store.bad), len(rows), bad_share))
    return store


def _read(folder: Path, shape: tuple[int, ...]) -> PixelStore | None:
    """What was decoded before; None if nothing was, or if it is damaged."""
    if not folder.exists():
        return None
    try:
        pixels = np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False)
        told = json.loads((folder / "rows.json").read_text())
        bad, weight = tuple(int(row) for row in told["bad"]), int(told["bytes_per_image"])
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"shape {pixels.shape}")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); images are decoded again", folder, error)
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may not be written to, and nobody does
        return PixelStore(torch.from_numpy(pixels), bad, weight, folder / "pixels.npy")


def _decode(
    table: Table,
    column: str,
    rows: Sequence[int],
    form: Preprocessing,
    file: IO[bytes],
    bad_share: float,
    threads: int,
    progress: Callable[[int, int], None],
) -> dict[str, object]:
    """Write all images, one after the other: a full disk is then an error, which under a memory map it is not."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), *form.shape)}
    np.lib.format.write_array_header_1_0(file, header)
    none = np.zeros(form.shape, np.uint8)
    bad: list[int] = []
    weight = done = 0
    first = ""
    with ThreadPoolExecutor(threads) as pool:
        for chunk in table.chunks(column, rows, CHUNK):
            for result in _mapped(pool, threads, lambda value: _one(value, table.folder, form), chunk):
                pixels, size, problem = result
                if pixels is None:
                    first = first or f"row {rows[done]}: {problem}"
                    bad.append(done)
                file.write((none if pixels is None else pixels).tobytes())
                weight += size
                done += 1
            if len(bad) > bad_share * len(rows):
                raise ValueError(_too_many(len(bad), done, bad_share, first))
            progress(done, len(rows))
    if bad:
        log.warning("%d of %d images cannot be read, the first in %s", len(bad), len(rows), first)
    return {"bad": bad, "bytes_per_image": round(weight / max(1, len(rows) - len(bad)))}


def _mapped(pool: ThreadPoolExecutor, threads: int, work: Callable[[Any], Any], values: list[Any]) -> Iterator[Any]:
    return map(work, values) if threads == 1 else pool.map(work, values)


def _one(value: Any, folder: Path | None, form: Preprocessing) -> tuple[Pixels | None, int, str]:
    """Pixels, the size of the encoded image, and what is wrong if there are no pixels."""
    from PIL import Image

    try:
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if value is None:
            return None, 0, "there is no image"
        if isinstance(value, (str, Path)):
            value = Path(folder or ".", value).read_bytes()
        if isinstance(value, bytes):
            return to_pixels(Image.open(io.BytesIO(value)), form), len(value), ""
        if isinstance(value, Image.Image):
            return to_pixels(value, form), value.width * value.height * len(value.getbands()), ""
        image = as_image(value)
        return to_pixels(image, form), image.width * image.height * len(image.getbands()), ""
    except Exception as error:  # a decoder may raise anything at bytes that are no image
        return None, 0, str(error) or type(error).__name__


def _too_many(bad: int, looked_at: int, share: float, first: str = "") -> str:
    return (
        f"{bad:,} of {looked_at:,} images cannot be read, and data.bad_image_share = {share:g} of all is the most"
        f"{f'; the first in {first}' if first else ''}"
    )
