"""The command line: ``fleetfit run | report | export | predict | pretrain | profile | provision | start | doctor``.

The only place that prints; results on stdout, all else on stderr.

Exit codes: 0 done, 1 an error that is said in a sentence, 2 wrong usage, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import sys

try:
    import contextlib
    import json
    import os
    import shlex
    from collections import Counter
    from collections.abc import Mapping
    from pathlib import Path
    from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

    import typer
    from click import Choice

    from fleetfit import cli_fleet
    from fleetfit.terminal import Phases, format_bytes, reporting
except KeyboardInterrupt:
    sys.stderr.write("stopped\n")
    raise SystemExit(130) from None

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.table import Table

    from fleetfit.export import Export, Format, Quantize
    from fleetfit.profiling import Profiling


app = typer.Typer(
    name="fleetfit",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: [bold]fleetfit run recipes/digits.toml[/bold]. Trouble? [bold]fleetfit doctor[/bold].",
)

# Hidden from the panel, not from the usage line: click 8.5 loses the help of typer 0.20's arguments. The text says it.
JobFile = Annotated[Path, typer.Argument(metavar="JOB", hidden=True)]
RunFolderArgument = Annotated[Path, typer.Argument(metavar="RUN", hidden=True)]
N = TypeVar("N", int, float)
POOR_FIT = 0.9  # of R², below which the formula says a machine's latencies badly
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, warnings and log lines.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


def _stdout() -> "Console":
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


# -- run --------------------------------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def run(
    job: JobFile,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="The run folder. Default: runs/<name of JOB>."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one key of the job; repeat for more."),
    ] = None,
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every key of the resolved job, explained; run nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a job: one Transformer and a fleet in, a model for every device out.

    [bold]JOB[/bold] is a TOML file. The cloud makes a backbone for each cluster of devices,
    its edge finds a header for it, and the devices refine it on their own data.
    What comes out is a folder:

      report.html         the figures, to look at
      summary.json        the figures, to compute with
      devices/<device>/   a model each, for fleetfit.load(folder) in Python
      job.toml            the job with every key, to run it again

    [bold]Examples[/bold]

      fleetfit run recipes/digits.toml
      fleetfit run recipes/digits.toml -s method=paper -s seed=1 -o runs/paper
      fleetfit run recipes/digits.toml --json > summary.json
      fleetfit run recipes/digits.toml --engine simulation

    [bold]Engines[/bold] give the same models with the same seed.

      local        all in this process, one device after the other
      simulation   devices in processes of Ray, as many at a time as there is room for,
                   on this machine or a Ray cluster (--address). All machines of a cluster
                   have fleetfit\\[flower] and share the storage of the run folder and of
                   run.cache. Ray is started with the run and ends with it.
      flower       edges and devices that are programs of their own, on their own machines:
                   made by fleetfit provision, started with fleetfit start. Each device
                   keeps its model. This is the cloud (--cloud)

    [bold]To go on[/bold] after Ctrl-C, a crash or a full disk, give the same command again:
    what was finished is read back, not computed again.

    [bold]The keys that matter most[/bold] (all of them, explained: --dry-run)

      method                  fleetfit; paper: every choice as the paper makes it
      seed                    same job and seed, same models
      data.split              iid, classes, dirichlet: what a device sees
      fleet.devices           count, storage_limit, gpu_capacity or a profile
      model.family            vit, deit, dinov2
      model.config            the size of the reference Transformer
      model.pretrained        start from a folder or a hub id instead
      backbone.widths         shares of heads and neurons to choose from
      backbone.depths         numbers of layers to choose from
      header.search           halving, random, enas, distilled, a fixed header
      header.budget_steps     training steps of the header search
      refine.rounds           rounds of the devices' collaboration
      refine.epochs           a device's training epochs in a round
      run.threads             CPU threads
      run.torch_device        auto, cpu, cuda, mps
      run.cache               where trained references are kept
    """
    given = {"--num-cpus": num_cpus, "--num-gpus": num_gpus, "--address": address}
    if engine != "simulation" and any(value is not None for value in given.values()):
        name = next(name for name, value in given.items() if value is not None)
        raise typer.BadParameter("goes with --engine simulation", param_hint=name)
    if (engine == "flower") != (cloud is not None):
        raise typer.BadParameter("--engine flower and --cloud KIT go together", param_hint="--cloud")
    with reporting(debug, resumable=not dry_run) as signals:
        from fleetfit.config import load_job

        resolved = load_job(job, tuple(overrides or ()))
        if dry_run:
            from fleetfit.job_text import explained_toml

            typer.echo(resolved.model_dump_json(indent=2) if as_json else explained_toml(resolved), nl=as_json)
            return
        folder = out if out is not None else Path("runs", job.stem)
        with Phases(signals, _opening(folder), enabled=not quiet) as phases:
            phases("libraries", 0, 1)
            with signals.after_this():
                if engine == "simulation":
                    from fleetfit.engines.flower import simulation
                    from fleetfit.engines.flower.nodes import Resources
                elif cloud is not None:
                    from fleetfit.engines.flower import cloud_run
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


