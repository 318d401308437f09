"""The page of the digits benchmark: what does not hold, targets and whether they hold, and tables, in Markdown."""

from collections.abc import Mapping

import numpy as np
from digits_tables import (
    ANY_FEDAVG,
    AT_DEFAULT,
    CHOICES,
    DEFAULT_RATE,
    HEADER_BACKBONES,
    HEADER_METHODS_OF,
    HEADER_SHAPES,
    HEADER_TITLES,
    RATES,
    SETTINGS,
    TUNED_ROWS,
    UNTUNED,
    Results,
    coarse,
    collect,
    device,
    each,
    excludes_zero,
    gain,
    interval,
    machine,
    mean,
    over_seeds,
    spread,
    strongest,
    strongest_at_one_rate,
    table,
    tie,
    tuned,
)

from fleetfit.core.records import Record


class Row(Record):
    """A target and what was measured."""

    name: str
    target: str
    measured: str
    holds: bool


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
                    gain(ours, theirs) + tie(ours, theirs),
                    mean(ours) >= mean(theirs),
                )
    return rows


def markdown(results: Results, parts: tuple[str, ...]) -> str:
    """The page of results."""

    def of(part: str, *path: str) -> list[float]:
        return collect(results, part, *path)

    seeds = " ".join(map(str, sorted(results)))
    lines = [
        "# Figures on digits",
        "",
        f"`python benchmarks/digits.py --seeds {seeds} --parts {' '.join(parts)}`; {over_seeds(results)}. {machine()}",
        "Defaults were chosen on seeds 100-104, and nothing on the seeds reported here, but that 3e-4, the smallest "
        "rate of the grid, was added when two of them had been seen at the others, since local fine-tuning asked "
        "for it. And digits has 1,797 images: "
        "each seed, also those, is another split and another training on the same images, so all figures belong to "
        "this data set, and intervals speak of splits, not of other data.",
        "",
        *(["## What does not hold, and what is a tie", "", *(f"- {w}" for w in weak_points(results, parts)), ""]),
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
            "Rank correlation with exact removal. Only ranks inside a layer decide what is kept: the mean of the "
            "layers' correlations (of four heads a layer they are coarse). Over all units of the model, layers that "
            "matter more or less than others are counted too, which no order uses.",
            "",
            *table(
                ["units", "within layers", "over all layers"],
                [
                    [name, spread(of("importance", f"{u}_within_layers"), 1, 2), spread(of("importance", u), 1, 2)]
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
                [
                    *([v, spread(of("elastic", v, "mean"))] for v in HEADER_BACKBONES),
                    *([["paper", spread(of("paper", "mean"))]] if "paper" in parts else []),
                ],
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
        lines += header_section(results)
    if "devices" in parts:
        lines += device_section(results)
    return "\n".join(lines).rstrip() + "\n"


def weak_points(results: Results, parts: tuple[str, ...]) -> list[str]:
    """What a reader should know first."""
    points: list[str] = []
    if "devices" in parts:
        rivals = {s: (device(results, s, "default"), device(results, s, strongest(results, s))) for s in SETTINGS}
        alone, prior = (
            {s: (device(results, s, UNTUNED), device(results, s, without)) for s in SETTINGS}
            for without in ("default, alone", "default, no class prior")
        )
        local = {s: (device(results, s, "default"), device(results, s, "local")) for s in SETTINGS}
        fixed = {s: (device(results, s, "default"), strongest_at_one_rate(results, s)) for s in SETTINGS}
        points += [
            "**Over the best FedAvg**, with or without fine-tuning (of which the one with the higher test accuracy is "
            "taken), its rate chosen by validation as the default's is, "
            f"the default gains {listed(rivals)}",
            "**That choice of rates costs FedAvg something.** Against FedAvg of either kind at the one rate for all "
            f"seeds that is best on the test images, which favours it, the default gains {listed(fixed)}",
            f"**Over local fine-tuning**, its rate chosen by validation too, it gains {listed(local)}",
            f"**Collaboration**: over the same method without exchange (`alone`) it gains {listed(alone)}",
            f"**The class prior**: over the same method without it, it gains {listed(prior)}",
        ]
    if "header" in parts:
        gains = [
            ours - given
            for w, d in HEADER_SHAPES
            for ours, given in zip(
                collect(results, "header", f"default/{w:g}/{d}/halving", "accuracy"),
                collect(results, "header", f"default/{w:g}/{d}/distilled", "accuracy"),
                strict=True,
            )
        ]
        points.append(
            "**The header search** replaced the pooled header that was distilled with the backbone in "
            f"{sum(bool(g) for g in gains)} of {len(gains)} cells, by {100 * min(gains):+.1f} to "
            f"{100 * max(gains):+.1f} points. Up to commit 43374a6 the loss of ten validation samples decided, and in "
            "two of fifteen cells (seeds 15-19) it sent a header that was 9.2 and 10.5 points worse."
        )
    if "importance" in parts:
        heads = spread(collect(results, "importance", "heads_within_layers"), 1, 2)
        points.append(
            f"**Importance of heads** ranks them at {heads} with exact removal inside layers, where the ranks are used."
        )
    missed = [r for r in targets(results, parts) if not r.holds]
    return [*points, *(f"Target missed: {r.name}: {r.measured}, not {r.target}." for r in missed)]


def listed(pairs: Mapping[str, tuple[list[float], list[float]]]) -> str:
    """'+1.0 ± .2 points (iid), ...', and where the 95 % interval excludes 0."""
    gains = ", ".join(f"{gain(*pair)} ({name.partition(' ')[0]})" for name, pair in pairs.items())
    clear = [name.partition(" ")[0] for name, pair in pairs.items() if excludes_zero(*pair)]
    if len(next(iter(pairs.values()))[0]) < 2:
        return f"{gains} points."
    return f"{gains} points; the 95 % interval excludes 0 in {', '.join(clear) or 'none'}."


def header_section(results: Results) -> list[str]:
    """Tables of the header search, each seed shown."""

    def accuracy(variant: str, w: float, d: int, method: str) -> list[float]:
        return collect(results, "header", f"{variant}/{w:g}/{d}/{method}", "accuracy")

    def parameters(variant: str, method: str) -> str:
        return f"{mean(collect(results, 'header', f'{variant}/0.25/1/{method}', 'parameters')):.0f}"

    columns = [f"w {w:g}, d {d}" for w, d in HEADER_SHAPES]

    def compared(a: tuple[str, str], b: tuple[str, str]) -> list[str]:
        return [interval(accuracy(a[0], w, d, a[1]), accuracy(b[0], w, d, b[1])) for w, d in HEADER_SHAPES]

    pooled, linear = HEADER_BACKBONES
    lines = [
        "## Headers",
        "",
        "Accuracy % on all samples that neither cloud nor edge trained or chose on; backbones with shared weights, "
        "before specialisation. `distilled`: the header that came with the backbone, as it is, which has seen the "
        "public data. All others are trained on one edge's 38 shared images and chosen on its 10. `halving` is the "
        "default: its headers start as the distilled one computes, and what it finds replaces that one only if the "
        "search, run again without each fifth of the 48 images, is better on those (one-sided paired t-test at 2.5 "
        "%, the variance 2.25 times as large, and no fewer right). `halving alone` starts afresh and has no "
        "distilled header to fall back on. Random search, ENAS and other fixed kinds, of which none was above "
        "`halving alone` by more than its error, are in [digits_seeds_15_19.md](digits_seeds_15_19.md).",
        "",
    ]
    for variant, title in zip(HEADER_BACKBONES, HEADER_TITLES, strict=True):
        rows = [
            [m, *(each(accuracy(variant, w, d, m)) for w, d in HEADER_SHAPES), parameters(variant, m)]
            for m in HEADER_METHODS_OF[variant]
        ]
        lines += table([title, *columns, "parameters"], rows)
    return [
        *lines,
        "Like with like; paired differences in points, their 95 % interval, and each seed's:",
        "",
        *table(
            ["", *columns],
            [
                [
                    "both distilled on public data: pooled over linear",
                    *compared((pooled, "distilled"), (linear, "distilled")),
                ],
                [
                    "both trained on the edge, backbone with a linear header: searched alone over linear",
                    *compared((linear, "halving alone"), (linear, "linear")),
                ],
                [
                    "the search beside the distilled header, pooled",
                    *compared((pooled, "halving"), (pooled, "distilled")),
                ],
            ],
        ),
    ]


def device_section(results: Results) -> list[str]:
    """Tables of the devices."""
    by_rate = {row: [f"{collect_rates(results, s, row)}" for s in SETTINGS] for row in TUNED_ROWS if row != ANY_FEDAVG}
    return [
        "## Devices",
        "",
        "Mean accuracy % over fifteen devices, on private test splits; common coarse models, splits and batches. `as "
        f"sent` is the coarse model. In the first rows the rate is one of {', '.join(f'{r:g}' for r in RATES)}, "
        "chosen for each seed and setting by the validation loss pooled over all devices, for each method alike; "
        f"`local` is the coarse model's header fine-tuned by each device alone. The others have the default rate, "
        f"{DEFAULT_RATE:g}. A device has about fifteen test images.",
        "",
        *table(
            ["", *SETTINGS],
            [["as sent", *(spread(coarse(results, s)) for s in SETTINGS)]]
            + [[row, *(spread(device(results, s, row)) for s in SETTINGS)] for row in (*TUNED_ROWS, *AT_DEFAULT)],
        ),
        "How often each rate was chosen, over the seeds (" + ", ".join(f"{r:g}" for r in RATES) + "):",
        "",
        *table(["", *SETTINGS], [[row, *cells] for row, cells in by_rate.items()]),
        "Paired difference to the one `local` above, in points:",
        "",
        *table(
            ["", *SETTINGS],
            [
                [row, *(gain(device(results, s, row), device(results, s, "local")) for s in SETTINGS)]
                for row in (*TUNED_ROWS, *AT_DEFAULT)
                if row != "local"
            ],
        ),
        "The default (rate chosen) over others, paired, in points: mean, 95 % interval by Student's t, each seed's:",
        "",
        *table(
            ["over", *SETTINGS],
            [
                ["as sent", *(interval(device(results, s, "default"), coarse(results, s)) for s in SETTINGS)],
                *(
                    [row, *(interval(device(results, s, "default"), device(results, s, row)) for s in SETTINGS)]
                    for row in TUNED_ROWS[1:]
                ),
            ],
        ),
        "The default at its own rate over what it is without a part:",
        "",
        *table(
            ["over", *SETTINGS],
            [
                [row, *(interval(device(results, s, UNTUNED), device(results, s, row)) for s in SETTINGS)]
                for row in ("default, alone", "default, no class prior")
            ],
        ),
        "Worst device, accuracy %:",
        "",
        *table(
            ["", *SETTINGS],
            [[row, *(spread(device(results, s, row, "worst")) for s in SETTINGS)] for row in TUNED_ROWS],
        ),
        "Largest distance of a similarity weight from uniform (1/5; 0 = not personal at all), mean over seeds:",
        "",
        *table(
            ["", *SETTINGS],
            [
                [row, *(f"{mean(device(results, s, row, 'from_uniform')):.4f}" for s in SETTINGS)]
                for row in (UNTUNED, "paper")
            ],
        ),
    ]


def collect_rates(results: Results, setting: str, row: str) -> str:
    """How often each rate was chosen."""
    chosen = tuned(results, setting, [f"{row}/{r:g}" for r in RATES])
    return " ".join(str(sum(k.endswith(f"/{r:g}") for k in chosen)) for r in RATES)
