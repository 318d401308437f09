"""Labels as numbers of classes: read as they are written, joined where they only look alike, known or refused."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.config.sections import DataConfig
from fleetfit.data.file_rows import shown
from fleetfit.data.label_text import tidy
from fleetfit.data.tables import Table

UNKNOWN = "-1"  # so some data sets mark samples without a label; for others it is one
INTEGER = re.compile(r"-?(0|[1-9]\d*)")


@dataclass(frozen=True)
class Labels:
    """Labels of a table's rows.

    Attributes:
        numbers: Of classes; -1 where there is no label.
        names: Of all classes.
        notes: What was joined, and what looks alike, for a person.
    """

    numbers: Int[Tensor, " row"]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_missing(self) -> int:
        """Rows without a label."""
        return int((self.numbers < 0).sum())


def written(values: Sequence[Any], feature: Any, said: str) -> list[str | None]:
    """Labels as text: names where the column's type has them, numbers as they are written; None where missing.

    Raises:
        ValueError: labels that are neither whole numbers nor texts, or numbers among texts.
    """
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        return [None if v is None or v < 0 else feature.names[v] for v in values]
    filled = [v for v in values if v is not None and v == v and not (isinstance(v, str) and not v.strip())]
    whole = [int(v) if isinstance(v, float) and v.is_integer() else v for v in filled]
    odd = next((v for v in whole if not isinstance(v, (bool, int, str))), None)
    if odd is not None or len({isinstance(v, str) for v in whole}) > 1:
        example = odd if odd is not None else next(v for v in whole if isinstance(v, str))
        raise ValueError(f"{said} must hold whole numbers or texts, got {example!r} among them")
    texts = iter(whole)
    return [
        str(next(texts)) if v is not None and v == v and not (isinstance(v, str) and not v.strip()) else None
        for v in values
    ]


def read_labels(table: Table, column: str, config: DataConfig) -> Labels:
    """The labels of the cloud's table, which say what classes there are.

    Classes are in order: of their numbers if all are whole numbers, else of their names. Names that differ in white
    space or Unicode form only are one class; those that differ in case are not, but are told.

    Raises:
        ValueError: too many labels are missing, they are no whole numbers or texts, do not match the names, or are all
            the same.
    """
    from datasets import ClassLabel

    said = f"data.label_column = {column!r}"
    feature = table.rows.features.get(column)
    texts = written(table.column(column), feature, said)
    missing = [row for row, text in enumerate(texts) if text is None]
    if len(missing) > config.missing_label_share * len(texts):
        raise ValueError(
            f"{said}: {len(missing):,} of {len(texts):,} labels are missing, the first in row {missing[0]}, and "
            f"data.missing_label_share = {config.missing_label_share:g} of all is the most; if a split has none, leave "
            "it out with data.splits"
        )
    known = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
    if known and config.label_names and len(config.label_names) != len(known):
        raise ValueError(f"data.label_names has {len(config.label_names)} names, but {said} has {len(known)} classes")
    if known and config.label_names:  # other names for the same classes
        renamed = dict(zip(known, config.label_names, strict=True))
        texts, known = [None if t is None else renamed[t] for t in texts], config.label_names
    tidied = [None if t is None else tidy(t) for t in texts]
    notes = _joined(texts, tidied)
    there = {t for t in tidied if t is not None}
    if known:
        names = tuple(dict.fromkeys(map(tidy, known)))
    elif config.label_names:
        names = tuple(map(tidy, config.label_names))
        _check_numbers(there, names, said)
        if not there <= set(names):
            return _numbered(tidied, names, said, notes)
    else:
        names = _in_order(there)
        filled = len(tidied) - len(missing)
        if len(names) > filled / 2 and filled > 10:
            what = "numbers" if all(map(INTEGER.fullmatch, names)) else "texts"
            raise ValueError(f"{said} holds {len(names):,} different {what} in {filled:,} rows: is it the label?")
    number = {name: i for i, name in enumerate(names)}
    if not known and UNKNOWN in there:
        notes = (*notes, f"{UNKNOWN} is a class like others ({tidied.count(UNKNOWN):,} samples), not a missing label")
    return _checked([-1 if t is None else number[t] for t in tidied], names, said, (*notes, *_alike(names)))


def read_known_labels(table: Table, column: str, names: tuple[str, ...], config: DataConfig) -> Labels:
    """The labels of an owner's table as numbers of the fleet's classes.

    Numbers stand for classes only where the classes are called by these numbers, or where the job's
    ``data.label_names`` names the numbers 0, 1, ...: an owner's numbers may be in another order.

    Raises:
        ValueError: too many labels are missing, or labels that the fleet does not know.
    """
    from datasets import ClassLabel

    said = f"data.source = {table.origin}: the labels in column {column!r}"
    feature = table.rows.features.get(column)
    texts = written(table.column(column), feature, said)
    missing = sum(t is None for t in texts)
    if missing > config.missing_label_share * len(texts):
        raise ValueError(
            f"{said}: {missing:,} of {len(texts):,} are missing, and data.missing_label_share = "
            f"{config.missing_label_share:g} of all is the most"
        )
    tidied = [None if t is None else tidy(t) for t in texts]
    known = {tidy(name): i for i, name in enumerate(names)}
    there = {t for t in tidied if t is not None}
    if config.label_names and not isinstance(feature, ClassLabel):
        _check_numbers(there, tuple(map(tidy, config.label_names)), said)
    if there - set(known) and config.label_names and all(map(INTEGER.fullmatch, there)):
        known = {str(i): known[tidy(name)] for i, name in enumerate(config.label_names) if tidy(name) in known}
    unknown = sorted(there - set(known))
    if unknown:
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        hint = ""
        if all(map(INTEGER.fullmatch, there)) and not all(map(INTEGER.fullmatch, known)):
            hint = (
                "; numbers may be in another order: write the names, or name the numbers in the job's data.label_names"
            )
        else:
            folded = {name.casefold(): name for name in known}
            near = [f"{u!r} for {folded[u.casefold()]!r}" for u in unknown if u.casefold() in folded]
            hint = f"; case matters: {', '.join(near[:5])}" if near else ""
        raise ValueError(
            f"{said} have {shown(unknown)}, which the job does not know; its {len(names)} are {listed}{hint}"
        )
    numbers = [-1 if t is None else known[t] for t in tidied]
    return Labels(torch.tensor(numbers, dtype=torch.long), names, _joined(texts, tidied))


def _check_numbers(there: set[str], names: tuple[str, ...], said: str) -> None:
    """Raises where labels could be names that the job has, or else the numbers of other ones."""
    if there <= set(names) and all(INTEGER.fullmatch(t) and 0 <= int(t) < len(names) for t in there):
        wrong = sorted(t for t in there if names[int(t)] != t)
        if wrong:
            raise ValueError(
                f"{said} holds {shown(wrong)}, which may be names in data.label_names, or numbers of other ones, from "
                "0: give names that are no such numbers ('1 star')"
            )


def _numbered(tidied: Sequence[str | None], names: tuple[str, ...], said: str, notes: tuple[str, ...]) -> Labels:
    """Numbers 0, 1, ... that the job's names are for.

    Raises:
        ValueError: they are none, or no name is for them; or a number is written in two ways.
    """
    there = {t for t in tidied if t is not None}
    place: dict[str, int] = {}
    for text in there:
        if not re.fullmatch(r"[-+]?\d+", text):
            unknown = sorted(there - set(names))
            raise ValueError(f"{said} holds {shown(unknown)}, which data.label_names does not have")
        place[text] = int(text)
    if len(set(place.values())) < len(place):
        twice = sorted(t for t in place if list(place.values()).count(place[t]) > 1)
        raise ValueError(f"{said} writes one number in several ways: {shown(twice)}")
    wrong = sorted({v for v in place.values() if not 0 <= v < len(names)})
    if wrong:
        raise ValueError(f"{said} must be in 0..{len(names) - 1}, for {len(names)} names, got {shown(wrong)}")
    return _checked([-1 if t is None else place[t] for t in tidied], names, said, (*notes, *_alike(names)))


def _checked(numbers: list[int], names: tuple[str, ...], said: str, notes: tuple[str, ...]) -> Labels:
    there = set(numbers) - {-1}
    if len(there) == 1:
        raise ValueError(f"{said}: all {len(numbers):,} samples are of one class, {names[next(iter(there))]!r}")
    if not there:
        raise ValueError(f"{said}: no sample has a label")
    return Labels(torch.tensor(numbers, dtype=torch.long), names, notes)


def _in_order(names: set[str]) -> tuple[str, ...]:
    if all(map(INTEGER.fullmatch, names)):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _joined(texts: Sequence[str | None], tidied: Sequence[str | None]) -> tuple[str, ...]:
    """Notes on labels that were written in several ways and are one class."""
    ways: dict[str, Counter[str]] = {}
    for text, name in zip(texts, tidied, strict=True):
        if text is not None and name is not None:
            ways.setdefault(name, Counter())[text] += 1
    return tuple(
        f"class {name!r} joins {', '.join(f'{way!a} ({number})' for way, number in sorted(found.items()))}"
        for name, found in sorted(ways.items())
        if len(found) > 1
    )


def _alike(names: Sequence[str]) -> tuple[str, ...]:
    """Notes on classes whose names a person may take for one."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(unicodedata.normalize("NFKC", name).casefold(), []).append(name)
    return tuple(
        f"classes {', '.join(map(repr, group))} differ in case or form only, and stay apart"
        for group in groups.values()
        if len(group) > 1
    )
