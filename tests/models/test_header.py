"""Headers of every kind: shapes, masks, gradients, saving; and the search's shared weights."""

import pytest
import torch
from torch import Tensor

from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import FIXED_HEADERS, OPERATIONS, Block, HeaderSpec
from fleetfit.method.search_space import sample_blocks
from fleetfit.models.features import Features, FeatureShape, concatenated
from fleetfit.models.fixed_headers import TransformerBody, pool
from fleetfit.models.header import build_header, count_parameters, header_from_state
from fleetfit.models.header_supernet import HeaderSupernet
from fleetfit.models.pruning import extract, prunable_layers

torch.set_num_threads(1)

IMAGE = FeatureShape(16, (4, 4))
ODD = FeatureShape(16, (5, 3), num_prefix_tokens=2)
TEXT = FeatureShape(16, (1, 9))
NO_CLS = FeatureShape(16, (3, 3), num_prefix_tokens=0)


def make_features(shape: FeatureShape, masked: bool = False, batch: int = 5) -> Features:
    generator = named_generator(0, "features")
    size = (batch, shape.num_tokens, shape.channels)
    mask = None
    if masked:
        lengths = torch.arange(batch) + 3
        mask = torch.arange(shape.num_tokens)[None] < lengths[:, None]
    return Features(torch.randn(size, generator=generator), torch.randn(size, generator=generator), mask)


def make_specs() -> list[HeaderSpec]:
    generator = named_generator(0, "specs")
    specs = [HeaderSpec(kind=kind, channels=8, pooling=2) for kind in FIXED_HEADERS]
    specs += [HeaderSpec(kind="blocks", channels=8, pooling=4)]
    specs += [
        HeaderSpec(
            kind="blocks",
            channels=8,
            pooling=pooling,
            hidden=hidden,
            repeats=repeats,
            blocks=sample_blocks(num_blocks, OPERATIONS, generator),
        )
        for num_blocks, repeats, pooling, hidden in [(1, 1, 1, 0), (3, 1, 2, 8), (2, 2, 4, 0), (5, 3, 4, 16)]
    ]
    return specs


def make_header(spec: HeaderSpec, shape: FeatureShape, num_classes: int = 3):
    with seeded_init(0, "header"):
        return build_header(spec, shape, num_classes)


SPECS = make_specs()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}{len(s.blocks)}")
@pytest.mark.parametrize(
    ("shape", "masked"),
    [(IMAGE, False), (ODD, False), (TEXT, True), (NO_CLS, False)],
    ids=["image", "odd", "text", "no"],
)
def test_logits_gradients_and_count(spec: HeaderSpec, shape: FeatureShape, masked: bool) -> None:
    header = make_header(spec, shape)
    logits = header(make_features(shape, masked))
    assert logits.shape == (5, 3)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in header.named_parameters())
    assert count_parameters(spec, shape, 3) == sum(p.numel() for p in header.parameters())
    assert header.last_linear.bias.shape == (3,)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}{len(s.blocks)}")
def test_samples_do_not_see_each_other(spec: HeaderSpec) -> None:
    header, features = make_header(spec, IMAGE), make_features(IMAGE)
    torch.testing.assert_close(header(features)[2:4], header(features.rows(slice(2, 4))), rtol=1e-5, atol=1e-6)


def with_other_padding(features: Features) -> Features:
    assert features.mask is not None
    generator = named_generator(0, "padding")
    noise = torch.where(features.mask.unsqueeze(-1), 0.0, 50 * torch.randn(features.output.shape, generator=generator))
    return Features(features.output + noise, features.penultimate - 2 * noise, features.mask)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}{len(s.blocks)}")
