"""Eqs. 6-8 and 16-18, against exact removal where it is exactly linear, autograd gates, and brute force."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfit.method.importance import (
    contributions,
    curvature_probe,
    drop_neurons,
    gate_importance,
    neuron_importance,
    parameter_importance,
    rank,
    reduce_contributions,
    second_order_importance,
)

# -- Eqs. 6-8 ---------------------------------------------------------------------------------------------------------


def test_contributions_by_hand():
    # One sample, two tokens, two heads of two channels.
    output = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]])
    gradient = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 0.0]]]])
    # Head 0: 1*1 - 6*1; head 1: 4 + 7.
    assert contributions(output, gradient).tolist() == [[-5.0, 11.0]]
    # Neurons: no channel axis.
    assert contributions(output[..., 0], gradient[..., 0]).tolist() == [[1.0, 7.0]]


def test_both_readings_by_hand():
    signed = torch.tensor([[1.0, 2.0], [-3.0, 2.0]])
    assert reduce_contributions(signed, "sample").tolist() == [4.0, 4.0]
    assert reduce_contributions(signed, "set").tolist() == [-2.0, 4.0]


@pytest.mark.parametrize("per", ["sample", "set"])
def test_batches_add_up(per):
    signed = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = reduce_contributions(signed, per).abs()
    parts = sum(reduce_contributions(part, per) for part in signed.split(3)).abs()
    torch.testing.assert_close(parts, whole)


def test_equals_exact_removal_of_a_head_where_the_loss_is_linear():
    generator = torch.Generator().manual_seed(1)
    heads = torch.randn(7, 3, 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    projection = torch.randn(4 * 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(7, generator=generator, dtype=torch.float64)

    def losses(values):
        return targets * (values.flatten(2) @ projection).sum(dim=1)

    losses(heads).sum().backward()
    signed = contributions(heads.detach(), heads.grad)
    for head in range(4):
        without = heads.detach().clone()
        without[:, :, head] = 0
        change = (losses(without) - losses(heads)).detach()
        torch.testing.assert_close(-signed[:, head], change)
        torch.testing.assert_close(reduce_contributions(signed, "sample")[head], change.abs().sum())
        torch.testing.assert_close(reduce_contributions(signed, "set")[head].abs(), change.sum().abs())


def test_ranks_neurons_near_exact_removal_in_a_curved_model():
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(64, 1, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(12, 3, generator=generator, dtype=torch.float64) * 0.1 * torch.arange(1, 13)[:, None]
    labels = torch.randint(3, (64,), generator=generator)

    def loss(values):
        return torch.nn.functional.cross_entropy((values @ weight).mean(1), labels, reduction="sum")

    hidden.requires_grad_()
    loss(hidden).backward()
    taylor = reduce_contributions(contributions(hidden.detach(), hidden.grad), "set").abs()
    exact = torch.stack([(loss(hidden * (torch.arange(12) != i)) - loss(hidden)).detach().abs() for i in range(12)])
    ranks = torch.stack([taylor.argsort().argsort(), exact.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.7


def test_unknown_reading_is_refused():
    with pytest.raises(Exception, match="batch"):
        reduce_contributions(torch.zeros(1, 1), "batch")


# -- Eqs. 16-18 -------------------------------------------------------------------------------------------------------


def all_signs(num_classes):
    return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * num_classes)


def test_the_probe_squared_is_on_average_the_second_derivative():
    """Of logits that are linear in a gate, Gauss-Newton's curvature is the true one: exact over all signs."""
    generator = torch.Generator().manual_seed(0)
    fixed, along = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0])
    gate = torch.ones(5, dtype=torch.float64, requires_grad=True)
    logits = fixed + gate[:, None] * along
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (slope,) = torch.autograd.grad(loss, gate, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), gate, retain_graph=True)
    squares = [
        torch.autograd.grad(curvature_probe(logits, signs.expand(5, 4)), gate, retain_graph=True)[0] ** 2
        for signs in all_signs(4)
    ]
    torch.testing.assert_close(torch.stack(squares).mean(dim=0), curvature)


def test_second_order_is_nearer_to_removal_than_first_order():
    """The error of the series falls with the cube of the unit's output, first order's with its square."""
    along = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(6) % 4

    def loss(scale, gate):
        return torch.nn.functional.cross_entropy(scale * gate[:, None] * along, labels)

    def errors(scale):
        gate = torch.ones(6, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(scale, gate), gate, create_graph=True)
        curvature = torch.stack([torch.autograd.grad(slope[i], gate, retain_graph=True)[0][i] for i in range(6)])
        removed = torch.stack([loss(scale, 1 - torch.eye(6, dtype=torch.float64)[i]) for i in range(6)])
        exact = (removed - loss(scale, torch.ones(6, dtype=torch.float64))).abs()
        second = second_order_importance(slope.detach(), curvature.detach())
        return (slope.detach().abs() - exact).abs().max(), (second - exact).abs().max()

    (first, second), (half_first, half_second) = errors(0.1), errors(0.05)
    assert second < 0.2 * first
    assert float(first / half_first) == pytest.approx(4, rel=0.15)
    assert float(second / half_second) == pytest.approx(8, rel=0.25)  # not 4


def test_parameter_importance_is_the_squared_change_of_a_linear_loss():
    value = torch.tensor([2.0, -3.0, 0.5], dtype=torch.float64, requires_grad=True)
    slope = torch.tensor([1.0, 2.0, -4.0], dtype=torch.float64)
    (value @ slope).backward()
    change = [float(value.detach()[i] * slope[i]) ** 2 for i in range(3)]
    assert parameter_importance(value.grad, value.detach()).tolist() == pytest.approx(change)
    assert change == pytest.approx([4, 36, 4])


