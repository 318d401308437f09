"""An owner's own files: the same inputs as in the whole source, labels by name or number, what is told of others'."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from fleetfit.config.job import Job, make_job
from fleetfit.data.participant import load_owned, write_owned
from fleetfit.data.partition import Split, share_out
from fleetfit.data.preprocessing import Preprocessing
from fleetfit.data.sources import load_source

LABELS = ("cat", "dog", "owl")
FORM = Preprocessing(size=(4, 4), channels=1, maximum=255, mean=(0.5,), std=(0.5,))


def job(cache: Path, **data: Any) -> Job:
    return make_job({"run": {"cache": str(cache)}, "data": data})


def load(
    tmp_path: Path,
    source: Path,
    cut: Any = "own",
    labels: tuple[str, ...] = LABELS,
    unlabelled: bool = False,
    **data: Any,
) -> Split:
    own = job(tmp_path / "cache", **data)
    return load_owned(own, str(source), cut, labels, FORM, 0.25, ("device", "a"), unlabelled=unlabelled)


def pictures(folder: Path, labels: list[Any], feature: Any = None, step: int = 1) -> Path:
    """As many grey pictures, each of one value."""
    values = [np.full((4, 4), step * i, np.uint8).tolist() for i in range(len(labels))]
    rows = Dataset.from_dict({"image": values, "label": labels})
    if feature is not None:
        rows = rows.cast_column("label", feature)
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(folder / "rows.parquet"))
    return folder


def of(split: Split) -> dict[int, int]:
    """Label by the picture's value."""
    return {
        round(float(x.mean() * 0.5 + 0.5) * 255): int(y)
        for part in (split.train, split.validation, split.test)
        for x, y in zip(part.inputs[:], part.labels, strict=True)
    }


def test_labels_are_the_fleets_whichever_are_there(tmp_path: Path) -> None:
    named = load(tmp_path, pictures(tmp_path / "a", ["owl", "cat", "owl", "owl"]))
    assert of(named) == {0: 2, 1: 0, 2: 2, 3: 2}
    assert named.train.label_names == LABELS
    numbered = load(tmp_path, pictures(tmp_path / "b", [2, 1, 1, 2]), label_names=list(LABELS))
    assert of(numbered) == {0: 2, 1: 1, 2: 1, 3: 2}
    own_order = load(tmp_path, pictures(tmp_path / "c", [0, 1, 1, 0], ClassLabel(names=["owl", "dog"])))
    assert of(own_order) == {0: 2, 1: 1, 2: 1, 3: 2}


def test_numbers_that_are_names_are_looked_up(tmp_path: Path) -> None:
    found = load(tmp_path, pictures(tmp_path / "a", [7, 5, 5, 7]), labels=("5", "6", "7"))
    assert of(found) == {0: 2, 1: 0, 2: 0, 3: 2}


