"""Eqs. 19-20 and the distances, against POT, SciPy and brute force."""

from itertools import permutations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from scipy.stats import wasserstein_distance

from fleetfit.method.similarity import (
    calibrated_weights,
    distance_matrix,
    js_divergence,
    random_projections,
    self_distances,
    similarity_weights,
    sketch_quantiles,
    sliced_wasserstein,
    wasserstein,
)


def sample(seed, num_samples, num_features, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, num_features, generator=generator, dtype=torch.float64) + shift


sizes = st.integers(1, 9)
seeds = st.integers(0, 10**6)

# -- Wasserstein ------------------------------------------------------------------------------------------------------


def test_wasserstein_by_hand():
    a, b = torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([[10.0, 2.0], [0.0, 4.0]])
    # Matched crosswise: costs 4 and 2, mean 3; per dimension half of it.
    assert wasserstein(a, b, per_dimension=False) == pytest.approx(3)
    assert wasserstein(a, b) == pytest.approx(1.5)
    # Unequal sizes: half of the mass at 0 goes to 3.
    assert wasserstein(torch.tensor([[0.0]]), torch.tensor([[0.0], [3.0]])) == pytest.approx(1.5)


@settings(max_examples=60)
@given(seeds, sizes, sizes, st.integers(1, 5))
def test_wasserstein_against_pot(seed, n, m, num_features):
    a, b = sample(seed, n, num_features), sample(seed + 1, m, num_features, 0.5)
    expected = ot.emd2(ot.unif(n), ot.unif(m), ot.dist(a.numpy(), b.numpy(), metric="cityblock"))
    assert wasserstein(a, b, per_dimension=False) == pytest.approx(expected, abs=1e-9)
    assert wasserstein(a, b) == pytest.approx(expected / num_features, abs=1e-9)


@settings(max_examples=30)
@given(seeds, st.integers(1, 5))
def test_wasserstein_by_brute_force_over_matchings(seed, n):
    a, b = sample(seed, n, 3), sample(seed + 1, n, 3)
    best = min(float((a - b[list(order)]).abs().sum(1).mean()) for order in permutations(range(n)))
    assert wasserstein(a, b, per_dimension=False) == pytest.approx(best)


@settings(max_examples=40)
@given(seeds, sizes, sizes, sizes)
def test_wasserstein_is_a_metric(seed, n, m, k):
    a, b, c = sample(seed, n, 2), sample(seed + 1, m, 2), sample(seed + 2, k, 2)
    assert wasserstein(a, a) == 0
    assert wasserstein(a, b) == pytest.approx(wasserstein(b, a), abs=1e-9)
    assert wasserstein(a, c) <= wasserstein(a, b) + wasserstein(b, c) + 1e-9
    assert wasserstein(a, a.flip(0)) == pytest.approx(0, abs=1e-12)
    # A shift of everything by 2 in each dimension costs 2 per dimension; repeating points costs nothing.
    assert wasserstein(a, a + 2) == pytest.approx(2)
    assert wasserstein(a, a.repeat(2, 1)) == pytest.approx(0, abs=1e-9)


# -- sliced -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(seeds, sizes, st.integers(1, 12))
def test_quantiles_against_numpy(seed, n, num_quantiles):
    features, projections = sample(seed, n, 4), sample(seed + 1, 4, 3)
    levels = (np.arange(num_quantiles) + 0.5) / num_quantiles
    # NumPy rounds levels that fall between two samples; move them down by less than any gap between steps.
    expected = np.quantile((features @ projections).numpy(), levels - 1e-9, axis=0, method="inverted_cdf")
    np.testing.assert_allclose(sketch_quantiles(features, projections, num_quantiles).numpy(), expected)


@settings(max_examples=50)
@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_sliced_is_the_exact_mean_of_one_dimensional_distances(seed, n, m):
    a, b, projections = sample(seed, n, 4), sample(seed + 1, m, 4, 1.0), sample(seed + 2, 4, 5)
    q = n * m  # a multiple of both: nothing is lost
    sliced = sliced_wasserstein(sketch_quantiles(a, projections, q), sketch_quantiles(b, projections, q))
    along = zip((a @ projections).T.numpy(), (b @ projections).T.numpy(), strict=True)
    assert sliced == pytest.approx(np.mean([wasserstein_distance(x, y) for x, y in along]))


