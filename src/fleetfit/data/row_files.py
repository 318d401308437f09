"""One file of rows, of any kind -> its rows by split; rows -> a table; what was read of a source, on the way."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleetfit.config.sections import DataConfig
from fleetfit.data.delimited import read_delimited
from fleetfit.data.file_rows import FileRows, LeftOut
from fleetfit.data.image_folder import SPLIT_WORDS
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
    ".xlsm": "xlsx",
    ".arrow": "arrow",
}
LABEL_NAMES = ("label", "labels", "fine_label", "class", "intent", "category", "target", "y")
SPLITS = ("train", "validation", "test")


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
    digested: frozenset[str] = frozenset()  # absolute paths of files in the rows whose content is in the digest


def rows_of(file: Path, config: DataConfig) -> Mapping[str, FileRows]:
    """Rows of one file by split; the one reader of plain files, of whomever they are."""
    kind = READERS[file.suffix.lower()]
    if kind == "csv":
        return {"": read_delimited(file, config.separator, config.encoding)}
    if kind == "xlsx":
        return {"": read_spreadsheet(file, config.subset)}
    if kind == "json":
        return read_json(file, config.encoding, config.subset)
    import pyarrow.parquet as pq
    from datasets import Dataset

    # Dataset.from_parquet would answer from a cache that knows files by their time.
    whole = Dataset(pq.read_table(file)) if kind == "parquet" else Dataset.from_file(str(file))
    return {"": FileRows(whole[:], False)}


def values_of(rows: FileRows, name: str) -> Sequence[Any]:
    """A column of a file; all missing where it has none of that name."""
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
            if {int, float} <= {type(v) for v in values if v == v}:  # 1 and 1.0, which would become one
                raise TypeError
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


def split_of(file: Path, place: Path) -> str:
    """The split that a file belongs to by its name or its folder's; else train, as datasets calls what is not split."""
    return named_split(file, place) or "train"


def named_split(file: Path, place: Path) -> str:
    """The split that a file's name or its folder's says; empty: none."""
    if not place.is_dir():
        return ""
    words = [word for part in reversed(file.relative_to(place).parts) for word in re.split(r"[^a-z]+", part.lower())]
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")
