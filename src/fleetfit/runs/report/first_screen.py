"""What the page begins with: the verdict, every device by name, and the commands that come next."""

from fleetfit.core.records import Record
from fleetfit.runs.report.markup import Markup, plural
from fleetfit.runs.report.rendering import fill
from fleetfit.runs.report.run_data import Run
from fleetfit.runs.report.verdict import LOOKS, DeviceRow, device_rows, next_commands, verdict

MANY_ROWS = 25  # a longer table scrolls by itself


class Choice(Record):
    """An entry of the filter: a key of LOOKS, or the empty one for all devices and "any" for all with something."""

    value: str
    title: str
    number: int


def opening(run: Run) -> Markup:
    """The run's name and the verdict."""
    return fill("opening.html", run=run, verdict=verdict(run.summary))


def fleet(run: Run) -> Markup:
    """The table of devices: sorted and filtered by a script, plain without one."""
    rows = device_rows(run.summary)
    clusters = plural(len(run.summary.clusters), "cluster")
    return fill(
        "fleet.html",
        rows=rows,
        caption=f"{plural(len(rows), 'device')} in {clusters}; accuracies on each device’s private test split",
        choices=_choices(rows),
        looks=LOOKS,
        many=len(rows) > MANY_ROWS,
    )


def _choices(rows: list[DeviceRow]) -> list[Choice]:
    """What there is to filter by; kinds that no device has are left out."""
    kinds = [Choice(value=kind, title=says, number=sum(row.has(kind) for row in rows)) for kind, says in LOOKS.items()]
    return [
        Choice(value="", title="all devices", number=len(rows)),
        Choice(value="any", title="anything to look at", number=sum(bool(row.looks) for row in rows)),
        *(kind for kind in kinds if kind.number),
    ]


def next_steps(run: Run) -> Markup:
    """What one may want to do next, each with its command."""
    return fill("next.html", commands=next_commands(run.summary, run.folder))


def glossary() -> Markup:
    """The words and the paper's symbols, closed until asked for."""
    return fill("glossary.html")
