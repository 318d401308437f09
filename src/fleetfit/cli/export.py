"""``fleetfit export``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from click import Choice

from fleetfit.cli.options import AsJson, Debug, RunFolder, percent, stdout
from fleetfit.terminal import Phases, format_bytes, reporting

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from fleetfit.export import Export, Format, Quantize


def export(
    folder: RunFolder,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", "-d", metavar="ID", help="Export this device's model; repeat for more."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", "-a", help="Export the models of all devices.")] = False,
    kind: Annotated[
        str, typer.Option("--format", "-f", click_type=Choice(["onnx", "safetensors", "torch"]), help="What to write.")
    ] = "onnx",
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", click_type=Choice(["int8"]), help="With onnx: weights of a quarter the size."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Where each device gets a folder. Default: RUN/exports."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write devices' models for use without fleetfit.

    [bold]RUN[/bold] is the folder of a finished run. Each model is compared with the one that
    it comes from, on public samples and for several batch sizes, and its size
    with the storage of its device. What fails is not kept. An earlier export of
    the same device is replaced.

      onnx          model.onnx for ONNX Runtime, any batch size; README.md shows how
      safetensors   a copy of the device's folder, for fleetfit.load
      torch         model.pt2 for torch.export.load

    [bold]Examples[/bold]

      fleetfit export runs/digits --device phones-1
      fleetfit export runs/digits --all --quantize int8 --out int8
    """
    if bool(device) == every:
        raise typer.BadParameter("give --device ID or --all", param_hint="--device")
    with reporting(debug) as signals:
        with Phases(signals, f"run folder {folder}") as phases:
            phases("libraries", 0, 1)
            with signals.after_this():
                from fleetfit.export import device_ids, export_devices

            phases("libraries", 1, 1)
            chosen = list(dict.fromkeys(device or device_ids(folder)))
            exports, problems = export_devices(
                folder, chosen, out, cast("Format", kind), cast("Quantize | None", quantize), phases
            )
        if as_json:
            typer.echo(json.dumps({str(path): e.model_dump() for path, e in exports.items()}, indent=2))
        elif exports:
            _print_exports(exports)
        if problems:
            raise ValueError("\n".join(problems))


def _print_exports(exports: "Mapping[Path, Export]") -> None:
    console = stdout()
    quantized = any(e.int8 for e in exports.values())
    console.print(_export_table(exports, quantized))
    console.print(f"differs: the most that a logit is off{', before int8' if quantized else ''}", style="dim")
    if quantized:
        console.print("agree: public samples whose label stays; accuracy: on these, of all classes", style="dim")
    console.print()
    console.print(f"models:  {next(iter(exports)).parent} (one folder each)", soft_wrap=True)


def _export_table(exports: "Mapping[Path, Export]", quantized: bool) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("device", overflow="fold", min_width=10)
    names = ["size", "limit", "differs"]
    for name in names + ["float", "agree", "accuracy", "float"] * quantized:
        table.add_column(name, justify="right", no_wrap=True)
    for made in exports.values():
        row = [format_bytes(made.size_bytes), format_bytes(made.limit_bytes), f"{made.max_difference:.0e}"]
        if made.int8:
            shares = (made.int8.agreement, made.int8.accuracy, made.int8.accuracy_before)
            row += [format_bytes(made.int8.size_before_bytes), *map(percent, shares)]
        table.add_row(Text(made.device_id), *row)
    return table
