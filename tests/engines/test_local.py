"""The local engine: what is counted is what crosses, devices live in files, the fleet is the job's."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import tiny_fields

from fleetfit.cloud.clusters import fleet_of
from fleetfit.config.job import Job, make_job
from fleetfit.config.profiles import ready_profiles
from fleetfit.core.bounds import Bounds
from fleetfit.core.checkpoints import Ledger, MemoryFolder
from fleetfit.core.encoding import Message, Request, encode
from fleetfit.core.link import Refused
from fleetfit.core.records import DeviceAttributes, EnergyModel, ValidationScores
from fleetfit.data.partition import share_out
from fleetfit.data.sources import load_samples
from fleetfit.device import handler
from fleetfit.device.handler import device_handler
from fleetfit.device.memory import DeviceMemory
from fleetfit.device.messages import AttributesReply, AttributesRequest, Propose, RefineRound, RoundReply
from fleetfit.edge.messages import ClusterStats, StatsRequest, decode_any
from fleetfit.engines import local, whole_fleet
from fleetfit.engines.whole_fleet import LocalLink
from fleetfit.runs.device_folder import read_card

torch.set_num_threads(1)

DIRECTIONS = {
    "edge_to_device": {"attributes_request", "coarse_model", "refine_round", "propose", "finish"},
    "device_to_edge": {"attributes_reply", "coarse_reply", "round_reply", "propose_reply", "finish_reply"},
    "cloud_to_edge": {"stats_request", "backbone_assignment"},
    "edge_to_cloud": {"cluster_stats", "cluster_report"},
}
CLUSTERS = {"small": 2, "large": 3}
LIMITS = {"small": 100_000, "large": 1_000_000}


def tiny_job(cache: Path) -> Job:
    return make_job(
        tiny_fields(
            cache,
            CLUSTERS,
            data={"split": "iid"},
            header={"keep_distilled": False},
            refine={"prune_share": 0.5},
        )
    )


# -- a whole run ------------------------------------------------------------------------------------------------------


class Run:
    """One run with every message that crossed: (down's name, members of the link, member, blob) in order."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.out = folder / "run"
        self.blobs: list[bytes] = []
        self.asked: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
        ask = LocalLink.ask

        def noting(link: LocalLink, messages: Mapping[str, Request], bounds: Bounds) -> Any:
            self.asked.append((link.down, link.members, tuple(messages)))
            return ask(link, messages, bounds)

        def encoding(message: Message) -> bytes:
            self.blobs.append(encode(message))
            return self.blobs[-1]

        patch.setattr(LocalLink, "ask", noting)
        patch.setattr(whole_fleet, "encode", encoding)
        self.job = tiny_job(folder / "cache")
        self.summary = local.run(self.job, self.out)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        return Run(tmp_path_factory.mktemp("local"), patch)


def test_traffic_is_the_bytes_that_crossed_each_link_each_way(run: Run) -> None:
    crossed: Counter[str] = Counter()
    for blob in run.blobs:
        (direction,) = [d for d, kinds in DIRECTIONS.items() if decode_any(blob).kind in kinds]
        crossed[direction] += len(blob)
    traffic = run.summary["traffic"]
    assert {d: traffic[f"{d}_bytes"] for d in DIRECTIONS} == dict(crossed)
    assert traffic["upload_ratio"] == crossed["device_to_edge"] / traffic["raw_data_bytes"]
    # 2 rounds, and 4 messages around them, each way, for each of 5 devices; 2 each way for each edge.
    assert len(run.blobs) == 2 * 5 * (2 + 4) + 2 * 2 * 2


def test_raw_data_is_what_the_devices_hold(run: Run) -> None:
    fleet = {c: [a.device_id for a in members] for c, members in fleet_of(run.job).items()}
    data = share_out(load_samples(run.job), run.job.data, fleet, run.job.seed)
    held = sum(len(d.train) + len(d.validation) + len(d.test) for d in data.devices.values())
    assert run.summary["traffic"]["raw_data_bytes"] == 64 * held


def test_an_edge_talks_to_its_own_devices_only(run: Run) -> None:
    own = {c: tuple(f"{c}-{i}" for i in range(1, n + 1)) for c, n in CLUSTERS.items()}
    seen = set()
    for down, connected, asked in run.asked:
        assert connected == asked
        assert connected in ([tuple(CLUSTERS)] if down == "cloud_to_edge" else list(own.values()))
        seen.add(connected)
    assert seen == {tuple(CLUSTERS), *own.values()}


def test_every_device_has_a_model_of_the_size_that_was_said(run: Run) -> None:
    devices = {d["id"]: d for d in run.summary["devices"]}
    assert list(devices) == [f"{c}-{i}" for c, n in CLUSTERS.items() for i in range(1, n + 1)]
    for name, device in devices.items():
        folder = run.out / "devices" / name
        size = (folder / "model.safetensors").stat().st_size
        assert size == device["size_bytes"] == read_card(folder).size_bytes
        assert size <= device["limit_bytes"] == LIMITS[device["cluster"]]
        assert device["cluster"] == name.partition("-")[0]


def test_a_finished_run_is_read_back_without_a_message_to_a_device(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a device was asked again")

    monkeypatch.setattr(handler, "handle", never)
    again = local.run(run.job, run.out)
    for summary in (again, run.summary):
        summary = dict(summary)
        assert summary.pop("seconds").keys() == summary.pop("cpu_seconds").keys()
        assert summary.pop("peak_memory_bytes") > 10**7
        assert summary == {
            k: v for k, v in run.summary.items() if k not in ("seconds", "cpu_seconds", "peak_memory_bytes")
        }


# -- links ------------------------------------------------------------------------------------------------------------


def attributes_of(name: str) -> DeviceAttributes:
    return DeviceAttributes(device_id=name, storage_limit_bytes=10**6, energy=EnergyModel(), num_samples=3)


def test_a_link_passes_copies_and_counts_both_ways() -> None:
    received: list[Message] = []
    shared = torch.ones(3)

    def answer(message: Message) -> Message:
        received.append(message)
        message.tensors["a"] += 1  # the sender must not notice
        scores = ValidationScores(num_samples=0, loss_sum=0.0, num_correct=0)
        return RoundReply(step=1, scores=scores, tensors={"b": shared})

    ledger = Ledger()
    link = LocalLink({"two": answer, "one": answer}, ledger, "down", "up")
    sent = RefineRound(step=1, round=1, tensors={"a": torch.zeros(2)})
    replies = link.ask({"one": sent, "two": sent})
    assert link.members == ("two", "one")
    assert list(replies) == ["one", "two"]
    assert sent.tensors["a"].tolist() == [0, 0]
    assert isinstance(replies["one"], RoundReply)
    assert isinstance(replies["two"], RoundReply)
    replies["one"].tensors["b"].zero_()
    assert shared.tolist() == replies["two"].tensors["b"].tolist() == [1, 1, 1]
    assert all(m is not sent and m.model_dump() == sent.model_dump() for m in received)
    assert ledger.traffic == {"down": 2 * len(encode(sent)), "up": 2 * len(encode(replies["one"]))}


def test_a_reply_of_another_kind_is_refused_and_the_others_pass() -> None:
    reply = AttributesReply(step=0, attributes=attributes_of("m"))
    link = LocalLink({"m": lambda _: reply, "n": lambda _: reply}, Ledger(), "down", "up")
    replies = link.ask({"m": Propose(step=2), "n": AttributesRequest(step=0)})
    assert replies == {"m": Refused(reason="it is a 'attributes_reply', expected a 'propose_reply'"), "n": reply}


def test_messages_that_do_not_cross_links_are_refused() -> None:
    link = LocalLink({"m": lambda m: m}, Ledger(), "down", "up")
    with pytest.raises(ValueError, match="unknown kind 'device_memory'"):
        link.ask({"m": DeviceMemory()})  # type: ignore[dict-item]


# -- devices in files -------------------------------------------------------------------------------------------------


def test_a_repeated_message_meets_the_memory_it_met_before(run: Run, tmp_path: Path) -> None:
    """A kill between a device's answer and the edge's checkpoint: the edge asks again."""
    fleet = {c: [a.device_id for a in members] for c, members in fleet_of(run.job).items()}
    data = share_out(load_samples(run.job), run.job.data, fleet, run.job.seed)
    memories = MemoryFolder(tmp_path)
    answer = device_handler(attributes_of("small-1"), data.devices["small-1"], memories)
    mine = [decode_any(b) for b in run.blobs if decode_any(b).kind in DIRECTIONS["edge_to_device"]]
    chain = [m for m in mine if m.kind != "attributes_request"][0 :: CLUSTERS["small"]][:5]
    chain = [next(m for m in mine if m.kind == "attributes_request"), *chain]
    assert [getattr(m, "step", None) for m in chain] == list(range(6))
    for message in (chain[0], chain[0]):
        answer(message)
    assert not list(tmp_path.iterdir()), "attributes need no memory"
    for number, message in enumerate(chain[1:], start=1):
        first, memory = answer(message), memories.load(number, DeviceMemory)
        again, memory_again = answer(message), memories.load(number, DeviceMemory)
        for a, b in ((first, again), (memory, memory_again)):
            assert a.model_dump_json() == b.model_dump_json()
            torch.testing.assert_close(dict(a.tensors), dict(b.tensors), rtol=0, atol=0)
        kept = sorted(int(p.stem) for p in tmp_path.glob("*.safetensors"))
        assert kept == [n for n in (number - 1, number) if n >= 1]
    for over in chain[2:-1]:
        with pytest.raises(ValueError, match=f"step {over.step} is over: the device has come to 5"):
            answer(over)
    # Another run begins with a coarse model.
    answer(chain[1])
    assert [p.stem for p in tmp_path.glob("*.safetensors")] == ["1"]


def test_a_device_answers_devices_messages_only(run: Run, tmp_path: Path) -> None:
    data = share_out(load_samples(run.job), run.job.data, {"c": ["c-1"]}, 0).devices["c-1"]
    answer = device_handler(attributes_of("c-1"), data, MemoryFolder(tmp_path))
    for message in (StatsRequest(), ClusterStats(devices=())):
        with pytest.raises(ValueError, match=f"device c-1: cannot answer a '{message.kind}'"):
            answer(message)
    assert not list(tmp_path.iterdir())


# -- the fleet --------------------------------------------------------------------------------------------------------


def test_lists_are_dealt_out_in_turn_and_constants_are_relative() -> None:
    job = make_job(
        {
            "fleet": {
                "devices": [
                    {"count": 3, "cluster": "b", "storage_limit": [100, 200], "gpu_capacity": [10, 20]},
                    {"count": 1, "cluster": "a", "storage_limit": 300},
                    {"count": 2, "cluster": "b", "storage_limit": 400, "gpu_capacity": 50},
                ],
                "energy": {"latency_seconds": 2, "latency_slope_share": 0.25},
            }
        }
    )
    fleet = fleet_of(job)
    assert {c: [a.device_id for a in members] for c, members in fleet.items()} == {
        "b": ["b-1", "b-2", "b-3", "b-4", "b-5"],
        "a": ["a-1"],
    }
    assert [a.storage_limit_bytes for a in fleet["b"]] == [100, 200, 100, 400, 400]
    assert [a.energy.power_watts for a in fleet["b"]] == [10, 20, 10, 50, 50]
    energy = fleet["b"][1].energy
    assert (energy.power_slope_watts, energy.patch_power_watts) == (2.0, 10.0)
    assert (energy.latency_seconds, energy.latency_slope_seconds) == (2.0, 0.5)


def test_a_group_with_a_profile_has_its_constants_and_no_others() -> None:
    devices = [
        {"count": 2, "cluster": "a", "storage_limit": [5, 6], "profile": "nvidia-t4"},
        {"count": 1, "cluster": "a", "storage_limit": 7, "gpu_capacity": 100},
        {"count": 1, "cluster": "a", "storage_limit": 8, "profile": "paper"},
    ]
    attributes = fleet_of(make_job({"fleet": {"devices": devices}}))["a"]
    assert [a.storage_limit_bytes for a in attributes] == [5, 6, 7, 8]
    assert [a.energy for a in attributes[:2]] == [ready_profiles()["nvidia-t4"].energy] * 2
    assert attributes[0].energy.power_watts == 70
    # The paper's profile is what a job has by default.
    assert attributes[2].energy.model_dump() == pytest.approx(attributes[3].energy.model_dump())
    assert all(type(a.energy) is EnergyModel for a in attributes)


def test_clusters_without_names_are_made_from_the_attributes() -> None:
    limits = ["1 MB", "100 KB", "300 KB", "110 KB", "1.1 MB"]
    job = make_job({"fleet": {"devices": [{"storage_limit": limit} for limit in limits]}})
    fleet = fleet_of(job)
    assert {c: sorted(a.storage_limit_bytes for a in m) for c, m in fleet.items()} == {
        "cluster1": [100_000, 110_000],
        "cluster2": [300_000],
        "cluster3": [1_000_000, 1_100_000],
    }
    assert {a.device_id for m in fleet.values() for a in m} == {
        "cluster1-1",
        "cluster1-2",
        "cluster2-1",
        "cluster3-1",
        "cluster3-2",
    }
