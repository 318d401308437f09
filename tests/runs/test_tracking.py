"""Trackers are told losses and results; whatever is wrong with one, the run goes on and says so."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_job import tiny_fields

import fleetfit
from fleetfit.config.job import Job, make_job
from fleetfit.runs import tracking as module
from fleetfit.runs.tracking import parameters, tracking


def run(tmp_path: Path, track: str) -> tuple[dict[str, Any], list[str]]:
    fields = tiny_fields(tmp_path / "cache")
    fields["run"]["track"] = track
    told: list[str] = []
    summary = fleetfit.run(fields, tmp_path / "run", lambda phase, done, total, note="": told.append(note))
    return summary, [line for line in told if line.startswith("run.track")]


def test_tensorboard_has_losses_and_results(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary, told = run(tmp_path, "tensorboard")
    assert told == []
    read = EventAccumulator(str(tmp_path / "run" / "tracking"))
    read.Reload()
    names = read.Tags()["scalars"]
    assert {"reference/loss", "elastic_training/loss"} <= set(names)
    for device in summary["devices"]:
        (event,) = read.Scalars(f"device/{device['id']}/accuracy")
        assert event.value == pytest.approx(device["accuracy"], abs=1e-6)


def test_mlflow_keeps_its_files_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    summary, told = run(tmp_path, "mlflow")
    assert told == []
    (found,) = mlflow.search_runs(experiment_names=["fleetfit"], output_format="list")
    mean = sum(d["accuracy"] for d in summary["devices"]) / len(summary["devices"])
    assert found.data.metrics["devices/accuracy_fleetfit"] == pytest.approx(mean)
    assert found.data.params["refine.rounds"] == "2"
    assert (tmp_path / "run" / "tracking").is_dir()


def test_a_run_that_fails_does_not_stay_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fields = tiny_fields(tmp_path / "cache", data={"edge_share": 0.0005})
    fields["run"]["track"] = "mlflow"
    with pytest.raises(ValueError, match="edge_share"):
        fleetfit.run(fields, tmp_path / "run")
    (found,) = mlflow.search_runs(experiment_names=["fleetfit"], output_format="list")
    assert found.info.status == "FAILED"


class Fake:
    def __init__(self, job: Job, out: Path) -> None:
        self.values: dict[str, float] = {}
        self.closed = False

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.values |= values

    def close(self, failed: bool) -> None:
        self.closed = True


class Away(Fake):
    def log(self, values: Mapping[str, float], step: int) -> None:
        raise ConnectionError("nobody at 10.0.0.1\nand more")


class NoStart(Fake):
    def __init__(self, job: Job, out: Path) -> None:
        raise RuntimeError("no room")


def test_one_that_cannot_be_reached_is_told_once_and_the_models_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.TRACKERS, "trackio", Away)
    summary, told = run(tmp_path / "a", "trackio")
    assert told == ["run.track = 'trackio': ConnectionError: nobody at 10.0.0.1; the run goes on without"]
    monkeypatch.setitem(module.TRACKERS, "trackio", NoStart)
    _, told = run(tmp_path / "b", "trackio")
    assert told == ["run.track = 'trackio': RuntimeError: no room; the run goes on without"]
    plain, _ = run(tmp_path / "c", "")
    assert [d["accuracy"] for d in plain["devices"]] == [d["accuracy"] for d in summary["devices"]]
    for name in ("a", "b"):
        for path in (tmp_path / "c" / "run" / "devices").rglob("model.safetensors"):
            same = tmp_path / name / "run" / path.relative_to(tmp_path / "c" / "run")
            assert same.read_bytes() == path.read_bytes()


def test_one_that_is_not_installed_is_told_with_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    _, told = run(tmp_path, "trackio")
    assert told == [
        "run.track = 'trackio' is not installed (pip install \"fleetfit[trackio]\"); the run goes on without"
    ]


def test_curves_have_a_hundred_points_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Fake] = []
    monkeypatch.setitem(module.TRACKERS, "trackio", lambda job, out: made.append(Fake(job, out)) or made[0])
    steps: list[int] = []
    with tracking(make_job({"run": {"track": "trackio"}}), tmp_path, lambda *_: None) as tracked:
        monkeypatch.setattr(made[0], "log", lambda values, step: steps.append(step))
        for step in range(1, 5001):
            tracked("reference", step, 5000, f"epoch 1, loss {1 / step:.3f}, rate 1e-3")
    assert 90 <= len(steps) <= 102
    assert steps[-1] == 5000
    assert made[0].closed


def test_it_is_no_part_of_what_is_run() -> None:
    assert "run.track" not in json.dumps(make_job({}).model_dump(mode="json", exclude={"run"}))
    assert parameters(make_job({}))["refine.rounds"] == "10"
    with pytest.raises(ValueError, match=r"run\.track must be one of"):
        make_job({"run": {"track": "wandbb"}})
