"""Spreadsheets (.xlsx) as rows of text: the values of their cells, whatever format they are shown in."""

import datetime
import re
from pathlib import Path
from typing import Any

from fleetfit.data.file_rows import FileRows, shown

EXTRA = "fleetfit[xlsx]"
PADDED = re.compile(r"0+")  # a number format that shows 1 as 001


def read_spreadsheet(path: Path, sheet: str = "") -> FileRows:
    """All rows of a sheet, hidden ones too; the first row that has a value names the columns.

    A cell that was merged of several rows has its value in each of them.

    Args:
        path: The file.
        sheet: Its name; empty: the only one that has values.

    Raises:
        ValueError: no spreadsheet, no such sheet, several sheets with values, a header that names a column twice,
            formulas without a value.
        ImportError: openpyxl is not installed.
        OSError: the file cannot be read.
    """
    try:
        import openpyxl
    except ImportError:
        raise ImportError(
            f"{path} is a spreadsheet: pip install '{EXTRA}' to read it, or save it as CSV (UTF-8)"
        ) from None
    with path.open("rb") as file:
        try:
            book = openpyxl.load_workbook(file, data_only=True)
        except Exception as error:  # of zip, of XML, of openpyxl
            raise ValueError(f"{path} is no .xlsx file that can be read: {error}") from None
        if sheet and sheet not in book.sheetnames:
            raise ValueError(f"data.subset = {sheet!r}: {path} has no such sheet; there are {shown(book.sheetnames)}")
        tables = {
            name: _values(book[name]) for name in ([sheet] if sheet else book.sheetnames) if _is_sheet(book[name])
        }
        formulas = openpyxl.load_workbook(file)
    for name in tables:
        _check_formulas(formulas[name], book[name], path)
    filled = {name: rows for name, rows in tables.items() if any(map(_has_value, rows))}
    if not filled:
        raise ValueError(f"{path} is empty")
    if len(filled) > 1:
        raise ValueError(f"{path} has several sheets with values: {shown(list(filled))}; name one with data.subset")
    ((name, rows),) = filled.items()
    header, *body = rows[next(i for i, row in enumerate(rows) if _has_value(row)) :]
    full = [row for row in body if _has_value(row) and row != header]
    num_blank = sum(not _has_value(row) for row in body)
    names = {i: n.strip() or f"column {i + 1}" for i, n in enumerate(header) if n.strip() or any(r[i] for r in full)}
    if len(set(names.values())) < len(names):
        twice = [n for n in names.values() if list(names.values()).count(n) > 1]
        raise ValueError(f"{path}, sheet {name!r}: the header has {shown(sorted(set(twice)))} more than once")
    columns = {n: [row[i] for row in full] for i, n in names.items()}
    notes = [f"sheet {name!r} of {path.name} was read"] if len(book.sheetnames) > 1 else []
    again = len(body) - num_blank - len(full)
    if again:
        these = f"{again} rows that repeat" if again > 1 else "1 row that repeats"
        notes.append(f"left out {these} the header of {path.name}")
    hidden = sum(dimension.hidden for row, dimension in book[name].row_dimensions.items() if row <= len(rows))
    if hidden:
        notes.append(f"{hidden} rows of {path.name} are hidden there, and read like the others")
    return FileRows(columns, True, num_blank, tuple(notes))


def _is_sheet(sheet: Any) -> bool:
    return hasattr(sheet, "iter_rows")  # a chart is none


def _has_value(row: list[str]) -> bool:
    return any(field.strip() for field in row)


def _values(sheet: Any) -> list[list[str]]:
    rows = [[_text(cell) for cell in row] for row in sheet.iter_rows()]
    for area in sheet.merged_cells.ranges:
        for row in rows[area.min_row : area.max_row]:
            row[area.min_col - 1] = rows[area.min_row - 1][area.min_col - 1]
    return rows


def _check_formulas(formulas: Any, sheet: Any, path: Path) -> None:
    """Raises where a program wrote formulas and no values; an empty text is one."""
    for row in formulas.iter_rows():
        for cell in row:
            if (
                cell.data_type == "f"
                and sheet[cell.coordinate].value is None
                and sheet[cell.coordinate].data_type == "n"
            ):
                raise ValueError(
                    f"{path}, sheet {sheet.title!r}: {cell.coordinate} has a formula and no value; open it in a "
                    "spreadsheet program, and save it there"
                )


def _text(cell: Any) -> str:
    """A cell's value as text."""
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and PADDED.fullmatch(cell.number_format or ""):
        return str(value).zfill(len(cell.number_format))
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        text = value.isoformat(sep=" ") if isinstance(value, datetime.datetime) else value.isoformat()
        return text.removesuffix(" 00:00:00")
    return str(value)
