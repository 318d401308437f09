"""A device's folder: models that load, and what is said of those that do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fleetfit.config.job import Job
from fleetfit.core import checkpoints
from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import BackboneShape, Block, HeaderSpec
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone, ElasticBackbone
from fleetfit.models.header import build_header
from fleetfit.models.pruning import extract, prunable_layers
from fleetfit.runs import device_folder as model_folder
from fleetfit.runs import folder as runs_folder
from fleetfit.runs.device_folder import ModelCard, load_model, read_card
from fleetfit.runs.folder import RunFolder

torch.set_num_threads(1)


CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
}
BLOCKS = (
    Block(input_1=0, input_2=1, operation_1="conv3", operation_2="conv1"),
    Block(input_1=2, input_2=0, operation_1="downsample", operation_2="conv5"),
)
SPECS = {
    "linear": HeaderSpec(),
    "mlp": HeaderSpec(kind="mlp", hidden=10),
    "cnn": HeaderSpec(kind="cnn_project", channels=6, pooling=2),
    "blocks": HeaderSpec(kind="blocks", blocks=BLOCKS, repeats=2, channels=6, pooling=2, hidden=8),
}


def make_model(spec: HeaderSpec, pruned: bool, cut: bool) -> Classifier:
    with seeded_init(0, "model", spec.kind):
        backbone = Backbone("vit", CONFIG)
        if cut:
            backbone = ElasticBackbone(backbone, "spread").extract(BackboneShape(width=0.5, depth=2))
        header = build_header(spec, backbone.feature_shape, 3)
        for parameter in [*backbone.parameters(), *header.parameters()]:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    if pruned:
        generator = named_generator(0, "kept")
        layers = prunable_layers(header)
        kept = {n: torch.rand(layer.num_neurons, generator=generator) < 0.6 for n, layer in layers.items()}
        for mask in kept.values():
            mask[0] = True
        header = extract(header, kept)
        assert not layers or any(not m.all() for m in kept.values())
    return Classifier(backbone, header)


def make_card(model: Classifier, **changed: Any) -> ModelCard:
    fields: dict[str, Any] = {
        "device_id": "phones-1",
        "cluster": "phones",
        "family": "vit",
        "config": model.backbone.config,
        "header": model.header.spec,
        "labels": ("a", "b", "c"),
        "width": 0.5,
        "depth": 2,
        "inputs": "pixels",
        "size_bytes": 1,
        "limit_bytes": 2,
        "accuracy": None,
    }
    return ModelCard(**{**fields, **changed})


def written(tmp_path: Path, model: Classifier, card: ModelCard | None = None) -> Path:
    with RunFolder(tmp_path / "run", Job()) as folder:
        folder.write_device(model, card or make_card(model))
    return tmp_path / "run" / "devices" / "phones-1"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("cut", [False, True], ids=["full", "cut"])
@torch.no_grad()
def test_a_model_that_is_loaded_is_the_one_that_was_written(
    tmp_path: Path, spec: HeaderSpec, pruned: bool, cut: bool
) -> None:
    model = make_model(spec, pruned, cut).eval()
    folder = written(tmp_path, model)
    loaded = load_model(str(folder))
    inputs = torch.randn(5, 1, 8, 8, generator=named_generator(0, "inputs"))
    assert not loaded.training
    assert torch.equal(loaded(inputs), model(inputs))
    assert loaded(inputs[:0]).shape == (0, 3)
    state: dict[str, Tensor] = loaded.state_dict()
    assert {n: tuple(t.shape) for n, t in state.items()} == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert read_card(folder) == make_card(model)
    size = (folder / "model.safetensors").stat().st_size
    assert size < 4 * sum(t.numel() for t in state.values()) + 10_000


def test_the_card_comes_after_the_tensors_that_it_vouches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = runs_folder.write_atomically, []

    def write(path: Path, content: bytes | str) -> None:
        seen.append(path.name)
        real(path, content)

    for module in (checkpoints, runs_folder, model_folder):
        monkeypatch.setattr(module, "write_atomically", write)
    written(tmp_path, make_model(SPECS["linear"], False, False))
    assert seen == ["job.toml", "model.safetensors", "model.json"]


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path, make_model(SPECS["linear"], False, False))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_model(folder)
    (folder / "model.json").unlink()
    for nothing in (folder, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"is no device folder: .*model\.json is missing") as error:
            load_model(nothing)
        assert str(nothing) in str(error.value)


def edited(folder: Path, **changed: Any) -> Path:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return folder


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"format": 2}, r"model\.json has format 2, this fleetfit reads 1"),
        ({"surprise": 1}, r"model\.json is not a model card: surprise"),
        ({"labels": 3}, r"model\.json is not a model card: labels"),
        ({"header": {"kind": "wide"}}, r"model\.json is not a model card: header\.kind"),
        ({"family": "swin"}, r"model\.safetensors does not fit .*model\.json: model\.family must be one of"),
        ({"config": {**CONFIG, "num_hidden_layers": 2}}, r"model\.safetensors does not fit"),
        ({"config": {**CONFIG, "hidden_size": 32}}, r"model\.safetensors does not fit"),
        ({"config": {**CONFIG, "hiden_size": 32}}, "did you mean 'hidden_size'"),
        ({"config": {**CONFIG, "num_attention_heads": 0}}, r"model\.safetensors does not fit"),
        ({"config": {**CONFIG, "hidden_act": "nope"}}, r"model\.safetensors does not fit"),
        ({"labels": ["a", "b"]}, r"model\.safetensors does not fit .*last\.weight must have shape \(2,"),
        ({"header": {"kind": "linear"}}, r"model\.safetensors does not fit .*is unexpected"),
        ({"header": {"kind": "mlp", "hidden": 4}}, r"model\.safetensors does not fit"),
    ],
)
def test_a_card_that_is_wrong_or_another_models(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    folder = written(tmp_path, make_model(SPECS["mlp"], False, False))
    with pytest.raises(ValueError, match=says) as error:
        load_model(edited(folder, **changed))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"", b"\xff", b"{" * 2000])
def test_a_card_that_is_none(tmp_path: Path, content: bytes) -> None:
    folder = written(tmp_path, make_model(SPECS["linear"], False, False))
    (folder / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.json is not a model card"):
        load_model(folder)


def test_tensors_of_another_model_or_of_none(tmp_path: Path) -> None:
    model = make_model(SPECS["mlp"], True, False)
    folder = written(tmp_path, model)
    path, state = folder / "model.safetensors", model.state_dict()
    name = "header.classifier.first.weight"
    for other in (
        {n: t for n, t in state.items() if n != name},
        {**state, name: state[name][:, :-1].clone()},
        {**state, "header.more": torch.zeros(1)},
        {**state, "backbone.more": torch.zeros(1)},
        {n.replace("header", "footer"): t for n, t in state.items()},
        {},
    ):
        safetensors.torch.save_file(other, path)
        with pytest.raises(ValueError, match=r"model\.safetensors does not fit .*model\.json"):
            load_model(folder)
    whole = safetensors.torch.save(dict(state))
    for blob in (b"", whole[:-1], whole[:100], b"\xff" * 100):
        path.write_bytes(blob)
        with pytest.raises(ValueError, match=r"model\.safetensors is corrupt"):
            load_model(folder)
    # A dtype that no model has, in the place of a tensor that this one has.
    bias = "header.classifier.last.bias"
    whole = safetensors.torch.save({n: t for n, t in state.items() if n != bias})
    length = int.from_bytes(whole[:8], "little")
    end = len(whole) - 8 - length
    entries = json.loads(whole[8 : 8 + length])
    for dtype, size in (("F4", 2), ("F8_E8M0", 4), ("C64", 32), ("BOOL", 4)):
        header = json.dumps(
            {**entries, bias: {"dtype": dtype, "shape": [4], "data_offsets": [end, end + size]}}
        ).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :] + b"\1" * size)
        with pytest.raises(ValueError, match=r"model\.safetensors (does not fit|is corrupt)"):
            load_model(folder)
