"""Files and folders -> rows by split: typed tables, tables as text, folders of images with or without metadata."""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fleetfit.config import DataConfig
from fleetfit.data.delimited import read_delimited
from fleetfit.data.file_rows import FileRows, LeftOut, shown
from fleetfit.data.image_folder import (
    METADATA,
    SPLIT_WORDS,
    ImageFiles,
    count_others,
    files_below,
    is_picture,
    read_image_folder,
    readable_endings,
    without_sidecars,
)
from fleetfit.data.json_rows import read_json
from fleetfit.data.spreadsheet import read_spreadsheet

READERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".xlsx": "xlsx",
    ".arrow": "arrow",
}
SAVE_AS = {
    ".xls": "save it as .xlsx or as CSV (UTF-8)",
    ".ods": "save it as .xlsx or as CSV (UTF-8)",
    ".numbers": "export it as CSV (UTF-8)",
    ".gz": "unpack it first",
    ".zip": "unpack it first",
}
FILE_NAMES = ("file_name", "filename", "file", "image", "path")  # columns of a metadata table that name the picture
LABEL_NAMES = ("label", "labels", "fine_label", "class", "intent", "category", "target", "y")
SPLITS = ("train", "validation", "test")
SHOWN = 5
HASHING_THREADS = 4


@dataclass
class Read:
    """What was read of files: rows by split, and what a person should know of it."""

    splits: Mapping[str, Any]
    num_files: int
    as_text: bool = False
    mixed: dict[str, str] = field(default_factory=dict)
    class_rule: str = ""
    left_out: LeftOut = field(default_factory=LeftOut)
    notes: list[str] = field(default_factory=list)


def read_files(places: list[Path], config: DataConfig, cache: Path, said: str) -> tuple[Read, str, Path]:
    """Rows of some files, or of a folder; a digest of their content; and what paths in the rows start from.

    Raises:
        ValueError: nothing there, or what cannot be read or is not clear; names the file.
        ImportError: a spreadsheet, and no reader for it is installed.
        OSError: a file cannot be read.
    """
    place, subset = places[0], config.subset
    if place.is_dir() and subset and (place / subset).is_dir():
        place, subset = place / subset, ""
    folder = place
    if not place.is_dir():
        folder = place.parent if len(places) == 1 else Path(os.path.commonpath([p.parent for p in places]))
    files = files_below(place) if place.is_dir() else [p for p in places if p.is_file()]
    if not files:
        raise ValueError(f"{said}: {place} is empty")
    digest = _digest(files, folder)
    try:
        read = _read(place, files, folder, subset, config, str(cache / "tables" / digest[:16]))
    except (OSError, ImportError):
        raise
    except Exception as error:  # of datasets, of pyarrow, of our readers
        raise ValueError(f"{said}: {_naming(error, place)}") from error
    return read, f"{digest} {subset}", folder


def _naming(error: Exception, place: Path) -> str:
    """What is wrong, with the file or folder that it is about."""
    told = first_line(error)
    return told if str(place) in told or told.startswith("data.") else f"{place} cannot be read: {told}"


