"""The run folder: steps read back with their cost, memories of devices, one owner at a time."""

import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fleetfit.config.job import Job, make_job
from fleetfit.core import checkpoints
from fleetfit.core.checkpoints import Ledger, MemoryFolder, StepFolder
from fleetfit.core.encoding import encode
from fleetfit.core.files import read_json
from fleetfit.core.records import DataSummary, HeaderSpec, ValidationScores
from fleetfit.core.step_cache import StepCache
from fleetfit.edge.messages import ClusterReport, ClusterStats, StatsRequest
from fleetfit.edge.rounds import EdgeState
from fleetfit.runs import folder as runs_folder
from fleetfit.runs.folder import RunFolder

torch.set_num_threads(1)


def reply(value: float = 1.0) -> EdgeState:
    scores = ValidationScores(num_samples=1, loss_sum=value, num_correct=1)
    return EdgeState(scores=scores, tensors={"t": torch.full((3,), value)})


# -- steps ------------------------------------------------------------------------------------------------------------


def test_a_step_is_computed_once_and_its_cost_counted_once_in_each_run(tmp_path: Path) -> None:
    calls: list[int] = []

    def run() -> tuple[Ledger, EdgeState, list[tuple[str, dict[str, int]]]]:
        ledger, told = Ledger(), []
        steps = StepFolder(tmp_path, ledger, lambda name, cost, value: told.append((name, dict(cost.traffic))))
        ledger.traffic["up"] += 1000  # of something else, before

        def compute() -> EdgeState:
            calls.append(1)
            ledger.traffic["up"] += 5
            ledger.traffic["down"] += 7
            return reply(0.25)

        value = steps.step("refine/phones/1", EdgeState, compute)
        return ledger, value, told

    first, value, told = run()
    second, again, told_again = run()
    assert calls == [1]
    assert again.scores == value.scores == reply(0.25).scores
    assert torch.equal(again.tensors["t"], torch.full((3,), 0.25))
    assert first.traffic == second.traffic == Counter(up=1005, down=7)
    assert told == told_again == [("refine/phones/1", {"up": 5, "down": 7})]
    assert first.seconds["refine"] > 0
    assert second.seconds == first.seconds, "the seconds that it took, not those of reading it"
    assert (tmp_path / "refine" / "phones" / "1.safetensors").exists()


def test_phases_add_up(tmp_path: Path) -> None:
    ledger = Ledger()
    steps = StepFolder(tmp_path, ledger)
    for name in ("a/x", "a/y", "b/x"):
        steps.step(name, EdgeState, reply)
    assert set(ledger.seconds) == {"a", "b"}
    one = Ledger()
    StepFolder(tmp_path, one).step("a/x", EdgeState, reply)
    assert 0 < one.seconds["a"] < ledger.seconds["a"]


