"""Clusters by storage: nobody shares a limit of less than half of its own room, and as little as can be is unused."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfit.cloud.clusters import MOST_CLUSTERS, clusters_by_storage, fleet_notes, fleet_of, unused_room
from fleetfit.config.job import make_job
from fleetfit.core.records import DeviceAttributes, EnergyModel

POWER = EnergyModel(power_watts=1.0, latency_seconds=1.0)


def devices_of(limits: list[int]) -> list[DeviceAttributes]:
    return [
        DeviceAttributes(device_id=f"d{i}", storage_limit_bytes=limit, energy=POWER, num_samples=0)
        for i, limit in enumerate(limits)
    ]


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40))
def test_each_device_can_use_half_of_its_room_if_eight_clusters_are_enough(limits: list[int]) -> None:
    devices = devices_of(limits)
    clusters = clusters_by_storage(devices)
    assert sorted(d.device_id for m in clusters.values() for d in m) == sorted(d.device_id for d in devices)
    needed, start = 0, 0
    for limit in sorted(limits):
        if not start or limit > 2 * start:
            needed, start = needed + 1, limit
    assert len(clusters) == min(needed, MOST_CLUSTERS)
    if needed <= MOST_CLUSTERS:
        assert not unused_room(clusters)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 4))
def test_of_all_ways_to_cut_into_so_many_it_leaves_the_least_unused(limits: list[int], number: int) -> None:
    def unused(groups: list[list[int]]) -> float:
        return sum(math.log2(limit / min(group)) for group in groups for limit in group)

    different = sorted(set(limits))
    number = min(number, len(different))
    ways = []
    for cuts in itertools.combinations(range(1, len(different)), number - 1):
        edges = (0, *cuts, len(different))
        parts = [set(different[a:b]) for a, b in itertools.pairwise(edges)]
        ways.append(unused([[limit for limit in limits if limit in part] for part in parts]))
    found = clusters_by_storage(devices_of(limits), number)
    assert unused([[d.storage_limit_bytes for d in m] for m in found.values()]) == pytest.approx(min(ways), abs=1e-9)
    assert list(found) == [f"cluster{i + 1}" for i in range(number)]


def test_fifty_unlike_devices() -> None:
    limits = [round(130_000 * (2_000_000 / 130_000) ** (i / 49)) for i in range(50)]
    fleet = fleet_of(make_job({"fleet": {"devices": [{"count": 50, "storage_limit": limits}]}}))
    assert not unused_room(fleet)
    assert len(fleet) == 4
    plain = fleet_of(make_job({"fleet": {"devices": [{"count": 50, "storage_limit": limits}], "clustering": "kmeans"}}))
    assert unused_room(plain)  # what it is better than


def test_who_leaves_storage_unused_is_told_and_what_would_help() -> None:
    devices = [{"cluster": "a", "storage_limit": "100 KB"}, {"cluster": "a", "storage_limit": "1 MB"}]
    job = make_job({"fleet": {"devices": devices}})
    (note,) = fleet_notes(job, fleet_of(job))
    assert "a-2 (100,000 of 1,000,000 bytes)" in note
    assert "fleet.devices.cluster" in note
    made = [{"storage_limit": "100 KB"}, {"storage_limit": "1 MB"}]
    job = make_job({"fleet": {"devices": made, "num_clusters": 1}})
    (note,) = fleet_notes(job, fleet_of(job))
    assert "fleet.num_clusters = 2, would mend it for 1" in note
    job = make_job({"fleet": {"devices": made}})
    assert not fleet_notes(job, fleet_of(job))


def test_the_papers_way_is_one_option_away() -> None:
    assert make_job({"method": "paper"}).fleet.clustering == "kmeans"
    assert make_job({}).fleet.clustering == "storage"