def _opening(folder: Path) -> str:
    finished = len(list((folder / "steps").rglob("*.safetensors")))
    return f"going on in {folder}: {finished} finished steps are read back" if finished else f"run folder {folder}"


def _build_report(folder: Path) -> Path:
    from fleetfit.report import build_report

    return build_report(folder)


def _print_summary(summary: Mapping[str, Any], folder: Path, page: Path | None, models_here: bool) -> None:
    console = _stdout()
    console.print()
    console.print(_summary_table(summary))
    reference, promised = summary["reference"], summary.get("privacy")
    if promised:
        told = f"privacy: epsilon {promised['epsilon']:.3g} at delta {promised['delta']:g} for each device's samples"
        console.print(f"{told}; accuracies stay on the devices", style="dim")
    for line in (
        "size: the largest of the cluster's models; shape: width × depth of the backbone",
        "accuracies on the devices' private tests; coarse: as sent; local: each alone",
        f"reference: {_percent(reference['accuracy'])} on public data, {reference['parameters']:,} parameters",
    ):
        console.print(line, style="dim")
    console.print()
    if page is not None:
        console.print(f"look:    {page}", soft_wrap=True)
    if not models_here:
        console.print("models:  on each device, in the folder model of its kit", soft_wrap=True)
        return
    console.print(f"models:  {folder / 'devices'} (one folder each)", soft_wrap=True)
    first = str(folder / "devices" / summary["devices"][0]["id"])
    console.print(f"use:     import fleetfit; model = fleetfit.load({first!r})  # inputs -> logits", soft_wrap=True)


def _summary_table(summary: Mapping[str, Any]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_footer=True)
    devices = summary["devices"]
    kinds = ("accuracy_coarse", "accuracy_local", "accuracy")
    means = [_percent(_mean(devices, kind)) for kind in kinds]
    table.add_column("cluster", footer="all", overflow="fold")
    table.add_column("devices", footer=str(len(devices)), justify="right", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("header", no_wrap=True)
    table.add_column("coarse", footer=means[0], justify="right", no_wrap=True)
    table.add_column("local", footer=means[1], justify="right", no_wrap=True)
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
            *(_percent(_mean(own, kind)) for kind in kinds),
        )
    return table


def _mean(devices: list[Mapping[str, Any]], key: str) -> float | None:
    values = [d[key] for d in devices if d[key] is not None]
    return sum(values) / len(values) if values else None


def _percent(share: float | None) -> str:
    return "–" if share is None or share != share else f"{share:.1%}"


# -- report -----------------------------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def report(
    folder: RunFolderArgument,
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
        page = _build_report(folder)
        typer.echo(json.dumps({"report": str(page)}) if as_json else str(page))