def test_wall_time_and_cpu_time_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step waits, the other computes on two threads; read back, both still say so."""
    wall, cpu = [0.0], [0.0]
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: wall[0])
    monkeypatch.setattr(checkpoints.time, "process_time", lambda: cpu[0])

    def taking(wall_time: float, cpu_time: float) -> Callable[[], EdgeState]:
        def compute() -> EdgeState:
            wall[0] += wall_time
            cpu[0] += cpu_time
            return reply()

        return compute

    for compute in (taking, lambda *_: never):
        ledger = Ledger()
        steps = StepFolder(tmp_path, ledger)
        steps.step("wait/a", EdgeState, compute(30.0, 1.0))
        steps.step("work/a", EdgeState, compute(10.0, 20.0))
        steps.step("work/b", EdgeState, compute(1.0, 0.0))
        assert ledger.seconds == {"wait": 30.0, "work": 11.0}
        assert ledger.cpu_seconds == ledger.known_cpu_seconds == {"wait": 1.0, "work": 20.0}


def test_steps_of_earlier_versions_do_not_say_their_cpu_time(tmp_path: Path) -> None:
    ledger = Ledger()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a.safetensors").write_bytes(encode(reply(), cost='{"seconds": 7.0, "traffic": {"up": 3}}'))
    with RunFolder(tmp_path / "run", Job()) as folder:
        steps = StepFolder(tmp_path, ledger, folder.steps.on_step)
        steps.step("old/a", EdgeState, never)
        steps.step("old/b", EdgeState, reply)
        steps.step("new/a", EdgeState, reply)
    assert (ledger.traffic, ledger.seconds["old"] >= 7.0) == ({"up": 3}, True)
    assert set(ledger.known_cpu_seconds) == {"new"}, "a part is not the whole"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["cpu_seconds" in line for line in lines] == [False, True, True]


def test_a_step_that_fails_leaves_nothing_and_runs_again(tmp_path: Path) -> None:
    steps = StepFolder(tmp_path, Ledger())

    def fail() -> EdgeState:
        raise RuntimeError("flux")

    with pytest.raises(RuntimeError, match="flux"):
        steps.step("a", EdgeState, fail)
    assert not list(tmp_path.rglob("*"))
    assert steps.step("a", EdgeState, reply).scores == reply().scores


def never() -> Any:
    raise AssertionError("the step is there: it must not be computed")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda blob: b"", "truncated"),
        (lambda blob: blob[:-1], "corrupt"),
        (lambda blob: blob[: len(blob) // 2], "truncated"),
        (lambda blob: b"\xff" * 300, "truncated or foreign"),
        (lambda blob: encode(StatsRequest(), cost="{}"), "is a 'stats_request', expected a 'edge_state'"),
        (lambda blob: encode(reply()), "does not say what it cost"),
        (lambda blob: encode(reply(), cost="no json"), "does not say what it cost"),
        (lambda blob: encode(reply(), cost="[1]"), "does not say what it cost"),
        (lambda blob: encode(reply(), cost='{"seconds": "long", "traffic": {}}'), "does not say what it cost"),
        (lambda blob: encode(reply(), cost='{"seconds": 1, "traffic": {"up": "much"}}'), "does not say what it cost"),
        (lambda b: encode(reply(), cost='{"seconds": 1, "cpu_seconds": [], "traffic": {}}'), "not say what it cost"),
        (lambda blob: encode(reply(), cost='{"seconds": 1, "traffic": 3}'), "does not say what it cost"),
    ],
)
def test_a_corrupt_step_names_its_file_and_counts_nothing(tmp_path: Path, damage: Any, says: str) -> None:
    StepFolder(tmp_path, Ledger()).step("a/b", EdgeState, reply)
    path = tmp_path / "a" / "b.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    ledger = Ledger()
    with pytest.raises(ValueError, match=says) as error:
        StepFolder(tmp_path, ledger).step("a/b", EdgeState, never)
    assert str(error.value).startswith(f"{path} (delete it to compute this step again) ")
    assert not ledger.traffic
    assert not ledger.seconds
    path.unlink()
    assert StepFolder(tmp_path, ledger).step("a/b", EdgeState, reply).scores == reply().scores


def test_a_ledger_tells_what_was_added_since() -> None:
    ledger = Ledger(Counter(up=3, down=1))
    before = ledger.traffic.copy()
    assert ledger.since(before) == {}
    ledger.traffic["up"] += 4
    ledger.traffic["sideways"] += 2
    assert ledger.since(before) == {"up": 4, "sideways": 2}


# -- memory of devices ------------------------------------------------------------------------------------------------


def test_the_last_two_memories_of_a_device_are_kept(tmp_path: Path) -> None:
    folder = MemoryFolder(tmp_path / "memory" / "phones-1")
    for step in range(5):
        folder.save(step, reply(float(step)))
    assert sorted(p.name for p in folder.folder.iterdir()) == ["3.safetensors", "4.safetensors"]
    for step in (3, 4):
        assert torch.equal(folder.load(step, EdgeState).tensors["t"], torch.full((3,), float(step)))
    # The message before the last is repeated after a kill: what it meets is still there afterwards.
    folder.save(4, reply(4.5))
    assert float(folder.load(4, EdgeState).scores.loss_sum) == 4.5
    assert folder.load(3, EdgeState).scores.loss_sum == 3.0


def test_the_memory_that_a_message_meets(tmp_path: Path) -> None:
    """Also when steps were missed, and when the message is repeated; a step that is over meets none."""
    folder = MemoryFolder(tmp_path)
    assert folder.before(1, EdgeState) is None
    for step in (1, 2, 5):
        folder.save(step, reply(float(step)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2.safetensors", "5.safetensors"]
    for step, met in ((5, 2), (6, 5), (9, 5)):
        memory = folder.before(step, EdgeState)
        assert memory is not None
        assert float(memory.tensors["t"][0]) == met
    for step in (1, 2, 4):
        with pytest.raises(ValueError, match=f"^step {step} is over: the device has come to 5$"):
            folder.before(step, EdgeState)
    folder.save(1, reply())  # another run begins
    assert [p.name for p in tmp_path.iterdir()] == ["1.safetensors"]


def test_a_memory_that_is_missing_or_corrupt_is_named(tmp_path: Path) -> None:
    folder = MemoryFolder(tmp_path)
    path = tmp_path / "7.safetensors"
    with pytest.raises(ValueError, match=r"7\.safetensors is missing: the run folder is damaged") as error:
        folder.load(7, EdgeState)
    assert str(path) in str(error.value)
    folder.save(7, StatsRequest())
    with pytest.raises(ValueError, match="is a 'stats_request'") as error:
        folder.load(7, EdgeState)
    assert str(path) in str(error.value)


# -- one owner --------------------------------------------------------------------------------------------------------


def test_a_run_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    job = Job()
    with RunFolder(tmp_path / "run", job):
        for other in (job, make_job({"seed": 1})):
            with pytest.raises(ValueError, match=r"run is in use by another fleetfit process$") as error:
                RunFolder(tmp_path / "run", other)
            assert str(tmp_path / "run") in str(error.value)
        RunFolder(tmp_path / "elsewhere", job).close()
    RunFolder(tmp_path / "run", job).close()


def test_another_process_is_kept_out_and_its_lock_dies_with_it(tmp_path: Path) -> None:
    code = (
        "import sys, os, pathlib\nfrom fleetfit.runs.folder import RunFolder\nfrom fleetfit.config.job import Job\n"
        "folder = RunFolder(pathlib.Path(sys.argv[1]), Job())\nprint('mine', flush=True)\n"
        "sys.stdin.read()\nos._exit(9)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match="in use by another"):
            RunFolder(tmp_path, Job())
    finally:
        process.stdin.close()
        assert process.wait() == 9
        process.stdout.close()
    RunFolder(tmp_path, Job()).close()


def begin(path: Path, job: Job) -> None:
    """A run that has finished a step."""
    RunFolder(path, job).close()
    (path / "steps").mkdir(exist_ok=True)
    (path / "steps" / "reference.safetensors").touch()


def test_a_job_that_came_to_nothing_may_be_mended(tmp_path: Path) -> None:
    RunFolder(tmp_path, Job()).close()
    RunFolder(tmp_path, make_job({"data": {"label_column": "team"}})).close()
    assert runs_folder.load_job(tmp_path / "job.toml").data.label_column == "team"


def test_asking_devices_what_they_are_is_no_beginning(tmp_path: Path) -> None:
    RunFolder(tmp_path, Job()).close()
    asked = tmp_path / "steps" / "attributes" / "phones.safetensors"
    asked.parent.mkdir(parents=True)
    asked.touch()
    fields = {"fleet": {"devices": [{"cluster": "phones", "storage_limit": "3 MB"}]}}
    RunFolder(tmp_path, make_job(fields)).close()
    assert not asked.exists()  # of devices that the job had before


def test_another_jobs_folder_names_the_keys_and_frees_the_lock(tmp_path: Path) -> None:
    begin(tmp_path, Job())
    saved = (tmp_path / "job.toml").read_bytes()
    other = make_job({"seed": 3, "refine": {"rounds": 5}, "model": {"config": {"hidden_size": 32}}})
    with pytest.raises(ValueError, match="holds the run of another job") as error:
        RunFolder(tmp_path, other)
    assert "(differs in model.config.hidden_size, refine.rounds, seed); choose another --out" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert (tmp_path / "job.toml").read_bytes() == saved
    how = {"run": {"threads": 2, "cache": "elsewhere"}, "links": {"quorum": 0.25}}
    with RunFolder(tmp_path, make_job(how)) as folder:
        assert folder.job.run.threads == 2  # how to run is no part of what is run
        assert folder.job.links.quorum == 0.25


def test_a_key_that_only_one_job_has_is_a_difference(tmp_path: Path) -> None:
    more = make_job({"model": {"config": {"qkv_bias": False}}})
    for name, first, second in (("a", more, Job()), ("b", Job(), more)):
        begin(tmp_path / name, first)
        with pytest.raises(ValueError, match=r"differs in model\.config\.qkv_bias\)"):
            RunFolder(tmp_path / name, second)


def test_a_damaged_job_frees_the_lock(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("= =")
    with pytest.raises(ValueError, match=r"job\.toml is not TOML"):
        RunFolder(tmp_path, Job())
    (tmp_path / "job.toml").unlink()
    RunFolder(tmp_path, Job()).close()


def test_the_saved_job_is_the_job(tmp_path: Path) -> None:
    job = make_job({"seed": 5, "backbone": {"widths": [0.5]}, "fleet": {"devices": [{"storage_limit": "3 KB"}]}})
    RunFolder(tmp_path, job).close()
    assert runs_folder.load_job(tmp_path / "job.toml") == job


def test_metrics_have_one_line_a_step_also_when_it_is_read_back(tmp_path: Path) -> None:
    for _ in range(2):
        with RunFolder(tmp_path, Job()) as folder:
            for name in ("a/x", "b/x"):
                folder.steps.step(name, EdgeState, reply)
            lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == ["a/x", "b/x"]
        assert lines[0]["scores"] == {"num_samples": 1, "loss_sum": 1.0, "num_correct": 1}
        assert lines[0]["bytes"] == {}


def test_what_a_step_took_is_in_its_line_also_of_an_edge_that_reports_seconds_of_its_own(tmp_path: Path) -> None:
    report = ClusterReport(
        cluster="x",
        header=HeaderSpec(),
        trials=(),
        similarity=(),
        distance=(),
        rounds=(),
        decision={},
        devices=(),
        traffic={"edge_to_device": 9},
        phase_seconds={"refine": 9.0},
        phase_cpu_seconds={"refine": 2.0},
    )
    with RunFolder(tmp_path, Job()) as folder:
        folder.steps.step("finish/x", ClusterReport, lambda: report)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert isinstance(line["seconds"], float)
    assert isinstance(line["cpu_seconds"], float)
    assert (line["traffic"], line["phase_seconds"]) == ({"edge_to_device": 9}, {"refine": 9.0})
    assert line["phase_cpu_seconds"] == {"refine": 2.0}


def test_tables_and_json(tmp_path: Path) -> None:
    with RunFolder(tmp_path, Job()) as folder:
        folder.write_table("cloud/t.csv", [{"a": 1, "b": 'x,"y"\n'}, {"a": 0.1, "b": ""}])
        with (tmp_path / "cloud" / "t.csv").open(newline="") as file:
            assert list(csv.DictReader(file)) == [{"a": "1", "b": 'x,"y"\n'}, {"a": "0.1", "b": ""}]
        folder.write_json("j.json", {"a": [1, None], "ü": 0.1})
        assert read_json(tmp_path / "j.json") == {"a": [1, None], "ü": 0.1}
        with pytest.raises(ValueError, match="not JSON compliant"):
            folder.write_json("j.json", {"a": float("nan")})
        assert read_json(tmp_path / "j.json") == {"a": [1, None], "ü": 0.1}


# -- the data of a run ------------------------------------------------------------------------------------------------


def data_of(*labels: str, fingerprint: str = "one", form: str = "") -> DataSummary:
    classes = {name: labels.count(name) for name in sorted(set(labels))}
    return DataSummary(
        source="a.csv",
        origin="a.csv",
        kind="text",
        num_rows=len(labels),
        num_samples=len(labels),
        classes=classes,
        fingerprint=fingerprint,
        form=form,
    )


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (data_of("cow", "pig", fingerprint="two"), "no longer the classes 'cat', 'dog', new classes 'cow', 'pig'"),
        (data_of("cat", fingerprint="two"), "2 samples before, 1 now, no longer the classes 'dog'"),
        (data_of("cat", "dog", fingerprint="two"), "2 samples as before, of other content"),
        (data_of("cat", "dog", form="else"), "the samples are the same, but not what they become as inputs"),
    ],
)
def test_a_run_whose_data_changed_is_refused_once_it_has_begun(tmp_path: Path, now: DataSummary, says: str) -> None:
    with RunFolder(tmp_path / "run", Job()) as folder:
        folder.claim_data(data_of("owl", "emu", fingerprint="never used"))
        folder.claim_data(data_of("cat", "dog"))  # nothing has been computed: it may still change
        folder.steps.step("a/b", ClusterStats, lambda: ClusterStats(devices=()))
        folder.claim_data(data_of("cat", "dog"))
        with pytest.raises(ValueError, match=r"the data of .*run changed since it began: ") as caught:
            folder.claim_data(now)
    assert says in str(caught.value)
    assert "put it back, or choose another --out, or begin anew here with --again" in str(caught.value)


def test_a_damaged_note_of_the_data_is_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", Job()) as folder:
        folder.steps.step("a/b", ClusterStats, lambda: ClusterStats(devices=()))
        (tmp_path / "run" / "data.json").write_text("{}")
        with pytest.raises(ValueError, match=r"data\.json is corrupt"):
            folder.claim_data(data_of("cat", "dog"))


# -- a cache ----------------------------------------------------------------------------------------------------------


def cached(folder: Path, name: str, value: float) -> float:
    steps = StepCache(folder)
    return steps.step(name, EdgeState, lambda: reply(value)).scores.loss_sum


def test_a_cache_is_used_again_and_says_of_what_it_is(tmp_path: Path) -> None:
    assert cached(tmp_path, "reference/a", 1.0) == 1.0
    assert cached(tmp_path, "reference/a", 2.0) == 1.0


@pytest.mark.parametrize("planted", ["file", "folder", "other", "damaged", "link"])
def test_what_somebody_planted_in_a_cache_is_not_used(tmp_path: Path, planted: str) -> None:
    cached(tmp_path, "reference/a", 1.0)
    path = tmp_path / "reference" / "a.safetensors"
    if planted == "other":
        cached(tmp_path, "reference/b", 3.0)
        path.write_bytes((tmp_path / "reference" / "b.safetensors").read_bytes())
    elif planted == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    elif planted == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        place = path if planted == "file" else path.parent
        place.chmod(place.stat().st_mode | 0o002)
    assert cached(tmp_path, "reference/a", 2.0) == 2.0