def test_neuron_importance_by_hand_over_weights_bias_and_the_next_layer():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])  # 3 neurons, 2 inputs
    bias = torch.tensor([10.0, 20.0, 30.0])
    outgoing = torch.tensor([[100.0, 200.0, 300.0]])  # 1 output, 3 neurons
    assert neuron_importance([(weight, 0), (bias, 0), (outgoing, 1)]).tolist() == [113, 227, 341]
    assert neuron_importance([(bias, -1)]).tolist() == [10, 20, 30]


def test_conv_channels_are_neurons_too():
    importance = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(neuron_importance([(importance, 0)]), importance.sum((1, 2, 3)))
    torch.testing.assert_close(neuron_importance([(importance, 1)]), importance.sum((0, 2, 3)))


def test_neuron_importance_refuses_nothing_and_unequal_counts():
    with pytest.raises(ValueError, match="at least 1 tensor"):
        neuron_importance([])
    with pytest.raises(ValueError, match=r"same number of neurons, got \[2, 3\]"):
        neuron_importance([(torch.zeros(2, 3), 0), (torch.zeros(2, 3), 1)])


@pytest.mark.parametrize("side", ["incoming", "outgoing"])
def test_gate_importance_is_the_squared_gradient_of_a_real_gate(side):
    generator = torch.Generator().manual_seed(3)
    first, second = torch.nn.Linear(5, 4).double(), torch.nn.Linear(4, 2).double()
    inputs = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (9,), generator=generator)
    gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
    hidden = torch.tanh(first(inputs) * gate) if side == "incoming" else torch.tanh(first(inputs)) * gate
    torch.nn.functional.cross_entropy(second(hidden), labels).backward()
    layers = {
        "incoming": [(first.weight.grad, first.weight.detach(), 0), (first.bias.grad, first.bias.detach(), 0)],
        "outgoing": [(second.weight.grad, second.weight.detach(), 1)],
    }
    torch.testing.assert_close(gate_importance(layers[side]), gate.grad**2)


def test_rank_is_stable_and_refuses_nan():
    assert rank(torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0])).tolist() == [1, 3, 4, 0, 2]
    with pytest.raises(ValueError, match="importance must be finite"):
        rank(torch.tensor([1.0, float("nan")]))


# -- pruning ----------------------------------------------------------------------------------------------------------


def test_drop_by_hand_jointly_over_layers():
    importance = {"a": torch.tensor([0.1, 5.0, 0.2]), "b": torch.tensor([3.0, 0.15])}
    kept = {"a": torch.tensor([True, True, True]), "b": torch.tensor([True, True])}
    after = drop_neurons(importance, kept, 2)
    assert {k: v.tolist() for k, v in after.items()} == {"a": [False, True, True], "b": [True, False]}
    assert all(bool(mask.all()) for mask in kept.values()), "the masks given stay as they were"


def test_dropped_ones_stay_dropped_and_do_not_count_again():
    importance = {"a": torch.tensor([0.0, 1.0, 2.0, 3.0])}
    after = drop_neurons(importance, {"a": torch.tensor([False, True, True, True])}, 1)
    assert after["a"].tolist() == [False, False, True, True]


layers = st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=200)
@given(layers, st.integers(0, 8), st.integers(0, 3))
def test_drop_is_the_cheapest_allowed_set_by_brute_force(rows, number, minimum_kept):
    importance = {str(i): torch.tensor([float(value) for value, _ in row]) for i, row in enumerate(rows)}
    kept = {str(i): torch.tensor([there for _, there in row]) for i, row in enumerate(rows)}
    after = drop_neurons(importance, kept, number, minimum_kept)
    neurons = [(layer, i) for layer, mask in kept.items() for i in mask.nonzero().flatten().tolist()]
    dropped = [(layer, i) for layer, i in neurons if not after[layer][i]]
    assert all(not bool((after[layer] & ~kept[layer]).any()) for layer in kept)

    def allowed(chosen):
        left = {layer: int(mask.sum()) - sum(1 for name, _ in chosen if name == layer) for layer, mask in kept.items()}
        return all(left[name] >= minimum_kept for name in {name for name, _ in chosen})

    def cost(chosen):
        return sum(float(importance[layer][i]) for layer, i in chosen)

    assert allowed(dropped)
    sizes = range(min(number, len(neurons)), -1, -1)
    sets = next(found for n in sizes if (found := [c for c in combinations(neurons, n) if allowed(c)]))
    assert len(dropped) == len(sets[0])
    assert cost(dropped) == min(map(cost, sets))


def test_drop_refuses_bad_arguments():
    importance, kept = {"a": torch.ones(2)}, {"a": torch.ones(2, dtype=torch.bool)}
    with pytest.raises(ValueError, match="number must be >= 0, got -1"):
        drop_neurons(importance, kept, -1)
    with pytest.raises(ValueError, match="minimum_kept must be >= 0"):
        drop_neurons(importance, kept, 1, -1)
    with pytest.raises(ValueError, match="must have the layers"):
        drop_neurons(importance, {"b": kept["a"]}, 1)
    with pytest.raises(ValueError, match="'a' must have 2 neurons, got 3"):
        drop_neurons({"a": torch.ones(3)}, kept, 1)
    with pytest.raises(ValueError, match="'a' must be finite"):
        drop_neurons({"a": torch.tensor([1.0, float("inf")])}, kept, 1)
