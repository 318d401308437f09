"""The class prior: by hand, against Bayes' rule, against a simulation, and with what cannot be."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import dirichlet

from fleetfit.method.class_prior import (
    SHIFT_PRIORS,
    ShiftPrior,
    class_prior,
    harmless_shifts,
    held_out_gain,
    label_shift,
    support_prior,
)

seeds = st.integers(0, 10**6)


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


def test_support_prior_by_hand() -> None:
    # Two of four classes seen, three there, a = 2: (3 + 2) / 10, (1 + 2) / 10, and (3 - 2) * 2 / 10 / 2 for each other.
    prior = support_prior(torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.ones(4), 6.0, 3.0)
    assert prior.exp().tolist() == pytest.approx([0.5 * 4, 0.3 * 4, 0.1 * 4, 0.1 * 4], rel=1e-6)


def test_support_prior_over_all_classes_is_the_class_prior() -> None:
    counts, shares = torch.tensor([[5.0, 0.0, 2.0], [0.0, 0.0, 0.0]]), torch.ones(3)
    torch.testing.assert_close(support_prior(counts, shares, 6.0, 3.0), class_prior(counts, shares, 6.0))


def test_support_prior_is_what_devices_of_so_many_classes_have() -> None:
    """Draw classes and samples as the prior supposes, alpha = 1: the share of unseen classes' samples is as it says."""
    generator = np.random.default_rng(0)
    told, came = [], []
    for _ in range(4000):
        present = generator.choice(8, size=4, replace=False)
        shares = generator.dirichlet(np.ones(4))
        counts = torch.zeros(8)
        for c in generator.choice(present, size=6, p=shares):
            counts[c] += 1
        posterior = support_prior(counts, torch.ones(8), 4.0, 4.0).exp() / 8
        told.append(float(posterior[counts == 0].sum()))
        came.append(float(sum(p for c, p in zip(present, shares, strict=True) if counts[c] == 0)))
    assert np.mean(told) == pytest.approx(np.mean(came), abs=0.01)


def test_support_prior_keeps_every_class_reachable() -> None:
    prior = support_prior(torch.tensor([9.0, 0.0]), torch.ones(2), 0.01, 1.0)
    assert -20 < float(prior[1]) < math.log(0.021)


def test_label_shift_finds_the_shares_that_inputs_come_from() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.7, 0.25, 0.05])
    labels = torch.multinomial(shares, 4000, replacement=True, generator=generator)
    x = torch.randn(4000, 3, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 3)
    logits = 2 * x  # log p(x | c) up to a constant: the classes' means are 2 on their own axis
    found = label_shift(logits, torch.zeros(3), torch.ones(3), 1.0, num_steps=200)
    assert (found.exp() / 3).tolist() == pytest.approx(shares.tolist(), abs=0.03)


def test_label_shift_stays_where_it_was_with_much_trust_or_no_inputs() -> None:
    prior = class_prior(torch.tensor([5.0, 1.0]), torch.ones(2), 2.0)
    logits = torch.tensor([[0.0, 3.0]] * 20)
    assert label_shift(logits, prior, torch.ones(2), 1e6).tolist() == pytest.approx(prior.tolist(), abs=1e-3)
    assert torch.equal(label_shift(logits[:0], prior, torch.ones(2), 1.0), prior)
    assert float(label_shift(logits, prior, torch.ones(2), 1.0)[1]) > float(prior[1])


@pytest.mark.parametrize("number", [0.0, -1.0, math.inf, math.nan])
def test_priors_refuse_what_is_no_number_of_classes(number: float) -> None:
    with pytest.raises(ValueError, match="num_present must be finite and > 0"):
        support_prior(torch.ones(2), torch.ones(2), 1.0, number)


def drawn_inputs(shares: list[float], number: int, sharpness: float = 2.0) -> torch.Tensor:
    """Logits of a model that is calibrated for even shares: classes are Gaussians around the unit vectors."""
    rng = np.random.default_rng(5)
    classes = rng.choice(len(shares), number, p=shares)
    points = np.eye(len(shares))[classes] + rng.normal(size=(number, len(shares))) / sharpness
    return torch.from_numpy(points * sharpness**2)  # log N(x; e_c, 1 / sharpness^2) up to a constant


