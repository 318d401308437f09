"""Labels: as they are written; joined where they only look alike; what does not match is told."""

from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features

from fleetfit.config.sections import DataConfig
from fleetfit.data.labels import Labels, read_known_labels, read_labels
from fleetfit.data.tables import Table


def labels(values: list[Any], names: tuple[str, ...] = (), of: Any = None) -> tuple[list[int], tuple[str, ...]]:
    features = Features({"label": of}) if of is not None else None
    rows = Dataset.from_dict({"label": values}, features=features)
    found = read_labels(Table(rows, "", ""), "label", DataConfig(label_names=names))
    assert found.numbers.dtype == torch.long
    return found.numbers.tolist(), found.names


def test_labels_become_numbers_with_names() -> None:
    assert labels([1, 0, 1], of=ClassLabel(names=["cat", "dog"])) == ([1, 0, 1], ("cat", "dog"))
    assert labels([1, 0, 1], ("x", "y"), ClassLabel(names=["cat", "dog"])) == ([1, 0, 1], ("x", "y"))
    assert labels(["dog", "cat", "dog"]) == ([1, 0, 1], ("cat", "dog"))
    assert labels(["dog", "cat", "dog"], ("dog", "owl", "cat")) == ([0, 2, 0], ("dog", "owl", "cat"))
    assert labels([7, 3, 10, 7]) == ([1, 0, 2, 1], ("3", "7", "10"))
    assert labels([1, 0, 1], ("no", "yes", "perhaps")) == ([1, 0, 1], ("no", "yes", "perhaps"))
    assert labels([1.0, 0.0]) == ([1, 0], ("0", "1"))
    assert labels([True, False]) == ([1, 0], ("False", "True"))
    # A class that no sample has is one all the same.
    assert labels([2, 0], of=ClassLabel(names=["a", "b", "c"])) == ([2, 0], ("a", "b", "c"))


MISSING = (
    "labels are missing, the first in row {}, and data.missing_label_share = 0.01 of all is the most; if a split has "
    "none, leave it out with data.splits"
)


@pytest.mark.parametrize(
    ("values", "names", "of", "says"),
    [
        ([1, None, 0, None], (), None, f": 2 of 4 {MISSING.format(1)}"),
        ([1, 0, -1], (), ClassLabel(names=["a", "b"]), f": 1 of 3 {MISSING.format(2)}"),
        (["a", "", "b"], (), None, f": 1 of 3 {MISSING.format(1)}"),
        ([1.0, float("nan")], (), None, f": 1 of 2 {MISSING.format(1)}"),
        ([0.5, 1.0], (), None, " must hold whole numbers or texts, got 0.5 among them"),
        ([[1], [2]], (), None, " must hold whole numbers or texts, got [1] among them"),
        ([0, 1, 5, -2], ("a", "b"), None, " must be in 0..1, for 2 names, got -2, 5"),
        (["a", "c", "d"], ("a", "b"), None, " holds 'c', 'd', which data.label_names does not have"),
        (list(range(20)), (), None, " holds 20 different numbers in 20 rows: is it the label?"),
        ([3, 3, 3], (), None, ": all 3 samples are of one class, '3'"),
        (["x", "x"], ("x", "y"), None, ": all 2 samples are of one class, 'x'"),
    ],
)
def test_labels_that_do_not_do(values: list[Any], names: tuple[str, ...], of: Any, says: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        labels(values, names, of)
    assert str(caught.value) == f"data.label_column = 'label'{says}"


def test_as_many_names_as_classes() -> None:
    with pytest.raises(
        ValueError, match=r"^data\.label_names has 3 names, but data\.label_column = 'label' has 2 class"
    ):
        labels([0, 1], ("a", "b", "c"), ClassLabel(names=["a", "b"]))


# -- as they are written ----------------------------------------------------------------------------------------------


def of(values: list[Any], **data: Any) -> Labels:
    return read_labels(Table(Dataset.from_dict({"label": values}), "", ""), "label", DataConfig(**data))


def test_codes_and_words_that_look_like_something_else_are_classes() -> None:
    for names in (
        ("01", "1", "2"),
        ("100", "1E2", "7"),
        ("AS", "EU", "NA"),
        ("None", "null"),
        ("TRUE", "True", "true"),
    ):
        found = of([*names] * 9)
        assert found.names == names
        assert found.numbers.tolist() == [*range(len(names))] * 9


def test_whole_numbers_are_in_their_order_and_other_names_in_that_of_their_signs() -> None:
    assert of(["10", "9", "-1"]).names == ("-1", "9", "10")
    assert of(["10", "9", "09"]).names == ("09", "10", "9")


def test_names_that_only_look_alike_are_one_class_and_told() -> None:
    found = of(["elm", "elm ", "\u00a0elm", "e\u0301lan", "\u00e9lan", "big  elm", "big elm", "e\u200blm"])
    assert found.names == ("big elm", "elm", "\u00e9lan")
    assert found.numbers.tolist() == [1, 1, 1, 2, 2, 0, 0, 1]
    assert len(found.notes) == 3
    assert found.notes[0] == "class 'big elm' joins 'big  elm' (1), 'big elm' (1)"


def test_names_that_differ_in_case_or_form_stay_apart_and_are_told() -> None:
    found = of(["Elm", "elm", "\uff45lm", "oak"])
    assert len(found.names) == 4
    assert found.notes == ("classes 'Elm', 'elm', '\uff45lm' differ in case or form only, and stay apart",)


def test_names_of_a_type_are_joined_too() -> None:
    rows = Dataset.from_dict({"label": [0, 1, 2]}, features=Features({"label": ClassLabel(names=["a", "a ", "b"])}))
    found = read_labels(Table(rows, "", ""), "label", DataConfig())
    assert (found.names, found.numbers.tolist()) == (("a", "b"), [0, 0, 1])


def test_a_few_labels_may_be_missing() -> None:
    found = of(["a", "b"] * 99 + ["", None], missing_label_share=0.01)
    assert (found.num_missing, found.numbers[-3:].tolist()) == (2, [1, -1, -1])
    with pytest.raises(
        ValueError, match=r"2 of 200 labels are missing, the first in row 198, and data\.missing_label_s"
    ):
        of(["a", "b"] * 99 + ["", None], missing_label_share=0.009)


def test_one_number_in_two_spellings_is_an_error_where_numbers_have_names() -> None:
    assert of(["1", "0", "1"], label_names=["no", "yes"]).numbers.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"writes one number in several ways: '01', '1'"):
        of(["01", "0", "1"], label_names=["no", "yes"])


