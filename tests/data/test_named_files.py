"""Files that rows name: what is read of them is of what they hold now, whatever their size, time and place."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from fleetfit.data.named_files import locate
from fleetfit.data.samples import Samples
from fleetfit.data.sources import load_samples

sys.path.insert(0, str(Path(__file__).parent))
from make_data import encoded, image_job


def csv_of_paths(folder: Path) -> Path:
    (folder / "rows.csv").write_text("image,label\n" + "".join(f"pictures/{i}.png,{'ab'[i % 2]}\n" for i in range(6)))
    return folder / "rows.csv"


def parquet_of_paths(folder: Path) -> Path:
    rows = {"image": [f"pictures/{i}.png" for i in range(6)], "label": [i % 2 for i in range(6)]}
    Dataset.from_dict(rows).to_parquet(str(folder / "rows.parquet"))
    return folder / "rows.parquet"


def json_of_paths(folder: Path) -> Path:
    rows = [{"image": str(folder / f"pictures/{i}.png"), "label": i % 2} for i in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def metadata_of_pictures_elsewhere(folder: Path) -> Path:
    (folder / "source").mkdir()
    (folder / "source" / "6.png").write_bytes(encoded(6))
    rows = "".join(f"../pictures/{i}.png,{'ab'[i % 2]}\n" for i in range(6))
    (folder / "source" / "metadata.csv").write_text(f"file_name,label\n{rows}6.png,a\n")
    return folder / "source"


def load(source: Path, cache: Path) -> Samples:
    return load_samples(image_job(source, cache))


@pytest.mark.parametrize(
    "write",
    [csv_of_paths, parquet_of_paths, json_of_paths, metadata_of_pictures_elsewhere],
    ids=lambda f: f.__name__,
)
def test_a_picture_replaced_under_its_name_size_and_time_is_read(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    (tmp_path / "pictures").mkdir()
    contents = [encoded(i) for i in range(7)]
    length = max(map(len, contents))
    for i in range(6):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(contents[i].ljust(length, b"\0"))
    source, cache = write(tmp_path), tmp_path / "cache"
    before = load(source, cache)
    again = load(source, cache)
    assert (again.fingerprint, again.summary) == (before.fingerprint, before.summary)

    changed = tmp_path / "pictures" / "0.png"
    stat = changed.stat()
    changed.write_bytes(encoded(9).ljust(length, b"\0"))
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert changed.stat().st_size == stat.st_size
    now = load(source, cache)
    assert now.fingerprint != before.fingerprint
    assert not torch.equal(now.inputs[:][0], before.inputs[:][0])
    assert torch.equal(now.inputs[:][1:], before.inputs[:][1:])


def test_the_same_table_beside_other_pictures_is_other_data(tmp_path: Path) -> None:
    found = []
    for name, first in (("a", 0), ("b", 30)):
        (tmp_path / name / "pictures").mkdir(parents=True)
        for i in range(6):
            (tmp_path / name / "pictures" / f"{i}.png").write_bytes(encoded(first + i))
        found.append(load(csv_of_paths(tmp_path / name), tmp_path / "cache"))
    assert found[0].fingerprint != found[1].fingerprint
    assert not torch.equal(found[0].inputs[:], found[1].inputs[:])
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    assert load(tmp_path / "c" / "rows.csv", tmp_path / "cache").fingerprint == found[1].fingerprint


def test_names_are_taken_as_they_are_if_there_is_such_a_file(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.png").touch()
    assert locate(tmp_path, " b\\c.png") == tmp_path / "b" / "c.png"
    (tmp_path / "b\\c.png").touch()
    assert locate(tmp_path, "b\\c.png") == tmp_path / "b\\c.png"
    assert locate(tmp_path, "d\\e.png") == tmp_path / "d\\e.png"


def test_metadata_with_types_are_read_anew(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    table, found = tmp_path / "metadata.parquet", []
    for first, second in (("cat", "dog"), ("cow", "pig")):
        rows = {"file_name": [f"{i}.png" for i in range(4)], "label": [first, second, second, first]}
        pq.write_table(pa.table(rows), table)
        os.utime(table, ns=(1, 1))
        found.append(load(tmp_path, tmp_path / "cache").label_names)
    assert found == [("cat", "dog"), ("cow", "pig")]
