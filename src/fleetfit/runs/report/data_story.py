"""What was read: files, columns and why, what was left out and why, classes, and what looked odd."""

from fleetfit.core.records import DataSummary, counted
from fleetfit.runs.report.layout import bar_row, grid, note, panel, paragraph, section, table, table_row
from fleetfit.runs.report.markup import Child, Markup, count, element, plural
from fleetfit.runs.report.run_data import Run

MOST_CLASSES = 20


def data(run: Run) -> Markup | None:
    """The data that the run is of, as it was read here; nothing in a run of an earlier version."""
    read = run.summary.data
    if read is None:
        return None
    cards = [panel("Classes", _classes(read)), panel("How it was read", _facts(read))]
    if read.notes:
        noted = element("ul", *(element("li", line) for line in read.notes), class_="noted")
        cards.append(panel("What was noted", noted))
    return section(
        "data",
        "What was read",
        paragraph(_left_out(read)),
        grid(*cards),
        note(
            "The cloud’s own data; what edges and devices have read is told on their machines."
            if not run.has_all_data
            else "All samples of the run, before they were shared out to cloud, edges and devices.",
            f" Content fingerprint {read.fingerprint[:16]}.",
        ),
    )


def _left_out(read: DataSummary) -> str:
    used = f"{plural(read.num_samples, 'sample')} of {counted(read.num_rows, read.unit)} from {read.origin}."
    if not read.left_out:
        return f"{used} Nothing was left out."
    return f"{used} Left out: {', '.join(counted(number, why) for why, number in read.left_out.items())}."


def _facts(read: DataSummary) -> Markup:
    rows: list[tuple[str, Child]] = [("Source", read.source)]
    if read.num_files:
        rows.append(("Files", count(read.num_files)))
    if read.input_column:
        rows.append(("Inputs", f"column {read.input_column} ({read.input_why})"))
    if read.label_column:
        rows.append(("Labels", f"column {read.label_column} ({read.label_why})"))
    elif read.label_why:
        rows.append(("Labels", read.label_why))
    rows += [(name[:1].upper() + name[1:], f"{value:g}") for name, value in read.values.items()]
    return table("What was taken, and why", ["what", "as read"], [table_row(name, value) for name, value in rows])


def _classes(read: DataSummary) -> Markup:
    most = max(read.classes.values(), default=1) or 1
    shown = list(read.classes.items())[:MOST_CLASSES]
    more = len(read.classes) - len(shown)
    caption = f"Samples of {count(len(read.classes))} classes"
    if more:
        caption += f"; {more} more are in summary.json"
    return table(caption, ["class", "", "samples"], [bar_row(n, v / most, count(v)) for n, v in shown], numeric=(2,))
