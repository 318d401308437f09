"""Which column holds inputs and which labels. What is not clear is asked for; what was taken is told, and why.

The rule. Labels: the column that the job names; else one called "label"; else the only one with a name as labels have
it (``LABEL_NAMES``), of which one that lists its classes comes first; else the only one of a type that lists its
classes. Inputs: the column that the job names; else the only one of the right type; else one called "image" or
"text"; else the only one with a name as inputs have it (``INPUT_NAMES``). Names are compared without regard to case.
Two that are equally likely are an error.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.config.sections import DataConfig
from fleetfit.data.row_files import LABEL_NAMES
from fleetfit.data.tables import GIVEN, Table

Kind = Literal["image", "text"]

INPUT_NAMES: dict[Kind, tuple[str, ...]] = {
    "image": ("image", "img", "images", "pixels", "pixel_values", "picture", "photo", "file_name", "path"),
    "text": ("text", "sentence", "utterance", "query", "question", "content", "review"),
}
NUMBER = re.compile(r"\s*[-+]?(\d+[.,]?\d*|[.,]\d+)([eE][-+]?\d+)?\s*")
INDEX = "__index_level_0__"  # pandas' row numbers in Parquet
LOOKED_AT = 1000  # values of a column of text, to tell numbers from texts


@dataclass(frozen=True)
class Column:
    """A column that was taken, and why, for a person."""

    name: str
    why: str


def find_columns(table: Table, config: DataConfig, kind: Kind) -> tuple[Column, Column]:
    """The columns of inputs and of labels, by the rule above.

    Raises:
        ValueError: columns that are not there, none that would do, or several; tells all that is to be said at once,
            and all columns.
    """
    found, label, problems, listed = _found(table, config, kind)
    if problems or label is None or found is None:
        raise ValueError(f"{'; '.join(problems)}. The data has {listed}")
    return found, label


def find_input(table: Table, config: DataConfig, kind: Kind) -> Column:
    """The column of inputs, whether there are labels or not.

    Raises:
        ValueError: as ``find_columns``, of the inputs alone.
    """
    found, _, problems, listed = _found(table, config, kind)
    if found is None:
        raise ValueError(f"{problems[-1]}. The data has {listed}")
    return found


def _found(table: Table, config: DataConfig, kind: Kind) -> tuple[Column | None, Column | None, list[str], str]:
    """The columns of inputs and of labels, what is wrong (of the inputs last), and all columns in words."""
    there = {name: _type(table, name) for name in table.rows.features if name != INDEX}
    there |= dict.fromkeys(table.given, "any") | {name: f"mixed: {kinds}" for name, kinds in table.mixed.items()}
    listed = ", ".join(f"{name} ({found})" for name, found in there.items())
    config = _as_written(config, there)
    for key in ("input_column", "label_column", "user_column"):
        name = getattr(config, key)
        if name and name not in there:
            raise ValueError(f"data.{key} = {name!r} is no column of the data; there are {listed}")
        if name in table.mixed:
            raise ValueError(f"data.{key} = {name!r} holds values of several types: {table.mixed[name]}")
    problems: list[str] = []
    label = _label(table, config, there, problems)
    found = _input(table, config, kind, there, label, problems)
    return found, label, problems, listed


def _as_written(config: DataConfig, there: Mapping[str, str]) -> DataConfig:
    """The job's names of columns as the data write them, where only case is different."""
    names = {}
    for key in ("input_column", "label_column"):
        name = getattr(config, key)
        same = [n for n in there if n.lower() == name.lower()]
        names[key] = same[0] if name not in there and len(same) == 1 else name
    return config.model_copy(update=names)


def _label(table: Table, config: DataConfig, there: Mapping[str, str], problems: list[str]) -> Column | None:
    if config.label_column:
        return Column(config.label_column, "data.label_column")
    others = {n: t for n, t in there.items() if n not in (config.input_column, config.user_column, *table.given)}
    usable = {n: t for n, t in others.items() if t in ("class label", "text", "number")}
    called = [n for n in others if n.lower() == "label" and (n in usable or n in table.mixed)]
    named = [n for n in usable if n.lower() in LABEL_NAMES]
    typed = [n for n, t in usable.items() if t == "class label"]
    if len(called) == 1:
        if called[0] in table.mixed:
            problems.append(f"the column {called[0]!r} holds values of several types: {table.mixed[called[0]]}")
            return None
        return Column(called[0], table.class_rule or "its name")
    for candidates, why in ((called, ""), (_best(named, typed), "its name"), (typed, "its type")):
        if len(candidates) == 1:
            return Column(candidates[0], why)
        if candidates:
            problems.append(_several("label", "labels", candidates))
            return None
    problems.append("data.label_column must be given: no column holds labels")
    if table.class_rule:
        problems[-1] += f" (pictures: {table.class_rule})"
    return None


