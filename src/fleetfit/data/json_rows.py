"""JSON files of rows: lines, a list of objects, an object around such a list, or columns."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleetfit.data.file_rows import FileRows, read_text, shown
from fleetfit.data.image_folder import SPLIT_WORDS


def read_json(path: Path, encoding: str = "", wanted: str = "") -> Mapping[str, FileRows]:
    """All rows of a file, by the name of their split, which is empty where there is one list only.

    Read are: one object a line; a list of objects; ``{"data": [...]}``, whatever the name; ``{"train": [...],
    "test": [...]}``; columns, ``{"text": [...], "label": [...]}``, or by row number, as pandas writes them; and
    ``{"columns": [...], "data": [[...], ...]}``; each of them in an envelope, too. A value that is null or NaN, or
    not there, is missing.

    Args:
        path: The file.
        encoding: As Python calls it; empty: found.
        wanted: Which list is meant, if an object has several.

    Raises:
        ValueError: not JSON, or of another form; names file and line where there is one.
        OSError: the file cannot be read.
    """
    text, told = read_text(path, encoding)
    notes = () if told == "UTF-8" else (f"{path.name} was read as {told}",)
    if not text.strip():
        raise ValueError(f"{path} is empty")
    try:
        value = _parsed(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" and "\n" not in text.strip():
            raise ValueError(f"{path}, line {error.lineno}: no JSON: {error.msg}") from None
        return {"": _of_objects(_lines(text, path, error), path, notes)}
    except _Twice as error:
        raise ValueError(f"{path}: {error}") from None
    if isinstance(value, dict):
        lists = _lists(value, path, wanted)
        beside = [key for key, rows in value.items() if key not in lists and "" not in lists and _are_objects(rows)]
        if beside:
            notes = (*notes, f"{path.name}: {shown(beside)} are no splits, and not read")
        return {name: _of_list(rows, path, notes) for name, rows in lists.items()}
    return {"": _of_list(value, path, notes)}


def _parsed(text: str) -> Any:
    return json.loads(
        text, object_pairs_hook=_object, parse_constant=lambda word: None if word == "NaN" else float(word)
    )


class _Twice(ValueError):
    """A key that an object has twice; JSON's readers keep the last one without a word."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(f"an object has the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
    return result


def _lines(text: str, path: Path, whole: json.JSONDecodeError) -> list[Any]:
    """One value a line; a line ends in LF or CRLF, since JSON's texts may hold all other ends of lines as they are."""
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append(_parsed(line))
        except json.JSONDecodeError as error:
            if number == 1 or not values:  # it was meant as a whole
                raise ValueError(f"{path}, line {whole.lineno}: no JSON: {whole.msg}") from None
            raise ValueError(f"{path}, line {number}: no JSON: {error.msg}") from None
        except _Twice as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return values


def _lists(value: Mapping[str, Any], path: Path, wanted: str) -> dict[str, Any]:
    """Lists of rows by their split: columns become one, and what stands beside lists of rows is no data."""
    if isinstance(value.get("columns"), list) and _is_table(value.get("data"), len(value["columns"])):
        return {"": [dict(zip(value["columns"], row, strict=True)) for row in value["data"]]}
    lists = {key: rows for key, rows in value.items() if _are_objects(rows)}
    if len(lists) == 1:
        return {"": next(iter(lists.values()))}
    splits = {key: rows for key, rows in lists.items() if key.lower() in SPLIT_WORDS}
    if lists and (wanted in lists or not splits):
        if wanted in lists:
            return {"": lists[wanted]}
        raise ValueError(f"{path} has several lists of rows: {shown(list(lists))}; name one with data.subset")
    if splits:
        return splits
    parts = {key: part for key, part in value.items() if isinstance(part, dict)}
    if parts and len(parts) == len(value) and all(key.lower() in SPLIT_WORDS for key in parts):
        return {key: _lists(part, path, wanted)[""] for key, part in parts.items()}
    deep = [part for part in value.values() if isinstance(part, list | dict)]
    if len(deep) == 1 and isinstance(deep[0], dict) and any(isinstance(p, list | dict) for p in deep[0].values()):
        return _lists(deep[0], path, wanted)  # an envelope
    return {"": _of_columns(value, path)}


def _of_columns(value: Mapping[str, Any], path: Path) -> list[Any]:
    """Rows of an object of columns, or of rows by their numbers."""
    columns = dict(value)
    if value and all(isinstance(column, dict) for column in value.values()):
        if all(key.isdecimal() for key in value) and not any(key.isdecimal() for row in value.values() for key in row):
            return list(value.values())
        keys = list(next(iter(value.values())))
        odd = next((name for name, column in value.items() if set(column) != set(keys)), None)
        if odd is not None:
            raise ValueError(f"{path}: its columns are not of the same rows: {next(iter(value))!r}, {odd!r}")
        columns = {name: [column[key] for key in keys] for name, column in value.items()}
    if columns and all(column == [] for column in columns.values()):
        return []
    sizes = {len(c) if isinstance(c, list) else -1 for c in columns.values()}
    if len(sizes) == 1 and min(sizes) > 0:
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if all(isinstance(c, list) for c in columns.values()) and columns:
        listed = ", ".join(f"{key} ({len(c)})" for key, c in columns.items())
        raise ValueError(f"{path}: its columns are not equally long: {listed}")
    if set(map(type, value.values())) <= {str, int, float, bool, type(None)}:
        return [value]  # one row
    raise ValueError(f"{path} is an object without a list of rows; it has {shown(list(value))}")


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _is_table(value: Any, width: int) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) and len(row) == width for row in value)


def _of_list(value: Any, path: Path, notes: tuple[str, ...]) -> FileRows:
    if not isinstance(value, list):
        raise ValueError(f"{path} must hold a list of objects, got {type(value).__name__}")
    return _of_objects(value, path, notes)


def _of_objects(rows: Sequence[Any], path: Path, notes: tuple[str, ...]) -> FileRows:
    odd = next((row for row in rows if not isinstance(row, dict)), None)
    if odd is not None:
        raise ValueError(f"{path}: each row must be an object of names and values, got {str(odd)[:40]!r}")
    full = [row for row in rows if any(v is not None and v != "" for v in row.values())]
    names = list(dict.fromkeys(name for row in full for name in row))
    # JSON writes true, not True
    columns = {name: [_plain(row.get(name)) for row in full] for name in names}
    return FileRows(columns, False, len(rows) - len(full), notes)


def _plain(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value
