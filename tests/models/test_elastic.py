"""The elastic backbone: cutting is masking, reordering changes nothing, and what is cut is a plain smaller model."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import ViTConfig, ViTModel

from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import BackboneShape, HeaderSpec
from fleetfit.models.classifier import Classifier, num_parameters
from fleetfit.models.elastic import Backbone, DepthOrder, ElasticBackbone, kept_heads, kept_layers, kept_neurons
from fleetfit.models.header import build_header

torch.set_num_threads(1)

CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}
WIDTHS = (0.1, 0.25, 0.4, 0.5, 0.75, 1.0)
DEPTHS = (1, 2, 3, 4)
SHAPES = [BackboneShape(width=w, depth=d) for w in WIDTHS for d in DEPTHS]
ORDERS: tuple[DepthOrder, ...] = ("first", "spread")
# Independent of kept_*: heads of 4, neurons of 12, layers of 4.
HEADS = {0.1: 1, 0.25: 1, 0.4: 2, 0.5: 2, 0.75: 3, 1.0: 4}
NEURONS = {0.1: 1, 0.25: 3, 0.4: 5, 0.5: 6, 0.75: 9, 1.0: 12}
LAYERS = {
    "first": {1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 1, 2, 3)},
    "spread": {1: (0,), 2: (0, 3), 3: (0, 2, 3), 4: (0, 1, 2, 3)},
}


def make_backbone(name: str = "backbone", **keys: object) -> Backbone:
    """Every parameter random, biases and norms too: a fresh model's zeros and ones would hide mistakes."""
    with seeded_init(0, name):
        backbone = Backbone("vit", CONFIG | keys)
        for parameter in backbone.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return backbone.eval()


def make_inputs(number: int = 3) -> Tensor:
    return torch.randn(number, 1, 8, 8, generator=named_generator(0, "inputs"))


