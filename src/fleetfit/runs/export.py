"""Models for devices: ONNX (float or int8), safetensors or torch.export, each checked against the model it came from.

An export is a folder that appears whole or not at all: the model, how to use it, and what was measured.
No private sample is needed: the check runs on the job's held-out public samples.
"""

import contextlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped
from pydantic import Field

from fleetfit.config.job import load_job
from fleetfit.core.files import own_version, read_json, whole_folder, write_atomically
from fleetfit.core.progress import Progress, silent
from fleetfit.core.records import Record
from fleetfit.data.partition import public_test
from fleetfit.data.preprocessing import Preprocessing, TextPreprocessing
from fleetfit.data.samples import Samples
from fleetfit.data.sources import load_samples
from fleetfit.data.tokenizer_files import TOKENIZER_FILE, tokenizer_files
from fleetfit.models.classifier import Classifier
from fleetfit.runs.device_folder import EXPORT_FILE, ONNX_FILE, TORCH_FILE, ModelCard, load_model, read_card
from fleetfit.runs.folder import DATA_FILE, claim_data
from fleetfit.runs.int8 import MOST_DROP, Int8Check, Int8Model, compare, quantizable, quantized, smallest_loss
from fleetfit.runs.onnx_model import INPUT, OUTPUT, PACKAGES, OnnxCard, OnnxModel, need

Format = Literal["onnx", "safetensors", "torch"]
TOLERANCE = 1e-4
MOST_SAMPLES = 1000  # for a check; large images of more would fill the memory
BATCHES = (1, 2, 7, None)  # None: all samples at once
MOST_FOR_DAMAGE = 100  # samples, for each layer's
MARK = EXPORT_FILE

Inputs = Shaped[np.ndarray, "sample ..."]
Logits = Float32[np.ndarray, "sample class"]


@dataclass(frozen=True)
class Int8:
    """Store weights as int8, and compute with them.

    Attributes:
        min_agreement: The least share of public samples whose label must stay; accuracy may fall by 3 points.
        keep_anyway: Keep one that does not keep to these bounds, even with layers left in float.
    """

    min_agreement: float = 0.95
    keep_anyway: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_agreement <= 1:
            raise ValueError(f"--min-agreement must be in 0..1, got {self.min_agreement:g}")


class Export(Record):
    """export.json: what was made, and how it compares with the model it came from."""

    device_id: str
    format: Format
    size_bytes: int = Field(description="the model's file")
    limit_bytes: int = Field(description="the device's storage limit")
    num_samples: int = Field(description="public samples it was checked on")
    max_difference: float = Field(description="of a logit from the PyTorch model's, over all batch sizes; before int8")
    int8: Int8Check | None = None
    kept_anyway: bool = Field(False, description="although int8 changes more than it may")
    fleetfit_version: str = Field(default_factory=own_version)


def device_ids(run: Path) -> list[str]:
    """The devices of a finished run; device-2 comes before device-10.

    Raises:
        ValueError: there are none.
    """
    names = [path.parent.name for path in (run / "devices").glob("*/model.json")]
    if not names:
        raise ValueError(f"{run} is not the folder of a finished run: {run / 'devices'} holds no models")
    return sorted(names, key=lambda name: [(len(s), s) if s.isdigit() else (0, s) for s in re.split(r"(\d+)", name)])


def export_devices(
    run: Path,
    devices: Sequence[str],
    out: Path | None = None,
    kind: Format = "onnx",
    quantize: Int8 | None = None,
    progress: Progress = silent,
) -> tuple[dict[Path, Export], list[str]]:
    """Export models of a finished run. One that cannot be exported does not keep the others from it.

    Args:
        run: The run folder.
        devices: Which devices.
        out: Where each gets a folder of its name. Default: ``<run>/exports``.
        kind: The format.
        quantize: With onnx: weights of int8, and how much they may change. Layers that they harm stay in float.
        progress: Told which device is at work.

    Returns:
        Exports by folder, and for each that failed a sentence that says why.

    Raises:
        ValueError: no finished run, an unknown device, or a format that is not quantized.
        ImportError: packages for ONNX are missing.
        OSError: the folder cannot be written.
    """
    if quantize and kind != "onnx":
        raise ValueError(f"only onnx can be quantized, got {kind!r}")
    known = device_ids(run)
    for name in devices:
        if name not in known:
            raise ValueError(f"{name!r} is no device of {run}; there are {', '.join(known)}")
    if kind == "onnx":
        need(*PACKAGES)
    job = load_job(run / "job.toml")
    samples = load_samples(job, progress)
    check_data(run, samples)
    samples = public_test(samples, job.data, job.seed) if job.data.test_share else samples
    samples = samples.rows(torch.arange(min(len(samples), MOST_SAMPLES)))
    exports, problems = {}, []
    for number, name in enumerate(devices):
        progress("export", number, len(devices), name)
        folder = (out or run / "exports") / name
        try:
            exports[folder] = export_device(run / "devices" / name, folder, samples, kind, quantize)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    progress("export", len(devices), len(devices), f"{len(exports)} models")
    return exports, problems


