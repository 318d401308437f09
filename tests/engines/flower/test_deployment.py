"""A fleet of programs on this machine, over TLS with keys: what it gives, how it ends, what comes back after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tomli_w

import fleetfit
from fleetfit.config import load_job
from fleetfit.engines.flower.hub import free_port
from fleetfit.engines.flower.kit import kit_toml, read_kit
from fleetfit.engines.flower.provision import provision

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc"),
]

PATIENCE_SECONDS = 600.0
BELOW = {"cloud": ("small", "large"), "small": ("small-1", "small-2"), "large": ("large-1",)}
MEMBERS = ("small", "large", "small-1", "small-2", "large-1")


class Fleet:
    """Programs of one fleet, and what they say."""

    def __init__(self, folder: Path, kits: Path) -> None:
        self.kits = kits
        self.folder = folder
        self.mark = f"fleetfit-test-{os.getpid()}-{time.monotonic_ns()}"
        self.programs: dict[str, subprocess.Popen[bytes]] = {}
        self.logs: dict[str, Path] = {}

    def fleetfit(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a program; its words go to a file."""
        self.logs[name] = self.folder / f"{name}.{len(list(self.folder.glob(f'{name}.*.log')))}.log"
        with self.logs[name].open("wb") as log:
            self.programs[name] = subprocess.Popen(
                [sys.executable, "-m", "fleetfit", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"FLEETFIT_TEST": self.mark},
                start_new_session=True,
            )
        return self.programs[name]

    def start(self, *names: str, once: bool = True) -> None:
        for name in names:
            self.fleetfit(name, "start", str(self.kits / name), *(["--once"] if once else []))

    def run(self, out: str = "run") -> subprocess.Popen[bytes]:
        job, cloud = self.kits / "cloud" / "job.toml", self.kits / "cloud"
        arguments = ("--engine", "flower", "--cloud", str(cloud), "--out", str(self.folder / out), "--json")
        return self.fleetfit("run", "run", str(job), *arguments)

    def says(self, name: str) -> str:
        return self.logs[name].read_text(errors="replace")

    def wait_for(self, name: str, words: str) -> None:
        """Until a program has said something."""
        ends = time.monotonic() + PATIENCE_SECONDS
        while not re.search(words, self.says(name)):
            assert self.programs[name].poll() is None, f"{name} has ended:\n{self.says(name)}"
            assert time.monotonic() < ends, f"{name} never said {words!r}:\n{self.everything()}"
            time.sleep(0.1)

    def ends_well(self, *names: str) -> None:
        for name in names:
            try:
                assert self.programs[name].wait(PATIENCE_SECONDS) == 0, f"{name}:\n{self.says(name)}"
            except subprocess.TimeoutExpired:
                pytest.fail(f"{name} does not end:\n{self.everything()}")

    def kill(self, name: str) -> None:
        """As a power cut would, this program and no other; those of Flower go with it."""
        self.programs[name].kill()
        self.programs[name].wait()

    def alive(self) -> list[str]:
        """Processes that were started here, or by those, whoever their parent is now."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    def leaves_nothing(self, seconds: float = 20.0) -> None:
        ends = time.monotonic() + seconds
        while (alive := self.alive()) and time.monotonic() < ends:
            time.sleep(0.1)
        assert not alive, alive

    def everything(self) -> str:
        return "\n".join(f"--- {name}\n{self.says(name)[-3000:]}" for name in self.logs)

    def close(self) -> None:
        for program in self.programs.values():
            if program.poll() is None:
                program.kill()
                program.wait()
        self.leaves_nothing()


def free_ports(kits: Path) -> None:
    """Two test runs on one machine must not meet."""
    for upper, lower in BELOW.items():
        port = free_port()
        for name in (upper, *lower):
            kit = read_kit(kits / name)
            part = "server" if name == upper else "upstream"
            changed = getattr(kit.file, part).model_copy(update={"port": port})
            (kits / name / "kit.toml").write_text(kit_toml(kit.file.model_copy(update={part: changed})))


@pytest.fixture
def make(tmp_path: Path, tiny: dict[str, Any], fleet: dict[str, Any], write: Any) -> Iterator[Callable[..., Fleet]]:
    made: list[Fleet] = []

    def make(insecure: bool = False, **changed: Any) -> Fleet:
        links = {"deadline_seconds": 120.0, "quorum": 1.0}
        job = tiny | {"run": {"cache": str(tmp_path / "cache")}, "links": links} | changed
        provision(write(tmp_path, job, fleet), tmp_path / "kits", split_data=True, insecure=insecure)
        free_ports(tmp_path / "kits")
        (tmp_path / "logs").mkdir()
        made.append(Fleet(tmp_path / "logs", tmp_path / "kits"))
        return made[-1]

    yield make
    for each in made:
        each.close()


def local(fleet: Fleet) -> tuple[dict[str, Any], Path]:
    """What the local engine makes of the same job."""
    out = fleet.folder / "local"
    return fleetfit.run(load_job(fleet.kits / "cloud" / "job.toml"), out), out


def is_the_same(fleet: Fleet, out: str = "run") -> None:
    """The deployment's figures and models are those of the local engine."""
    summary, folder = local(fleet)
    found = json.loads((fleet.folder / out / "summary.json").read_text())
    for key in ("reference", "clusters", "devices"):
        assert found[key] == summary[key], key
    for device in summary["devices"]:
        ours = fleet.kits / device["id"] / "model"
        one, other = (
            safetensors.torch.load_file(f / "model.safetensors") for f in (ours, folder / "devices" / ours.parent.name)
        )
        assert one.keys() == other.keys()
        assert max(float((one[name] - other[name]).abs().max()) for name in one) <= 1e-5
        assert json.loads((ours / "model.json").read_text()) == json.loads(
            (folder / "devices" / device["id"] / "model.json").read_text()
        )
        fleetfit.load(ours)


