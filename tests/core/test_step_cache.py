"""The cache of steps: what did not change is taken, what did is computed and said why, and nothing wrong is used."""

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import tiny_fields

import fleetfit
from fleetfit.config.job import Job, load_job, make_job, narrowed, reads_of
from fleetfit.core import checkpoints, step_cache
from fleetfit.core.checkpoints import TrainingState
from fleetfit.core.files import read_json
from fleetfit.core.step_cache import StepCache, cached, code_of, content_of, entries, runs_of, shrink

Told = list[tuple[str, str]]


def kept(value: float) -> TrainingState:
    return TrainingState(step=1, seconds=value, tensors={"x": torch.full((1000,), value)})


def get(cache: StepCache, value: float, phase: str = "elastic", **reads: Any) -> float:
    return cached(cache, phase, reads, TrainingState, lambda bookmark: kept(value)).seconds


def telling(folder: Path, **options: Any) -> tuple[StepCache, Told]:
    told: Told = []
    return StepCache(folder, tell=lambda phase, done, total, note="": told.append((phase, note)), **options), told


def test_what_reads_the_same_is_taken_and_what_does_not_says_why(tmp_path: Path) -> None:
    cache, told = telling(tmp_path)
    assert get(cache, 1.0, steps=5, data="a") == 1.0
    assert told == []  # there was nothing: nothing to say
    cache, told = telling(tmp_path)
    assert get(cache, 2.0, steps=5, data="a") == 1.0
    assert told == [("cache", "elastic: taken from the cache")]
    assert get(cache, 3.0, steps=6, data="a") == 3.0
    assert get(cache, 4.0, steps=7, data="b") == 4.0
    assert told[1:] == [
        ("cache", "elastic: computed, as what the cache has differs in steps"),
        ("cache", "elastic: computed, as what the cache has differs in data, steps"),
    ]
    assert get(cache, 5.0, "candidates", steps=5, data="a") == 5.0  # another phase


def test_a_content_is_of_fields_and_tensors() -> None:
    assert content_of(kept(1.0)) == content_of(kept(1.0)) != content_of(kept(2.0))
    one, two = kept(1.0), kept(1.0)
    two.tensors["x"][3] = 7
    assert content_of(one) != content_of(two)
    short = TrainingState(step=1, seconds=1.0, tensors={"x": torch.full((1000,), 1.0, dtype=torch.bfloat16)})
    assert content_of(short) != content_of(one)


def test_code_of_a_package_changes_with_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_of("method") == code_of("method") != code_of("models")
    (tmp_path / "a.py").write_text("x = 1")
    monkeypatch.setattr(step_cache.resources, "files", lambda name: tmp_path)
    hashes = []
    for text in ("x = 1", "x = 2"):
        (tmp_path / "a.py").write_text(text)
        code_of.cache_clear()
        hashes.append(code_of("method"))
    code_of.cache_clear()
    assert hashes[0] != hashes[1]


def test_a_narrowed_job_has_these_keys_and_no_others() -> None:
    job = make_job({"seed": 3, "backbone": {"steps": 7, "gamma_p": 0.5}, "header": {"views": 2}, "run": {"threads": 2}})
    narrow = narrowed(job, ("seed", "backbone.steps"))
    assert (narrow.seed, narrow.backbone.steps, narrow.run.threads) == (3, 7, 2)
    assert narrow.backbone.gamma_p == Job().backbone.gamma_p
    assert narrow.header == Job().header
    assert narrowed(job, ("header",)).header == job.header
    assert reads_of(job, ("seed", "backbone.steps", "header.views")) == {
        "seed": 3,
        "backbone.steps": 7,
        "header.views": 2,
    }


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:20], lambda b: os.urandom(len(b)), lambda b: b""])
def test_a_damaged_entry_is_computed_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    get(StepCache(tmp_path), 1.0, steps=5)
    (entry,) = entries(tmp_path)
    entry.path.write_bytes(damage(entry.path.read_bytes()))
    assert get(StepCache(tmp_path), 2.0, steps=5) == 2.0
    assert get(StepCache(tmp_path), 3.0, steps=5) == 2.0


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(step_cache, "write_atomically", full)
        assert get(StepCache(tmp_path), 1.0, steps=5) == 1.0
    assert "is not kept in the cache: No space left on device" in caplog.text
    assert list(entries(tmp_path)) == []


def test_beyond_the_limit_what_was_used_longest_ago_goes_and_what_is_used_stays(tmp_path: Path) -> None:
    for number in range(5):
        get(StepCache(tmp_path), float(number), steps=number)
    for age, entry in enumerate(sorted(entries(tmp_path), key=lambda e: str(e.path))):
        os.utime(entry.path, (1000 + age, 1000 + age))
    oldest, second, *rest = sorted(entries(tmp_path), key=lambda e: e.used)
    size = oldest.size_bytes
    with oldest.path.open("rb") as file:  # as a run in progress does
        step_cache.fcntl.flock(file, step_cache.fcntl.LOCK_SH)
        gone = shrink(tmp_path, 4 * size + size // 2)
    assert [e.path for e in gone] == [second.path]
    assert {e.path for e in entries(tmp_path)} == {oldest.path, *(e.path for e in rest)}
    assert [e.path for e in shrink(tmp_path, 0)] == [oldest.path, *(e.path for e in rest)]


def test_a_cache_keeps_within_its_limit_by_itself(tmp_path: Path) -> None:
    get(StepCache(tmp_path), 1.0, steps=1)
    (first,) = entries(tmp_path)
    os.utime(first.path, (1000, 1000))
    cache = StepCache(tmp_path, limit_bytes=first.size_bytes)
    get(cache, 2.0, steps=2)
    (left,) = entries(tmp_path)
    assert left.path != first.path  # it is in use, though the two are more than the limit


def test_it_is_known_which_runs_use_what(tmp_path: Path) -> None:
    runs = [tmp_path / "run a", tmp_path / "run b"]
    for run in runs:
        run.mkdir()
        for _ in range(2):
            get(StepCache(tmp_path / "cache", run=run), 1.0, steps=1)
    (entry,) = entries(tmp_path / "cache")
    assert runs_of(entry.path) == [str(run) for run in runs]
    runs[0].rmdir()
    assert runs_of(entry.path) == [str(runs[1])]
    assert step_cache.clear(entry)
    assert list((tmp_path / "cache" / "elastic").iterdir()) == []


def _one(folder: Path) -> float:
    return get(StepCache(folder, limit_bytes=10**7), 1.0, steps=1)


def test_two_processes_at_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_one, [tmp_path] * 6) == [1.0] * 6
    assert len(list(entries(tmp_path))) == 1


