"""Energy of training one sub-network on one device, and the most any device of a cluster needs: Eqs. 1-2.

And the other way round: the constants of a real device, fitted to what was measured on it.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import nnls

from fleetfit.core.records import BackboneShape, EnergyModel, Record


def energy_joules(shape: BackboneShape, energy: EnergyModel, num_patches: int, num_epochs: int) -> float:
    """Energy a device spends on ``num_epochs`` epochs of the sub-network (w, d), Eqs. 1-2.

    E = k * P * T, with P = (G + dG*w*d) + p*G_beta in watts and T = L + dL*w*d in seconds per epoch.

    Args:
        shape: (w, d), d in layers.
        energy: G, dG, G_beta, L and dL of the device.
        num_patches: p, tokens of one sample.
        num_epochs: k.

    Returns:
        Joules.

    Raises:
        ValueError: ``num_patches`` or ``num_epochs`` is below 1, or the energy is not finite.
    """
    if num_patches < 1:
        raise ValueError(f"num_patches must be >= 1, got {num_patches}")
    if num_epochs < 1:
        raise ValueError(f"num_epochs must be >= 1, got {num_epochs}")
    volume = shape.width * shape.depth
    power_watts = energy.power_watts + energy.power_slope_watts * volume + num_patches * energy.patch_power_watts
    latency_seconds = energy.latency_seconds + energy.latency_slope_seconds * volume
    joules = num_epochs * power_watts * latency_seconds
    if not math.isfinite(joules):
        raise ValueError(f"energy must be finite, got {joules} J from {energy}")
    return joules


def cluster_energy_joules(
    shape: BackboneShape, devices: Sequence[EnergyModel], num_patches: int, num_epochs: int
) -> float:
    """Objective f2 of a candidate for a cluster: the largest energy over the cluster's devices, in joules.

    Raises:
        ValueError: there is no device, or see ``energy_joules``.
    """
    if not devices:
        raise ValueError("devices must have at least 1 entry, got 0")
    return max(energy_joules(shape, energy, num_patches, num_epochs) for energy in devices)


class LineFit(Record):
    """A line in w*d fitted to measurements, ``intercept + slope*w*d``, and how well it says them.

    Attributes:
        intercept: What is left at (w, d) -> 0; never negative.
        slope: More per unit of width x depth; never negative.
        r_squared: Share of the measurements' variance that the line explains; see ``r_squared``.
        worst_error: The largest relative error, as a share; see ``worst_relative_error``.
    """

    intercept: float
    slope: float
    r_squared: float
    worst_error: float

    def at(self, shape: BackboneShape) -> float:
        """What the line says for a shape."""
        return self.intercept + self.slope * shape.width * shape.depth


def fit_line(shapes: Sequence[BackboneShape], measured: Sequence[float]) -> LineFit:
    """Fit a line in w*d by least squares, its two constants not negative.

    Beyond: the paper takes its constants as given. Fitted to latencies this is T of Eq. 2, with L the intercept and dL
    the slope. Fitted to watts, all measured with the same number of patches p, it is P: the slope is dG, but the
    intercept is G + p*G_beta in one number. ``split_power`` says what can be known of the two.

    Args:
        shapes: (w, d) of each measurement; repeats are allowed.
        measured: Seconds or watts.

    Raises:
        ValueError: lengths differ, fewer than two different w*d, or a measurement that is not a number above 0.
    """
    values = np.asarray(measured, dtype=np.float64)
    volumes = np.array([s.width * s.depth for s in shapes], dtype=np.float64)
    if len(volumes) != len(values):
        raise ValueError(f"shapes and measured must be of one length, got {len(volumes)} and {len(values)}")
    if len(np.unique(volumes)) < 2:
        raise ValueError("shapes must have at least 2 different width x depth: one point makes no line")
    if not (np.isfinite(values) & (values > 0)).all():
        bad = values[~(np.isfinite(values) & (values > 0))][0]
        raise ValueError(f"measured must be finite and > 0, got {bad:g}")
    intercept, slope = (float(c) for c in nnls(np.stack([np.ones_like(volumes), volumes], axis=1), values)[0])
    predicted = intercept + slope * volumes
    return LineFit(
        intercept=intercept,
        slope=slope,
        r_squared=r_squared(measured, predicted.tolist()),
        worst_error=worst_relative_error(measured, predicted.tolist()),
    )


def split_power(power_at_zero_watts: float, num_patches: int, idle_watts: float | None) -> tuple[float, float]:
    """G and G_beta from the power at w*d -> 0, which is their sum G + p*G_beta.

    Measurements with one p cannot tell the two apart. Power at rest can: a device at rest works on no layer and on no
    patch, so what it draws then is G, and what is left of the sum belongs to the p patches.

    Args:
        power_at_zero_watts: G + p*G_beta, the intercept of the fit.
        num_patches: p at which power was measured.
        idle_watts: Power at rest; None where it is not known: all of the sum is then G, and G_beta is 0. Such
            constants say the truth for this p only.

    Returns:
        (G, G_beta), with G + p*G_beta the given sum.

    Raises:
        ValueError: ``num_patches`` is below 1, or a power that is negative, NaN or infinite.
    """
    if num_patches < 1:
        raise ValueError(f"num_patches must be >= 1, got {num_patches}")
    for name, watts in (("power_at_zero_watts", power_at_zero_watts), ("idle_watts", idle_watts)):
        if watts is not None and not 0 <= watts < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {watts}")
    if idle_watts is None or idle_watts >= power_at_zero_watts:
        return power_at_zero_watts, 0.0
    return idle_watts, (power_at_zero_watts - idle_watts) / num_patches


def r_squared(measured: Sequence[float], predicted: Sequence[float]) -> float:
    """Share of the variance of what was measured that a prediction explains; below 0 where their mean is better.

    Measurements that are all alike have no variance to explain: 1 where the prediction meets them, else 0.

    Raises:
        ValueError: see ``_pairs``.
    """
    values, said = _pairs(measured, predicted)
    left = float(((values - said) ** 2).sum())
    total = float(((values - values.mean()) ** 2).sum())
    if total <= 1e-18 * float((values**2).sum()):  # alike up to rounding
        return 1.0 if left <= 1e-18 * float((values**2).sum()) else 0.0
    return 1.0 - left / total


def worst_relative_error(measured: Sequence[float], predicted: Sequence[float]) -> float:
    """The largest ``|predicted - measured| / measured``.

    Raises:
        ValueError: see ``_pairs``, or a measurement that is 0.
    """
    values, said = _pairs(measured, predicted)
    if not values.all():
        raise ValueError("measured must not be 0: an error has no share of it")
    return float((np.abs(said - values) / np.abs(values)).max())


def _pairs(
    measured: Sequence[float], predicted: Sequence[float]
) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"]]:
    """Both as arrays.

    Raises:
        ValueError: no measurement, lengths that differ, or a number that is not finite.
    """
    values, said = np.asarray(measured, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if len(values) != len(said) or len(values) == 0:
        raise ValueError(f"measured and predicted must be of one length, at least 1, got {len(values)} and {len(said)}")
    if not (np.isfinite(values) & np.isfinite(said)).all():
        raise ValueError(f"measured and predicted must be finite, got {values.tolist()} and {said.tolist()}")
    return values, said
