"""What was read of a source, in lines for a person."""

import pytest

from fleetfit.core.records import DataSummary, counted


@pytest.mark.parametrize(
    ("number", "what", "said"),
    [
        (1, "blank rows", "1 blank row"),
        (2, "blank rows", "2 blank rows"),
        (1, "files that are no data here (.json)", "1 file that is no data here (.json)"),
        (1234, "files that are no data here (.json)", "1,234 files that are no data here (.json)"),
        (1, "images that cannot be read", "1 image that cannot be read"),
        (1, "samples without a label", "1 sample without a label"),
        (1, "not drawn (data.limit)", "1 not drawn (data.limit)"),
    ],
)
def test_one_is_not_several(number: int, what: str, said: str) -> None:
    assert counted(number, what) == said


def summary(**fields: object) -> DataSummary:
    return DataSummary.model_validate({"source": "s", "origin": "s", "classes": {"cat": 2, "dog": 1}} | fields)


def test_a_table_has_rows_and_columns() -> None:
    lines = summary(
        kind="text",
        num_files=1,
        num_rows=5,
        num_samples=3,
        left_out={"blank rows": 1, "empty texts": 1},
        input_column="body",
        input_why="its name",
        label_column="team",
        label_why="data.label_column",
        notes=("separated by tabs",),
    ).lines
    assert lines == (
        "5 rows in 1 file, 3 used (s)",
        "left out 1 blank row, 1 empty text",
        "inputs from column 'body' (its name)",
        "labels from column 'team' (data.label_column)",
        "2 classes (cat 2, dog 1)",
        "separated by tabs",
    )


def test_pictures_in_files_of_their_own_are_counted_once_and_need_no_column() -> None:
    lines = summary(kind="image", num_files=3, num_rows=3, num_samples=3, label_why="the first folder").lines
    assert lines == ("3 images, all used (s)", "labels from the first folder", "2 classes (cat 2, dog 1)")
    many = summary(kind="image", num_files=1, num_rows=3, num_samples=2).lines
    assert many[0] == "3 images in 1 file, 2 used (s)"
