"""What is told of pictures before a model learns from them: what cannot be read, is alike, or came out dark."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fleetfit.config.job import make_job
from fleetfit.data import pixel_store as module
from fleetfit.data.participant import load_owned
from fleetfit.data.pixel_store import PixelStore, pixel_store
from fleetfit.data.preprocessing import Preprocessing
from fleetfit.data.sample_files import read_samples
from fleetfit.data.tables import Table

torch.set_num_threads(1)

GREY = Preprocessing(size=(8, 8), channels=1, maximum=255, mean=(0.5,), std=(0.5,))
RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 256, (60, 8, 8), np.uint8)


def encoded(values: np.ndarray, kind: str = "PNG", **how: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind, **how)
    return file.getvalue()


def table_of(folder: Path, images: list[Any], feature: Any = None) -> Table:
    """Rows of pictures: bytes are files of their own, all else is as it is."""
    from datasets import Dataset, Features

    folder.mkdir(parents=True, exist_ok=True)
    values = []
    for number, image in enumerate(images):
        if isinstance(image, bytes):
            (folder / f"{number}.png").write_bytes(image)
            image = {"bytes": None, "path": str(folder / f"{number}.png")}
        values.append(image)
    features = Features({"image": feature}) if feature else None
    rows = Dataset.from_dict({"image": values}, features=features)
    return Table(rows, f"{folder.name} {len(images)}", "here", folder)


def store_of(
    folder: Path, images: list[Any], bad_share: float = 0.5, threads: int = 1, feature: Any = None
) -> PixelStore:
    table = table_of(folder / "data", images, feature)
    rows = range(len(images))
    found = pixel_store(table, "image", rows, GREY, folder / "cache", bad_share, threads, lambda *_: None)
    again = pixel_store(table, "image", rows, GREY, folder / "cache", bad_share, threads, lambda *_: None)
    assert (again.notes, again.range, again.kinds, again.bad) == (found.notes, found.range, found.kinds, found.bad)
    return found


def test_pictures_with_nothing_to_tell(tmp_path: Path) -> None:
    images = [encoded(v) for v in NOISE[:20]]
    images += [encoded(np.stack([v] * 3, 2) // 2 + 3, "JPEG") for v in NOISE[20:25]]
    images += [encoded(v.astype(np.uint16) * 257) for v in NOISE[25:32]]
    found = store_of(tmp_path, images)
    assert found.notes == ()
    assert found.kinds == {"PNG 8 bit grey": 20, "JPEG 8 bit colour": 5, "PNG 16 bit grey": 7}
    assert found.range == (int(found.pixels.min()), int(found.pixels.max())) == (0, 255)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_few_that_are_unlike_pictures_are_told_and_named(tmp_path: Path, threads: int) -> None:
    half = Image.fromarray(np.dstack([np.zeros((8, 8, 3), np.uint8), NOISE[50]]))
    file = io.BytesIO()
    half.save(file, "PNG")
    moving = encoded(NOISE[51], "GIF", save_all=True, append_images=[Image.fromarray(NOISE[52])])
    images = [encoded(v) for v in NOISE[:40]]
    images[3] = images[30] = images[9]
    images[12] = images[20]
    images[5], images[6] = encoded(np.full((9, 9), 70, np.uint8)), encoded(NOISE[6] % 17 + 200)
    images[7], images[8] = encoded(NOISE[6] % 18), file.getvalue()
    images[33] = moving
    found = store_of(tmp_path, images, threads=threads)
    place = {n: str(tmp_path / "data" / f"{n}.png") for n in range(40)}
    assert found.notes == (
        f"2 of 40 pictures are (nearly) of one colour, the first {place[5]}",
        f"5 of 40 pictures are identical to another one, the first {place[3]} and {place[9]}",
        f"1 of 40 pictures are the first of several in their file; the others are not used, the first {place[33]}",
        f"1 of 40 pictures have transparent parts and are laid on white, the first {place[8]}",
    )


def test_what_cannot_be_read_is_named_by_its_path_or_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data" / "cat").mkdir(parents=True)
    images: list[Any] = [{"bytes": encoded(v), "path": None} for v in NOISE[:40]]
    (tmp_path / "data" / "cat" / "empty.png").touch()
    images[4] = {"bytes": None, "path": "cat/empty.png"}
    images[7] = {"bytes": b"<html>", "path": "shop/7.jpg"}
    images[9] = {"bytes": encoded(NOISE[9])[:60], "path": None}
    images[11] = {"bytes": None, "path": "cat/none.png"}
    told = (
        f"{tmp_path}/data/cat/empty.png: it is no image of a known kind: the file is empty; row 7 (7.jpg): it is no "
        "image of a known kind: it begins like HTML or XML; row 9: "
    )
    with caplog.at_level(logging.WARNING):
        found = store_of(tmp_path, images)
    assert found.bad == (4, 7, 9, 11)
    assert found.notes[0].startswith(f"cannot be read: {told}")
    assert found.notes[0].endswith("; ...")
    assert f"4 of 40 images cannot be read: {told}" in caplog.text
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^4 of 40 images cannot be read, and data\.bad_image_share = 0\.05"
        ) as error:
            store_of(tmp_path, images, 0.05)
        assert told in str(error.value)


def test_names_are_those_of_the_folder_that_is_there_now(tmp_path: Path) -> None:
    images = [encoded(v) for v in NOISE[:20]]
    images[2] = b""
    found = store_of(tmp_path, images)
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "data").symlink_to(tmp_path / "moved")
    table = table_of(tmp_path / "data", images)
    moved = Table(table.rows, table.fingerprint, "here", tmp_path / "moved")
    again = pixel_store(moved, "image", range(20), GREY, tmp_path / "cache", 0.5, 1, lambda *_: pytest.fail("decoded"))
    assert again.notes == tuple(note.replace("/data/", "/moved/") for note in found.notes)


# -- pictures of which nothing can be learned -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ([encoded(v // 16) for v in NOISE], r"60 of 60 pictures are \(nearly\) of one and the same colour"),
        ([encoded(v % 2 + 254) for v in NOISE], "one and the same colour.* go from 254 to 255 of 0 to 255"),
        ([encoded(NOISE[0])] * 60, "60 of 60 pictures are identical, and nothing can be learned of them"),
        ([encoded(np.full((8, 8), i % 3, np.uint8)) for i in range(12)], "12 of 12 pictures are .* the same colour"),
        ([encoded(v % 3, "TIFF") for v in NOISE[:10]], "from 0 to 2 of 0 to 255, kept as TIFF 8 bit grey"),
    ],
)
def test_pictures_that_are_all_alike_are_an_error(tmp_path: Path, images: list[bytes], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        store_of(tmp_path, images)
    assert not list((tmp_path / "cache" / "images").iterdir())


def test_nearly_all_are_all_and_fewer_are_told(tmp_path: Path) -> None:
    dark = [encoded(RANDOM.integers(0, 12, (8, 8), np.uint8)) for _ in range(300)]
    with pytest.raises(ValueError, match=r"299 of 300 pictures are \(nearly\) of one and the same colour"):
        store_of(tmp_path / "a", [*dark[:299], encoded(NOISE[0])])
    found = store_of(tmp_path / "b", [*dark[:200], *[encoded(v) for v in NOISE]])
    assert found.notes[0].startswith("200 of 260 pictures are (nearly) of one colour, the first")


def test_swatches_of_several_colours_and_a_handful_of_pictures_are_no_error(tmp_path: Path) -> None:
    """Of colours one can learn; and a small device may well have ten times the same."""
    for name, images in (
        ("swatches", [encoded(np.full((8, 8), 60 * (i % 4), np.uint8)) for i in range(60)]),
        ("few", [encoded(np.full((8, 8), 7, np.uint8))] * 9),
        ("one", [encoded(NOISE[0])]),
    ):
        notes = store_of(tmp_path / name, images).notes
        assert bool(notes) is (name != "one")


def test_16_bits_of_which_14_are_used_are_told(tmp_path: Path) -> None:
    images = [encoded(v.astype(np.uint16) * 64) for v in NOISE]
    found = store_of(tmp_path, images)
    assert found.range[1] <= 64
    assert found.notes[0].startswith(
        "60 of 60 pictures have 16 bits, and none is brighter than 64 of 255: of 14 bits or"
    )
    assert not store_of(tmp_path / "one", [*images, encoded(NOISE[0].astype(np.uint16) * 257)]).notes


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["old", "cut", "other"])
def test_facts_that_are_damaged_or_of_before_are_made_again(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [encoded(v) for v in NOISE[:20]]
    images[4] = b"no"
    found = store_of(tmp_path, images)
    (path,) = (tmp_path / "cache" / "images").glob("*/rows.json")
    facts = json.loads(path.read_text())
    changed = {
        "old": json.dumps({"bad": [4], "bytes_per_image": 99}),
        "cut": path.read_text()[:-9],
        "other": json.dumps({**facts, "kinds": ["PNG"]}),
    }[damage]
    path.write_text(changed)
    again = store_of(tmp_path, images)
    assert again.notes == found.notes
    assert json.loads(path.read_text()) == facts
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    store_of(tmp_path, images)
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 2


# -- numbers in tables ------------------------------------------------------------------------------------------------


def test_the_type_of_a_column_says_its_range(tmp_path: Path) -> None:
    from datasets import Array2D, List, Value

    def column(kind: str) -> Any:
        return List(List(Value(kind)))

    wide = NOISE.astype(np.uint16) * 257
    for name, values, feature in (
        ("bytes", NOISE, column("uint8")),
        ("array", NOISE, Array2D((8, 8), "uint8")),
        ("numbers", NOISE.astype(np.int64), column("int64")),
        ("floats", NOISE.astype(np.float32), column("float32")),
        ("wide", wide, column("uint16")),
        ("wide array", wide, Array2D((8, 8), "uint16")),
    ):
        found = store_of(tmp_path / name, values.tolist(), feature=feature)
        assert np.array_equal(found.pixels[:, 0].numpy(), NOISE), name
    found = store_of(tmp_path / "bool", (NOISE > 99).tolist(), feature=column("bool"))
    assert np.array_equal(found.pixels[:, 0].numpy(), (NOISE > 99) * 255)
    for name, values, says in (
        ("int64", wide, r"row 0: raw values must be from 0 to 255, got \d+ to \d{5};"),
        ("uint8", NOISE % 2, "row 0: raw values must be from 0 to 255, got 0 to 1: is 1 white, or nearly black"),
        (
            "float64",
            NOISE / 255,
            r"row 0: raw values must be from 0 to 255, got 0\.\d+ to 0\.\d+: is 0\.\d+ white, or nearly black",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            store_of(tmp_path / name, values.tolist(), 0.1, feature=column(name))


# -- the same on a device and in predict ------------------------------------------------------------------------------


def test_16_bits_are_the_same_in_training_on_a_device_and_in_predict(tmp_path: Path) -> None:
    wide = RANDOM.integers(0, 65536, (24, 8, 8), np.uint16)
    for depth in (8, 16):
        for number, values in enumerate(wide):
            path = tmp_path / f"{depth}" / ("cat", "dog")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(values if depth == 16 else np.rint(values / 257).astype(np.uint8)))
    job = make_job({"run": {"cache": str(tmp_path / "cache")}})
    parts = [
        load_owned(job, str(tmp_path / depth), "own", ("cat", "dog"), GREY, 0.25, ("device", "a"))
        for depth in ("8", "16")
    ]
    inputs = [torch.cat([part.train.inputs[:], part.test.inputs[:]]) for part in parts]
    assert len(inputs[0]) > 12
    assert torch.equal(*inputs)
    values, note = read_samples(tmp_path / "16" / "cat" / "0.png", GREY)
    assert note == ""
    predicted = torch.from_numpy(GREY.apply(values))
    assert min(float((predicted - row).abs().max()) for row in torch.cat(list(inputs))) == 0
