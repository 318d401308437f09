"""Labels: as they are written; joined where they only look alike; what does not match is told."""

from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features

from fleetfit.config import DataConfig
from fleetfit.data.labels import read_labels
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
