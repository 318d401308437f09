"""A first job for somebody's own data, model and devices: short, commented, with what was found in the data.

What is guessed is said in a comment; what cannot be guessed is asked for. The job that is written has been planned.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fleetfit.config.job import Job, make_job
from fleetfit.config.sections import DataConfig
from fleetfit.core.progress import Progress, silent
from fleetfit.core.records import Record, SizedShape
from fleetfit.data.columns import Column, Kind, find_columns
from fleetfit.data.labels import read_labels
from fleetfit.data.named_files import locate
from fleetfit.data.pixels import as_image, open_image
from fleetfit.data.tables import Table, open_table
from fleetfit.models.families import family_of
from fleetfit.models.pretrained import read_config
from fleetfit.runs.plan import Plan, make_plan

LOOKED_AT = 20  # pictures whose size is looked at
SIDES = ((16, 8, 2), (32, 32, 4), (1 << 30, 64, 8))  # pictures up to this side: size of the model's input, and patch
MOST_ROWS = 5000  # that are looked at to guess
KINDS: tuple[Kind, ...] = ("image", "text")


class Found(Record):
    """What the data and the model say."""

    kind: Kind
    family: str
    input_column: str
    input_why: str
    label_column: str
    label_why: str
    num_classes: int
    num_samples: int
    config: dict[str, Any]
    config_why: str = ""


def write_first_job(
    path: Path, data: str, model: str = "", inventory: str = "", progress: Progress = silent
) -> tuple[Found, Plan]:
    """Write a job for these data, and return what was found and what a run of it would do.

    Args:
        path: The file; it must not be there.
        data: As ``data.source``.
        model: As ``model.pretrained``; empty: a small model from nothing.
        inventory: A CSV file of devices; empty: three groups of example devices.
        progress: Told how far it is.

    Raises:
        ValueError: the file is there; data, model or inventory cannot be read, or no column is known as labels.
        OSError: a file cannot be read or written.
    """
    if path.exists():
        raise ValueError(f"{path} is there already, and is not written over")
    found = look_at(data, model, progress)
    fleet: dict[str, Any] = {"inventory": inventory} if inventory else {"devices": [{"storage_limit": "1 GB"}]}
    plan = make_plan(_job(data, model, found, fleet), progress, estimate=False)
    groups = [] if inventory else _example_groups(plan.clusters[0].shapes if plan.clusters else ())
    if groups:
        plan = make_plan(_job(data, model, found, {"devices": groups}), progress, estimate=False)
    text = job_text(data, model, inventory, found, groups)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    return found, plan


def look_at(data: str, model: str = "", progress: Progress = silent) -> Found:
    """What is in the data, and which family of model reads it.

    Raises:
        ValueError: as ``write_first_job``.
        OSError: a file cannot be read.
    """
    family = str(read_config(model)[1].get("model_type")) if model else ""
    kinds = (family_of(family).kind,) if family else KINDS
    if data == "digits":
        return Found(
            kind="image", family=family or "vit", input_column="", input_why="", label_column="", label_why="",
            num_classes=10, num_samples=1797, config={},
        )  # fmt: skip
    reading = DataConfig(source=data)
    table = open_table(reading, Job().run.cache_folder, lambda words: progress("data", 0, 1, words))
    kind, (column, label_column) = _columns(table, reading, kinds)
    table = table.with_files_of(column.name) if kind == "image" else table
    labels = read_labels(table, label_column.name, reading)
    by_folder = bool(table.class_rule) and label_column.why == table.class_rule
    config, why = ({}, "") if family or kind == "text" else _small_model(table, column)
    return Found(
        kind=kind,
        family=family or ("vit" if kind == "image" else "bert"),
        input_column="" if by_folder else column.name,
        input_why=column.why,
        label_column="" if by_folder else label_column.name,
        label_why=label_column.why,
        num_classes=len(labels.names),
        num_samples=len(labels.numbers) - labels.num_missing,
        config=config,
        config_why=why,
    )


def _columns(table: Table, reading: DataConfig, kinds: Sequence[Kind]) -> tuple[Kind, tuple[Column, Column]]:
    problems: dict[Kind, str] = {}
    for kind in kinds:
        try:
            return kind, find_columns(table, reading, kind)
        except ValueError as error:
            problems[kind] = str(error)
    if "text" in kinds and (guessed := _guessed(table)):
        return "text", guessed
    if len(problems) == 1:
        raise ValueError(next(iter(problems.values())))
    raise ValueError("; or, ".join(f"as {kind}s: {told}" for kind, told in problems.items()))


def _guessed(table: Table) -> tuple[Column, Column] | None:
    """Of columns of text whose names say nothing: labels have few different values, inputs are the longest."""
    from datasets import Value

    texts: dict[str, list[str]] = {}
    for name, feature in table.rows.features.items():
        if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
            texts[name] = [value for value in table.rows[:MOST_ROWS][name] if value]
    different = {name: len(set(values)) for name, values in texts.items()}
    few = [name for name, number in different.items() if 2 <= number <= max(2, len(texts[name]) // 4)]
    if not few:
        return None
    label = min(few, key=lambda name: different[name])
    others = {name: statistics.mean(map(len, values)) for name, values in texts.items() if name != label and values}
    if not others:
        return None
    longest = max(others, key=lambda name: others[name])
    why = f"a guess: {different[label]} different values in {len(texts[label]):,} rows"
    return Column(longest, "a guess: the longest texts"), Column(label, why)


def _small_model(table: Table, column: Column) -> tuple[dict[str, Any], str]:
    """Size of inputs and patches of a small model for these pictures."""
    some = list(range(min(LOOKED_AT, len(table.rows))))
    images = [_opened(value, table) for part in table.chunks(column.name, some, LOOKED_AT) for value in part]
    sides = [min(image.size) for image in images]
    side = int(statistics.median(sides))
    _, size, patch = next(entry for entry in SIDES if side <= entry[0])
    channels = 1 if all(image.mode in ("1", "L", "I", "I;16") for image in images) else 3
    what = f"pictures of about {side} pixels a side, {'in grey' if channels == 1 else 'in colour'}"
    return {"image_size": size, "patch_size": patch, "num_channels": channels}, what


def _opened(value: Any, table: Table) -> Any:
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (str, Path)):
        value = locate(table.folder, value).read_bytes()
    return open_image(value) if isinstance(value, bytes) else as_image(value)


def _job(data: str, model: str, found: Found, fleet: dict[str, Any]) -> Job:
    columns = {k: getattr(found, k) for k in ("input_column", "label_column") if getattr(found, k)}
    section: dict[str, Any] = {"family": found.family}
    section |= {"pretrained": model} if model else {"config": found.config}
    return make_job({"model": section, "data": {"source": data, "split": "iid", **columns}, "fleet": fleet})


def _example_groups(shapes: Sequence[SizedShape]) -> list[dict[str, Any]]:
    """Three groups of devices that some of the shapes fit: small ones, middling, and all."""
    if not shapes:
        return [{"name": "device", "count": 4, "storage_limit": "1 GB"}]
    places = (len(shapes) // 6, len(shapes) // 2, len(shapes) - 1)
    names = ("small", "medium", "large")
    return [
        {"name": name, "count": 4, "cluster": f"{name}-devices", "storage_limit": _rounded(1.3 * shapes[i].size_bytes)}
        for name, i in zip(names, places, strict=True)
    ]


def _rounded(size_bytes: float) -> str:
    unit, number = next((u, size_bytes / n) for u, n in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)) if size_bytes >= n)
    return f"{float(f'{number:.2g}'):g} {unit}"


def job_text(data: str, model: str, inventory: str, found: Found, groups: Sequence[dict[str, Any]]) -> str:
    """The job as a person reads it."""
    lines = [
        f"# {found.num_samples:,} samples of {found.num_classes} classes. What it would do: fleetfit plan; every key: "
        "fleetfit run JOB --dry-run",
        "",
        "seed = 0",
        "",
        "[data]",
        _line("source", data),
    ]
    for key, why in (("input_column", found.input_why), ("label_column", found.label_why)):
        if value := getattr(found, key):
            lines.append(f"{_line(key, value)}  # {why if why.startswith('a guess') else f'found by {why}'}")
    lines += [
        'split = "iid"  # how samples are shared out here: iid, classes, dirichlet, or natural with user_column',
        "",
    ]
    lines += ["[model]", _line("family", found.family)]
    if model:
        lines.append(_line("pretrained", model))
    else:
        lines.append('# pretrained = "a folder or a hub id"  # much better than from nothing, if there is one')
        if found.config:
            lines += ["", "[model.config]", f"# for {found.config_why}; larger is better and slower"]
            lines += [_line(key, value) for key, value in found.config.items()]
    lines.append("")
    if inventory:
        lines += ["[fleet]", f"{_line('inventory', inventory)}  # one line a device"]
    else:
        lines.append('# Examples: put your own devices here, or a file: [fleet] inventory = "devices.csv"')
    for group in groups:
        lines += ["[[fleet.devices]]", *(_line(key, value) for key, value in group.items()), ""]
    return "\n".join(lines).rstrip() + "\n"


def _line(key: str, value: Any) -> str:
    return tomli_w.dumps({key: value}).strip()
