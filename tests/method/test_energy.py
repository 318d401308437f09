"""Eqs. 1-2."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfit.method.energy import cluster_energy_joules, energy_joules
from fleetfit.records import BackboneShape, EnergyModel

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
