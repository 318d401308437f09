"""Tables as text, one row a line: CSV, TSV and their kin, read as they are written or not at all.

Every value stays text: 01 is not 1, NA is not missing. What a reader could only guess is an error with file and line:
rows that are longer or shorter than the header, a quote that swallows rows.
"""

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fleetfit.data.file_rows import FileRows, read_text, shown

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
TAB_WORDS = ("tab", "\\t")
EXCEL_SEPARATOR = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)  # a first line that spreadsheets write
NAMELESS = "column {}"

csv.field_size_limit(sys.maxsize // 2**32)  # of a text; what a stray quote swallows is found by other signs


@dataclass(frozen=True)
class _Row:
    """One row, and the lines of the file that it is of."""

    line: int
    fields: list[str]
    lines: int = 1


class _Unreadable(ValueError):
    """Why a file cannot be read with one separator and quoting; begins with the line."""


def read_delimited(path: Path, separator: str = "", encoding: str = "") -> FileRows:
    """All rows of a file; the first one names the columns.

    Separator: the one in which the header has several names and all rows as many fields. Empty fields at the end of
    rows, and columns without a name and any value, are dropped; so are rows without any value, and further headers.

    Args:
        path: The file.
        separator: One character, or "tab"; empty: found.
        encoding: As Python calls it; empty: found.

    Raises:
        ValueError: no text, no header, rows that do not fit the header, quotes that do not pair; names file and line.
        OSError: the file cannot be read.
    """
    text, told = read_text(path, encoding)
    stated = EXCEL_SEPARATOR.match(text)
    skipped = 0
    if stated:
        text, skipped = text[stated.end() :], 1
        separator = separator or stated[1]
    if not text.strip():
        raise ValueError(f"{path} is empty")
    separator = "\t" if separator.lower() in TAB_WORDS else separator
    if len(separator) > 1:
        raise ValueError(f"data.separator must be one character or 'tab', got {separator!r}")
    notes = [] if told == "UTF-8" else [f"{path.name} was read as {told}"]
    try:
        used, rows, unquoted = _rows(text, path, separator)
    except _Unreadable as error:
        line, _, why = str(error).partition(" ")
        raise ValueError(f"{path}, line {int(line) + skipped}: {why}") from None
    if used and used != "," and not (used == "\t" and path.suffix.lower() == ".tsv"):
        notes.append(f"fields of {path.name} are divided by {SEPARATORS.get(used, repr(used))}")
    if unquoted:
        notes.append(f"quotes in {path.name} are signs like others: they do not pair")
    header, *body = rows
    full = [row for row in body if any(field.strip() for field in row.fields)]
    num_blank = len(body) - len(full)
    names, more = _names(header, full, path)
    again = [row for row in full if len(names) > 1 and row.fields == header.fields]
    if again:  # of files that were put together
        full = [row for row in full if row.fields != header.fields]
        these = f"{len(again)} rows that repeat" if len(again) > 1 else "1 row that repeats"
        notes.append(f"left out {these} the header of {path.name}, the first in line {again[0].line}")
    if long := [row for row in full if row.lines > 1]:
        these = f"{len(long):,} rows of {path.name} run" if len(long) > 1 else f"1 row of {path.name} runs"
        notes.append(f"{these} over several lines, the first from line {long[0].line}")
    columns = {name: [row.fields[i] for row in full] for i, name in names.items()}
    return FileRows(columns, True, num_blank, (*notes, *more))


def _rows(text: str, path: Path, separator: str) -> tuple[str, list[_Row], bool]:
    """The separator, all rows as wide as the header, and whether quotes count as ordinary characters."""
    given = [separator] if separator else [s for s in SEPARATORS if len(_header(text, s)) > 1]
    if not given:  # a single column
        given = [","]
    if path.suffix.lower() == ".tsv" and "\t" in given:
        given = ["\t"]
    problems: list[_Unreadable] = []
    read: list[tuple[str, list[_Row], bool]] = []
    for candidate in given:
        try:
            read.append((candidate, *_parsed(text, candidate)))
        except _Unreadable as error:
            problems.append(error)
    if not read:
        raise problems[0]
    if len(read) > 1:
        listed = ", ".join(f"{SEPARATORS[s]} ({shown(rows[0].fields)})" for s, rows, _ in read)
        raise _Unreadable(f"1 its fields may be divided by {listed}; say which with data.separator")
    return read[0]


def _header(text: str, separator: str) -> list[str]:
    try:
        return next((row.fields for row in _parse(text, separator, quoted=True) if any(row.fields)), [])
    except _Unreadable:
        return next((row.fields for row in _parse(text, separator, quoted=False) if any(row.fields)), [])


def _parsed(text: str, separator: str) -> tuple[list[_Row], bool]:
    try:
        return _as_wide(list(_parse(text, separator, quoted=True)), separator), False
    except _Unreadable as error:
        if '"' not in text:
            raise
        problem = error
    # Where no field is quoted as a whole, quotes may be inches, or ends of speech.
    try:
        rows = _as_wide(list(_parse(text, separator, quoted=False)), separator)
    except _Unreadable:
        raise problem from None
    if any(len(f) > 1 and f.strip()[:1] == '"' == f.strip()[-1:] for row in rows for f in row.fields):
        raise problem
    return rows, True


def _parse(text: str, separator: str, quoted: bool) -> Iterator[_Row]:
    """Rows as the format defines them (RFC 4180); stricter than most readers."""
    spaced = quoted and re.search(re.escape(separator) + ' +"', text) is not None
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        skipinitialspace=spaced,
        strict=True,
    )
    before = 0
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = str(error)
            if "end of data" in what:
                what = "a quote opens here or in a line above and is never closed"
            elif "expected after" in what:
                what = f"{what}: a quote inside a quoted field must be written twice"
            raise _Unreadable(f"{before + 1} {what}") from None
        yield _Row(before + 1, fields, reader.line_num - before)
        before = reader.line_num


