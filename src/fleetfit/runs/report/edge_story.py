"""What edges and devices did: headers, similarity, accuracy device by device, refinement, and what was shipped."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fleetfit.core.records import HeaderSpec, HeaderTrial
from fleetfit.edge.messages import ClusterReport
from fleetfit.runs.report.figures import (
    MAX_ROWS,
    DeviceDots,
    Series,
    accuracy_floor,
    dot,
    dot_plot,
    legend_mark,
    line_chart,
    matrix,
    quantile_plot,
    ring,
    tick,
)
from fleetfit.runs.report.header_graph import header_graph, header_words
from fleetfit.runs.report.layout import (
    figure,
    grid,
    header_name,
    note,
    panel,
    paragraph,
    per_cluster,
    section,
    table,
    table_row,
    tag,
)
from fleetfit.runs.report.markup import Markup, count, decimal, element, join, known, percent, plural
from fleetfit.runs.report.run_data import Run
from fleetfit.runs.report.summary import mean

Weights = tuple[tuple[float, ...], ...]  # [device peer]
MAX_MATRIX = 30  # devices of a cluster whose similarity matrix is drawn; above, a summary
MAX_OPEN = 4  # clusters whose headers stand open
MAX_TRIALS = 12  # header trials shown per cluster, the best


def headers(run: Run) -> Markup:
    """For each cluster the chosen header as a graph, and what it was compared with."""
    config = run.job.header
    kept = (
        " The header that was distilled with the backbone has seen far more data than the edge has: what is found "
        "replaces it only if the search, run anew without each fifth of the shared samples, is clearly better on it."
        if config.keep_distilled
        else ""
    )
    if config.keep_distilled and config.quick_test and config.warm_start and config.search == "halving":
        kept += " Where a quick test on such folds promises nothing, there is no search."
    parts = []
    for cluster in run.summary.clusters:
        report = run.reports[cluster.id]
        chosen = next((t for t in report.trials if t.chosen), None)
        searched = next((t for t in sorted(report.trials, key=_loss) if t.spec.blocks), None)
        graphs = [_graph(f"Chosen for {cluster.id}", report.header, chosen)]
        if searched is not None and report.header.kind != "blocks":
            graphs.append(_graph("Best searched one, not chosen", searched.spec, searched))
        body = element("div", *graphs, _trials(report, chosen), class_="beside")
        title = element("summary", f"{cluster.id}: {header_name(report.header)}")
        parts.append(element("details", title, body, class_="cluster", open=len(run.summary.clusters) <= MAX_OPEN))
    return section(
        "headers",
        "The headers",
        paragraph(
            f"Search: {config.search}, with {plural(config.budget_steps, 'training step')} per cluster. A searched "
            "header is a cell of blocks. Each block applies an operation to each of two inputs and adds the results; "
            "lines at the left feed the left operation, lines at the right the right one. Blocks that nothing follows "
            "are averaged."
        ),
        paragraph(
            "Loss and accuracy are on the edge’s validation split, which is small and on which the choice was made: "
            f"read them as optimistic.{kept}"
        ),
        *parts,
    )


def _loss(trial: HeaderTrial) -> float:
    return trial.loss if known(trial.loss) else math.inf


def _graph(title: str, spec: HeaderSpec, trial: HeaderTrial | None) -> Markup:
    scores = f": loss {decimal(trial.loss)}, {plural(trial.parameters, 'parameter')}" if trial else None
    return figure(header_graph(f"{title}: {header_words(spec)}", spec), element("b", title), scores)


def _trials(report: ClusterReport, chosen: HeaderTrial | None) -> Markup:
    numeric = (1, 2, 3)
    ordered = sorted(report.trials, key=_loss)
    shown = [t for i, t in enumerate(ordered) if i < MAX_TRIALS or t is chosen]
    rows = []
    for trial in shown:
        given = trial.name.startswith("given ")
        name = trial.name.removeprefix("given ") + (", as distilled" if given else "")
        cells = (decimal(trial.loss), percent(trial.accuracy, 0), count(trial.parameters))
        title = join(name, " ", tag("chosen")) if trial is chosen else name
        rows.append(table_row(title, *cells, numeric=numeric, class_="chosen" if trial is chosen else None))
    more = f"; {len(ordered) - len(shown)} more not shown" if len(ordered) > len(shown) else ""
    caption = f"{plural(len(ordered), 'header')} trained and compared{more}"
    if len(ordered) == 1 and ordered[0].name.startswith("given "):
        caption = "Not searched: a few headers, trained a little, were no better on what was held out"
    return table(caption, ["Header", "Val. loss", "Val. acc.", "Parameters"], rows, numeric)


def similarity(run: Run) -> Markup:
    """For each cluster the weights of Eq. 21, and how far they are from a plain average."""
    of = {c.id: run.reports[c.id].similarity for c in run.summary.clusters}
    drawn = {cluster: weights for cluster, weights in of.items() if len(weights) <= MAX_MATRIX}
    return section(
        "similarity",
        "Who listens to whom",
        paragraph(
            "What a device gets back is an average over devices of its cluster, weighted by how alike they are "
            f"(measure: {run.job.refine.similarity}; updates: groups whose headers change alike). Numbers are percent, "
            "a row adds up to 100. Devices "
            "are numbered within their cluster, as in the table of devices."
        ),
        grid(*(panel(cluster, _matrix(cluster, weights)) for cluster, weights in drawn.items())) if drawn else None,
        _similarity_table({c: w for c, w in of.items() if c not in drawn}) if len(drawn) < len(of) else None,
    )


def _own_and_moved(weights: Weights) -> tuple[float | None, float | None]:
    """Mean weight of a device for itself, and the share of weight that lies elsewhere than in a plain average."""
    even = 1 / len(weights)
    own = mean(row[i] for i, row in enumerate(weights) if i < len(row))
    return own, mean(sum(abs(v - even) for v in row) / 2 for row in weights)


def _matrix(cluster: str, weights: Weights) -> Markup:
    n = len(weights)
    if n < 2:
        return note("One device: there is nobody to listen to.")
    own, moved = _own_and_moved(weights)
    return figure(
        matrix(f"{cluster}: weight in percent that each of {n} devices gives each other", weights),
        f"A device’s own weight is {percent(own)} on average; it would be {percent(1 / n)} if all counted alike. "
        f"{percent(moved)} of all weight lies elsewhere than in a plain average.",
    )


def _similarity_table(large: Mapping[str, Weights]) -> Markup:
    """Numbers instead of a drawing, for clusters with too many devices."""
    numeric = range(1, 8)
    rows = []
    for cluster, weights in large.items():
        own, moved = _own_and_moved(weights)
        others = sorted(v for i, row in enumerate(weights) for j, v in enumerate(row) if i != j and known(v))
        least, half, most = (others[0], others[len(others) // 2], others[-1]) if others else (None, None, None)
        shares = (percent(v, 2) for v in (1 / len(weights), own, least, half, most))
        rows.append(table_row(cluster, count(len(weights)), *shares, percent(moved), numeric=numeric))
    columns = ["Cluster", "Devices", "If all alike", "Own weight, mean", "Others, least", "Others, median"]
    whole = table(
        f"Clusters of more than {MAX_MATRIX} devices; moved: weight that lies elsewhere than in a plain average",
        [*columns, "Others, most", "Moved"],
        rows,
        numeric,
    )
    return panel(None, whole)


def devices(run: Run) -> Markup:
    """Accuracy of every device: as sent, fine-tuned alone, fleetfit."""
    dots = {
        cluster: [
            DeviceDots(d.device_id, d.accuracy_coarse, d.accuracy_local, d.accuracy, d.num_test) for d in r.devices
        ]
        for cluster, r in run.reports.items()
    }
    floor = accuracy_floor([d for own in dots.values() for d in own])
    contents = {}
    for cluster, own in dots.items():
        drawing = (dot_plot if len(own) <= MAX_ROWS else quantile_plot)(cluster, own, floor)
        sent, alone, ships = (mean(getattr(d, f) for d in own) for f in ("coarse", "alone", "fleetfit"))
        means = f"Mean: as sent {percent(sent)}, fine-tuned alone {percent(alone)}, fleetfit {percent(ships)}."
        contents[cluster] = figure(drawing, means)
    legend = [
        element("li", legend_mark(ring), "as sent"),
        element("li", legend_mark(tick), "fine-tuned alone: same header, same epochs, no collaboration"),
        element("li", legend_mark(dot), "fleetfit, as shipped"),
    ]
    sizes = [d.num_test for d in run.devices if d.num_test > 0]
    if run.job.privacy.on:
        steps = "With privacy on, devices keep it to themselves."
    elif not sizes:
        steps = "No device has test samples."
    elif min(sizes) == max(sizes):
        steps = f"One test sample is {100 / max(sizes):.1f} points of a device’s accuracy."
    else:
        steps = f"One test sample is {100 / max(sizes):.1f} to {100 / min(sizes):.1f} points of a device’s accuracy."
    return section(
        "devices",
        "Device by device",
        paragraph(f"Accuracy on each device’s private test split, on which nothing was chosen. {steps}"),
        element("ul", *legend, class_="legend"),
        per_cluster(run, contents),
        _device_table(run),
        _faults(run),
    )


def _faults(run: Run) -> Markup | None:
    """Who did not finish, and whose replies were missing or refused; nothing where all went well."""
    absent = [a for report in run.reports.values() for a in report.absent]
    rows = [
        table_row(f.device_id, cluster, f.step, f.reason, count(f.times), "yes" if f.recovered else "no", numeric=(4,))
        for cluster, report in run.reports.items()
        for f in report.faults
    ]
    left_out = run.summary.left_out
    if not absent and not rows and not left_out:
        return None
    small = {d.device_id for d in left_out}
    names = ", ".join(f"{a.device_id} (since {a.since})" for a in absent if a.device_id not in small)
    columns = ["Device", "Cluster", "Step", "Why", "Times", "Made good"]
    caption = "Replies that were missing or refused; made good: asked again in the same step, the device replied"
    return join(
        *[note(f"Left out, {d.device_id}: {d.reason}.") for d in left_out],
        note(f"Did not finish, and got no model: {names}.") if names else None,
        element(
            "details", element("summary", "Replies that were missing or refused"), table(caption, columns, rows, (4,))
        ),
    )


def _device_table(run: Run) -> Markup:
    numeric = range(2, 5)
    rows = []
    for cluster, report in run.reports.items():
        for number, d in enumerate(report.devices, start=1):
            cells = (
                f"{cluster}, {number}",
                count(d.num_test),
                count(d.num_train),
                f"{d.kept_neurons} of {d.neurons}",
                "; ".join(d.notes),
            )
            rows.append(table_row(d.device_id, *cells, numeric=numeric))
    columns = ["Device", "Cluster, no.", "n test", "n train", "Neurons kept", "Notes"]
    whole = table("Samples, the header’s neurons, and what the device noted", columns, rows, numeric)
    noted = sum(bool(d.notes) for d in run.devices)
    hint = f"{plural(noted, 'device')} with notes" if noted else "no notes"
    return element("details", element("summary", f"Samples and notes of {plural(len(rows), 'device')} ({hint})"), whole)


def rounds(run: Run) -> Markup:
    """Validation loss round by round, and what was shipped and why."""
    contents = {}
    for cluster in run.summary.clusters:
        report = run.reports[cluster.id]
        scores = [(r.get("round"), r.get("num_samples", 0), r.get("loss_sum", math.nan)) for r in report.rounds]
        losses = [total / n if n else None for _, n, total in scores]
        chart = line_chart(
            f"{cluster.id}: pooled validation loss by round",
            [Series("pooled validation loss", losses, "accent")],
            ["as sent" if number == 0 else str(number) for number, _, _ in scores],
            "round, right after local training",
            "validation loss, nats per sample",
        )
        samples = max((n for _, n, _ in scores), default=0)
        caption = f"The whole cluster, on {plural(samples, 'pooled validation sample')}."
        hidden = _hidden_groups_words([run.hidden_groups.get(d.device_id) for d in report.devices], report.similarity)
        contents[cluster.id] = join(
            figure(chart, caption),
            note(hidden) if hidden else None,
            *_decision(cluster.id, report.decision, run.job.refine.guard, run.job.privacy.on),
        )
    refine = run.job.refine
    guard = (
        "The guard is on: what ships is no worse on the pooled validation than what was sent, or fine-tuned alone; "
        "among ways that differ by less than the error of the comparison, what the devices made together is preferred."
        if refine.guard
        else "The guard is off: refined headers ship in any case."
    )
    prior = (
        " A class prior, which tilts a header towards the classes that its device has seen, is tried at several "
        "strengths and numbers of classes, after the logits’ temperature."
        if refine.class_prior
        else ""
    )
    private = (
        " Privacy is on: losses are noised differences to the first way, and another ships only where it stands out."
        if run.job.privacy.on
        else ""
    )
    return section(
        "rounds",
        "Refining, and what was shipped",
        paragraph(
            f"Devices train and the edge averages, {plural(refine.rounds, 'round')} of both at most"
            f"{', until the validation loss settles' if refine.settle else ''}. What ships is decided for a cluster, "
            "or for each group of its devices that has samples enough, after the last averaging and pruning, on "
            f"validation samples pooled over its devices. {guard}{prior}{private}"
        ),
        per_cluster(run, contents),
    )


WORDS = {
    "coarse": "as sent",
    "quarter": "a quarter of the way",
    "half": "half way",
    "refined": "refined together",
    "own": "refined, then trained here",
    "local": "fine-tuned alone",
}


def way_words(way: Mapping[str, Any]) -> str:
    """A way to ship, for a person."""
    words = WORDS.get(str(way.get("header")), str(way.get("header")))
    if (strength := way.get("prior_strength")) is not None:
        classes = way.get("prior_classes")
        words += f", class prior k = {float(strength):.3g}"
        words += f" over {float(classes):.3g} classes" if classes is not None else ""
        words += ", inputs without labels counted" if way.get("shift_concentration") is not None else ""
    if (temperature := way.get("temperature", 1.0)) not in (None, 1.0):
        words += f", temperature {float(temperature):g}"
    return words


def _decision(cluster: str, decision: Mapping[str, Any], guard: bool, private: bool) -> list[Markup]:
    """What ships and what the other ways would have given, of the cluster and of each group that chose for itself."""
    whole: dict[str, Any] = {key: decision.get(key) or {} for key in ("devices", "way", "loss_by_way")}
    own = [g for g in decision.get("groups") or [] if isinstance(g, Mapping)]
    if not whole["loss_by_way"]:
        told = way_words(dict(whole["way"]))
        return [note(f"Shipped: {told}. No device has validation samples, so nothing spoke for a change.")]
    parts = [note(_grouping_words(decision))] if decision.get("grouping") else []
    for place in own or [whole]:
        way, losses = dict(place["way"] or {}), {str(k): float(v) for k, v in dict(place["loss_by_way"]).items()}
        names = [str(d) for d in place["devices"] or []]
        who = f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''}" if names else cluster
        rows = [
            table_row(_kind_words(kind), decimal(loss), numeric=(1,), class_="chosen" if kind == _kind(way) else None)
            for kind, loss in sorted(losses.items(), key=lambda pair: pair[1])
        ]
        caption = f"Shipped by {who}: {way_words(way)}"
        loss = "Difference of loss, noised" if private else "Pooled validation loss, nats per sample"
        parts.append(table(caption, ["Best of its kind", loss], rows, (1,)))
    return [element("div", *parts, class_="below")]


def _kind(way: Mapping[str, Any]) -> str:
    extra = " + inputs" if way.get("shift_concentration") else " + prior" if way.get("prior_strength") else ""
    return f"{way.get('header')}{extra}"


def _kind_words(kind: str) -> str:
    header, _, extra = kind.partition(" + ")
    return WORDS.get(header, header) + (f" + {extra}" if extra else "")


def _hidden_groups_words(hidden: Sequence[int | None], weights: Sequence[Sequence[float]]) -> str:
    """How far the devices whose headers were averaged are those of the hidden groups, in a sentence."""
    if None in hidden or len(hidden) != len(weights) or len(set(hidden)) < 2:
        return ""
    pairs = [(i, j) for i in range(len(hidden)) for j in range(i)]
    alike = sum((hidden[i] == hidden[j]) == (max(weights[i][j], weights[j][i]) > 0) for i, j in pairs)
    told = "exactly these" if alike == len(pairs) else f"as in these for {alike:,} of {len(pairs):,} pairs of devices"
    return f"This simulated fleet has {len(set(hidden))} hidden groups here; who was averaged with whom is {told}."


def _grouping_words(decision: Mapping[str, Any]) -> str:
    """The evidence for groups, in a sentence."""
    silhouettes = {int(k): float(v) for k, v in dict(decision.get("silhouettes") or {}).items()}
    best = max(silhouettes, key=silhouettes.__getitem__, default=1)
    number = int(decision.get("num_found") or best)
    if number in silhouettes:
        shown = f"{number} groups, with a silhouette of {silhouettes[number]:.2f}"
    else:
        shown = (
            f"best silhouette {silhouettes[best]:.2f}, of {best} groups" if silhouettes else "too few devices to tell"
        )
    return {
        "one": f"One group: the devices’ header changes show no others ({shown}).",
        "found": f"Groups found from header changes ({shown}); no validation told whether they are better.",
        "kept": f"Groups found from header changes ({shown}), and better on held-out samples than one average.",
        "dropped": f"Groups were found from header changes ({shown}), but no better than one average: not used.",
    }.get(str(decision.get("grouping")), "")
