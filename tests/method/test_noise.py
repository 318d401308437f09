"""Clipping, the secret noise, what it promises (against other accountants), and how noised values are read."""

import hashlib
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import kstest, norm

from fleetfit.method.aggregation import unit_sum
from fleetfit.method.noise import (
    SIMPLEX_SENSITIVITY,
    clearly_lowest,
    clipped,
    epsilon_of,
    flat,
    noise_of_sum,
    secret_noise,
    shaped,
    shrunk,
)

seeds = st.integers(0, 10**6)
KEY = bytes(range(32))


def vector_of(seed, scale=1.0, number=7):
    return scale * torch.randn(number, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- vectors ----------------------------------------------------------------------------------------------------------


def test_a_set_of_tensors_goes_through_a_vector_and_back():
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(7.0), "c": torch.ones(2, dtype=torch.float16)}
    vector = flat(tensors)
    assert vector.tolist() == [7, 0, 1, 2, 3, 4, 5, 1, 1]  # by name, whatever the order
    again = shaped(vector, tensors)
    assert list(again) == ["b", "a", "c"]
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
    assert flat({}).shape == (0,)


@given(seeds, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_clipping_keeps_to_the_norm_and_the_direction(seed, scale, limit):
    vector = vector_of(seed, scale)
    short = clipped(vector, limit)
    assert float(short.norm()) <= limit * (1 + 1e-12)
    if float(vector.norm()) <= limit:
        assert torch.equal(short, vector)
    else:
        assert float(short.norm()) == pytest.approx(limit)
    torch.testing.assert_close(short / short.norm(), vector / vector.norm())


@given(seeds, seeds, st.floats(1e-3, 1e3))
def test_replacing_what_is_clipped_moves_it_by_twice_the_norm_at_most(one, other, limit):
    distance = float((clipped(vector_of(one, 100), limit) - clipped(vector_of(other, 100), limit)).norm())
    assert distance <= 2 * limit * (1 + 1e-12)
    opposite = clipped(vector_of(one, 1e6), limit) - clipped(-vector_of(one, 1e6), limit)
    assert float(opposite.norm()) == pytest.approx(2 * limit)  # and it can be that much


@given(seeds, seeds)
def test_replacing_an_importance_set_moves_it_by_the_root_of_two_at_most(one, other):
    a, b = (unit_sum({"x": vector_of(seed, number=3).exp()})["x"] for seed in (one, other))
    assert float((a - b).norm()) <= SIMPLEX_SENSITIVITY
    far = torch.tensor([[1.0, 0, 0], [0, 0, 1]], dtype=torch.float64)
    assert float((far[0] - far[1]).norm()) == pytest.approx(SIMPLEX_SENSITIVITY)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_says_nothing(bad):
    assert clipped(torch.tensor([1.0, bad, 2.0], dtype=torch.float64), 5.0).tolist() == [0, 0, 0]
    assert clipped(torch.zeros(3, dtype=torch.float64), 1.0).tolist() == [0, 0, 0]


# -- the noise --------------------------------------------------------------------------------------------------------


def test_the_noise_is_standard_normal():
    noise = secret_noise(KEY, b"label", 200_000)
    assert abs(float(noise.mean())) < 4 / math.sqrt(200_000)
    assert float(noise.std()) == pytest.approx(1, abs=4 / math.sqrt(400_000))
    assert kstest(noise.numpy(), "norm").pvalue > 0.01
    lagged = np.corrcoef(noise[:-1].numpy(), noise[1:].numpy())[0, 1]
    assert abs(lagged) < 4 / math.sqrt(200_000)


def test_the_noise_is_the_same_for_key_and_label_and_no_other():
    noise = secret_noise(KEY, b"label", 1000)
    assert torch.equal(noise, secret_noise(KEY, b"label", 1000))
    others = [
        secret_noise(bytes(32), b"label", 1000),
        secret_noise(KEY, b"labels", 1000),
        secret_noise(KEY + b"l", b"abel", 1000),  # where the key ends is part of it
    ]
    for other in others:
        assert abs(float((noise * other).mean())) < 4 / math.sqrt(1000)


@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
def test_the_ends_of_the_uniform_numbers_are_finite(monkeypatch, byte):
    class Stream:
        def digest(self, length):
            return byte * length

    monkeypatch.setattr(hashlib, "shake_256", lambda _: Stream())
    (value,) = secret_noise(KEY, b"", 1).tolist()
    assert 8 < abs(value) < 9
    assert (value > 0) == (byte == b"\xff")


def test_a_short_key_is_refused():
    with pytest.raises(ValueError, match="key must have at least 32 bytes, got 31"):
        secret_noise(bytes(31), b"", 1)


# -- the promise ------------------------------------------------------------------------------------------------------


def balle_and_wang(multiplier, delta):
    """Theorem 8: delta = Phi(m/2 - e/m) - exp(e) Phi(-m/2 - e/m), m = sensitivity over noise; solved for e."""
    m = 1 / multiplier

    def above(epsilon):
        return norm.cdf(m / 2 - epsilon / m) - math.exp(epsilon + norm.logcdf(-m / 2 - epsilon / m)) - delta

    return brentq(above, 0, 1000) if above(0) > 0 else 0.0


@pytest.mark.parametrize("multiplier", [0.2, 0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_one_release_is_the_analytic_gaussian_mechanism(multiplier, delta):
    assert epsilon_of(multiplier, 1, delta) == pytest.approx(balle_and_wang(multiplier, delta), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("multiplier", "number"), [(1.0, 4), (5.0, 9)])
def test_several_releases_are_what_an_accountant_composes_one_by_one(multiplier, number):
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    exact = epsilon_of(multiplier, number, 1e-5)
    accountants = [PLDAccountant(), RdpAccountant()]
    for accountant in accountants:
        for _ in range(number):
            accountant.compose(GaussianDpEvent(multiplier))
    distribution, renyi = (accountant.get_epsilon(1e-5) for accountant in accountants)
    assert distribution == pytest.approx(exact, rel=1e-3)
    assert exact < renyi < 1.25 * exact


def test_more_releases_promise_less_and_more_noise_more():
    by_number = [epsilon_of(1.0, number, 1e-5) for number in (0, 1, 2, 5, 50)]
    assert by_number[0] == 0
    assert by_number == sorted(set(by_number))
    by_noise = [epsilon_of(multiplier, 3, 1e-5) for multiplier in (8, 4, 2, 1, 0.5, 0.1, 0.01)]
    assert by_noise == sorted(set(by_noise))
    assert all(math.isfinite(epsilon) for epsilon in by_noise)


def test_a_missing_accountant_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"\[privacy\] needs dp-accounting: .*; pip install dp-accounting"):
        epsilon_of(1.0, 1, 1e-5)


# -- reading ----------------------------------------------------------------------------------------------------------


def test_the_noise_of_a_weighted_sum_is_what_is_seen():
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    noise = [1.0, 2.0, 0.5]
    draws = torch.stack([s * secret_noise(KEY, bytes([i]), 100_000) for i, s in enumerate(noise)])
    seen = (weights.double() @ draws).std(dim=1)
    torch.testing.assert_close(noise_of_sum(weights, noise), seen, rtol=0.02, atol=0)
    assert noise_of_sum(weights, [0.0] * 3).tolist() == [0, 0]


@pytest.mark.parametrize("length", [0.0, 1.0, 30.0])
def test_shrinking_is_nearer_to_the_truth_than_the_noised_vector(length):
    """Whatever the truth's length; 1000 values with noise 1, whose own length is about 32."""
    truth = torch.zeros(1000, dtype=torch.float64)
    truth[:4] = length / 2
    errors = []
    for draw in range(20):
        noised = truth + secret_noise(KEY, bytes([draw]), 1000)
        read = shrunk(noised, 1.0)
        torch.testing.assert_close(read.norm() * noised, noised.norm() * read)  # the same direction
        errors.append([float((guess - truth).square().sum()) for guess in (read, noised)])
    read, raw = np.mean(errors, axis=0)
    assert raw == pytest.approx(1000, rel=0.05)
    assert read < 0.6 * raw
    assert read < 1.2 * (1000 * length**2 / (1000 + length**2)) + 20  # what the best factor would give


def test_nothing_is_shrunk_without_noise():
    vector = vector_of(1)
    assert torch.equal(shrunk(vector, 0.0), vector)
    assert shrunk(torch.zeros(3, dtype=torch.float64), 1.0).tolist() == [0, 0, 0]


def test_only_what_stands_out_of_the_noise_is_lowest():
    losses = {"first": 1.0, "b": 0.5, "c": 0.7}
    margin = math.sqrt(2 * math.log(2))
    assert clearly_lowest(losses, 0.0) == "b"
    assert clearly_lowest(losses, 0.49 / margin) == "b"
    assert clearly_lowest(losses, 0.51 / margin) == "first"
    assert clearly_lowest({"first": 1.0, "b": 1.5}, 0.0) == "first"
    assert clearly_lowest({"first": 1.0, "b": 0.5}, 0.45) == "b"
    assert clearly_lowest({"first": 1.0, "b": 0.5}, 0.55) == "first"
    assert clearly_lowest({"only": 1.0}, 0.1) == "only"


def test_noise_alone_seldom_stands_out():
    """Of 11 ways that are all alike and one that came first, the first stays most of the time."""
    noise = secret_noise(KEY, b"ways", 11 * 2000).view(2000, 11)
    kept = [clearly_lowest({"first": 0.0} | {str(i): float(v) for i, v in enumerate(row)}, 1.0) for row in noise]
    assert kept.count("first") > 0.8 * len(kept)