def _as_wide(rows: list[_Row], separator: str) -> list[_Row]:
    """Rows from the header on, each as wide as it.

    Raises:
        _Unreadable: one is shorter, or longer by more than empty fields, or has swallowed others.
    """
    first = next((i for i, row in enumerate(rows) if any(f.strip() for f in row.fields)), None)
    if first is None:
        raise _Unreadable("1 no row has a value")
    rows = rows[first:]
    header, result = rows[0], [rows[0]]
    width = len(header.fields)
    for row in rows[1:]:
        number = len(row.fields)
        if not any(f.strip() for f in row.fields):
            result.append(_Row(row.line, [""] * width, row.lines))
            continue
        if number < width or any(f.strip() for f in row.fields[width:]):
            fields = "1 field" if number == 1 else f"{number} fields"
            raise _Unreadable(f"{row.line} the row has {fields}, and the header {width}: {shown(header.fields)}")
        result.append(_Row(row.line, row.fields[:width], row.lines))
    _check_swallowed(result, separator)
    return result


def _check_swallowed(rows: Sequence[_Row], separator: str) -> None:
    """A quoted value over several lines that hold whole rows of their own has swallowed them.

    So it looks if each line is a row of as many fields, and one of all these a value that its column has elsewhere. The
    first line is but the rest of a row, and the last one may be the beginning of another. A text written over several
    lines is not like that; how many there are is told all the same.
    """
    width = len(rows[0].fields)
    if width == 1 or all(row.lines == 1 for row in rows[1:]):
        return
    known = [{row.fields[i].strip() for row in rows[1:] if row.lines == 1} - {""} for i in range(width)]

    def are_rows(lines: Sequence[str], starts: Sequence[int]) -> bool:
        split = [[part.strip() for part in line.split(separator)] for line in lines]
        if any(len(parts) != width - start for parts, start in zip(split, starts, strict=True)):
            return False
        placed = ((part, i) for parts, start in zip(split, starts, strict=True) for i, part in enumerate(parts, start))
        return any(part in known[i] for part, i in placed)

    for row in rows[1:]:
        if row.lines == 1:
            continue
        for place, value in enumerate(row.fields):
            first, *others = value.splitlines() or [""]
            is_last = place == width - 1
            held = (others[:-1] or others) if is_last else [first, *others[:-1]]
            if others and are_rows(held, [0 if is_last or i else place for i in range(len(held))]):
                raise _Unreadable(
                    f"{row.line} a quote that opens here closes only in line {row.line + row.lines - 1}, and what it "
                    f"holds looks like rows of their own: {(others[:-1] or held)[0]!r}"
                )


def _names(header: _Row, rows: Sequence[_Row], path: Path) -> tuple[dict[int, str], list[str]]:
    """Names of the columns by their place, but of those without name and value."""
    names: dict[int, str] = {}
    notes = []
    for i, written in enumerate(header.fields):
        name = written.strip()
        if name:
            names[i] = name
        elif any(row.fields[i].strip() for row in rows):
            names[i] = NAMELESS.format(i + 1)
            notes.append(f"the header of {path.name} has no name for its column {i + 1}")
    twice = [name for name, number in Counter(names.values()).items() if number > 1]
    if twice:
        raise ValueError(f"{path}, line {header.line}: the header has {shown(twice)} more than once")
    return names, notes
