"""``fleetfit provision`` and ``fleetfit start``: fleets of many machines."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fleetfit.cli.options import AsJson, Debug, expect_file
from fleetfit.cli.terminal import Phases, reporting

if TYPE_CHECKING:
    from fleetfit.engines.deployment.provision import Provisioned


def provision(
    fleet: Annotated[Path, typer.Argument(metavar="FLEET", hidden=True)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the kits go.")] = Path("kits"),
    split_data: Annotated[
        bool, typer.Option("--split-data", help="Put a part of the job's data into each kit, to try it out.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS: for addresses of this machine only, to see what is sent.")
    ] = False,
    authority: Annotated[
        Path | None,
        typer.Option("--authority", metavar="DIR", help="Where the fleet's authority is kept.", show_default="OUT/ca"),
    ] = None,
    replace: Annotated[
        list[str],
        typer.Option("--replace", metavar="DEVICE", help="A new kit for this device; its old key is no good."),
    ] = [],  # noqa: B006 - typer reads it
    anew: Annotated[
        bool, typer.Option("--anew", help="Make another fleet: all kits are replaced, on all machines.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make a kit for every participant of a fleet: cloud, edges, devices.

    [bold]FLEET[/bold] is a TOML file. It names the job, the cloud's address, the edges with
    theirs, and the devices of each edge; the recipe fleet-loopback is one.
    A kit is a folder with keys and certificates, the job, and whom it knows. Copy
    each to its machine, and keep kits/ca where no participant is.

    Given again, with devices added to [bold]FLEET[/bold] or taken out, it makes the new kits
    only, and an update.json for their edge: put it into the edge's kit, whether
    that is at work or not.

    [bold]Examples[/bold]

      fleetfit provision fleet-loopback --split-data --out kits
      fleetfit provision FLEET.toml --replace phones-3
      fleetfit start kits/phones-1
    """
    with reporting(debug) as signals:
        from fleetfit.engines.deployment.fleet_file import load_fleet_file
        from fleetfit.recipes import job_path

        fleet = job_path(fleet)
        load_fleet_file(fleet)  # mistakes are told before libraries are loaded
        with Phases(signals, f"kits in {out}", enabled=not as_json) as phases:
            phases("libraries", 0, 1)
            with signals.after_this():
                from fleetfit.engines.deployment.provision import provision as make

            phases("libraries", 1, 1)
            made = make(fleet, out, split_data, insecure, phases, authority=authority, replace=replace, anew=anew)
        if as_json:
            said = {"fleet": made.fleet, "kits": [str(kit) for kit in made.kits], "days": made.days}
            said |= {"updates": [str(update) for update in made.updates], "gone": list(made.gone)}
            typer.echo(json.dumps(said, indent=2))
            return
        if not made.is_new:
            _tell_changes(made, out)
            return
        cloud, *others = made.kits
        typer.echo(f"kits:    {out} (fleet {made.fleet}, valid for {made.days} days)")
        for number, kit in enumerate(others):
            typer.echo(f"{'' if number else 'start:':8} fleetfit start {kit}")
        typer.echo(f"run:     fleetfit run {cloud / 'job.toml'} --engine flower --cloud {cloud}")
        typer.echo(f"secret:  {made.authority} can make participants of this fleet: keep it offline")
        if insecure:
            typer.secho("INSECURE: nothing is encrypted, and anyone on this machine can join", fg="red", err=True)


def _tell_changes(made: "Provisioned", out: Path) -> None:
    """What became of a fleet that was there before."""
    if not (made.kits or made.updates):
        typer.echo(f"kits:    {out} are as the file has the fleet; --anew makes another one, and all kits again")
        return
    typer.echo(f"fleet:   {made.fleet}; all other kits stay as they are")
    for kit in made.kits:
        typer.echo(f"new:     {kit}: copy it to its machine, then fleetfit start {kit}")
    for name in made.gone:
        typer.echo(f"gone:    {name}: with the update it cannot take part any more")
    for update in made.updates:
        typer.echo(f"update:  {update}: copy it into the kit of {update.parent.name}, at work or not")


def start(
    kit: Annotated[Path, typer.Argument(metavar="KIT", hidden=True)],
    once: Annotated[
        bool, typer.Option("--once", help="Of an edge or a device: stop when the job is finished.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="The kit's data may be a Python function, MODULE:FUNCTION: run it.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Take part in a fleet, as the cloud, an edge or a device: whosever kit it is.

    [bold]KIT[/bold] is a folder that [bold]fleetfit provision[/bold] made. Runs until Ctrl-C, and leaves
    nothing behind; started again, it goes on where it was. What is wrong with a
    key, a certificate, an address or the data is said at once, here and at the
    other end. In any order: who is early, waits.

    [bold]Examples[/bold]

      fleetfit start kits/phones
      fleetfit start kits/phones-1 --once
    """
    with reporting(debug, resumable=True, go_on="the same command goes on from here") as signals:
        expect_file(
            kit / "kit.toml",
            f"{kit} is no kit: {kit / 'kit.toml'} is missing; `fleetfit provision` makes kits",
        )
        with signals.after_this():
            from fleetfit.engines.deployment.kit import read_kit
            from fleetfit.engines.deployment.start import start as take_part
        take_part(read_kit(kit), once, _tell, signals.check, allow_code)


def _tell(text: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')}  {text}", err=True)
