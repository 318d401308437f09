"""Files and folders -> rows by split: typed tables, tables as text, folders of images with or without metadata."""

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fleetfit.config.sections import DataConfig
from fleetfit.data.file_rows import FileRows, shown
from fleetfit.data.image_folder import (
    METADATA,
    SPLIT_WORDS,
    count_others,
    files_below,
    is_picture,
    without_sidecars,
)
from fleetfit.data.image_tables import read_images
from fleetfit.data.row_files import READERS, SPLITS, Read, as_dataset, named_split, rows_of, split_of, values_of

SAVE_AS = {
    ".xls": "save it as .xlsx or as CSV (UTF-8)",
    ".ods": "save it as .xlsx or as CSV (UTF-8)",
    ".numbers": "export it as CSV (UTF-8)",
    ".gz": "unpack it first",
    ".zip": "unpack it first",
    ".txt": "if it is a table, call it .csv or .tsv",
    ".tab": "call it .tsv",
}
SHOWN = 5
HASHING_THREADS = 4


def read_files(
    places: list[Path], config: DataConfig, cache: Path, said: str, known: Sequence[str] = ()
) -> tuple[Read, str, Path]:
    """Rows of some files, or of a folder; a digest of their content; and what paths in the rows start from.

    Args:
        places: The files, or one folder.
        config: The job's data.
        cache: Where tables of typed files are kept, memory-mapped, by their content.
        said: What the job calls it, for messages.
        known: Names of the classes, if they are.

    Raises:
        ValueError: nothing there, or what cannot be read or is not clear; names the file.
        ImportError: a spreadsheet, and no reader for it is installed.
        OSError: a file cannot be read.
    """
    place, subset = places[0], config.subset
    if place.is_dir() and subset and (place / subset).is_dir():
        place, subset = place / subset, ""
        config = config.model_copy(update={"subset": ""})
    folder = place
    if not place.is_dir():
        folder = place.parent if len(places) == 1 else Path(os.path.commonpath([p.parent for p in places]))
    files = files_below(place) if place.is_dir() else [p for p in places if p.is_file()]
    if not files:
        raise ValueError(f"{said}: {place} is empty")
    digest = _digest(files, folder)
    try:
        read = _read(place, files, folder, config, str(cache / "tables" / digest[:16]), known)
    except (OSError, ImportError):
        raise
    except Exception as error:  # of datasets, of pyarrow, of our readers
        raise ValueError(f"{said}: {_naming(error, place)}") from error
    return read, f"{digest} {subset}", folder


def _naming(error: Exception, place: Path) -> str:
    """What is wrong, with the file or folder that it is about."""
    told = first_line(error)
    return told if str(place) in told or told.startswith("data.") else f"{place} cannot be read: {told}"


