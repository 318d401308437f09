"""Folders of images with tables of metadata: which pictures are meant, and whether classes are the folders."""

import sys
from pathlib import Path
from typing import Any

import pytest

from fleetfit.data.samples import Samples
from fleetfit.data.sources import load_samples

sys.path.insert(0, str(Path(__file__).parent))
from make_data import encoded, image_job


def write(folder: Path, *names: str, table: str = "") -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(i))
    if table:
        (folder / "metadata.csv").write_text(table)


def load(folder: Path, **data: Any) -> Samples:
    return load_samples(image_job(folder, folder.parent / "cache", **data))


def classes(samples: Samples) -> list[str]:
    return [samples.label_names[label] for label in samples.labels.tolist()]


@pytest.mark.parametrize("name", ["img/{}.png", "./img/{}.png", "img\\{}.png", "img/{}.png "])
def test_names_of_pictures_as_programs_write_them(tmp_path: Path, name: str) -> None:
    rows = "".join(f"{name.format(i)},{'yx'[i]}\n" for i in range(2))
    write(tmp_path / "a", "img/0.png", "img/1.png", table=f"file_name,label\n{rows}")
    assert classes(load(tmp_path / "a")) == ["y", "x"]


def test_a_picture_that_is_named_twice(tmp_path: Path) -> None:
    rows = "file_name,label\n0.png,x\n1.png,y\n./0.png,x\n"
    write(tmp_path / "a", "0.png", "1.png", table=rows)
    found = load(tmp_path / "a")
    assert classes(found) == ["x", "y"]
    assert found.summary is not None
    assert found.summary.left_out == {"rows of metadata.csv that say the same of a picture again": 1}
    write(tmp_path / "a", "0.png", "1.png", table=rows.replace("./0.png,x", "0.png,y"))
    with pytest.raises(
        ValueError, match=r"metadata\.csv says \{'label': 'y'\} of .*0\.png, and another row \{'label': 'x'\}"
    ):
        load(tmp_path / "a")


def test_a_table_that_names_no_picture_that_is_there(tmp_path: Path) -> None:
    write(tmp_path / "a", "0.png", "1.png", table="file_name,label\n0,x\n1,y\n")
    with pytest.raises(ValueError, match=r"metadata\.csv: no picture is where its column 'file_name' says"):
        load(tmp_path / "a")


def test_folders_and_a_column_that_may_both_be_the_classes(tmp_path: Path) -> None:
    names = ("cat/0.png", "dog/1.png", "cat/2.png")
    write(tmp_path / "a", *names, table="file_name,y\ncat/0.png,5\ndog/1.png,7\ncat/2.png,5\n")
    with pytest.raises(ValueError, match=r"may be the folders 'cat', 'dog', or 'y' in the table of metadata"):
        load(tmp_path / "a")
    assert classes(load(tmp_path / "a", label_column="label")) == ["cat", "dog", "cat"]
    assert classes(load(tmp_path / "a", label_column="y")) == ["5", "7", "5"]
    # A column called label, and folders that can be no classes, are clear.
    write(tmp_path / "b", *names, table="file_name,label\ncat/0.png,5\ndog/1.png,7\ncat/2.png,5\n")
    assert classes(load(tmp_path / "b")) == ["5", "7", "5"]
    write(tmp_path / "c", "01/0.png", "02/1.png", table="file_name,class\n01/0.png,u\n02/1.png,v\n")
    assert classes(load(tmp_path / "c")) == ["u", "v"]


def test_other_tables_are_not_taken_for_metadata_and_the_error_says_so(tmp_path: Path) -> None:
    write(tmp_path / "a", "0.png", "1.png")
    (tmp_path / "a" / "labels.csv").write_text("file_name,label\n0.png,x\n1.png,y\n")
    with pytest.raises(ValueError, match=r"no column holds labels \(.*; labels\.csv is not called metadata\.csv\)"):
        load(tmp_path / "a")


@pytest.mark.parametrize("held_out", ["test/unknown/9.png", "val/images/9.png", "test/Cat/9.png"])
def test_folders_of_a_split_that_are_no_classes(tmp_path: Path, held_out: str) -> None:
    write(tmp_path / "a", "train/cat/0.png", "train/dog/1.png", held_out)
    with pytest.raises(ValueError, match=f"has the folders '{held_out.split('/')[1]}', and train others, 'cat', 'dog'"):
        load(tmp_path / "a")
    assert classes(load(tmp_path / "a", splits=["train"])) == ["cat", "dog"]


def test_a_split_may_lack_classes_or_have_one_more(tmp_path: Path) -> None:
    write(tmp_path / "a", "train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "test/owl/3.png")
    assert classes(load(tmp_path / "a")) == ["cat", "dog", "cat", "owl"]
