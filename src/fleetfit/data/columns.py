"""Which column holds inputs and which labels, and labels as numbers with names. What is not clear is asked for."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.config import DataConfig
from fleetfit.data.tables import GIVEN, Table

Kind = Literal["image", "text"]

# In the order of preference; compared without regard to case.
LABEL_NAMES = ("label", "labels", "fine_label", "class", "intent", "category", "target", "y")
INPUT_NAMES: dict[Kind, tuple[str, ...]] = {
    "image": ("image", "img", "images", "pixels", "pixel_values", "picture", "photo", "file_name", "path"),
    "text": ("text", "sentence", "utterance", "query", "question", "content", "review"),
}
SHOWN = 5


def find_columns(table: Table, config: DataConfig, kind: Kind) -> tuple[str, str]:
    """The names of the columns of inputs and of labels: those that the job gives, else found by type and name.

    Raises:
        ValueError: a column that is not there, none that would do, or several; names all columns.
    """
    there = {name: _type(feature) for name, feature in table.rows.features.items()} | dict.fromkeys(table.given, "any")
    listed = ", ".join(f"{name} ({found})" for name, found in there.items())
    for key in ("input_column", "label_column", "user_column"):
        name = getattr(config, key)
        if name and name not in there:
            raise ValueError(f"data.{key} = {name!r} is no column of the data; there are {listed}")
    users = config.user_column
    label = config.label_column
    if not label:
        others = {n: t for n, t in there.items() if n not in (config.input_column, users) and n not in table.given}
        classes = [name for name, found in others.items() if found == "class label"]
        named = [n for wanted in LABEL_NAMES for n, t in others.items() if n.lower() == wanted and t != "other"]
        candidates = classes if len(classes) == 1 else [n for n in named if not classes or n in classes][:1] or classes
        label = _only(candidates, "label", listed)
    if config.input_column or table.given:
        return config.input_column or GIVEN, label
    others = {name: found for name, found in there.items() if name not in (label, users)}
    right = [name for name, found in others.items() if found == kind]
    names = INPUT_NAMES[kind]
    if not right and kind == "image":  # paths, or arrays
        right = [name for name in others if name.lower() in names]
    named = [name for wanted in names for name in right if name.lower() == wanted]
    return _only(right if len(right) == 1 else named[:1] or right, "input", listed, kind), label


def _only(candidates: Sequence[str], role: str, listed: str, kind: str = "") -> str:
    if len(candidates) == 1:
        return candidates[0]
    what = {"label": "labels", "input": f"{kind}s"}[role]
    found = f"several columns may hold {what}: {', '.join(candidates)}" if candidates else f"no column holds {what}"
    reads = f"; the model reads {kind}s" if kind and not candidates else ""
    raise ValueError(f"data.{role}_column must be given: {found}{reads}. The data has {listed}")


def _type(feature: Any) -> str:
    """A feature in words: 'image', 'class label', 'text', 'number', or 'other'."""
    from datasets import ClassLabel, Image, Value

    if isinstance(feature, Image):
        return "image"
    if isinstance(feature, ClassLabel):
        return "class label"
    if isinstance(feature, Value):
        if feature.dtype in ("string", "large_string"):
            return "text"
        if feature.dtype.startswith(("int", "uint", "float", "bool")):
            return "number"
    return "other"


def read_labels(table: Table, column: str, config: DataConfig) -> tuple[Int[Tensor, " sample"], tuple[str, ...]]:
    """Labels as numbers of classes, and the classes' names.

    Numbers without names, and texts, are put into order.

    Raises:
        ValueError: labels are missing, are no whole numbers or texts, do not match the names, or are all the same.
    """
    from datasets import ClassLabel

    said = f"data.label_column = {column!r}"
    values = table.column(column)
    feature = table.rows.features.get(column)
    known = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
    missing = [row for row, v in enumerate(values) if v is None or v != v or v == "" or (known and v == -1)]
    if missing:
        raise ValueError(
            f"{said}: {len(missing):,} of {len(values):,} labels are missing, the first in row {missing[0]}; if a "
            "split has none, leave it out with data.splits"
        )
    values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    odd = next((v for v in values if not isinstance(v, (bool, int, str))), None)
    if odd is not None or len({isinstance(v, str) for v in values}) > 1:
        example = odd if odd is not None else next(v for v in values if isinstance(v, str))
        raise ValueError(f"{said} must hold whole numbers or texts, got {example!r} among them")
    names = config.label_names
    if known and names and len(names) != len(known):
        raise ValueError(f"data.label_names has {len(names)} names, but {said} has {len(known)} classes")
    if isinstance(values[0], str):
        names = names or tuple(sorted(set(values)))
        number = {name: i for i, name in enumerate(names)}
        if unknown := sorted(set(values) - set(number)):
            raise ValueError(f"{said} holds {_some(unknown)}, which data.label_names does not have")
        numbers = [number[v] for v in values]
    elif names or known:
        names = names or known
        wrong = sorted({v for v in values if not 0 <= v < len(names)})
        if wrong:
            raise ValueError(f"{said} must be in 0..{len(names) - 1}, for {len(names)} names, got {_some(wrong)}")
        numbers = values
    else:
        there = sorted(set(values))
        if len(there) > len(values) / 2 and len(values) > 10:
            raise ValueError(f"{said} holds {len(there):,} different numbers in {len(values):,} rows: is it the label?")
        names = tuple(str(v) for v in there)
        place = {v: i for i, v in enumerate(there)}
        numbers = [place[v] for v in values]
    if len(set(numbers)) < 2:
        raise ValueError(f"{said}: all {len(numbers):,} samples are of one class, {names[numbers[0]]!r}")
    return torch.tensor(numbers, dtype=torch.long), names


def read_users(table: Table, column: str) -> Int[Tensor, " sample"]:
    """Whose each sample is, as numbers.

    Raises:
        ValueError: it is not said of every sample.
    """
    values = table.column(column)
    missing = sum(v is None or v != v for v in values)
    if missing:
        raise ValueError(f"data.user_column = {column!r}: {missing:,} of {len(values):,} values are missing")
    number = {user: i for i, user in enumerate(sorted(set(values), key=lambda user: (str(type(user)), user)))}
    return torch.tensor([number[v] for v in values], dtype=torch.long)


def _some(values: Sequence[object]) -> str:
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(repr(v) for v in values[:SHOWN]) + more


def draw_by_class(labels: Int[Tensor, " sample"], limit: int, generator: torch.Generator) -> Int[Tensor, " row"]:
    """So many rows, in their order; of each class its share."""
    order = torch.randperm(len(labels), generator=generator)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in set(labels.tolist()):
        rows = order[labels[order] == label]
        place[rows] = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
    return order[place[order].argsort(stable=True)[:limit]].sort().values
