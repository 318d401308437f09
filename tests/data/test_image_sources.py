"""Images from every kind of source: the same samples, decoded once, memory-mapped; what is wrong is said."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fleetfit.config.job import Job
from fleetfit.data import pixel_store, tables
from fleetfit.data.partition import share_out
from fleetfit.data.samples import Samples
from fleetfit.data.sources import load_samples

sys.path.insert(0, str(Path(__file__).parent))
from make_data import NAMES, encoded, image_folder, image_job, image_rows, image_table, picture

torch.set_num_threads(1)

FUNCTIONS = """
import sys
import numpy as np
from datasets import Dataset, DatasetDict
from make_data import encoded, image_table, picture, NAMES

def dataset():
    return image_table(30)

def splits():
    return DatasetDict(train=image_table(20), test=image_table(10, 20))

def pictures():
    return [picture(i) for i in range(30)], [NAMES[i % 3] for i in range(30)]

def arrays():
    return np.stack([np.asarray(picture(i)) for i in range(30)]), np.arange(30) % 3

def channels_first():
    return np.stack([np.asarray(picture(i)).transpose(2, 0, 1) for i in range(30)]), np.arange(30) % 3

def floats():
    return np.random.rand(30, 8, 8), np.arange(30) % 3

def unequal():
    return [1, 2], [0]

def neither():
    return 3
"""


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEETFIT_DATA", raising=False)


def expected(number: int) -> torch.Tensor:
    """What the model takes of a picture."""
    pixels = np.asarray(picture(number).resize((8, 8), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32)) / 255 * 2 - 1


def check_thirty(samples: Samples, names: tuple[str, ...] = NAMES) -> None:
    assert len(samples) == 30
    assert samples.label_names == names
    ours = {tuple(x.flatten().tolist()): int(y) for x, y in zip(samples.inputs[:], samples.labels, strict=True)}
    assert len(ours) == 30
    for i in range(30):
        close = [y for x, y in ours.items() if torch.allclose(torch.tensor(x), expected(i).flatten(), atol=1e-6)]
        assert close == [i % 3], i


# -- every kind of source ---------------------------------------------------------------------------------------------


def parquet(folder: Path) -> str:
    image_table(20).to_parquet(str(folder / "train.parquet"))
    image_table(10, 20).to_parquet(str(folder / "test.parquet"))
    return str(folder)


def parquet_file(folder: Path) -> str:
    image_table(30).to_parquet(str(folder / "all.parquet"))
    return str(folder / "all.parquet")


def pattern(folder: Path) -> str:
    for i in range(3):
        image_table(10, 10 * i).to_parquet(str(folder / f"part-{i}.parquet"))
    return str(folder / "part-*.parquet")


def folder_of_images(folder: Path) -> str:
    image_folder(folder, 30)
    return str(folder)


def saved(folder: Path) -> str:
    image_table(30).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def saved_splits(folder: Path) -> str:
    from datasets import DatasetDict

    DatasetDict(train=image_table(20), test=image_table(10, 20)).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def csv_of_paths(folder: Path) -> str:
    lines = ["image,label"]
    for i in range(30):
        (folder / f"{i}.png").write_bytes(encoded(i))
        lines.append(f"{i}.png,{NAMES[i % 3]}")
    (folder / "rows.csv").write_text("\n".join(lines))
    return str(folder / "rows.csv")


def json_of_arrays(folder: Path) -> str:
    rows = [{"img": np.asarray(picture(i)).tolist(), "target": NAMES[i % 3]} for i in range(30)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "rows.jsonl")


KINDS = [parquet, parquet_file, pattern, folder_of_images, saved, saved_splits, csv_of_paths, json_of_arrays]


@pytest.mark.parametrize("write", KINDS)
def test_every_kind_gives_the_same_samples(write: Any, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "data").mkdir()
    job = image_job(write(tmp_path / "data"), cache)
    samples = load_samples(job)
    check_thirty(samples)
    again = load_samples(job)
    assert again.fingerprint == samples.fingerprint
    assert torch.equal(again.inputs[:], samples.inputs[:])
    if write is not json_of_arrays:
        assert samples.raw_bytes_per_sample == round(sum(len(encoded(i)) for i in range(30)) / 30)


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's own, beside the job."""
    (tmp_path / "my_data.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_data", raising=False)


