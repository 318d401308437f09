"""What the pages of the benchmarks are made of: which rows and rates, means, errors and intervals, tables."""

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t

Results = Mapping[int, Mapping[str, Any]]

SETTINGS: dict[str, dict[str, Any]] = {
    "iid": {"split": "iid"},
    "C1 (7 classes)": {"split": "classes", "classes_per_device": 7},
    "C2 (5 classes)": {"split": "classes", "classes_per_device": 5},
    "C3 (3 classes)": {"split": "classes", "classes_per_device": 3},
}
HEADER_SHAPES = ((0.25, 1), (0.25, 2), (1.0, 6))
HEADER_BACKBONES = ("default", "linear header")
HEADER_METHODS_OF = {
    "default": ("distilled", "halving", "halving alone", "linear"),
    "linear header": ("distilled", "halving alone", "linear"),
}
HEADER_TITLES = ("backbone distilled with the pooled header (default)", "backbone distilled with a linear header")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # each of the tuned ways takes the rate with the lowest pooled validation loss
DEFAULT_RATE = 3e-3
FEDAVGS = ("FedAvg", "FedAvg + fine-tuning")
ANY_FEDAVG = "the better of both, by validation"
UNTUNED = "default, untuned"
AT_DEFAULT = (  # refined at the default rate
    UNTUNED,
    "default, alone",
    "default, Wasserstein (Eq. 20)",
    "default, no class prior",
    "paper",
)
CHOICES = ("pareto_grid", "greedy_accuracy", "greedy_size", "random", "smallest", "optimum")


def spread(values: list[float], scale: float = 100.0, digits: int = 1) -> str:
    """mean ± standard error; of one value, the value."""
    v = np.array(values) * scale
    if len(v) == 1:
        return f"{v[0]:.{digits}f}"
    error = v.std(ddof=1) / np.sqrt(len(v))
    return f"{v.mean():.{digits}f} ± {error:.{digits}f}"


def gain(values: list[float], base: list[float]) -> str:
    """Paired difference in points, mean ± standard error, with a sign; of one pair, the difference."""
    d = (np.array(values) - np.array(base)) * 100
    if len(d) == 1:
        return f"{d[0]:+.1f}"
    return f"{d.mean():+.1f} ± {d.std(ddof=1) / np.sqrt(len(d)):.1f}"


def interval(values: list[float], base: list[float]) -> str:
    """Paired difference in points with its 95 % interval by Student's t, and each seed's."""
    d = (np.array(values) - np.array(base)) * 100
    each = " ".join(f"{v:+.1f}" for v in d)
    if len(d) < 2:
        return each
    half = student_t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    return f"{d.mean():+.1f} ({d.mean() - half:+.1f} to {d.mean() + half:+.1f}): {each}"


def over_seeds(results: Results) -> str:
    """What stands behind a figure."""
    number = len(results)
    return f"mean ± standard error over {number} seeds" if number > 1 else "one seed, so nothing is known of the spread"


def each(values: list[float]) -> str:
    """Mean ± standard error, and each seed's, in per cent."""
    return f"{spread(values)}: {' '.join(f'{100 * v:.1f}' for v in values)}"


def tie(values: list[float], base: list[float]) -> str:
    """' (a tie)' where the 95 % interval of the paired difference holds 0."""
    return "" if len(values) < 2 or excludes_zero(values, base) else " (a tie)"


def excludes_zero(values: list[float], base: list[float]) -> bool:
    """Whether the 95 % interval of the paired difference lies on one side of 0."""
    d = np.array(values) - np.array(base)
    if len(d) < 2 or not d.std():
        return bool(len(d) > 1 and d.any())
    return bool(abs(d.mean()) > student_t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d)))


def tuned(results: Results, prefix: str, names: Sequence[str], suffix: str = "") -> list[str]:
    """Of each seed, the one of several ways with the lowest validation loss: its key."""
    keys = []
    for seed in sorted(results):
        devices = results[seed]["devices"]
        keys.append(min((f"{prefix}/{n}{suffix}" for n in names), key=lambda k, d=devices: d[k]["validation_loss"]))  # type: ignore[misc]
    return keys


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def collect(results: Results, part: str, *path: str) -> list[float]:
    """One figure of all seeds."""
    values = []
    for seed in sorted(results):
        value: Any = results[seed][part]
        for p in path:
            value = value[p]
        values.append(float(value))
    return values


def mean(values: list[float]) -> float:
    """The mean."""
    return float(np.mean(values))


TUNED_ROWS = ("default", "local", "FedAvg", "FedAvg + fine-tuning", ANY_FEDAVG)


def device(results: Results, setting: str, row: str, key: str = "accuracy") -> list[float]:
    """One figure of the devices of all seeds; rows of ``TUNED_ROWS`` with the rate that validation chose for each."""
    if row in TUNED_ROWS:
        kinds = FEDAVGS if row == ANY_FEDAVG else (row,)
        chosen = tuned(results, setting, [f"{k}/{r:g}" for k in kinds for r in RATES])
    else:
        chosen = [f"{setting}/{'default' if row == UNTUNED else row}/{DEFAULT_RATE:g}"] * len(results)
    return [float(results[seed]["devices"][k][key]) for seed, k in zip(sorted(results), chosen, strict=True)]


def coarse(results: Results, setting: str, key: str = "coarse") -> list[float]:
    """The model as sent, on the devices of all seeds."""
    return collect(results, "devices", f"{setting}/default/{DEFAULT_RATE:g}", key)


def strongest(results: Results, setting: str) -> str:
    """The row of FedAvg with the highest mean test accuracy: the choice among the rows favours the opponent."""
    return max(("FedAvg", "FedAvg + fine-tuning", ANY_FEDAVG), key=lambda row: mean(device(results, setting, row)))


def strongest_at_one_rate(results: Results, setting: str) -> list[float]:
    """FedAvg, of either kind, at the one rate for all seeds with the highest mean test accuracy: a choice by test."""
    ways = [collect(results, "devices", f"{setting}/{k}/{r:g}", "accuracy") for k in FEDAVGS for r in RATES]
    return max(ways, key=mean)


def machine() -> str:
    """Where this ran."""
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread a process, PyTorch {torch.__version__}."