def test_one_class_is_enough_for_a_device(tmp_path: Path) -> None:
    assert set(of(load(tmp_path, pictures(tmp_path / "a", ["dog"] * 4))).values()) == {1}


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["cat", "emu", "dog", "ant"], r"'ant', 'emu', which the job does not know; its 3 are cat, dog, owl"),
        ([0, 1, 2, 1], r"numbers may be in another order: write the names, or name the numbers in the job's data\.l"),
        (["cat", None, "dog", "cat"], "1 of 4 are missing"),
    ],
)
def test_labels_that_the_job_does_not_know_are_told(tmp_path: Path, labels: list[Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load(tmp_path, pictures(tmp_path / "a", labels))


def test_data_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file or folder here"):
        load(tmp_path, tmp_path / "nothing" / "here")
    with pytest.raises(ValueError, match=r"must have a split train, with data\.cut = 'given'"):
        load(tmp_path, pictures(tmp_path / "a", ["cat", "dog"]), cut="given")


def test_a_cut_that_is_given_is_kept_and_parts_may_be_missing(tmp_path: Path) -> None:
    for name, values in (("train", ["cat", "dog"]), ("test", ["owl"])):
        pictures(tmp_path / name, values)
        (tmp_path / "given").mkdir(exist_ok=True)
        shutil.move(tmp_path / name / "rows.parquet", tmp_path / "given" / f"{name}.parquet")
    split = load(tmp_path, tmp_path / "given", cut="given")
    assert [len(split.train), len(split.validation), len(split.test)] == [2, 0, 1]
    assert split.train.labels.tolist() == [0, 1]
    assert split.validation.inputs[:].shape == (0, 1, 4, 4)


def test_an_own_cut_is_the_owners_and_the_seeds(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "a", ["cat", "dog"] * 20)
    one, two = load(tmp_path, folder), load(tmp_path, folder)
    assert [len(one.train), len(one.validation), len(one.test)] == [24, 6, 10]
    assert torch.equal(one.train.inputs[:], two.train.inputs[:])


def test_texts_become_the_same_tokens_on_each_owners_machine(tmp_path: Path) -> None:
    words = [
        f"the {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("bird", "fish", "card", "bank")
    ]
    rows = Dataset.from_dict(
        {"text": words * 5, "intent": [i % 3 for i in range(60)]},
        features=Features({"text": Value("string"), "intent": ClassLabel(names=list(LABELS))}),
    )
    (tmp_path / "texts").mkdir()
    rows.to_parquet(str(tmp_path / "texts" / "all.parquet"))
    resolved = make_job(
        {
            "model": {"family": "bert"},
            "data": {"source": str(tmp_path / "texts"), "split": "iid"},
            "run": {"cache": str(tmp_path / "cache")},
        }
    )
    samples, origin = load_source(resolved)
    data = share_out(samples, resolved.data, {"a": ["a-1", "a-2"]}, 0)
    assert samples.inputs.form is not None
    for name, split in {**data.edges, **data.devices}.items():
        write_owned(tmp_path / name, resolved, split, origin)
        found = load_owned(
            resolved, str(tmp_path / name), "given", samples.label_names, samples.inputs.form, 0.3, ("x",)
        )
        for part in ("train", "validation", "test"):
            ours, theirs = getattr(split, part), getattr(found, part)
            assert torch.equal(ours.inputs[:], theirs.inputs[:])
            assert torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize(
    ("folders", "label"),
    [
        (["dog"], {"dog"}),
        (["dog/2021", "dog/2022"], {"dog"}),
        (["site a/owl", "site a/cat", "site b/owl"], {"owl", "cat"}),
        (["train/owl ", "test/owl "], {"owl"}),
    ],
)
def test_folders_called_like_classes_of_the_job_are_the_classes(
    tmp_path: Path, folders: list[str], label: set[str]
) -> None:
    for i, folder in enumerate(folders * 2):
        (tmp_path / "own" / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / "own" / folder / f"{i}.png")
    split = load(tmp_path, tmp_path / "own", class_folder=2)
    assert {LABELS[number] for number in of(split).values()} == label
    assert len(of(split)) == 2 * len(folders)


def test_folders_that_are_none_of_the_jobs_classes_are_told(tmp_path: Path) -> None:
    for i, name in enumerate(("Dog", "owl")):
        (tmp_path / "own" / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / "own" / name / "0.png")
    with pytest.raises(ValueError, match=r"have 'Dog', which the job does not know; .* case matters"):
        load(tmp_path, tmp_path / "own")


def test_pictures_that_an_owners_table_names_are_part_of_its_data(tmp_path: Path) -> None:
    found = []
    for value in (1, 2):
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(tmp_path / "a.png")
        (tmp_path / "rows.csv").write_text("image,label\na.png,owl\n")
        split = load(tmp_path, tmp_path / "rows.csv")
        assert of(split) == {value: 2}
        found.append(split.summary and split.summary.fingerprint)
    assert found[0] != found[1]


MISSING = ["cat", None, "dog", "cat", None, None, "owl", "dog", "cat", "", "dog", "cat"]


def values(samples: Any) -> list[int]:
    return sorted(round(float(x.mean() * 0.5 + 0.5) * 255) for x in samples.inputs[:])


def test_inputs_without_a_label_are_kept_beside_the_samples_where_they_are_wanted(tmp_path: Path) -> None:
    source = pictures(tmp_path / "own", MISSING, step=20)
    with pytest.raises(ValueError, match=r"4 of 12 are missing, and data\.missing_label_share"):
        load(tmp_path, source)
    split = load(tmp_path, source, unlabelled=True)
    assert split.unlabelled is not None
    assert values(split.unlabelled) == [20, 80, 100, 180]
    assert split.unlabelled.labels.tolist() == [-1] * 4
    assert of(split) == {20 * i: LABELS.index(name) for i, name in enumerate(MISSING) if name}
    assert split.summary is not None
    assert split.summary.num_samples == 8
    assert split.summary.classes == {"cat": 4, "dog": 3, "owl": 1}
    assert "4 samples without a label kept: class shares are estimated on them" in split.summary.lines
    whole = pictures(tmp_path / "whole", [name or "cat" for name in MISSING], step=20)
    assert load(tmp_path, whole, unlabelled=True).unlabelled is None


def test_the_cut_of_labelled_samples_is_the_same_with_inputs_beside_them(tmp_path: Path) -> None:
    source, names = pictures(tmp_path / "own", MISSING, step=20), [name for name in MISSING if name]
    without = load(tmp_path, pictures(tmp_path / "labelled", names, step=20))
    split = load(tmp_path, source, unlabelled=True)
    for part in ("train", "validation", "test"):
        assert getattr(split, part).labels.tolist() == getattr(without, part).labels.tolist()


def test_of_a_given_cut_inputs_without_a_label_for_testing_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    for name, labels in (("train", ["cat", None, "dog"]), ("validation", [None, "dog"]), ("test", ["owl", "cat"])):
        (pictures(tmp_path / name, labels) / "rows.parquet").rename(folder / f"{name}.parquet")
    split = load(tmp_path, folder, "given", unlabelled=True)
    assert split.unlabelled is not None
    assert values(split.unlabelled) == [0, 1]
    assert [len(part) for part in (split.train, split.validation, split.test)] == [2, 1, 2]


@pytest.mark.parametrize("labels", [["cat", None, None, None], [None] * 4])
@pytest.mark.parametrize("part", ["validation", "test"])
def test_of_a_given_cut_any_number_of_labels_may_be_missing_but_in_training(
    tmp_path: Path, part: str, labels: list[Any]
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    for name, own in (("train", ["cat", "dog", "cat", None, "dog"]), (part, labels)):
        (pictures(tmp_path / name, own, Value("string")) / "rows.parquet").rename(folder / f"{name}.parquet")
    split = load(tmp_path, folder, "given", unlabelled=True)
    known = sum(label is not None for label in labels)
    assert len(getattr(split, part)) == known
    assert split.unlabelled is not None
    assert len(split.unlabelled) == 1 + (4 - known if part == "validation" else 0)


def test_a_device_without_any_label_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no label in column 'label', and some are needed"):
        load(tmp_path, pictures(tmp_path / "own", ["", "", ""]), unlabelled=True)
