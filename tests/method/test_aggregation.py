"""Eq. 21 and the class prior."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fleetfit.method.aggregation import (
    aggregate,
    alone_weights,
    average_weights,
    distance_from_uniform,
    unit_sum,
)

seeds = st.integers(0, 10**6)


def importance_sets(seed, num_devices):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"weight": torch.rand(3, 2, generator=generator), "bias": torch.rand(3, generator=generator)}
        for _ in range(num_devices)
    ]


def test_aggregate_by_hand():
    weights = torch.tensor([[0.75, 0.25], [0.0, 1.0]])
    sets = [
        {"a": torch.tensor([4.0, 0.0]), "b": torch.tensor(8.0)},
        {"b": torch.tensor(0.0), "a": torch.tensor([0.0, 8.0])},
    ]
    first, second = aggregate(weights, sets)
    assert (first["a"].tolist(), float(first["b"])) == ([3.0, 2.0], 6.0)
    assert (second["a"].tolist(), float(second["b"])) == ([0.0, 8.0], 0.0)
    assert list(second) == ["a", "b"]


@given(seeds, st.integers(1, 5), st.integers(1, 4))
def test_aggregate_against_einsum(seed, num_peers, num_devices):
    weights = torch.rand(num_devices, num_peers, generator=torch.Generator().manual_seed(seed)).softmax(1)
    sets = importance_sets(seed, num_peers)
    result = aggregate(weights, sets)
    assert len(result) == num_devices
    for name in ("weight", "bias"):
        stacked = np.stack([one[name].numpy() for one in sets])
        expected = np.einsum("dp,p...->d...", weights.numpy(), stacked)
        np.testing.assert_allclose(np.stack([one[name].numpy() for one in result]), expected, rtol=1e-5)
        assert result[0][name].dtype == torch.float32


@given(seeds, st.integers(1, 5))
def test_alone_keeps_and_average_makes_all_alike(seed, num_devices):
    sets = importance_sets(seed, num_devices)
    for before, after in zip(sets, aggregate(alone_weights(num_devices), sets), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    averaged = aggregate(average_weights(num_devices), sets)
    mean = torch.stack([one["bias"] for one in sets]).mean(0)
    for one in averaged:
        torch.testing.assert_close(one["bias"], mean)


def test_aggregate_commutes_with_sums_over_neurons():
    # Eq. 21 is linear: neuron-level sums decide the same as parameters.
    weights, sets = average_weights(3), importance_sets(0, 3)
    by_neuron = aggregate(weights, [{"n": one["weight"].sum(1) + one["bias"]} for one in sets])
    for full, short in zip(aggregate(weights, sets), by_neuron, strict=True):
        torch.testing.assert_close(full["weight"].sum(1) + full["bias"], short["n"])


def test_aggregate_refuses_what_does_not_fit():
    sets = importance_sets(0, 2)
    with pytest.raises(ValueError, match=r"sets must be one per peer \(3, at least 1\), got 2"):
        aggregate(average_weights(3), sets)
    with pytest.raises(ValueError, match="each row of weights must sum to 1"):
        aggregate(average_weights(2) * 1.01, sets)
    with pytest.raises(ValueError, match=r"sets.1 must have the names and shapes of sets.0"):
        aggregate(average_weights(2), [sets[0], {"weight": sets[1]["weight"]}])
    with pytest.raises(ValueError, match=r"sets.1 must have the names and shapes"):
        aggregate(average_weights(2), [sets[0], {**sets[1], "bias": torch.zeros(4)}])


@given(seeds, st.floats(1e-6, 1e6))
def test_unit_sum_sums_to_one_whatever_the_scale(seed, scale):
    (one,) = importance_sets(seed, 1)
    scaled = unit_sum({name: tensor * scale for name, tensor in one.items()})
    assert sum(float(tensor.sum()) for tensor in scaled.values()) == pytest.approx(1, rel=1e-5)
    for name, tensor in unit_sum(one).items():
        torch.testing.assert_close(scaled[name], tensor, rtol=1e-4, atol=1e-7)


def test_unit_sum_by_hand_of_zeros_and_of_negatives():
    assert unit_sum({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0])})["b"].tolist() == [0.625]
    assert unit_sum({"a": torch.zeros(2)})["a"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="importance of 'a' must be >= 0"):
        unit_sum({"a": torch.tensor([1.0, -1.0])})


def test_distance_from_uniform_by_hand():
    assert distance_from_uniform(average_weights(4)) == 0
    assert distance_from_uniform(alone_weights(4)) == pytest.approx(0.75)
    assert distance_from_uniform(torch.tensor([[0.0, 0.5, 0.5]])) == pytest.approx(1 / 3)
    assert distance_from_uniform(torch.tensor([[0.5, 0.5], [0.9, 0.1]])) == pytest.approx(0.4)


# -- class prior ------------------------------------------------------------------------------------------------------
