"""The devices of a job, as far as it tells them, and the clusters that they form."""

import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from fleetfit.config.fleet import DeviceGroup, EnergyConfig
from fleetfit.config.job import Job
from fleetfit.core.randomness import derive_seed
from fleetfit.core.records import DeviceAttributes, EnergyModel, LatencyLimit

Fleet = Mapping[str, tuple[DeviceAttributes, ...]]  # of every cluster
MOST_CLUSTERS = 8  # that are made without being told a number
LEAST_SHARE = 0.5  # of its own room that a device's limit should be


def fleet_of(job: Job) -> dict[str, tuple[DeviceAttributes, ...]]:
    """The devices of every cluster, by their own names or <cluster>-<number>; clusters are made where none is named.

    ``num_samples`` is filled in when the data is there.

    Raises:
        ValueError: a device has the name that another gets by its number.
    """
    devices: list[tuple[str | None, str | None, DeviceAttributes]] = []
    for group in job.fleet.devices:
        energies = _energies(group, job.fleet.energy)
        for i, own_name in enumerate(group.names):
            energy = energies[i % len(energies)]
            limit = group.storage_limit[i % len(group.storage_limit)]
            name = f"device{len(devices) + 1}"
            attributes = DeviceAttributes(
                device_id=name,
                storage_limit_bytes=limit,
                energy=energy,
                num_samples=0,
                memory_limit_bytes=group.memory_limit[i % len(group.memory_limit)] if group.memory_limit else None,
                latency=_latency(group, i),
            )
            devices.append((group.cluster, own_name, attributes))
    own_names = {attributes.device_id: own for _, own, attributes in devices}
    clusters: dict[str, tuple[DeviceAttributes, ...]]
    if devices[0][0] is None:
        everybody, number = [a for *_, a in devices], job.fleet.num_clusters
        if job.fleet.clustering == "kmeans":
            clusters = form_clusters(everybody, number or min(3, len(devices)), job.seed)
        else:
            clusters = clusters_by_storage(everybody, number)
    else:
        names = dict.fromkeys(str(cluster) for cluster, *_ in devices)
        clusters = {name: tuple(a for cluster, _, a in devices if cluster == name) for name in names}
    named = {
        cluster: tuple(
            a.model_copy(update={"device_id": own_names[a.device_id] or f"{cluster}-{i}"})
            for i, a in enumerate(members, start=1)
        )
        for cluster, members in clusters.items()
    }
    ids = [a.device_id for members in named.values() for a in members]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"fleet.devices.name must not be {twice!r}, which another device gets by its number")
    return named


def _latency(group: DeviceGroup, i: int) -> LatencyLimit | None:
    if not group.latency_limit or not group.profile:
        return None
    profile = group.profile[i % len(group.profile)]
    return LatencyLimit(
        seconds=group.latency_limit[i % len(group.latency_limit)], seconds_per_operation=profile.seconds_per_operation
    )


def _energies(group: DeviceGroup, constants: EnergyConfig) -> tuple[EnergyModel, ...]:
    """Constants of a group's devices, to be dealt out in turn."""
    if group.profile is not None:
        return tuple(profile.energy for profile in group.profile)
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


def clusters_by_storage(
    devices: Sequence[DeviceAttributes], num_clusters: int | None = None
) -> dict[str, tuple[DeviceAttributes, ...]]:
    """Group devices of like storage limits (Beyond): a cluster's limit is that of its smallest device.

    As few clusters as let every device use half of its own room (``LEAST_SHARE``), at most ``MOST_CLUSTERS``, or as
    many as are asked for. Of all ways to cut the devices, in the order of their limits, into so many, it is the one
    that leaves the least room unused, in doublings: sum over devices of log2(limit / limit of its cluster).

    Returns:
        Clusters by storage, numbered; devices keep their order. Fewer come out where fewer limits differ.
    """
    limits = sorted({d.storage_limit_bytes for d in devices})
    counts = [sum(d.storage_limit_bytes == limit for d in devices) for limit in limits]
    starts: list[int] = []
    if num_clusters is None:
        for limit in limits:
            if not starts or limit * LEAST_SHARE > starts[-1]:
                starts.append(limit)
    number = min(num_clusters or min(len(starts), MOST_CLUSTERS), len(limits))
    enough = num_clusters is None and number == len(starts)

    @cache
    def best(first: int, parts: int) -> tuple[float, tuple[int, ...]]:
        """Of the limits from the first on: what so many clusters leave unused, and where each begins."""
        unused: float = 0.0
        found: tuple[float, tuple[int, ...]] = (math.inf, ())
        for last in range(first, len(limits)):
            if enough and limits[last] * LEAST_SHARE > limits[first]:
                break
            unused += counts[last] * math.log2(limits[last] / limits[first])
            if last + 1 == len(limits):
                rest: tuple[float, tuple[int, ...]] = (0.0, ()) if parts == 1 else (math.inf, ())
            elif parts > 1:
                rest = best(last + 1, parts - 1)
            else:
                continue
            found = min(found, (unused + rest[0], (first, *rest[1])))
        return found

    begins = best(0, number)[1]
    place = {limit: sum(begin <= i for begin in begins) for i, limit in enumerate(limits)}
    return {
        f"cluster{k}": tuple(d for d in devices if place[d.storage_limit_bytes] == k) for k in range(1, len(begins) + 1)
    }


def unused_room(fleet: Fleet) -> dict[str, tuple[int, int]]:
    """Devices that can use less than half of their room, since their cluster's smallest device has no more.

    Returns:
        For each of them its own limit and its cluster's, in bytes.
    """
    found: dict[str, tuple[int, int]] = {}
    for members in fleet.values():
        least = min(a.storage_limit_bytes for a in members)
        found |= {
            a.device_id: (a.storage_limit_bytes, least) for a in members if least < LEAST_SHARE * a.storage_limit_bytes
        }
    return found


def fleet_notes(job: Job, fleet: Fleet) -> tuple[str, ...]:
    """How the inventory was read, and who leaves storage unused and what would change that, for a person."""
    notes = list(job.fleet.read_from)
    if unused := unused_room(fleet):
        some = ", ".join(f"{d} ({least:,} of {own:,} bytes)" for d, (own, least) in list(unused.items())[:5])
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        way = "name a cluster of their own for them (fleet.devices.cluster)"
        if job.fleet.devices[0].cluster is None:
            everybody = [a for members in fleet.values() for a in members]
            finer = clusters_by_storage(everybody, len(fleet) + 1)
            better = len(unused) - len(unused_room(finer))
            way = f"fleet.num_clusters = {len(finer)}" + ', with fleet.clustering = "storage"' * (
                job.fleet.clustering != "storage"
            )
            way += f", would mend it for {better}" if better else ", would help, and more clusters more"
        are = "1 device leaves" if len(unused) == 1 else f"{len(unused)} devices leave"
        notes.append(f"{are} more than half of the storage unused, as their cluster's smallest: {some}{more}; {way}")
    return tuple(notes)


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
