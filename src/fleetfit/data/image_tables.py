"""Folders of images, with their classes by folders or by tables of metadata that lie in them -> rows by split."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fleetfit.config.sections import DataConfig
from fleetfit.data.file_rows import FileRows, shown
from fleetfit.data.image_folder import SESSION, ImageFiles, count_others, read_image_folder, readable_endings
from fleetfit.data.label_text import tidy
from fleetfit.data.named_files import locate
from fleetfit.data.row_files import LABEL_NAMES, READERS, SPLITS, Read, as_dataset, rows_of, split_of, values_of

Row = dict[str, Any]
Described = tuple[Path, FileRows]

LABEL = "label"

FILE_NAMES = ("file_name", "filename", "file", "image", "path")  # columns of a metadata table that name the picture


def read_images(
    folder: Path,
    files: Sequence[Path],
    pictures: Sequence[Path],
    tables: Sequence[Path],
    config: DataConfig,
    known: Sequence[str] = (),
) -> Read:
    """Pictures by class folders, or by tables of metadata that lie in their folders.

    Args:
        folder: The source.
        files: All that is in it.
        pictures: Those of them that are pictures.
        tables: Those of them that are tables of metadata.
        config: The job's data.
        known: Names of the classes, if they are.

    Raises:
        ValueError: a table that does not name pictures, or names one twice; classes that are not clear.
    """
    read = Read({}, len(pictures) + len(tables))
    described = [(table, rows) for table in tables for rows in rows_of(table, config).values()]
    for table, rows in described:
        read.notes += rows.notes
        read.left_out.add(f"blank rows of {table.name}", rows.blank_rows)
    count_others(files, [*pictures, *tables], read.left_out)
    found = _classes(folder, pictures, described, config, known)
    _check_splits(found, config.splits, folder)
    read.class_rule, read.notes = found.why, [*read.notes, *found.notes]
    rest = [f for f in files if f.suffix.lower() in READERS and f not in set(tables)]
    if rest and not any(found.classes):
        read.class_rule = (read.class_rule and f"{read.class_rule}; ") + f"{rest[0].name} is not called metadata.csv"
    for ending, times in sorted(Counter(p.suffix.lower() for p in pictures).items()):
        if ending not in readable_endings():
            end = f"{times:,} pictures end" if times > 1 else "1 picture ends"
            read.notes.append(f"{end} in {ending or 'nothing'}: read by what they hold, if it can be")
    by_split = _rows(folder, described, found, read)
    ordered = [n for n in SPLITS if n in by_split]
    joined = _dataset([row for n in ordered for row in by_split[n]], read)
    ends = np.cumsum([0, *(len(by_split[n]) for n in ordered)]).tolist()
    read.splits = {n: joined.select(range(a, b)) for n, a, b in zip(ordered, ends[:-1], ends[1:], strict=True)}
    read.digested = frozenset(map(os.path.abspath, pictures))
    return read


def _classes(
    folder: Path, pictures: Sequence[Path], described: Sequence[Described], config: DataConfig, known: Sequence[str]
) -> ImageFiles:
    """Classes by the folders, but where metadata have a column of labels.

    Raises:
        ValueError: the folders are not clear; or they may be the classes, and so may a column not called label.
    """
    named = {name.lower(): name for _, rows in described for name in rows.columns}
    wanted = [config.label_column.lower()] if config.label_column else LABEL_NAMES
    column = next((named[name] for name in wanted if name in named), "")
    if not column:
        return read_image_folder(folder, pictures, config.class_folder, known)
    none = ImageFiles(tuple(pictures), tuple(split_of(p, folder) for p in pictures), (None,) * len(pictures), "", ())
    if config.label_column or column.lower() == LABEL:
        return none
    try:
        found = read_image_folder(folder, pictures, config.class_folder, known)
    except ValueError:  # unclear as classes, and so no rival
        return none
    folders = sorted({c for c in found.classes if c is not None})
    if folders and not all(map(SESSION.fullmatch, folders)):
        raise ValueError(
            f"{folder}: classes may be the folders {shown(folders)}, or {column!r} in the table of metadata; say which "
            f"with data.label_column = 'label' (the folders) or {column!r}"
        )
    return none


def _check_splits(found: ImageFiles, wanted: Sequence[str], folder: Path) -> None:
    """Raises where what is held out has no class of the training pictures: its folders mean something else."""
    there: dict[str, set[str]] = {}
    for split, name in zip(found.splits, found.classes, strict=True):
        if name is not None and (not wanted or split in wanted):
            there.setdefault(split, set()).add(name)
    train = there.pop("train", set())
    for split, names in there.items():
        if train and not {*map(tidy, names)} & {*map(tidy, train)}:
            raise ValueError(
                f"{folder}: {split} has the folders {shown(sorted(names))}, and train others, {shown(sorted(train))}: "
                f"are they classes? If not, leave {split} out with data.splits"
            )


def _rows(folder: Path, described: Sequence[Described], found: ImageFiles, read: Read) -> dict[str, list[Row]]:
    """Rows by split: what tables say of pictures, then the pictures that they do not name.

    Raises:
        ValueError: a table has no column that names pictures; none of them is there; one is there twice.
    """
    result: dict[str, list[Row]] = {}
    place = {os.path.abspath(path): i for i, path in enumerate(found.paths)}
    columns = list(dict.fromkeys(name for _, rows in described for name in rows.columns))
    said: dict[str, Row] = {}
    for table, rows in described:
        key = next((n for name in FILE_NAMES for n in rows.columns if n.lower() == name), None)
        if key is None:
            raise ValueError(f"{table} must have a column file_name, got {shown(list(rows.columns))}")
        paths = [os.path.abspath(locate(table.parent, str(name))) for name in rows.columns[key]]
        if paths and not any(map(os.path.exists, paths)):
            raise ValueError(f"{table}: no picture is where its column {key!r} says, the first {paths[0]}")
        for row, path in enumerate(paths):
            values = {name: values_of(rows, name)[row] for name in columns if name != key}
            if path in said:
                if said[path] != values:
                    raise ValueError(f"{table} says {values} of {path}, and another row {said[path]}")
                read.left_out.add(f"rows of {table.name} that say the same of a picture again", 1)
                continue
            said[path] = values
            number = place.get(path)
            split = found.splits[number] if number is not None else split_of(table, folder)
            result.setdefault(split, []).append({"image": _at(path), **values, **_class(found, number)})
    unnamed = [i for path, i in place.items() if path not in said]
    for number in unnamed:
        row_of = {"image": _at(found.paths[number]), **_class(found, number)}
        result.setdefault(found.splits[number], []).append(row_of)
    if described and unnamed:
        read.notes.append(f"{len(unnamed):,} of {len(place):,} pictures are in no table of metadata")
    return result


def _dataset(rows: Sequence[Row], read: Read) -> Any:
    from datasets import Dataset, Features, Image, Value

    names = [n for n in dict.fromkeys(n for row in rows for n in row) if n != "image"]
    typed, read.mixed = as_dataset({n: [row.get(n) for row in rows] for n in names}, False) if names else (None, {})
    features = Features({"image": Image(), **(typed.features if typed else {})})
    data = {"image": [row["image"] for row in rows], **({n: typed[:][n] for n in typed.features} if typed else {})}
    data = {n: v for n, v in data.items() if any(x is not None for x in v)}
    features = Features({n: features[n] if features[n] != Value("null") else Value("string") for n in data})
    return Dataset.from_dict(data, features=features)


def _at(path: Path | str) -> dict[str, Any]:
    return {"path": os.path.abspath(path), "bytes": None}


def _class(found: ImageFiles, number: int | None) -> dict[str, str | None]:
    return {"label": found.classes[number]} if number is not None and any(found.classes) else {}
