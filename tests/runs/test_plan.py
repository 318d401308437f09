"""What would happen is told before it happens: sizes to the byte, all problems at once, and nothing is written."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_job import tiny_fields
from typer.testing import CliRunner

import fleetfit
from fleetfit.cli import app
from fleetfit.config.job import make_job
from fleetfit.runs.estimates import Enough, Watch
from fleetfit.runs.plan import Plan, make_plan


def job_of(tmp_path: Path, **changed: Any) -> Any:
    return make_job(tiny_fields(tmp_path / "cache", **changed))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    folder = tmp_path_factory.mktemp("planned")
    job = job_of(folder)
    found = make_plan(job, estimate=False)
    fleetfit.run(job, folder / "run")
    return found, folder / "run"


def test_sizes_are_those_of_the_run_to_the_byte(ran: tuple[Plan, Path]) -> None:
    found, run = ran
    lines = (run / "cloud" / "front.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    for cluster in found.clusters:
        measured = {
            (float(r["width"]), int(r["depth"])): int(r["size_bytes"])
            for r in rows
            if r["cluster"] == cluster.id and r["fits"] == "True"
        }
        assert {(s.shape.width, s.shape.depth): s.size_bytes for s in cluster.shapes} == measured
        assert [s.size_bytes for s in cluster.shapes] == sorted(measured.values())


def test_devices_are_those_of_the_run(ran: tuple[Plan, Path]) -> None:
    found, run = ran
    summary = json.loads((run / "summary.json").read_text())
    assert [(d.id, d.cluster, d.limit_bytes) for d in found.devices] == [
        (d["id"], d["cluster"], d["limit_bytes"]) for d in summary["devices"]
    ]
    assert all(d.train_samples and d.classes and not d.problem for d in found.devices)
    assert not found.problems


def test_all_problems_are_found_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    job = job_of(
        tmp_path,
        fleet={"devices": [{"count": 2, "cluster": "tiny", "storage_limit": "2 KB"}]},
        data={"edge_share": 0.0005},
    )
    found = make_plan(job)
    assert [p for p in found.problems if p.startswith("data.edge_share: 1 edges need at least 2 shared samples")]
    assert [p for p in found.problems if "nothing fits any device (cluster 'tiny': storage limit of 2000 bytes" in p]
    assert not found.phases
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_device_that_nothing_fits_is_named_and_is_no_problem_of_the_run(tmp_path: Path) -> None:
    devices = [
        {"cluster": "tiny", "storage_limit": "2 KB"},
        {"cluster": "large", "storage_limit": "1 MB", "count": 2},
    ]
    found = make_plan(job_of(tmp_path, fleet={"devices": devices}), estimate=False)
    assert not found.problems
    assert [d.id for d in found.devices if "storage limit of 2000 bytes" in d.problem] == ["tiny-1"]
    assert any("tiny-1" in note for note in found.notes)


def test_data_that_cannot_be_read_does_not_hide_the_fleet(tmp_path: Path) -> None:
    found = make_plan(job_of(tmp_path, data={"source": str(tmp_path / "nothing-here")}))
    assert found.problems
    assert found.data is None
    assert [d.train_samples for d in found.devices] == [None] * len(found.devices)


def test_every_phase_is_estimated(tmp_path: Path) -> None:
    found = make_plan(job_of(tmp_path))
    assert [p.phase for p in found.phases] == [
        *("reference", "elastic", "candidates", "specialise", "header_search", "refine")
    ]
    assert found.seconds > 0
    assert found.peak_memory_bytes is not None
    assert found.peak_memory_bytes > 10**8
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_watch_ends_what_takes_long_and_counts_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("fleetfit.runs.estimates.time.perf_counter", lambda: now[0])
    watch = Watch()
    now[0] += 5.0  # what comes before the first step
    for step in range(1, 100):
        now[0] += 3.0 if step == 1 else 0.25
        try:
            watch(step, 1000, "")
        except Enough:
            break
    assert step == 5  # at least four, then as soon as the time is over
    assert watch.seconds() == pytest.approx(8.0 + 0.25 * 1000)


def test_the_command_says_so_by_its_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(job_of(tmp_path).to_toml())
    fine = CliRunner().invoke(app, ["plan", str(path), "--no-estimate", "--json"])
    assert fine.exit_code == 0
    assert json.loads(fine.stdout)["problems"] == []
    wrong = CliRunner().invoke(app, ["plan", str(path), "--no-estimate", "-s", "data.edge_share=0.0005"])
    assert wrong.exit_code == 1
    assert "problem: data.edge_share" in wrong.stdout
