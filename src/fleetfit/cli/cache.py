"""``fleetfit cache``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fleetfit.cli.options import AsJson, Debug, stdout
from fleetfit.cli.terminal import format_bytes, format_duration, reporting


def cache(
    clear: Annotated[
        list[str] | None,
        typer.Option("--clear", metavar="WHAT", help="Clear this kind of results, or all; repeat for more."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--cache", metavar="DIR", help="Its folder. Default: that of run.cache."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List what is kept for later runs, or clear it.

    Results of steps are kept by what they were computed from: the job's keys that
    they read, their data's content, and fleetfit's code. A run that needs the same
    takes them. What was used longest ago is cleared by itself beyond
    run.cache_limit. A run folder has its own copies: clearing harms no run, and what
    a run in progress uses stays.

    [bold]Examples[/bold]

      fleetfit cache
      fleetfit cache --clear elastic
      fleetfit cache --clear all
    """
    with reporting(debug):
        from rich.table import Table

        from fleetfit.config.job import Job
        from fleetfit.core.step_cache import age_seconds, entries, runs_of
        from fleetfit.core.step_cache import clear as clear_entry

        place = folder.expanduser() if folder is not None else Job().run.cache_folder
        found = sorted(entries(place), key=lambda e: (e.phase, -e.used))
        phases = sorted({entry.phase for entry in found})
        if clear:
            unknown = [what for what in clear if what not in ("all", *phases)]
            if unknown and found:
                raise ValueError(f"--clear must be one of all, {', '.join(phases)}, got {unknown[0]!r}")
            wanted = [e for e in found if "all" in clear or e.phase in clear]
            gone = [e for e in wanted if clear_entry(e)]
            size, in_use = sum(e.size_bytes for e in gone), len(wanted) - len(gone)
            if as_json:
                typer.echo(json.dumps({"cleared": [str(e.path) for e in gone], "bytes": size, "in_use": in_use}))
                return
            kept = f"; {in_use} in use stay" if in_use else ""
            typer.echo(f"cleared {len(gone)} results, {format_bytes(size)}{kept}")
            return
        if as_json:
            rows = [
                {
                    "what": entry.phase,
                    "file": str(entry.path),
                    "bytes": entry.size_bytes,
                    "age_seconds": round(age_seconds(entry)),
                    "runs": runs_of(entry.path),
                }
                for entry in found
            ]
            typer.echo(json.dumps({"folder": str(place), "results": rows}, indent=2))
            return
        if not found:
            typer.echo(f"nothing is kept in {place}")
            return
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("what", "size", "last used", "runs that use it"):
            table.add_column(name, no_wrap=name != "runs that use it", overflow="fold")
        for entry in found:
            ago = f"{format_duration(age_seconds(entry))} ago"
            table.add_row(entry.phase, format_bytes(entry.size_bytes), ago, ", ".join(runs_of(entry.path)) or "–")
        console = stdout()
        console.print(table)
        console.print()
        console.print(f"{len(found)} results, {format_bytes(sum(e.size_bytes for e in found))}, in {place}")