def _read(
    place: Path, files: Sequence[Path], folder: Path, config: DataConfig, tables: str, known: Sequence[str]
) -> Read:
    """Rows of a folder that ``save_to_disk`` wrote, of a copy of a hub repository, or of plain files."""
    from datasets import DatasetDict, load_from_disk

    if any((place / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        saved = load_from_disk(str(place))
        return Read(saved if isinstance(saved, DatasetDict) else {"all": saved}, len(files))
    page = place / "README.md"
    if page.exists() and page.read_text(encoding="utf-8", errors="replace").startswith("---"):
        return _described(place, config, tables, known)
    pictures = [f for f in files if is_picture(f)]
    rest = without_sidecars(files, pictures) if place.is_dir() else list(files)
    described = {f for f in rest if f.name.lower() in METADATA}
    kinds = Counter(READERS[f.suffix.lower()] for f in rest if f.suffix.lower() in READERS and f not in described)
    used = [f for f in rest if f.suffix.lower() in READERS]
    if pictures and (len(pictures) >= sum(kinds.values()) if place.is_dir() else len(pictures) == len(files)):
        return read_images(folder, files, pictures, [f for f in used if f in described], config, known)
    if not place.is_dir() and (len(kinds) != 1 or kinds.total() != len(files)):
        kinds = Counter()
    if not kinds:
        raise ValueError(_no_kind(files))
    ((kind, number),) = kinds.most_common(1)
    others = [f for f in used if READERS[f.suffix.lower()] != kind and f not in described]
    if list(kinds.values()).count(number) > 1 or any(named_split(f, place) for f in others):
        listed = shown([f.name for f in used])
        raise ValueError(
            f"{place} has tables of several kinds: {listed}; say which are meant with a pattern in data.source, as "
            f"{place / '*'}{used[0].suffix}"
        )
    used = [f for f in used if READERS[f.suffix.lower()] == kind]
    read = (
        _typed(used, place, kind, tables, config)
        if kind in ("parquet", "arrow")
        else _untyped(used, place, kind, config)
    )
    count_others(files, used, read.left_out)
    return read


def _no_kind(files: Sequence[Path]) -> str:
    names = ", ".join(sorted({file.suffix or file.name for file in files})[:SHOWN])
    hint = next((f"; {SAVE_AS[f.suffix.lower()]}" for f in files if f.suffix.lower() in SAVE_AS), "")
    return f"files must be images, or of one kind of {', '.join(READERS)}, got {names}{hint}"


def _described(place: Path, config: DataConfig, tables: str, known: Sequence[str]) -> Read:
    """A copy of a hub repository, by its own description: which files are of which split, and of which types.

    Files of which it says no more are read as all others are.
    """
    from datasets import load_dataset_builder

    def make(folder: str) -> Any:
        return load_dataset_builder(str(place), config.subset or None, cache_dir=folder)

    builder = make(tables)
    split_by_file = {Path(f): str(split) for split, there in (builder.config.data_files or {}).items() for f in there}
    files = list(split_by_file)
    if not (builder.config.features or builder.info.features):
        kind = type(builder.config).__name__
        if kind == "ImageFolderConfig":
            tables_of = [f for f in files if f.name.lower() in METADATA]
            return read_images(place, files, [f for f in files if is_picture(f)], tables_of, config, known)
        if kind == "JsonConfig" and builder.config.field is None:
            return _untyped(files, place, "json", config, split_by_file)
        if kind == "CsvConfig" and not (builder.config.names or builder.config.skiprows):
            separator = builder.config.sep if builder.config.sep != "," else config.separator
            return _untyped(files, place, "csv", config.model_copy(update={"separator": separator}), split_by_file)
        if kind == "ParquetConfig":
            _check_typed(files, "parquet")
    builder = as_written(builder, lambda: make(f"{tables}-as-written"))
    builder.download_and_prepare()
    return Read(builder.as_dataset(), len(files), as_text=is_plain_csv(builder))


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


def _typed(files: Sequence[Path], place: Path, kind: str, tables: str, config: DataConfig) -> Read:
    """Files whose columns have types, memory-mapped."""
    import pyarrow.parquet as pq
    from datasets import load_dataset

    # Splits are ours, not those that datasets finds: it takes /home/test/data/train.csv for a test split.
    by_split: dict[str, list[str]] = {}
    if kind == "parquet":  # datasets cannot read a file without rows
        files = [file for file in files if pq.read_metadata(file).num_rows]
        if not files:
            raise ValueError(f"{place} has no rows")
    for file in files:
        by_split.setdefault(split_of(file, place), []).append(glob.escape(str(file)))
    ordered = {name: by_split[name] for name in _chosen(by_split, config)}
    _check_typed([file for file in files if split_of(file, place) in ordered], kind)
    return Read(load_dataset(kind, data_files=ordered, cache_dir=tables), len(files))


def _check_typed(files: Sequence[Path], kind: str) -> None:
    import pyarrow.parquet as pq
    from datasets import Dataset, Features

    if kind == "parquet":
        check_alike((f.name, Features.from_arrow_schema(pq.read_schema(f))) for f in files)
    else:
        check_alike((f.name, Dataset.from_file(str(f)).features) for f in files)


def _untyped(
    files: Sequence[Path], place: Path, kind: str, config: DataConfig, split_by_file: Mapping[Path, str] | None = None
) -> Read:
    """Files of text, read as it is written."""
    parts: dict[str, list[tuple[Path, FileRows]]] = {}
    for file in files:
        split = split_by_file[file] if split_by_file else split_of(file, place)
        for name, rows in rows_of(file, config).items():
            named = SPLIT_WORDS.get(name.lower(), name) if name else split
            parts.setdefault(named, []).append((file, rows))
    read = Read({}, len(files), as_text=kind != "json")
    ordered = _chosen(parts, config)
    columns = list(parts[ordered[0]][0][1].columns)
    for name in ordered:
        for file, rows in parts[name]:
            if kind != "json" and set(rows.columns) != set(columns):
                raise ValueError(f"{file} has the columns {shown(list(rows.columns))}, another file {shown(columns)}")
            columns += [c for c in rows.columns if c not in columns]
            read.left_out.add("blank rows", rows.blank_rows)
            read.notes += [note for note in rows.notes if note not in read.notes]
    joined = {name: [v for n in ordered for _, rows in parts[n] for v in values_of(rows, name)] for name in columns}
    whole, read.mixed = as_dataset(joined, read.as_text)
    ends = np.cumsum([0, *(sum(len(rows) for _, rows in parts[n]) for n in ordered)]).tolist()
    read.splits = {
        n: whole.select(range(first, last)) for n, first, last in zip(ordered, ends[:-1], ends[1:], strict=True)
    }
    return read


def _chosen(splits: Collection[str], config: DataConfig) -> list[str]:
    """Names of splits in order; only those that the job wants, if all of them are there."""
    ordered: list[str] = [n for n in SPLITS if n in splits]
    ordered += [n for n in splits if n not in ordered]
    return (
        [n for n in ordered if n in config.splits] if set(config.splits) <= set(ordered) and config.splits else ordered
    )


def check_alike(parts: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """See that parts of a table, to be joined, have the same columns of the same types; else they would be converted.

    Args:
        parts: The name of each, and the features of its columns.

    Raises:
        ValueError: one holds other things than another; names the column and both.
    """
    before: dict[str, tuple[str, str]] = {}
    for part, features in parts:
        for column, feature in features.items():
            kind = _kind(feature)
            first, there = before.setdefault(column, (part, kind))
            if kind == "null" or there == "null":
                before[column] = (part, kind) if there == "null" else (first, there)
            elif kind != there:
                raise ValueError(f"the column {column!r} holds {there} in {first}, but {kind} in {part}")


def _kind(feature: Any) -> str:
    from datasets import ClassLabel, Value

    if isinstance(feature, ClassLabel):
        return f"the classes {', '.join(feature.names)}"
    if not isinstance(feature, Value):
        return type(feature).__name__
    if feature.dtype.startswith(("int", "uint", "float")):
        return "numbers"
    return "texts" if "string" in feature.dtype else str(feature.dtype)


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


def first_line(error: BaseException) -> str:
    """What went wrong in the end: datasets wraps it in sentences that say nothing."""
    while error.__cause__ is not None and type(error).__name__.startswith("DatasetGeneration"):
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
