"""``fleetfit adapt``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fleetfit.cli.options import AsJson, Debug, expect_file, named, percent, stdout, told_as_options
from fleetfit.cli.terminal import Phases, reporting

if TYPE_CHECKING:
    from fleetfit.runs.adapt import Adapted, ClassShare

MOST_SHOWN = 12


def adapt(
    folder: Annotated[Path, typer.Argument(metavar="DEVICE_FOLDER", hidden=True)],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="INPUTS", help="Inputs without labels: a file or a folder; repeat for more."),
    ] = None,
    input_column: Annotated[
        str,
        typer.Option("--input-column", metavar="NAME", help="Of images or texts in a table, where it is not found."),
    ] = "",
    undo: Annotated[bool, typer.Option("--undo", help="Let the model be as it was shipped.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fit a shipped model to what a device sees now, without labels.

    [bold]DEVICE_FOLDER[/bold] is a folder of RUN/devices, or KIT/model on a device.
    How often each class comes is estimated anew on its inputs; no weight is trained,
    and nothing leaves the device. It is kept only where inputs that were held out
    become likelier by it. [bold]--undo[/bold] brings back the model as it was shipped.

    [bold]INPUTS[/bold] are images, .npy files, .txt files with a text in each line,
    folders of these, or tables (CSV, Parquet, ...), whose labels are not read. Give
    all that the device met in some time, not a choice of it.

    [bold]Examples[/bold]

      fleetfit adapt runs/digits/devices/phones-1 --data seen/
      fleetfit adapt kits/till-3/model --data today.csv
      fleetfit adapt kits/till-3/model --undo
    """
    if undo == bool(data):
        raise typer.BadParameter("give either --data INPUTS or --undo", param_hint="--data")
    with reporting(debug) as signals:
        if not any((folder / name).exists() for name in ("model.onnx", "model.pt2")):
            card = folder / "model.json"
            expect_file(card, f"{folder} is no device folder: {card} is missing")
        with Phases(signals, enabled=not as_json and not undo) as phases:
            phases("libraries", 0, 1)
            with signals.after_this():
                from fleetfit.config.sections import DataConfig
                from fleetfit.runs.adapt import adapt_folder
                from fleetfit.runs.adapt import undo as undo_in

            phases("libraries", 1, 1)
            if data:
                with told_as_options():
                    found = adapt_folder(folder, data, DataConfig(input_column=input_column), phases)
            else:
                classes = undo_in(folder)
        if not data:
            if as_json:
                typer.echo(
                    json.dumps({"undone": bool(classes), "classes": [c.model_dump() for c in classes]}, indent=2)
                )
                return
            _table(classes)
            typer.echo("the model is as it was shipped" + ("" if classes else ", and was before"))
        elif as_json:
            typer.echo(json.dumps(found.model_dump(mode="json"), indent=2))
        else:
            _print(found, folder)


def _print(found: "Adapted", folder: Path) -> None:
    from fleetfit.core.encoding import printable
    from fleetfit.runs.predict import unseen_classes

    console = stdout()
    for note in found.notes:
        console.print(printable(note), style="dim", soft_wrap=True)
    inputs = f"{found.num_inputs:,} inputs"
    gain = f"{found.gain:+.3f} ± {found.gain_error:.3f} nats each"
    if found.adapted is None:
        console.print(
            f"the model is as it was shipped: the class shares that {inputs} speak for do not make held-out ones "
            f"clearly likelier ({gain})",
            soft_wrap=True,
        )
        return
    _table(found.classes)
    console.print(f"{inputs}; those held out are likelier by {gain}", soft_wrap=True)
    if unseen := unseen_classes(folder):
        console.print(
            f"note: this device has not trained on {printable(named(unseen))}: inputs of these may count as others",
            soft_wrap=True,
        )
    console.print(
        f"kept in {printable(str(folder / 'model.json'))}; --undo takes it back. An export made before stays as it is.",
        soft_wrap=True,
    )


def _table(classes: "Sequence[ClassShare]") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from fleetfit.core.encoding import printable

    if not classes:
        return
    between = any(c.before != c.shipped for c in classes)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("class", overflow="fold")
    for name in ("as shipped", *(("until now",) if between else ()), "now"):
        table.add_column(name, justify="right", no_wrap=True)
    changed = sorted(classes, key=lambda c: -abs(c.now - c.before))
    for c in changed[:MOST_SHOWN]:
        shares = (c.shipped, *((c.before,) if between else ()), c.now)
        table.add_row(Text(printable(c.label)), *map(percent, shares))
    console = stdout()
    console.print(table)
    if len(changed) > MOST_SHOWN:
        console.print(
            f"and {len(changed) - MOST_SHOWN} more classes, which changed less; all are in --json", style="dim"
        )