def _read(place: Path, files: Sequence[Path], folder: Path, subset: str, config: DataConfig, tables: str) -> Read:
    """Rows of a folder that ``save_to_disk`` wrote, of a copy of a hub repository, or of plain files."""
    from datasets import DatasetDict, load_from_disk

    if any((place / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        saved = load_from_disk(str(place))
        return Read(saved if isinstance(saved, DatasetDict) else {"all": saved}, len(files))
    page = place / "README.md"
    if page.exists() and page.read_text(encoding="utf-8", errors="replace").startswith("---"):
        read = _described(str(place), subset, tables, len(files))
        for file in files if read.as_text else ():
            if READERS.get(file.suffix.lower()) == "csv":
                read_delimited(file, config.separator, config.encoding)  # an error here is one there, without a word
        return read
    pictures = [f for f in files if is_picture(f)]
    rest = without_sidecars(files, pictures) if place.is_dir() else list(files)
    described = {f for f in rest if f.name.lower() in METADATA}
    kinds = Counter(READERS[f.suffix.lower()] for f in rest if f.suffix.lower() in READERS and f not in described)
    used = [f for f in rest if f.suffix.lower() in READERS]
    if pictures and (len(pictures) >= sum(kinds.values()) if place.is_dir() else len(pictures) == len(files)):
        return _images(folder, files, pictures, [f for f in used if f in described], config)
    if not place.is_dir() and (len(kinds) != 1 or kinds.total() != len(files)):
        kinds = Counter()
    if not kinds:
        raise ValueError(_no_kind(files))
    ((kind, _),) = kinds.most_common(1)
    used = [f for f in used if READERS[f.suffix.lower()] == kind]
    read = _typed(used, place, kind, tables) if kind in ("parquet", "arrow") else _untyped(used, place, kind, config)
    count_others(files, used, read.left_out)
    return read


def _no_kind(files: Sequence[Path]) -> str:
    names = ", ".join(sorted({file.suffix or file.name for file in files})[:SHOWN])
    hint = next((f"; {SAVE_AS[f.suffix.lower()]}" for f in files if f.suffix.lower() in SAVE_AS), "")
    return f"files must be images, or of one kind of {', '.join(READERS)}, got {names}{hint}"


def _described(place: str, subset: str, tables: str, num_files: int) -> Read:
    """A copy of a hub repository, by its own description of its files."""
    from datasets import load_dataset_builder

    def make(folder: str) -> Any:
        return load_dataset_builder(place, subset or None, cache_dir=folder)

    builder = as_written(make(tables), lambda: make(f"{tables}-as-written"))
    builder.download_and_prepare()
    return Read(builder.as_dataset(), num_files, as_text=is_plain_csv(builder))


def as_written(builder: Any, again: Callable[[], Any]) -> Any:
    """A builder of ``datasets``; of CSV files one that takes no word for a missing value, and no code for a number.

    Args:
        builder: As it comes.
        again: Makes another one, which keeps what it prepares elsewhere: it would take what was prepared otherwise.
    """
    if not _is_csv(builder):
        return builder
    other = again()
    other.config.keep_default_na, other.config.na_values = False, [""]
    if not (other.config.features or other.info.features):
        other.config.dtype = str
    return other


def _is_csv(builder: Any) -> bool:
    return hasattr(builder.config, "keep_default_na")


def is_plain_csv(builder: Any) -> bool:
    """Whether what it reads is all text."""
    return _is_csv(builder) and builder.config.dtype is str


def _typed(files: Sequence[Path], place: Path, kind: str, tables: str) -> Read:
    """Files whose columns have types, memory-mapped."""
    from datasets import load_dataset

    # Splits are ours, not those that datasets finds: it takes /home/test/data/train.csv for a test split.
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(_split_of(file, place), []).append(glob.escape(str(file)))
    ordered = {name: by_split[name] for name in SPLITS if name in by_split}
    return Read(load_dataset(kind, data_files=ordered, cache_dir=tables), len(files))


def _untyped(files: Sequence[Path], place: Path, kind: str, config: DataConfig) -> Read:
    """Files of text, read as it is written."""
    parts: dict[str, list[tuple[Path, FileRows]]] = {}
    for file in files:
        split = _split_of(file, place)
        for name, rows in _rows_of(file, config).items():
            named = SPLIT_WORDS.get(name.lower(), name) if name else split
            parts.setdefault(named, []).append((file, rows))
    read = Read({}, len(files), as_text=kind != "json")
    ordered: list[str] = [n for n in SPLITS if n in parts]
    ordered += [n for n in parts if n not in ordered]
    columns = list(parts[ordered[0]][0][1].columns)
    for name in ordered:
        for file, rows in parts[name]:
            if kind != "json" and set(rows.columns) != set(columns):
                raise ValueError(f"{file} has the columns {shown(list(rows.columns))}, another file {shown(columns)}")
            columns += [c for c in rows.columns if c not in columns]
            read.left_out.add("blank rows", rows.blank_rows)
            read.notes += rows.notes
    joined = {name: [v for n in ordered for _, rows in parts[n] for v in _values(rows, name)] for name in columns}
    whole, read.mixed = as_dataset(joined, read.as_text)
    ends = np.cumsum([0, *(sum(len(rows) for _, rows in parts[n]) for n in ordered)]).tolist()
    read.splits = {
        n: whole.select(range(first, last)) for n, first, last in zip(ordered, ends[:-1], ends[1:], strict=True)
    }
    return read


def _rows_of(file: Path, config: DataConfig) -> Mapping[str, FileRows]:
    """Rows of one file by split; the one reader of plain files, of whomever they are."""
    kind = READERS[file.suffix.lower()]
    if kind == "csv":
        return {"": read_delimited(file, config.separator, config.encoding)}
    if kind == "xlsx":
        return {"": read_spreadsheet(file, config.subset)}
    if kind == "json":
        return read_json(file, config.encoding)
    from datasets import Dataset

    whole = Dataset.from_parquet(str(file), keep_in_memory=True) if kind == "parquet" else Dataset.from_file(str(file))
    return {"": FileRows(whole[:], False)}


def _values(rows: FileRows, name: str) -> Sequence[Any]:
    return rows.columns.get(name, [None] * len(rows))


def as_dataset(columns: Mapping[str, Sequence[Any]], as_text: bool) -> tuple[Any, dict[str, str]]:
    """Columns as a ``datasets.Dataset``, and those that cannot be in one, since they hold values of several types."""
    import pyarrow as pa
    from datasets import Dataset, Features, Value

    if as_text:
        features = Features({name: Value("large_string") for name in columns})
        return Dataset.from_dict(dict(columns), features=features), {}
    kept, mixed = {}, {}
    for name, values in columns.items():
        try:
            pa.array(list(values))
            kept[name] = list(values)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            kinds: dict[str, object] = {}
            for value in values:
                kinds.setdefault(type(value).__name__, value)
            mixed[name] = " and ".join(f"{kind} ({kinds[kind]!r})" for kind in kinds if kind != "NoneType")
    if mixed and not kept:
        kept["row"] = list(range(len(next(iter(columns.values())))))
    return Dataset.from_dict(kept), mixed


def _split_of(file: Path, place: Path) -> str:
    """The split that a file belongs to by its name or its folder's."""
    if not place.is_dir():
        return "train"  # as datasets calls what is not split
    words = [word for part in reversed(file.relative_to(place).parts) for word in re.split(r"[^a-z]+", part.lower())]
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")


def _digest(files: Sequence[Path], folder: Path) -> str:
    """Of the content of files and their names in the folder; read anew each time, since sizes and times lie."""

    def of(path: Path) -> bytes:
        with path.open("rb") as file:
            name = path.relative_to(folder) if len(files) > 1 else ""  # it may be a class, or say the order
            return f"{name}\n".encode("utf-8", "surrogateescape") + hashlib.file_digest(file, "sha256").digest()

    there = [f for f in files if f.exists()]  # not a link to nothing: its name counts all the same
    digest = hashlib.sha256(json.dumps([str(f) for f in files if not f.exists()]).encode())
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for part in pool.map(of, there, chunksize=1):
            digest.update(part)
    return digest.hexdigest()


# -- folders of images ------------------------------------------------------------------------------------------------


def _images(
    folder: Path, files: Sequence[Path], pictures: Sequence[Path], tables: Sequence[Path], config: DataConfig
) -> Read:
    """Pictures by class folders, or by tables of metadata that lie in their folders."""
    from datasets import Dataset, Features, Image, Value

    read = Read({}, len(pictures) + len(tables))
    described = [(table, rows) for table in tables for rows in _rows_of(table, config).values()]
    for table, rows in described:
        read.notes += rows.notes
        read.left_out.add(f"blank rows of {table.name}", rows.blank_rows)
    columns = list(dict.fromkeys(name for _, rows in described for name in rows.columns))
    wanted = {config.label_column.lower()} if config.label_column else set(LABEL_NAMES)
    by_table = any(name.lower() in wanted for name in columns)
    found = (
        ImageFiles(tuple(pictures), tuple(_split_of(p, folder) for p in pictures), (None,) * len(pictures), "", ())
        if by_table
        else read_image_folder(folder, pictures, config.class_folder)
    )
    count_others(files, [*pictures, *tables], read.left_out)
    read.class_rule, read.notes = found.why, [*read.notes, *found.notes]
    for ending, times in sorted(Counter(p.suffix.lower() for p in pictures).items()):
        if ending not in readable_endings():
            end = f"{times:,} pictures end" if times > 1 else "1 picture ends"
            read.notes.append(f"{end} in {ending or 'nothing'}: read by what they hold, if it can be")
    rows_by_split: dict[str, list[dict[str, Any]]] = {}
    place = {os.path.abspath(path): i for i, path in enumerate(pictures)}
    named: set[int] = set()
    for table, rows in described:
        key = next((n for wanted_name in FILE_NAMES for n in rows.columns if n.lower() == wanted_name), None)
        if key is None:
            raise ValueError(f"{table} must have a column file_name, got {shown(list(rows.columns))}")
        for row in range(len(rows)):
            path = os.path.abspath(table.parent / str(rows.columns[key][row]))
            number = place.get(path)
            named |= set() if number is None else {number}
            values = {name: _values(rows, name)[row] for name in columns if name != key}
            split = found.splits[number] if number is not None else _split_of(table, folder)
            rows_by_split.setdefault(split, []).append({"image": _at(path), **values, **_class(found, number)})
    for number, picture in enumerate(found.paths):
        if number not in named:
            rows_by_split.setdefault(found.splits[number], []).append({"image": _at(picture), **_class(found, number)})
    if described and len(named) < len(pictures):
        read.notes.append(f"{len(pictures) - len(named):,} of {len(pictures):,} pictures are in no table of metadata")
    ordered = [n for n in SPLITS if n in rows_by_split]
    whole = [row for n in ordered for row in rows_by_split[n]]
    names = [n for n in dict.fromkeys(n for row in whole for n in row) if n != "image"]
    typed, read.mixed = as_dataset({n: [row.get(n) for row in whole] for n in names}, False) if names else (None, {})
    features = Features({"image": Image(), **(typed.features if typed else {})})
    data = {"image": [row["image"] for row in whole], **({n: typed[:][n] for n in typed.features} if typed else {})}
    data = {n: v for n, v in data.items() if any(x is not None for x in v)}
    features = Features({n: features[n] if features[n] != Value("null") else Value("string") for n in data})
    joined = Dataset.from_dict(data, features=features)
    ends = np.cumsum([0, *(len(rows_by_split[n]) for n in ordered)]).tolist()
    read.splits = {n: joined.select(range(a, b)) for n, a, b in zip(ordered, ends[:-1], ends[1:], strict=True)}
    return read


def _at(path: Path | str) -> dict[str, Any]:
    return {"path": os.path.abspath(path), "bytes": None}


def _class(found: ImageFiles, number: int | None) -> dict[str, str | None]:
    return {"label": found.classes[number]} if number is not None and any(found.classes) else {}


def first_line(error: BaseException) -> str:
    """What went wrong in the end: datasets wraps it in sentences that say nothing."""
    while error.__cause__ is not None and type(error).__name__.startswith("DatasetGeneration"):
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
