"""Faults of a fleet of programs: whoever is killed or cut off, the others go on, and nothing is lost.

Each fault once, or FLEETFIT_TIMES times, each time at another moment. Repetitions share a fleet that stays started.
"""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fleetfit
from fleetfit.config.job import load_job
from fleetfit.edge.polling import NO_REPLY, Cluster
from fleetfit.engines import local
from fleetfit.engines.deployment.kit import read_kit
from fleetfit.engines.local import LocalLink

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc"),
]

TIMES = int(os.environ.get("FLEETFIT_TIMES", "1"))
ROUNDS = 3
LONGEST_PAUSE_SECONDS = 4.0  # about as long as a step takes
CUT_SECONDS = 60.0
LIAR = Path(__file__).parent / "liar.py"
REFINE = {"rounds": ROUNDS, "epochs": 1, "prune_share": 0.3, "guard": False}
FIVE_DEVICES = [
    {"count": 3, "cluster": "small", "storage_limit": "100 KB", "gpu_capacity": [40, 50]},
    {"count": 2, "cluster": "large", "storage_limit": "1 MB"},
]
SAID = {"coarse model": "has the coarse model", "proposal": "compared the ways to ship", "finish": "finished"}

each_time = pytest.mark.parametrize("repetition", range(TIMES))
Record = Callable[[str, object], None]


class Trial:
    """One run of a fleet that stays started, and when what happened to it.

    Args:
        fleet: Its programs.
        name: Of the fault; with the repetition it draws the moments.
        repetition: How often there was one before.
        record: Keeps what happened for the report of the tests.
    """

    started: Any = None  # the fleet whose programs are there; another one takes its place

    def __init__(self, fleet: Any, name: str, repetition: int, record: Record) -> None:
        if Trial.started not in (None, fleet):
            Trial.started.close()
        Trial.started = self.fleet = fleet
        self.out = f"{name}-{repetition}"
        self.chance = random.Random(self.out)
        self.record = record
        if "run" in fleet.programs and fleet.programs["run"].poll() is None:
            fleet.kill("run")
        fleet.forget()
        for program in ("cloud", *fleet.members):
            if program not in fleet.programs or fleet.programs[program].poll() is not None:
                fleet.start(program, once=False)
                fleet.wait_for(program, "listens at" if program == "cloud" else "")
        fleet.run(self.out)

    def wait(self, program: str, words: str) -> None:
        """Until a program says something, and a little longer."""
        self.fleet.wait_for(program, words)
        pause = self.chance.uniform(0, LONGEST_PAUSE_SECONDS)
        time.sleep(pause)
        said = "waits for its edges" if program == "run" else f"said '{words}'"
        self.record("moment", f"{pause:.1f} s after {program} {said}")

    def kill(self, *programs: str) -> None:
        """As a power cut would."""
        for program in programs:
            self.fleet.kill(program)
        self.record("killed", " and ".join(programs))

    def is_at_work(self) -> None:
        """Otherwise nothing was tried."""
        assert self.fleet.programs["run"].poll() is None, "the run was over before it was disturbed"


