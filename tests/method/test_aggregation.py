"""Eq. 21 and the class prior."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import dirichlet

from fleetfit.method.aggregation import (
    aggregate,
    alone_weights,
    average_weights,
    class_prior,
    distance_from_uniform,
    tempered_counts,
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


def test_class_prior_by_hand():
    prior = class_prior(torch.tensor([6.0, 2.0, 0.0]), torch.tensor([0.5, 0.25, 0.25]), 8.0)
    # (6 + 4) / 16 / 0.5, (2 + 2) / 16 / 0.25, (0 + 2) / 16 / 0.25
    assert prior.exp().tolist() == pytest.approx([1.25, 1.0, 0.5])


counts = st.lists(st.integers(0, 50), min_size=2, max_size=8)


@given(counts, st.floats(0.1, 100), seeds)
def test_class_prior_is_the_posterior_mean_of_a_dirichlet_over_the_clusters_shares(number, strength, seed):
    q = torch.rand(len(number), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    q = q / q.sum()
    n = torch.tensor(number, dtype=torch.float64)
    posterior = dirichlet.mean(strength * q.numpy() + n.numpy())
    np.testing.assert_allclose(class_prior(n, q, strength).numpy(), np.log(posterior / q.numpy()), atol=1e-9)


@given(counts, st.floats(0.1, 100))
def test_class_prior_added_to_calibrated_logits_is_bayes_rule(number, strength):
    # A model calibrated for shares q says p(c|x) ~ q_c l_c; on the device it should be (its shares) * l_c.
    n = torch.tensor(number, dtype=torch.float64)
    q = torch.arange(1.0, len(number) + 1, dtype=torch.float64)
    q = q / q.sum()
    likelihood = torch.linspace(0.2, 0.9, len(number), dtype=torch.float64)
    logits = (q * likelihood).log() + class_prior(n, q, strength)
    shares = (n + strength * q) / (n.sum() + strength)
    torch.testing.assert_close(logits.softmax(0), shares * likelihood / (shares * likelihood).sum())


def test_class_prior_fades_with_strength_and_without_samples():
    n, q = torch.tensor([9.0, 1.0]), torch.tensor([0.3, 0.7])
    assert class_prior(torch.zeros(2), q, 5.0).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert class_prior(n, q, 1e7).tolist() == pytest.approx([0, 0], abs=1e-4)
    unseen = class_prior(torch.tensor([10.0, 0.0]), q, 5.0)[1]
    assert float(unseen) == pytest.approx(np.log(5 / 15))


def test_class_prior_bears_classes_that_the_cluster_has_not_seen():
    prior = class_prior(torch.tensor([5.0, 0.0, 2.0]), torch.tensor([3.0, 0.0, 0.0]), 4.0)
    assert bool(prior.isfinite().all())
    assert float(prior[1]) == pytest.approx(np.log(4 / 11))
    assert float(prior[2]) > 0


def test_tempered_counts_by_hand():
    counts = torch.tensor([9.0, 1.0, 0.0])
    assert tempered_counts(counts, 0.5).tolist() == pytest.approx([7.5, 2.5, 0])  # 3 : 1, ten in all
    assert tempered_counts(counts, 1e-9).tolist() == pytest.approx([5, 5, 0])  # seen, or not
    assert torch.equal(tempered_counts(counts, 1.0), counts)
    assert torch.equal(tempered_counts(torch.zeros(2), 0.5), torch.zeros(2))


def test_class_prior_refuses_bad_arguments():
    n, q = torch.ones(2), torch.ones(2)
    with pytest.raises(ValueError, match="strength must be finite and > 0, got 0"):
        class_prior(n, q, 0.0)
    with pytest.raises(ValueError, match="floor must be finite and > 0, got 0"):
        class_prior(n, q, 1.0, floor=0.0)
    with pytest.raises(ValueError, match="counts must be finite and >= 0"):
        class_prior(-n, q, 1.0)
    with pytest.raises(ValueError, match="class_shares must be finite and >= 0"):
        class_prior(n, -q, 1.0)
    with pytest.raises(ValueError, match="class_shares must not all be 0"):
        class_prior(n, torch.zeros(2), 1.0)
