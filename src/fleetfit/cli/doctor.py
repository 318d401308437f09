"""``fleetfit doctor``."""

import json

import typer

from fleetfit.cli.options import AsJson, Debug
from fleetfit.cli.terminal import reporting


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

        from fleetfit.cli.machine_checks import examine

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
