"""Text families: cut is masked, padding is as if it were not there, and the whole is the model of Transformers."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import Tensor, nn

from fleetfit.config.families import FAMILIES as FACTS
from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import BackboneShape, HeaderSpec
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone, BackboneOutput, DepthOrder, ElasticBackbone
from fleetfit.models.families import FAMILIES, family_of, text_config
from fleetfit.models.features import FeatureShape
from fleetfit.models.header import build_header

torch.set_num_threads(1)

NUM_LAYERS, NUM_HEADS, NUM_NEURONS, NUM_TOKENS, VOCABULARY = 4, 4, 12, 9, 50
HEAD_DIM, HIDDEN = 4, 16
BERT = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "intermediate_size": NUM_NEURONS,
    "vocab_size": VOCABULARY,
}


@dataclass(frozen=True)
class Place:
    """Where things are in the model of Transformers, written down apart from the adapter."""

    model: str
    layers: str
    attention_output: str
    mlp_out: str
    sizes: dict[str, int]
    padding: int = 0


PLACES = {
    "bert": Place(
        "Bert", "encoder.layer", "attention.output.dense", "output.dense", BERT | {"max_position_embeddings": 9}
    ),
    "roberta": Place(
        "Roberta",
        "encoder.layer",
        "attention.output.dense",
        "output.dense",
        BERT | {"max_position_embeddings": 11, "pad_token_id": 1},
        padding=1,
    ),
    "distilbert": Place(
        "DistilBert",
        "transformer.layer",
        "attention.out_lin",
        "ffn.lin2",
        {"dim": HIDDEN, "n_layers": NUM_LAYERS, "n_heads": NUM_HEADS, "hidden_dim": NUM_NEURONS}
        | {"vocab_size": VOCABULARY, "max_position_embeddings": 9},
    ),
}
families = pytest.mark.parametrize("name", PLACES)
# Heads of 4 and neurons of 12 that are kept, written down apart from kept_heads and kept_neurons.
WIDTHS = {0.1: (1, 1), 0.25: (1, 3), 0.4: (2, 5), 0.5: (2, 6), 0.75: (3, 9), 1.0: (4, 12)}
LAYERS = {
    "first": {1: [0], 2: [0, 1], 3: [0, 1, 2], 4: [0, 1, 2, 3]},
    "spread": {1: [0], 2: [0, 3], 3: [0, 2, 3], 4: [0, 1, 2, 3]},
}


def test_no_family_of_texts_is_without_parity_tests() -> None:
    assert set(PLACES) == {name for name, family in FAMILIES.items() if family.kind == "text"}


def make_backbone(name: str, **keys: object) -> Backbone:
    """Every parameter random, biases and norms too."""
    with seeded_init(0, name):
        backbone = Backbone(name, PLACES[name].sizes | keys)
        for parameter in backbone.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return backbone.eval()


def make_inputs(name: str, lengths: tuple[int, ...] = (3, 7, 2), num_tokens: int = NUM_TOKENS) -> Tensor:
    tokens = torch.randint(3, VOCABULARY, (len(lengths), num_tokens), generator=named_generator(0, "tokens"))
    return tokens.masked_fill(torch.arange(num_tokens) >= torch.tensor(lengths)[:, None], PLACES[name].padding)


def original(
    backbone: Backbone, layers: list[int], num_heads: int = NUM_HEADS, num_neurons: int = NUM_NEURONS
) -> nn.Module:
    """The model of Transformers with these weights, some layers taken out, some heads and neurons silenced."""
    place = PLACES[backbone.family]
    model = getattr(transformers, f"{place.model}Model")(getattr(transformers, f"{place.model}Config")(**place.sizes))
    model.load_state_dict(backbone.model.state_dict(), strict=False)
    parent, _, child = place.layers.rpartition(".")
    every = model.get_submodule(place.layers)
    setattr(model.get_submodule(parent), child, nn.ModuleList(every[i] for i in layers))
    for layer in model.get_submodule(place.layers):
        layer.get_submodule(place.attention_output).weight.data[:, num_heads * HEAD_DIM :] = 0
        layer.get_submodule(place.mlp_out).weight.data[:, num_neurons:] = 0
    return model.eval()


def run_original(model: nn.Module, tokens: Tensor, padding: int) -> list[Tensor]:
    mask = (tokens != padding).long()
    result = model(tokens, attention_mask=mask, output_hidden_states=True)
    return [*result.hidden_states, result.last_hidden_state]


def difference(output: BackboneOutput, expected: list[Tensor]) -> float:
    """The largest, on tokens that are there."""
    assert output.mask is not None
    found = [*output.hidden, output.output]
    return max(float((a - b)[output.mask].abs().max()) for a, b in zip(found, expected, strict=True))


@families
@torch.no_grad()
def test_the_adapter_names_modules_and_keys_that_are_there(name: str) -> None:
    family, backbone, place = family_of(name), make_backbone(name), PLACES[name]
    config = backbone.config
    assert (family.layers, family.attention_output, family.mlp_out) == (
        place.layers,
        place.attention_output,
        place.mlp_out,
    )
    assert len(backbone.model.get_submodule(place.layers)) == config[family.num_layers] == backbone.num_layers
    assert (config[family.num_heads], config[family.num_neurons]) == (NUM_HEADS, NUM_NEURONS)
    for layer in backbone.model.get_submodule(place.layers):
        assert [layer.get_submodule(p).out_features for p in family.query_key_value] == [HIDDEN] * 3
        assert layer.get_submodule(family.mlp_in).out_features == NUM_NEURONS
    assert backbone.model.get_submodule(family.token_embedding).weight.shape == (VOCABULARY, HIDDEN)
    positions = backbone.model.get_submodule(family.position_embedding).weight
    assert len(positions) == place.sizes["max_position_embeddings"]
    assert backbone.feature_shape == FeatureShape(HIDDEN, (1, NUM_TOKENS - 1), 1)
    assert backbone.input_shape == (NUM_TOKENS,)
    assert not [n for n in backbone.state_dict() if "pooler" in n]


@families
@torch.no_grad()
def test_the_full_size_is_the_model_of_transformers_with_an_attention_mask(name: str) -> None:
    backbone = make_backbone(name)
    elastic = ElasticBackbone(backbone)
    for lengths in [(3, 7, 2), (NUM_TOKENS, 1, 4), (2, 2, 2)]:
        inputs = make_inputs(name, lengths)
        expected = run_original(original(backbone, [0, 1, 2, 3]), inputs, PLACES[name].padding)
        for output in (
            backbone.run(inputs),
            elastic.run(inputs, elastic.full),
            elastic.extract(elastic.full).run(inputs),
        ):
            assert difference(output, expected) <= 1e-5
            assert torch.equal(output.mask, torch.arange(NUM_TOKENS) < torch.tensor(lengths)[:, None])
    features = backbone(inputs)
    assert torch.equal(features.mask, output.mask)
    assert torch.equal(features.penultimate, backbone.run(inputs).hidden[3])


@families
@pytest.mark.parametrize("order", ["first", "spread"])
@torch.no_grad()
def test_sliced_is_masked_is_rebuilt_at_all_widths_and_depths(name: str, order: DepthOrder) -> None:
    backbone, inputs = make_backbone(name), make_inputs(name)
    elastic = ElasticBackbone(backbone, order)
    whole = run_original(original(backbone, [0, 1, 2, 3]), inputs, PLACES[name].padding)
    for width, (num_heads, num_neurons) in WIDTHS.items():
        for depth, layers in LAYERS[order].items():
            shape = BackboneShape(width=width, depth=depth)
            oracle = original(backbone, layers, num_heads, num_neurons)
            expected = run_original(oracle, inputs, PLACES[name].padding)
            sliced = elastic.run(inputs, shape)
            assert difference(sliced, expected) <= 1e-5, shape
            if shape != elastic.full:  # otherwise the comparison could not fail
                assert (sliced.output - whole[-1])[sliced.mask].abs().max() > 1e-2, shape

            cut = elastic.extract(shape)
            config = json.loads(json.dumps(cut.config))
            again = Backbone(name, config)
            again.load_state_dict(cut.state_dict(), strict=True)
            assert again.config == cut.config == config
            assert (again.num_layers, again.feature_shape) == (depth, backbone.feature_shape)
            assert torch.equal(again.eval().run(inputs).output, sliced.output), shape
            again.model.set_attn_implementation("eager")
            assert difference(again.run(inputs), expected) <= 1e-5, shape
            # A cut model is cut again like a whole one.
            twice = ElasticBackbone(cut).extract(BackboneShape(width=1.0, depth=1))
            assert twice.config == {**cut.config, family_of(name).num_layers: 1}


@families
@torch.no_grad()
def test_reordering_changes_no_output_and_keeps_the_named_ones_first(name: str) -> None:
    backbone, inputs = make_backbone(name), make_inputs(name)
    generator = named_generator(0, "orders")
    heads = [torch.randperm(NUM_HEADS, generator=generator) for _ in range(NUM_LAYERS)]
    neurons = [torch.randperm(NUM_NEURONS, generator=generator) for _ in range(NUM_LAYERS)]
    elastic = ElasticBackbone(backbone)
    elastic.reorder(heads, neurons)
    model = original(backbone, [0, 1, 2, 3])
    assert difference(elastic.run(inputs, elastic.full), run_original(model, inputs, PLACES[name].padding)) <= 1e-5
    for i, layer in enumerate(model.get_submodule(PLACES[name].layers)):
        channels = (heads[i][2:, None] * HEAD_DIM + torch.arange(HEAD_DIM)).flatten()
        layer.get_submodule(PLACES[name].attention_output).weight.data[:, channels] = 0
        layer.get_submodule(PLACES[name].mlp_out).weight.data[:, neurons[i][6:]] = 0
    half = elastic.run(inputs, BackboneShape(width=0.5, depth=NUM_LAYERS))
    assert difference(half, run_original(model, inputs, PLACES[name].padding)) <= 1e-5


@families
@torch.no_grad()
def test_gates_are_masks(name: str) -> None:
    backbone, inputs = make_backbone(name), make_inputs(name)
    oracle = original(backbone, [0, 1, 2, 3])
    layer = oracle.get_submodule(PLACES[name].layers)[1]
    layer.get_submodule(PLACES[name].attention_output).weight.data[:, HEAD_DIM : 2 * HEAD_DIM] = 0
    layer.get_submodule(PLACES[name].mlp_out).weight.data[:, 3] = 0
    elastic, neuron_gate = ElasticBackbone(backbone), torch.ones(NUM_NEURONS)
    neuron_gate[3] = 0
    with elastic.gated({1: torch.tensor([1.0, 0, 1, 1])}, {1: neuron_gate}) as gated:
        assert difference(gated.run(inputs), run_original(oracle, inputs, PLACES[name].padding)) <= 1e-5


@families
def test_what_is_recorded_has_no_gradient_where_there_is_padding(name: str) -> None:
    elastic, inputs = ElasticBackbone(make_backbone(name)), make_inputs(name)
    with elastic.recorded() as (heads, neurons):
        output = elastic.backbone.run(inputs)
        (output.output**3).sum().backward()
    there = output.mask[:, :7]  # as long as the longest
    for layer in range(NUM_LAYERS):
        for tensor, size in ((heads[layer], HIDDEN), (neurons[layer], NUM_NEURONS)):
            assert tensor.shape == (3, 7, size)
            assert tensor.grad[there].abs().max() > 0
            assert not tensor.grad[~there].any()


@families
@torch.no_grad()
def test_a_text_does_not_see_padding_or_what_is_beside_it(name: str) -> None:
    """However many columns there are, and whoever is in the batch."""
    backbone, elastic = make_backbone(name), ElasticBackbone(make_backbone(name))
    shape = BackboneShape(width=0.5, depth=2)
    inputs = make_inputs(name)
    output, cut = backbone.run(inputs), elastic.run(inputs, shape)
    for i, length in enumerate((3, 7, 2)):
        alone = inputs[i : i + 1]
        for run, expected in ((backbone.run, output), (lambda t: elastic.run(t, shape), cut)):
            own = run(alone)
            for a, b in zip((*own.hidden, own.output), (*expected.hidden, expected.output), strict=True):
                assert a.shape == (1, NUM_TOKENS, HIDDEN)
                assert (a[0] - b[i]).abs().max() <= 1e-5
                assert not a[0, length:].any()
                assert not b[i, length:].any()
        unpadded = run_original(original(backbone, [0, 1, 2, 3]), alone[:, :length], padding=-1)
        assert (output.output[i, :length] - unpadded[-1][0]).abs().max() <= 1e-5


@families
@torch.no_grad()
def test_only_as_many_columns_run_as_there_are_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, seen = make_backbone(name), []
    backbone.model.embeddings.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    for lengths in [(3, 7, 2), (NUM_TOKENS, 1, 4), (1, 1, 1)]:
        inputs = make_inputs(name, lengths)
        trimmed = backbone.run(inputs)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            untrimmed = backbone.run(inputs)
        assert seen[-2:] == [max(lengths), NUM_TOKENS]
        pairs = zip((*trimmed.hidden, trimmed.output), (*untrimmed.hidden, untrimmed.output), strict=True)
        assert all((a - b).abs().max() <= 1e-5 for a, b in pairs)
        assert torch.equal(trimmed.mask, untrimmed.mask)


@families
@torch.no_grad()
def test_no_sample_and_a_text_of_nothing(name: str) -> None:
    backbone, elastic = make_backbone(name), ElasticBackbone(make_backbone(name))
    none = make_inputs(name)[:0]
    for output in (backbone.run(none), elastic.run(none, BackboneShape(width=0.5, depth=1))):
        assert output.output.shape == (0, NUM_TOKENS, HIDDEN)
        assert output.mask.shape == (0, NUM_TOKENS)
        assert output.features.rows(slice(0)).mask.shape == (0, NUM_TOKENS)
    for attention in ("sdpa", "eager"):
        backbone.model.set_attn_implementation(attention)
        output = backbone.run(torch.full((1, NUM_TOKENS), PLACES[name].padding))
        assert output.output.isfinite().all()
        assert output.mask.tolist() == [[True] + [False] * (NUM_TOKENS - 1)]


def test_rows_of_an_output_keep_their_mask() -> None:
    output = make_backbone("bert").run(make_inputs("bert"))
    assert torch.equal(output.rows(slice(1, 3)).mask, output.mask[1:3])
    assert torch.equal(output.features.rows(torch.tensor([2, 0])).mask, output.mask[[2, 0]])


@families
def test_gradients_reach_the_prefix_of_the_full_weights(name: str) -> None:
    elastic, inputs, shape = ElasticBackbone(make_backbone(name)), make_inputs(name), BackboneShape(width=0.5, depth=2)
    cut = elastic.extract(shape)
    (elastic.run(inputs, shape).output ** 3).sum().backward()
    (cut.run(inputs).output ** 3).sum().backward()
    full = dict(elastic.backbone.model.named_parameters())
    for parameter_name, parameter in cut.model.named_parameters():  # the first layers keep their numbers
        gradient = full[parameter_name].grad
        assert gradient is not None
        kept = tuple(slice(size) for size in parameter.shape)
        torch.testing.assert_close(gradient[kept], parameter.grad, rtol=1e-4, atol=1e-3)
        gradient[kept] = 0
        assert not gradient.any(), parameter_name


@families
def test_a_fresh_model_learns_in_all_its_weights_and_a_cut_one_too(name: str) -> None:
    with seeded_init(0, name):
        backbone = Backbone(name, PLACES[name].sizes)
        narrow = Backbone(name, ElasticBackbone(backbone).cut_config(BackboneShape(width=0.5, depth=2)))
    for model in (backbone, narrow):
        (model.run(make_inputs(name)).output ** 3).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                assert 0.01 < parameter.std() < 0.03, parameter_name


@families
def test_there_is_no_dropout_unless_a_job_asks_for_it(name: str) -> None:
    inputs = make_inputs(name)
    backbone = make_backbone(name).train()
    assert torch.equal(backbone.run(inputs).output, backbone.run(inputs).output)
    asked = make_backbone(name, **dict.fromkeys(family_of(name).dropouts, 0.5)).train()
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(asked.run(inputs).output, asked.run(inputs).output)


@families
def test_number_of_tokens_and_vocabulary_are_put_into_a_configuration(name: str) -> None:
    place = PLACES[name]
    backbone = Backbone(name, text_config(name, place.sizes, num_tokens=5, vocab_size=20))
    assert backbone.input_shape == (5,)
    assert backbone.feature_shape.grid == (1, 4)
    table = backbone.model.get_submodule("embeddings.position_embeddings").weight
    assert len(table) == (7 if name == "roberta" else 5)  # nothing that is not used
    assert len(backbone.model.get_submodule("embeddings.word_embeddings").weight) == 20
    inputs = make_inputs(name, (5, 2), 5).clamp(max=19)
    assert backbone.run(inputs).output.shape == (2, 5, HIDDEN)
    same = text_config(name, backbone.config)
    assert (same["max_position_embeddings"], same["vocab_size"]) == (len(table), 20)
    moved = Backbone(name, text_config(name, place.sizes, pad_token_id=4))
    assert (moved.input_shape, moved.config["pad_token_id"]) == ((NUM_TOKENS,), 4)


def test_images_have_no_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"model\.family = 'vit' reads images"):
        text_config("vit", {}, num_tokens=5)


@pytest.mark.parametrize("name", [n for n in FACTS if n in PLACES])
@torch.no_grad()
def test_every_family_of_texts_has_a_small_model(name: str) -> None:
    backbone = Backbone(name, FACTS[name].small)
    assert backbone.input_shape == (32,)
    assert backbone.feature_shape == FeatureShape(64, (1, 31), 1)
    assert sum(p.numel() for p in backbone.parameters()) < 250_000


@families
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pad_token_id": None}, r"pad_token_id must be in 0\.\.vocab_size - 1 = 49, got None"),
        ({"pad_token_id": 50}, r"pad_token_id must be in 0\.\.vocab_size - 1 = 49, got 50"),
        ({"pad_token_id": -1}, r"pad_token_id must be in 0\.\.vocab_size - 1 = 49, got -1"),
        ({"max_position_embeddings": 1}, r"max_position_embeddings must be >= [24], for \[CLS\] and a token, got 1"),
        ({"vocab_size": 0}, "vocab_size must be an integer >= 1, got 0"),
        ({"head_dim": 0}, "head_dim must be an integer >= 1, got 0"),
        ({"vocabsize": 9}, "vocabsize is an unknown key of .*; did you mean 'vocab_size'"),
    ],
)
def test_wrong_keys_are_named(name: str, keys: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.config\.{said}"):
        Backbone(name, PLACES[name].sizes | keys)


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("key", ["is_decoder", "add_cross_attention"])
def test_decoders_are_refused(name: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.config\.{key} must be false"):
        Backbone(name, PLACES[name].sizes | {key: True})


@families
@pytest.mark.parametrize("num_heads", [3, 5, 32])
def test_heads_that_do_not_fill_the_embedding_need_their_size(name: str, num_heads: int) -> None:
    key = family_of(name).num_heads
    with pytest.raises(ValueError, match=r"model\.config builds no"):
        Backbone(name, PLACES[name].sizes | {key: num_heads})
    backbone = Backbone(name, PLACES[name].sizes | {key: num_heads, "head_dim": 6})
    assert (backbone.config[key], backbone.config["head_dim"]) == (num_heads, 6)
    query = backbone.model.get_submodule(PLACES[name].layers)[0].get_submodule(family_of(name).query_key_value[0])
    assert query.out_features == 6 * num_heads


@families
@pytest.mark.parametrize("kind", ["blocks", "cnn_add", "vit_block"])
@torch.no_grad()
def test_an_exported_model_takes_any_number_of_texts_of_any_length(name: str, kind: str) -> None:
    backbone = ElasticBackbone(make_backbone(name)).extract(BackboneShape(width=0.5, depth=2))
    with seeded_init(0, "header"):
        header = build_header(HeaderSpec(kind=kind, channels=4, pooling=4), backbone.feature_shape, 3)
    model = Classifier(backbone, header).eval()
    example = copy.deepcopy(make_inputs(name))  # the longest of these is shorter than can be
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for lengths in [(1,), (9, 2), (3, 7, 2, 9, 4)]:
        inputs = make_inputs(name, lengths)
        assert (program(inputs) - model(inputs)).abs().max() <= 1e-5
