"""Tables of the digits benchmark: targets and whether they hold, and the page of results in Markdown."""

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t

from fleetfit.records import Record

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
    "default": ("distilled", "halving", "halving alone", "random", "enas", "cnn_ignore", "linear"),
    "linear header": ("distilled", "halving", "halving alone", "linear"),
}
HEADER_TITLES = ("backbone distilled with the pooled header (default)", "backbone distilled with a linear header")
RATES = (1e-3, 3e-3, 1e-2)  # each of the tuned ways takes the rate with the lowest pooled validation loss
DEFAULT_RATE = 3e-3
FEDAVGS = ("FedAvg", "FedAvg + fine-tuning")
ANY_FEDAVG = "the better of both, by validation"
UNTUNED = "default, untuned"
AT_DEFAULT = (  # refined at the default rate
    UNTUNED,
    "default, alone",
    "default, average",
    "default, Wasserstein (Eq. 20)",
    "default, no class prior",
    "default, free (no anchor)",
    "default, pruning 20 %",
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


def each(values: list[float]) -> str:
    """Mean ± standard error, and each seed's, in per cent."""
    return f"{spread(values)}: {' '.join(f'{100 * v:.1f}' for v in values)}"


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


class Row(Record):
    """A target and what was measured."""

    name: str
    target: str
    measured: str
    holds: bool


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


def better(ours: list[float], theirs: list[float]) -> float:
    """The share by which a mean score, of which less is better, is lower than another."""
    return 1 - mean(ours) / mean(theirs)


def targets(results: Results, parts: tuple[str, ...]) -> list[Row]:
    """The figures that the project sets itself, and whether they hold."""

    def of(part: str, *path: str) -> list[float]:
        return collect(results, part, *path)

    rows: list[Row] = []

    def add(name: str, target: str, measured: str, holds: bool) -> None:
        rows.append(Row(name=name, target=target, measured=measured, holds=holds))

    if "reference" in parts:
        v = of("reference", "accuracy")
        add("reference, test accuracy %", ">= 94", spread(v), mean(v) >= 0.94)
    if "importance" in parts:
        for unit, least in (("heads", 0.75), ("neurons", 0.9)):
            v = of("importance", f"{unit}_within_layers")
            add(
                f"Spearman of importance (default: second order) and exact removal, {unit}, within layers",
                f">= {least}",
                spread(v, 1, 2),
                mean(v) >= least,
            )
    if "elastic" in parts:
        v = of("elastic", "default", "mean")
        add("elastic, mean test accuracy % over 24 shapes", ">= 88", spread(v), mean(v) >= 0.88)
        before = of("elastic", "before_second_order"), of("elastic", "before_random")
        add(
            "before training, importance over random order, points (full depth, widths .25-.75)",
            ">= 6",
            gain(*before),
            mean(before[0]) - mean(before[1]) >= 0.06,
        )
    if "choice" in parts:
        ours, accuracy = of("choice", "pareto_grid", "a"), of("choice", "pareto_grid", "accuracy")
        for other in ("greedy_accuracy", "greedy_size"):
            theirs = of("choice", other, "a")
            gained = better(ours, theirs)
            lost = mean(of("choice", other, "accuracy")) - mean(accuracy)
            add(
                f"trade-off score (a) better than {other}, and accuracy points given up",
                ">= 30 %, <= 2.5",
                f"{100 * gained:.0f} %, {100 * lost:.1f}",
                gained >= 0.3 and lost <= 0.025,
            )
    if "header" in parts:
        for w, d in HEADER_SHAPES:
            ours, given = (of("header", f"default/{w:g}/{d}/{m}", "accuracy") for m in ("halving", "distilled"))
            worst = 100 * min(np.array(ours) - np.array(given))
            add(
                f"header search over the distilled header at ({w:g}, {d}), points, and the worst seed",
                ">= 0, >= -1",
                f"{gain(ours, given)}, {worst:+.1f}",
                mean(ours) >= mean(given) and worst >= -1,
            )
    if "devices" in parts:
        for setting in SETTINGS:
            ours = device(results, setting, "default")
            for name, theirs in (
                ("local fine-tuning", device(results, setting, "local")),
                ("the model as sent", coarse(results, setting)),
                ("the best FedAvg", device(results, setting, strongest(results, setting))),
            ):
                add(
                    f"devices, {setting}: default over {name}, points",
                    ">= 0",
                    gain(ours, theirs) + ("" if excludes_zero(ours, theirs) else " (a tie)"),
                    mean(ours) >= mean(theirs),
                )
    return rows


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


def markdown(results: Results, parts: tuple[str, ...]) -> str:
    """The page of results."""

    def of(part: str, *path: str) -> list[float]:
        return collect(results, part, *path)

    seeds = " ".join(map(str, sorted(results)))
    lines = [
        "# Figures on digits",
        "",
        f"`python benchmarks/digits.py --seeds {seeds}`; mean ± standard error over seeds. {machine()}",
        "Defaults were chosen on seeds 100-104; nothing was chosen on the seeds reported here.",
        "",
        "## Targets",
        "",
        *table(
            ["figure", "target", "measured", "holds"],
            [[r.name, r.target, r.measured, "yes" if r.holds else "**no**"] for r in targets(results, parts)],
        ),
    ]
    if "importance" in parts:
        lines += [
            "## Importance",
            "",
            "Over all units of the model, and the mean of the correlations inside each layer (only ranks inside a "
            "layer matter for the order; with four heads a layer they are coarse).",
            "",
            *table(
                ["units", "overall", "within layers"],
                [
                    [name, spread(of("importance", u), 1, 2), spread(of("importance", f"{u}_within_layers"), 1, 2)]
                    for u, name in (
                        ("heads", "heads, to second order (default)"),
                        ("heads_taylor", "heads, Eq. 8"),
                        ("neurons", "neurons, to second order (default)"),
                        ("neurons_taylor", "neurons, Eq. 8"),
                    )
                ],
            ),
            "The loss's second derivative in a head's gate, by differences, over Gauss-Newton's estimate of it "
            f"(median of the heads): {spread(of('importance', 'curvature_ratio'), 1, 1)}.",
            "",
        ]
    if "elastic" in parts:
        lines += [
            "## Elastic training",
            "",
            "Mean test accuracy % over 4 widths x 6 depths. `default`: joint distillation, the reference's own header "
            "pooled; `linear header`: the same with a linear one; `paper`: two stages, a linear header. Seconds of a "
            "run are in resume.md.",
            "",
            *table(
                ["way", "accuracy"],
                [[v, spread(of("elastic", v, "mean"))] for v in ("default", "linear header", "paper")],
            ),
            *(
                line
                for v in ("default", "linear header")
                for line in table(
                    [f"{v}: width \\ depth", *map(str, range(1, 7))],
                    [
                        [f"{w:g}", *(f"{100 * mean(of('elastic', v, 'grid', f'{w:g}/{d}')):.1f}" for d in range(1, 7))]
                        for w in (0.25, 0.5, 0.75, 1.0)
                    ],
                )
            ),
            "Before training, by what heads and neurons are ordered (full depth, widths .25 to .75):",
            "",
            *table(
                ["order", "accuracy"],
                [[o, spread(of("elastic", f"before_{o}"))] for o in ("second_order", "taylor", "random")],
            ),
        ]
    if "choice" in parts:
        lines += [
            "## Choice of the backbone",
            "",
            "Mean over the three clusters. Trade-off scores are min-max normalised over all 24 candidates: (a) loss "
            "+ energy + size, lower is better; (b) accuracy - (size + energy) / 2, higher is better. `optimum` is the "
            "best (a) within the limit, `smallest` the smallest model that fits. Greedy-Accuracy settles ties by the "
            "lower loss. No choice can be better than the optimum, which is "
            f"{100 * better(of('choice', 'optimum', 'a'), of('choice', 'greedy_accuracy', 'a')):.0f} % better than "
            "Greedy-Accuracy here.",
            "",
            *table(
                ["method", "score (a)", "score (b)", "test accuracy %", "kB"],
                [
                    [
                        m,
                        spread(of("choice", m, "a"), 1, 2),
                        spread(of("choice", m, "b"), 1, 2),
                        spread(of("choice", m, "accuracy")),
                        spread(of("choice", m, "size_bytes"), 1e-3, 0),
                    ]
                    for m in CHOICES
                ],
            ),
        ]
    if "header" in parts:
        lines += [
            "## Headers",
            "",
            "Accuracy % on all samples that neither cloud nor edge trained or chose on; backbones with shared weights, "
            "before specialisation; trained on one edge's 38 shared images and chosen on its 10. `halving` is the "
            "default and may keep or start from the distilled header; `halving alone` may not; all searches have the "
            "same budget. A backbone that was distilled with a pooled header does not gather all in [CLS], so headers "
            "that read [CLS] alone are shown at their best in the second table.",
            "",
            *(
                line
                for v, title in zip(HEADER_BACKBONES, HEADER_TITLES, strict=True)
                for line in table(
                    [title, *(f"w {w:g}, d {d}" for w, d in HEADER_SHAPES), "parameters"],
                    [
                        [
                            m,
                            *(spread(of("header", f"{v}/{w:g}/{d}/{m}", "accuracy")) for w, d in HEADER_SHAPES),
                            f"{mean(of('header', f'{v}/0.25/1/{m}', 'parameters')):.0f}",
                        ]
                        for m in HEADER_METHODS_OF[v]
                    ],
                )
            ),
        ]
    if "devices" in parts:
        lines += [
            "## Devices",
            "",
            "Mean accuracy % over fifteen devices, on private test splits; common coarse models, splits and batches. "
            "`coarse` is the model as it was sent, `local` the same header fine-tuned alone for the same epochs.",
            "",
            *table(
                ["", *SETTINGS],
                [
                    [name, *(spread(of("devices", f"{s}/default", name)) for s in SETTINGS)]
                    for name in ("coarse", "local")
                ]
                + [[v, *(spread(of("devices", f"{s}/{v}", "accuracy")) for s in SETTINGS)] for v in variants],
            ),
            "Paired difference to `local` in points:",
            "",
            *table(
                ["", *SETTINGS],
                [
                    [
                        v,
                        *(
                            gain(of("devices", f"{s}/{v}", "accuracy"), of("devices", f"{s}/{v}", "local"))
                            for s in SETTINGS
                        ),
                    ]
                    for v in variants
                ],
            ),
            "Largest distance of a similarity weight from uniform (1/5; 0 = not personal at all), mean over seeds:",
            "",
            *table(
                ["", *SETTINGS],
                [
                    [v, *(f"{mean(of('devices', f'{s}/{v}', 'from_uniform')):.4f}" for s in SETTINGS)]
                    for v in ("default", "paper")
                ],
            ),
        ]
    return "\n".join(lines).rstrip() + "\n"


def machine() -> str:
    """Where this ran."""
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread a process, PyTorch {torch.__version__}."
