"""``fleetfit pretrain``."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from fleetfit.cli.options import AsJson, Debug, JobFile, Overrides, Quiet, percent, stdout
from fleetfit.cli.terminal import Phases, format_bytes, reporting


def pretrain(
    job: JobFile,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="The checkpoint folder. Default: models/<name of JOB>."),
    ] = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train the reference of a job, and write it as a checkpoint.

    [bold]JOB[/bold] is a job file. Its reference is trained on the public samples as
    [bold]fleetfit run[/bold] would, and kept in the same cache: a run of the same job then
    finds it there. The folder has the base model as Transformers knows it, its
    header, and what is known of both (card.json, README.md).
    [bold]model.pretrained[/bold] = DIR in another job starts from it.

    [bold]Examples[/bold]

      fleetfit pretrain digits
      fleetfit pretrain my.toml -s model.epochs=300 -o models/mine

    [bold]To go on[/bold] after Ctrl-C or a crash, give the same command again: a long
    training is kept every few minutes, at the end of an epoch.
    """
    with reporting(
        debug, resumable=True, go_on="the same command goes on from the last epoch that was kept"
    ) as signals:
        from fleetfit.config.job import load_job

        resolved = load_job(job, tuple(overrides or ()))
        folder = out if out is not None else Path("models", job.stem)
        words = ["fleetfit", "pretrain", str(job), "--out", str(folder)]
        words += [word for text in overrides or () for word in ("--set", text)]
        with Phases(signals, f"checkpoint folder {folder}", enabled=not quiet) as phases:
            phases("libraries", 0, 1)
            with signals.after_this():
                from fleetfit.cloud.pretrain import pretrain as make

            phases("libraries", 1, 1)
            card = make(resolved, folder, phases, shlex.join(words))
        if as_json:
            typer.echo(card.model_dump_json(indent=2))
        elif not quiet:
            console = stdout()
            console.print()
            console.print(
                f"{percent(card.test_accuracy)} on {len(card.labels)} classes of the public test, "
                f"{card.parameters:,} parameters, {format_bytes(card.size_bytes)}"
            )
            console.print(f"model:   {folder}", soft_wrap=True)
            console.print(f"use:     model.pretrained = {json.dumps(str(folder))} in a job", soft_wrap=True)
