"""Encoded images -> one file of bytes at the model's size, decoded once, memory-mapped ever after.

The folder ``<cache>/images/<hash of content and form>/`` appears whole or not at all:

pixels.npy    uint8 [row channel row column]; an image that cannot be read leaves its row zero
rows.json     which rows these are, what an image weighed, encoded, and what else is worth telling
"""

import hashlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import UInt8
from pydantic import ValidationError
from torch import Tensor

from fleetfit.core.encoding import first_problem
from fleetfit.core.files import others_may_write
from fleetfit.data.named_files import locate
from fleetfit.data.pixel_facts import PictureFacts, Place, Tally, digest_of, place_of
from fleetfit.data.pixels import Decoded, as_image, decode, open_image
from fleetfit.data.preprocessing import Preprocessing
from fleetfit.data.tables import Table

log = logging.getLogger(__name__)

FORMAT = 2
CHUNK = 512


@dataclass(frozen=True)
class PixelStore:
    """Images of a source at one size.

    Attributes:
        pixels: One row for each image that was asked for; memory-mapped, not to be written to.
        bad: Rows whose image cannot be read.
        bytes_per_image: What an encoded image weighs, on average.
        path: The file of the pixels.
        notes: What a person should know of them: sentences.
        range: The smallest and the largest value of their pixels, of 0 to 255.
        kinds: How many images were kept in which way: {"PNG 16 bit grey": 300}.
    """

    pixels: UInt8[Tensor, "image channel row column"]
    bad: tuple[int, ...]
    bytes_per_image: int
    path: Path
    notes: tuple[str, ...] = ()
    range: tuple[int, int] = (0, 255)
    kinds: Mapping[str, int] = field(default_factory=dict)


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
        ValueError: too many images cannot be read, or (nearly) all are of one colour or identical; names the first.
        OSError: the cache cannot be written.
    """
    size = form.model_dump(include={"size", "channels", "resample", "resize"})
    parts = [FORMAT, table.fingerprint, column, hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest(), size]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    folder = cache / "images" / name
    store = _read(folder, (len(rows), *form.shape), table.folder)
    if store is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            with (new / "pixels.npy").open("wb") as file:
                facts = _decode(table, column, rows, form, file, bad_share, threads, progress)
            (new / "rows.json").write_text(facts.model_dump_json())
            if folder.exists():  # damaged, or made by another process meanwhile
                folder.rename(Path(temporary, "old"))
            new.rename(folder)
        store = _read(folder, (len(rows), *form.shape), table.folder)
        assert store is not None
    allowed = bad_share * len(rows)
    if len(store.bad) > allowed:  # the job that decoded them bore more
        raise ValueError(_too_many(len(store.bad), len(rows), bad_share, store.notes[0]))
    return store


def _read(folder: Path, shape: tuple[int, ...], source: Path | None) -> PixelStore | None:
    """What was decoded before; None if nothing was, or if it is damaged."""
    if not folder.exists():
        return None
    cache = folder.parent.parent
    for file in ("pixels.npy", "rows.json"):
        if (folder / file).exists() and (place := others_may_write(folder / file, cache)):
            log.warning("%s is not used, as others may write %s; images are decoded again", folder, place)
            return None
    try:
        pixels = np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False)
        facts = PictureFacts.model_validate_json((folder / "rows.json").read_text())
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"shape {pixels.shape}")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        why = first_problem(error) if isinstance(error, ValidationError) else error
        log.warning("%s is damaged (%s); images are decoded again", folder, why)
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may not be written to, and nobody does
        store = torch.from_numpy(pixels)
    weight, path = facts.bytes_per_image, folder / "pixels.npy"
    return PixelStore(store, facts.bad, weight, path, facts.notes(source), facts.range, facts.kinds)


def _decode(
    table: Table,
    column: str,
    rows: Sequence[int],
    form: Preprocessing,
    file: IO[bytes],
    bad_share: float,
    threads: int,
    progress: Callable[[int, int], None],
) -> PictureFacts:
    """Write all images, one after the other: a full disk is then an error, which under a memory map it is not."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), *form.shape)}
    np.lib.format.write_array_header_1_0(file, header)
    none = np.zeros(form.shape, np.uint8).tobytes()
    tally = Tally(form.channels, form.maximum)
    kind = table.number_kind(column)
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        for chunk in table.chunks(column, rows, CHUNK):
            results = _mapped(pool, threads, lambda value: _one(value, table.folder, form, kind), chunk)
            for value, found in zip(chunk, results, strict=True):
                if isinstance(found, str):
                    tally.add_bad(place_of(value, rows[done], table.folder), found)
                else:
                    tally.add(*found[:-1])
                file.write(none if isinstance(found, str) else found[-1])
                done += 1
            if tally.num_bad > bad_share * len(rows):
                raise ValueError(_too_many(tally.num_bad, done, bad_share, tally.told_problems(table.folder)))
            progress(done, len(rows))
    if tally.num_bad:
        told = tally.told_problems(table.folder)
        log.warning("%d of %d images cannot be read: %s", tally.num_bad, len(rows), told)

    def place_at(number: int) -> Place:
        ((value,),) = table.chunks(column, [rows[number]], 1)
        return place_of(value, rows[number], table.folder)

    return tally.facts(place_at)


def _mapped(pool: ThreadPoolExecutor, threads: int, work: Callable[[Any], Any], values: list[Any]) -> Iterator[Any]:
    return map(work, values) if threads == 1 else pool.map(work, values)


def _one(
    value: Any, folder: Path | None, form: Preprocessing, kind: np.dtype[Any] | None
) -> tuple[Decoded, int, bytes, bytes] | str:
    """What came out, the size of the encoded image, the digest of its pixels and their bytes; else what is wrong."""
    from PIL import Image

    try:
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if value is None:
            return "there is no image"
        if isinstance(value, (str, Path)):
            value = locate(folder, value).read_bytes()
        if isinstance(value, bytes):
            image, weight = open_image(value), len(value)
        else:
            image = value if isinstance(value, Image.Image) else as_image(np.asarray(value, kind))
            weight = image.width * image.height * len(image.getbands())
        found = decode(image, form)
        pixels = found.pixels.tobytes()
        return found, weight, digest_of(pixels), pixels
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # a decoder may raise anything at bytes that are no image
        return str(error) or type(error).__name__


def _too_many(bad: int, looked_at: int, share: float, told: str) -> str:
    most = f"data.bad_image_share = {share:g} of all is the most (a larger one leaves them out)"
    return f"{bad:,} of {looked_at:,} images cannot be read, and {most}; {told}"
