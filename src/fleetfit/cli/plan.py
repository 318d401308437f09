"""``fleetfit plan``."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from fleetfit.cli.options import AsJson, Debug, JobFile, Overrides, Quiet, stdout
from fleetfit.cli.terminal import Phases, format_bytes, format_duration, reporting

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fleetfit.runs.plan import Plan

MOST_DEVICES = 30  # in a table; all are in --json


def plan(
    job: JobFile,
    overrides: Overrides = None,
    estimate: Annotated[
        bool, typer.Option("--estimate/--no-estimate", help="Measure for some seconds how long a run takes.")
    ] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """See what a run would do, before anything is trained.

    Reads the data, the model's configuration and the fleet of [bold]JOB[/bold] (a TOML file, or
    a recipe's name), and tells what was read, which devices there are, which shapes
    fit each cluster, how long a run takes here, and all that is wrong at once.
    Nothing is written but decoded images, into run.cache.

    Ends with exit code 1 if the run would fail.

    [bold]Examples[/bold]

      fleetfit plan digits
      fleetfit plan my-job.toml --json > plan.json
    """
    with reporting(debug) as signals:
        from fleetfit.config.job import load_job

        resolved = load_job(job, tuple(overrides or ()))
        with Phases(signals, enabled=not quiet and not as_json) as phases:
            phases("libraries", 0, 1)
            with signals.after_this():
                from fleetfit.runs.plan import make_plan

            phases("libraries", 1, 1)
            found = make_plan(resolved, phases, estimate)
        if as_json:
            typer.echo(json.dumps(found.model_dump(mode="json"), indent=2))
        else:
            print_plan(found)
        if found.problems:
            raise typer.Exit(1)


def print_plan(found: "Plan", console: "Console | None" = None) -> None:
    """A plan for a person: what was read, who is there, what fits, how long; and last what is wrong."""
    from rich.text import Text

    console = console or stdout()
    console.print()
    if found.data:
        for line in found.data.lines:
            console.print(Text(line))
        console.print()
    console.print(_clusters(found))
    if len(found.devices) <= MOST_DEVICES:
        console.print(_devices(found))
    else:
        console.print(f"{len(found.devices)} devices; each one: --json", style="dim")
    for phase in found.phases:
        note = f"  {phase.note}" if phase.note else ""
        console.print(f"{phase.phase.replace('_', ' '):<16} about {format_duration(phase.seconds):>12}{note}")
    if found.phases:
        console.print(f"{'in all':<16} about {format_duration(found.seconds):>12}  {found.hardware}")
        console.print(f"{'memory':<16} about {format_bytes(found.peak_memory_bytes or 0):>12}")
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for problem in found.problems:
        console.print(Text("problem: ", "bold red").append(problem, "not bold default"), soft_wrap=True)
    if not found.problems:
        console.print("nothing is wrong: fleetfit run does it", style="green")


def _clusters(found: "Plan") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("cluster", overflow="fold", min_width=8)
    has_memory = any(s.memory_bytes for c in found.clusters for s in c.shapes)
    has_seconds = any(c.seconds for c in found.clusters)
    more = ["memory"] * has_memory + ["a sample"] * has_seconds  # of the largest
    usable = [] if more else ["usable"]
    for name in ("devices", "limit", *usable, "shapes", "smallest", "largest", *more):
        table.add_column(name, justify="right", no_wrap=True)
    for cluster in found.clusters:
        ends = [
            f"{s.shape.width:g}×{s.shape.depth} {format_bytes(s.size_bytes)}"
            for s in (cluster.shapes[:1] + cluster.shapes[-1:])
        ]
        row = [format_bytes(cluster.limit_bytes)] + [format_bytes(cluster.usable_bytes)] * len(usable)
        row.append(str(len(cluster.shapes)))
        last = [format_bytes(cluster.shapes[-1].memory_bytes)] * has_memory if cluster.shapes else []
        last += [format_seconds(cluster.seconds[-1]) if cluster.seconds else "–"] * has_seconds
        table.add_row(Text(cluster.id), str(cluster.devices), *row, *(ends or ["nothing fits", ""]), *last)
    return table


def format_seconds(seconds: float) -> str:
    """A short time, as a job writes it."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _devices(found: "Plan") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("device", overflow="fold")
    table.add_column("cluster", overflow="fold")
    for name in ("limit", "training", "validation", "test", "classes"):
        table.add_column(name, justify="right", no_wrap=True)
    for device in found.devices:
        known = (device.train_samples, device.validation_samples, device.test_samples, device.classes)
        numbers = ("–" if number is None else f"{number:,}" for number in known)
        style = "red" if device.problem else None
        table.add_row(Text(device.id), Text(device.cluster), format_bytes(device.limit_bytes), *numbers, style=style)
    return table
