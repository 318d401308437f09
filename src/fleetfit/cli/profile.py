"""``fleetfit profile``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from fleetfit.cli.options import AsJson, Debug, Overrides, stdout
from fleetfit.cli.terminal import Phases, reporting
from fleetfit.config.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from fleetfit.device.profiling import Profiling

N = TypeVar("N", int, float)
POOR_FIT = 0.9  # of R², below which the formula says a machine's latencies badly


def profile(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The profile; its name is the file's.")
    ] = Path("profile.toml"),
    ready: Annotated[bool, typer.Option("--list", "-l", help="Print the ready profiles; measure nothing.")] = False,
    job: Annotated[
        Path | None, typer.Option("--job", "-j", metavar="JOB", help="Measure the model of this job.")
    ] = None,
    overrides: Overrides = None,
    family: Annotated[
        str | None,
        typer.Option("--family", metavar="NAME", help=f"{', '.join(FAMILIES)}: its small model. Default: vit."),
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

    Image models get images of their size. Text models get texts of as many tokens
    as data.max_tokens of the job says, else of 128, the most that a job takes by
    itself. No data is read; the longer the texts,
    the longer the time.

    [bold]Examples[/bold]

      fleetfit profile -o boards/kitchen.toml
      fleetfit profile --job digits --watts 7.5
      fleetfit profile --family distilbert --depths 2,4,6
      fleetfit profile --list

    [bold]In a job[/bold], a file or the name of a ready profile, in place of gpu_capacity:

      \\[\\[fleet.devices]]
      storage_limit = "20 MB"
      profile = "boards/kitchen.toml"
    """
    if job is not None and family is not None:
        raise typer.BadParameter("a job says its family itself", param_hint="--family")
    if job is None and overrides:
        raise typer.BadParameter("goes with --job", param_hint="--set")
    chosen_widths = _numbers(widths, float, "--widths")
    chosen_depths = _numbers(depths, int, "--depths")
    with reporting(debug) as signals:
        if ready:
            _print_ready_profiles(as_json)
            return
        from fleetfit.config.job import Job, load_job

        resolved = load_job(job, tuple(overrides or ())) if job is not None else Job()
        with Phases(signals) as phases:
            phases("libraries", 0, 1)
            with signals.after_this():
                from fleetfit.device import profiling as measuring
                from fleetfit.device.profiled_models import make_reference

            phases("libraries", 1, 1)
            measuring.check_target(out)
            plan = measuring.Plan(
                batch_size, repeats, threads=threads or resolved.run.threads, torch_device=torch_device
            )
            reference = make_reference(
                resolved.model if job is not None else None, family or "vit", resolved.data.max_tokens
            )
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
    from fleetfit.config.profiles import ready_profiles

    profiles = ready_profiles()
    if as_json:
        typer.echo(json.dumps({name: found.model_dump() for name, found in profiles.items()}, indent=2))
        return
    console = stdout()
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
    console = stdout()
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
        console.print(
            "         a poor fit: was the machine busy? If not, width and depth do not act alike here", style="dim"
        )
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