# -- export, predict --------------------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def export(
    folder: RunFolderArgument,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", "-d", metavar="ID", help="Export this device's model; repeat for more."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", "-a", help="Export the models of all devices.")] = False,
    kind: Annotated[
        str, typer.Option("--format", "-f", click_type=Choice(["onnx", "safetensors", "torch"]), help="What to write.")
    ] = "onnx",
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", click_type=Choice(["int8"]), help="With onnx: weights of a quarter the size."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Where each device gets a folder. Default: RUN/exports."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write devices' models for use without fleetfit.

    [bold]RUN[/bold] is the folder of a finished run. Each model is compared with the one that
    it comes from, on public samples and for several batch sizes, and its size
    with the storage of its device. What fails is not kept. An earlier export of
    the same device is replaced.

      onnx          model.onnx for ONNX Runtime, any batch size; README.md shows how
      safetensors   a copy of the device's folder, for fleetfit.load
      torch         model.pt2 for torch.export.load

    [bold]Examples[/bold]

      fleetfit export runs/digits --device phones-1
      fleetfit export runs/digits --all --quantize int8 --out int8
    """
    if bool(device) == every:
        raise typer.BadParameter("give --device ID or --all", param_hint="--device")
    with reporting(debug) as signals:
        with Phases(signals, f"run folder {folder}") as phases:
            phases("libraries", 0, 1)
            with signals.after_this():
                from fleetfit.export import device_ids, export_devices

            phases("libraries", 1, 1)
            chosen = list(dict.fromkeys(device or device_ids(folder)))
            exports, problems = export_devices(
                folder, chosen, out, cast("Format", kind), cast("Quantize | None", quantize), phases
            )
        if as_json:
            typer.echo(json.dumps({str(path): e.model_dump() for path, e in exports.items()}, indent=2))
        elif exports:
            _print_exports(exports)
        if problems:
            raise ValueError("\n".join(problems))


def _print_exports(exports: "Mapping[Path, Export]") -> None:
    console = _stdout()
    quantized = any(e.int8 for e in exports.values())
    console.print(_export_table(exports, quantized))
    console.print(f"differs: the most that a logit is off{', before int8' if quantized else ''}", style="dim")
    if quantized:
        console.print("agree: public samples whose label stays; accuracy: on these, of all classes", style="dim")
    console.print()
    console.print(f"models:  {next(iter(exports)).parent} (one folder each)", soft_wrap=True)


def _export_table(exports: "Mapping[Path, Export]", quantized: bool) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("device", overflow="fold", min_width=10)
    names = ["size", "limit", "differs"]
    for name in names + ["float", "agree", "accuracy", "float"] * quantized:
        table.add_column(name, justify="right", no_wrap=True)
    for made in exports.values():
        row = [format_bytes(made.size_bytes), format_bytes(made.limit_bytes), f"{made.max_difference:.0e}"]
        if made.int8:
            shares = (made.int8.agreement, made.int8.accuracy, made.int8.accuracy_before)
            row += [format_bytes(made.int8.size_before_bytes), *map(_percent, shares)]
        table.add_row(Text(made.device_id), *row)
    return table


@app.command(no_args_is_help=True)
def predict(
    folder: Annotated[Path, typer.Argument(metavar="DEVICE_FOLDER", hidden=True)],
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", hidden=True)],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Label files or texts with a device's model.

    [bold]DEVICE_FOLDER[/bold] is a folder of RUN/devices, or one that [bold]fleetfit export[/bold] wrote
    (onnx, safetensors).

    [bold]INPUT[/bold] is an image file, brought to the size and the colours that the model
    knows, or a .npy file with one or more samples of raw values, for digits 0 to
    16 in 8x8. Digits are bright on dark. For a model that reads texts it is a
    .txt file with a text in each line, or a text itself.

    [bold]Examples[/bold]

      fleetfit predict runs/digits/devices/phones-1 seven.png
      fleetfit predict runs/digits/exports/phones-1 *.png samples.npy --json
      fleetfit predict runs/banking77/devices/phones-1 "my card is lost"
    """
    with reporting(debug):
        from fleetfit.predict import predict as label

        predictions = label(folder, inputs)
        if as_json:
            typer.echo(json.dumps([p.model_dump() for p in predictions], indent=2))
            return
        num_rows = Counter(p.input for p in predictions)
        names = [f"{p.input}[{p.row}]" if num_rows[p.input] > 1 else p.input for p in predictions]
        for name, found in zip(names, predictions, strict=True):
            typer.echo(f"{name:<{max(map(len, names))}}  {found.label}  {_percent(found.probability)}")


