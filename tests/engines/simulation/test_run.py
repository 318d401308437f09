"""The simulation engine: the models of the local engine, and nothing left of Ray, however a run ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from same_run import differences, weight_differences
from tiny_job import tiny_fields

from fleetfit.config.job import make_job
from fleetfit.engines import local
from fleetfit.engines.flower.link import CarrierFailed
from fleetfit.engines.simulation import ray_nodes as nodes
from fleetfit.engines.simulation import run as simulation
from fleetfit.engines.simulation.ray_nodes import Resources

torch.set_num_threads(1)

PATIENCE_SECONDS = 600.0
needs_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")


def fields(cache: Path, **data: Any) -> dict[str, Any]:
    """Five devices in two clusters, two rounds; what differs between devices matters."""
    return tiny_fields(
        cache,
        {"small": 2, "large": 3},
        seed=3,
        data={"split": "classes", "limit": 600, **data},
        header={"search": "halving", "budget_steps": 20},
        refine={"prune_share": 0.3},
    )


def processes(mark: str) -> list[Path]:
    """The processes alive, in /proc, that have inherited this mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it is gone, or not ours
            if mark.encode() in (folder / "environ").read_bytes() and ") Z " not in (folder / "stat").read_text():
                found.append(folder)
    return found


def marked(mark: str) -> list[str]:
    """Their command lines."""
    found = []
    for folder in processes(mark):
        with contextlib.suppress(OSError):
            found.append((folder / "cmdline").read_text().replace("\0", " "))
    return found


def gone(mark: str) -> list[str]:
    """Who is still there after a long while: a busy machine is slow to end processes."""
    ends = time.monotonic() + PATIENCE_SECONDS
    while marked(mark) and time.monotonic() < ends:
        time.sleep(0.2)
    return marked(mark)


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("FLEETFIT_TEST_MARK", str(tmp_path))
    return f"FLEETFIT_TEST_MARK={tmp_path}"


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders of this test are made, by programs it starts too; short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="ff-", dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


def ray_folders(temporary: Path) -> list[Path]:
    return list(temporary.glob("fleetfit-ray-*"))


# -- the same run -----------------------------------------------------------------------------------------------------


