"""Energy of training one sub-network on one device, and the most any device of a cluster needs: Eqs. 1-2."""

from collections.abc import Sequence

from fleetfit.records import BackboneShape, EnergyModel


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
        ValueError: ``num_patches`` or ``num_epochs`` is below 1.
    """
    if num_patches < 1:
        raise ValueError(f"num_patches must be >= 1, got {num_patches}")
    if num_epochs < 1:
        raise ValueError(f"num_epochs must be >= 1, got {num_epochs}")
    volume = shape.width * shape.depth
    power_watts = energy.power_watts + energy.power_slope_watts * volume + num_patches * energy.patch_power_watts
    latency_seconds = energy.latency_seconds + energy.latency_slope_seconds * volume
    return num_epochs * power_watts * latency_seconds


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
