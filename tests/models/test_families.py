"""Families: where heads and neurons live is where the adapter says, and a wrong configuration says what is wrong."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import BackboneShape
from fleetfit.models.elastic import Backbone, DepthOrder, ElasticBackbone, kept_heads, kept_layers, kept_neurons
from fleetfit.models.families import FAMILIES, family_of
from fleetfit.models.features import Features, FeatureShape, tokens_to_grid

torch.set_num_threads(1)

CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}


# A family's parity tests are these: its name, where its layers are, its tokens before the grid, its own keys.
PARITY = [
    pytest.param("vit", "layers", 1, {"intermediate_size": 32}, id="vit"),
    pytest.param("deit", "layers", 2, {"intermediate_size": 32}, id="deit"),
    pytest.param("dinov2", "encoder.layer", 1, {"mlp_ratio": 2, "layerscale_value": 0.5}, id="dinov2"),
    pytest.param("dinov2", "encoder.layer", 1, {"mlp_ratio": 4, "intermediate_size": 32}, id="dinov2 cut before"),
]
families = pytest.mark.parametrize(("name", "layers", "num_prefix_tokens", "keys"), PARITY)
NUM_LAYERS, NUM_HEADS, NUM_NEURONS = 3, 4, 32
WIDTHS = [i / NUM_NEURONS for i in range(1, NUM_NEURONS + 1)]  # every number of neurons, and of heads
SHAPES = [BackboneShape(width=w, depth=1 + i % NUM_LAYERS) for i, w in enumerate(WIDTHS)]
SHAPES += [BackboneShape(width=w, depth=d) for w in (0.1, 0.25, 0.5, 0.75, 1.0) for d in range(1, NUM_LAYERS + 1)]
SIZES = {k: v for k, v in CONFIG.items() if k != "intermediate_size"} | {"num_hidden_layers": NUM_LAYERS}


def test_no_family_is_without_parity_tests() -> None:
    """Those of texts are in test_text_families.py."""
    assert {p.values[0] for p in PARITY} == {name for name, family in FAMILIES.items() if family.kind == "image"}


def make_backbone(name: str, keys: dict[str, object]) -> Backbone:
    """Every parameter random, biases, norms and layer scales too."""
    with seeded_init(0, name):
        backbone = Backbone(name, SIZES | keys)
        for parameter in backbone.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return backbone.eval()


def make_inputs() -> Tensor:
    return torch.randn(3, 1, 8, 8, generator=named_generator(0, "inputs"))


def run_by_hand(model: nn.Module, layers: str, inputs: Tensor, kept: tuple[int, ...]) -> list[Tensor]:
    """Embeddings, the layers named, the final norm: all tokens on the way."""
    hidden = [model.embeddings(inputs)]
    for layer in kept:
        hidden.append(model.get_submodule(layers)[layer](hidden[-1], None))
    return [*hidden, model.layernorm(hidden[-1])]


def masked(backbone: Backbone, layers: str, heads: list[list[int]], neurons: list[list[int]]) -> nn.Module:
    """A copy in which only these heads and neurons of each layer reach the residual stream."""
    model = copy.deepcopy(backbone.model)
    for layer, kept, units in zip(model.get_submodule(layers), heads, neurons, strict=True):
        mask_heads = torch.tensor([h in kept for h in range(NUM_HEADS)]).repeat_interleave(4)
        layer.attention.o_proj.weight *= mask_heads
        layer.mlp.fc2.weight *= torch.tensor([n in units for n in range(NUM_NEURONS)])
    return model


def difference(output, expected: list[Tensor]) -> float:
    found = [*output.hidden, output.output]
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


@families
@torch.no_grad()
def test_the_adapter_names_modules_and_keys_that_are_there(
    name: str, layers: str, num_prefix_tokens: int, keys: dict[str, object]
) -> None:
    family, backbone = family_of(name), make_backbone(name, keys)
    config = backbone.config
    assert family.layers == layers
    assert len(backbone.model.get_submodule(layers)) == config[family.num_layers] == backbone.num_layers == NUM_LAYERS
    assert (config[family.num_heads], config[family.num_neurons]) == (NUM_HEADS, NUM_NEURONS)
    for layer in backbone.model.get_submodule(layers):
        sizes = {
            path: layer.get_submodule(path)
            for path in (*family.query_key_value, family.attention_output, family.mlp_in, family.mlp_out)
        }
        assert all(isinstance(m, nn.Linear) for m in sizes.values())
        assert [sizes[p].out_features for p in family.query_key_value] == [16, 16, 16]
        assert sizes[family.attention_output].in_features == 16
        assert sizes[family.mlp_in].out_features == sizes[family.mlp_out].in_features == NUM_NEURONS
    assert backbone.feature_shape == FeatureShape(16, (2, 2), num_prefix_tokens)
    assert backbone.input_shape == (1, 8, 8)
    assert backbone.run(make_inputs()).output.shape == (3, num_prefix_tokens + 4, 16)


@families
@pytest.mark.parametrize("order", ["first", "spread"])
@torch.no_grad()
def test_sliced_is_masked_is_rebuilt_at_all_widths_and_depths(
    name: str, layers: str, num_prefix_tokens: int, keys: dict[str, object], order: DepthOrder
) -> None:
    backbone, inputs = make_backbone(name, keys), make_inputs()
    elastic = ElasticBackbone(backbone, order)
    for shape in SHAPES:
        heads = list(range(kept_heads(NUM_HEADS, shape.width)))
        neurons = list(range(kept_neurons(NUM_NEURONS, shape.width)))
        oracle = masked(backbone, layers, [heads] * NUM_LAYERS, [neurons] * NUM_LAYERS)
        expected = run_by_hand(oracle, layers, inputs, kept_layers(NUM_LAYERS, shape.depth, order))
        sliced = elastic.run(inputs, shape)
        assert difference(sliced, expected) <= 1e-5, shape

        cut = elastic.extract(shape)
        config = json.loads(json.dumps(cut.config))
        again = Backbone(name, config)
        again.load_state_dict(cut.state_dict(), strict=True)
        assert again.config == cut.config == config
        assert (again.num_layers, again.feature_shape) == (shape.depth, backbone.feature_shape)
        assert torch.equal(again.eval().run(inputs).output, sliced.output), shape


@families
@torch.no_grad()
def test_the_full_size_is_the_original(name: str, layers: str, num_prefix_tokens: int, keys: dict[str, object]) -> None:
    backbone, inputs = make_backbone(name, keys), make_inputs()
    elastic = ElasticBackbone(backbone)
    output = backbone.run(inputs)
    assert torch.equal(elastic.run(inputs, elastic.full).output, output.output)
    assert torch.equal(elastic.extract(elastic.full).run(inputs).output, output.output)
    assert difference(output, run_by_hand(backbone.model, layers, inputs, tuple(range(NUM_LAYERS)))) <= 1e-6


@families
@torch.no_grad()
def test_reordering_changes_no_output_and_keeps_the_named_ones_first(
    name: str, layers: str, num_prefix_tokens: int, keys: dict[str, object]
) -> None:
    backbone, inputs = make_backbone(name, keys), make_inputs()
    generator = named_generator(0, "orders")
    heads = [torch.randperm(NUM_HEADS, generator=generator) for _ in range(NUM_LAYERS)]
    neurons = [torch.randperm(NUM_NEURONS, generator=generator) for _ in range(NUM_LAYERS)]
    elastic = ElasticBackbone(backbone)
    elastic.reorder(heads, neurons)
    every = tuple(range(NUM_LAYERS))
    whole = run_by_hand(backbone.model, layers, inputs, every)
    assert difference(elastic.run(inputs, elastic.full), whole) <= 1e-5
    oracle = masked(backbone, layers, [h[:2].tolist() for h in heads], [n[:16].tolist() for n in neurons])
    half = elastic.run(inputs, BackboneShape(width=0.5, depth=NUM_LAYERS))
    assert difference(half, run_by_hand(oracle, layers, inputs, every)) <= 1e-5
    assert difference(half, whole) > 1e-2  # otherwise the comparison could not fail


@families
def test_a_fresh_model_learns_in_all_its_weights_and_a_cut_one_too(
    name: str, layers: str, num_prefix_tokens: int, keys: dict[str, object]
) -> None:
    with seeded_init(0, name):
        backbone = Backbone(name, SIZES | keys)
    elastic = ElasticBackbone(backbone)
    for model in (backbone, elastic.extract(BackboneShape(width=0.5, depth=2))):
        (model.run(make_inputs()).output ** 3).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        small = {n for n, p in model.named_parameters() if n.endswith(("fc1.weight", "fc2.weight")) and p.std() < 0.005}
        assert not small, "an MLP was left without its initialisation"


def test_dinov2_with_swiglu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.config\.use_swiglu_ffn must be false"):
        Backbone("dinov2", SIZES | {"mlp_ratio": 2, "use_swiglu_ffn": True})


def test_dinov2_has_no_mask_token() -> None:
    backbone = Backbone("dinov2", SIZES | {"mlp_ratio": 2, "use_mask_token": True})
    assert backbone.config["use_mask_token"] is False
    assert not [n for n in backbone.state_dict() if "mask" in n]


@pytest.mark.parametrize("value", [0, 2.5, True, "4"])
def test_a_bad_mlp_ratio_is_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"model\.config\.mlp_ratio must be an integer >= 1"):
        Backbone("dinov2", SIZES | {"mlp_ratio": value})


def test_an_unknown_family_names_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"model\.family must be one of .*vit.*, got 'wit'"):
        family_of("wit")
    assert "vit" in FAMILIES


@pytest.mark.parametrize(
    ("key", "near"),
    [("num_hidden_layer", "num_hidden_layers"), ("hiden_size", "hidden_size"), ("patchsize", "patch_size")],
)
def test_an_unknown_key_names_the_nearest(key: str, near: str) -> None:
    with pytest.raises(
        ValueError, match=rf"model\.config\.{key} is an unknown key of ViTConfig; did you mean '{near}'"
    ):
        Backbone("vit", CONFIG | {key: 1})


def test_a_key_like_none_has_no_hint() -> None:
    with pytest.raises(ValueError, match=r"model\.config\.zzz is an unknown key of ViTConfig$"):
        Backbone("vit", CONFIG | {"zzz": 1})


@pytest.mark.parametrize("key", [*CONFIG, "head_dim"])
@pytest.mark.parametrize("value", [0, -1, "x", 2.5, True, [8, 8]])
def test_a_size_that_is_no_number_above_zero_is_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"model\.config\.{key} "):
        Backbone("vit", CONFIG | {key: value})


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "nope"), ("layer_norm_eps", None), ("image_size", 2), ("qkv_bias", "perhaps")]
)
def test_other_wrong_values_are_value_errors(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"model\.config"):
        Backbone("vit", CONFIG | {key: value})


def test_a_configuration_is_remembered_whole_without_what_belongs_to_others() -> None:
    config = Backbone("vit", CONFIG).config
    assert config.items() >= CONFIG.items()
    assert not {"transformers_version", "architectures", "dtype"} & set(config)


@pytest.mark.parametrize(("image", "patch", "side"), [(8, 4, 2), (8, 2, 4), (9, 2, 4), (4, 4, 1)])
@torch.no_grad()
def test_the_shape_of_features_is_told_beforehand(image: int, patch: int, side: int) -> None:
    backbone = Backbone("vit", CONFIG | {"image_size": image, "patch_size": patch})
    shape = backbone.feature_shape
    assert shape == FeatureShape(16, (side, side), num_prefix_tokens=1)
    features = backbone(torch.zeros(2, 1, image, image))
    assert features.output.shape == features.penultimate.shape == (2, shape.num_tokens, 16)


@torch.no_grad()
def test_tokens_lie_on_the_grid_as_their_patches_do() -> None:
    """Light one patch: the token that changes most before attention mixes them lies where the patch is."""
    backbone = Backbone("vit", CONFIG | {"patch_size": 2})
    dark = torch.zeros(1, 1, 8, 8)
    for row in range(4):
        for column in range(4):
            lit = dark.clone()
            lit[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 5.0
            change = (backbone.run(lit).hidden[0] - backbone.run(dark).hidden[0]).abs()
            grid = tokens_to_grid(change, backbone.feature_shape).sum(1)[0]
            assert divmod(int(grid.argmax()), 4) == (row, column)
            assert (grid > 0).sum() == 1


def test_rows_of_features_and_detaching() -> None:
    output = torch.randn(4, 3, 2, requires_grad=True)
    mask = torch.arange(12).reshape(4, 3) % 2 == 0
    features = Features(output * 2, output * 3, mask)
    some = features.rows(torch.tensor([2, 0]))
    assert len(features) == 4
    assert len(some) == 2
    assert torch.equal(some.output, 2 * output[[2, 0]])
    assert torch.equal(some.penultimate, 3 * output[[2, 0]])
    assert some.mask is not None
    assert torch.equal(some.mask, mask[[2, 0]])
    assert Features(output, output).rows(slice(1)).mask is None
    free = features.detached()
    assert not free.output.requires_grad
    assert not free.penultimate.requires_grad
    assert torch.equal(free.output, features.output)