# -- a whole run ------------------------------------------------------------------------------------------------------

EVERY = {"reference", "elastic", "candidates", "specialise", "header_search"}
FLEET = {"devices": [{"count": 2, "cluster": "small", "storage_limit": "100 KB"}]}
MORE = {"devices": [{"count": 3, "cluster": "small", "storage_limit": "100 KB"}]}
CHANGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "refine": ({"refine": {"rounds": 1, "epochs": 2, "guard": False}}, EVERY),
    "limit": ({"fleet": {"devices": [{**FLEET["devices"][0], "storage_limit": "200 KB"}]}}, EVERY - {"header_search"}),
    "header": ({"header": {"search": "linear", "budget_steps": 5, "views": 1}}, EVERY - {"header_search"}),
    "gamma": ({"backbone": {"gamma_p": 0.3, "choice": "greedy_accuracy"}}, {"reference", "elastic", "candidates"}),
    "steps": ({"backbone": {"steps": 3}}, {"reference"}),
    "seed": ({"seed": 4}, set()),
    "shift": ({"model": {"shift_pixels": 0}}, set()),
}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("first")
    summary = fleetfit.run(tiny_fields(folder / "cache", fleet=FLEET), folder / "run")
    return folder, summary


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_job_computes_what_changed_and_gives_what_computing_all_gives(
    name: str, first: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = first
    change, taken = CHANGES[name]
    sections = {"fleet": FLEET, **change}
    summary = fleetfit.run(tiny_fields(folder / "cache", **sections), tmp_path / "run")
    assert set(summary["from_cache"]) >= taken
    if name in ("refine", "limit", "header", "steps", "seed"):
        assert set(summary["from_cache"]) == taken
    fresh = fleetfit.run(tiny_fields(tmp_path / "cache", **sections), tmp_path / "fresh")
    assert fresh["from_cache"] == []
    assert {k: fresh[k] for k in ("reference", "clusters", "devices")} == {
        k: summary[k] for k in ("reference", "clusters", "devices")
    }


def test_one_more_device_trains_nothing_in_the_cloud(first: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, before = first
    summary = fleetfit.run(tiny_fields(folder / "cache", fleet=MORE), tmp_path / "run")
    assert {"reference", "elastic", "candidates", "specialise"} <= set(summary["from_cache"])
    assert [c["size_bytes"] for c in summary["clusters"]] == [c["size_bytes"] for c in before["clusters"]]


def test_a_run_says_what_it_took_and_from_where(first: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, before = first
    assert before["from_cache"] == []
    fleetfit.run(tiny_fields(folder / "cache", fleet=FLEET, refine={"rounds": 1}), tmp_path / "run")
    files = read_json(tmp_path / "run" / "from_cache.json")
    assert set(files) == EVERY
    for paths in files.values():
        for path in paths:
            assert str(tmp_path / "run") in runs_of(Path(path))
    assert load_job(tmp_path / "run" / "job.toml").refine.rounds == 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("phase", ["elastic", "specialise"])
def test_a_training_in_a_step_that_was_killed_is_resumed_to_the_last_bit(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(name: str) -> dict[str, Any]:
        backbone = {"steps": 40, "specialise_steps": 30, "batch_size": 200, "widths": [0.5, 1.0]}
        return tiny_fields(tmp_path / name, fleet=FLEET, backbone=backbone)

    def models(run: Path) -> dict[str, bytes]:
        return {p.parent.name: p.read_bytes() for p in run.glob("devices/*/model.safetensors")}

    fleetfit.run(job("whole"), tmp_path / "one")
    monkeypatch.setattr(checkpoints, "KEEP_TRAINING_SECONDS", 0.0)
    real, saved = checkpoints.TrainingFile.save, []

    def dies(self: checkpoints.TrainingFile, state: TrainingState) -> None:
        real(self, state)
        if self.path.parent.name == phase:
            saved.append(state.step)
            if len(saved) == 2:
                raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.TrainingFile, "save", dies)
        with pytest.raises(Killed):
            fleetfit.run(job("killed"), tmp_path / "two")
    (left,) = (tmp_path / "killed" / phase).glob("*.training.safetensors")
    steps: list[int] = []
    told = {"elastic": "elastic training", "specialise": "specialise"}[phase]
    fleetfit.run(job("killed"), tmp_path / "two", lambda p, done, *_: steps.append(done) if p == told else None)
    assert next(s for s in steps if s) == saved[-1] + 1
    assert not left.exists()
    assert models(tmp_path / "two") == models(tmp_path / "one")