def check_data(run: Path, samples: Samples) -> None:
    """Raises ValueError if the run was of other data than is there now: a check on that would say nothing.

    A deployment's run notes the data of the cloud's kit, which is not what the job's own source is compared with.
    """
    if not (run / DATA_FILE).exists() or samples.summary is None:
        return
    if read_json(run / DATA_FILE).get("source") == samples.summary.source:
        claim_data(run / DATA_FILE, samples.summary, True, "run the job again (another --out)")


def export_device(source: Path, folder: Path, samples: Samples, kind: Format, quantize: Int8 | None) -> Export:
    """Export one device's model.

    Raises:
        ValueError: the model is damaged, computes something else after the export, int8 changes more than it may, or
            its file is larger than the device's storage; nothing is kept then.
    """
    model, card = load_model(source), read_card(source)
    with torch.no_grad(), _calm():
        inputs = samples.inputs[:].numpy()
        expected = {size: model(samples.inputs[:size]).numpy() for size in BATCHES}
        with whole_folder(folder, MARK) as new:
            int8 = None
            beside = tokenizer_files(card.preprocessing) if isinstance(card.preprocessing, TextPreprocessing) else {}
            for name in (*beside, *(["model.json"] if kind != "onnx" else [])):
                write_atomically(new / name, (source / name).read_bytes())
            if kind == "onnx":
                file = new / ONNX_FILE
                difference, int8 = _write_onnx(model, card, file, inputs, expected, samples.labels.numpy(), quantize)
                if quantize and int8 and not (quantize.keep_anyway or int8.keeps_to(quantize.min_agreement)):
                    raise ValueError(
                        f"{_changes(int8, len(samples), quantize)}; nothing is kept; --keep-anyway keeps it"
                    )
                write_atomically(new / "README.md", _readme(card, samples.inputs.shape, int8, len(samples)))
            elif kind == "torch":
                file = new / TORCH_FILE
                difference = _write_program(model, file, inputs, expected)
            else:
                file = new / "model.safetensors"
                write_atomically(file, (source / file.name).read_bytes())
                copied = load_model(new)
                difference = _difference(lambda x: copied(torch.from_numpy(x)).numpy(), inputs, expected)
            size = file.stat().st_size
            if size > card.limit_bytes:
                smaller = "" if quantize or kind != "onnx" else "; --quantize int8 makes it smaller"
                raise ValueError(
                    f"{file.name} has {size:,} bytes, and the device stores {card.limit_bytes:,}; "
                    f"nothing is kept{smaller}"
                )
            report = Export(
                device_id=card.device_id,
                format=kind,
                size_bytes=size,
                limit_bytes=card.limit_bytes,
                num_samples=len(samples),
                max_difference=difference,
                int8=int8,
                kept_anyway=quantize is not None and int8 is not None and not int8.keeps_to(quantize.min_agreement),
            )
            write_atomically(new / MARK, report.model_dump_json(indent=2) + "\n")
    return report


def _changes(int8: Int8Check, number: int, quantize: Int8) -> str:
    return (
        f"with int8, {int8.agreement:.1%} of {number} public samples keep their label (--min-agreement is "
        f"{quantize.min_agreement:.1%}), and accuracy goes from {int8.accuracy_before:.1%} to {int8.accuracy:.1%} (it "
        f"may fall by {100 * MOST_DROP:g} points); leaving layers in float does not mend it"
    )


