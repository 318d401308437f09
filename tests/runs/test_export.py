"""Exports compute what the model computes, fit the device, run without torch, and appear whole or not at all."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from PIL import Image
from typer.testing import CliRunner

import fleetfit
from fleetfit import cli
from fleetfit.config.job import Job
from fleetfit.core.randomness import seeded_init
from fleetfit.core.records import BackboneShape, Block, HeaderSpec
from fleetfit.data.partition import public_test, share_out
from fleetfit.data.pixels import decode
from fleetfit.data.preprocessing import Preprocessing
from fleetfit.data.sources import load_samples
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone, ElasticBackbone
from fleetfit.models.header import build_header
from fleetfit.models.pruning import extract, prunable_layers
from fleetfit.runs import export
from fleetfit.runs.device_folder import ModelCard
from fleetfit.runs.export import Export, Int8, device_ids, export_devices
from fleetfit.runs.folder import RunFolder
from fleetfit.runs.onnx_model import PACKAGES, OnnxModel
from fleetfit.runs.predict import predict

torch.set_num_threads(1)

CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
}
DINOV2 = {name: value for name, value in CONFIG.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
BLOCKS = (
    Block(input_1=0, input_2=1, operation_1="conv3", operation_2="downsample"),
    Block(input_1=2, input_2=1, operation_1="conv1", operation_2="max_pool"),
)
LABELS = tuple(f"digit {i}" for i in range(10))
SAMPLES = load_samples(Job())


def make_model(kind: str) -> Classifier:
    """linear: whole backbone; blocks, pruned, dinov2: two convolutions, cut backbone; mlp: a hidden layer."""
    specs = {"linear": HeaderSpec(), "mlp": HeaderSpec(kind="mlp", hidden=6)}
    with seeded_init(0, "export", kind):
        backbone = Backbone("dinov2", DINOV2) if kind == "dinov2" else Backbone("vit", CONFIG)
        if kind in ("blocks", "pruned", "dinov2"):
            backbone = ElasticBackbone(backbone, "spread").extract(BackboneShape(width=0.5, depth=1))
        spec = specs.get(kind, HeaderSpec(kind="blocks", blocks=BLOCKS, channels=4, pooling=2))
        header = build_header(spec, backbone.feature_shape, 10)
        for parameter in [*backbone.parameters(), *header.parameters()]:
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    if kind == "pruned":
        layers = prunable_layers(header)
        header = extract(header, {n: torch.arange(layer.num_neurons) % 3 != 1 for n, layer in layers.items()})
    return Classifier(backbone, header).eval()


def write_run(folder: Path, kinds: dict[str, str], limit_bytes: int = 10**6) -> Path:
    with RunFolder(folder, Job()) as run:
        for name, kind in kinds.items():
            model = make_model(kind)
            card = ModelCard(
                device_id=name,
                cluster="phones",
                family=model.backbone.family,
                config=model.backbone.config,
                header=model.header.spec,
                labels=LABELS,
                width=0.5,
                depth=1,
                inputs="pixels",
                preprocessing=SAMPLES.inputs.form,
                size_bytes=1,
                limit_bytes=limit_bytes,
                accuracy=None,
            )
            run.write_device(model, card)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("linear", "blocks", "pruned", "dinov2")
    folder = write_run(tmp_path_factory.mktemp("a") / "run", {f"phones-{n}": n for n in names})
    exports, problems = export_devices(folder, [f"phones-{n}" for n in names])
    assert not problems
    assert [path.name for path in exports] == [f"phones-{n}" for n in names]
    return folder


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# -- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "blocks", "pruned", "dinov2"])
@torch.no_grad()
def test_onnx_computes_what_the_model_computes(run: Path, kind: str) -> None:
    folder = run / "exports" / f"phones-{kind}"
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    model = make_model(kind)
    for size in (1, 2, 5, 64):
        inputs = SAMPLES.inputs[:size]
        expected = model(inputs).numpy()
        (logits,) = session.run(None, {"inputs": inputs.numpy()})
        assert logits.shape == (size, 10)
        assert np.abs(logits - expected).max() <= 1e-4
        assert np.ptp(expected) > 0.1
    made = Export.model_validate_json((folder / "export.json").read_text())
    assert 0 <= made.max_difference <= 1e-4
    assert made.size_bytes == (folder / "model.onnx").stat().st_size
    assert tree(folder) == ["README.md", "export.json", "model.onnx"]


def test_the_file_says_all_that_its_user_needs(run: Path) -> None:
    path = run / "exports" / "phones-linear" / "model.onnx"
    told = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert json.loads(told["labels"]) == list(LABELS)
    assert json.loads(told["preprocessing"]) == SAMPLES.inputs.form.model_dump(mode="json")  # type: ignore[union-attr]
    assert (told["device_id"], told["inputs"]) == ("phones-linear", "pixels")
    assert told["fleetfit_version"] == fleetfit.__version__
    graph = onnx.load(path).graph
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == ["batch", 1, 8, 8]
    assert [d.dim_param or d.dim_value for d in graph.output[0].type.tensor_type.shape.dim] == ["batch", 10]


def test_the_file_is_hardly_larger_than_the_weights(run: Path) -> None:
    for kind in ("linear", "pruned"):
        content = (run / "exports" / f"phones-{kind}" / "model.onnx").read_bytes()
        proto = onnx.load_from_string(content)
        onnx.checker.check_model(proto, full_check=True)
        assert not proto.graph.value_info
        assert len(content) <= 4 * sum(t.numel() for t in make_model(kind).state_dict().values()) + 10_000
        assert b"fleetfit/src" not in content
        assert b".py" not in content, "paths and stack traces of this machine travel with the model"


@pytest.mark.parametrize("kind", ["pruned", "dinov2"])
def test_the_readme_labels_a_picture_as_predict_does_where_there_is_no_torch(run: Path, kind: str) -> None:
    folder = run / "exports" / f"phones-{kind}"
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    chance = np.random.default_rng(3)
    block = "import sys; sys.modules.update(torch=None, fleetfit=None)\n"
    for size, mode in (((8, 8), "L"), ((37, 61), "RGB"), ((80, 24), "L")):
        bands = (3,) if mode == "RGB" else ()
        picture = Image.fromarray(chance.integers(0, 256, (*size, *bands), dtype=np.uint8))
        picture.save(folder / "picture.png")
        done = subprocess.run([sys.executable, "-c", block + code[1]], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (found,) = predict(folder, [folder / "picture.png"])
        assert done.stdout.strip() == str([found.label])
    (folder / "picture.png").unlink()


@pytest.mark.parametrize(
    "form",
    [
        {"size": (8, 8), "channels": 1, "maximum": 16.0, "mean": (0.5,), "std": (0.5,)},
        {"size": (16, 24), "channels": 3, "maximum": 255.0, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)},
        {"size": (16, 16), "channels": 3, "maximum": 255.0, "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize": 20},
        {"size": (16, 16), "channels": 3, "maximum": 255.0, "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize": (20, 22)},
        {"size": (8, 8), "channels": 1, "maximum": 255.0, "mean": (0.5,), "std": (0.5,), "resample": "bicubic"},
    ],
)
@pytest.mark.parametrize("size", [(40, 30), (31, 64), (8, 8), (20, 20)])
def test_the_readmes_lines_decode_as_fleetfit_does(form: dict[str, Any], size: tuple[int, int], tmp_path: Path) -> None:
    made = Preprocessing(**form)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
    own: dict[str, Any] = {"picture": picture, "Image": Image, "numpy": np}
    exec("\n".join(export._decoding(made)), own)
    expected = decode(picture, made).pixels.astype(np.float64) / 255 * made.maximum
    assert np.allclose(own["pixels"][0], expected)


def test_an_export_that_computes_something_else_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OnnxModel.logits
    for wrong, says in (
        (lambda self, x: real(self, x) + 2e-4, "computes something else: logits differ by 0.0002"),
        (lambda self, x: real(self, x) * np.nan, "computes something else: logits differ by nan"),
        (lambda self, x: real(self, x[:1] if len(x) == 7 else x), "computes something else|does not run on 7"),
        (lambda self, x: real(self, x[:, :0]), "does not run on 1 samples"),
    ):
        monkeypatch.setattr(OnnxModel, "logits", wrong)
        monkeypatch.setattr(export, "_program", lambda *_: None)
        monkeypatch.setattr(export.torch.onnx, "export", lambda *_, **__: Loaded(run))
        exports, (problem,) = export_devices(run, ["phones-linear"], tmp_path)
        assert re.search(says, problem), problem
        assert not exports
        assert list(tmp_path.iterdir()) == []


class Loaded:
    """What torch.onnx.export gives, made before."""

    def __init__(self, run: Path) -> None:
        import onnx_ir

        self.model = onnx_ir.load(run / "exports" / "phones-linear" / "model.onnx")


def test_int8_is_smaller_and_says_what_it_costs(run: Path, tmp_path: Path) -> None:
    exports, problems = export_devices(run, ["phones-linear"], tmp_path, "onnx", Int8())
    ((folder, made),) = exports.items()
    assert (problems, folder) == ([], tmp_path / "phones-linear")
    assert made.int8 is not None
    assert made.int8.size_before_bytes == (run / "exports" / "phones-linear" / "model.onnx").stat().st_size
    assert made.size_bytes == (folder / "model.onnx").stat().st_size < 0.8 * made.int8.size_before_bytes
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    public = public_test(SAMPLES, Job().data, Job().seed)
    guesses = [int(session.run(None, {"inputs": x[None].numpy()})[0].argmax()) for x in public.inputs[:]]
    with torch.no_grad():
        before = make_model("linear")(public.inputs[:]).argmax(1)
    agreement = float((torch.tensor(guesses) == before).float().mean())
    assert made.int8.agreement == pytest.approx(agreement)
    assert made.int8.agreement > 0.8
    assert made.int8.accuracy == pytest.approx(float((torch.tensor(guesses) == public.labels).float().mean()))
    assert made.int8.accuracy_before == pytest.approx(float((before == public.labels).float().mean()))
    assert "int8" in (folder / "README.md").read_text()


@torch.no_grad()
def wide_spread(model: Classifier) -> None:
    """The same function, in weights that 256 steps cannot say: one input of a layer is small, its weights large."""
    norm = model.backbone.model.layernorm
    norm.weight[0] /= 1e4
    norm.bias[0] /= 1e4
    model.header.classifier.last.weight[:, 0] *= 1e4


@torch.no_grad()
def one_loud_class(model: Classifier) -> None:
    """The first class has large weights and never wins; between the others, small ones decide."""
    last = model.header.classifier.last
    last.weight[1:] *= 1e-3
    last.bias.copy_(torch.tensor([-50.0] + 9 * [0.0]))


def write_changed(folder: Path, change: Any) -> Path:
    write_run(folder, {"phones-1": "linear"})
    path = folder / "devices" / "phones-1" / "model.safetensors"
    model = make_model("linear")
    change(model)
    safetensors.torch.save_file({n: t.contiguous() for n, t in model.state_dict().items()}, path, {"format": "pt"})
    return folder


def float_weights(file: Path) -> int:
    """Matrices that are still multiplied in float; those of attention have no weight."""
    graph = onnx.load(file).graph
    constant = {tensor.name for tensor in graph.initializer}
    return sum(node.op_type in ("MatMul", "Gemm") and not constant.isdisjoint(node.input) for node in graph.node)


def test_a_layer_that_int8_breaks_stays_in_float_and_is_named(tmp_path: Path) -> None:
    folder = write_changed(tmp_path / "run", wide_spread)
    exports, problems = export_devices(folder, ["phones-1"], tmp_path / "out", quantize=Int8())
    assert problems == []
    ((path, made),) = exports.items()
    assert made.int8 is not None
    assert made.int8.float_layers == ("header.classifier.last",)
    assert float_weights(path / "model.onnx") == 1
    assert made.int8.agreement >= 0.95
    assert not made.kept_anyway
    assert made.size_bytes < made.int8.size_before_bytes
    readme = (path / "README.md").read_text()
    assert "as int8, but those of header.classifier.last, which int8 harms. " in readme
    assert Export.model_validate_json((path / "export.json").read_text()) == made


def test_scales_by_channel_are_tried_before_layers_stay_in_float(tmp_path: Path) -> None:
    folder = write_changed(tmp_path / "run", one_loud_class)
    exports, problems = export_devices(folder, ["phones-1"], tmp_path / "out", quantize=Int8())
    assert problems == []
    ((path, made),) = exports.items()
    assert made.int8 is not None
    assert (made.int8.per_channel, made.int8.float_layers) == (True, ())
    assert float_weights(path / "model.onnx") == 0


def test_what_cannot_be_mended_is_kept_only_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_changed(tmp_path / "run", wide_spread)
    monkeypatch.setattr(export, "quantizable", lambda graph: {})  # no layer can be told from the others
    exports, (problem,) = export_devices(folder, ["phones-1"], tmp_path / "out", quantize=Int8())
    assert exports == {}
    assert not list((tmp_path / "out").rglob("*.*"))
    assert re.fullmatch(
        r"phones-1: with int8, \d+\.\d% of 180 public samples keep their label \(--min-agreement is 95\.0%\), and "
        r"accuracy goes from \d+\.\d% to \d+\.\d% \(it may fall by 3 points\); leaving layers in float does not mend "
        r"it; nothing is kept; --keep-anyway keeps it",
        problem,
    )
    exports, problems = export_devices(folder, ["phones-1"], tmp_path / "out", quantize=Int8(keep_anyway=True))
    assert problems == []
    (made,) = exports.values()
    assert made.kept_anyway
    assert made.int8 is not None
    assert made.int8.agreement < 0.95
    assert f"{made.int8.agreement:.1%} of 180 public samples" in (tmp_path / "out/phones-1/README.md").read_text()


def test_the_command_says_what_stays_in_float_and_that_few_samples_say_little(tmp_path: Path) -> None:
    folder = write_changed(tmp_path / "run", wide_spread)
    job = (folder / "job.toml").read_text()
    (folder / "job.toml").write_text(job.replace("[data]", "[data]\nlimit = 200"))

    def shell(*arguments: str) -> Any:
        return CliRunner().invoke(
            cli.app, ["export", str(folder), "-d", "phones-1", "-o", str(tmp_path / "out"), *arguments]
        )

    result = shell("--quantize", "int8")
    assert result.exit_code == 0, result.output
    assert "phones-1: in float, since int8 harms them: header.classifier.last" in result.stdout
    assert "agreement on 20 samples says little; export.json has its 95 % interval" in result.stdout
    for arguments, said in (
        (("--min-agreement", "0.9"), "goes with --quantize int8"),
        (("--keep-anyway",), "goes with --quantize int8"),
        (("--quantize", "int8", "--min-agreement", "95"), "--min-agreement must be in 0..1, got 95"),
        (("--quantize", "int8", "--min-agreement", "nan"), "--min-agreement must be in 0..1, got nan"),
    ):
        result = shell(*arguments)
        assert result.exit_code != 0
        assert said in result.stderr


def test_the_samples_of_the_check_are_public() -> None:
    job = Job()
    data = share_out(SAMPLES, job.data, {"phones": ["phones-1", "phones-2"]}, job.seed)
    assert torch.equal(public_test(SAMPLES, job.data, job.seed).inputs[:], data.public.test.inputs[:])


# -- the other formats ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_safetensors_is_a_device_folder(run: Path, tmp_path: Path) -> None:
    exports, problems = export_devices(run, ["phones-pruned"], tmp_path, "safetensors")
    ((folder, made),) = exports.items()
    assert (problems, made.max_difference) == ([], 0.0)
    assert tree(folder) == ["export.json", "model.json", "model.safetensors"]
    assert torch.equal(fleetfit.load(folder)(SAMPLES.inputs[:4]), make_model("pruned")(SAMPLES.inputs[:4]))


@torch.no_grad()
def test_torch_is_an_exported_program(run: Path, tmp_path: Path) -> None:
    exports, problems = export_devices(run, ["phones-pruned"], tmp_path, "torch")
    ((folder, _),) = exports.items()
    assert problems == []
    program = torch.export.load(folder / "model.pt2").module()
    for size in (1, 3):
        expected = make_model("pruned")(SAMPLES.inputs[:size])
        assert torch.allclose(program(SAMPLES.inputs[:size]), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"model\.pt2 is an exported model: it may hold pickles.* torch\.export\.load"):
        fleetfit.load(folder)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_larger_than_the_device_is_refused_and_the_others_are_not(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"phones-1": "mlp"}, limit_bytes=5000)
    write_run(tmp_path / "run", {"phones-2": "mlp"})
    size = (folder / "devices" / "phones-1" / "model.safetensors").stat().st_size
    exports, (problem,) = export_devices(folder, device_ids(folder), kind="safetensors")
    assert problem == (f"phones-1: model.safetensors has {size:,} bytes, and the device stores 5,000; nothing is kept")
    assert [path.name for path in exports] == ["phones-2"]
    assert [path.name for path in (folder / "exports").iterdir()] == ["phones-2"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "nan"])
def test_a_damaged_model_is_not_exported(tmp_path: Path, damage: str) -> None:
    folder = write_run(tmp_path / "run", {"phones-1": "linear"})
    path = folder / "devices" / "phones-1" / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "missing":
        path.unlink()
    else:
        tensors = safetensors.torch.load_file(path)
        tensors["header.classifier.last.bias"][0] = torch.nan
        safetensors.torch.save_file(tensors, path)
    exports, (problem,) = export_devices(folder, ["phones-1"], kind="safetensors")
    says = {
        "truncated": "is corrupt",
        "missing": "is missing",
        "nan": "header.classifier.last.bias holds 1 NaN of 10 values",
    }[damage]
    assert problem.startswith("phones-1: ")
    assert says in problem
    assert not exports
    assert list((folder / "exports").iterdir() if (folder / "exports").exists() else []) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named_with_the_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(cli.app, ["export", str(run), "-d", "phones-linear", "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert f"error: ONNX needs {package}: " in result.stderr
    assert "pip install onnx onnxscript onnxruntime\n" in result.stderr
    assert not (tmp_path / "out").exists()
    exports, problems = export_devices(run, ["phones-linear"], tmp_path, "safetensors")
    assert (len(exports), problems) == (1, []), "safetensors need none of them"


def test_an_earlier_export_is_replaced_and_a_folder_of_another_is_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "phones-linear").mkdir()
    (tmp_path / "phones-linear" / "mine.txt").touch()
    exports, (problem,) = export_devices(run, ["phones-linear"], tmp_path, "safetensors")
    assert "is there already and was not made by this command; choose another --out" in problem
    assert tree(tmp_path) == ["phones-linear/mine.txt"]
    (tmp_path / "phones-linear" / "export.json").touch()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "_difference", full)
        with pytest.raises(OSError, match="No space"):
            export_devices(run, ["phones-linear"], tmp_path, "safetensors")
    assert tree(tmp_path) == ["phones-linear/export.json", "phones-linear/mine.txt"], "the old one was touched"
    assert [p.name for p in tmp_path.iterdir()] == ["phones-linear"]
    exports, problems = export_devices(run, ["phones-linear"], tmp_path, "safetensors")
    assert (len(exports), problems) == (1, [])
    assert "phones-linear/mine.txt" not in tree(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["phones-linear"]


def test_what_cannot_be_asked(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'phones-9' is no device of .*; there are phones-blocks, phones-dinov2, phones-linear"
    ):
        export_devices(run, ["phones-9"])
    with pytest.raises(ValueError, match="only onnx can be quantized, got 'torch'"):
        export_devices(run, ["phones-linear"], kind="torch", quantize=Int8())
    with pytest.raises(ValueError, match="is not the folder of a finished run"):
        device_ids(tmp_path)


def test_devices_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("phones-10", "boxes-1", "phones-2"):
        (tmp_path / "devices" / name).mkdir(parents=True)
        (tmp_path / "devices" / name / "model.json").touch()
    assert device_ids(tmp_path) == ["boxes-1", "phones-2", "phones-10"]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(run: Path, tmp_path: Path) -> None:
    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, ["export", str(run), "-f", "safetensors", "-o", str(tmp_path), *arguments])

    result = invoke("--all")
    assert result.exit_code == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines() if line.startswith(" phones")] == [
        *("phones-blocks", "phones-dinov2", "phones-linear", "phones-pruned")
    ]
    assert f"models:  {tmp_path} (one folder each)" in result.stdout
    assert re.search(r"^export: done in .*, 4 models$", result.stderr, re.MULTILINE)
    told = json.loads(invoke("-d", "phones-blocks", "--json").stdout)
    assert list(told) == [str(tmp_path / "phones-blocks")]
    assert Export.model_validate(told[str(tmp_path / "phones-blocks")]).format == "safetensors"
    assert invoke().exit_code == 2
    assert invoke("--all", "-d", "phones-blocks").exit_code == 2
    assert invoke("--all", "--format", "tflite").exit_code == 2
    (run / "devices" / "phones-blocks" / "model.json").rename(run / "model.json")
    try:
        (run / "devices" / "phones-blocks" / "model.json").write_text("{}")
        result = invoke("--all")
    finally:
        (run / "model.json").rename(run / "devices" / "phones-blocks" / "model.json")
    assert result.exit_code == 1
    assert "phones-linear" in result.stdout
    assert re.search(r"^error: phones-blocks: .* is not a model card", result.stderr, re.MULTILINE)
