"""summary.json as the page and the terminal read it: checked, and free of what they do not need."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from fleetfit.core.records import DataSummary, LeftOut, Real


class Row(BaseModel):
    """What a reader needs of a file's record; keys it does not need are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ReferenceLine(Row):
    """The reference in summary.json."""

    accuracy: Real
    parameters: int


class ClusterLine(Row):
    """A cluster in summary.json; scores of its candidate on the public validation split."""

    id: str
    limit_bytes: int
    width: float
    depth: int
    parameters: int
    size_bytes: int
    energy_joules: Real
    loss: Real
    accuracy: Real
    header: str


class DeviceLine(Row):
    """A device with a model; accuracies on its private test split are NaN where there was nothing to measure."""

    id: str
    cluster: str
    accuracy_coarse: Real
    accuracy_local: Real
    accuracy: Real
    parameters: int
    size_bytes: int
    limit_bytes: int
    notes: tuple[str, ...] = ()


class AbsentLine(Row):
    """A device that did not finish."""

    id: str
    cluster: str
    since: str


class Summary(Row):
    """summary.json; null is NaN in all that was measured."""

    method: str
    seed: int
    reference: ReferenceLine
    clusters: tuple[ClusterLine, ...]
    devices: tuple[DeviceLine, ...]
    traffic: dict[str, Real]
    seconds: dict[str, float]
    absent: tuple[AbsentLine, ...] = ()  # this and all below: not in the folders of earlier versions
    left_out: tuple[LeftOut, ...] = ()
    data: DataSummary | None = None
    privacy: dict[str, Any] | None = None
    cpu_seconds: dict[str, float] = {}
    peak_memory_bytes: int | None = None
    from_cache: tuple[str, ...] = ()
    deployed: bool = False


def read_summary(summary: Mapping[str, Any]) -> Summary:
    """The summary of a run, as ``run`` returns it or as it stands in its file.

    Raises:
        pydantic.ValidationError: something is missing or of another kind; a ValueError.
    """
    return Summary.model_validate(summary)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the known ones; None without any."""
    finite = [v for v in values if v is not None and math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None
