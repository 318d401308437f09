"""Inventories as companies have them: read as they are meant, or refused with file, line and reason."""

from pathlib import Path
from typing import Any

import pytest

from fleetfit.cloud.clusters import fleet_of
from fleetfit.config.inventory import read_inventory
from fleetfit.config.job import load_job, make_job


def written(tmp_path: Path, content: str, encoding: str = "utf-8") -> Path:
    path = tmp_path / "devices.csv"
    path.write_bytes(content.encode(encoding))
    return path


@pytest.mark.parametrize(
    "content",
    [
        "name,storage_limit\na-1,300 KB\nb-2,1.5 MB\n",
        "\ufeffname,storage_limit\r\na-1,300 KB\r\nb-2,1.5 MB\r\n",
        "Storage (KB);Hostname\n300;a-1\n;\n\n1500;b-2\n;;\n",
        "Storage [MB];Device name\n0,3;a-1\n1,5;b-2\n",
        "Device\tDisk_kb\na-1\t300\nb-2\t1500",
        'name,storage\n"a-1","300,000"\n"b-2","1,500,000"\n',
        "name,storage\na-1,300000\nb-2,1500000\n",
    ],
)
def test_forms_that_spreadsheets_write(tmp_path: Path, content: str) -> None:
    found = read_inventory(written(tmp_path, content))
    assert [(d["name"], d["storage_limit"]) for d in found.devices] == [("a-1", 300_000), ("b-2", 1_500_000)]


def test_all_that_a_line_may_say(tmp_path: Path) -> None:
    content = (
        "Hostname;Storage;Board;Watts;Group;Data;Remark\n"
        "till-1;1 MB;raspberry-pi-4;;north;/srv/till;Müller\n"
        "till-2;2 MB;;7,5 W;north;;\n"
    )
    found = read_inventory(written(tmp_path, content, "cp1252"))
    first, second = found.devices
    assert (first["profile"].name, first["cluster"], first["data"]) == ("raspberry-pi-4", "north", "/srv/till")
    assert second == {"name": "till-2", "storage_limit": 2_000_000, "cluster": "north", "gpu_capacity": 7.5}
    told = "\n".join(found.notes)
    assert "2 devices, separated by semicolons" in told
    assert "name from 'Hostname'" in told
    assert "not used: Remark" in told
    assert "cp1252" in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("name,storage\na,1 MB\nA,2 MB\n", "line 3: the name 'A' is that of line 2 already"),
        ("name,storage\n../a,1 MB\n", "line 2: the name '../a' must be letters, digits"),
        ("name,storage\n,1 MB\n", "line 2: the name '' must be"),
        ("name,storage\na,64\n", "line 2: storage = '64' has no unit: write '64 MB', or name the column storage_mb"),
        ("name,storage\na,64 MB\nb,128000\n", "'storage' has a unit in some rows only, not in line 3"),
        ("name,storage\na,64 XB\n", "line 2: storage must be a size, as '300 KB'"),
        ("name,storage\na,\n", "line 2: storage is missing"),
        ("name,storage\na,0 MB\n", "line 2: storage must be > 0"),
        ("name,storage,profile\na,1 MB,rasberry-pi-4\n", "line 2: the profile must be a ready profile"),
        ("name,storage,watts\na,1 MB,many\n", "line 2: watts must be watts, got 'many'"),
        ("name,storage,cluster\na,1 MB,x\nb,1 MB,\n", "line 3 has no 'cluster': give it for all devices, or for none"),
        ("name,storage\na,1 MB,more,and more\n", "line 2 has 4 values, the first line has 2"),
        ("name,size\na,1 MB\n", "no column is known as the storage_limit (as storage, storagelimit, freestorage)"),
        ("name,disk,flash\na,1 MB,2 MB\n", "'disk', 'flash' may all be the storage_limit"),
        ("name,storage\n", "it has no devices"),
        ("\n\n", "it is empty"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, content: str, told: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=r"devices\.csv") as error:
        read_inventory(path)
    assert told in str(error.value)


