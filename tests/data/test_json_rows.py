"""JSON in the forms that people have: the same rows of all of them, or an error that says where."""

import json
from pathlib import Path
from typing import Any

import pytest

from fleetfit.data.json_rows import read_json

ROWS = [{"text": "first", "label": "a"}, {"text": "NA", "label": "01"}, {"text": "null", "label": "1"}]
COLUMNS = {key: [row[key] for row in ROWS] for key in ("text", "label")}


def read(folder: Path, content: str) -> Any:
    (folder / "rows.json").write_text(content, encoding="utf-8")
    return read_json(folder / "rows.json")


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(map(json.dumps, ROWS)),
        "\n" + "\r\n\r\n".join(map(json.dumps, ROWS)) + "\n",
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        json.dumps({"data": ROWS}),
        json.dumps({"version": "1.0", "tags": ["x", "y"], "rows": ROWS}),
        json.dumps(COLUMNS),
        json.dumps({key: {str(i): v for i, v in enumerate(values)} for key, values in COLUMNS.items()}),
        json.dumps({"columns": ["text", "label"], "index": [0, 1, 2], "data": [list(row.values()) for row in ROWS]}),
        "\ufeff" + json.dumps(ROWS),
        json.dumps({"status": "ok", "response": {"page": 1, "items": ROWS}}),
        json.dumps({"data": COLUMNS}),
        json.dumps({str(i): row for i, row in enumerate(ROWS)}),
        json.dumps({"text": dict(enumerate(COLUMNS["text"])), "label": {i: ROWS[i]["label"] for i in (2, 0, 1)}}),
    ],
)
def test_all_forms_give_the_same_rows(tmp_path: Path, content: str) -> None:
    found = read(tmp_path, content)
    assert list(found) == [""]
    assert {key: list(values) for key, values in found[""].columns.items()} == COLUMNS


def test_lists_that_are_called_like_splits_are_splits(tmp_path: Path) -> None:
    found = read(tmp_path, json.dumps({"train": ROWS, "test": ROWS[:1]}))
    assert {name: len(rows) for name, rows in found.items()} == {"train": 3, "test": 1}


def test_values_keep_their_types_and_what_is_not_there_is_missing(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 1, "yes": True}, {"text": None, "n": 2.5}, {"text": "", "n": None}]
    found = read(tmp_path, json.dumps(rows))[""]
    assert found.columns == {"text": ["a", None], "n": [1, 2.5], "yes": ["true", None]}
    assert (found.blank_rows, found.as_text) == (1, False)


def test_ends_of_lines_that_are_none(tmp_path: Path) -> None:
    content = '{"text": "one\u2028line\u0085of mine", "label": "a"}\n{"text": "b", "label": "c"}'
    assert read(tmp_path, content)[""].columns["text"] == ["one\u2028line\u0085of mine", "b"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": 1}\n{"a": 2\n', "line 2: no JSON: "),
        ('{\n "a": [1,\n}', "line 3: no JSON: "),
        ("not json at all", "line 1: no JSON: "),
        ("", "is empty"),
        ("[1, 2]", "each row must be an object of names and values, got '1'"),
        ('{"a": 1}\n[2]\n', "each row must be an object of names and values, got '[2]'"),
        ("3", "must hold a list of objects, got int"),
        ('{"text": ["a", "b"], "label": ["x"]}', "its columns are not equally long: text (2), label (1)"),
        ('{"info": {"by": "me"}, "text": "x"}', "is an object without a list of rows; it has 'info', 'text'"),
        ('[{"label": "a", "label": "b"}]', "an object has the key 'label' twice"),
        ('{"label": "a"}\n{"label": "a", "label": "b"}', "line 2: an object has the key 'label' twice"),
    ],
)
def test_what_is_no_list_of_rows_is_told(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        read(tmp_path, content)
    assert says in str(caught.value)
    assert str(tmp_path / "rows.json") in str(caught.value)


def test_of_several_lists_one_is_named_and_splits_go_first(tmp_path: Path) -> None:
    content = json.dumps({"authors": [{"name": "x"}], "data": ROWS})
    with pytest.raises(ValueError, match=r"several lists of rows: 'authors', 'data'; name one with data\.subset"):
        read(tmp_path, content)
    assert read_json(tmp_path / "rows.json", wanted="data")[""].columns == COLUMNS
    found = read(tmp_path, json.dumps({"train": ROWS[:2], "test": ROWS[2:], "labels": [{"name": "a"}]}))
    assert {name: len(rows) for name, rows in found.items()} == {"train": 2, "test": 1}
    assert found["train"].notes == ("rows.json: 'labels' are no splits, and not read",)
    columns = {name: {key: values[:2] for key, values in COLUMNS.items()} for name in ("train", "test")}
    assert {name: len(rows) for name, rows in read(tmp_path, json.dumps(columns)).items()} == {"train": 2, "test": 2}


def test_columns_of_other_rows_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its columns are not of the same rows: 'text', 'label'"):
        read(tmp_path, json.dumps({"text": {"0": "x", "1": "y"}, "label": {"0": "a", "2": "b"}}))


def test_what_is_not_a_number_is_missing(tmp_path: Path) -> None:
    found = read(tmp_path, '[{"text": "x", "label": NaN}, {"text": NaN, "label": 3}]')[""]
    assert found.columns == {"text": ["x", None], "label": [None, 3]}


@pytest.mark.parametrize("content", ['{"data": []}', '{"text": [], "label": []}', "[]", "{}"])
def test_files_without_rows(tmp_path: Path, content: str) -> None:
    assert len(read(tmp_path, content)[""]) == 0
