"""``fleetfit run`` and ``fleetfit report``."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click import Choice

from fleetfit.cli.options import (
    AsJson,
    Debug,
    JobFile,
    Overrides,
    Quiet,
    RunFolder,
    expect_run,
    percent,
    stdout,
)
from fleetfit.cli.terminal import Phases, format_bytes, reporting

if TYPE_CHECKING:
    from rich.table import Table

    from fleetfit.config.job import Job


def run(
    job: JobFile,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="The run folder. Default: runs/<name of JOB>."),
    ] = None,
    overrides: Overrides = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine", click_type=Choice(["local", "simulation", "flower"]), help="Where devices compute; see below."
        ),
    ] = "local",
    num_cpus: Annotated[
        float | None,
        typer.Option("--num-cpus", metavar="N", help="Simulation: CPUs of a device at work. Default: run.threads."),
    ] = None,
    num_gpus: Annotated[
        float | None,
        typer.Option("--num-gpus", metavar="X", help="Simulation: GPUs of a device at work, 0.25, say. Default: 0."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="RAY", help="Simulation: a Ray cluster, or auto. Default: this machine."),
    ] = None,
    cloud: Annotated[
        Path | None,
        typer.Option("--cloud", metavar="KIT", help="Flower: the cloud's kit."),
    ] = None,
    again: Annotated[
        bool,
        typer.Option("--again", help="Begin anew: a run that is in DIR is kept as DIR.before-1; see below."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every key, explained, and what a run would do; run nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a job: one Transformer and a fleet in, a model for every device out.

    [bold]JOB[/bold] is a TOML file, or a recipe's name ([bold]fleetfit recipes[/bold]).
    The cloud makes a backbone for each cluster of devices, its edge finds a
    header for it, and the devices refine it on their own data.
    What comes out is a folder:

      report.html         the figures, to look at
      summary.json        the figures, to compute with
      devices/<device>/   a model each, for fleetfit.load(folder) in Python
      job.toml            the job with every key, to run it again

    [bold]Examples[/bold]

      fleetfit run digits
      fleetfit run digits -s method=paper -s seed=1 -o runs/paper
      fleetfit run digits --json > summary.json
      fleetfit run digits --engine simulation

    [bold]Engines[/bold] give the same models with the same seed.

      local        all in this process, one device after the other
      simulation   devices in processes of Ray, as many at a time as there is
                   room for, on this machine or a Ray cluster (--address). All
                   machines of a cluster have fleetfit\\[flower] and share the
                   storage of the run folder and of run.cache. Ray is started
                   with the run and ends with it.
      flower       edges and devices that are programs of their own, on their
                   own machines: made by fleetfit provision, started with
                   fleetfit start. Each device keeps its model. This is the
                   cloud (--cloud).

    [bold]To go on[/bold] after Ctrl-C, a crash or a full disk, give the same command again:
    what was finished is read back, not computed again.

    [bold]To change something[/bold], choose another --out, or give --again: what the cloud
    trains and headers that edges find are kept in run.cache by what they are made
    of, so only what changed is computed. It is told what was taken and why the
    rest was not; [bold]fleetfit cache[/bold] lists and clears.

    [bold]The keys that matter most[/bold] (all of them, explained: --dry-run)

      method                  fleetfit; paper: every choice as the paper makes it
      seed                    same job and seed, same models
      data.source             digits; a file or a pattern of files (csv, tsv,
                              xlsx, xlsm, json, jsonl, ndjson, parquet, arrow),
                              a folder, a data set's id on the Hugging Face hub,
                              or a Python function, module:function
      data.input_column       the column of images or texts, where names and
      data.label_column       types do not tell; and the column of labels
      data.split              iid, classes, dirichlet, natural: what a device sees
      fleet.devices           count, storage_limit, gpu_capacity or a profile
      model.family            vit, deit, dinov2 (images);
                              bert, roberta, distilbert (texts)
      model.config            the size of the reference Transformer; by itself
                              a small one, for images of 8x8 pixels in grey
      model.pretrained        start from a folder or a hub id instead
      backbone.widths         shares of heads and neurons to choose from
      backbone.depths         numbers of layers to choose from
      header.search           halving, random, enas, distilled, a fixed header
      header.budget_steps     training steps of the header search
      refine.rounds           rounds of the devices' collaboration
      refine.epochs           a device's training epochs in a round
      run.threads             CPU threads
      run.torch_device        auto, cpu, cuda, mps
      run.cache               where results of steps are kept, for all runs
    """
    given = {"--num-cpus": num_cpus, "--num-gpus": num_gpus, "--address": address}
    if engine != "simulation" and any(value is not None for value in given.values()):
        name = next(name for name, value in given.items() if value is not None)
        raise typer.BadParameter("goes with --engine simulation", param_hint=name)
    if (engine == "flower") != (cloud is not None):
        raise typer.BadParameter("--engine flower and --cloud KIT go together", param_hint="--cloud")
    with reporting(debug, resumable=not dry_run) as signals:
        from fleetfit.config.job import load_job

        resolved = load_job(job, tuple(overrides or ()))
        if dry_run:
            from fleetfit.config.explain import explained_toml

            typer.echo(resolved.model_dump_json(indent=2) if as_json else explained_toml(resolved), nl=as_json)
            if not as_json and not quiet:
                _show_plan(resolved)
            return
        folder = out if out is not None else Path("runs", job.stem)
        if again:
            from fleetfit.runs.folder import set_aside

            if (moved := set_aside(folder)) and not quiet:
                typer.echo(f"the earlier run is now {moved}", err=True)
        with Phases(signals, _opening(folder), enabled=not quiet) as phases:
            phases("libraries", 0, 1)
            with signals.after_this():
                if engine == "simulation":
                    from fleetfit.engines.simulation import run as simulation
                    from fleetfit.engines.simulation.ray_nodes import Resources
                elif cloud is not None:
                    from fleetfit.engines.deployment import run as cloud_run
                else:
                    from fleetfit.engines import local
            phases("libraries", 1, 1)
            if engine == "simulation":
                cpus = resolved.run.threads if num_cpus is None else num_cpus
                resources = Resources(cpus, num_gpus or 0.0, address)
                summary = simulation.run(resolved, folder, phases, resources)
            elif cloud is not None:
                summary = cloud_run.run(resolved, cloud, folder, phases, phases.tell)
            else:
                summary = local.run(resolved, folder, phases)
            problem: Exception | None = None
            page = folder / "report.html"
            try:
                phases("report", 0, 1)
                page = _build_report(folder)
                phases("report", 1, 1)
            except Exception as error:  # the models are there and are shown first
                problem = error
        if as_json:
            typer.echo(json.dumps(summary, indent=2))
        elif not quiet:
            _print_summary(summary, folder, None if problem else page, models_here=cloud is None)
        if problem is not None:
            raise problem


