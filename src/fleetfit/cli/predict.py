"""``fleetfit predict``."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from fleetfit.cli.options import AsJson, Debug, expect_file, named, percent
from fleetfit.cli.terminal import reporting


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
    .txt file with a text in each line (ending in LF or CR LF), or a text itself.

    [bold]Examples[/bold]

      fleetfit predict runs/digits/devices/phones-1 seven.png
      fleetfit predict runs/digits/exports/phones-1 *.png samples.npy --json
      fleetfit predict runs/banking77/devices/phones-1 "my card is lost"
    """
    with reporting(debug):
        if not (folder / "model.onnx").exists():
            card = folder / "model.json"
            expect_file(card, f"{folder} is no device folder: {card} is missing")
        from fleetfit.core.encoding import printable
        from fleetfit.runs.predict import predict as label
        from fleetfit.runs.predict import unseen_classes

        predictions = label(folder, inputs)
        if as_json:
            typer.echo(json.dumps([p.model_dump() for p in predictions], indent=2))
            return
        num_rows = Counter(p.input for p in predictions)
        names = [printable(f"{p.input}[{p.row}]" if num_rows[p.input] > 1 else p.input) for p in predictions]
        for name, found in zip(names, predictions, strict=True):
            label_shown = printable(found.label)  # of a model that may come from anywhere
            typer.echo(f"{name:<{max(map(len, names))}}  {label_shown}  {percent(found.probability)}")
        for found in predictions:
            if found.note:
                typer.echo(f"note: {printable(found.input)}: {printable(found.note)}", err=True)
        if unseen := unseen_classes(folder):
            typer.echo(f"note: this device has not trained on: {printable(named(unseen))}", err=True)