def _difference(run: Callable[[Inputs], Logits], inputs: Inputs, expected: dict[int | None, Logits]) -> float:
    """The largest difference of a logit over all batch sizes.

    Raises:
        ValueError: it is more than the tolerance, or the export does not run at one of the sizes.
    """
    largest = 0.0
    for size, before in expected.items():
        try:
            difference = float(np.abs(run(inputs[:size]) - before).max())
        except Exception as error:  # each runtime has its own
            raise ValueError(f"the exported model does not run on {len(before)} samples: {error}") from error
        if not difference <= TOLERANCE:  # also where it is not a number
            raise ValueError(
                f"the exported model computes something else: logits differ by {difference:g} on {len(before)} samples"
            )
        largest = max(largest, difference)
    return largest


# -- torch.export -----------------------------------------------------------------------------------------------------


def _program(model: Classifier, inputs: Inputs) -> torch.export.ExportedProgram:
    # Three of the first sample: a traced batch of one would become a constant.
    example = torch.from_numpy(inputs[:1]).expand(3, *inputs.shape[1:]).contiguous()
    return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _write_program(model: Classifier, file: Path, inputs: Inputs, expected: dict[int | None, Logits]) -> float:
    content = io.BytesIO()
    torch.export.save(_program(model, inputs), content)
    write_atomically(file, content.getvalue())
    program = torch.export.load(file).module()
    return _difference(lambda x: program(torch.from_numpy(x)).numpy(), inputs, expected)


# -- ONNX -------------------------------------------------------------------------------------------------------------


