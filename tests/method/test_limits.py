"""At the ends of the range of numbers every formula gives a finite answer or an error, never NaN in silence."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfit.core.records import BackboneShape, EnergyModel
from fleetfit.method.aggregation import aggregate, average_weights, unit_sum
from fleetfit.method.choices import energy_efficiency_ratio, size_efficiency_ratio, trade_off_score
from fleetfit.method.class_prior import class_prior
from fleetfit.method.energy import energy_joules, r_squared, split_power, worst_relative_error
from fleetfit.method.noise import clearly_lowest, clipped, epsilon_of
from fleetfit.method.pareto_grid import MOST_CELLS, choose, make_grid, pareto_front_grid
from fleetfit.method.policy_gradient import update_baseline
from fleetfit.method.similarity import (
    calibrated_weights,
    js_divergence,
    similarity_weights,
    sliced_wasserstein,
    wasserstein,
)

torch.set_num_threads(1)

BAD = [math.nan, math.inf, -math.inf]
anything = st.floats(allow_nan=True, allow_infinity=True)
positive = st.floats(0, allow_nan=False, allow_infinity=True)
bad = pytest.mark.parametrize("value", BAD)


def wide(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- the grid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma_p", [1e-300, 5e-324, 1e-10])
def test_a_grid_of_absurdly_many_cells_is_refused(gamma_p: float) -> None:
    objectives = np.array([[0.2, 1.0], [1.2, 2.0]])
    with pytest.raises(ValueError, match=rf"^gamma_p must be >= 1e-09, .* range 1 of the losses, got {gamma_p:g}$"):
        make_grid(objectives, gamma_p)


def test_as_many_cells_as_may_be_are_told_apart_exactly() -> None:
    """The worst one's distance, squared and summed over the objectives, is still below 2^63."""
    objectives = np.array([[0.0, 1.0, 1.0], [0.5, 0.5, 0.5], [1.0, 0.0, 0.0]])
    grid = make_grid(objectives, 1 / MOST_CELLS)
    assert grid.num_cells == MOST_CELLS
    assert (
        grid.coordinates.tolist()
        == [
            [1, MOST_CELLS, MOST_CELLS],
            [MOST_CELLS // 2] * 3,
            [MOST_CELLS, 1, 1],
        ]
        or grid.coordinates[1, 0] == MOST_CELLS // 2 + 1
    )
    assert choose(objectives, grid.coordinates, pareto_front_grid(grid.coordinates)) == 0


def test_losses_without_a_finite_range_make_no_grid() -> None:
    with pytest.raises(ValueError, match="objectives must have a finite range"):
        make_grid(np.array([[-1e308, 1.0], [1e308, 1.0]]), 0.1)
    with pytest.raises(ValueError, match="objectives must be finite"):
        choose(np.array([[math.nan], [1.0]]), np.array([[1], [1]]), np.array([True, True]))


@settings(max_examples=300)
@given(st.lists(st.tuples(anything, anything), min_size=1, max_size=5), anything)
def test_a_grid_is_within_1_and_k_or_an_error(values: list[tuple[float, float]], gamma_p: float) -> None:
    objectives = np.array(values)
    try:
        grid = make_grid(objectives, gamma_p)
    except ValueError:
        return
    assert 1 <= grid.coordinates.min() <= grid.coordinates.max() <= grid.num_cells <= MOST_CELLS
    assert np.isfinite(grid.cell_size).all()
    losses = objectives[:, 0]
    assert (grid.coordinates[losses == losses.min(), 0] == 1).all()
    assert (grid.coordinates[losses == losses.max(), 0] == (grid.num_cells if np.ptp(losses) else 1)).all()


# -- importance and weights -------------------------------------------------------------------------------------------


@bad
def test_an_importance_that_is_not_finite_is_refused_by_name(value: float) -> None:
    with pytest.raises(ValueError, match="importance of 'b' must be"):
        unit_sum({"a": wide(1.0), "b": wide(1.0, value)})


@given(st.lists(st.floats(0, allow_infinity=False), min_size=1, max_size=5))
def test_unit_sum_against_exact_fractions(values: list[float]) -> None:
    scaled = unit_sum({"a": wide(*values[:1]), "b": wide(*values[1:])})
    total = sum(map(Fraction, values))
    expected = [float(Fraction(v) / total) if total else 0.0 for v in values]
    assert [*scaled["a"].tolist(), *scaled["b"].tolist()] == pytest.approx(expected, rel=1e-12, abs=1e-300)


@bad
def test_a_peer_without_weight_cannot_spoil_an_average(value: float) -> None:
    """0 times infinity is NaN, so the value must not be there at all."""
    with pytest.raises(ValueError, match=r"^sets\.1: 'w' must be finite$"):
        aggregate(torch.eye(2), [{"w": torch.ones(2)}, {"w": torch.tensor([1.0, value])}])
    with pytest.raises(ValueError, match="each row of weights must sum to 1"):
        aggregate(torch.tensor([[1.0 - value, value]]), [{"w": torch.ones(2)}] * 2)


def test_no_device_has_no_average() -> None:
    with pytest.raises(ValueError, match="num_devices must be >= 1, got 0"):
        average_weights(0)


@bad
def test_class_prior_refuses_what_is_not_finite_by_name(value: float) -> None:
    good = wide(1.0, 2.0)
    for call, name in (
        (lambda: class_prior(wide(1.0, value), good, 1.0), "counts"),
        (lambda: class_prior(good, wide(1.0, value), 1.0), "class_shares"),
        (lambda: class_prior(good, good, value), "strength"),
        (lambda: class_prior(good, good, 1.0, floor=value), "floor"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} must be finite"):
            call()


def test_class_prior_that_cannot_be_said_in_its_numbers_is_refused() -> None:
    """A class that was not seen would be out of reach for good: log of 1e-60 in 32 bits."""
    with pytest.raises(ValueError, match="too far apart for a finite prior"):
        class_prior(torch.tensor([5.0, 0.0]), torch.tensor([1.0, 1.0]), 1e-60)


@settings(max_examples=300)
@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=4), positive, positive)
def test_class_prior_is_finite_or_an_error(values: list[tuple[float, float]], strength: float, floor: float) -> None:
    counts, shares = wide(*(c for c, _ in values)), wide(*(q for _, q in values))
    try:
        prior = class_prior(counts, shares, strength, floor)
    except ValueError:
        return
    assert bool(prior.isfinite().all())


