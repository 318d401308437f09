"""Families: where heads and neurons live is where the adapter says, and a wrong configuration says what is wrong."""

import pytest
import torch
from torch import nn

from fleetfit.models.elastic import Backbone
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


def test_the_adapter_names_modules_and_keys_that_are_there() -> None:
    family = family_of("vit")
    backbone = Backbone("vit", CONFIG)
    config = backbone.config
    layers = backbone.model.get_submodule(family.layers)
    assert len(layers) == config[family.num_layers] == backbone.num_layers == 2
    assert (config[family.num_heads], config[family.num_neurons]) == (4, 12)
    for layer in layers:
        sizes = {
            path: layer.get_submodule(path)
            for path in (*family.query_key_value, family.attention_output, family.mlp_in, family.mlp_out)
        }
        assert all(isinstance(m, nn.Linear) for m in sizes.values())
        assert [sizes[p].out_features for p in family.query_key_value] == [16, 16, 16]
        assert sizes[family.attention_output].in_features == 16
        assert sizes[family.mlp_in].out_features == sizes[family.mlp_out].in_features == 12


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