def _write_onnx(
    model: Classifier,
    card: ModelCard,
    file: Path,
    inputs: Inputs,
    expected: dict[int | None, Logits],
    labels: Int64[np.ndarray, " sample"],
    quantize: Int8 | None,
) -> tuple[float, Int8Check | None]:
    import onnx_ir

    metadata = OnnxCard(
        device_id=card.device_id,
        labels=card.labels,
        inputs=card.inputs,
        preprocessing=card.preprocessing,
        fleetfit_version=own_version(),
    ).to_metadata()
    base: Any = model.backbone.model
    base.set_attn_implementation("eager")  # fewer nodes: the fused one guards rows without any token
    program: Any = torch.onnx.export(
        _program(model, inputs),
        dynamo=True,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    named = onnx_ir.from_proto(onnx_ir.to_proto(program.model))  # a copy: of what is written, nobody knows the layers
    write_atomically(file, _slim(program.model, metadata))
    before = OnnxModel(file)
    difference = _difference(before.logits, inputs, expected)
    if quantize is None:
        return difference, None
    layers, size_before = quantizable(named.graph), file.stat().st_size
    with tempfile.TemporaryDirectory() as folder:
        whole, part = Path(folder, "whole.onnx"), Path(folder, "part.onnx")
        onnx_ir.save(named, whole)

        def make(float_layers: Sequence[str], per_channel: bool) -> Int8Model:
            quantized(whole, part, [node for layer in float_layers for node in layers[layer]], per_channel)
            content = _slim(onnx_ir.load(part), metadata)
            write_atomically(file, content)
            logits = _one_by_one(OnnxModel(file), inputs)
            how = {"per_channel": per_channel, "float_layers": tuple(float_layers)}
            return Int8Model(content, compare(logits, expected[None], labels, size_before, **how))

        def damage_of(float_layers: Sequence[str]) -> float:
            quantized(whole, part, [node for layer in float_layers for node in layers[layer]])
            write_atomically(file, _slim(onnx_ir.load(part), metadata))
            logits = _one_by_one(OnnxModel(file), inputs[:MOST_FOR_DAMAGE])
            return float(np.abs(logits - expected[None][:MOST_FOR_DAMAGE]).mean())

        made = smallest_loss(make, damage_of, list(layers), quantize.min_agreement)
    write_atomically(file, made.content)
    return difference, made.check


def _one_by_one(model: OnnxModel, inputs: Inputs) -> Logits:
    return np.concatenate([model.logits(inputs[i : i + 1]) for i in range(len(inputs))])


def _slim(model: Any, metadata: dict[str, str]) -> bytes:
    """The file's content with what is needed to run it, and no more.

    PyTorch writes stack traces and shapes for people: 500 KB beside the 150 KB of a small model's weights.
    """
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    outside = {*graph.inputs, *graph.outputs}
    values = [*graph.initializers.values(), *(out for node in graph.all_nodes() for out in node.outputs)]
    inside = [value for value in values if value not in outside]
    for prefix in ("_", ""):  # in two steps, so that no new name meets an old one
        for number, value in enumerate(inside):
            value.name = prefix + np.base_repr(number, 36).lower()
    for value in (*inside, *outside):
        value.metadata_props.clear()
    for node in graph.all_nodes():
        node.name = None
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    proto = onnx_ir.to_proto(model)
    del proto.graph.value_info[:]
    content: bytes = proto.SerializeToString()
    return content


def _weights(int8: Int8Check | None, number: int) -> str:
    """What a reader must know of the weights."""
    if int8 is None:
        return ""
    left = f", but those of {', '.join(int8.float_layers)}, which int8 harms" if int8.float_layers else ""
    return (
        f", its weights as int8{left}. {int8.agreement:.1%} of {number} public samples have the label that the float "
        f"model gives them (95 % interval from {int8.agreement_at_least:.1%}); accuracy on them {int8.accuracy:.1%}, "
        f"before {int8.accuracy_before:.1%}"
    )


def _readme(card: ModelCard, shape: Sequence[int], int8: Int8Check | None, number: int) -> str:
    """How to run the model without fleetfit and without torch; a test runs the lines."""
    form = card.preprocessing
    if isinstance(form, TextPreprocessing):
        return _readme_of_texts(card, int8, number)
    if form is None:
        values = f'numpy.zeros((1, {", ".join(map(str, shape))}), "float32")'
        lines = [f"import json, numpy, onnxruntime  # pip install numpy onnxruntime\nvalues = {values}  # yours here"]
    else:
        lines = [
            "import json, numpy, onnxruntime  # pip install numpy onnxruntime pillow",
            "from PIL import Image, ImageOps",
            "",
            'picture = ImageOps.exif_transpose(Image.open("picture.png"))  # yours: 8 bits, not transparent',
            *_decoding(form),
            f"values = {form.numpy_code('pixels')}",
        ]
    code = "\n".join(lines)
    return f"""# {card.device_id}

A model made by fleetfit {own_version()}{_weights(int8, number)}. Inputs: {card.inputs}.

```python
{code}
model = onnxruntime.InferenceSession("{ONNX_FILE}")
logits = model.run(None, {{"{INPUT}": values}})[0]
print([json.loads(model.get_modelmeta().custom_metadata_map["labels"])[i] for i in logits.argmax(1)])
```
"""


def _decoding(form: Preprocessing) -> list[str]:
    """Lines of Python that make the form's pixels of an upright picture, as ``data.pixels.decode`` does."""
    rows, columns = form.size
    resampling = f"Image.Resampling.{form.resample.upper()}"
    lines = [f'picture = picture.convert("{"L" if form.channels == 1 else "RGB"}")']
    if isinstance(form.resize, int):
        lines += [
            "width, height = picture.size",
            f"longer = int({form.resize} * max(width, height) / min(width, height))",
            f"size = ({form.resize}, longer) if height >= width else (longer, {form.resize})",
        ]
    else:
        lines.append(f"size = {tuple(reversed(form.resize or form.size))}")
    lines.append(f"picture = picture.resize(size, {resampling}) if picture.size != size else picture")
    if form.resize is not None and form.resize != form.size:
        lines += [
            f"left, top = (size[0] - {columns}) // 2, (size[1] - {rows}) // 2",
            f"picture = picture.crop((left, top, left + {columns}, top + {rows}))",
        ]
    scale = "" if form.maximum == 255 else f" / 255 * {form.maximum!r}"
    pixels = f"numpy.reshape(picture, ({rows}, {columns}, {form.channels})).transpose(2, 0, 1)[None]{scale}"
    return [*lines, f"pixels = {pixels}"]


def _readme_of_texts(card: ModelCard, int8: Int8Check | None, number: int) -> str:
    return f"""# {card.device_id}

A model made by fleetfit {own_version()}{_weights(int8, number)}. Inputs: {card.inputs}.

```python
import json, numpy, onnxruntime, tokenizers  # pip install numpy onnxruntime tokenizers
model, texts = onnxruntime.InferenceSession("{ONNX_FILE}"), ["a text", "and another"]  # yours here
tokens = [t.ids for t in tokenizers.Tokenizer.from_file("{TOKENIZER_FILE}").encode_batch(texts)]
logits = model.run(None, {{"{INPUT}": numpy.array(tokens, "int64")}})[0]
print([json.loads(model.get_modelmeta().custom_metadata_map["labels"])[i] for i in logits.argmax(1)])
```
"""


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Exporters warn of packages that these models do not need, and of shapes that are not wanted."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
