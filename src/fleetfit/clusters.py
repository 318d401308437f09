"""The devices of a job, as far as it tells them, and the clusters that they form."""

from collections.abc import Mapping, Sequence

import numpy as np

from fleetfit.config import DeviceGroup, EnergyConfig, Job
from fleetfit.randomness import derive_seed
from fleetfit.records import DeviceAttributes, EnergyModel

Fleet = Mapping[str, tuple[DeviceAttributes, ...]]  # of every cluster


def fleet_of(job: Job) -> dict[str, tuple[DeviceAttributes, ...]]:
    """The devices of every cluster, named <cluster>-<number>; clusters by k-means where the job names none.

    ``num_samples`` is filled in when the data is there.
    """
    devices: list[tuple[str | None, DeviceAttributes]] = []
    for group in job.fleet.devices:
        energies = _energies(group, job.fleet.energy)
        for i in range(group.count):
            energy = energies[i % len(energies)]
            limit = group.storage_limit[i % len(group.storage_limit)]
            name = f"device{len(devices) + 1}"
            attributes = DeviceAttributes(device_id=name, storage_limit_bytes=limit, energy=energy, num_samples=0)
            devices.append((group.cluster, attributes))
    clusters: dict[str, tuple[DeviceAttributes, ...]]
    if devices[0][0] is None:
        number = job.fleet.num_clusters or min(3, len(devices))
        clusters = form_clusters([a for _, a in devices], number, job.seed)
    else:
        names = dict.fromkeys(str(cluster) for cluster, _ in devices)
        clusters = {name: tuple(a for cluster, a in devices if cluster == name) for name in names}
    return {
        cluster: tuple(a.model_copy(update={"device_id": f"{cluster}-{i}"}) for i, a in enumerate(members, start=1))
        for cluster, members in clusters.items()
    }


def _energies(group: DeviceGroup, constants: EnergyConfig) -> tuple[EnergyModel, ...]:
    """Constants of a group's devices, to be dealt out in turn."""
    if group.profile is not None:
        return (group.profile.energy,)
    return tuple(
        EnergyModel(
            power_watts=watts,
            power_slope_watts=watts * constants.power_slope_share,
            patch_power_watts=watts * constants.patch_power_share,
            latency_seconds=constants.latency_seconds,
            latency_slope_seconds=constants.latency_seconds * constants.latency_slope_share,
        )
        for watts in group.gpu_capacity or ()
    )


def form_clusters(
    devices: Sequence[DeviceAttributes], num_clusters: int, seed: int
) -> dict[str, tuple[DeviceAttributes, ...]]:
    """Group devices by k-means on their attributes (G, C), each scaled to 0..1; clusters are numbered by storage.

    Fewer clusters come out where fewer devices differ.
    """
    from sklearn.cluster import KMeans

    points = np.array([[d.energy.power_watts, d.storage_limit_bytes] for d in devices], dtype=np.float64)
    span = np.ptp(points, axis=0)
    points = (points - points.min(axis=0)) / np.where(span > 0, span, 1.0)
    num_clusters = min(num_clusters, len(np.unique(points, axis=0)))
    state = derive_seed(seed, "k-means") % 2**31
    label = KMeans(num_clusters, n_init=10, random_state=state).fit_predict(points)
    groups = [tuple(d for d, g in zip(devices, label, strict=True) if g == k) for k in range(num_clusters)]
    groups.sort(key=lambda group: min(d.storage_limit_bytes for d in group))
    return {f"cluster{i + 1}": group for i, group in enumerate(groups)}
