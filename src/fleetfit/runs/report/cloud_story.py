"""What the cloud did: what each cluster got and why, every width and depth, what mattered in training."""

from collections.abc import Sequence

from fleetfit.runs.report.figures import (
    FrontPoint,
    Series,
    front_figure,
    heat_map,
    legend_mark,
    line_chart,
    mark,
)
from fleetfit.runs.report.layout import (
    MAX_CARDS,
    bar,
    figure,
    grid,
    header_name,
    note,
    panel,
    paragraph,
    per_cluster,
    section,
    shape_text,
    table,
    table_row,
)
from fleetfit.runs.report.markup import (
    Child,
    Markup,
    bytes_text,
    count,
    decimal,
    element,
    join,
    joules_text,
    percent,
    plural,
)
from fleetfit.runs.report.run_data import FrontRow, Run
from fleetfit.runs.report.summary import ClusterLine, mean

# Rule in front.csv -> its letter in the figure, its name, and what it chooses.
CHOOSERS = {
    "pareto_grid": ("P", "Pareto", "of those about as good as the best, the nearest to the ideal"),
    "greedy_accuracy": ("A", "accuracy", "the most accurate that fits"),
    "greedy_size": ("S", "size", "the largest that fits"),
    "random": ("R", "random", "any that fits"),
    "smallest": ("M", "smallest", "the smallest"),
    "optimum": ("O", "optimum", "the best trade-off score (a) that fits"),
}


def clusters(run: Run) -> Markup:
    """A card for each cluster: shape, size against the limit, scores; with many clusters a table before them."""
    cards = {c.id: _card(run, c) for c in run.summary.clusters}
    epochs = plural(run.job.fleet.energy.epochs, "training epoch")
    return section(
        "clusters",
        "What each cluster got",
        _overview(run) if len(cards) > MAX_CARDS else None,
        per_cluster(run, cards),
        note(
            "The bar: the largest model file that ships to the cluster’s devices, header included. As cut: the "
            "sub-network when it was chosen, with its loss and accuracy on the public validation split, "
            "before it was specialised. "
            f"Energy: the paper’s formula for {epochs} on the cluster’s hungriest device, not a measurement. Test "
            "accuracy: mean over the devices’ private test splits."
        ),
    )


def _overview(run: Run) -> Markup:
    """The clusters, a line each."""
    numeric = range(1, 6)
    rows = []
    for number, cluster in enumerate(run.summary.clusters, start=1):
        own = run.reports[cluster.id].devices
        cells = (
            count(len(own)),
            f"{cluster.width:g} × {cluster.depth}",
            f"{bytes_text(max((d.size_bytes for d in own), default=cluster.size_bytes))} / "
            f"{bytes_text(min((d.limit_bytes for d in own), default=cluster.limit_bytes))}",
            percent(mean(d.accuracy_coarse for d in own)),
            percent(mean(d.accuracy for d in own)),
            header_name(run.reports[cluster.id].header),
        )
        rows.append(table_row(f"{number} · {cluster.id}", *cells, numeric=numeric))
    columns = ["Cluster", "Devices", "w × d", "Largest model / least limit", "As sent", "fleetfit", "Header"]
    return panel(None, table("Every cluster; accuracies are means of its devices", columns, rows, numeric))


def _card(run: Run, cluster: ClusterLine) -> Markup:
    report = run.reports[cluster.id]
    devices = report.devices
    largest = max((d.size_bytes for d in devices), default=cluster.size_bytes)
    limit = min((d.limit_bytes for d in devices), default=cluster.limit_bytes)
    fits = all(d.size_bytes <= d.limit_bytes for d in devices)
    share = largest / limit
    pairs: list[tuple[str, Child]] = [
        ("Devices", count(len(devices))),
        ("Training samples", count(sum(d.num_train for d in devices))),
        ("Width w, depth d", f"{cluster.width:g}, {plural(cluster.depth, 'layer')}"),
        ("Parameters as cut", count(cluster.parameters)),
        ("… of the reference", percent(cluster.parameters / run.summary.reference.parameters, 0)),
        ("Size as cut", bytes_text(cluster.size_bytes)),
        ("Validation loss", f"{decimal(cluster.loss)} nats"),
        ("Validation accuracy", percent(cluster.accuracy)),
        ("Energy", joules_text(cluster.energy_joules)),
        ("Header", header_name(report.header)),
        ("Test accuracy", element("b", percent(mean(d.accuracy for d in devices)))),
    ]
    used = element("b", f"{percent(share, 0)} of limit", class_="good" if fits else "bad")
    return join(
        element("div", f"{bytes_text(largest)} of {bytes_text(limit)}", used, class_="ends"),
        bar(share, None if fits else "over"),
        element("dl", *(join(element("dt", k), element("dd", v)) for k, v in pairs)),
    )


