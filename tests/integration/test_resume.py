"""Killed anywhere, a run that is started again ends as if nothing had happened; the same seed always ends the same."""

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from tiny_job import tiny_fields

import fleetfit
from fleetfit.core import checkpoints, files
from fleetfit.device import handler
from fleetfit.runs import device_folder as model_folder
from fleetfit.runs import folder as runs_folder

torch.set_num_threads(1)

Outcome = tuple[dict[str, Any], dict[str, bytes], list[Any], list[str]]
# Imported once, not in every process that is killed.
PRELOAD = [
    "fleetfit.engines.local",
    "transformers.models.vit.modeling_vit",
    "datasets",
    "flwr_datasets.partitioner",
    "sklearn.datasets",
]


def fields(cache: Path) -> dict[str, Any]:
    """A job of half a second: three devices, two rounds."""
    return tiny_fields(cache, data={"split": "iid"})


def run(folder: Path, **more: Any) -> None:
    fleetfit.run(fields(folder / "cache") | more, folder / "run")


def outcome(folder: Path) -> Outcome:
    """All that a run leaves for its user, without what it cost in time and memory."""
    out = folder / "run"
    summary = json.loads((out / "summary.json").read_text())
    assert summary.pop("seconds").keys() >= {"reference", "refine", "finish"}
    summary.pop("cpu_seconds")
    summary.pop("peak_memory_bytes")
    summary.pop("from_cache")
    models = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("devices/*/model.*"))}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["cpu_seconds"]
    return summary, models, lines, (out / "cloud" / "front.csv").read_text().splitlines()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What a run that nobody stopped ends with."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    result = outcome(folder)
    assert len(result[1]) == 6
    assert [d["id"] for d in result[0]["devices"]] == ["small-1", "small-2", "large-1"]
    return result


def assert_goes_on(folder: Path, whole: Outcome) -> None:
    run(folder)
    for found, expected in zip(outcome(folder), whole, strict=True):
        assert found == expected


# -- seeds ------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_and_another_another(tmp_path: Path, whole: Outcome) -> None:
    torch.manual_seed(99)  # the global generator is nobody's business
    run(tmp_path / "same")
    assert outcome(tmp_path / "same") == whole
    run(tmp_path / "other", seed=1)
    summary, models, _, _ = outcome(tmp_path / "other")
    assert summary["devices"] != whole[0]["devices"]
    assert all(models[name] != whole[1][name] for name in models)


def test_a_warm_cache_changes_nothing(tmp_path: Path, whole: Outcome) -> None:
    run(tmp_path)
    os.rename(tmp_path / "run", tmp_path / "first")
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    run(tmp_path)
    assert outcome(tmp_path) == whole


# -- killed at a write ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing in the program may catch this."""


class Writes:
    """Counts the files that are written; stops the run at one of them, before or after it is there."""

    def __init__(self, at: int = 0, after: bool = False) -> None:
        self.at = at
        self.after = after
        self.paths: list[Path] = []
        self.real = files.write_atomically

    def __call__(self, path: Path, content: bytes | str) -> None:
        self.paths.append(path)
        if len(self.paths) == self.at and not self.after:
            raise Killed
        self.real(path, content)
        if len(self.paths) == self.at:
            raise Killed


def stopped_by(writes: Writes, patched: pytest.MonkeyPatch) -> None:
    for module in (checkpoints, runs_folder, model_folder):
        patched.setattr(module, "write_atomically", writes)


@pytest.fixture(scope="module")
def num_writes(tmp_path_factory: pytest.TempPathFactory) -> int:
    writes = Writes()
    with pytest.MonkeyPatch.context() as patched:
        stopped_by(writes, patched)
        run(tmp_path_factory.mktemp("writes"))
    names = [p.name for p in writes.paths]
    assert (names[0], names[-1]) == ("job.toml", "summary.json")
    assert len(names) > 60  # 3 models of 2 files, 18 memories, 20 steps with a line each, ...
    return len(names)


