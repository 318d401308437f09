"""``fleetfit export``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from click import Choice

from fleetfit.cli.options import AsJson, Debug, RunFolder, expect_run, percent, stdout
from fleetfit.cli.terminal import Phases, format_bytes, reporting

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.table import Table

    from fleetfit.runs.export import Export, Format

FEW_SAMPLES = 100  # below which a share of them is known to several points only


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
    min_agreement: Annotated[
        float | None,
        typer.Option(
            "--min-agreement", metavar="SHARE", help="With int8: share of labels that must stay. Default: 0.95."
        ),
    ] = None,
    keep_anyway: Annotated[
        bool, typer.Option("--keep-anyway", help="With int8: keep models that change more than that.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Where each device gets a folder. Default: RUN/exports."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write devices' models for use without fleetfit.

    [bold]RUN[/bold] is the folder of a finished run. Each model is compared with the one
    that it comes from, on public samples and for several batch sizes, and its
    size with the storage of its device. What fails is not kept. An earlier export
    of the same device is replaced.

    With [bold]--quantize int8[/bold], a model must keep 95 of 100 labels of public samples,
    and lose 3 points of accuracy at most. Where it does not, layers that int8
    harms stay in float, the fewest that mend it; export.json and README.md name
    them. What cannot be mended is not kept, unless --keep-anyway is given.

      onnx          model.onnx for ONNX Runtime, of any batch size; README.md
                    has the lines that run it
      safetensors   a copy of the device's folder, for fleetfit.load
      torch         model.pt2 for torch.export.load

    [bold]Examples[/bold]

      fleetfit export runs/digits --device phones-1
      fleetfit export runs/digits --all --quantize int8 --out int8
    """
    if bool(device) == every:
        raise typer.BadParameter("give --device ID or --all", param_hint="--device")
    for name, given in (("--min-agreement", min_agreement is not None), ("--keep-anyway", keep_anyway)):
        if given and not quantize:
            raise typer.BadParameter("goes with --quantize int8", param_hint=name)
    with reporting(debug) as signals:
        expect_run(folder, "job.toml")
        with Phases(signals, f"run folder {folder}") as phases:
            phases("libraries", 0, 1)
            with signals.after_this():
                from fleetfit.runs.export import Int8, device_ids, export_devices

            phases("libraries", 1, 1)
            chosen = list(dict.fromkeys(device or device_ids(folder)))
            int8 = None
            if quantize:
                int8 = Int8(keep_anyway=keep_anyway) if min_agreement is None else Int8(min_agreement, keep_anyway)
            exports, problems = export_devices(folder, chosen, out, cast("Format", kind), int8, phases)
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
        console.print("float: the size before int8; agree: public samples whose label stays", style="dim")
        console.print("before, int8: accuracy on these samples, of all classes", style="dim")
        for line in _int8_notes(exports.values()):
            console.print(line, soft_wrap=True)
    console.print()
    console.print(f"models:  {next(iter(exports)).parent} (one folder each)", soft_wrap=True)


def _int8_notes(exports: "Iterable[Export]") -> list[str]:
    """What a table has no room for: layers in float, few samples, and what was kept although it changes too much."""
    lines, few = [], set()
    for made in exports:
        if made.int8 and made.int8.float_layers:
            lines.append(f"{made.device_id}: in float, since int8 harms them: {', '.join(made.int8.float_layers)}")
        if made.kept_anyway:
            lines.append(f"{made.device_id}: kept anyway; it changes more than it may")
        if made.int8 and made.num_samples < FEW_SAMPLES:
            few.add(made.num_samples)
    for number in sorted(few):
        lines.append(f"agreement on {number} samples says little; export.json has its 95 % interval")
    return lines


def _export_table(exports: "Mapping[Path, Export]", quantized: bool) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("device", overflow="fold", min_width=10)
    names = ["size", "limit", "differs"]
    for name in names + ["float", "agree", "before", "int8"] * quantized:
        table.add_column(name, justify="right", no_wrap=True)
    for made in exports.values():
        row = [format_bytes(made.size_bytes), format_bytes(made.limit_bytes), f"{made.max_difference:.0e}"]
        if made.int8:
            shares = (made.int8.agreement, made.int8.accuracy_before, made.int8.accuracy)
            row += [format_bytes(made.int8.size_before_bytes), *map(percent, shares)]
        table.add_row(Text(made.device_id), *row)
    return table