def front(run: Run) -> Markup:
    """For each cluster: all candidates, the Pareto front grid, and who chooses which."""
    contents = {}
    for cluster in run.summary.clusters:
        rows = run.front[cluster.id]
        candidates = [
            FrontPoint(shape_text(r.width, r.depth), r.size_bytes, r.loss, r.fits, r.on_front, _letters(r), r.chosen)
            for r in rows
        ]
        usable = cluster.limit_bytes * (1 - run.job.header.room)
        drawing = front_figure(cluster.id, candidates, cluster.limit_bytes, usable)
        contents[cluster.id] = join(figure(drawing), _choosers(rows, run.job.backbone.choice))
    backbone, room = run.job.backbone, run.job.header.room
    free = f"Between the thin line and the limit, {percent(room, 0)} of it stay free for a header. " if room else ""
    legend = [
        element("li", legend_mark(mark("front")), "on the Pareto front grid"),
        element("li", legend_mark(mark("fits")), "fits, but another is better"),
        element("li", legend_mark(mark("over")), "over the limit"),
        element("li", legend_mark(mark("choice")), f"chosen, by the rule {backbone.choice}"),
        *(element("li", element("b", letter, class_="letter"), f"{says}") for letter, _, says in CHOOSERS.values()),
    ]
    return section(
        "front",
        "How each backbone was chosen",
        paragraph(
            "Every width and depth is one candidate, evaluated once on the public validation split. The Pareto front "
            "grid keeps a candidate that fits unless another is at least as good in loss, energy and size, all counted "
            f"in steps (of {backbone.gamma_p:g} nats or less for the loss). Letters say what each rule would choose."
        ),
        element("ul", *legend, class_="legend"),
        per_cluster(run, contents),
        note(
            free,
            "Trade-off (a): loss + energy + size, each scaled to 0..1 over all candidates, also those that do not fit; "
            "lower is better. (b): accuracy − ½ (size + energy), scaled likewise; higher is better.",
        ),
    )


def _letters(row: FrontRow) -> str:
    return "".join(CHOOSERS[n][0] if n in CHOOSERS else n[:1].upper() for n in row.chosen_by.split())


def _choosers(rows: Sequence[FrontRow], choice: str) -> Markup:
    numeric = range(1, 6)
    lines = [
        table_row(
            join(element("b", letter, class_="letter"), f" {title}"),
            f"{row.width:g} × {row.depth}",
            decimal(row.loss),
            bytes_text(row.size_bytes),
            decimal(row.trade_off, 2),
            decimal(row.trade_off_accuracy, 2),
            numeric=numeric,
            class_="chosen" if name == choice else None,
        )
        for name, (letter, title, _) in CHOOSERS.items()
        for row in rows
        if name in row.chosen_by.split()
    ]
    drawn = table("Who chooses which", ["Rule", "w × d", "Loss", "Size", "(a) ↓", "(b) ↑"], lines, numeric)
    return element("div", drawn, class_="tight")


def accuracy_map(run: Run) -> Markup:
    """Accuracy over width and depth, with what clusters chose."""
    rows = next(iter(run.front.values()), ())
    widths = sorted({r.width for r in rows})
    depths = sorted({r.depth for r in rows})
    place = {(r.depth, r.width): r.accuracy for r in rows}
    numbers: dict[tuple[int, int], list[int]] = {}
    for number, c in enumerate(run.summary.clusters, start=1):
        if (c.depth, c.width) in place:
            numbers.setdefault((depths.index(c.depth), widths.index(c.width)), []).append(number)
    marks = {
        key: " ".join(map(str, own[:3])) + (f" +{len(own) - 3}" if len(own) > 3 else "") for key, own in numbers.items()
    }
    drawing = heat_map(
        "Validation accuracy of the elastic backbone by depth and width, in percent",
        [[place.get((d, w)) for w in widths] for d in depths],
        [str(d) for d in depths],
        [f"{w:g}" for w in widths],
        lambda v: f"{100 * v:.1f}",
        "depth, layers",
        "width, share of heads and neurons",
        marks,
    )
    numeric = (1, 2, 3)
    chosen = [
        table_row(f"{i} · {c.id}", f"{c.width:g}", str(c.depth), percent(c.accuracy), numeric=numeric)
        for i, c in enumerate(run.summary.clusters, start=1)
    ]
    caption = "Percent right on the public validation split. Framed: what the clusters with these numbers chose."
    return section(
        "map",
        "One backbone, every width and depth",
        paragraph(
            "All cells share one set of weights and none of them is specialised yet. Widths cut attention heads and "
            "neurons, the least important first; depths cut layers."
        ),
        panel(
            None,
            element(
                "div",
                figure(element("div", drawing, class_="scroll"), caption),
                table("What clusters chose", ["Cluster", "Width", "Depth", "Val. accuracy"], chosen, numeric),
                class_="beside",
            ),
        ),
    )


def training(run: Run) -> Markup:
    """Training curves and the importance of attention heads."""
    panels = []
    for title, curve in (("Reference model", run.reference.curve), ("Elastic backbone", run.elastic.curve)):
        if len(curve) > 1:
            names = ["start", *("" for _ in curve[2:]), "end"]
            loss = Series("training loss", curve, "accent")
            panels.append(
                panel(title, figure(line_chart(f"{title}: training loss", [loss], names, "", "training loss")))
            )
    importance = run.elastic.head_importance
    heads = max(map(len, importance), default=0)
    if heads:
        drawing = heat_map(
            "Importance of attention heads by layer",
            [[row[j] if j < len(row) else None for j in range(heads)] for row in importance],
            [str(i + 1) for i in range(len(importance))],
            [str(j + 1) for j in range(heads)],
            lambda v: f"{v:.1g}",
            "layer",
            "attention head, as in the reference",
            cell=(max(38.0, min(62.0, 270 / heads)), 30),
        )
        order = {"first": "the first ones", "spread": "evenly spread ones"}.get(run.elastic.depth_order, "some")
        caption = (
            f"How much the loss is estimated to change when a head is removed ({run.job.backbone.importance}). Of the "
            f"layers, a shallower model keeps {order}."
        )
        panels.append(panel("Attention heads", figure(element("div", drawing, class_="scroll"), caption)))
    return section(
        "training",
        "Inside the cloud’s training",
        grid(*panels),
        note(
            "The elastic backbone’s loss adds up several sub-networks of changing size and what they are taught by, so "
            "it is noisy and not comparable with the reference’s."
        ),
    )
