"""FLEET.toml: what it may say, what it says by default, and what is told of a mistake."""

from pathlib import Path
from typing import Any

import pytest

from fleetfit.cloud.clusters import fleet_of
from fleetfit.config.job import load_job
from fleetfit.engines.deployment.fleet_file import devices_of, load_fleet_file, ports_of

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.fixture
def load(tmp_path: Path, tiny: dict[str, Any], write: Any) -> Any:
    def load(fields: dict[str, Any]) -> Any:
        return load_fleet_file(write(tmp_path, tiny, {"job": "job.toml"} | fields))

    return load


def test_every_fleet_among_the_recipes_is_valid_and_its_job_has_its_devices() -> None:
    files = sorted(RECIPES.glob("fleet-*.toml"))
    assert files
    for path in files:
        fleet, job = load_fleet_file(path)
        _, devices = devices_of(fleet, job)
        assert set(devices) == {edge.name for edge in fleet.edges}
        assert all(devices.values())
        assert job == load_job(path.parent / fleet.job)


def test_devices_are_the_jobs_unless_said(load: Any) -> None:
    fleet, job = load({"edges": [{"name": "small"}, {"name": "large"}]})
    here, devices = devices_of(fleet, job)
    assert devices == fleet_of(job)
    assert fleet_of(here) == fleet_of(job)


def test_devices_may_be_named_and_described(load: Any) -> None:
    entries = [
        {"name": "kitchen", "storage_limit": "300 KB", "gpu_capacity": 7},
        {"storage_limit": "1 MB", "profile": "raspberry-pi-4"},
        {"name": "small-1"},
    ]
    fleet, job = load({"edges": [{"name": "small", "devices": entries}]})
    _, devices = devices_of(fleet, job)
    kitchen, pi, known = devices["small"]
    assert (kitchen.device_id, kitchen.storage_limit_bytes, kitchen.energy.power_watts) == ("kitchen", 300_000, 7.0)
    assert (pi.device_id, pi.storage_limit_bytes) == ("small-2", 1_000_000)
    assert pi.energy.latency_slope_seconds > 0
    assert known == fleet_of(job)["small"][0]


def test_ports_are_free_ones_at_the_same_address(load: Any) -> None:
    fleet, _ = load(
        {
            "cloud": {"address": "localhost"},
            "edges": [
                {"name": "small", "address": "127.0.0.1", "port": 9400},
                {"name": "large", "address": "10.0.0.2"},
                {"name": "other", "address": "127.0.0.1"},
            ],
        }
    )
    assert ports_of(fleet) == [9401, 9400, 9400, 9402]


def test_two_with_one_port_are_refused(load: Any) -> None:
    fleet, _ = load(
        {"cloud": {"address": "Example.org", "port": 1}, "edges": [{"name": "a", "address": "example.org", "port": 1}]}
    )
    with pytest.raises(ValueError, match=r"edges\.0\.port must not be 1, which cloud has at the same address"):
        ports_of(fleet)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"edges": [{"name": "a"}], "clouds": {}}, "clouds is an unknown key; did you mean 'cloud'?"),
        ({"edges": [{"name": "a", "adress": "x"}]}, "edges.0.adress is an unknown key; did you mean 'address'?"),
        ({"edges": []}, "edges must have at least 1 item"),
        ({}, "edges must be given"),
        ({"edges": [{"name": "a/b"}]}, "edges.0.name must be letters, digits, '-', '_' and '.'"),
        ({"edges": [{"name": "a"}, {"name": "A"}]}, "edges.1.name must not be 'A', which edges.0.name is called"),
        ({"edges": [{"name": "Cloud"}]}, "edges.0.name must not be 'Cloud', which is the folder of another kit"),
        (
            {"edges": [{"name": "a", "devices": [{"name": "b", "storage_limit": 9}]}, {"name": "b"}]},
            "edges.1.name must not be 'b', which edges.0.devices.0.name is called",
        ),
        ({"edges": [{"name": "a", "address": "http://x:1"}]}, "must be a host name or an IP address, without a port"),
        ({"edges": [{"name": "a", "address": "10.0.0.300"}]}, "must be a host name or an IP address, without a port"),
        ({"edges": [{"name": "a", "port": 70000}]}, "edges.0.port must be <= 65535, got 70000"),
        ({"edges": [{"name": "a", "port": "9400"}]}, "edges.0.port must be an integer, got '9400'"),
        (
            {"edges": [{"name": "a", "devices": [{"gpu_capacity": 3}]}]},
            "storage_limit must be given with gpu_capacity",
        ),
        (
            {"edges": [{"name": "a", "devices": [{"storage_limit": 5, "gpu_capacity": 3, "profile": "jetson-nano"}]}]},
            "gpu_capacity must be left out with profile",
        ),
        ({"edges": [{"name": "a", "devices": [{"profile": "nothing"}]}]}, "must be a ready profile or a .toml file"),
        ({"edges": [{"name": "a"}], "certificates": {"days": 0}}, "certificates.days must be >= 1, got 0"),
    ],
)
def test_a_mistake_is_told_with_its_key(load: Any, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=r"FLEET\.toml") as error:
        load(fields)
    assert told in str(error.value)


