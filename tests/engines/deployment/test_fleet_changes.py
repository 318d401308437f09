"""A fleet that changes: new kits only, signed updates for those above, and nothing else that counts as one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ports import reserved_port

from fleetfit.engines.deployment.certificates import make_authority
from fleetfit.engines.deployment.kit import hold, read_kit
from fleetfit.engines.deployment.kit_file import kit_toml
from fleetfit.engines.deployment.provision import Provisioned, provision
from fleetfit.engines.deployment.server import Hub
from fleetfit.engines.deployment.updates import read_record, remember_update, write_update

ALL = ("cloud", "small", "large", "small-1", "small-2", "large-1")


def content(kits: Path, names: tuple[str, ...] = ALL) -> dict[str, bytes]:
    return {
        p.relative_to(kits).as_posix(): p.read_bytes()
        for name in names
        for p in (kits / name).rglob("*")
        if p.is_file() and p.name != "update.json"
    }


@pytest.fixture
def again(kits: Path, tmp_path: Path, tiny: dict[str, Any], fleet: dict[str, Any], write: Any) -> Any:
    """Provisions the kits again, with other devices behind the edge ``small``."""

    def provisioned(*names: str, job: dict[str, Any] | None = None, **how: Any) -> Provisioned:
        fields = json.loads(json.dumps(tiny | (job or {})))
        fields["fleet"]["devices"][0] |= {"count": len(names)}
        fleet_fields = json.loads(json.dumps(fleet))
        able = {"storage_limit": "1 MB", "gpu_capacity": 40.0}
        fleet_fields["edges"][0]["devices"] = [
            {"name": n}
            | ({} if n in ("small-1", "small-2") else able)
            | ({} if n in ("small-1", "small-2") and n not in how.get("replace", ()) else {"data": "data"})
            for n in names
        ]
        return provision(write(tmp_path, fields, fleet_fields), kits, **how)

    return provisioned


def test_a_device_more_is_a_kit_more_and_an_update_for_its_edge(kits: Path, again: Any) -> None:
    before = content(kits)
    made = again("small-1", "small-2", "small-3")
    assert not made.is_new
    assert [kit.name for kit in made.kits] == ["small-3"]
    assert made.updates == (kits / "small" / "update.json",)
    assert made.gone == ()
    assert content(kits) == before
    edge, device = read_kit(kits / "small"), read_kit(kits / "small-3")
    assert [m.name for m in edge.file.members] == ["small-1", "small-2", "small-3"]
    assert edge.known_devices["small-3"].storage_limit_bytes == 10**6
    assert device.file.fleet == edge.file.fleet == made.fleet
    assert device.job_hash == edge.job_hash
    assert device.task == edge.task
    assert device.ca.read_bytes() == edge.ca.read_bytes()


def test_nothing_different_is_nothing_to_do(kits: Path, again: Any) -> None:
    before = content(kits)
    made = again("small-1", "small-2")
    assert (made.kits, made.updates, made.gone) == ((), (), ())
    assert content(kits) == before
    assert not (kits / "small" / "update.json").exists()


def test_a_device_that_is_taken_out_may_not_come_in_and_one_that_is_replaced_has_another_key(
    kits: Path, again: Any
) -> None:
    old = {m.name: m.public_key for m in read_kit(kits / "small").file.members}
    (kits / "small-1" / "model").mkdir()
    (kits / "small-1" / "model" / "mine").write_text("mine")
    made = again("small-1", replace=["small-1"])
    assert made.gone == ("small-2",)
    assert [kit.name for kit in made.kits] == ["small-1"]
    (now,) = read_kit(kits / "small").file.members
    assert now.name == "small-1"
    assert now.public_key != old["small-1"]
    assert (kits / "replaced" / "small-1.1" / "model" / "mine").read_text() == "mine"
    assert read_record(kits / "ca").number == 1  # type: ignore[union-attr]


def test_the_authority_may_be_kept_elsewhere(kits: Path, tmp_path: Path, again: Any) -> None:
    elsewhere = tmp_path / "safe"
    shutil.move(kits / "ca", elsewhere)
    with pytest.raises(ValueError, match=r"its authority is not in .*ca: --authority says where"):
        again("small-1", "small-2", "small-3")
    made = again("small-1", "small-2", "small-3", authority=elsewhere)
    assert [kit.name for kit in made.kits] == ["small-3"]
    assert not (kits / "ca").exists()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"job": {"seed": 4}}, "the job is not the one that the fleet's kits were made for"),
        ({"split_data": True}, "--split-data"),
        ({"replace": ["nobody"]}, "--replace nobody: the fleet has no device"),
        ({"replace": ["small"]}, "--replace small: its devices would go on trusting"),
    ],
)
def test_what_would_need_all_kits_again_is_refused(kits: Path, again: Any, how: dict[str, Any], said: str) -> None:
    before = content(kits)
    names = ("small-1", "small-2") + (("small-3",) if "split_data" in how else ())
    with pytest.raises(ValueError, match=said):
        again(*names, **how)
    assert content(kits) == before


def test_an_edge_that_moves_is_refused(
    kits: Path, tmp_path: Path, tiny: dict[str, Any], fleet: dict[str, Any], write: Any
) -> None:
    edges = [{"name": "small", "port": 9555}, {"name": "large"}]
    with pytest.raises(ValueError, match=r"small was at 127.0.0.1:\d+, as those below have it"):
        provision(write(tmp_path, tiny, fleet | {"edges": edges}), kits)


def test_a_kit_that_is_at_work_is_not_replaced_but_others_may_be_added(kits: Path, again: Any) -> None:
    with hold(kits / "small-1"):
        with pytest.raises(ValueError, match="small-1 is running; stop it"):
            again("small-1", "small-2", replace=["small-1"])
        assert [kit.name for kit in again("small-1", "small-2", "small-3").kits] == ["small-3"]


@pytest.mark.parametrize("what", ["garbage", "signature", "members", "fleet", "name", "authority"])
def test_what_is_no_update_of_this_kit_is_refused(kits: Path, again: Any, what: str) -> None:
    again("small-1", "small-2", "small-3")
    path = kits / "small" / "update.json"
    signed = json.loads(path.read_text())
    record = read_record(kits / "ca")
    assert record is not None
    stranger = make_authority("0" * 16, 5)
    said = "has not signed it"
    if what == "garbage":
        path.write_bytes(path.read_bytes()[:-40])
        said = "it is damaged"
    elif what == "signature":
        path.write_text(json.dumps(signed | {"signature": signed["signature"][:-8] + "AAAAAAA="}))
    elif what == "members":
        path.write_text(json.dumps(signed | {"content": signed["content"].replace("small-3", "small-9")}))
    elif what == "fleet":
        write_update(path, stranger, record.model_copy(update={"fleet": "f" * 16}), "small")
        said = "it is of fleet ffffffffffffffff"
    elif what == "name":
        shutil.copy(path, kits / "large" / "update.json")
        with pytest.raises(ValueError, match=r"it is for small, this is the kit of large"):
            read_kit(kits / "large")
        return
    else:
        write_update(path, stranger, record, "small")
    with pytest.raises(ValueError, match=said):
        read_kit(kits / "small")


def test_an_older_update_is_refused_after_a_newer_one_has_counted(kits: Path, again: Any) -> None:
    again("small-1", "small-2", "small-3")
    path = kits / "small" / "update.json"
    first = path.read_bytes()
    again("small-1", "small-2")
    newest = path.read_bytes()
    with hold(kits / "small"):
        remember_update(kits / "small")
    path.write_bytes(first)
    with pytest.raises(ValueError, match="it is number 1, and number 2 has been in use; copy the newest"):
        read_kit(kits / "small")
    path.unlink()
    with pytest.raises(ValueError, match=r"update\.json is missing, and number 2 has been in use: copy it again"):
        read_kit(kits / "small")
    path.write_bytes(newest)
    assert [m.name for m in read_kit(kits / "small").file.members] == ["small-1", "small-2"]


@pytest.mark.long
def test_a_hub_at_work_takes_an_update_in(kits: Path, again: Any) -> None:
    kit = read_kit(kits / "small")
    server = kit.server.model_copy(update={"port": reserved_port()})
    again("small-1", "small-2", "small-3")
    update = kits / "small" / "update.json"
    later = update.rename(kits / "later.json")
    (kits / "small" / "kit.toml").write_text(kit_toml(kit.file.model_copy(update={"server": server})))
    told: list[str] = []
    with hold(kits / "small"), Hub(read_kit(kits / "small"), told.append) as hub:
        nodes = {name: member.node for name, member in hub.members().items()}
        assert set(nodes) == {"small-1", "small-2"}
        shutil.copy(later, update)
        hub.update()
        after = {name: member.node for name, member in hub.members().items()}
        assert after == nodes | {"small-3": after["small-3"]}
        assert after["small-3"] not in (0, *nodes.values())
        assert told[-1] == "the kit was updated: small-3 may come in"
        again("small-2", "small-3", replace=["small-3"])
        hub.update()
        last = {name: member.node for name, member in hub.members().items()}
        assert set(last) == {"small-2", "small-3"}
        assert last["small-2"] == nodes["small-2"]
        assert last["small-3"] != after["small-3"]
        assert told[-1] == "the kit was updated: small-3 changed; small-1 may not come in any more"
        shutil.copy(later, update)
        hub.update()
        assert "number 1, and number 2 has been in use" in told[-1]
        assert set(hub.members()) == set(last)
        said = len(told)
        hub.update()
        assert len(told) == said, "what is wrong is told once"


@pytest.mark.long
def test_a_device_that_is_added_while_the_fleet_is_at_work_has_its_model_after_the_next_run(
    tmp_path: Path, tiny: dict[str, Any], write: Any, programs: Any
) -> None:
    job = tiny | {"run": {"cache": str(tmp_path / "cache")}, "links": {"deadline_seconds": 120.0, "quorum": 1.0}}
    small = {"name": "small", "port": reserved_port()}
    where = {"cloud": {"port": reserved_port()}, "edges": [small, {"name": "large", "port": reserved_port()}]}
    kits = tmp_path / "kits"
    provision(write(tmp_path, job, {"job": "job.toml"} | where), kits, split_data=True)
    fleet = programs(tmp_path, kits)
    fleet.start(*fleet.members, once=False)
    fleet.run()
    fleet.ends_well("run")
    models = {d: (kits / d / "model" / "model.safetensors").read_bytes() for d in fleet.devices}
    more = {"name": "small-3", "data": "data", "storage_limit": "1 MB", "gpu_capacity": 40.0}
    small["devices"] = [{"name": "small-1"}, {"name": "small-2"}, more]
    made = provision(write(tmp_path, job, {"job": "job.toml"} | where), kits)
    assert [kit.name for kit in made.kits] == ["small-3"]
    new = read_kit(kits / "small-3").file
    given = new.model_copy(update={"data": new.data.model_copy(update={"cut": "given"})})
    (kits / "small-3" / "kit.toml").write_text(kit_toml(given))
    shutil.copytree(kits / "small-2" / "data", kits / "small-3" / "data")
    fleet.wait_for("small", "the kit was updated: small-3 may come in")
    fleet.start("small-3", once=False)
    fleet.wait_for("small", "small-3 is there")
    fleet.run("second")
    fleet.ends_well("run")
    assert {d["id"] for d in fleet.summary("second")["devices"]} == {*models, "small-3"}
    assert (kits / "small-3" / "model" / "model.safetensors").exists()
    assert (kits / "large-1" / "model" / "model.safetensors").read_bytes() == models["large-1"]