@needs_proc
def test_devices_on_ray_become_what_they_become_here(
    tmp_path: Path, mark: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although Ray's processes round otherwise: they compute with other instructions than this one."""
    given = fields(tmp_path / "cache")
    # Little training, and whole numbers: in a byte, a last digit that differs may become a level that differs.
    given["refine"] |= {"bits": 32, "learning_rate": 1e-3, "later_epochs": 1, "anchor": 0.1}
    job = make_job(given)
    here = local.run(job, tmp_path / "here")
    told = []
    other = "avx2" if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else "default"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", other)  # this process has read it long ago

    def progress(phase: str, done: int, total: int, note: str = "") -> None:
        told.append((phase, done, total, note))
        if "round 1 of 2" in note and not alive:
            alive.extend(marked(mark))
            folders.extend(ray_folders(temporary))

    alive: list[str] = []
    folders: list[Path] = []
    given["run"]["cache"] = str(tmp_path / "another cache")  # all of it is computed there, too
    there = simulation.run(make_job(given), tmp_path / "there", progress)
    assert any("raylet" in process for process in alive)
    assert len(folders) == 1
    assert not gone(mark)
    assert ray_folders(temporary) == []

    assert there["traffic"] == here["traffic"]  # bytes hang on no digit
    fewest = min(d["num_test"] for d in reports(tmp_path / "here"))
    for key in ("clusters", "devices", "reference"):
        assert not list(differences(there[key], here[key], fewest, key))
    for name in (d["id"] for d in here["devices"]):
        one, two = (tmp_path / run / "devices" / name / "model.safetensors" for run in ("there", "here"))
        assert not list(weight_differences(one, two))
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert [note for _, _, _, note in told if note.endswith("2 of 2 replied")]
    assert ("nodes", 1, 1) in [t[:3] for t in told]

    # A finished run is read back without Ray.
    monkeypatch.setattr(nodes, "_start_ray", never)
    again = simulation.run(job, tmp_path / "there")
    assert {k: v for k, v in again.items() if k not in ("seconds", "cpu_seconds", "peak_memory_bytes")} == {
        k: v for k, v in there.items() if k not in ("seconds", "cpu_seconds", "peak_memory_bytes")
    }


def reports(run: Path) -> list[dict[str, Any]]:
    """What the devices reported."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [device for line in lines if line["step"].startswith("finish/") for device in line["devices"]]


def files(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def never(*_: object) -> int:
    raise AssertionError("Ray was started")


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_a_gpu_that_devices_are_not_given_is_told_before_anything_is_done(tmp_path: Path) -> None:
    job = make_job({"run": {"torch_device": "cuda", "cache": str(tmp_path)}})
    with pytest.raises(ValueError, match=r"run.torch_device = 'cuda' needs --num-gpus > 0"):
        simulation.run(job, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ray_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def slow(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", slow)
    with pytest.raises(CarrierFailed, match=r"Ray did not start: The current node timed out during startup\. Has the"):
        nodes._start_ray(Resources(), tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_cpus": 0}, "--num-cpus must be > 0, got 0"),
        ({"num_cpus": -1.0}, "--num-cpus must be > 0, got -1"),
        ({"num_gpus": -0.5}, "--num-gpus must be >= 0, got -0.5"),
    ],
)
def test_resources_that_cannot_be(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Resources(**given)


@pytest.mark.parametrize(
    ("machine", "resources", "room"),
    [
        ({"CPU": 4.0}, Resources(), 4),
        ({"CPU": 4.0, "GPU": 1.0}, Resources(num_cpus=0.5), 8),
        ({"CPU": 4.0, "GPU": 1.0}, Resources(num_gpus=0.25), 4),
        ({"CPU": 8.0, "GPU": 1.0}, Resources(num_gpus=0.25), 4),
        ({"CPU": 8.0}, Resources(num_gpus=0.25), 0),
        ({"CPU": 1.0}, Resources(num_cpus=2), 0),
        ({}, Resources(), 0),
    ],
)
def test_room_of_a_machine(machine: dict[str, float], resources: Resources, room: int) -> None:
    assert nodes._room(machine, resources) == room


# -- how a run may end ------------------------------------------------------------------------------------------------


class Command:
    """``fleetfit run --engine simulation`` in a process of its own."""

    def __init__(self, folder: Path, **refine: Any) -> None:
        given = fields(folder / "cache")
        given["refine"] |= refine
        self.out, self.log = folder / "run", folder / "log"
        (folder / "job.toml").write_text(tomli_w.dumps(given))
        self.line = [sys.executable, "-m", "fleetfit", "run", str(folder / "job.toml"), "-o", str(self.out)]
        self.line += ["--engine", "simulation"]

    def start(self, *more: str) -> None:
        with self.log.open("w") as file:
            self.process = subprocess.Popen([*self.line, *more], stdout=file, stderr=subprocess.STDOUT)

    def wait_until(self, done: Callable[[], bool]) -> None:
        ends = time.monotonic() + PATIENCE_SECONDS
        while not done():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < ends, self.log.read_text()
            time.sleep(0.05)

    def step(self, name: str) -> bool:
        return (self.out / "steps" / f"{name}.safetensors").exists()

    def end(self) -> tuple[int, str]:
        return self.process.wait(timeout=PATIENCE_SECONDS), self.log.read_text()


@pytest.fixture
def command(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Command]:
    command = Command(tmp_path, **getattr(request, "param", {}))
    yield command
    if command.process.poll() is None:
        command.process.kill()
        command.process.wait()


SLOW = pytest.mark.parametrize("command", [{"epochs": 100_000}], indirect=True)  # a round takes minutes


@pytest.mark.long
@needs_proc
@SLOW
def test_a_stop_ends_devices_that_are_at_work(mark: str, temporary: Path, command: Command) -> None:
    command.start()
    command.wait_until(lambda: command.step("refine/small/0"))
    time.sleep(2)
    assert any("raylet" in process for process in marked(mark))
    command.process.send_signal(signal.SIGTERM)
    code, log = command.end()
    assert code == 128 + signal.SIGTERM
    assert not command.step("refine/small/1")  # it did not wait for the devices
    assert "stopped; the same command goes on" in log
    assert "Traceback" not in log
    assert "raylet" not in log
    assert not gone(mark)
    assert ray_folders(temporary) == []
    assert not (command.out / "handover").exists()


@pytest.mark.long
@needs_proc
def test_a_run_that_is_stopped_goes_on_and_nobody_else_says_a_word(mark: str, command: Command, tmp_path: Path) -> None:
    command.start()
    command.wait_until(lambda: command.step("refine/small/0"))
    command.process.send_signal(signal.SIGINT)
    assert command.end()[0] == 128 + signal.SIGINT
    assert not gone(mark)
    assert not command.step("finish/large")
    command.start("--quiet")
    assert command.end() == (0, "")
    assert not gone(mark)
    whole = local.run(make_job(fields(tmp_path / "cache")), tmp_path / "whole")
    summary = json.loads((command.out / "summary.json").read_text())
    assert not list(differences(summary["devices"], whole["devices"], min(d["num_test"] for d in reports(command.out))))
    assert summary["traffic"] == whole["traffic"]


@pytest.mark.long
@needs_proc
@SLOW
def test_a_killed_run_leaves_nobody_for_long(mark: str, command: Command) -> None:
    """Ray's own helpers look for their parent now and then; the files that are left go with the next run."""
    command.start()
    command.wait_until(lambda: command.step("refine/small/0"))
    command.process.kill()
    command.end()
    assert not gone(mark)


@pytest.mark.long
@needs_proc
@SLOW
def test_a_process_of_ray_that_is_killed_is_told(mark: str, command: Command) -> None:
    command.start()
    command.wait_until(lambda: command.step("refine/small/0"))
    time.sleep(2)
    for process in processes(mark):
        with contextlib.suppress(OSError):
            if b"ClientAppActor" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
    code, log = command.end()
    assert code == 1
    assert "error: a process of Ray ended" in log
    assert not gone(mark)