def run_by_hand(model: ViTModel, inputs: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
    """Embeddings, the layers named, the final norm: all tokens on the way."""
    hidden = [model.embeddings(inputs)]
    for layer in layers:
        hidden.append(model.layers[layer](hidden[-1], None))
    return [*hidden, model.layernorm(hidden[-1])]


@torch.no_grad()
def masked(backbone: Backbone, heads: list[list[int]], neurons: list[list[int]]) -> ViTModel:
    """A copy in which only these heads and neurons of each layer reach the residual stream."""
    model = copy.deepcopy(backbone.model)
    for layer, kept, units in zip(model.layers, heads, neurons, strict=True):
        head_dim = layer.attention.o_proj.in_features // model.config.num_attention_heads
        columns = {h * head_dim + c for h in kept for c in range(head_dim)}
        lost = [c for c in range(layer.attention.o_proj.in_features) if c not in columns]
        layer.attention.o_proj.weight[:, lost] = 0
        layer.mlp.fc2.weight[:, [u for u in range(layer.mlp.fc2.in_features) if u not in units]] = 0
    return model


def differences(output, expected: list[Tensor]) -> list[float]:
    found = [*output.hidden, output.output]
    return [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("keys", [{}, {"qkv_bias": False}, {"head_dim": 6}], ids=["plain", "no bias", "head_dim"])
@torch.no_grad()
def test_cut_is_masked_at_all_widths_and_depths(order: DepthOrder, keys: dict[str, object]) -> None:
    backbone, inputs = make_backbone(**keys), make_inputs()
    elastic = ElasticBackbone(backbone, order)
    for shape in SHAPES:
        heads, neurons = list(range(HEADS[shape.width])), list(range(NEURONS[shape.width]))
        oracle = masked(backbone, [heads] * 4, [neurons] * 4)
        expected = run_by_hand(oracle, inputs, LAYERS[order][shape.depth])
        assert max(differences(elastic.run(inputs, shape), expected)) <= 1e-5, shape
        assert max(differences(elastic.extract(shape).run(inputs), expected)) <= 1e-5, shape


@torch.no_grad()
def test_every_part_matters_in_these_backbones() -> None:
    """Otherwise the comparison above could not fail."""
    backbone, inputs = make_backbone(), make_inputs()
    heads, neurons, layers = [*range(4)], [*range(12)], (0, 1, 2, 3)
    full = run_by_hand(backbone.model, inputs, layers)[-1]
    for layer in layers:
        for head in heads:
            kept = [[h for h in heads if (i, h) != (layer, head)] for i in layers]
            other = run_by_hand(masked(backbone, kept, [neurons] * 4), inputs, layers)[-1]
            assert (other - full).abs().max() > 1e-3
        for neuron in neurons:
            kept = [[n for n in neurons if (i, n) != (layer, neuron)] for i in layers]
            other = run_by_hand(masked(backbone, [heads] * 4, kept), inputs, layers)[-1]
            assert (other - full).abs().max() > 1e-5


@torch.no_grad()
def test_full_size_is_the_reference() -> None:
    backbone, inputs = make_backbone(), make_inputs()
    elastic = ElasticBackbone(backbone)
    assert elastic.full == BackboneShape(width=1.0, depth=4)
    own = backbone.run(inputs)
    expected = run_by_hand(backbone.model, inputs, (0, 1, 2, 3))
    assert max(differences(own, expected)) <= 1e-6
    assert max(differences(elastic.run(inputs, elastic.full), expected)) <= 1e-6
    features = backbone(inputs)
    assert torch.equal(features.output, own.output)
    assert torch.equal(features.penultimate, own.hidden[3])  # after layer 3 of 4


@torch.no_grad()
def test_gates_are_masks_and_are_gone_afterwards() -> None:
    elastic, inputs = ElasticBackbone(make_backbone()), make_inputs()
    before = elastic.backbone.run(inputs).output
    head_gate, neuron_gate = torch.tensor([1.0, 0, 1, 0]), (torch.arange(12) % 3 != 0).float()
    every = [*range(4)], [*range(12)]
    oracle = masked(
        elastic.backbone,
        [every[0], [0, 2], every[0], every[0]],
        [every[1], every[1], every[1], [n for n in every[1] if n % 3]],
    )
    with elastic.gated({1: head_gate}, {3: neuron_gate}) as gated:
        assert max(differences(gated.run(inputs), run_by_hand(oracle, inputs, (0, 1, 2, 3)))) <= 1e-5
    assert torch.equal(elastic.backbone.run(inputs).output, before)
    with pytest.raises(RuntimeError, match="stop"), elastic.gated({0: torch.zeros(4)}, {0: torch.zeros(12)}):
        raise RuntimeError("stop")
    assert torch.equal(elastic.backbone.run(inputs).output, before)


def test_recorded_outputs_have_gradients_and_recording_ends() -> None:
    elastic, inputs = ElasticBackbone(make_backbone()), make_inputs(2)
    layer = elastic.backbone.model.layers[2]
    with elastic.recorded() as (heads, neurons):
        output = elastic.backbone.run(inputs)
        (output.output**3).sum().backward()
        assert sorted(heads) == sorted(neurons) == [0, 1, 2, 3]
        assert heads[2].shape == (2, 5, 16)
        assert neurons[2].shape == (2, 5, 12)
        assert all(t.grad is not None and t.grad.abs().max() > 0 for t in [*heads.values(), *neurons.values()])
        with torch.no_grad():
            # What is recorded is what the output projections take in.
            after_attention = output.hidden[2] + layer.attention.o_proj(heads[2])
            after_mlp = after_attention + layer.mlp.fc2(neurons[2])
        assert torch.allclose(after_mlp, output.hidden[3], atol=1e-5)
    old = heads[2]
    elastic.backbone.run(inputs)
    assert heads[2] is old


def random_orders(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = named_generator(seed, "permutations")
    return (
        [torch.randperm(4, generator=generator) for _ in range(4)],
        [torch.randperm(12, generator=generator) for _ in range(4)],
    )


@pytest.mark.parametrize("keys", [{}, {"qkv_bias": False}], ids=["plain", "no bias"])
@torch.no_grad()
def test_reordering_changes_no_output_and_keeps_the_named_ones_first(keys: dict[str, object]) -> None:
    backbone, inputs = make_backbone(**keys), make_inputs()
    original = copy.deepcopy(backbone.state_dict())
    whole = run_by_hand(backbone.model, inputs, (0, 1, 2, 3))
    shape = BackboneShape(width=0.5, depth=4)
    for seed in range(10):
        heads, neurons = random_orders(seed)
        elastic = ElasticBackbone(backbone)
        elastic.reorder(heads, neurons)
        assert max(differences(elastic.run(inputs, elastic.full), whole)) <= 1e-5
        # The prefix of the sorted one is the chosen of the original.
        oracle = masked(backbone, [h[:2].tolist() for h in heads], [n[:6].tolist() for n in neurons])
        expected = run_by_hand(oracle, inputs, (0, 1, 2, 3))
        assert max(differences(elastic.run(inputs, shape), expected)) <= 1e-5
        assert max(differences(elastic.extract(shape).run(inputs), expected)) <= 1e-5
    assert all(torch.equal(t, original[n]) for n, t in backbone.state_dict().items()), "the reference was changed"


@pytest.mark.parametrize("order", ORDERS)
def test_cut_models_are_as_small_as_the_formula(order: DepthOrder) -> None:
    backbone = make_backbone()
    elastic = ElasticBackbone(backbone, order)
    hidden, head_dim, pixels, tokens = 16, 4, 4 * 4 * 1, 5
    for shape in SHAPES:
        channels, neurons = HEADS[shape.width] * head_dim, NEURONS[shape.width]
        attention = 3 * (channels * hidden + channels) + hidden * channels + hidden
        mlp = neurons * hidden + neurons + hidden * neurons + hidden
        embeddings = pixels * hidden + hidden + hidden + tokens * hidden
        expected = embeddings + shape.depth * (4 * hidden + attention + mlp) + 2 * hidden
        cut = elastic.extract(shape)
        assert num_parameters(cut) == expected
        assert sum(t.numel() for t in elastic.sliced_state(shape).values()) == expected
        assert sum(t.untyped_storage().nbytes() for t in cut.state_dict().values()) == 4 * expected
    assert num_parameters(elastic.extract(elastic.full)) == num_parameters(backbone)


def test_a_cut_model_shares_no_memory_with_the_elastic_one() -> None:
    elastic, inputs = ElasticBackbone(make_backbone()), make_inputs()
    with torch.no_grad():
        before = elastic.run(inputs, elastic.full).output
        cut = elastic.extract(elastic.full)
        for parameter in cut.parameters():
            parameter.zero_()
        assert torch.equal(elastic.run(inputs, elastic.full).output, before)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("width", "depth"), [(0.5, 2), (0.25, 3), (0.1, 1), (1.0, 4)])
def test_gradients_reach_the_prefix_of_the_full_weights_and_nothing_else(
    order: DepthOrder, width: float, depth: int
) -> None:
    shape = BackboneShape(width=width, depth=depth)
    elastic, inputs = ElasticBackbone(make_backbone(), order), make_inputs()
    cut = elastic.extract(shape)
    (elastic.run(inputs, shape).output ** 3).sum().backward()
    (cut.run(inputs).output ** 3).sum().backward()
    channels, neurons = HEADS[width] * 4, NEURONS[width]
    rows = {"q_proj.weight": channels, "k_proj.weight": channels, "v_proj.weight": channels, "v_proj.bias": channels}
    rows |= {"q_proj.bias": channels, "k_proj.bias": channels, "fc1.weight": neurons, "fc1.bias": neurons}
    columns = {"o_proj.weight": channels, "fc2.weight": neurons}
    kept = LAYERS[order][depth]
    cut_gradients = {n: p.grad for n, p in cut.model.named_parameters()}
    for name, parameter in elastic.backbone.model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        cut_name, inside = name, ""
        if name.startswith("layers."):
            _, number, inside = name.split(".", 2)
            inside = ".".join(inside.split(".")[-2:])
            if int(number) not in kept:
                assert not gradient.any(), name
                continue
            cut_name = name.replace(f"layers.{number}.", f"layers.{kept.index(int(number))}.")
        first = gradient[: rows.get(inside)]
        rest = gradient[rows[inside] :] if inside in rows else gradient[:0]
        if inside in columns:
            first, rest = gradient[:, : columns[inside]], gradient[:, columns[inside] :]
        assert not rest.any(), name
        assert torch.allclose(first, cut_gradients[cut_name], rtol=1e-4, atol=1e-3), name
        assert inside == "k_proj.bias" or first.any(), name  # softmax does not see the keys' bias


def test_training_mode_reaches_the_sub_network() -> None:
    elastic, inputs = ElasticBackbone(make_backbone(hidden_dropout_prob=0.5)), make_inputs()
    shape = BackboneShape(width=0.5, depth=2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        assert torch.equal(elastic.run(inputs, shape).output, elastic.run(inputs, shape).output)
        elastic.backbone.train()
        assert not torch.equal(elastic.run(inputs, shape).output, elastic.run(inputs, shape).output)
        elastic.backbone.eval()
        assert torch.equal(elastic.run(inputs, shape).output, elastic.run(inputs, shape).output)


# -- what is kept -----------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 200), st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_kept_heads_and_neurons_are_whole_at_least_one_and_grow_with_width(total: int, a: float, b: float) -> None:
    for kept in (kept_heads, kept_neurons):
        narrow, wide = kept(total, min(a, b)), kept(total, max(a, b))
        assert isinstance(narrow, int)
        assert 1 <= narrow <= wide <= total
        assert narrow == 1 or abs(narrow - total * min(a, b)) <= 0.5
        assert kept(total, 1.0) == total


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_kept_layers(numbers: tuple[int, int]) -> None:
    num_layers, depth = numbers
    for order in ORDERS:
        kept = kept_layers(num_layers, depth, order)
        assert len(kept) == depth
        assert list(kept) == sorted(set(kept))
        assert kept[0] == 0
        assert kept[-1] < num_layers
    spread = kept_layers(num_layers, depth, "spread")
    assert kept_layers(num_layers, depth, "first") == tuple(range(depth))
    if depth > 1:
        assert spread[-1] == num_layers - 1
        # Each is at most half a layer away from where it lies exactly; in integers.
        assert all(2 * abs(k * (depth - 1) - i * (num_layers - 1)) <= depth - 1 for i, k in enumerate(spread))


@pytest.mark.parametrize("depth", [0, -1, 5])
def test_depths_that_are_not_there(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth must be in 1\.\.4, got {depth}"):
        kept_layers(4, depth, "first")
    if depth > 0:
        with pytest.raises(ValueError, match="depth must be"):
            ElasticBackbone(make_backbone()).extract(BackboneShape(width=1.0, depth=depth))


# -- a cut model is a plain one ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"qkv_bias": False}, {"head_dim": 6}], ids=["plain", "no bias", "head_dim"])
@torch.no_grad()
def test_a_cut_backbone_rebuilds_from_its_configuration(keys: dict[str, object], tmp_path: Path) -> None:
    elastic, inputs = ElasticBackbone(make_backbone(**keys), "spread"), make_inputs()
    for shape in [BackboneShape(width=0.25, depth=2), BackboneShape(width=0.75, depth=3), elastic.full]:
        cut = elastic.extract(shape)
        expected = cut.run(inputs).output
        config = json.loads(json.dumps(cut.config))
        assert config == cut.config

        again = Backbone(cut.family, config)
        again.load_state_dict(cut.state_dict(), strict=True)
        assert again.config == cut.config
        assert again.num_layers == shape.depth
        assert again.feature_shape == cut.feature_shape == elastic.backbone.feature_shape
        assert torch.equal(again.eval().run(inputs).output, expected)

        plain = ViTModel(ViTConfig(**config), add_pooling_layer=False).eval()
        plain.load_state_dict(cut.model.state_dict(), strict=True)
        assert torch.equal(plain(inputs).last_hidden_state, expected)
        pooled = ViTModel(ViTConfig(**config))
        missing, unexpected = pooled.load_state_dict(cut.model.state_dict(), strict=False)
        assert not unexpected
        assert all(name.startswith("pooler.") for name in missing)

    cut = elastic.extract(BackboneShape(width=0.25, depth=2))
    cut.model.save_pretrained(tmp_path)
    loaded = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert torch.allclose(loaded(inputs).last_hidden_state, cut.run(inputs).output, atol=1e-6)


@torch.no_grad()
def test_a_cut_backbone_can_be_elastic_again() -> None:
    inputs = make_inputs()
    elastic = ElasticBackbone(make_backbone())
    again = ElasticBackbone(elastic.extract(BackboneShape(width=0.5, depth=3)))
    assert (again.num_heads, again.num_neurons, again.head_dim, again.hidden_size) == (2, 6, 4, 16)
    twice = again.run(inputs, BackboneShape(width=0.5, depth=2)).output
    once = elastic.run(inputs, BackboneShape(width=0.25, depth=2)).output
    assert torch.allclose(twice, once, atol=1e-6)


def test_no_sample_at_all() -> None:
    elastic, none = ElasticBackbone(make_backbone()), torch.zeros(0, 1, 8, 8)
    shape = BackboneShape(width=0.5, depth=2)
    for output in (elastic.run(none, shape), elastic.extract(shape).run(none)):
        assert [tuple(h.shape) for h in output.hidden] == [(0, 5, 16)] * 3
        assert output.output.shape == (0, 5, 16)
    header = build_header(HeaderSpec(), elastic.backbone.feature_shape, 3)
    assert Classifier(elastic.backbone, header)(none).shape == (0, 3)


@torch.no_grad()
def test_a_classifier_is_a_header_on_a_backbone() -> None:
    backbone, inputs = make_backbone(), make_inputs()
    with seeded_init(0, "header"):
        header = build_header(HeaderSpec(), backbone.feature_shape, 3)
    model = Classifier(backbone, header)
    by_hand = run_by_hand(backbone.model, inputs, (0, 1, 2, 3))[-1][:, 0] @ header.last_linear.weight.T
    assert torch.allclose(model(inputs), by_hand + header.last_linear.bias, atol=1e-5)
    assert num_parameters(model) == num_parameters(backbone) + 3 * 16 + 3
