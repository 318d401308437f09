"""``fleetfit evaluate``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fleetfit.cli.options import AsJson, Debug, expect_file, percent, stdout, told_as_options
from fleetfit.cli.terminal import Phases, reporting

if TYPE_CHECKING:
    from rich.table import Table

    from fleetfit.runs.evaluate import Evaluation

MOST_CONFUSED = 10


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", hidden=True)],
    data: Annotated[str, typer.Option("--data", metavar="SOURCE", help="Labelled samples: a file or a folder.")],
    input_column: Annotated[
        str, typer.Option("--input-column", metavar="NAME", help="Of images or texts, where it is not found.")
    ] = "",
    label_column: Annotated[
        str, typer.Option("--label-column", metavar="NAME", help="Of labels, where it is not found.")
    ] = "",
    split: Annotated[str, typer.Option("--split", metavar="NAME", help="One split of the source only.")] = "",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Test a model on labelled data: accuracy, every class, and what is confused.

    [bold]FOLDER[/bold] is a device's folder, or an export of it. Labels are compared by
    their names; one that the model does not know is an error.

    [bold]Examples[/bold]

      fleetfit evaluate runs/digits/devices/phones-1 --data labelled/
      fleetfit evaluate runs/bank/exports/till-3 --data new.csv --json
    """
    with reporting(debug) as signals:
        if not (folder / "model.onnx").exists():
            card = folder / "model.json"
            expect_file(card, f"{folder} is no device folder: {card} is missing")
        with Phases(signals, enabled=not as_json) as phases:
            phases("libraries", 0, 1)
            with signals.after_this():
                from fleetfit.config.sections import DataConfig
                from fleetfit.runs.evaluate import evaluate_folder

            phases("libraries", 1, 1)
            reading = DataConfig(input_column=input_column, label_column=label_column, splits=(split,) if split else ())
            with told_as_options():
                found = evaluate_folder(folder, data, reading, phases)
        if as_json:
            typer.echo(json.dumps(found.model_dump(mode="json"), indent=2))
            return
        _print(found)


def _print(found: "Evaluation") -> None:
    from fleetfit.core.encoding import printable

    console = stdout()
    if found.data:
        for line in found.data.lines:
            console.print(printable(line), style="dim", soft_wrap=True)
    console.print(_classes(found))
    console.print(
        f"accuracy {percent(found.accuracy)}: {found.correct:,} of {found.samples:,}; loss {found.loss:.3f} nats"
    )
    wrong = [
        (number, found.classes[i].label, found.classes[j].label)
        for i, row in enumerate(found.confusion)
        for j, number in enumerate(row)
        if i != j and number
    ]
    for number, own, said in sorted(wrong, key=lambda w: -w[0])[:MOST_CONFUSED]:
        console.print(f"confused: {number:,} of {printable(own)} labelled {printable(said)}", soft_wrap=True)
    if len(wrong) > MOST_CONFUSED:
        console.print(f"and {len(wrong) - MOST_CONFUSED} more pairs; all are in --json", style="dim")


def _classes(found: "Evaluation") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from fleetfit.core.encoding import printable

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("class", overflow="fold")
    for name in ("samples", "labelled so", "precision", "recall"):
        table.add_column(name, justify="right", no_wrap=True)
    for score in found.classes:
        if score.support or score.predicted:
            numbers = (f"{score.support:,}", f"{score.predicted:,}", percent(score.precision), percent(score.recall))
            table.add_row(Text(printable(score.label)), *numbers)
    return table