@pytest.mark.parametrize("name", ["dataset", "splits", "pictures", "arrays", "channels_first"])
@pytest.mark.usefixtures("functions")
def test_a_function_gives_the_same_samples(name: str, cache: Path) -> None:
    names = NAMES if name in ("dataset", "splits", "pictures") else ("0", "1", "2")
    samples = load_samples(image_job(f"my_data:{name}", cache))
    check_thirty(samples, names)
    assert load_samples(image_job(f"my_data:{name}", cache)).fingerprint == samples.fingerprint
    assert samples.summary is not None
    assert samples.summary.origin == f"the function my_data:{name}"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_data:nothing", "my_data has no 'nothing'"),
        ("nowhere_at_all:dataset", "the module cannot be imported: No module named 'nowhere_at_all'"),
        ("my_data:unequal", "returned 2 inputs and 1 labels"),
        ("my_data:neither", r"must return a datasets.Dataset, or a pair \(inputs, labels\), got a int"),
        ("my_data:floats", "images cannot be read.*row 0: raw values must be from 0 to 255, got 0"),
    ],
)
@pytest.mark.usefixtures("functions")
def test_a_function_that_does_not_do_is_told(name: str, says: str, cache: Path) -> None:
    with pytest.raises(ValueError, match=f"data.source = .*{name}.*{says}"):
        load_samples(image_job(name, cache))


