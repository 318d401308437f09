"""``fleetfit init``."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fleetfit.cli.options import AsJson, Debug
from fleetfit.cli.terminal import Phases, reporting


def init(
    job: Annotated[Path, typer.Argument(metavar="[JOB]", hidden=True)] = Path("my-job.toml"),
    data: Annotated[
        str | None, typer.Option("--data", metavar="SOURCE", help="Labelled samples: a file, a folder, a hub id.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="A pre-trained one: a folder or a hub id.")
    ] = None,
    inventory: Annotated[
        str | None, typer.Option("--inventory", metavar="CSV", help="Your devices, one line each.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="NAME", help="Copy a recipe instead; see fleetfit recipes.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a first job for your own data and devices, with what is found in them.

    [bold]JOB[/bold] is the file to write, my-job.toml by default; one that is there is left
    as it is. Without options it asks.

    [bold]Examples[/bold]

      fleetfit init
      fleetfit init shop.toml --data tickets.csv --inventory devices.csv
      fleetfit init photos.toml --data photos/ --model google/vit-base-patch16-224
      fleetfit init mine.toml --recipe digits
    """
    if recipe is not None and (data or model or inventory):
        raise typer.BadParameter("goes without --data, --model and --inventory", param_hint="--recipe")
    if recipe is None and data is None and not sys.stdin.isatty():
        raise typer.BadParameter("must be given where nobody can be asked", param_hint="--data")
    with reporting(debug) as signals:
        if job.exists():
            raise ValueError(f"{job} is there already, and is not written over")
        if recipe is not None:
            from fleetfit.recipes import FOLDER, recipe_names

            if recipe not in recipe_names():
                raise ValueError(f"--recipe must be one of {', '.join(recipe_names())}, got {recipe!r}")
            job.write_text((FOLDER / f"{recipe}.toml").read_text(encoding="utf-8"), encoding="utf-8")
            _next(job, as_json, {"job": str(job)})
            return
        if data is None:
            data = typer.prompt("Labelled samples (a CSV file, a folder of class folders, ...)")
            model = typer.prompt(
                "Pre-trained model (a folder or a hub id; empty: none)", default="", show_default=False
            )
            inventory = typer.prompt("Inventory of devices (CSV; empty: examples)", default="", show_default=False)
        if inventory and not Path(inventory).is_file():
            raise ValueError(f"{inventory}: No such file")
        with Phases(signals, enabled=not as_json) as phases:
            phases("libraries", 0, 1)
            with signals.after_this():
                from fleetfit.runs.new_job import write_first_job

            phases("libraries", 1, 1)
            found, plan = write_first_job(job, data, model or "", inventory or "", phases)
        if as_json:
            _next(job, as_json, {"job": str(job), "found": found.model_dump(), "problems": list(plan.problems)})
            return
        from fleetfit.cli.plan import print_plan

        print_plan(plan)
        _next(job, as_json, {})


def _next(job: Path, as_json: bool, told: dict[str, object]) -> None:
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    typer.echo(f"written: {job}  # look into it: what was guessed is said there")
    typer.echo(f"next:    fleetfit plan {job}  # how long it takes")
    typer.echo(f"         fleetfit run {job}")
