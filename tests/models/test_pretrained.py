"""Pre-trained weights: a folder of each family gives the same model here; whatever is wrong with one is said."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fleetfit.models.elastic import Backbone, ElasticBackbone
from fleetfit.models.pretrained import fingerprint, load_pretrained
from fleetfit.randomness import named_generator, seeded_init
from fleetfit.records import BackboneShape

torch.set_num_threads(1)

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}
KEYS = {"vit": {"intermediate_size": 12}, "deit": {"intermediate_size": 12}, "dinov2": {"mlp_ratio": 1}}
NAMES = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2"}
QUERY = "vit.encoder.layer.1.attention.attention.query.weight"  # as save_pretrained names it
POSITIONS = "vit.embeddings.position_embeddings"


def save(
    folder: Path, family: str, task: str = "ForImageClassification", **keys: object
) -> transformers.PreTrainedModel:
    """A model of Transformers, every parameter random, as ``save_pretrained`` writes it."""
    config = getattr(transformers, f"{NAMES[family]}Config")(**SIZES | KEYS[family] | keys)
    with seeded_init(0, family):
        model = getattr(transformers, f"{NAMES[family]}{task}")(config)
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model.eval()


def make_inputs() -> Tensor:
    return torch.randn(3, 1, 8, 8, generator=named_generator(0, "inputs"))


@pytest.mark.parametrize("task", ["ForImageClassification", "Model"])
@pytest.mark.parametrize("family", KEYS)
@torch.no_grad()
def test_a_folder_gives_the_model_that_was_saved(family: str, task: str, tmp_path: Path) -> None:
    model, inputs = save(tmp_path, family, task), make_inputs()
    base = model.base_model if task != "Model" else model
    expected = base(inputs).last_hidden_state
    backbone = load_pretrained(str(tmp_path), family).eval()
    assert torch.equal(backbone.run(inputs).output, expected)
    assert not [n for n in backbone.state_dict() if "pooler" in n or "mask_token" in n or "classifier" in n]
    # It is cut and rebuilt like any other.
    cut = ElasticBackbone(backbone).extract(BackboneShape(width=0.5, depth=1))
    again = Backbone(family, json.loads(json.dumps(cut.config)))
    again.load_state_dict(cut.state_dict(), strict=True)
    assert torch.equal(again.eval().run(inputs).output, cut.run(inputs).output)


def test_label_names_and_training_settings_do_not_travel(tmp_path: Path) -> None:
    save(tmp_path, "vit", num_labels=50)
    config = json.loads((tmp_path / "config.json").read_text())
    assert len(config["id2label"]) == 50
    (tmp_path / "config.json").write_text(json.dumps(config | {"gradient_checkpointing": False}))
    kept = load_pretrained(str(tmp_path), "vit").config
    assert kept == Backbone("vit", kept).config
    assert not {"id2label", "label2id", "architectures", "dtype", "gradient_checkpointing"} & set(kept)


def test_half_precision_is_loaded_as_32_bits(tmp_path: Path) -> None:
    save(tmp_path, "vit").half().save_pretrained(tmp_path)
    assert {p.dtype for p in load_pretrained(str(tmp_path), "vit").parameters()} == {torch.float32}


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(tmp_path / name, "vit")
    one = fingerprint(str(tmp_path / "one"))
    assert one == fingerprint(str(tmp_path / "two"))
    weights = tmp_path / "two" / "model.safetensors"
    save_file({n: t + 1 for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    assert one != fingerprint(str(tmp_path / "two"))


def test_loading_says_nothing_and_leaves_the_log_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, "vit")
    capfd.readouterr()
    level = transformers.logging.get_verbosity()
    load_pretrained(str(tmp_path), "vit")
    assert capfd.readouterr() == ("", "")
    assert transformers.logging.get_verbosity() == level


# -- what is wrong ----------------------------------------------------------------------------------------------------


def without_query(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[QUERY]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def other_positions(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {POSITIONS: torch.zeros(1, 9, 16)}, folder / "model.safetensors", {"format": "pt"})


def all_other(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({f"other.{n}": t for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"garbage" * 10)


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def with_config(**keys: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{'hidden_size': 16")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_query, r"has wrong weights: layers\.1\.attention\.q_proj\.weight is missing$"),
        (
            other_positions,
            r"has wrong weights: embeddings\.position_embeddings has shape \(1, 9, 16\), "
            r"its config\.json says \(1, 5, 16\)$",
        ),
        (all_other, r"has wrong weights: embeddings\.cls_token is missing; .*; .*, and 35 more$"),
        (garbage, "its weights are corrupt: "),
        (truncated, "its weights are corrupt: "),
        (pickled, r"are a pickle, which can run code and is not read; .* convert it: .*save_pretrained\('converted'\)"),
        (no_weights, "its weights cannot be read: .*no file named model.safetensors"),
        (no_config, "the folder has no config.json"),
        (no_json, "config.json cannot be read: "),
        (with_config(model_type="swin"), "is a 'swin', which is not supported; supported are vit, deit, dinov2, bert, "),
        (with_config(model_type=None), "is a None, which is not supported; supported are vit"),
        (with_config(model_type="deit"), r"is a 'deit', but model\.family is 'vit'; set model\.family = 'deit'$"),
        (with_config(hidden_size=0), r"model\.config\.hidden_size must be an integer >= 1, got 0"),
        (with_config(image_size=[8, 8]), r"model\.config\.image_size must be an integer >= 1, got \[8, 8\]"),
        (with_config(hidden_size=20), r"has wrong weights: .*cls_token has shape \(1, 1, 16\), .* says \(1, 1, 20\)"),
        (with_config(num_hidden_layers=3), r"has wrong weights: layers\.2\..* is missing; .*, and 13 more$"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_spoilt_folder_says_what_is_wrong(spoil: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    save(tmp_path, "vit")
    spoil(tmp_path)
    with pytest.raises(ValueError, match=said) as caught:
        load_pretrained(str(tmp_path), "vit")
    assert str(caught.value).startswith(f"model.pretrained = {str(tmp_path)!r}")
    assert "\n" not in str(caught.value)


def test_the_way_to_convert_a_pickle_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model", "vit")
    expected = load_pretrained(str(tmp_path / "model"), "vit").state_dict()
    pickled(tmp_path / "model")
    with pytest.raises(ValueError, match="convert it: ") as caught:
        load_pretrained(str(tmp_path / "model"), "vit")
    command = str(caught.value).split("convert it: ")[1].removesuffix(", and give that folder")
    monkeypatch.chdir(tmp_path)
    eval(command, {"transformers": transformers})
    found = load_pretrained(str(tmp_path / "converted"), "vit").state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in found.items())


def test_swiglu_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "dinov2", use_swiglu_ffn=True)
    with pytest.raises(ValueError, match=r"model\.pretrained = .*use_swiglu_ffn must be false"):
        load_pretrained(str(tmp_path), "dinov2")


@pytest.mark.parametrize("read", [lambda n: load_pretrained(n, "vit"), fingerprint], ids=["load", "fingerprint"])
@pytest.mark.parametrize("name", ["someone/no-such-model", "no/such/folder", "/no/such/folder", "not a name!"])
def test_a_model_that_is_not_there_without_a_network(
    name: str, read: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="is no folder here, and could not be had from the Hugging Face hub") as caught:
        read(name)
    said = str(caught.value)
    assert said.startswith(f"model.pretrained = {name!r}")
    assert constants.HF_HUB_CACHE in said
    assert "HF_HUB_OFFLINE=1" in said
    assert "save_pretrained" in said


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    save(tmp_path, "vit")
    with pytest.raises(ValueError, match="is a file; give the folder that it is in"):
        load_pretrained(str(tmp_path / "model.safetensors"), "vit")