def test_signs_of_patterns_in_names_are_names(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "my [data] * ?"
    folder.mkdir()
    for i in range(2):
        image_table(15, 15 * i).to_parquet(str(folder / f"part [{i}].parquet"))
    check_thirty(load_samples(image_job(folder, cache)))


def test_folders_of_classes_that_are_called_like_splits(tmp_path: Path, cache: Path) -> None:
    """A train is also a vehicle."""
    for i in range(30):
        path = tmp_path / ("train", "plane")[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(i))
    samples = load_samples(image_job(tmp_path, cache))
    assert samples.label_names == ("plane", "train")
    assert samples.labels.bincount().tolist() == [15, 15]


def test_a_folder_of_images_with_a_table_of_labels(tmp_path: Path, cache: Path) -> None:
    for split, numbers in (("train", range(20)), ("test", range(20, 30))):
        (tmp_path / split).mkdir()
        for i in numbers:
            (tmp_path / split / f"{i}.png").write_bytes(encoded(i))
        rows = [f"{i}.png,{NAMES[i % 3]}" for i in numbers]
        (tmp_path / split / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    check_thirty(load_samples(image_job(tmp_path, cache)))


def test_a_copy_of_a_hub_repository_is_read_as_it_describes_itself(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: first.parquet\n  default: true\n"
        "- config_name: b\n  data_files:\n  - split: mine\n    path: second.parquet\n---\n"
    )
    image_table(30).to_parquet(str(tmp_path / "first.parquet"))
    image_table(12).to_parquet(str(tmp_path / "second.parquet"))
    check_thirty(load_samples(image_job(tmp_path, cache)))
    assert len(load_samples(image_job(tmp_path, cache, subset="b", splits=["mine"]))) == 12
    with pytest.raises(ValueError, match=r"BuilderConfig 'c' not found\. Available: .'a', 'b'."):
        load_samples(image_job(tmp_path, cache, subset="c"))


def test_splits_can_be_chosen(tmp_path: Path, cache: Path) -> None:
    source = parquet(tmp_path)
    both, train = (load_samples(image_job(source, cache, **keys)) for keys in ({}, {"splits": "train"}))
    assert (len(both), len(train)) == (30, 20)
    assert both.fingerprint != train.fingerprint
    with pytest.raises(ValueError, match=r"data\.splits: .* has no split 'dev'; there are train, test"):
        load_samples(image_job(source, cache, splits=["dev"]))


# -- the local copy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["variable", "key"])
@pytest.mark.parametrize("source", ["tiny", "someone/tiny"])
def test_a_local_copy_is_used_before_the_hub_and_the_log_says_so(
    way: str,
    source: str,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "copies" / "tiny").mkdir(parents=True)
    parquet(tmp_path / "copies" / "tiny")

    def never(*_: object) -> Any:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(tables, "_of_hub", never)
    keys, named = {}, "FLEETFIT_DATA"
    if way == "variable":
        monkeypatch.setenv("FLEETFIT_DATA", str(tmp_path / "copies"))
    else:
        monkeypatch.setenv("FLEETFIT_DATA", "/nowhere")  # the key wins
        keys, named = {"root": str(tmp_path / "copies")}, "data.root"
    with caplog.at_level(logging.INFO, "fleetfit"):
        samples = load_samples(image_job(source, cache, subset="plain", **keys))
    check_thirty(samples)
    origin = f"the local copy {tmp_path / 'copies' / 'tiny'} ({named})"
    assert samples.summary is not None
    assert samples.summary.origin == origin
    assert f"data.source = {source!r}: taken from {origin}" in caplog.text


def test_the_full_name_is_preferred_and_a_path_is_before_both(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "copies"
    for name, number in (("tiny", 3), ("someone/tiny", 6)):
        (root / name).mkdir(parents=True)
        image_table(number).to_parquet(str(root / name / "train.parquet"))
    monkeypatch.setenv("FLEETFIT_DATA", str(root))
    assert len(load_samples(image_job("someone/tiny", cache))) == 6
    assert len(load_samples(image_job("other/tiny", cache))) == 3
    here = tmp_path / "here"
    (here / "tiny").mkdir(parents=True)
    image_table(9).to_parquet(str(here / "tiny" / "train.parquet"))
    monkeypatch.chdir(here)
    assert len(load_samples(image_job("tiny", cache))) == 9


def test_a_subset_is_a_folder_of_the_copy(tmp_path: Path, cache: Path) -> None:
    for name, number in (("plain", 3), ("large", 6)):
        (tmp_path / "tiny" / name).mkdir(parents=True)
        image_table(number).to_parquet(str(tmp_path / "tiny" / name / "train.parquet"))
    found = [load_samples(image_job("tiny", cache, root=str(tmp_path), subset=s)) for s in ("plain", "large")]
    assert [len(s) for s in found] == [3, 6]
    assert found[0].fingerprint != found[1].fingerprint


# -- decoded once, and mapped -----------------------------------------------------------------------------------------


def test_a_second_load_does_not_decode_and_owners_share_the_map(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_table(90).to_parquet(str(tmp_path / "a.parquet"))
    job = image_job(tmp_path / "a.parquet", cache, split="iid", edge_share=0.1)
    first = load_samples(job)

    def never(*_: object) -> Any:
        raise AssertionError("an image was decoded again")

    monkeypatch.setattr(pixel_store, "decode", never)
    samples = load_samples(job)
    assert torch.equal(samples.inputs[:], first.inputs[:])
    assert samples.inputs.store.dtype == torch.uint8
    data = share_out(samples, job.data, {"c": ["c-1", "c-2"]}, 0)
    owners = [data.public, data.edges["c"], *data.devices.values()]
    assert {o.train.inputs.store.data_ptr() for o in owners} == {samples.inputs.store.data_ptr()}
    (file,) = (cache / "images").glob("*/pixels.npy")
    assert str(file) in Path("/proc/self/maps").read_text(), "the pixels are not memory-mapped"
    # The content counts, not the name of the file, nor how the devices share it.
    (tmp_path / "a.parquet").rename(tmp_path / "b.parquet")
    other = load_samples(image_job(tmp_path / "b.parquet", cache, split="classes"))
    assert torch.equal(other.inputs[:], first.inputs[:])


def test_other_content_another_size_and_other_rows_are_decoded(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.parquet"
    image_table(9).to_parquet(str(path))
    prints = [load_samples(image_job(path, cache)).fingerprint]
    image_table(9, 1).to_parquet(str(path))
    prints.append(load_samples(image_job(path, cache)).fingerprint)
    prints.append(load_samples(image_job(path, cache, limit=6)).fingerprint)
    job = image_job(path, cache)
    wide = job.model_copy(update={"model": job.model.model_copy(update={"config": {"image_size": 16}})})
    samples = load_samples(wide)
    assert samples.inputs.shape == (3, 16, 16)
    prints.append(samples.fingerprint)
    assert len(set(prints)) == 4
    assert len(list((cache / "images").iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "empty", "no rows"])
def test_a_damaged_cache_is_decoded_again(tmp_path: Path, cache: Path, damage: str) -> None:
    image_table(9).to_parquet(str(tmp_path / "a.parquet"))
    job = image_job(tmp_path / "a.parquet", cache)
    whole = load_samples(job).inputs[:]
    (folder,) = (cache / "images").iterdir()
    if damage == "no rows":
        (folder / "rows.json").unlink()
    else:
        content = (folder / "pixels.npy").read_bytes()
        (folder / "pixels.npy").unlink()  # the map of the first load keeps its own
        (folder / "pixels.npy").write_bytes(content[:-1] if damage == "cut" else b"")
    assert torch.equal(load_samples(job).inputs[:], whole)
    assert [p.name for p in (cache / "images").iterdir()] == [folder.name]


def test_decoding_that_is_stopped_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_table(9).to_parquet(str(tmp_path / "a.parquet"))
    job = image_job(tmp_path / "a.parquet", cache)

    def stop(phase: str, done: int, total: int, note: str = "") -> None:
        if "decoded" in note:
            assert (phase, done, total) == ("data", 3, 10)
            raise KeyboardInterrupt

    monkeypatch.setattr(pixel_store, "CHUNK", 3)
    with pytest.raises(KeyboardInterrupt):
        load_samples(job, stop)
    assert list((cache / "images").iterdir()) == []
    assert len(load_samples(job)) == 9


def test_several_threads_give_the_same(tmp_path: Path, cache: Path) -> None:
    image_table(30).to_parquet(str(tmp_path / "a.parquet"))
    job = image_job(tmp_path / "a.parquet", cache)
    one = load_samples(job).inputs[:]
    other = job.model_copy(update={"run": job.run.model_copy(update={"cache": str(cache / "2"), "threads": 3})})
    assert torch.equal(load_samples(other).inputs[:], one)


# -- fewer samples ----------------------------------------------------------------------------------------------------


def test_a_limit_keeps_the_classes_shares_and_depends_on_the_seed(tmp_path: Path, cache: Path) -> None:
    path = str(tmp_path / "a.parquet")
    rows = image_rows(90)
    from datasets import Dataset
    from make_data import image_features

    keep = [i for i in range(90) if i % 3 != 2 or i % 2]  # 30, 30 and 15
    Dataset.from_dict({k: [v[i] for i in keep] for k, v in rows.items()}, features=image_features()).to_parquet(path)
    job = image_job(path, cache, limit=25)
    samples = load_samples(job)
    assert samples.labels.bincount().tolist() == [10, 10, 5]
    assert torch.equal(samples.inputs[:], load_samples(job).inputs[:])
    other = load_samples(job.model_copy(update={"seed": 1}))
    assert other.labels.bincount().tolist() == [10, 10, 5]
    assert not torch.equal(other.inputs[:], samples.inputs[:])
    assert len(load_samples(image_job(path, cache, limit=1000))) == 75


# -- images that cannot be read ---------------------------------------------------------------------------------------


def with_bad(folder: Path, number: int, bad: dict[int, bytes | None]) -> Path:
    from datasets import Dataset
    from make_data import image_features

    rows = image_rows(number)
    for row, content in bad.items():
        rows["image"][row] = None if content is None else {"bytes": content, "path": None}
    Dataset.from_dict(rows, features=image_features()).to_parquet(str(folder / "bad.parquet"))
    return folder / "bad.parquet"


def test_a_few_bad_images_are_left_out_and_counted(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {4: b"", 7: encoded(7)[:-40], 11: b"no image at all", 13: None}
    path = with_bad(tmp_path, 40, bad)
    job = image_job(path, cache, bad_image_share=0.1)
    samples = load_samples(job)
    good = [i for i in range(40) if i not in bad]
    assert torch.allclose(samples.inputs[:], torch.stack([expected(i) for i in good]), atol=1e-6)
    assert samples.labels.tolist() == [i % 3 for i in good]
    assert samples.summary is not None
    empty, text = (f"it is no image of a known kind: {what}" for what in ("the file is empty", "it holds text"))
    told = f"row 4: {empty}; row 7: image file is truncated; row 11: {text}; ..."
    assert samples.summary.left_out == {"images that cannot be read": 4}
    assert samples.summary.notes[2] == f"cannot be read: {told}"
    assert f"4 of 40 images cannot be read: {told}" in caplog.text
    monkeypatch.setattr(pixel_store, "decode", lambda *_: pytest.fail("decoded again"))
    assert load_samples(job).summary == samples.summary
    assert load_samples(job).labels.tolist() == samples.labels.tolist()
    with pytest.raises(ValueError, match=r"4 of 40 images cannot be read, and data\.bad_image_share = 0\.05 of all"):
        load_samples(image_job(path, cache, bad_image_share=0.05))


def test_too_many_bad_images_are_an_error_that_tells_the_first(tmp_path: Path, cache: Path) -> None:
    path = with_bad(tmp_path, 40, {9: encoded(9)[:-40], 20: b"x"})
    with pytest.raises(ValueError, match=r"^data\.source = .*: 2 of 40 images cannot be read, and data\.") as caught:
        load_samples(image_job(path, cache))
    assert "data.bad_image_share = 0.01 of all is the most (a larger one leaves them out); row 9: " in str(caught.value)
    assert list((cache / "images").iterdir()) == []


def test_a_path_that_is_not_there_is_a_bad_image(tmp_path: Path, cache: Path) -> None:
    source = csv_of_paths(tmp_path)
    (tmp_path / "5.png").unlink()
    with pytest.raises(ValueError, match=rf"out\); {tmp_path}/5\.png: No such file or directory$"):
        load_samples(image_job(source, cache))
    assert len(load_samples(image_job(source, cache, bad_image_share=0.1))) == 29


# -- what is not there ------------------------------------------------------------------------------------------------


def test_an_unknown_hub_id_without_a_network(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="could not be had from the Hugging Face hub") as caught:
        load_samples(image_job("nobody/nothing-at-all", cache))
    said = str(caught.value)
    assert said.startswith("data.source = 'nobody/nothing-at-all' is no file or folder here, and could not be had")
    assert f"are in {datasets.config.HF_DATASETS_CACHE}; with HF_HUB_OFFLINE=1 nothing else is tried" in said
    assert "put its files into a folder 'nothing-at-all', and name the folder around that in the variable" in said
    assert "FLEETFIT_DATA or in data.root" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no/such/folder", "cannot be the id of a data set on the hub"),
        ("missing.csv", "is no file or folder here, no module:function, and cannot be the id"),
        ("missing-*.csv", "no file here fits this pattern"),
        ("empty", "is empty"),
        ("notes.txt", "files must be images, or of one kind of .parquet, .csv.*, got .txt"),
        ("*", "files must be images, or of one kind of .*, got .csv, .txt"),
        ("broken.parquet", "cannot be read: "),
        ("damaged", "cannot be read: "),
    ],
)
def test_sources_that_are_wrong(
    source: str, says: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if source == "empty":
        (tmp_path / "empty").mkdir()
    if source in ("notes.txt", "*"):
        (tmp_path / "notes.txt").write_text("hello")
    if source == "*":
        (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "damaged").mkdir()
    for path in (tmp_path / "broken.parquet", tmp_path / "damaged" / "train.parquet"):
        if source in ("broken.parquet", "damaged"):
            path.write_bytes(b"PAR1 this is not parquet")
    if source == "*":
        (tmp_path / "damaged").rmdir()
    with pytest.raises(ValueError, match=says) as caught:
        load_samples(image_job(source, cache))
    assert str(caught.value).startswith(f"data.source = {source!r}")
    assert "\n" not in str(caught.value)


def test_a_root_that_is_no_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETFIT_DATA", "/nowhere/at/all")
    with pytest.raises(ValueError, match=r"^FLEETFIT_DATA = '/nowhere/at/all' is no folder$"):
        load_samples(image_job("cifar10", cache))
    with pytest.raises(ValueError, match=r"^data\.root = '/nor/here' is no folder$"):
        load_samples(image_job("cifar10", cache, root="/nor/here"))


def test_splits_of_different_columns(tmp_path: Path, cache: Path) -> None:
    from datasets import DatasetDict, Value

    other = image_table(9).cast_column("label", Value("string"))
    DatasetDict(a=image_table(9), b=other).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"its splits have different columns; choose some with data\.splits"):
        load_samples(image_job(tmp_path / "saved", cache))
    assert len(load_samples(image_job(tmp_path / "saved", cache, splits=["a"]))) == 9


def test_defaults_are_the_digits() -> None:
    assert load_samples(Job()).fingerprint == "digits"
