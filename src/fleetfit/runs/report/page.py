"""The page: verdict, devices and next commands; the story in its order, what it cost, and the job it was."""

import math
from collections.abc import Mapping

from fleetfit.core.files import own_version
from fleetfit.runs.report import cloud_story, data_story, edge_story, first_screen, rendering
from fleetfit.runs.report.layout import bar_row, grid, note, panel, paragraph, section, table, table_row
from fleetfit.runs.report.markup import (
    NOT_KNOWN,
    Child,
    Markup,
    bytes_text,
    count,
    element,
    join,
    known,
    percent,
    plural,
    points,
    seconds_text,
)
from fleetfit.runs.report.run_data import Run, paired_gain
from fleetfit.runs.report.style import STYLE
from fleetfit.runs.report.summary import Summary, mean

PHASES = {
    "attributes": "Devices tell their attributes",
    "reference": "Train the reference",
    "elastic": "Train the elastic backbone",
    "candidates": "Evaluate every width and depth",
    "specialise": "Specialise the chosen backbones",
    "header_search": "Search headers",
    "refine": "Refine with the devices",
    "propose": "Decide what to ship",
    "finish": "Build and test what ships",
}
LINKS = {
    "cloud_to_edge_bytes": ("Cloud → edges", "backbones"),
    "edge_to_cloud_bytes": ("Edges → cloud", "statistics and reports"),
    "edge_to_device_bytes": ("Edges → devices", "models and personal averages"),
    "device_to_edge_bytes": ("Devices → edges", "sketches, importance, headers"),
}
NAVIGATION = {
    "fleet": "Devices",
    "next": "What next",
    "overview": "Overview",
    "how": "How",
    "data": "Data",
    "clusters": "Clusters",
    "front": "Choice",
    "map": "Widths and depths",
    "headers": "Headers",
    "similarity": "Similarity",
    "devices": "Accuracy",
    "rounds": "Refinement",
    "cost": "Traffic and time",
    "training": "Cloud training",
    "glossary": "Glossary",
    "job": "Job",
}


