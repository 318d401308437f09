"""Eqs. 1-2, and their constants from measurements."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfit.core.records import BackboneShape, EnergyModel
from fleetfit.method.energy import (
    cluster_energy_joules,
    energy_joules,
    fit_line,
    r_squared,
    split_power,
    worst_relative_error,
)

PAPER = EnergyModel(
    power_watts=100,
    power_slope_watts=10,
    patch_power_watts=50,
    latency_seconds=1,
    latency_slope_seconds=0.1,
)
shapes = st.builds(BackboneShape, width=st.floats(0.01, 1), depth=st.integers(1, 48))


def test_by_hand_with_the_papers_constants():
    # w*d = 6: P = 100 + 10*6 + 128*50 = 6560 W, T = 1 + 0.1*6 = 1.6 s, k = 10.
    assert energy_joules(BackboneShape(width=0.5, depth=12), PAPER, 128, 10) == pytest.approx(10 * 6560 * 1.6)


def test_every_constant_counts_on_its_own():
    odd = EnergyModel(
        power_watts=2, power_slope_watts=3, patch_power_watts=5, latency_seconds=7, latency_slope_seconds=11
    )
    # w*d = 2: P = 2 + 3*2 + 4*5 = 28, T = 7 + 11*2 = 29, k = 13.
    assert energy_joules(BackboneShape(width=1.0, depth=2), odd, 4, 13) == pytest.approx(13 * 28 * 29)


@given(shapes, st.integers(1, 500), st.integers(1, 50), st.floats(1.001, 100))
def test_linear_in_epochs_and_in_gpu_capacity(shape, num_patches, num_epochs, factor):
    once = energy_joules(shape, PAPER, num_patches, 1)
    assert energy_joules(shape, PAPER, num_patches, num_epochs) == pytest.approx(num_epochs * once)
    powers = ("power_watts", "power_slope_watts", "patch_power_watts")
    bigger = PAPER.model_copy(update={name: factor * getattr(PAPER, name) for name in powers})
    assert energy_joules(shape, bigger, num_patches, 1) == pytest.approx(factor * once)


@given(shapes, shapes)
def test_depends_on_width_times_depth_only_and_grows_with_it(a, b):
    energies = [energy_joules(s, PAPER, 16, 1) for s in (a, b)]
    volumes = [s.width * s.depth for s in (a, b)]
    assert volumes[0] == volumes[1] or (energies[0] < energies[1]) == (volumes[0] < volumes[1])


def test_cluster_is_its_hungriest_device_not_the_sum_or_the_first():
    shape = BackboneShape(width=0.5, depth=2)
    devices = [PAPER.model_copy(update={"power_watts": watts}) for watts in (100.0, 900.0, 300.0)]
    assert cluster_energy_joules(shape, devices, 8, 3) == energy_joules(shape, devices[1], 8, 3)


def test_bad_arguments_name_rule_and_value():
    shape = BackboneShape(width=0.5, depth=2)
    with pytest.raises(ValueError, match="num_patches must be >= 1, got 0"):
        energy_joules(shape, PAPER, 0, 1)
    with pytest.raises(ValueError, match="num_epochs must be >= 1, got -1"):
        energy_joules(shape, PAPER, 1, -1)
    with pytest.raises(ValueError, match="devices must have at least 1"):
        cluster_energy_joules(shape, [], 1, 1)


# -- the constants of a real device -----------------------------------------------------------------------------------

GRID = [BackboneShape(width=w, depth=d) for w in (0.25, 0.5, 0.75, 1.0) for d in (1, 2, 4, 8)]


def volumes_of(shapes):
    return np.array([s.width * s.depth for s in shapes])


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_the_fit_finds_the_constants_that_made_the_measurements(latency, slope):
    fit = fit_line(GRID, (latency + slope * volumes_of(GRID)).tolist())
    assert (fit.intercept, fit.slope) == (pytest.approx(latency, rel=1e-6), pytest.approx(slope, rel=1e-6))
    assert fit.r_squared == pytest.approx(1.0)
    assert fit.worst_error < 1e-6
    assert fit.at(BackboneShape(width=0.5, depth=6)) == pytest.approx(latency + slope * 3)


@given(st.integers(0, 2**32 - 1))
def test_the_fit_is_numpys_least_squares_where_that_is_not_negative(seed):
    noise = np.random.default_rng(seed).normal(0, 0.3, len(GRID))
    measured = 2 + 1.5 * volumes_of(GRID) + noise
    slope, intercept = np.polyfit(volumes_of(GRID), measured, 1)
    fit = fit_line(GRID, measured.tolist())
    assert (fit.intercept, fit.slope) == (pytest.approx(intercept), pytest.approx(slope))
    left = measured - (intercept + slope * volumes_of(GRID))
    assert fit.r_squared == pytest.approx(1 - (left**2).sum() / ((measured - measured.mean()) ** 2).sum())
    assert fit.r_squared == pytest.approx(np.corrcoef(volumes_of(GRID), measured)[0, 1] ** 2)
    assert fit.worst_error == pytest.approx(np.abs(left / measured).max())


@given(st.lists(st.floats(0.01, 100), min_size=len(GRID), max_size=len(GRID)))
def test_constants_are_never_negative_and_no_other_pair_is_nearer(measured):
    fit = fit_line(GRID, measured)
    assert fit.intercept >= 0
    assert fit.slope >= 0

    def left(intercept, slope):
        return ((intercept + slope * volumes_of(GRID) - np.array(measured)) ** 2).sum()

    best = left(fit.intercept, fit.slope)
    for step in (1e-3, -1e-3):
        assert best <= left(max(0, fit.intercept + step), fit.slope) + 1e-9
        assert best <= left(fit.intercept, max(0, fit.slope + step)) + 1e-9


def test_where_plain_least_squares_is_negative_the_constant_is_zero():
    shapes = [BackboneShape(width=1.0, depth=d) for d in (1, 2, 3)]
    fit = fit_line(shapes, [1.0, 4.0, 9.0])  # numpy: -3.33 + 4 w d
    assert (fit.intercept, fit.slope) == (0.0, pytest.approx((1 + 8 + 27) / (1 + 4 + 9)))
    falling = fit_line(shapes, [3.0, 2.0, 1.0])
    assert (falling.intercept, falling.slope) == (pytest.approx(2.0), 0.0)
    assert falling.r_squared == pytest.approx(0.0)


def test_quality_by_hand():
    # Mean 2, total 2; left 0.25 + 0 + 0.25.
    assert r_squared([1, 2, 3], [1.5, 2, 2.5]) == pytest.approx(0.75)
    assert r_squared([1, 2, 3], [3, 2, 1]) == pytest.approx(-3)
    assert (r_squared([5, 5], [5, 5]), r_squared([5, 5], [5, 6])) == (1.0, 0.0)
    assert worst_relative_error([10, 1, 4], [9, 1.5, 4]) == pytest.approx(0.5)


@given(st.floats(0.1, 500), st.floats(0, 50), st.floats(0, 5), st.integers(1, 500))
def test_power_at_rest_tells_the_share_of_the_patches(idle, slope, per_patch, num_patches):
    device = EnergyModel(
        power_watts=idle,
        power_slope_watts=slope,
        patch_power_watts=per_patch,
        latency_seconds=1,
        latency_slope_seconds=0,
    )
    watts = [energy_joules(s, device, num_patches, 1) for s in GRID]  # one second long
    fit = fit_line(GRID, watts)
    assert fit.slope == pytest.approx(slope, abs=1e-6 * max(watts))
    found_idle, found_per_patch = split_power(fit.intercept, num_patches, idle)
    assert found_idle + num_patches * found_per_patch == pytest.approx(fit.intercept)
    assert found_idle == pytest.approx(idle)
    assert found_per_patch == pytest.approx(per_patch, abs=1e-6 * max(watts))


def test_without_power_at_rest_all_of_it_is_the_devices():
    assert split_power(9.0, 16, None) == (9.0, 0.0)
    assert split_power(9.0, 16, 9.5) == (9.0, 0.0)  # noise: at rest it drew more
    assert split_power(9.0, 16, 1.0) == (1.0, 0.5)


def test_a_fit_refuses_what_makes_no_line():
    with pytest.raises(ValueError, match="at least 2 different width x depth"):
        fit_line([BackboneShape(width=0.5, depth=4), BackboneShape(width=1.0, depth=2)], [1.0, 2.0])
    with pytest.raises(ValueError, match="one length, got 16 and 1"):
        fit_line(GRID, [1.0])
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="measured must be finite and > 0, got"):
            fit_line(GRID, [1.0] * 15 + [bad])
    with pytest.raises(ValueError, match="num_patches must be >= 1, got 0"):
        split_power(1.0, 0, None)
