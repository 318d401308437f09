"""A packed model is built from its parts as they are, and says beforehand what features and how many bytes it has."""

import pytest
import safetensors.torch
import torch

from fleetfit.config.families import FAMILIES as FACTS
from fleetfit.core.encoding import take
from fleetfit.core.randomness import seeded_init
from fleetfit.core.records import BackboneShape, HeaderSpec
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone, ElasticBackbone
from fleetfit.models.families import FAMILIES, feature_shape_of
from fleetfit.models.header import build_header
from fleetfit.models.packed import PackedModel, packed_tensors, stored_size_bytes

LABELS = ("a", "b", "c")
MORE = {"vocab_size": 30, "max_position_embeddings": 12, "pad_token_id": 1}


def small(name: str) -> dict[str, object]:
    return FACTS[name].small | (MORE if FAMILIES[name].kind == "text" else {"image_size": 8, "patch_size": 4})


def packed(name: str = "vit", hidden: int = 5) -> tuple[PackedModel, Classifier]:
    with seeded_init(0, "packed"):
        backbone = Backbone(name, small(name))
        spec = HeaderSpec(kind="mlp", hidden=hidden)
        model = Classifier(backbone, build_header(spec, backbone.feature_shape, len(LABELS))).eval()
    return PackedModel(family=name, config=backbone.config, header=spec, labels=LABELS), model


@pytest.mark.parametrize("name", FAMILIES)
def test_features_follow_from_the_configuration_alone(name: str) -> None:
    backbone = Backbone(name, small(name))
    narrow = ElasticBackbone(backbone).extract(BackboneShape(width=0.5, depth=1))
    for model in (backbone, narrow):
        assert feature_shape_of(name, model.config) == model.feature_shape
    inputs = torch.zeros(2, *backbone.input_shape, dtype=torch.long if FAMILIES[name].kind == "text" else torch.float32)
    shape = feature_shape_of(name, backbone.config)
    assert backbone.eval()(inputs).output.shape == (2, shape.num_tokens, shape.channels)


def test_a_configuration_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.config\.hiden_size is an unknown key.*hidden_size"):
        feature_shape_of("vit", {"hiden_size": 8})
    with pytest.raises(ValueError, match=r"model\.family must be one of"):
        feature_shape_of("gpt", {})


@pytest.mark.parametrize("name", ["vit", "dinov2", "bert"])
def test_what_is_packed_and_built_again_answers_alike_to_the_last_bit(name: str) -> None:
    spec, model = packed(name)
    inputs = torch.randn(3, *model.backbone.input_shape)
    if FAMILIES[name].kind == "text":
        inputs = torch.randint(2, 30, (3, *model.backbone.input_shape))
    again = spec.build(packed_tensors(model))
    assert torch.equal(again(inputs), model(inputs))


def test_tensors_that_are_packed_are_nobody_elses() -> None:
    _, model = packed()
    before = packed_tensors(model)
    with torch.no_grad():
        model.header.last_linear.bias.add_(1)
    assert not torch.equal(before["header.classifier.last.bias"], model.header.last_linear.bias)


def test_the_size_is_that_of_the_file() -> None:
    _, model = packed()
    tensors = packed_tensors(model)
    file = safetensors.torch.save({n: t.contiguous() for n, t in model.state_dict().items()}, metadata={"format": "pt"})
    assert stored_size_bytes(take(tensors, "backbone"), take(tensors, "header")) == len(file)


@pytest.mark.parametrize("part", ["backbone", "header"])
def test_tensors_of_another_model_are_refused_before_anything_is_built(part: str) -> None:
    spec, model = packed()
    tensors = packed_tensors(model)
    name = next(n for n in tensors if n.startswith(part))
    for bad in ({n: t for n, t in tensors.items() if n != name}, tensors | {name: torch.zeros(1, 2, 3)}):
        with pytest.raises(ValueError, match="does not fit its tensors"):
            spec.check(bad)
