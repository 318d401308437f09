"""What comes from outside and is wrong: limits, few samples, damaged files, full disks, interrupts. No traceback, ever.

Each test runs the command line on a job of a second: what a user would do, what a user would read.
"""

import csv
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from click.testing import Result
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits
from tiny_job import TINY_VIT, tiny_fields
from typer.testing import CliRunner

import fleetfit
from fleetfit import cli
from fleetfit.config.job import Job, make_job
from fleetfit.core import files
from fleetfit.core.progress import Progress
from fleetfit.engines import local
from fleetfit.runs import folder as runs_folder

GO_ON = "the same command goes on from the last finished step"


def fields(cache: Path) -> dict[str, Any]:
    """A job that takes about half a second: two clusters of two devices."""
    return tiny_fields(
        cache,
        {"small": 2, "large": 2},
        model={"config": {**TINY_VIT, "image_size": 8, "num_channels": 1}},
        backbone={"depths": [1, 2]},
        header={"search": "halving", "budget_steps": 20},
        refine={"rounds": 1, "guard": True},
    )


class Shell:
    """One job file, one run folder, and the command line."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.job = folder / "job.toml"
        self.out = folder / "run"
        self.cache = cache
        self.job.write_text(tomli_w.dumps(fields(cache)))

    def run(self, *sets: str, quiet: bool = True, options: Sequence[str] = ()) -> Result:
        arguments = ["run", str(self.job), "--out", str(self.out), *options, *(["--quiet"] if quiet else [])]
        return CliRunner().invoke(cli.app, [*arguments, *(a for s in sets for a in ("--set", s))])

    def error(self, *sets: str, code: int = 1) -> str:
        """Run, expect the exit code, and return what was said on stderr."""
        result = self.run(*sets)
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert "unexpected" not in result.stderr
        return result.stderr

    def models(self) -> dict[str, bytes]:
        return {p.parent.name: p.read_bytes() for p in sorted(self.out.glob("devices/*/model.safetensors"))}

    def fine(self, *sets: str, options: Sequence[str] = ()) -> dict[str, Any]:
        """Run, expect success, and return the summary."""
        result = self.run(*sets, options=options)
        assert result.exit_code == 0, result.output
        summary: dict[str, Any] = json.loads((self.out / "summary.json").read_text())
        return summary


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has its own tests."""
    monkeypatch.setattr(cli.run, "_build_report", lambda folder: folder / "report.html")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A finished run, never to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    fleetfit.run(fields(cache), folder / "run")
    return folder / "run"


@pytest.fixture
def shell(tmp_path: Path, cache: Path) -> Shell:
    return Shell(tmp_path, cache)


@pytest.fixture
def ran(shell: Shell, finished: Path) -> Shell:
    """A shell whose run is finished already."""
    shutil.copytree(finished, shell.out)
    return shell


# -- limits and samples -----------------------------------------------------------------------------------------------


def test_a_device_that_nothing_fits_is_left_out_and_named_and_if_that_is_all_it_is_an_error(shell: Shell) -> None:
    devices = '[{cluster="tiny", storage_limit="2 KB"}, {cluster="large", storage_limit="1 MB"}]'
    summary = shell.fine(f"fleet.devices={devices}")
    (left_out,) = summary["left_out"]
    with (shell.out / "devices.csv").open(newline="") as file:
        lines = {row["device"]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in lines.items()} == {"large-1": "finished", "tiny-1": "left out"}
    assert lines["large-1"]["size_bytes"] == str(summary["devices"][0]["size_bytes"])
    assert lines["tiny-1"]["accuracy"] == ""
    assert left_out["device_id"] == "tiny-1"
    assert "storage limit of 2000 bytes" in left_out["reason"]
    assert [d["id"] for d in summary["devices"]] == ["large-1"]


def test_limits_that_nothing_fits_name_cluster_limit_and_smallest(shell: Shell) -> None:
    said = shell.error('fleet.devices=[{cluster="tiny", storage_limit="2 KB"}]')
    assert "cluster 'tiny'" in said
    assert "storage limit of 2000 bytes" in said
    assert "smallest candidate, width 0.5 and depth 1" in said