@pytest.mark.parametrize("num_tokens", [10, 7, 33])
def test_what_stands_in_padding_does_not_matter(spec: HeaderSpec, num_tokens: int) -> None:
    shape = FeatureShape(16, (1, num_tokens - 1))
    header, features = make_header(spec, shape), make_features(shape, masked=True)
    torch.testing.assert_close(header(with_other_padding(features)), header(features), rtol=1e-5, atol=1e-5)
    unmasked = Features(features.output, features.penultimate)
    if spec.kind not in ("linear", "mlp"):  # otherwise the comparison could not fail
        assert (header(unmasked) - header(features)).abs().max() > 1e-3


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}{len(s.blocks)}")
def test_nor_does_it_in_a_pruned_header_or_one_that_started_as_a_linear_one(spec: HeaderSpec) -> None:
    features = make_features(TEXT, masked=True)
    header = make_header(spec, TEXT)
    kept = {n: torch.arange(layer.num_neurons) % 2 == 0 for n, layer in prunable_layers(header).items()}
    pruned = extract(header, kept)
    torch.testing.assert_close(pruned(with_other_padding(features)), pruned(features), rtol=1e-5, atol=1e-5)
    if spec.kind == "blocks" and not spec.hidden:
        linear = make_header(HeaderSpec(kind="linear"), TEXT)
        header.start_as(linear)
        for given in (features, with_other_padding(features)):
            torch.testing.assert_close(header(given), linear(features), rtol=1e-5, atol=1e-5)


def test_nor_does_it_in_the_shared_weights_of_a_search() -> None:
    generator = named_generator(0, "children")
    features = make_features(TEXT, masked=True)
    for _ in range(5):
        blocks = sample_blocks(3, OPERATIONS, generator)
        with seeded_init(0, "supernet"):
            shared = HeaderSupernet(
                HeaderSpec(kind="blocks", blocks=blocks, channels=8, pooling=2), OPERATIONS, TEXT, 3
            )
        torch.testing.assert_close(
            shared(with_other_padding(features), blocks), shared(features, blocks), rtol=1e-5, atol=1e-5
        )


def test_grid_is_transposed_not_viewed() -> None:
    # A 1x1 projection to 4x4 cells sees token t at cell t: moving one token changes that cell's columns only.
    header = make_header(HeaderSpec(kind="blocks", channels=8, pooling=4), IMAGE)
    features = make_features(IMAGE, batch=1)
    moved = features.output.clone()
    moved[0, 1 + 6] += 1.0
    before, after = (
        header.body(Features(x, features.penultimate), ())[0, :128].reshape(8, 16) for x in (features.output, moved)
    )
    changed = ((before - after).abs() > 1e-6).any(0)
    assert changed.nonzero().flatten().tolist() == [6]


def test_masked_pool_by_hand() -> None:
    grid = torch.tensor([[[[1.0, 3.0, 100.0, 100.0]]]])
    mask = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]])
    assert pool(grid, mask, (1, 1)).item() == pytest.approx(2.0)
    assert pool(grid, mask, (1, 2)).flatten().tolist() == pytest.approx([2.0, 0.0])


def test_transformer_body_attends_over_tokens() -> None:
    with seeded_init(0, "body"):
        body = TransformerBody(IMAGE, 8)
    features = make_features(IMAGE)
    changed = features.output.clone()
    changed[1, 5] += 1.0
    moved = (body(features) - body(Features(changed, features.penultimate))).abs().amax(1) > 1e-6
    assert moved.tolist() == [False, True, False, False, False]


def test_unused_penultimate_costs_nothing() -> None:
    block = Block(input_1=0, input_2=0, operation_1="conv3", operation_2="identity")
    with_it = Block(input_1=0, input_2=1, operation_1="conv3", operation_2="identity")
    small, large = (HeaderSpec(kind="blocks", blocks=(b,), channels=8) for b in (block, with_it))
    assert count_parameters(large, IMAGE, 3) - count_parameters(small, IMAGE, 3) == 2 * 16 + 16 * 8 + 8


def test_downsample_meets_a_larger_grid() -> None:
    block = Block(input_1=0, input_2=1, operation_1="downsample", operation_2="identity")
    header = make_header(HeaderSpec(kind="blocks", blocks=(block,), channels=8, pooling=2), ODD)
    cells: list[Tensor] = []
    header.body.repeats[0][0].register_forward_hook(lambda module, args, out: cells.append(out))
    header(make_features(ODD))
    assert cells[0].shape == (5, 8, 3, 2)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}{len(s.blocks)}")
def test_round_trip(spec: HeaderSpec) -> None:
    header, features = make_header(spec, ODD), make_features(ODD)
    again = header_from_state(spec, ODD, 3, header.state_dict())
    assert torch.equal(again(features), header(features))