def test_a_column_of_texts_is_no_label() -> None:
    with pytest.raises(ValueError, match=r"holds 12 different texts in 12 rows: is it the label\?"):
        of([f"text {i}" for i in range(12)])


# -- an owner's -------------------------------------------------------------------------------------------------------


def known(values: list[Any], names: tuple[str, ...], of: Any = None, **data: Any) -> list[int]:
    features = Features({"label": of}) if of is not None else None
    rows = Dataset.from_dict({"label": values}, features=features)
    return read_known_labels(Table(rows, "", "a.csv"), "label", names, DataConfig(**data)).numbers.tolist()


def test_an_owners_labels_are_looked_up_by_their_names() -> None:
    assert known(["oak", " elm"], ("elm", "oak", "ash")) == [1, 0]
    assert known([7, 5], ("5", "6", "7")) == [2, 0]
    assert known(["01", "1"], ("01", "1", "2")) == [0, 1]
    assert known([1, 0], ("elm", "oak"), ClassLabel(names=["oak", "elm"])) == [0, 1]
    assert known(["1", "0"], ("elm", "oak"), label_names=["elm", "oak"]) == [1, 0]
    assert known(["oak", None] + ["elm"] * 98, ("elm", "oak"))[:2] == [1, -1]


@pytest.mark.parametrize(
    ("values", "names", "says"),
    [
        ([0, 1], ("elm", "oak"), "numbers may be in another order: write the names, or name the numbers in the job's"),
        (["0", "1"], ("elm", "oak"), "numbers may be in another order"),
        (["1"], ("01", "02"), "have '1', which the job does not know; its 2 are 01, 02"),
        (["Elm"], ("elm", "oak"), "which the job does not know; its 2 are elm, oak; case matters: 'Elm' for 'elm'"),
        ([None, "elm"], ("elm", "oak"), "1 of 2 are missing, and data.missing_label_share = 0.01 of all is the most"),
    ],
)
def test_an_owners_labels_that_the_job_does_not_know(values: list[Any], names: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.source = a\.csv: the labels in column 'label'") as caught:
        known(values, names)
    assert says in str(caught.value)


def test_numbers_that_are_names_of_other_classes_are_refused() -> None:
    stars = ("1", "2", "3", "4", "5")
    assert labels([0, 4, 1], stars) == ([0, 4, 1], stars)  # no name is 0
    assert labels(["5", "1", "2"], stars) == ([4, 0, 1], stars)  # 5 is no number of one
    with pytest.raises(
        ValueError, match=r"'1', '2', which may be names in data\.label_names, or numbers of other ones"
    ):
        labels([1, 2, 1], stars)
    with pytest.raises(ValueError, match="which may be names"):
        known([1, 2, 1], stars, label_names=stars)
    # A type says which names are meant; numbers that are their own names are clear.
    assert known([1, 0, 1], stars, ClassLabel(names=["1", "2"]), label_names=stars) == [1, 0, 1]
    assert labels([1, 2, 1], ("0", "1", "2")) == ([1, 2, 1], ("0", "1", "2"))


def test_minus_one_is_a_class_and_told() -> None:
    assert of([-1, 0, 1, -1]).notes == ("-1 is a class like others (2 samples), not a missing label",)
    assert of([2, 0, 1, 0]).notes == ()