def test_projections_are_unit_uniform_and_repeatable():
    projections = random_projections(8, 4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(projections.norm(dim=0), torch.ones(4000))
    torch.testing.assert_close(projections @ projections.T / 4000, torch.eye(8) / 8, atol=0.01, rtol=0)
    assert torch.equal(projections, random_projections(8, 4000, torch.Generator().manual_seed(0)))


def test_sliced_orders_devices_as_the_exact_distance_does_and_is_of_its_size():
    projections = random_projections(16, 400, torch.Generator().manual_seed(0)).double()
    base = sample(0, 60, 16)
    exact, sliced = [], []
    for shift in (1.0, 3.0, 6.0):
        other = sample(1, 60, 16) + shift * torch.sign(sample(2, 1, 16))
        exact.append(wasserstein(base, other))
        quantiles = [sketch_quantiles(x, projections, 32) for x in (base, other)]
        sliced.append(sliced_wasserstein(*quantiles))
    assert sliced == sorted(sliced)
    assert exact == sorted(exact)
    assert 0.5 < sliced[-1] / exact[-1] < 1.5


# -- Jensen-Shannon ---------------------------------------------------------------------------------------------------


def test_js_by_hand():
    apart = js_divergence(torch.tensor([[0.0, 5.0]]), torch.tensor([[1.0, 5.0]]), num_bins=2)
    assert apart == pytest.approx(0.5)  # 1 bit in the first feature, 0 in the constant one
    assert js_divergence(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [0.0]]), num_bins=4) == 0


@settings(max_examples=50)
@given(seeds, sizes, sizes, st.integers(1, 10))
def test_js_against_scipy(seed, n, m, num_bins):
    a, b = sample(seed, n, 3), sample(seed + 1, m, 3, 0.7)
    expected = []
    for x, y in zip(a.numpy().T, b.numpy().T, strict=True):
        edges = np.histogram_bin_edges(np.concatenate([x, y]), bins=num_bins)
        expected.append(jensenshannon(np.histogram(x, edges)[0], np.histogram(y, edges)[0], base=2) ** 2)
    divergence = js_divergence(a, b, num_bins)
    assert divergence == pytest.approx(np.mean(expected), abs=1e-9)
    assert 0 <= divergence <= 1
    assert divergence == pytest.approx(js_divergence(b, a, num_bins))


def test_js_bears_features_that_differ_by_rounding_only():
    a = torch.tensor([[1.0], [1.0 + 2**-52]], dtype=torch.float64)
    assert js_divergence(a, a, num_bins=10) == 0


# -- matrices and weights ---------------------------------------------------------------------------------------------


def test_distance_matrix_asks_every_pair():
    sketches = [torch.full((2, 1), value) for value in (0.0, 1.0, 5.0)]
    assert distance_matrix(sketches, wasserstein).tolist() == [[0, 1, 5], [1, 0, 4], [5, 4, 0]]


def test_self_distances_use_disjoint_halves():
    sketches = [torch.tensor([[0.0], [1.0], [99.0], [4.0], [6.0]]), torch.tensor([[1.0], [1.0]])]
    # Halves {0, 1} and {4, 6}; the odd row in the middle is left out.
    assert self_distances(sketches, wasserstein).tolist() == [4.5, 0.0]
    with pytest.raises(ValueError, match=r"sketches.1 must have at least 2 samples, got 1"):
        self_distances([torch.zeros(2, 1), torch.zeros(1, 1)], wasserstein)


def test_similarity_weights_by_hand():
    # W = [[1, 1/4], [1/4, 1]]; W-bar the same; rows: softmax of (1, 1/4).
    weights = similarity_weights(torch.tensor([[0.0, 3.0], [3.0, 0.0]]))
    near = 1 / (1 + np.exp(-0.75))
    assert weights.flatten().tolist() == pytest.approx([near, 1 - near, 1 - near, near])