def test_bad_states_are_named() -> None:
    spec = HeaderSpec(kind="mlp", hidden=8)
    state = make_header(spec, IMAGE).state_dict()
    missing = {k: v for k, v in state.items() if k != "classifier.last.bias"}
    with pytest.raises(ValueError, match=r"classifier\.last\.bias is missing"):
        header_from_state(spec, IMAGE, 3, missing)
    with pytest.raises(ValueError, match=r"classifier\.last\.weight must have shape"):
        header_from_state(spec, IMAGE, 4, state)
    with pytest.raises(ValueError, match="extra is unexpected"):
        header_from_state(spec, IMAGE, 3, {**state, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"first\.bias: must have 1 to 8 units, got 9"):
        header_from_state(spec, IMAGE, 3, {**state, "classifier.first.bias": torch.zeros(9)})


def test_unknown_input_is_refused() -> None:
    block = Block(input_1=2, input_2=0, operation_1="conv1", operation_2="identity")
    with pytest.raises(ValueError, match="input_1"):
        build_header(HeaderSpec(kind="blocks", blocks=(block,)), IMAGE, 3)


def test_child_computes_what_the_shared_weights_compute() -> None:
    generator = named_generator(0, "children")
    spec = HeaderSpec(kind="blocks", blocks=sample_blocks(3, OPERATIONS, generator), channels=8, pooling=2, repeats=2)
    with seeded_init(0, "supernet"):
        shared = HeaderSupernet(spec, OPERATIONS, IMAGE, 3)
    features = make_features(IMAGE)
    for _ in range(5):
        blocks = sample_blocks(3, OPERATIONS, generator)
        child = shared.child(blocks)
        assert torch.equal(child(features), shared(features, blocks))
        assert child.spec == spec.model_copy(update={"blocks": blocks})
        child.last_linear.bias.data.add_(1.0)  # a copy: the shared weights stay
        assert not torch.equal(child(features), shared(features, blocks))


@pytest.mark.parametrize("shape", [IMAGE, ODD, TEXT, NO_CLS], ids=str)
def test_a_header_of_blocks_can_start_as_a_linear_one_and_then_learns_everywhere(shape: FeatureShape) -> None:
    generator = named_generator(0, "start")
    linear = make_header(HeaderSpec(kind="linear"), shape)
    spec = HeaderSpec(kind="blocks", channels=8, pooling=2, blocks=sample_blocks(2, OPERATIONS, generator))
    header = make_header(spec, shape)
    features = make_features(shape)
    assert not torch.allclose(header(features), linear(features), atol=1e-2)
    header.start_as(linear)
    torch.testing.assert_close(header(features), linear(features), atol=1e-5, rtol=1e-5)
    header(features).square().sum().backward()
    weight = header.last_linear.weight.grad
    assert weight is not None
    assert bool((weight[:, : -shape.channels].abs().sum(0) > 0).all()), "pooled features must be learned from"


def test_a_header_starts_as_another_of_its_own_kind() -> None:
    spec = HeaderSpec(kind="blocks", channels=8, pooling=2)
    given, fresh, features = make_header(spec, IMAGE), make_header(spec, IMAGE), make_features(IMAGE)
    with torch.no_grad():
        given.last_linear.bias.add_(1.0)
    assert not torch.equal(fresh(features), given(features))
    fresh.start_as(given)
    assert torch.equal(fresh(features), given(features))
    with torch.no_grad():
        fresh.last_linear.bias.add_(1.0)
    assert not torch.equal(fresh(features), given(features))  # the given one stays as it was


def test_only_headers_of_blocks_without_a_hidden_layer_start_as_a_linear_one() -> None:
    linear = make_header(HeaderSpec(kind="linear"), IMAGE)
    for spec in (HeaderSpec(kind="mlp"), HeaderSpec(kind="blocks", hidden=4, channels=8)):
        with pytest.raises(ValueError, match="as a linear one"):
            make_header(spec, IMAGE).start_as(linear)
    with pytest.raises(ValueError, match="'mlp'"):
        make_header(HeaderSpec(kind="blocks", channels=8), IMAGE).start_as(make_header(HeaderSpec(kind="mlp"), IMAGE))


def test_features_of_batches_become_one_with_their_masks() -> None:
    whole = make_features(TEXT, masked=True)
    parts = [whole.rows(slice(0, 2)), whole.rows(slice(2, 2)), whole.rows(slice(2, 5))]
    again = concatenated(parts)
    assert again.mask is not None
    assert all(torch.equal(getattr(again, n), getattr(whole, n)) for n in ("output", "penultimate", "mask"))
    assert concatenated([make_features(IMAGE)]).mask is None