def _show_plan(job: "Job") -> None:
    """What a run would do, beside the keys: on stderr, so that stdout is the job."""
    from rich.console import Console

    from fleetfit.cli.plan import print_plan
    from fleetfit.runs.plan import make_plan

    sys.stdout.flush()
    print_plan(make_plan(job, estimate=False), Console(stderr=True, highlight=False, markup=False, emoji=False))


def _opening(folder: Path) -> str:
    finished = len(list((folder / "steps").rglob("*.safetensors")))
    return f"going on in {folder}: {finished} finished steps are read back" if finished else f"run folder {folder}"


def _build_report(folder: Path) -> Path:
    from fleetfit.runs.report import build_report

    return build_report(folder)


def _print_summary(summary: Mapping[str, Any], folder: Path, page: Path | None, models_here: bool) -> None:
    from rich.text import Text

    from fleetfit.core.encoding import printable
    from fleetfit.runs.report.summary import read_summary
    from fleetfit.runs.report.verdict import next_commands, verdict

    console, read = stdout(), read_summary(summary)
    console.print()
    console.print(_summary_table(summary))
    reference, promised = summary["reference"], summary.get("privacy")
    if promised:
        told = f"privacy: epsilon {promised['epsilon']:.3g} at delta {promised['delta']:g} for each device's samples"
        console.print(f"{told}; accuracies stay on the devices", style="dim")
    for line in (
        "size: the largest of the cluster's models; shape: width × depth of the backbone",
        "accuracies on the devices' private tests; alone: fine-tuned alone",
        f"reference: {percent(reference['accuracy'])} on public data, {reference['parameters']:,} parameters",
    ):
        console.print(line, style="dim")
    console.print()
    console.print(Text(printable(verdict(read))))
    console.print()
    if page is not None:
        console.print(f"page:    {page}", soft_wrap=True)
    where = (
        f"{folder / 'devices'} (one folder each)" if models_here else "on each device, in the folder model of its kit"
    )
    console.print(f"models:  {where}", soft_wrap=True)
    if models_here and summary["devices"]:
        first = str(folder / "devices" / summary["devices"][0]["id"])
        console.print(f"use:     import fleetfit; model = fleetfit.load({first!r})  # inputs -> logits", soft_wrap=True)
    for number, step in enumerate(next_commands(read, folder)):
        console.print(Text("" if number else "next:").append(f"\n  # {step.wish}\n", "dim").append(f"  {step.command}"))


def _summary_table(summary: Mapping[str, Any]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_footer=True)
    devices = summary["devices"]
    kinds = ("accuracy_coarse", "accuracy_local", "accuracy")
    means = [percent(_mean(devices, kind)) for kind in kinds]
    table.add_column("cluster", footer="all", overflow="fold")
    table.add_column("count", footer=str(len(devices)), justify="right", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("header", no_wrap=True)
    table.add_column("as sent", footer=means[0], justify="right", no_wrap=True)
    table.add_column("alone", footer=means[1], justify="right", no_wrap=True)
    table.add_column("fleetfit", footer=means[2], justify="right", no_wrap=True, style="bold", footer_style="bold")
    for cluster in summary["clusters"]:
        own = [d for d in devices if d["cluster"] == cluster["id"]]
        table.add_row(
            Text(cluster["id"]),
            str(len(own)),
            format_bytes(cluster["limit_bytes"]),
            format_bytes(max(d["size_bytes"] for d in own)),
            f"{cluster['width']:g} × {cluster['depth']}",
            cluster["header"],
            *(percent(_mean(own, kind)) for kind in kinds),
        )
    return table


def _mean(devices: list[Mapping[str, Any]], key: str) -> float | None:
    values = [d[key] for d in devices if d[key] is not None]
    return sum(values) / len(values) if values else None


def report(
    folder: RunFolder,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the page of a finished run again: report.html.

    [bold]RUN[/bold] is the folder of the run. The page is one file and needs no network to be
    read; [bold]fleetfit run[/bold] writes it by itself.

    [bold]Example[/bold]

      fleetfit report runs/digits
    """
    with reporting(debug):
        expect_run(folder, "summary.json")
        page = _build_report(folder)
        typer.echo(json.dumps({"report": str(page)}) if as_json else str(page))