# -- pretrain ---------------------------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def pretrain(
    job: JobFile,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="The checkpoint folder. Default: models/<name of JOB>."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one key of the job; repeat for more."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train the reference of a job, and write it as a checkpoint.

    [bold]JOB[/bold] is a job file. Its reference is trained on the public samples as [bold]fleetfit run[/bold]
    would, and kept in the same cache: a run of the same job then finds it there.
    The folder has the base model as Transformers knows it, its header, and what is
    known of both (card.json, README.md). [bold]model.pretrained[/bold] = DIR in another
    job starts from it.

    [bold]Examples[/bold]

      fleetfit pretrain recipes/digits.toml
      fleetfit pretrain my.toml -s model.epochs=300 -s model.mixup=0.2 -o models/mine

    [bold]To go on[/bold] after Ctrl-C or a crash, give the same command again: a long training is
    kept every few minutes, at the end of an epoch.
    """
    with reporting(
        debug, resumable=True, go_on="the same command goes on from the last epoch that was kept"
    ) as signals:
        from fleetfit.config import load_job

        resolved = load_job(job, tuple(overrides or ()))
        folder = out if out is not None else Path("models", job.stem)
        words = ["fleetfit", "pretrain", str(job), "--out", str(folder)]
        words += [word for text in overrides or () for word in ("--set", text)]
        with Phases(signals, f"checkpoint folder {folder}", enabled=not quiet) as phases:
            phases("libraries", 0, 1)
            with signals.after_this():
                from fleetfit.pretrain import pretrain as make

            phases("libraries", 1, 1)
            card = make(resolved, folder, phases, shlex.join(words))
        if as_json:
            typer.echo(card.model_dump_json(indent=2))
        elif not quiet:
            console = _stdout()
            console.print()
            console.print(
                f"{_percent(card.test_accuracy)} on {len(card.labels)} classes of the public test, "
                f"{card.parameters:,} parameters, {format_bytes(card.size_bytes)}"
            )
            console.print(f"model:   {folder}", soft_wrap=True)
            console.print(f"use:     model.pretrained = {json.dumps(str(folder))} in a job", soft_wrap=True)


# -- profile ----------------------------------------------------------------------------------------------------------


@app.command()
def profile(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The profile; its name is the file's.")
    ] = Path("profile.toml"),
    ready: Annotated[bool, typer.Option("--list", "-l", help="Print the ready profiles; measure nothing.")] = False,
    job: Annotated[
        Path | None, typer.Option("--job", "-j", metavar="JOB", help="Measure the model of this job.")
    ] = None,
    family: Annotated[
        str | None,
        typer.Option("--family", metavar="NAME", help="vit, deit or dinov2: its small model. Default: vit."),
    ] = None,
    widths: Annotated[
        str, typer.Option("--widths", metavar="W,W,...", help="Shares of heads and neurons. Default: four.")
    ] = "",
    depths: Annotated[str, typer.Option("--depths", metavar="D,D,...", help="Numbers of layers. Default: four.")] = "",
    batch_size: Annotated[int, typer.Option("--batch", help="Samples of one forward pass.", min=1)] = 4,
    repeats: Annotated[
        int, typer.Option("--repeats", help="Timed passes of each shape; small models: more.", min=1)
    ] = 5,
    threads: Annotated[
        int | None, typer.Option("--threads", help="CPU threads. Default: run.threads of the job, or 1.", min=1)
    ] = None,
    torch_device: Annotated[
        str, typer.Option("--torch-device", metavar="NAME", help="What runs the model: cpu, cuda, cuda:1.")
    ] = "cpu",
    watts: Annotated[
        float | None, typer.Option("--watts", help="Power, where the machine does not tell it: of a plug, say.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure this machine, and write a profile of it that a job can name.

    Times some widths and depths of a model with random weights, and reads their
    power where the machine tells it: Linux' energy counters (RAPL) for the CPU,
    nvidia-smi for a GPU. Fits the constants of the paper's energy formula, and
    shows what they predict beside what was measured. About half a minute on one
    core; as much again where power is read. Close other programs first.

    [bold]Examples[/bold]

      fleetfit profile -o boards/kitchen.toml
      fleetfit profile --job recipes/digits.toml --watts 7.5
      fleetfit profile --list

    [bold]In a job[/bold], a file or the name of a ready profile, in place of gpu_capacity:

      \\[\\[fleet.devices]]
      storage_limit = "20 MB"
      profile = "boards/kitchen.toml"
    """
    if job is not None and family is not None:
        raise typer.BadParameter("a job says its family itself", param_hint="--family")
    chosen_widths = _numbers(widths, float, "--widths")
    chosen_depths = _numbers(depths, int, "--depths")
    with reporting(debug) as signals:
        if ready:
            _print_ready_profiles(as_json)
            return
        with Phases(signals) as phases:
            phases("libraries", 0, 1)
            with signals.after_this():
                from fleetfit import profiling as measuring
                from fleetfit.config import Job, load_job

            phases("libraries", 1, 1)
            measuring.check_target(out)
            resolved = load_job(job) if job is not None else Job()
            plan = measuring.Plan(
                batch_size, repeats, threads=threads or resolved.run.threads, torch_device=torch_device
            )
            reference = measuring.make_reference(resolved.model if job is not None else None, family or "vit")
            found = measuring.profile_machine(
                measuring.profile_name(out), reference, plan, chosen_widths, chosen_depths, watts, phases
            )
            measuring.write_profile(found, out)
        if as_json:
            typer.echo(json.dumps(_profiling_fields(found), indent=2))
        else:
            _print_profiling(found, out)