def render(run: Run) -> str:
    """The whole page."""
    sections = {i: title for i, title in NAVIGATION.items() if i != "data" or run.summary.data is not None}
    links = [element("li", element("a", title, href=f"#{id_}")) for id_, title in sections.items()]
    program = rendering.script("fleet.js")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {rendering.script_hash(program)}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("title", f"fleetfit: {run.name}"),
        element("style", STYLE),
    )
    parts = (
        first_screen.fleet,
        first_screen.next_steps,
        _overview,
        _how,
        data_story.data,
        cloud_story.clusters,
        cloud_story.front,
        cloud_story.accuracy_map,
        edge_story.headers,
        edge_story.similarity,
        edge_story.devices,
        edge_story.rounds,
        _cost,
        cloud_story.training,
    )
    navigation = element("nav", element("ul", *links), aria_label="Sections")
    body = element(
        "body",
        element("header", first_screen.opening(run), navigation),
        element("main", *(tell(run) for tell in parts), first_screen.glossary()),
        _footer(run),
        element("script", program),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _overview(run: Run) -> Markup:
    summary = run.summary
    return section(
        "overview",
        f"One model, {plural(len(run.devices), 'device')}, {plural(len(summary.clusters), 'cluster')}",
        element(
            "p",
            f"A reference Transformer with {count(summary.reference.parameters)} parameters was cut to one backbone "
            "per cluster of devices, given a header (the part that turns features into classes), and fitted to every "
            "device’s private data, which stayed where it was.",
            class_="lede",
        ),
        _headline(run),
    )


def _headline(run: Run) -> Markup:
    devices, summary = run.devices, run.summary
    bars = [
        bar_row(name, value if value is not None else 0.0, percent(value), kind=kind)
        for field, name, kind in (
            ("accuracy_coarse", "As sent", "grey"),
            ("accuracy_local", "Fine-tuned alone", "second"),
            ("accuracy", "fleetfit", None),
        )
        for value in [mean(getattr(d, field) for d in devices)]
    ]
    tested = [d for d in devices if d.accuracy is not None and known(d.accuracy)]
    caption = (
        f"Mean accuracy of {plural(len(tested), 'device')}, each counted alike, on their private test splits "
        f"({plural(sum(d.num_test for d in tested), 'sample')} in all)"
    )
    within = run.num_within_limit
    upload = summary.traffic.get("device_to_edge_bytes", math.nan)
    smallest, largest = (f(d.parameters for d in devices) if devices else 0 for f in (min, max))
    tiles: list[tuple[Child, str]] = [
        (count(len(devices)), f"devices in {plural(len(summary.clusters), 'cluster')}"),
        (
            element(
                "span", f"{count(within)} of {count(len(devices))}", class_="good" if within == len(devices) else "bad"
            ),
            "within their storage limit",
        ),
        (percent(run.reference.accuracy), f"reference, {count(summary.reference.parameters)} parameters, public test"),
        (
            count(largest) if smallest == largest else f"{count(smallest)} – {count(largest)}",
            "parameters of each model that ships",
        ),
        (bytes_text(upload) if known(upload) else NOT_KNOWN, "sent by all devices together"),
        (seconds_text(sum(summary.seconds.values())), f"of wall time{_cpu_time(summary)}, all steps added up"),
    ]
    accuracy = element("table", element("caption", caption), element("tbody", *bars))
    return element(
        "div",
        panel(None, accuracy, note(_gains(run))),
        element("div", *(_tile(value, says) for value, says in tiles), class_="tiles"),
        class_="hero",
    )


def _tile(value: Child, says: str) -> Markup:
    return element("div", element("b", value), element("p", says), class_="tile")


def _gains(run: Run) -> str:
    parts = []
    for field, name in (("accuracy_coarse", "the model as sent"), ("accuracy_local", "the one fine-tuned alone")):
        gain = paired_gain(run.devices, field)
        if gain is not None:
            error = f" (standard error {100 * gain.error:.1f})" if gain.num_devices > 1 else ""
            parts.append(f"{points(gain.mean)} over {name}{error}")
    if run.job.privacy.on:
        return "With privacy on, devices keep their accuracies to themselves."
    if not parts:
        return "No device has test samples, so accuracies are not known."
    return (
        f"fleetfit, compared device by device: {', '.join(parts)}. One run with one seed: a difference below about two "
        "standard errors may be chance. Nothing was chosen on test samples."
    )


def _how(run: Run) -> Markup:
    job = run.job
    steps = (
        (
            "Cloud.",
            "Trains the reference on public data, sorts attention heads and neurons by importance, and trains on until "
            "every width and depth of the model works. For each cluster it picks the one that suits storage limit, "
            "energy and loss, and sends that backbone down.",
        ),
        (
            "Edge.",
            "One for each cluster. On a small shared data set it looks for a header that suits the backbone "
            f"(search: {job.header.search}), and sends both to its devices.",
        ),
        (
            "Device.",
            "Keeps the backbone frozen and trains the header on its private data, "
            f"{plural(job.refine.rounds, 'round')}. Up "
            "go sketches of features, the importance of the header’s parts and, if the job says so, the header’s "
            "weights; down comes an average in which similar devices count more. Samples and labels never leave.",
        ),
    )
    items = [element("li", element("b", who), " ", what) for who, what in steps]
    return section("how", "How the models came about", element("ol", *items, class_="how"))


def _cost(run: Run) -> Markup:
    traffic, seconds, cpu_seconds = run.summary.traffic, run.summary.seconds, run.summary.cpu_seconds
    most = max((traffic.get(link, 0.0) for link in LINKS), default=0.0) or 1.0
    links = [
        bar_row(join(title, element("div", what, class_="note")), number / most, bytes_text(number))
        for link, (title, what) in LINKS.items()
        for number in [traffic.get(link, 0.0)]
    ]
    numeric = (1, 2)
    phases = [
        table_row(PHASES.get(phase, phase), bytes_text(up), bytes_text(down), numeric=numeric)
        for phase, own in run.bytes_by_phase.items()
        for up, down in [(own.get("device_to_edge", 0), own.get("edge_to_device", 0))]
        if up or down
    ]
    longest = max(seconds.values(), default=0.0) or 1.0
    times = [
        bar_row(
            PHASES.get(p, p),
            s / longest,
            seconds_text(s),
            seconds_text(cpu_seconds[p]) if p in cpu_seconds else NOT_KNOWN,
        )
        for p, s in seconds.items()
    ]
    notes = []
    if cpu_seconds:
        notes.append(
            "CPU time is that of all threads of the processes that ran the steps; of devices too, where they run in "
            "the same process."
        )
    if taken := run.summary.from_cache:
        names = ", ".join(PHASES.get(phase, phase).lower() for phase in taken)
        notes.append(f"Taken from the cache, where an earlier run had computed the same: {names}.")
    if run.summary.peak_memory_bytes:
        notes.append(f"Peak memory of the process: {bytes_text(run.summary.peak_memory_bytes)}.")
    total = seconds_text(sum(seconds.values()))
    return section(
        "cost",
        "Traffic and time",
        _upload(traffic),
        grid(
            panel("By link", table("Bytes of encoded messages", ["Link", "", "Bytes"], links, (2,))),
            panel(
                "Between edges and devices",
                table("Bytes of encoded messages by step", ["Step", "Up", "Down"], phases, numeric),
            ),
            panel(
                "Time",
                table(
                    f"{total} of wall time{_cpu_time(run.summary)}, clusters added up",
                    ["Step", "", "Wall time", "CPU time"],
                    times,
                    (2, 3),
                ),
                note(" ".join(notes)) if notes else None,
            ),
        ),
    )


def _cpu_time(summary: Summary) -> str:
    """CPU time, where all of it is known."""
    if summary.seconds.keys() != summary.cpu_seconds.keys():
        return ""
    return f", {seconds_text(sum(summary.cpu_seconds.values()))} of CPU time"


def _upload(traffic: Mapping[str, float]) -> Markup:
    sent, raw, ratio = (
        traffic.get(key, math.nan) for key in ("device_to_edge_bytes", "raw_data_bytes", "upload_ratio")
    )
    if not (known(sent) and known(raw) and known(ratio)):
        return paragraph("The upload ratio is not known.")
    shown = f"{ratio:.3g} times the raw bytes" if ratio >= 1 else f"{percent(ratio)} of the raw bytes"
    says = (
        "That is more than sending the data itself: the samples are so small that features and headers outweigh them. "
        "What speaks for keeping the data where it is here is privacy, not traffic."
        if ratio >= 1
        else "The rest is what this link saves against collecting the data."
    )
    return paragraph(
        f"Devices sent {bytes_text(sent)} in all; their data has {bytes_text(raw)} as it is. Upload ratio: ",
        element("b", shown),
        f". {says} The edges’ own shared data sets are not counted in either number.",
    )


def _footer(run: Run) -> Markup:
    toml = element("pre", element("code", run.job.to_toml()), tabindex=0)
    return element(
        "footer",
        element("details", element("summary", "The resolved job"), toml),
        paragraph(
            f"Written by fleetfit {own_version()} from job.toml, summary.json, metrics.jsonl and cloud/front.csv of "
            f"run {run.name}. The page loads nothing from elsewhere. 1 KB = 1000 bytes. Losses are cross-entropy in "
            "nats. The method is that of ACME, arXiv 2507.14802."
        ),
        id="job",
    )