def test_a_device_with_one_class(shell: Shell) -> None:
    assert len(shell.fine("data.classes_per_device=1")["devices"]) == 4


def test_many_devices_so_that_each_has_a_sample_or_two(shell: Shell) -> None:
    devices = '[{cluster="a", count=12, storage_limit="1 MB"}]'
    shares = ("data.public_share=0.5", "data.test_share=0.08", "data.edge_share=0.41", "data.split=iid")
    summary = shell.fine(f"fleet.devices={devices}", *shares)
    assert len(summary["devices"]) == 12
    assert len(shell.models()) == 12


def test_more_devices_than_samples(shell: Shell) -> None:
    said = shell.error('fleet.devices=[{cluster="a", count=2000, storage_limit="1 MB"}]')
    assert "fewer than the 2000 devices" in said
    assert "lower data.public_share" in said


@pytest.mark.parametrize("key", ["data.public_share", "data.edge_share"])
def test_no_samples_for_cloud_or_edges(shell: Shell, key: str) -> None:
    assert shell.error(f"{key}=0").startswith(f"error: {key}: ")


@pytest.mark.parametrize("key", ["data.test_share", "data.device_test_share"])
def test_shares_of_nothing(shell: Shell, key: str) -> None:
    """Nothing to report on is no reason to fail, nor to fail when going on."""
    shell.fine(f"{key}=0")
    assert "NaN" not in (shell.out / "summary.json").read_text()
    shell.fine(f"{key}=0")


# -- data of one's own ------------------------------------------------------------------------------------------------


def test_an_unknown_data_set_without_a_network(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("FLEETFIT_DATA", raising=False)
    said = shell.error("data.source=nobody/nothing")
    assert said.startswith("error: data.source = 'nobody/nothing' is no file or folder here, and could not be had from")
    assert "with HF_HUB_OFFLINE=1 nothing else is tried" in said
    assert "FLEETFIT_DATA or in data.root" in said


def test_a_local_copy_is_named_on_the_terminal(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = load_digits().images.astype("uint8") * 15
    rows = {"image": [{"bytes": png(p), "path": None} for p in pixels[:400]], "label": load_digits().target[:400]}
    (tmp_path / "copies" / "tiny").mkdir(parents=True)
    Dataset.from_dict(rows).to_parquet(str(tmp_path / "copies" / "tiny" / "train.parquet"))
    monkeypatch.setenv("FLEETFIT_DATA", str(tmp_path / "copies"))
    result = shell.run("data.source=someone/tiny", "data.split=iid", "data.input_column=image", quiet=False)
    assert result.exit_code == 0, result.output
    origin = f"the local copy {tmp_path / 'copies' / 'tiny'} (FLEETFIT_DATA)"
    assert re.search(rf"^. 400 images in 1 file, all used \({re.escape(origin)}\)$", result.stderr, re.MULTILINE)
    assert re.search(r"^. labels from column 'label' \(its name\)$", result.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "content", "sets", "says"),
    [
        ("a.csv", "text,label\nx,1\n", ["model.family=bert"], "all 1 samples are of one class, '1'"),
        ("a.csv", "text,label\nx,1\ny,\n", ["model.family=bert"], "1 of 2 labels are missing, the first in row 1"),
        ("a.csv", "text\nx\ny\n", ["model.family=bert"], "data.label_column must be given: no column holds labels"),
        ("a.csv", "text,label\nx,1\n ,2\n", ["model.family=bert"], "1 of 2 texts are empty, and data.empty_text_share"),
        ("a.csv", "text,label\nx,1\ny,2\n", [], "no column holds images; the model reads images"),
        ("a.csv", "", [], "a.csv is empty"),
        ("a.txt", "hello", [], "files must be images, or of one kind of "),
        ("train/a/x.png", "no image", [], "images cannot be read, and data.bad_image_share = 0.01 of all is the most"),
    ],
)
def test_data_that_is_wrong(shell: Shell, tmp_path: Path, name: str, content: str, sets: list[str], says: str) -> None:
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    if name.startswith("train/"):
        (tmp_path / "data" / "train" / "b").mkdir()
        (tmp_path / "data" / "train" / "b" / "y.png").write_text(content)
    source = tmp_path / "data" if "/" in name else path
    assert says in shell.error(f"data.source='{source}'", *sets)


# -- training that diverges -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "where"),
    [
        ("model.learning_rate", "reference"),
        ("backbone.learning_rate", "elastic training"),
        ("header.learning_rate", "header search"),
    ],
)
def test_a_loss_that_is_not_finite_says_where_and_what_to_do(shell: Shell, key: str, where: str) -> None:
    said = shell.error(f"{key}=1e30")
    assert said.startswith(f"error: {where}")
    assert "the loss became nan at step" in said
    assert "lower the learning rate" in said


