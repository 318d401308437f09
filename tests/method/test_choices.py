"""Choices and scores that the Pareto Front Grid is compared with."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.preprocessing import minmax_scale

from fleetfit.method.choices import (
    energy_efficiency_ratio,
    greedy_accuracy,
    greedy_size,
    optimum,
    random_choice,
    size_efficiency_ratio,
    smallest,
    trade_off_score,
    trade_off_score_accuracy,
)

columns = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(st.floats(-1e6, 1e6), min_size=n, max_size=n), min_size=3, max_size=3)
)


def test_choices_by_hand():
    accuracy = np.array([0.5, 0.9, 0.9, 0.8])
    assert greedy_accuracy(accuracy, np.array([0.1, 0.4, 0.3, 0.2])) == 2
    assert greedy_accuracy(accuracy, np.array([0.1, 0.3, 0.3, 0.2])) == 1
    assert greedy_size(np.array([10.0, 30.0, 20.0, 30.0])) == 1
    assert smallest(np.array([20.0, 10.0, 10.0])) == 1


def test_scores_by_hand():
    loss, energy, size = np.array([1.0, 3.0, 2.0]), np.array([10.0, 0.0, 2.5]), np.array([7.0, 7.0, 7.0])
    assert trade_off_score(loss, energy, size).tolist() == [1.0, 1.0, 0.75]
    accuracy = np.array([0.5, 0.25, 0.75])
    assert trade_off_score_accuracy(accuracy, energy, size).tolist() == [0.0, 0.0, 0.875]
    assert optimum(trade_off_score(loss, energy, size), "lower") == 2


@given(columns)
def test_scores_against_scikit_learn(values):
    a, b, c = (np.array(column) for column in values)
    x, y, z = minmax_scale(a), minmax_scale(b), minmax_scale(c)
    # scikit-learn takes a range below 10 eps for constant.
    if all(np.ptp(v) == 0 or np.ptp(v) > 1e-3 for v in (a, b, c)):
        assert trade_off_score(a, b, c) == pytest.approx(x + y + z, abs=1e-6)
        assert trade_off_score_accuracy(a, b, c) == pytest.approx(x - (z + y) / 2, abs=1e-6)


def test_units_do_not_matter_and_raw_sums_would_not_do():
    loss, energy, size = np.array([0.1, 0.9]), np.array([5.0, 4.0]), np.array([2.0, 1.0])
    assert trade_off_score(loss, energy, size) == pytest.approx(trade_off_score(loss, energy * 1e6, size / 1e3))


def test_ratios_by_hand():
    accuracy = np.array([0.8, 0.9])
    assert energy_efficiency_ratio(accuracy, np.array([4.0, 9.0])) == pytest.approx([0.2, 0.1])
    assert size_efficiency_ratio(accuracy, np.array([2.0, 3.0])) == pytest.approx([0.4, 0.3])


def test_random_choice_is_uniform_and_repeatable():
    generator = torch.Generator().manual_seed(0)
    drawn = [random_choice(5, generator) for _ in range(2000)]
    assert chisquare(np.bincount(drawn, minlength=5)).pvalue > 1e-3
    again = torch.Generator().manual_seed(0)
    assert drawn[:50] == [random_choice(5, again) for _ in range(50)]


def test_bad_arguments_name_rule_and_value():
    with pytest.raises(ValueError, match="num_candidates must be >= 1, got 0"):
        random_choice(0, torch.Generator())
    with pytest.raises(ValueError, match="at least 1 candidate"):
        greedy_accuracy(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="no NaN"):
        optimum(np.array([1.0, np.nan]), "lower")
    with pytest.raises(ValueError, match="must be finite"):
        trade_off_score(np.array([np.inf]), np.ones(1), np.ones(1))