def test_a_fleet_gives_what_the_local_engine_gives_and_leaves_nothing(make: Any) -> None:
    fleet = make()
    fleet.start(*MEMBERS)
    fleet.run()
    fleet.ends_well("run", *MEMBERS)
    fleet.leaves_nothing()
    is_the_same(fleet)
    summary, _ = local(fleet)
    found = json.loads((fleet.folder / "run" / "summary.json").read_text())
    for link in ("device_to_edge_bytes", "edge_to_device_bytes", "cloud_to_edge_bytes"):
        assert found["traffic"][link] == summary["traffic"][link]
    assert found["traffic"]["raw_data_bytes"] == summary["traffic"]["raw_data_bytes"]
    assert (fleet.folder / "run" / "report.html").exists()
    assert not list((fleet.folder / "run").rglob("model.safetensors"))  # the cloud has figures, not models
    assert "round 2 of 2" in fleet.says("small")
    assert "model: " in fleet.says("small-1")


def test_an_edge_a_device_and_the_cloud_come_back_after_a_kill(make: Any) -> None:
    fleet = make(refine={"rounds": 3, "epochs": 1, "prune_share": 0.3, "guard": False})
    fleet.start(*MEMBERS, once=False)  # who has reported stays, for a cloud that was killed before it kept the report
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
    is_the_same(fleet)


def test_a_run_uses_a_cloud_that_was_started_and_all_stop_in_order(make: Any) -> None:
    fleet = make()
    fleet.start("cloud", *MEMBERS, once=False)
    fleet.wait_for("cloud", "small is there")
    fleet.wait_for("cloud", "large is there")
    fleet.run()
    fleet.ends_well("run")
    is_the_same(fleet)
    fleet.run("again")  # by the same programs; nothing is kept of the first
    fleet.ends_well("run")
    is_the_same(fleet, "again")
    for name in ("cloud", *MEMBERS):
        fleet.programs[name].send_signal(signal.SIGTERM if name == "small" else signal.SIGINT)
    for name in ("cloud", *MEMBERS):
        assert fleet.programs[name].wait(60) == (143 if name == "small" else 130), fleet.says(name)
    fleet.leaves_nothing(5.0)


def test_without_tls_it_works_too_and_says_so_and_models_go_up_if_the_job_lets_them(make: Any) -> None:
    fleet = make(insecure=True, links={"deadline_seconds": 120.0, "quorum": 1.0, "send_models": True})
    fleet.start(*MEMBERS)
    fleet.run()
    fleet.ends_well("run", *MEMBERS)
    fleet.leaves_nothing()
    assert "INSECURE" in fleet.says("small")
    is_the_same(fleet)
    for name in ("small-1", "small-2", "large-1"):
        for file in ("model.safetensors", "model.json"):
            in_the_cloud = fleet.folder / "run" / "devices" / name / file
            assert in_the_cloud.read_bytes() == (fleet.kits / name / "model" / file).read_bytes()


def test_what_is_wrong_is_told_at_once_on_both_sides(make: Any, tmp_path: Path) -> None:
    fleet = make()
    fleet.start("cloud", "small", once=False)
    fleet.wait_for("small", "connected to cloud")
    (fleet.kits / "small-1" / "data" / "train.parquet").unlink()
    fleet.start("small-1")
    assert fleet.programs["small-1"].wait(60) == 1
    assert "error: data.source = " in fleet.says("small-1")
    fleet.wait_for(
        "small", "refused .*: small-1 cannot take part: its data are missing, cannot be read, or have labels"
    )
    job = load_job(fleet.kits / "small-2" / "job.toml").model_dump(mode="json", exclude_none=True)
    (fleet.kits / "small-2" / "job.toml").write_text(tomli_w.dumps(job | {"seed": 99}))
    fleet.start("small-2")
    assert fleet.programs["small-2"].wait(60) == 1
    assert "error: 'small-2' has another job than small" in fleet.says("small-2")
    fleet.wait_for("small", "refused .*: 'small-2' has another job than small")
    fleet.fleetfit("second", "start", str(fleet.kits / "small"))
    assert fleet.programs["second"].wait(60) == 1
    assert "is started already, by another process of this machine" in fleet.says("second")
    assert fleet.programs["small"].poll() is None