@given(st.integers(1, 6), seeds)
def test_similarity_weights_against_numpy_and_their_range(num_devices, seed):
    distance = sample(seed, num_devices, num_devices).abs() * 3  # not symmetric: W-bar is
    w = 1 / (1 + distance.numpy())
    weights = similarity_weights(distance)
    np.testing.assert_allclose(weights.numpy(), softmax(np.sqrt(w * w.T), axis=1))
    torch.testing.assert_close(weights.sum(1), torch.ones(num_devices, dtype=torch.float64))
    assert (weights.max(1).values / weights.min(1).values).max() <= np.e + 1e-9


def test_calibrated_weights_by_hand():
    between = torch.tensor([[0.0, 2.0, 8.0], [2.0, 0.0, 6.0], [8.0, 6.0, 0.0]])
    within = torch.tensor([1.0, 4.0, 1.0])
    # Row 0: 2 / sqrt(1*4) - 1 = 0 counts as oneself; 8 / 1 - 1 = 7. tau = 7 gives exponents 0, 0, -1.
    row = np.array([1, 1, np.exp(-1)])
    assert calibrated_weights(between, within, 7.0)[0].tolist() == pytest.approx((row / row.sum()).tolist())
    # Row 1: 6 / sqrt(4*1) - 1 = 2.
    row = np.array([1, 1, np.exp(-2 / 7)])
    assert calibrated_weights(between, within, 7.0)[1].tolist() == pytest.approx((row / row.sum()).tolist())


@given(st.integers(1, 6), seeds, st.floats(0.05, 10), st.floats(0.01, 100))
def test_calibrated_weights_properties(num_devices, seed, temperature, scale):
    sketches = [sample(seed + i, 12, 2, shift=float(i)) for i in range(num_devices)]
    between, within = distance_matrix(sketches, wasserstein), self_distances(sketches, wasserstein)
    weights = calibrated_weights(between, within, temperature)
    torch.testing.assert_close(weights.sum(1), torch.ones(num_devices, dtype=torch.float64))
    assert (weights.diagonal() >= weights.max(1).values - 1e-12).all(), "nobody counts more than oneself"
    # The unit of the distance does not matter, as it does in Eq. 19.
    torch.testing.assert_close(calibrated_weights(between * scale, within * scale, temperature), weights)
    uniform = calibrated_weights(between, within, 1e9)
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / num_devices))


def test_calibrated_weights_split_groups_that_the_papers_do_not():
    sketches = [sample(i, 24, 8, shift=5.0 * (i % 2)) for i in range(6)]
    between, within = distance_matrix(sketches, wasserstein), self_distances(sketches, wasserstein)
    alike = torch.tensor([[float(i % 2 == j % 2) for j in range(6)] for i in range(6)], dtype=torch.float64)
    torch.testing.assert_close(calibrated_weights(between, within, 0.5), alike / 3, atol=0.05, rtol=0)
    assert (similarity_weights(between) - 1 / 6).abs().max() < 0.15


def test_calibrated_weights_without_noise():
    between = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    weights = calibrated_weights(between, torch.zeros(3), 0.5)
    assert weights.tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]


def test_bad_arguments_name_rule_and_value():
    empty, one = torch.zeros(0, 2), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="at least 1 point, got 0 and 1"):
        wasserstein(empty, one)
    with pytest.raises(ValueError, match="at least 1 point, got 1 and 0"):
        js_divergence(one, empty, 4)
    with pytest.raises(ValueError, match="num_bins must be >= 1, got 0"):
        js_divergence(one, one, 0)
    with pytest.raises(ValueError, match="at least 1 sample, got 0"):
        sketch_quantiles(empty, torch.zeros(2, 3), 4)
    with pytest.raises(ValueError, match="num_quantiles must be >= 1, got 0"):
        sketch_quantiles(one, torch.zeros(2, 3), 0)
    with pytest.raises(ValueError, match="must be >= 1, got 0 and 3"):
        random_projections(0, 3, torch.Generator())
    with pytest.raises(ValueError, match="distance must be finite and >= 0"):
        similarity_weights(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="temperature must be finite and > 0, got 0"):
        calibrated_weights(torch.zeros(1, 1), torch.ones(1), 0.0)
    with pytest.raises(ValueError, match="distance_within must be finite and >= 0"):
        calibrated_weights(torch.zeros(1, 1), -torch.ones(1), 1.0)
