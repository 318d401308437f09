"""An inventory: a table of devices as companies have it, one line a device. ``fleet.inventory`` names the file.

Columns are known by their names, in any case and with a unit if they like ("Storage (MB)"), or said by the job
(``[fleet.columns]``). Every mistake is told with its line; nothing is guessed without a word.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fleetfit.config.profiles import Profile, find_profile
from fleetfit.core.units import UNITS, parse_bytes, parse_seconds

COLUMNS = {  # what a device has -> names that columns of it have, without signs and in lower case
    "name": ("name", "device", "devicename", "hostname", "host", "id", "deviceid"),
    "storage_limit": ("storage", "storagelimit", "freestorage", "disk", "flash", "room"),
    "memory_limit": ("memory", "memorylimit", "ram"),
    "latency_limit": ("latency", "latencylimit", "maxlatency"),
    "profile": ("profile", "hardware", "board", "model"),
    "gpu_capacity": ("watts", "power", "gpucapacity", "powerwatts", "tdp"),
    "cluster": ("cluster", "group", "edge"),
    "data": ("data", "datapath", "path"),
}
NEEDED = ("name", "storage_limit")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
LEAST_BYTES = 10_000  # a smaller number without a unit is none of bytes
MOST_TOLD = 10


class Inventory(NamedTuple):
    """The devices, each as keys of ``[[fleet.devices]]`` (and "data"), and what a person should know of the reading."""

    devices: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]


class _Column(NamedTuple):
    title: str
    place: int
    unit: str


def read_inventory(path: str | Path, columns: Mapping[str, str] | None = None) -> Inventory:
    """Read a CSV file of devices.

    Args:
        path: The file. Separated by commas, semicolons or tabs; UTF-8, or else cp1252. Blank rows are passed over.
        columns: Of what a device has, as in ``COLUMNS``: the title of its column.

    Raises:
        ValueError: columns that are missing or may be two; names that are missing, double or no folder names; sizes
            without a unit, or with one in some rows only; unknown profiles. Names file and lines.
        OSError: it cannot be read.
    """
    text, notes = _text(Path(path).read_bytes())
    rows, separator = _rows(path, text)
    titles, *entries = rows
    found = _columns(path, titles.values, columns or {})
    used = {column.place for column in found.values()}
    unused = [t for i, t in enumerate(titles.values) if i not in used and t.strip()]
    if unused:
        notes.append(f"{path}: not used: {', '.join(unused)}")
    problems: list[str] = []
    devices = tuple(_devices(entries, found, problems))
    if not entries:
        problems.append("it has no devices")
    if problems:
        more = [f"and {len(problems) - MOST_TOLD} more"] if len(problems) > MOST_TOLD else []
        raise ValueError("; ".join([f"{path}: {problems[0]}", *problems[1:MOST_TOLD], *more]))
    said = ", ".join(f"{key} from {column.title!r}" for key, column in found.items())
    notes.insert(0, f"{path}: {len(devices)} devices, separated by {separator}; {said}")
    return Inventory(devices, tuple(notes))


class _Row(NamedTuple):
    line: int
    values: list[str]


def _text(content: bytes) -> tuple[str, list[str]]:
    try:
        return content.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace"), ["the inventory is no UTF-8: read as cp1252"]


def _rows(path: str | Path, text: str) -> tuple[list[_Row], str]:
    first = next((line for line in text.splitlines() if line.strip(" ,;\t")), "")
    signs = {",": "commas", ";": "semicolons", "\t": "tabs"}
    sign = max(signs, key=first.count)
    if not first:
        raise ValueError(f"{path}: it is empty")
    reader = csv.reader(io.StringIO(text), delimiter=sign, skipinitialspace=True)
    try:
        rows = [_Row(reader.line_num, [value.strip() for value in row]) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}") from None
    for row in rows[1:]:
        if any(row.values[len(rows[0].values) :]):
            raise ValueError(
                f"{path}: line {row.line} has {len(row.values)} values, the first line has {len(rows[0].values)}"
            )
    return rows, signs[sign]


def _plain(title: str) -> tuple[str, str]:
    """A title without signs and unit, and its unit: 'Storage (MB)' -> ('storage', 'MB')."""
    found = re.fullmatch(
        r"(.*?)[\s_\[(.-]+(B|KB|MB|GB|KiB|MiB|GiB|W|watts?|ms|s)[\])]?\s*", title.strip(), re.IGNORECASE
    )
    name, unit = (found[1], found[2]) if found else (title, "")
    unit = unit.lower() if unit.lower() in ("ms", "s") else "" if unit.lower().startswith("w") else unit.upper()
    return re.sub(r"[^a-z0-9]", "", name.lower()), unit


def _columns(path: str | Path, titles: Sequence[str], given: Mapping[str, str]) -> dict[str, _Column]:
    wrong = [key for key in given if key not in COLUMNS]
    if wrong:
        raise ValueError(f"fleet.columns.{wrong[0]} must be one of {', '.join(COLUMNS)}")
    found: dict[str, _Column] = {}
    for key, names in COLUMNS.items():
        if title := given.get(key):
            places = [i for i, t in enumerate(titles) if t.strip().casefold() == title.strip().casefold()]
            if not places:
                raise ValueError(f"{path}: it has no column {title!r} (fleet.columns.{key}), only {', '.join(titles)}")
        else:
            taken = {t.casefold() for t in given.values()}
            known = [(names.index(_plain(t)[0]), i) for i, t in enumerate(titles) if _plain(t)[0] in names]
            places = [i for _, i in sorted(known) if titles[i].casefold() not in taken]
        if len(places) > 1 and key in NEEDED:
            which = ", ".join(repr(titles[i]) for i in places)
            raise ValueError(f"{path}: {which} may all be the {key}; say which: [fleet.columns] {key} = ...")
        if places:
            found[key] = _Column(titles[places[0]], places[0], _plain(titles[places[0]])[1])
    for key in NEEDED:
        if key not in found:
            raise ValueError(
                f"{path}: no column is known as the {key} (as {', '.join(COLUMNS[key][:3])}): its columns are "
                f"{', '.join(titles)}; say which: [fleet.columns] {key} = ..."
            )
    return found


def _devices(rows: Sequence[_Row], columns: Mapping[str, _Column], problems: list[str]) -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    profiles: dict[str, Profile | str] = {}
    plain = [r.line for r in rows if re.fullmatch(r"[\d.,]+", _value(r, columns["storage_limit"]))]
    mixed = 0 < len(plain) < len(rows) and not columns["storage_limit"].unit
    if mixed:
        some = ", ".join(map(str, plain[:5]))
        problems.append(f"{columns['storage_limit'].title!r} has a unit in some rows only, not in line {some}")
    for row in rows:
        here = f"line {row.line}"
        device: dict[str, Any] = {}
        name = device["name"] = _value(row, columns["name"])
        if not NAME.fullmatch(name):
            problems.append(f"{here}: the name {name!r} must be letters, digits, '-', '_' and '.', at most 64")
        elif name.casefold() in seen:
            problems.append(f"{here}: the name {name!r} is that of line {seen[name.casefold()]} already")
        seen.setdefault(name.casefold(), row.line)
        try:
            device["storage_limit"] = _bytes(_value(row, columns["storage_limit"]), columns["storage_limit"], mixed)
        except ValueError as error:
            problems.append(f"{here}: {error}")
        if "memory_limit" in columns and (value := _value(row, columns["memory_limit"])):
            try:
                device["memory_limit"] = _bytes(value, columns["memory_limit"], mixed=False)
            except ValueError as error:
                problems.append(f"{here}: {error}")
        if "latency_limit" in columns and (value := _value(row, columns["latency_limit"])):
            try:
                device["latency_limit"] = _seconds(value, columns["latency_limit"])
            except ValueError as error:
                problems.append(f"{here}: {error}")
        for key in ("cluster", "data"):
            if key in columns and (value := _value(row, columns[key])):
                device[key] = value
        if "profile" in columns and (named := _value(row, columns["profile"])):
            if named not in profiles:
                try:
                    profiles[named] = find_profile(named)
                except ValueError as error:
                    profiles[named] = str(error)
            if isinstance(known := profiles[named], str):
                problems.append(f"{here}: the profile {known}")
            device["profile"] = known
        elif "latency_limit" in device:
            problems.append(f"{here}: {columns['latency_limit'].title} needs a profile, which says how long it takes")
        elif "gpu_capacity" in columns and (watts := _value(row, columns["gpu_capacity"])):
            try:
                device["gpu_capacity"] = float(re.sub(r"(?i)\s*(w|watts?)$", "", watts).replace(",", "."))
            except ValueError:
                problems.append(f"{here}: {columns['gpu_capacity'].title} must be watts, got {watts!r}")
        devices.append(device)
    clusters = [d for d in devices if "cluster" in d]
    if 0 < len(clusters) < len(devices):
        without = next(row.line for row, d in zip(rows, devices, strict=True) if "cluster" not in d)
        problems.append(f"line {without} has no {columns['cluster'].title!r}: give it for all devices, or for none")
    return devices


def _value(row: _Row, column: _Column) -> str:
    return row.values[column.place] if column.place < len(row.values) else ""


def _seconds(value: str, column: _Column) -> float:
    written = value.replace(",", ".")
    if re.fullmatch(r"[\d.]+", written):
        if not column.unit:
            raise ValueError(
                f"{column.title} = {value!r} has no unit: write '{value} ms', or name the column {column.title}_ms"
            )
        written += column.unit
    try:
        return float(str(parse_seconds(written)))
    except ValueError:
        raise ValueError(f"{column.title} must be a time, as '50 ms', got {value!r}") from None


def _bytes(value: str, column: _Column, mixed: bool) -> int:
    if not value:
        raise ValueError(f"{column.title} is missing")
    written = re.sub(r"(?<=\d),(?=\d{1,2}\b)", ".", value)  # a comma before one or two digits is no thousand's
    written = re.sub(r"(?<=\d)[,' \u00a0](?=\d{3}\b)", "", written)
    if re.fullmatch(r"[\d.]+", written) and column.unit:
        written += column.unit
    try:
        size = int(str(parse_bytes(written)))
    except ValueError:
        raise ValueError(f"{column.title} must be a size, as '300 KB' ({', '.join(UNITS)}), got {value!r}") from None
    if size <= 0:
        raise ValueError(f"{column.title} must be > 0, got {value!r}")
    if re.fullmatch(r"[\d.]+", written) and size < LEAST_BYTES and not mixed:
        raise ValueError(
            f"{column.title} = {value!r} has no unit: write '{value} MB', or name the column {column.title}_mb"
        )
    return size
