"""Spreadsheets: the values of their cells as text."""

import datetime
import sys
from pathlib import Path

import pytest

from fleetfit.data.spreadsheet import read_spreadsheet

openpyxl = pytest.importorskip("openpyxl")


def book(path: Path, **sheets: list[list[object]]) -> Path:
    made = openpyxl.Workbook()
    made.remove(made.active)
    for name, rows in sheets.items():
        sheet = made.create_sheet(name)
        for row in rows:
            sheet.append(row)
    made.save(path)
    return path


def test_values_are_text(tmp_path: Path) -> None:
    day = datetime.datetime(2024, 5, 6)
    rows = [["text", "label", "when"], ["01", 7, day], ["NA", 7.0, None], [None, None, None], [True, 0.5, day]]
    found = read_spreadsheet(book(tmp_path / "a.xlsx", one=[[], [None, None], *rows]))
    assert found.columns == {
        "text": ["01", "NA", "TRUE"],
        "label": ["7", "7", "0.5"],
        "when": ["2024-05-06", "", "2024-05-06"],
    }
    assert (found.as_text, found.blank_rows, found.notes) == (True, 1, ())


def test_a_number_that_is_shown_with_zeros_has_them(tmp_path: Path) -> None:
    path = book(tmp_path / "a.xlsx", one=[["code"], [7], [12]])
    made = openpyxl.load_workbook(path)
    for row in (2, 3):
        made["one"].cell(row, 1).number_format = "000"
    made.save(path)
    assert read_spreadsheet(path).columns["code"] == ["007", "012"]


def test_the_sheet_with_values_is_read_and_several_are_asked_for(tmp_path: Path) -> None:
    table = [["text", "label"], ["a", "b"]]
    found = read_spreadsheet(book(tmp_path / "a.xlsx", notes=[], data=table))
    assert found.columns["text"] == ["a"]
    assert found.notes == ("sheet 'data' of a.xlsx was read",)
    path = book(tmp_path / "b.xlsx", first=table, second=[["text", "label"], ["c", "d"]])
    with pytest.raises(ValueError, match=r"several sheets with values: 'first', 'second'; name one with data\.subset"):
        read_spreadsheet(path)
    assert read_spreadsheet(path, "second").columns["text"] == ["c"]
    with pytest.raises(ValueError, match=r"data\.subset = 'third': .* has no such sheet; there are 'first', 'second'"):
        read_spreadsheet(path, "third")


def test_what_is_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is empty"):
        read_spreadsheet(book(tmp_path / "a.xlsx", one=[[None]]))
    with pytest.raises(ValueError, match="sheet 'one': the header has 'a' more than once"):
        read_spreadsheet(book(tmp_path / "a.xlsx", one=[["a", "a"], [1, 2]]))
    (tmp_path / "a.xlsx").write_text("text,label\n")
    with pytest.raises(ValueError, match=r"a\.xlsx is no \.xlsx file that can be read"):
        read_spreadsheet(tmp_path / "a.xlsx")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ImportError, match=r"pip install 'fleetfit\[xlsx\]' to read it, or save it as CSV"):
        read_spreadsheet(tmp_path / "a.xlsx")


def test_a_cell_of_several_rows_has_its_value_in_each(tmp_path: Path) -> None:
    path = book(tmp_path / "a.xlsx", one=[["text", "label"], ["t", None], ["a", "x"], ["b", None], ["c", "y"]])
    made = openpyxl.load_workbook(path)
    made["one"].merge_cells("B3:B4")
    made["one"].merge_cells("A2:B2")
    made.save(path)
    assert read_spreadsheet(path).columns == {"text": ["t", "a", "b", "c"], "label": ["", "x", "x", "y"]}


def test_blanks_further_headers_and_hidden_rows(tmp_path: Path) -> None:
    rows = [["text", "label"], ["a", "x"], ["  ", " "], ["text", "label"], ["b", "y"]]
    path = book(tmp_path / "a.xlsx", one=rows)
    made = openpyxl.load_workbook(path)
    made["one"].row_dimensions[5].hidden = True
    made.save(path)
    found = read_spreadsheet(path)
    assert (found.columns, found.blank_rows) == ({"text": ["a", "b"], "label": ["x", "y"]}, 1)
    assert found.notes == (
        "left out 1 row that repeats the header of a.xlsx",
        "1 rows of a.xlsx are hidden there, and read like the others",
    )


def test_a_formula_without_a_value_is_an_error(tmp_path: Path) -> None:
    path = book(tmp_path / "a.xlsx", one=[["text", "label"], ["a", '=IF(1, "x", "y")']])
    with pytest.raises(ValueError, match=r"sheet 'one': B2 has a formula and no value; open it in a spreadsheet"):
        read_spreadsheet(path)