# -- similarity -------------------------------------------------------------------------------------------------------


@bad
def test_samples_and_distances_that_are_not_finite_are_refused(value: float) -> None:
    a, b = torch.tensor([[0.0, value], [1.0, 2.0]]), torch.ones(2, 2)
    for measure in (wasserstein, sliced_wasserstein, lambda a, b: js_divergence(a, b, 4)):
        for pair in ((a, b), (b, a)):
            with pytest.raises(ValueError, match="samples must be finite"):
                measure(*pair)
    matrix = torch.tensor([[0.0, value], [value, 0.0]])
    with pytest.raises(ValueError, match="distance must be finite"):
        similarity_weights(matrix)
    with pytest.raises(ValueError, match="distance_between must be finite"):
        calibrated_weights(matrix, torch.ones(2), 1.0)
    with pytest.raises(ValueError, match="distance_within must be finite"):
        calibrated_weights(torch.zeros(2, 2), torch.tensor([1.0, value]), 1.0)
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        calibrated_weights(torch.zeros(2, 2), torch.ones(2), value)


def test_sketches_without_a_value_have_no_distance() -> None:
    with pytest.raises(ValueError, match="not empty"):
        sliced_wasserstein(torch.ones(0, 2), torch.ones(0, 2))


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_calibrated_weights_do_not_depend_on_the_unit(scale: float) -> None:
    between, within = wide(0.0, 2.0, 3.0, 2.0, 0.0, 1.0, 3.0, 1.0, 0.0).view(3, 3), wide(1.0, 2.0, 0.5)
    expected = calibrated_weights(between, within, 0.5)
    assert torch.allclose(calibrated_weights(between * scale, within * scale, 0.5), expected, rtol=1e-9)