def _numbers(text: str, kind: "Callable[[str], N]", option: str) -> "tuple[N, ...]":
    try:
        return tuple(kind(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(f"must be numbers with commas between them, got {text!r}", param_hint=option) from None


def _print_ready_profiles(as_json: bool) -> None:
    from fleetfit.profiles import ready_profiles

    profiles = ready_profiles()
    if as_json:
        typer.echo(json.dumps({name: found.model_dump() for name, found in profiles.items()}, indent=2))
        return
    console = _stdout()
    for name, found in profiles.items():
        console.print(name, style="bold")
        power = f"P = {found.power_watts:g}"
        power += f" + {found.power_slope_watts:g} w d" if found.power_slope_watts else ""
        power += f" + {found.patch_power_watts:g} p" if found.patch_power_watts else ""
        console.print(f"  {found.hardware}", soft_wrap=True)
        console.print(f"  {power} W, T = {found.latency_seconds:g} + {found.latency_slope_seconds:g} w d s")
        console.print(f"  {found.source}", style="dim", soft_wrap=True)


def _profiling_fields(found: "Profiling") -> dict[str, Any]:
    fields = found.model_dump(mode="json")
    for line, point in zip(fields["points"], found.points, strict=True):
        line["predicted_latency_seconds"] = found.latency.at(point.shape)
        line["predicted_power_watts"] = found.power.at(point.shape) if found.power else None
    return fields


def _print_profiling(found: "Profiling", out: Path) -> None:
    console = _stdout()
    console.print()
    console.print(_profiling_table(found))
    console.print("seconds: of 1,000 samples; predicted: by the fitted constants", style="dim")
    console.print()
    constants = found.profile
    console.print(
        f"time:    T = {constants.latency_seconds:.4g} + {constants.latency_slope_seconds:.4g} w d seconds, "
        f"R² {found.latency.r_squared:.3f}, worst error {found.latency.worst_error:.1%}",
        soft_wrap=True,
    )
    if found.latency.r_squared < POOR_FIT:
        console.print("         poor: was the machine busy? else width and depth do not act alike here", style="dim")
    if found.power is not None:
        console.print(
            f"power:   P = {constants.power_watts:.4g} + {constants.power_slope_watts:.4g} w d + "
            f"{constants.patch_power_watts:.4g} p watts, R² {found.power.r_squared:.3f}, "
            f"worst error {found.power.worst_error:.1%}",
            soft_wrap=True,
        )
    console.print(f"         {found.power_note}" if found.power else f"power:   {found.power_note}", soft_wrap=True)
    if found.power_note.endswith("stand in"):
        console.print("         a job then compares shapes, not devices; give --watts if you know them", style="dim")
    console.print(f"profile: {out}", soft_wrap=True)
    console.print(f"use:     profile = {json.dumps(str(out))}  # under [[fleet.devices]] of a job", soft_wrap=True)


def _profiling_table(found: "Profiling") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("shape", no_wrap=True)
    for name in ("seconds", "predicted", "error", *(("watts", "predicted", "error") if found.power else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for point in found.points:
        row = [f"{point.shape.width:.2g} × {point.shape.depth}"]
        for line, measured in ((found.latency, point.latency_seconds), (found.power, point.power_watts)):
            if line is not None and measured is not None:
                said = line.at(point.shape)
                row += [f"{measured:.4g}", f"{said:.4g}", f"{said / measured - 1:+.1%}"]
        table.add_row(*row)
    return table


# -- fleets of many machines ------------------------------------------------------------------------------------------

app.command(no_args_is_help=True)(cli_fleet.provision)
app.command(no_args_is_help=True)(cli_fleet.start)


# -- doctor -----------------------------------------------------------------------------------------------------------


@app.command()
def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Check this machine: Python, packages, memory, GPU, cache.

    Loads every package that fleetfit needs, and says what to do where one is
    missing, broken or outside the supported range; the exit code is then 1.

    [bold]Examples[/bold]

      fleetfit doctor
      fleetfit doctor --json
    """
    with reporting(debug):
        from rich.console import Console

        from fleetfit.doctor import examine

        with Console(stderr=True).status("looking ...") as status:
            checks = list(examine(lambda name: status.update(f"looking at {name} ...")))
        ok = all(c.ok for c in checks)
        if as_json:
            typer.echo(json.dumps({"ok": ok, "checks": [c.model_dump() for c in checks]}, indent=2))
        else:
            for check in checks:
                mark = typer.style("ok", fg="green") if check.ok else typer.style("NO", fg="red", bold=True)
                found = f"{check.found:<14} {check.needs:<14}" if check.needs else check.found
                typer.echo(f"{mark}  {check.name:<14} {found}{'  ' if check.note else ''}{check.note}".rstrip())
            wrong = [c.name for c in checks if not c.ok]
            typer.echo()
            typer.echo("all is well" if ok else f"to put right: {', '.join(wrong)}")
        if not ok:
            raise typer.Exit(1)


# -- the program ------------------------------------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:
        import fleetfit

        typer.echo(f"fleetfit {fleetfit.__version__}")
        raise typer.Exit


@app.callback()
def fleetfit_(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fit one big Transformer to every device of a fleet.

    Each device gets a model of its own: small enough for its storage, frugal with
    its energy, fitted to its private data, which never leaves it.
    The method is ACME (arXiv 2507.14802).
    """


def main() -> None:
    """The program ``fleetfit``."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a sign is no reason to fail
    code: Any = 1
    try:
        app()
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        code = 130
    except BrokenPipeError:
        code = 1
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        code = 1
    except OSError as error:
        typer.echo(f"error: stdout: {error.strerror}", err=True)
        _discard_stdout()
        code = 1
    sys.exit(code)


def _discard_stdout() -> None:
    """Nobody reads it any more: let Python's own flush at exit go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