def test_a_rate_that_no_device_takes_is_told_before_anything(shell: Shell) -> None:
    assert "refine.learning_rate must be <= 1000, got 1e+30" in shell.error("refine.learning_rate=1e30")


# -- damaged files ----------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4)


def foreign(path: Path) -> None:
    shutil.copy(path.parents[1] / "candidates" / "cloud.safetensors", path)


@pytest.mark.parametrize("damage", [cut, empty, noise, foreign])
def test_a_damaged_step_is_named_and_the_rest_stays_usable(ran: Shell, damage: Callable[[Path], None]) -> None:
    whole = ran.models()
    path = ran.out / "steps" / "header_search" / "large.safetensors"
    damage(path)
    said = ran.error()
    assert str(path) in said
    assert "delete it to compute this step again" in said
    assert len(said.splitlines()) <= 4
    path.unlink()
    ran.fine()
    assert ran.models() == whole


@pytest.mark.parametrize("damage", [cut, noise])
def test_a_damaged_cache_is_told_and_computed_again(
    shell: Shell,
    tmp_path: Path,
    cache: Path,
    finished: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = tmp_path / "cache"
    shutil.copytree(cache, own)
    kept = list(own.rglob("*.safetensors"))
    for path in kept:
        damage(path)
    shell.fine(f"run.cache='{own}'")
    named = [path for path in kept if f"{path} is not used, but computed again" in caplog.text]
    assert {path.parent.name for path in named} >= {"reference", "elastic", "candidates", "specialise", "header_search"}
    assert shell.models() == {p.parent.name: p.read_bytes() for p in finished.glob("devices/*/model.safetensors")}
    before = [path.read_bytes() for path in named]
    caplog.clear()
    shell.fine(f"run.cache='{own}'")
    assert [path.read_bytes() for path in named] == before
    assert "computed again" not in caplog.text


def test_a_lost_memory_of_a_device_is_named(ran: Shell) -> None:
    shutil.rmtree(ran.out / "memory" / "small-2")
    said = ran.error()
    assert str(ran.out / "memory" / "small-2") in said
    assert "damaged" in said


def test_a_whole_model_loads_and_answers(finished: Path) -> None:
    model = fleetfit.load(finished / "devices" / "small-1")
    assert not model.training
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize("damage", [cut, empty, noise])
@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_damaged_model_is_named(ran: Shell, name: str, damage: Callable[[Path], None]) -> None:
    path = ran.out / "devices" / "small-1" / name
    damage(path)
    with pytest.raises(ValueError, match=name):
        fleetfit.load(path.parent)


def test_a_folder_that_is_no_device(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no device folder: .*model\.json is missing"):
        fleetfit.load(tmp_path)


def test_a_damaged_job_in_the_run_folder_is_named(ran: Shell) -> None:
    (ran.out / "job.toml").write_text("not = = toml")
    assert f"{ran.out / 'job.toml'} is not TOML" in ran.error()


# -- the run folder ---------------------------------------------------------------------------------------------------


def test_another_jobs_folder(ran: Shell) -> None:
    before = ran.models()
    said = ran.error("seed=1", "refine.rounds=2")
    assert "holds the run of another job (differs in refine.rounds, seed)" in said
    assert "choose another --out" in said
    assert ran.models() == before


def test_a_folder_is_begun_anew_and_what_was_there_is_kept(ran: Shell) -> None:
    before = ran.models()
    ran.fine("refine.rounds=3", options=("--again",))
    kept = ran.out.with_name(f"{ran.out.name}.before-1")
    assert {p.parent.name: p.read_bytes() for p in kept.glob("devices/*/model.safetensors")} == before
    found = json.loads((ran.out / "summary.json").read_text())["from_cache"]
    assert found == ["candidates", "elastic", "header_search", "reference", "specialise"]
    with_cache = ran.models()
    shutil.rmtree(ran.out)
    ran.fine("refine.rounds=3", f"run.cache='{ran.out.parent / 'fresh'}'")
    assert ran.models() == with_cache


def test_a_folder_is_gone_on_with_under_other_run_settings(ran: Shell) -> None:
    before = ran.models()
    ran.fine("run.cache='/nowhere'")
    assert ran.models() == before


def test_two_runs_in_one_folder(shell: Shell, cache: Path) -> None:
    with runs_folder.RunFolder(shell.out, make_job(fields(cache))):
        assert "is in use by another fleetfit process" in shell.error()
    shell.fine()


def test_a_file_in_place_of_the_folder(shell: Shell) -> None:
    shell.out.write_text("I was here first")
    assert str(shell.out) in shell.error()
    assert shell.out.read_text() == "I was here first"


def test_a_file_in_place_of_the_cache(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = shell.error(f"run.cache='{tmp_path / 'file'}'", "seed=77")
    assert str(tmp_path / "file") in said


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_that_cannot_be_written(shell: Shell, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        said = shell.error()
    finally:
        tmp_path.chmod(0o700)
    assert "Permission denied" in said


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_keeps_what_was_finished(
    shell: Shell, finished: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.replace

    def full(source: str, target: Path) -> None:
        if "header_search" in str(target):
            raise OSError(code, os.strerror(code), str(target))
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", full)
        said = shell.error()
    assert os.strerror(code) in said
    assert "what was finished stays" in said
    assert GO_ON in said
    assert (shell.out / "steps" / "elastic" / "cloud.safetensors").exists()
    assert not list(shell.out.rglob(".*.safetensors.*")), "a temporary file was left behind"
    shell.fine()
    assert shell.models() == Shell.models(_at(finished))


def _at(finished: Path) -> Shell:
    other = Shell.__new__(Shell)
    other.out = finished
    return other


# -- interrupts -------------------------------------------------------------------------------------------------------

PHASES = ["data", "reference", "elastic training", "specialise", "header search", "refine"]


@pytest.fixture
def stop_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, BaseException], None]:
    real = local.run

    def arrange(at: str, error: BaseException) -> None:
        def run(job: Job, out: str | Path, progress: Progress) -> dict[str, Any]:
            def stopping(phase: str, done: int, total: int, note: str = "") -> None:
                progress(phase, done, total, note)
                if phase == at:
                    raise error

            return real(job, out, stopping)

        monkeypatch.setattr(local, "run", run)

    return arrange


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_in_any_phase_and_on_again(
    shell: Shell, finished: Path, tmp_path: Path, phase: str, stop_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = f"run.cache='{tmp_path / 'cache'}'"
    with monkeypatch.context():
        stop_in(phase, KeyboardInterrupt())
        result = shell.run(own)
        assert result.exit_code == 130
        assert result.stderr == f"stopped; {GO_ON}\n"
    monkeypatch.undo()
    monkeypatch.setattr(cli.run, "_build_report", lambda folder: folder / "report.html")
    shell.fine(own)
    assert shell.models() == Shell.models(_at(finished))


def test_an_unexpected_error_says_its_kind_and_how_to_see_more(shell: Shell, stop_in: Any) -> None:
    stop_in("refine", RuntimeError("flux"))
    result = shell.run()
    assert result.exit_code == 1
    assert result.stderr == "error: unexpected RuntimeError: flux\nrun again with --debug for the traceback\n"
    arguments = ["run", str(shell.job), "--out", str(shell.out), "--quiet", "--debug"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "flux" in result.stderr