@settings(max_examples=200)
@given(st.floats(0), st.lists(st.floats(0), min_size=2, max_size=2), st.floats(0))
def test_weights_sum_to_1_or_it_is_an_error(far: float, within: list[float], temperature: float) -> None:
    distance = wide(0.0, far, far, 0.0).view(2, 2)
    for weigh in (similarity_weights, lambda d: calibrated_weights(d, wide(*within), temperature)):
        try:
            weights = weigh(distance)
        except ValueError:
            continue
        assert torch.allclose(weights.sum(1), torch.ones(2, dtype=torch.float64))


# -- energy, scores and the rest --------------------------------------------------------------------------------------


@bad
def test_measurements_that_are_not_finite_are_refused(value: float) -> None:
    for measure in (r_squared, worst_relative_error):
        for pair in (([1.0, value], [1.0, 2.0]), ([1.0, 2.0], [1.0, value])):
            with pytest.raises(ValueError, match="measured and predicted must be finite"):
                measure(*pair)
    with pytest.raises(ValueError, match="idle_watts must be finite and >= 0"):
        split_power(10.0, 4, value)
    with pytest.raises(ValueError, match="power_at_zero_watts must be finite and >= 0"):
        split_power(value, 4, None)
    with pytest.raises(ValueError, match="reward must be finite"):
        update_baseline(0.5, value, 0.9)
    with pytest.raises(ValueError, match="losses must be finite"):
        clearly_lowest({"coarse": value, "refined": 1.0}, 0.1)
    with pytest.raises(ValueError, match="noise must be finite"):
        clearly_lowest({"coarse": 1.0, "refined": 1.0}, value)


def test_nothing_measured_and_nothing_to_divide_by_are_refused() -> None:
    for measure in (r_squared, worst_relative_error):
        with pytest.raises(ValueError, match="one length, at least 1, got 0 and 0"):
            measure([], [])
    with pytest.raises(ValueError, match="measured must not be 0"):
        worst_relative_error([1.0, 0.0], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"energy_joules must be > 0, got \[0\.0\]"):
        energy_efficiency_ratio(np.array([0.5]), np.array([0.0]))
    with pytest.raises(ValueError, match=r"size must be > 0, got \[nan\]"):
        size_efficiency_ratio(np.array([0.5]), np.array([math.nan]))
    with pytest.raises(ValueError, match=r"at least 1, got \{\}"):
        clearly_lowest({}, 0.1)


def test_energies_and_scores_over_the_range_of_numbers_are_refused() -> None:
    possible = EnergyModel(power_watts=1.0, latency_seconds=1.0)
    huge = possible.model_copy(update={"power_watts": 1e200, "latency_seconds": 1e200})  # no job or message has them
    with pytest.raises(ValueError, match="energy must be finite, got inf J"):
        energy_joules(BackboneShape(width=1.0, depth=1), huge, 1, 1)
    with pytest.raises(ValueError, match="values must have a finite range"):
        trade_off_score(np.array([-1e308, 1e308]), np.ones(2), np.ones(2))


def test_a_vector_whose_length_is_over_the_range_of_numbers_is_clipped_in_its_direction() -> None:
    assert clipped(wide(3e200, -4e200), 1.0).tolist() == pytest.approx([0.6, -0.8])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0.0, 1, 1e-5), "noise_multiplier must be finite and > 0, got 0.0"),
        ((math.nan, 1, 1e-5), "noise_multiplier"),
        ((1.0, -1, 1e-5), "num_releases must be >= 0, got -1"),
        ((1.0, 1, 0.0), r"delta must be in 0\.\.1, borders excluded, got 0.0"),
        ((1.0, 1, math.nan), "delta"),
    ],
)
def test_no_promise_is_made_of_what_is_no_noise(arguments: tuple[float, int, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        epsilon_of(*arguments)