def test_held_out_gain_is_the_mean_log_likelihood_ratio_of_inputs_left_out() -> None:
    shares, strength = np.array([0.5, 0.3, 0.2]), 10.0
    logits = drawn_inputs([0.1, 0.2, 0.7], 23).numpy()
    gains = np.empty(23)
    for f in range(5):
        left = np.exp(logits[np.arange(23) % 5 != f])
        p = shares.copy()
        for _ in range(30):  # by the definition: responsibilities, then their mean with the prior counts
            each = left * (p / shares)
            each /= each.sum(1, keepdims=True)
            p = (strength * shares + each.sum(0)) / (strength + len(left))
        for i in range(f, 23, 5):
            likelihood = np.exp(logits[i]) / shares  # p(x | c) up to a constant
            gains[i] = np.log((p * likelihood).sum() / (shares * likelihood).sum())
    mean, error = held_out_gain(torch.from_numpy(logits), torch.from_numpy(shares), ShiftPrior(strength))
    assert mean == pytest.approx(gains.mean(), rel=1e-6)
    assert error == pytest.approx(gains.std(ddof=1) / np.sqrt(23), rel=1e-6)


def test_inputs_that_come_as_expected_gain_nothing_and_others_do() -> None:
    even = torch.full((4,), 0.25, dtype=torch.float64)
    same, error = held_out_gain(drawn_inputs([0.25] * 4, 2000), even, ShiftPrior(10.0))
    assert same < 2 * error
    other, error = held_out_gain(drawn_inputs([0.7, 0.1, 0.1, 0.1], 200), even, ShiftPrior(10.0))
    assert other > 2 * error


def test_one_input_says_nothing_of_shares() -> None:
    assert held_out_gain(torch.zeros(1, 3), torch.ones(3), ShiftPrior(10.0)) == (0.0, math.inf)
    with pytest.raises(ValueError, match="num_folds must be at least 2, got 1"):
        held_out_gain(torch.zeros(5, 3), torch.ones(3), ShiftPrior(10.0), num_folds=1)


def test_a_model_that_takes_a_class_for_another_is_not_trusted_with_new_shares() -> None:
    even, rng = torch.full((4,), 0.25, dtype=torch.float64), np.random.default_rng(3)
    labels = torch.from_numpy(rng.integers(0, 4, 400))
    noise = torch.from_numpy(rng.normal(size=(400, 4)))
    good = 4 * torch.nn.functional.one_hot(labels, 4) + 2 * noise  # class means 4 apart, deviation 2: calibrated
    assert harmless_shifts(good.double(), labels, even) == SHIFT_PRIORS
    biased = good + torch.tensor([2.0, 0.0, 0.0, -2.0], dtype=torch.float64)
    assert harmless_shifts(biased, labels, even) == ()
    assert harmless_shifts(good[:0], labels[:0], even) == ()


def test_label_shift_of_several_priors_is_that_of_each() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, shares = drawn_inputs([0.6, 0.3, 0.1], 40), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    priors = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    concentrations = torch.tensor([1.0, 0.7, 0.1, 2.0], dtype=torch.float64)
    together = label_shift(logits, priors, shares, 10.0, concentrations)
    for found, prior, concentration in zip(together, priors, concentrations.tolist(), strict=True):
        torch.testing.assert_close(found, label_shift(logits, prior, shares, 10.0, concentration))
    with pytest.raises(ValueError, match="concentration must be finite and > 0"):
        label_shift(logits, priors, shares, 10.0, torch.tensor([1.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("concentration", [1.0, 0.6, 3.0])
def test_label_shift_is_the_mode_of_the_posterior(concentration: float) -> None:
    logits, shares, strength = drawn_inputs([0.6, 0.3, 0.1], 60), torch.tensor([0.2, 0.3, 0.5]).double(), 8.0
    found = (label_shift(logits, torch.zeros(3).double(), shares, strength, concentration, 500) + shares.log()).exp()

    def posterior(p: torch.Tensor) -> float:
        likelihood = (logits + p.log() - shares.log()).logsumexp(-1).sum()
        return float(likelihood + ((strength * shares + concentration - 1) * p.log()).sum())

    assert float(found.sum()) == pytest.approx(1)
    for i, j in ((0, 1), (1, 2), (2, 0)):
        for step in (-1e-3, 1e-3):
            other = found.clone()
            other[i], other[j] = other[i] + step, other[j] - step
            assert posterior(other) < posterior(found)


def test_below_a_concentration_of_1_classes_that_hardly_any_input_speaks_for_are_out() -> None:
    logits = drawn_inputs([0.5, 0.5, 0.0, 0.0], 100, sharpness=4.0)
    prior, shares = torch.zeros(4).double(), torch.full((4,), 0.25).double()
    usual, sparse = (label_shift(logits, prior, shares, 3.0, a) for a in (1.0, 0.1))
    assert bool((sparse[2:] < usual[2:] - 0.5).all())
    assert float((sparse + shares.log()).exp()[:2].sum()) > 0.99