def _best(named: Sequence[str], typed: Sequence[str]) -> list[str]:
    """Columns with a name of labels; those among them whose type lists classes, if there are any."""
    return [n for n in named if n in typed] or list(named)


def _input(
    table: Table, config: DataConfig, kind: Kind, there: Mapping[str, str], label: Column | None, problems: list[str]
) -> Column | None:
    if config.input_column:
        return Column(config.input_column, "data.input_column")
    if table.given:
        return Column(GIVEN, "what the function gave")
    taken = (label.name if label else "", config.user_column)
    others = {name: found for name, found in there.items() if name not in taken}
    right = [name for name, found in others.items() if found == kind]
    names = INPUT_NAMES[kind]
    if not right and kind == "image":  # paths, or arrays
        right = [name for name, found in others.items() if name.lower() in names and not found.startswith("mixed")]
    if label is None:  # it may be one of these
        right = [n for n in right if n.lower() not in LABEL_NAMES]
    called = [name for name in right if name.lower() == kind]
    named = [name for name in right if name.lower() in names]
    if len(right) == 1:
        return Column(right[0], "its name" if named else f"the only column of {kind}s")
    for candidates in (called, named, right):
        if len(candidates) == 1:
            return Column(candidates[0], "its name")
        if candidates:
            problems.append(_several("input", f"{kind}s", candidates))
            return None
    numbers = [n for n, t in others.items() if t == "number" and n.lower() in names]
    hint = f"; {numbers[0]} is all numbers: naming it says that they are texts" if numbers and kind == "text" else ""
    problems.append(f"data.input_column must be given: no column holds {kind}s; the model reads {kind}s{hint}")
    return None


def _several(role: str, what: str, candidates: Sequence[str]) -> str:
    return f"data.{role}_column must be given: several columns may hold {what}: {', '.join(candidates)}"


def _type(table: Table, name: str) -> str:
    """A column's type in words: 'image', 'class label', 'text', 'number', or 'other'."""
    from datasets import ClassLabel, Image, Value

    feature = table.rows.features[name]
    if isinstance(feature, Image):
        return "image"
    if isinstance(feature, ClassLabel):
        return "class label"
    if isinstance(feature, Value):
        if feature.dtype in ("string", "large_string"):
            return "number" if table.as_text and _are_numbers(table, name) else "text"
        if feature.dtype.startswith(("int", "uint", "float", "bool", "decimal")):
            return "number"
    return "other"


def _are_numbers(table: Table, name: str) -> bool:
    """Whether a column of a file without types looks as if it had one; nothing is read by it."""
    some = table.rows.select_columns([name])[:LOOKED_AT][name]
    filled = [value for value in some if value and value.strip()]
    return bool(filled) and all(NUMBER.fullmatch(value) for value in filled)


def read_users(table: Table, column: str) -> Int[Tensor, " sample"]:
    """Whose each sample is, as numbers.

    Raises:
        ValueError: it is not said of every sample.
    """
    values = table.column(column)
    missing = sum(v is None or v != v or (isinstance(v, str) and not v.strip()) for v in values)
    if missing:
        raise ValueError(f"data.user_column = {column!r}: {missing:,} of {len(values):,} values are missing")
    number = {user: i for i, user in enumerate(sorted(set(values), key=lambda user: (str(type(user)), user)))}
    return torch.tensor([number[v] for v in values], dtype=torch.long)


def draw_by_class(labels: Int[Tensor, " sample"], limit: int, generator: torch.Generator) -> Int[Tensor, " row"]:
    """So many rows, in their order; of each class its share."""
    order = torch.randperm(len(labels), generator=generator)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in set(labels.tolist()):
        rows = order[labels[order] == label]
        place[rows] = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
    return order[place[order].argsort(stable=True)[:limit]].sort().values


def as_texts(values: Sequence[Any]) -> list[Any]:
    """Values of a column that the job says holds texts: whole numbers as they are written, all others as they are."""
    return [str(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in values]
