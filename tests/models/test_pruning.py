"""Dropping neurons: masked equals cut out, for every kind; gate gradients against autograd."""

import pytest
import torch

from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import FIXED_HEADERS, OPERATIONS, HeaderSpec
from fleetfit.method.search_space import sample_blocks
from fleetfit.models.features import Features, FeatureShape
from fleetfit.models.header import Header, build_header, header_from_state
from fleetfit.models.pruning import ConvOp, apply_masks, extract, prunable_layers

torch.set_num_threads(1)

IMAGE = FeatureShape(16, (4, 4))
TEXT = FeatureShape(16, (1, 9))
SPECS = [HeaderSpec(kind=kind, channels=8, pooling=2, hidden=8) for kind in FIXED_HEADERS]
SPECS += [HeaderSpec(kind="blocks", channels=8, pooling=2)]  # its projection has the neurons
SPECS += [
    HeaderSpec(
        kind="blocks",
        channels=8,
        pooling=2,
        hidden=8,
        repeats=repeats,
        blocks=sample_blocks(4, OPERATIONS, named_generator(seed, "specs")),
    )
    for seed, repeats in [(0, 1), (1, 2), (2, 1)]
]
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}{len(s.blocks)}x{s.repeats}")


def make_features(shape: FeatureShape) -> Features:
    generator = named_generator(0, "features")
    size = (5, shape.num_tokens, shape.channels)
    mask = torch.ones(size[:2], dtype=torch.bool)
    mask[:, 7:] = shape.grid[0] > 1
    return Features(
        torch.randn(size, generator=generator), torch.randn(size, generator=generator), None if mask.all() else mask
    )


def make_header(spec: HeaderSpec, shape: FeatureShape) -> Header:
    with seeded_init(0, "header"):
        return build_header(spec, shape, 3)


def make_masks(header: Header, seed: int) -> dict[str, torch.Tensor]:
    generator = named_generator(seed, "masks")
    masks = {n: torch.rand(m.num_neurons, generator=generator) < 0.5 for n, m in prunable_layers(header).items()}
    for mask in masks.values():
        mask[0] = True
    return masks


@EVERY_SPEC
@pytest.mark.parametrize("shape", [IMAGE, TEXT], ids=["image", "text"])
def test_masked_equals_cut_out_and_is_rebuilt_from_its_state(spec: HeaderSpec, shape: FeatureShape) -> None:
    features = make_features(shape)
    for seed in range(3):
        header = make_header(spec, shape)
        kept = make_masks(header, seed)
        whole = header(features)
        smaller = extract(header, kept)
        assert torch.equal(header(features), whole), "extract must not change its argument"
        apply_masks(header, kept)
        torch.testing.assert_close(smaller(features), header(features), rtol=0, atol=1e-6)
        again = header_from_state(spec, shape, 3, smaller.state_dict())
        assert torch.equal(again(features), smaller(features))
        if kept:
            assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in header.parameters())


@EVERY_SPEC
def test_cut_twice_equals_masked_by_both(spec: HeaderSpec) -> None:
    header, features = make_header(spec, IMAGE), make_features(IMAGE)
    first = make_masks(header, 1)
    once = extract(header, first)
    second = make_masks(once, 2)
    twice = extract(once, second)
    both = {name: mask.clone() for name, mask in first.items()}
    for name, mask in second.items():
        both[name][first[name]] = mask
    apply_masks(header, both)
    torch.testing.assert_close(twice(features), header(features), rtol=0, atol=1e-6)


@EVERY_SPEC
def test_gate_gradient_equals_autograd_through_a_gate(spec: HeaderSpec) -> None:
    header, features = make_header(spec, IMAGE), make_features(IMAGE)
    for name, layer in prunable_layers(header).items():
        header.zero_grad()
        header(features).square().sum().backward()
        from_parameters = torch.zeros(layer.num_neurons)
        for parameter_name, dim in layer.gate_parameters():
            p = layer.get_parameter(parameter_name)
            assert p.grad is not None
            from_parameters += (
                (p.grad * p.detach()).movedim(dim, 0).flatten(1).sum(1) if p.ndim > 1 else p.grad * p.detach()
            )

        gate = torch.ones(layer.num_neurons, requires_grad=True)
        if isinstance(layer, ConvOp):
            hook = layer.register_forward_hook(lambda m, args, out, gate=gate: out * gate[:, None, None])
        else:
            hook = layer.last.register_forward_pre_hook(lambda m, args, gate=gate: (args[0] * gate,))
        header(features).square().sum().backward()
        hook.remove()
        torch.testing.assert_close(from_parameters, gate.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_neurons_own_what_removes_them() -> None:
    # Zeroing all parameters of neuron j has the effect of a gate at 0 on it.
    header, features = make_header(HeaderSpec(kind="mlp", hidden=8), IMAGE), make_features(IMAGE)
    mask = torch.ones(8, dtype=torch.bool)
    mask[3] = False
    hidden = torch.nn.functional.gelu(header.classifier.first(features.output[:, 0]))
    expected = header.classifier.last(hidden * mask)
    apply_masks(header, {"classifier": mask})
    torch.testing.assert_close(header(features), expected)


def test_wrong_masks_are_refused() -> None:
    header = make_header(HeaderSpec(kind="mlp", hidden=8), IMAGE)
    with pytest.raises(ValueError, match="'body' is no layer with neurons; there are classifier"):
        apply_masks(header, {"body": torch.ones(8, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"must have shape \(8,\), got \(7,\)"):
        extract(header, {"classifier": torch.ones(7, dtype=torch.bool)})
    with pytest.raises(ValueError, match="at least 1 neuron must be kept"):
        extract(header, {"classifier": torch.zeros(8, dtype=torch.bool)})


def test_a_saved_cut_that_cannot_be_is_refused() -> None:
    spec = HeaderSpec(kind="cnn_ignore", channels=8)
    header = make_header(spec, IMAGE)
    state = extract(header, make_masks(header, 0)).state_dict()
    state["body.convolutions.0.kept"] = torch.tensor([0, 9])
    with pytest.raises(ValueError, match=r"body\.convolutions\.0\.kept: .* 0\.\.7"):
        header_from_state(spec, IMAGE, 3, state)