@pytest.fixture(scope="module")
def standing(provisioned: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three devices behind two edges; every reply is waited for."""
    links = {"deadline_seconds": 600.0, "quorum": 1.0}
    return provisioned(tmp_path_factory.mktemp("standing"), links=links, refine=REFINE)


@pytest.fixture(scope="module")
def five(provisioned: Any, tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any]) -> Any:
    """Five devices behind two edges; a step goes on with a third of them."""
    return provisioned(
        tmp_path_factory.mktemp("five"),
        fleet_of_job=FIVE_DEVICES,
        links={"deadline_seconds": 40.0, "quorum": 0.3, "max_message_bytes": 2_000_000},
        refine=REFINE,
    )


# -- killed, and back -------------------------------------------------------------------------------------------------


@each_time
def test_devices_that_are_killed_mid_round_go_on(standing: Any, repetition: int, record_property: Record) -> None:
    """One in each round."""
    trial = Trial(standing, "device", repetition, record_property)
    for number in range(1, ROUNDS + 1):
        device = trial.chance.choice(standing.devices)
        trial.wait(read_kit(standing.kits / device).upstream.name, f"refine: round {number}")
        trial.is_at_work()
        trial.kill(device)
        time.sleep(trial.chance.uniform(0, 5))
        standing.start(device, once=False)
    standing.ends_well("run")
    standing.is_the_same(trial.out)


@each_time
def test_an_edge_that_is_killed_at_three_points_goes_on(
    standing: Any, repetition: int, record_property: Record
) -> None:
    trial = Trial(standing, "edge", repetition, record_property)
    edge = trial.chance.choice(("small", "large"))
    for words in ("header search", f"refine: round {trial.chance.randint(1, ROUNDS)}", "refine: what to ship"):
        trial.wait(edge, words)
        trial.is_at_work()
        trial.kill(edge)
        standing.start(edge, once=False)
    standing.ends_well("run")
    standing.is_the_same(trial.out)


@each_time
def test_a_cloud_that_is_killed_at_three_points_goes_on(
    standing: Any, repetition: int, record_property: Record
) -> None:
    """Both of its programs, the one that listens and the run: once while it computes, twice while it waits."""
    trial = Trial(standing, "cloud", repetition, record_property)
    step = trial.chance.choice(("reference/cloud", "elastic/cloud", "candidates/cloud"))
    file = standing.folder / trial.out / "steps" / f"{step}.safetensors"
    standing.wait_until("run", file.exists, f"finished {step}")
    record_property("moment", f"when the step {step} was finished")
    for once_more in (True, True, False):
        trial.is_at_work()
        trial.kill("cloud", "run")
        standing.start("cloud", once=False)
        standing.wait_for("cloud", "listens at")
        standing.run(trial.out)
        if once_more:
            trial.wait("run", r"edges at work: done[\s\S]*edges at work \.\.\.")
    standing.ends_well("run")
    standing.is_the_same(trial.out)


# -- gone, or lying ---------------------------------------------------------------------------------------------------


@each_time
def test_with_two_of_five_devices_killed_the_others_go_on(
    five: Any, repetition: int, record_property: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first round, after which they come back, and again in the last, and then they stay away."""
    trial = Trial(five, "devices", repetition, record_property)
    pairs = [("small-1", "large-1"), ("small-2", "large-2"), ("small-1", "small-3"), ("small-2", "small-3")]
    killed = trial.chance.choice(pairs)
    said = dict.fromkeys(five.devices, "")
    for number in (1, ROUNDS):
        trial.wait("small", f"refine: round {number}")
        trial.is_at_work()
        trial.kill(*killed)
        for device in killed:
            said[device] += five.says(device)
        if number == 1:
            time.sleep(trial.chance.uniform(0, 8))
            five.start(*killed, once=False)
    five.ends_well("run")
    for device in set(five.devices) - set(killed):
        said[device] = five.says(device)
    summary = five.summary(trial.out)
    assert {d["id"] for d in summary["devices"]} == set(five.devices) - set(killed)
    assert {a["id"] for a in summary["absent"]} == set(killed)
    assert {f["reason"] for f in summary["faults"]} == {NO_REPLY}
    record_property("listed as absent", "; ".join(f"{a['id']} since {a['since']}" for a in summary["absent"]))
    five.is_the_same(trial.out, as_if_they_were_away(five, trial.out, said, monkeypatch))


@each_time
def test_a_device_that_lies_harms_no_other(
    five: Any, repetition: int, record_property: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its replies but one are damaged: noise, cut short, too long, not finite, of another kind, step or shape."""
    trial = Trial(five, "liar", repetition, record_property)
    liar = trial.chance.choice(five.devices)
    five.kill(liar)
    five.program(liar, sys.executable, str(LIAR), str(five.kits / liar), trial.out)
    five.ends_well("run")
    said = {device: five.says(device) for device in five.devices}
    lies = re.findall("a lie: (.*)", said[liar])
    five.kill(liar)  # the next one needs it honest
    summary = five.summary(trial.out)
    record_property("lies", ", ".join(lies))
    assert len(set(lies)) >= 5
    assert {d["id"] for d in summary["devices"]} == set(five.devices) - {liar}
    assert [a["id"] for a in summary["absent"]] == [liar]
    assert {f["reason"] for f in summary["faults"] if f["id"] != liar} <= {
        NO_REPLY
    }  # on a busy machine one may be late
    told = [f["reason"] for f in summary["faults"] if f["id"] == liar and f["reason"] != NO_REPLY]
    assert len(told) >= 3
    record_property("told", "; ".join(told))
    five.is_the_same(trial.out, as_if_they_were_away(five, trial.out, said, monkeypatch))


def as_if_they_were_away(
    fleet: Any, out: str, said: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], Path]:
    """What the local engine makes of the same job, when replies are lost that were lost to the fleet.

    Args:
        fleet: Its programs.
        out: Its run; the summary names each reply that was missing.
        said: What each device said: it may have computed a reply that its edge never got.
        monkeypatch: Loses the replies.
    """
    missing = {(f["id"], f["step"]) for f in fleet.summary(out)["faults"] if not f["recovered"]}
    now: dict[str, str] = {}
    ask = Cluster.ask

    def noting(self: Cluster, step: str, *rest: Any) -> Any:
        now[self.name] = step
        return ask(self, step, *rest)

    class Lossy(LocalLink):
        def deliver(self, member: str, sent: bytes) -> list[bytes]:
            step = now[member.rpartition("-")[0]]
            lost = (member, step) in missing
            if lost and SAID.get(step, f"{step} of") not in said[member]:
                return []
            replies = super().deliver(member, sent)
            return [] if lost else replies

    folder, whole = fleet.folder / f"{out}-local", fleet.local()[1]
    for phase in ("reference", "elastic", "candidates", "specialise", "header_search"):  # nobody was missing there
        shutil.copytree(whole / "steps" / phase, folder / "steps" / phase)
    monkeypatch.setattr(Cluster, "ask", noting)
    monkeypatch.setattr(local, "LocalLink", Lossy)
    return fleetfit.run(load_job(fleet.kits / "cloud" / "job.toml"), folder), folder


# -- cut off ----------------------------------------------------------------------------------------------------------


class Cable:
    """A network namespace, and the one cable that leads to it."""

    def __init__(self) -> None:
        number = os.getpid()
        self.namespace, self.here, there = f"fleetfit-{number}", f"ffa{number}", f"ffb{number}"
        subnet = f"198.18.{number % 256}"  # of those that are for trials
        self.address, self.address_inside = f"{subnet}.1", f"{subnet}.2"
        self.nowhere = ("unreachable", f"{subnet}.0/30", "metric", "9999")  # without the cable, whatever else there is
        self._ip("netns", "add", self.namespace)
        self._ip("route", "add", *self.nowhere)
        self._ip("link", "add", self.here, "type", "veth", "peer", "name", there, "netns", self.namespace)
        self._ip("address", "add", f"{self.address}/30", "dev", self.here)
        self._ip("-n", self.namespace, "address", "add", f"{self.address_inside}/30", "dev", there)
        self._ip("-n", self.namespace, "link", "set", "lo", "up")
        self._ip("-n", self.namespace, "link", "set", there, "up")
        self.mend()

    def cut(self) -> None:
        self._ip("link", "set", self.here, "down")

    def mend(self) -> None:
        self._ip("link", "set", self.here, "up")

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "delete", self.namespace], check=False, capture_output=True)  # and its cable
        subprocess.run(["ip", "link", "delete", self.here], check=False, capture_output=True)
        subprocess.run(["ip", "route", "delete", *self.nowhere], check=False, capture_output=True)

    def _ip(self, *arguments: str) -> None:
        try:
            subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            self.remove()
            pytest.skip(f"no network namespaces here: ip {' '.join(arguments)}: {error.stderr.strip()}")


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a network namespace is made by root, with the program ip")
    made = Cable()
    yield made
    made.remove()


@pytest.fixture(scope="module")
def apart(provisioned: Any, tmp_path_factory: pytest.TempPathFactory, cable: Cable) -> Any:
    """Three devices behind two edges, one of which is in a network of its own."""
    edges = [{"name": "small", "address": cable.address_inside}, {"name": "large"}]
    return provisioned(
        tmp_path_factory.mktemp("apart"),
        fleet={"job": "job.toml", "cloud": {"address": cable.address}, "edges": edges},
        inside={"small": ("ip", "netns", "exec", cable.namespace)},
        links={"deadline_seconds": 600.0, "quorum": 1.0},
        refine=REFINE,
    )


@each_time
def test_an_edge_whose_network_is_cut_for_a_minute_goes_on(
    apart: Any, cable: Cable, repetition: int, record_property: Record
) -> None:
    """From the cloud, and from its devices; two times."""
    trial = Trial(apart, "cut", repetition, record_property)
    moments = (
        ("header search", "refine: coarse model", "refine: round 1"),
        ("refine: round 3", "refine: what to ship"),
    )
    for words in moments:
        trial.wait("small", trial.chance.choice(words))
        trial.is_at_work()
        gone, waiting = apart.says("cloud").count("small is gone"), apart.says("small-1").count("waiting: small at")
        cable.cut()
        try:
            time.sleep(CUT_SECONDS)
            trial.is_at_work()
            assert apart.says("cloud").count("small is gone") == gone + 1
            assert apart.says("small-1").count("waiting: small at") == waiting + 1
        finally:
            cable.mend()
    apart.ends_well("run")
    apart.is_the_same(trial.out)
    assert apart.says("cloud").count("small is there") >= 2