def test_all_lines_that_are_wrong_are_told_but_not_a_thousand(tmp_path: Path) -> None:
    path = written(tmp_path, "name,storage\n" + "".join(f"bad {i},1 MB\n" for i in range(1000)))
    with pytest.raises(ValueError, match=r"line 2: .*; line 3: .*and 990 more"):
        read_inventory(path)


def test_columns_may_be_said(tmp_path: Path) -> None:
    path = written(tmp_path, "name,asset,disk,flash\nx,a,1 MB,2 MB\n")
    found = read_inventory(path, {"name": "Asset", "storage_limit": "flash"})
    assert found.devices == ({"name": "a", "storage_limit": 2_000_000},)
    with pytest.raises(ValueError, match=r"it has no column 'rom' \(fleet.columns.storage_limit\), only name, asset"):
        read_inventory(path, {"storage_limit": "rom"})
    with pytest.raises(ValueError, match=r"fleet\.columns\.size must be one of name, storage_limit"):
        read_inventory(path, {"size": "disk"})


def test_a_job_has_the_devices_of_its_inventory_and_needs_it_no_more(tmp_path: Path) -> None:
    path = written(tmp_path, "name,storage,cluster\ntill,300 KB,shop\ngate,2 MB,door\nlamp,1 MB,shop\n")
    (tmp_path / "job.toml").write_text('[fleet]\ninventory = "devices.csv"\n')
    job = load_job(tmp_path / "job.toml")
    names = {c: [(a.device_id, a.storage_limit_bytes) for a in m] for c, m in fleet_of(job).items()}
    assert names == {"shop": [("till", 300_000), ("lamp", 1_000_000)], "door": [("gate", 2_000_000)]}
    path.unlink()
    (tmp_path / "again.toml").write_text(job.to_toml())
    assert load_job(tmp_path / "again.toml") == job
    assert "3 devices, separated by commas" in job.fleet.read_from[0]


@pytest.mark.parametrize(
    ("fleet", "told"),
    [
        ({"inventory": "/no/such.csv"}, "fleet: inventory is a file that cannot be read: No such file"),
        ({"inventory": "x.csv", "devices": [{"storage_limit": 5}]}, "devices must be left out with inventory"),
        ({"columns": {"name": "x"}}, "columns must be left out without inventory"),
    ],
)
def test_what_does_not_go_together(fleet: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match="fleet") as error:
        make_job({"fleet": fleet})
    assert told in str(error.value)


def test_ten_thousand_lines(tmp_path: Path) -> None:
    lines = "".join(f"d{i},{100 + i % 900} KB,raspberry-pi-4\n" for i in range(10_000))
    job = make_job({"fleet": {"inventory": str(written(tmp_path, "name,storage,profile\n" + lines))}})
    clusters = fleet_of(job)
    assert sum(map(len, clusters.values())) == 10_000
    assert len(clusters) <= 8


def test_groups_have_names_too() -> None:
    devices = [
        {"name": "till", "count": 2, "storage_limit": 5, "cluster": "a"},
        {"name": "x", "storage_limit": 5, "cluster": "a"},
    ]
    fleet = fleet_of(make_job({"fleet": {"devices": devices}}))
    assert [a.device_id for a in fleet["a"]] == ["till-1", "till-2", "x"]
    with pytest.raises(ValueError, match="'x' is there twice"):
        make_job({"fleet": {"devices": [devices[1], devices[1]]}})
    clash = [{"name": "a-2", "storage_limit": 5, "cluster": "a"}, {"storage_limit": 5, "cluster": "a"}]
    with pytest.raises(ValueError, match=r"fleet\.devices\.name must not be 'a-2', which another device gets"):
        fleet_of(make_job({"fleet": {"devices": clash}}))
