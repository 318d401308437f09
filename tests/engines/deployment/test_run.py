"""A fleet of programs on this machine, over TLS with keys: what it gives, how it ends, what comes back after a kill."""

import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
import tomli_w
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fleetfit.config.job import load_job
from fleetfit.engines.deployment.certificates import make_member_key, read_member_key
from fleetfit.engines.deployment.kit import hold, read_kit
from fleetfit.engines.deployment.server import Hub

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc"),
]


def test_a_fleet_gives_what_the_local_engine_gives_and_leaves_nothing(make: Any) -> None:
    fleet = make()
    fleet.start(*fleet.members)
    fleet.run()
    fleet.ends_well("run", *fleet.members)
    fleet.leaves_nothing()
    fleet.is_the_same()
    summary, _ = fleet.local()
    found = fleet.summary()
    for link in ("device_to_edge_bytes", "edge_to_device_bytes", "cloud_to_edge_bytes"):
        assert found["traffic"][link] == summary["traffic"][link]
    assert found["traffic"]["raw_data_bytes"] == summary["traffic"]["raw_data_bytes"]
    assert (fleet.folder / "run" / "report.html").exists()
    assert not list((fleet.folder / "run").rglob("model.safetensors"))  # the cloud has figures, not models
    assert "round 2 of 2" in fleet.says("small")
    assert "model: " in fleet.says("small-1")


def test_an_edge_a_device_and_the_cloud_come_back_after_a_kill(make: Any) -> None:
    fleet = make(refine={"rounds": 3, "epochs": 1, "prune_share": 0.3, "guard": False})
    fleet.start(
        *fleet.members, once=False
    )  # who has reported stays, for a cloud that was killed before it kept the report
    fleet.run()
    fleet.wait_for("small-2", "has the coarse model")
    fleet.kill("small-2")
    fleet.start("small-2")
    fleet.wait_for("small", "refine: round 1")
    fleet.kill("small")
    fleet.start("small")
    fleet.kill("run")
    fleet.run()
    fleet.ends_well("run")
    fleet.is_the_same()


def test_a_run_uses_a_cloud_that_was_started_and_all_stop_in_order(make: Any) -> None:
    fleet = make()
    fleet.start("cloud", *fleet.members, once=False)
    fleet.wait_for("cloud", "small is there")
    fleet.wait_for("cloud", "large is there")
    fleet.run()
    fleet.ends_well("run")
    fleet.is_the_same()
    fleet.run("again")  # by the same programs; nothing is kept of the first
    fleet.ends_well("run")
    fleet.is_the_same("again")
    for name in ("cloud", *fleet.members):
        fleet.programs[name].send_signal(signal.SIGTERM if name == "small" else signal.SIGINT)
    for name in ("cloud", *fleet.members):
        assert fleet.programs[name].wait(300) == (143 if name == "small" else 130), fleet.says(name)
    fleet.leaves_nothing()


def test_without_tls_it_works_too_and_says_so_and_models_go_up_if_the_job_lets_them(make: Any) -> None:
    fleet = make(insecure=True, links={"deadline_seconds": 120.0, "quorum": 1.0, "send_models": True})
    fleet.start(*fleet.members)
    fleet.run()
    fleet.ends_well("run", *fleet.members)
    fleet.leaves_nothing()
    assert "INSECURE" in fleet.says("small")
    fleet.is_the_same()
    for name in ("small-1", "small-2", "large-1"):
        there, here = fleet.folder / "run" / "devices" / name, fleet.kits / name / "model"
        assert (there / "model.safetensors").read_bytes() == (here / "model.safetensors").read_bytes()
        cards = [json.loads((folder / "model.json").read_text()) for folder in (there, here)]
        said = [card.pop("trained_on") for card in cards]
        assert cards[0] == cards[1]
        assert said[0] == []  # what classes a device has is its own to know
        assert said[1]


def test_what_is_wrong_is_told_at_once_on_both_sides(make: Any, tmp_path: Path) -> None:
    fleet = make()
    fleet.start("cloud", "small", once=False)
    fleet.wait_for("small", "connected to cloud")
    (fleet.kits / "small-1" / "data" / "train.parquet").unlink()
    fleet.start("small-1")
    assert fleet.programs["small-1"].wait(300) == 1
    assert "error: data.source = " in fleet.says("small-1")
    fleet.wait_for(
        "small", "refused .*: small-1 cannot take part: its data are missing, cannot be read, or have labels"
    )
    job = load_job(fleet.kits / "small-2" / "job.toml").model_dump(mode="json", exclude_none=True)
    (fleet.kits / "small-2" / "job.toml").write_text(tomli_w.dumps(job | {"seed": 99}))
    fleet.start("small-2")
    assert fleet.programs["small-2"].wait(300) == 1
    assert "error: 'small-2' has another job than small" in fleet.says("small-2")
    fleet.wait_for("small", "refused .*: 'small-2' has another job than small")
    fleet.fleetfit("second", "start", str(fleet.kits / "small"))
    assert fleet.programs["second"].wait(300) == 1
    assert "is started already, by another process of this machine" in fleet.says("second")
    assert fleet.programs["small"].poll() is None


def test_flower_itself_knows_nobody_but_those_with_keys_and_none_by_anothers_name(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever leaves our greetings out meets Flower's own checks behind the door."""
    fleet = make()
    monkeypatch.setenv("FLEETFIT_TEST", fleet.mark)  # what is started from here is of this fleet too
    kit = read_kit(fleet.kits / "small")
    key = read_member_key(fleet.kits / "small-1" / "node.key")
    (fleet.folder / "stranger.key").write_bytes(make_member_key()[0])
    stranger = read_member_key(fleet.folder / "stranger.key")
    version = RuntimeVersionHttpInterceptor(component_name="test")
    with hold(kit.folder), Hub(kit, print) as hub:

        def client(*signed: Any) -> FleetHttpClient:
            address, ca = f"127.0.0.1:{kit.server.port}", kit.ca.read_bytes()
            return FleetHttpClient.from_server_address(address, False, ca, [version, *signed])

        def status(call: Any) -> int:
            with pytest.raises(httpx.HTTPStatusError) as error:
                call()
            return error.value.response.status_code

        own, other = (hub.members()[name].node for name in ("small-1", "small-2"))
        me, them = (client(NodeAuthHttpInterceptor(k, k.public_key())) for k in (key, stranger))
        mine, theirs = (
            ActivateNodeRequest(public_key=public_key_to_bytes(k.public_key()), heartbeat_interval=30)
            for k in (key, stranger)
        )
        assert me.ActivateNode(mine).node_id == own
        assert list(me.PullMessages(PullMessagesRequest(node=Node(node_id=own))).messages_list) == []
        assert status(lambda: me.PullMessages(PullMessagesRequest(node=Node(node_id=other)))) == 401
        assert 400 <= status(lambda: them.ActivateNode(theirs)) < 500
        assert status(lambda: them.ActivateNode(mine)) == 401
        assert status(lambda: them.PullMessages(PullMessagesRequest(node=Node(node_id=own)))) == 401
        assert status(lambda: client().PullMessages(PullMessagesRequest(node=Node(node_id=own)))) == 401
        for each in (me, them):
            each.close()
    fleet.leaves_nothing()
