"""What the page tells, read from a run folder and validated: job.toml, summary.json, metrics.jsonl, cloud/front.csv."""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fleetfit.cloud.elastic import Elastic
from fleetfit.cloud.reference import Reference
from fleetfit.config.job import Job, load_job
from fleetfit.core.encoding import Message
from fleetfit.core.files import read_json
from fleetfit.core.records import DeviceReport, Record
from fleetfit.edge.messages import ClusterReport
from fleetfit.method.search_space import validate_blocks
from fleetfit.runs.report.summary import Row, Summary, read_summary

M = TypeVar("M", bound=Message)


class FrontRow(Row):
    """A candidate as one cluster sees it, in cloud/front.csv."""

    cluster: str
    width: float
    depth: int
    loss: float
    accuracy: float
    energy_joules: float
    parameters: int
    size_bytes: int
    fits: bool
    on_front: bool
    trade_off: float
    trade_off_accuracy: float
    chosen_by: str
    chosen: bool


class Run(Record):
    """All that the page tells, as read from the run folder; mappings by cluster."""

    name: str
    folder: Path  # as the person who asked for the page named it
    job: Job
    summary: Summary
    reference: Reference
    elastic: Elastic
    reports: dict[str, ClusterReport]
    front: dict[str, tuple[FrontRow, ...]]
    bytes_by_phase: dict[str, dict[str, int]]
    hidden_groups: dict[str, int]  # by device; of a simulated fleet that has them

    @property
    def has_all_data(self) -> bool:
        """Whether the devices' samples were in the data that was read here: not where machines are connected."""
        return not self.summary.deployed

    @property
    def devices(self) -> list[DeviceReport]:
        """All devices, cluster by cluster."""
        return [d for report in self.reports.values() for d in report.devices]

    @property
    def num_within_limit(self) -> int:
        """Devices whose model is not larger than what they can store."""
        return sum(d.size_bytes <= d.limit_bytes for d in self.devices)


class Gain(Record):
    """Mean difference of two accuracies over devices, paired device by device; shares in -1..1."""

    mean: float
    error: float
    num_devices: int


def paired_gain(devices: Iterable[DeviceReport], earlier: str) -> Gain | None:
    """What ships minus an earlier accuracy ("accuracy_coarse", "accuracy_local"), and its standard error."""
    pairs = [(getattr(d, earlier), d.accuracy) for d in devices]
    gains = [b - a for a, b in pairs if a is not None and b is not None and math.isfinite(b - a)]
    if not gains:
        return None
    average = sum(gains) / len(gains)
    variance = sum((g - average) ** 2 for g in gains) / max(len(gains) - 1, 1)
    return Gain(mean=average, error=math.sqrt(variance / len(gains)), num_devices=len(gains))


def read_run(folder: Path) -> Run:
    """Read and check a finished run.

    Raises:
        ValueError: a file is missing, damaged, or does not go with the others; names it.
    """
    path = folder / "summary.json"
    try:
        summary = read_summary(read_json(path))
    except ValidationError as error:
        raise ValueError(f"{path} is corrupt: {error}") from None
    job_path = folder / "job.toml"
    if not job_path.exists():
        raise ValueError(f"{job_path} is missing: is {folder} the folder of a finished run?")
    path = folder / "metrics.jsonl"
    lines = _read_metrics(path)
    reports = {c.id: _take(lines, f"finish/{c.id}", ClusterReport, path) for c in summary.clusters}
    for cluster, report in reports.items():
        for spec in (report.header, *(t.spec for t in report.trials)):
            try:
                validate_blocks(spec.blocks) if spec.blocks else None
            except ValueError as error:
                raise ValueError(f"{path} is corrupt: header of {cluster}: {error}") from None
    return Run(
        name=folder.resolve().name,
        folder=folder,
        job=load_job(job_path),
        summary=summary,
        reference=_take(lines, "reference/cloud", Reference, path),
        elastic=_take(lines, "elastic/cloud", Elastic, path),
        reports=reports,
        front=_read_front(folder / "cloud" / "front.csv", [c.id for c in summary.clusters]),
        bytes_by_phase=_bytes_by_phase(lines, path),
        hidden_groups=_read_groups(folder / "groups.json"),
    )


def _read_groups(path: Path) -> dict[str, int]:
    if not path.exists():
        return {}
    groups = read_json(path)
    if not all(isinstance(group, int) for group in groups.values()):
        raise ValueError(f"{path} is corrupt: groups of devices must be whole numbers")
    return groups


def _read_metrics(path: Path) -> dict[str, dict[str, Any]]:
    """The lines by step; of a step that was read back after a kill, or used twice, the last."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: is {path.parent} the folder of a finished run?") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is corrupt: {error}") from None
    lines = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            fields = json.loads(line)
            lines[str(fields.pop("step"))] = fields
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is corrupt: {error}") from None
    return lines


def _take(lines: Mapping[str, dict[str, Any]], step: str, kind: type[M], path: Path) -> M:
    if step not in lines:
        raise ValueError(f"{path} has no step {step!r}: the run is not finished")
    try:
        return kind.model_validate({k: v for k, v in lines[step].items() if k in kind.model_fields})
    except ValidationError as error:
        raise ValueError(f"{path}, step {step!r}, is corrupt: {error}") from None


def _bytes_by_phase(lines: Mapping[str, dict[str, Any]], path: Path) -> dict[str, dict[str, int]]:
    total: dict[str, Counter[str]] = {}
    for step, fields in lines.items():
        try:
            total.setdefault(step.partition("/")[0], Counter()).update(
                {str(link): int(number) for link, number in fields.get("bytes", {}).items()}
            )
        except (AttributeError, ValueError, TypeError) as error:
            raise ValueError(f"{path}, step {step!r}, is corrupt: {error}") from None
    return {phase: dict(counter) for phase, counter in total.items()}


def _read_front(path: Path, clusters: Sequence[str]) -> dict[str, tuple[FrontRow, ...]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [FrontRow.model_validate(row) for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: is {path.parent.parent} the folder of a finished run?") from None
    except (ValidationError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is corrupt: {error}") from None
    front = {cluster: tuple(r for r in rows if r.cluster == cluster) for cluster in clusters}
    for cluster, own in front.items():
        if sum(r.chosen for r in own) != 1:
            raise ValueError(f"{path} is corrupt: cluster {cluster!r} must have 1 chosen candidate in it")
    return front