@pytest.mark.parametrize("place", range(9))
def test_killed_at_any_write(
    tmp_path: Path, whole: Outcome, num_writes: int, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """From the first write to the last; before it is there, and after."""
    number = 1 + place * (num_writes - 1) // 8
    with monkeypatch.context() as patched:
        stopped_by(Writes(number, after=place % 2 == 0), patched)
        with pytest.raises(Killed):
            run(tmp_path)
    assert_goes_on(tmp_path, whole)


def test_killed_at_many_writes_of_one_run(tmp_path: Path, whole: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it goes on: each time a little further."""
    killed = 0
    while True:
        with monkeypatch.context() as patched:
            stopped_by(Writes(4 * (killed + 1), killed % 2 == 0), patched)
            try:
                run(tmp_path)
                break
            except Killed:
                killed += 1
    assert killed > 5
    assert outcome(tmp_path) == whole


def test_killed_in_a_round_the_devices_do_not_train_twice(
    tmp_path: Path, whole: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One device of two has answered when the edge dies: it is asked again, and starts from where it was then."""
    real, seen = handler.handle, []

    def dies(state: Any, message: Any) -> Any:
        if (state.attributes.device_id, message.step) == ("small-2", 3):
            raise Killed
        seen.append((state.attributes.device_id, message.step))
        return real(state, message)

    with monkeypatch.context() as patched:
        patched.setattr(handler, "handle", dies)
        with pytest.raises(Killed):
            run(tmp_path)
    assert seen[-1] == ("small-1", 3)
    assert (tmp_path / "run" / "memory" / "small-1" / "3.safetensors").exists()
    assert_goes_on(tmp_path, whole)


# -- killed by the system ---------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
import fleetfit
from fleetfit.core import files

real = os.replace

def replace(source, target):
    # Killed before the file has its name, or right after.
    {when_before}
    real(source, target)
    {when_after}

files.os.replace = replace
fleetfit.run({fields!r}, {out!r})
"""


def in_a_process(script: Path) -> "multiprocessing.process.BaseProcess":
    """A process that has torch at hand, so that a kill costs no import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=runpy.run_path, args=(str(script),))
    process.start()
    return process


def write_script(folder: Path, at: str = "", before: bool = False) -> Path:
    kill = f"if str(target).endswith({at!r}): os.kill(os.getpid(), signal.SIGKILL)" if at else "pass"
    script = SCRIPT.format(
        when_before=kill if before else "pass",
        when_after="pass" if before else kill,
        fields=fields(folder / "cache"),
        out=str(folder / "run"),
    )
    path = folder / "script.py"
    path.write_text(script)
    return path


@pytest.mark.parametrize(
    ("at", "before"),
    [
        ("steps/refine/small/1.safetensors", True),
        ("memory/small-1/3.safetensors", False),  # in round 2, one device of two has answered
        ("memory/small-2/3.safetensors", True),
        ("devices/small-2/model.safetensors", False),
    ],
)
def test_sigkill_at_a_file(tmp_path: Path, whole: Outcome, at: str, before: bool) -> None:
    process = in_a_process(write_script(tmp_path, at, before))
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "run" / at).exists() is not before
    assert not (tmp_path / "run" / "summary.json").exists()
    assert_goes_on(tmp_path, whole)


def test_sigkill_again_and_again(tmp_path: Path, whole: Outcome) -> None:
    """At moments that nothing in the program knows of, each a little later, until it gets through."""
    script, killed = write_script(tmp_path), 0
    for attempt in range(100):
        process = in_a_process(script)
        process.join(0.3 * (attempt + 1))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        killed += 1
    assert process.exitcode == 0
    assert killed > 0
    assert outcome(tmp_path) == whole


def test_sigkill_of_the_command_line(tmp_path: Path, whole: Outcome) -> None:
    job, out = tmp_path / "job.toml", tmp_path / "run"
    job.write_text(tomli_w.dumps(fields(tmp_path / "cache")))
    command = [sys.executable, "-m", "fleetfit", "run", str(job), "--out", str(out), "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (out / "memory" / "small-2" / "1.safetensors").exists():
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    assert_goes_on(tmp_path, whole)