def test_an_edge_that_the_job_does_not_know_needs_devices(load: Any) -> None:
    fleet, job = load({"edges": [{"name": "medium"}]})
    with pytest.raises(ValueError, match=r"edges\.0\.devices must be given: .* 'medium', only small, large"):
        devices_of(fleet, job)
    fleet, job = load({"edges": [{"name": "small", "devices": [{"name": "kitchen"}]}]})
    with pytest.raises(ValueError, match=r"edges\.0\.devices\.0\.storage_limit must be given: .* 'kitchen'"):
        devices_of(fleet, job)


# -- an inventory -----------------------------------------------------------------------------------------------------

INVENTORY = (
    "Hostname;Storage (KB);RAM (MB);Latency (ms);Profile;Edge;Data\n"
    "till-1;300;64;50;raspberry-pi-4;small;/srv/till\n"
    "till-2;500;;;;small;/srv/till\n"
    "gate;2000;;;;large;/srv/gate\n"
)


def test_an_inventory_names_the_devices_of_all_edges(load: Any, tmp_path: Path) -> None:
    (tmp_path / "devices.csv").write_text(INVENTORY)
    fleet, job = load({"inventory": "devices.csv", "edges": [{"name": "small"}, {"name": "large"}]})
    here, devices = devices_of(fleet, job)
    limits = {c: [(a.device_id, a.storage_limit_bytes) for a in m] for c, m in devices.items()}
    assert limits == {"small": [("till-1", 300_000), ("till-2", 500_000)], "large": [("gate", 2_000_000)]}
    assert [d.data for edge in fleet.edges for d in edge.devices] == ["/srv/till", "/srv/till", "/srv/gate"]
    first = devices["small"][0]
    assert first.memory_limit_bytes == 64_000_000
    assert first.latency is not None
    assert first.latency.seconds == pytest.approx(0.05)
    assert fleet_of(here) == devices  # so the job of the kits says the same, names included


@pytest.mark.parametrize(
    ("edges", "told"),
    [
        ([{"name": "small"}], "the cluster of 'gate' must be the name of an edge of"),
        (
            [{"name": "small", "devices": [{"storage_limit": 5}]}, {"name": "large"}],
            "edges.devices must be left out of 'small'",
        ),
    ],
)
def test_an_inventory_that_does_not_go_with_the_edges(
    load: Any, tmp_path: Path, edges: list[dict[str, Any]], told: str
) -> None:
    (tmp_path / "devices.csv").write_text(INVENTORY)
    with pytest.raises(ValueError, match="devices") as error:
        load({"inventory": "devices.csv", "edges": edges})
    assert told in str(error.value)
