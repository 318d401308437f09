"""``fleetfit recipes``."""

import json
from typing import Annotated

import typer

from fleetfit.cli.options import AsJson, stdout
from fleetfit.cli.terminal import reporting


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", hidden=True)] = None,
    as_json: AsJson = False,
) -> None:
    """List the jobs that come with fleetfit, or print one, to begin with.

    A recipe is given by its name wherever a command takes a job.

    [bold]Examples[/bold]

      fleetfit recipes
      fleetfit run digits
      fleetfit recipes digits > my-job.toml
    """
    with reporting(debug=False):
        from rich.table import Table
        from rich.text import Text

        from fleetfit.recipes import FOLDER, headline, noted, recipe_names

        if name is not None:
            if name not in recipe_names():
                raise ValueError(f"NAME must be one of {', '.join(recipe_names())}, got {name!r}")
            typer.echo((FOLDER / f"{name}.toml").read_text(encoding="utf-8"), nl=False)
            return
        words = ("hardware", "time", "result")
        listed = {n: {"about": headline(n)} | {w: noted(n, w) for w in words} for n in recipe_names()}
        if as_json:
            typer.echo(json.dumps(listed, indent=2))
            return
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, style="bold")
        table.add_column()
        for known, told in listed.items():
            table.add_row(known, Text(told["about"]).append(f"  {told['hardware']}", "dim"))
        console = stdout()
        console.print(table)
        console.print()
        console.print("run one:       fleetfit run digits")
        console.print("make it yours: fleetfit recipes digits > my-job.toml")
