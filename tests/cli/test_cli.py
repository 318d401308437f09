"""The command line as a user meets it: help, output streams, exit codes, signals, speed. The engine is a stand-in."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fleetfit
from fleetfit import cli, engines
from fleetfit.cli import terminal
from fleetfit.config.explain import explained_toml
from fleetfit.config.job import Job, load_job, make_job
from fleetfit.config.profiles import find_profile, ready_profiles
from fleetfit.core.progress import Progress
from fleetfit.core.records import BackboneShape
from fleetfit.data.tables import READERS
from fleetfit.device import profiling
from fleetfit.engines import local
from fleetfit.engines.simulation import run as simulation
from fleetfit.engines.simulation.ray_nodes import Resources
from fleetfit.models.families import FAMILIES

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "recipes" / "digits.toml"
PROGRAM = [sys.executable, "-m", "fleetfit"]

SUMMARY: dict[str, Any] = {
    "method": "fleetfit",
    "seed": 0,
    "reference": {"accuracy": 0.9511, "parameters": 123456},
    "clusters": [
        {"id": "phones", "limit_bytes": 120_000, "width": 0.5, "depth": 2, "header": "blocks"},
        {"id": "servers", "limit_bytes": 1_000_000, "width": 1.0, "depth": 6, "header": "linear"},
    ],
    "devices": [
        {"id": "phones-1", "cluster": "phones", "size_bytes": 99_900},
        {"id": "phones-2", "cluster": "phones", "size_bytes": 80_000},
        {"id": "servers-1", "cluster": "servers", "size_bytes": 812_345},
    ],
}
ACCURACIES = [(0.5, 0.6, 0.7), (0.7, 0.8, 0.9), (None, None, None)]
for _device, _values in zip(SUMMARY["devices"], ACCURACIES, strict=True):
    _device.update(zip(("accuracy_coarse", "accuracy_local", "accuracy"), _values, strict=True))
    _device |= {"parameters": 5, "limit_bytes": 10**6, "notes": []}
MEASURED = {"parameters": 5, "size_bytes": 9, "energy_joules": 1.0, "loss": 0.5, "accuracy": 0.9}
SUMMARY["clusters"] = [cluster | MEASURED for cluster in SUMMARY["clusters"]]
SUMMARY |= {"traffic": {}, "seconds": {}, "absent": [], "left_out": []}


def fake_run(job: Job, out: str | Path, progress: Progress) -> dict[str, Any]:
    """The engine's calls of the callback, thousands of them, and nothing else."""
    progress("data", 0, 1, "digits")
    progress("data", 1, 1, "1797 samples")
    for i in range(1, 2001):
        progress("reference", i, 2000, f"loss {1 / i:.3f}")
    for cluster in ("phones", "servers"):
        for i in range(1, 23):  # some steps more than announced
            progress("header search", i, 20, f"{cluster}: rung {i}")
        progress("refine", 0, 2, f"{cluster}: coarse model")
        progress("refine", 2, 2, f"{cluster}: done")
    return SUMMARY


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "run", fake_run)
    monkeypatch.setattr(profiling, "MOST_REPEATS", 2)
    monkeypatch.setattr(cli.run, "_build_report", lambda folder: folder / "report.html")

    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(cli.app, [str(a) for a in arguments])

    return invoke


# -- run --------------------------------------------------------------------------------------------------------------


def test_run_prints_the_summary_on_stdout_and_progress_on_stderr(shell: Any) -> None:
    result = shell("run", RECIPE)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["phones", "2", "120", "KB", "99.9", "KB", "0.5", "×", "2", "blocks", "60.0%", "70.0%", "80.0%"] in rows
    assert ["servers", "1", "1", "MB", "812", "KB", "1", "×", "6", "linear", "–", "–", "–"] in rows
    assert ["all", "3", "60.0%", "70.0%", "80.0%"] in rows
    assert "95.1%" in result.stdout
    assert "page:    runs/digits/report.html" in result.stdout
    assert "All 3 devices have a model within their storage; mean accuracy 80.0" in " ".join(result.stdout.split())
    assert "fleetfit export runs/digits --device phones-1" in result.stdout
    assert "fleetfit.load('runs/digits/devices/phones-1')" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if not line.startswith("use:"))
    assert "reference ..." in result.stderr
    assert "summary" not in result.stderr


def test_a_name_of_nine_letters_stays_on_one_line_of_80_columns(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fleet of recipes/vit-base.toml."""
    cluster = {"id": "cluster10", "limit_bytes": 3_250_000, "width": 0.75, "depth": 3, "header": "pooled"} | MEASURED
    device = SUMMARY["devices"][0] | {"id": "cluster10-1", "cluster": "cluster10", "size_bytes": 1_330_000}
    summary = SUMMARY | {"clusters": [cluster], "devices": [device]}
    monkeypatch.setattr(local, "run", lambda job, out, progress: summary)
    lines = shell("run", RECIPE).stdout.splitlines()
    assert any(line.split()[:4] == ["cluster10", "1", "3.25", "MB"] for line in lines)


@pytest.mark.parametrize(
    ("options", "resources"),
    [
        ((), Resources(num_cpus=3.0)),
        (("--num-cpus", "0.5", "--num-gpus", "0.25", "--address", "auto"), Resources(0.5, 0.25, "auto")),
    ],
)
def test_the_simulation_is_told_what_a_device_takes(
    shell: Any, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], resources: Resources
) -> None:
    given: list[Any] = []

    def simulate(job: Any, out: Path, progress: Any, resources: Resources) -> dict[str, Any]:
        given.append(resources)
        return fake_run(job, out, progress)

    monkeypatch.setattr(simulation, "run", simulate)
    result = shell("run", RECIPE, "--engine", "simulation", "-s", "run.threads=3", *options)
    assert result.exit_code == 0, result.stderr
    assert given == [resources]
    assert "page:    runs/digits/report.html" in result.stdout
    assert "All 3 devices have a model within their storage; mean accuracy 80.0" in " ".join(result.stdout.split())
    assert "fleetfit export runs/digits --device phones-1" in result.stdout


@pytest.mark.parametrize("option", ["--num-cpus=2", "--num-gpus=1", "--address=auto"])
def test_what_only_the_simulation_knows_is_refused_elsewhere(shell: Any, option: str) -> None:
    result = shell("run", RECIPE, option)
    assert result.exit_code == 2
    assert "goes with --engine simulation" in result.stderr


def test_a_missing_package_of_an_engine_is_told_with_what_to_install(
    shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("fleetfit.engines.flower", "fleetfit.engines.simulation"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("flower", "simulation"):
        monkeypatch.delattr(engines, name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = shell("run", RECIPE, "--engine", "simulation")
    assert result.exit_code == 1
    assert 'pip install "fleetfit[flower]"' in result.stderr


def test_progress_without_a_terminal_is_two_lines_a_phase(shell: Any) -> None:
    lines = shell("run", RECIPE).stderr.splitlines()
    assert lines[0] == "run folder runs/digits"
    names = ["libraries", "data", "reference", "header search phones", "refine phones"]
    names += ["header search servers", "refine servers", "report"]
    assert [line for line in lines if line.endswith(" ...")] == [f"{name} ..." for name in names]
    done = [line.partition(":")[0] for line in lines if ": done in " in line]
    assert done == names
    assert len(lines) == 1 + 2 * len(names)
    assert re.search(r"^reference: done in \d+\.\d s, loss 0\.001$", "\n".join(lines), re.MULTILINE)


def test_progress_on_a_terminal_keeps_a_line_for_each_phase(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with terminal.Phases(terminal.Signals(), "run folder x") as phases:
        assert phases.live
        fake_run(Job(), "x", phases)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", capfd.readouterr().err)
    finished = re.findall(r"✓ (.*?)  +\d+\.\d s", shown)
    assert finished == [
        "data",
        "reference",
        "header search phones",
        "refine phones",
        "header search servers",
        "refine servers",
    ]


def test_the_last_step_is_not_over_before_it_is(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Neither 100 % nor no time left, while a slow last step is at work."""
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: clock[0])
    with terminal.Phases(terminal.Signals()) as phases:
        phases("header search", 0, 1000, "phones: rung 1")
        clock[0] += 99.9
        phases("header search", 999, 1000, "phones: fold 4 of 4")
    assert capfd.readouterr().err.splitlines()[-1] == "header search phones: 99 %, fold 4 of 4"


@pytest.mark.parametrize("first", [1, 501])
def test_a_slow_phase_is_told_when_it_ends(monkeypatch: pytest.MonkeyPatch, capfd: Any, first: int) -> None:
    """A step a second, also where the first half was read back; without a terminal, a line a minute."""
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: clock[0])
    with terminal.Phases(terminal.Signals()) as phases:
        for step in range(first, 1001):
            clock[0] += 1
            phases("reference", step, 1000, "loss 1")
    lines = capfd.readouterr().err.splitlines()
    done = first + 61
    left = terminal.format_duration(1000 - done)
    assert lines[:2] == ["reference ...", f"reference: {100 * done // 1000} %, loss 1, {left} left"]
    assert len(lines) == 2 + (1000 - first) // 61
    assert lines[-1].startswith("reference: done in ")


def test_progress_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    calls = 0

    def counting(*_: object) -> None:
        nonlocal calls
        calls += 1

    with terminal.Phases(terminal.Signals()) as phases:
        phases("reference", 1, 10000, "loss 0.1")
        sys.setprofile(counting)  # of this thread: what is drawn, now and then, another one draws
        for i in range(1, 1001):
            phases("reference", i + 1, 10000, "loss 0.1")
        sys.setprofile(None)
    assert calls < 1000 * 50, "a few each; to draw takes thousands"


def test_quiet_prints_nothing(shell: Any) -> None:
    result = shell("run", RECIPE, "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_json_is_the_summary_alone(shell: Any) -> None:
    assert json.loads(shell("run", RECIPE, "--json").stdout) == SUMMARY


def test_out_and_set(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Job, Path]] = []

    def run(job: Job, out: Path, progress: Progress) -> dict[str, Any]:
        seen.append((job, out))
        return SUMMARY

    monkeypatch.setattr(local, "run", run)
    assert shell("run", RECIPE, "-o", "here", "--set", "seed=7", "-s", "method=paper", "-q").exit_code == 0
    ((job, out),) = seen
    assert (job.seed, job.header.search, out) == (7, "enas", Path("here"))


def test_going_on_is_said(shell: Any) -> None:
    steps = Path("runs/digits/steps/reference")
    steps.mkdir(parents=True)
    (steps / "cloud.safetensors").touch()
    assert "going on in runs/digits: 1 finished steps are read back" in shell("run", RECIPE).stderr


def test_a_report_that_fails_still_shows_the_models(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> Path:
        raise ValueError("no page today")

    monkeypatch.setattr(cli.run, "_build_report", broken)
    result = shell("run", RECIPE)
    assert result.exit_code == 1
    assert "phones" in result.stdout
    assert "look:" not in result.stdout
    assert result.stderr.endswith("error: no page today\n")


def test_dry_run_prints_the_job_explained_and_runs_nothing(shell: Any) -> None:
    result = shell("run", RECIPE, "--dry-run", "--set", "refine.rounds=5")
    assert result.exit_code == 0
    assert make_job(tomllib.loads(result.stdout)) == load_job(RECIPE, ("refine.rounds=5",))
    assert 'split = "classes"  # iid | classes | dirichlet' in result.stdout
    assert "rounds = 5  # T" in result.stdout
    assert not Path("runs").exists()


def test_dry_run_as_json(shell: Any) -> None:
    assert make_job(json.loads(shell("run", RECIPE, "--dry-run", "--json").stdout)) == load_job(RECIPE)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"method": "paper"},
        {"model": {"config": {"hidden_act": "# no"}}},
        {"fleet": {"devices": [{"storage_limit": 5, "profile": "nvidia-t4"}]}},
    ],
)
def test_the_explained_job_is_the_job(fields: dict[str, Any]) -> None:
    job = make_job(fields)
    assert make_job(tomllib.loads(explained_toml(job))) == job


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sed = 1", "job.toml:\n  sed is an unknown key; did you mean 'seed'?\n"),
        (
            "seed = -1\n[refine]\nrounds = 0",
            "job.toml:\n  seed must be >= 0, got -1\n  refine.rounds must be >= 1, got",
        ),
        ("seed = = 1", "job.toml is not TOML: "),
    ],
)
def test_a_bad_job(shell: Any, content: str, message: str) -> None:
    Path("job.toml").write_text(content)
    result = shell("run", "job.toml")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {message}")


def test_a_missing_job_and_a_folder(shell: Any) -> None:
    assert shell("run", "job.toml").stderr == "error: job.toml: No such file or directory\n"
    assert shell("run", ".").stderr == "error: .: Is a directory\n"


@pytest.mark.parametrize("arguments", [["run"], ["run", "a", "b"], ["run", "a", "--sett", "x"], ["rum"], ["report"]])
def test_wrong_usage_is_exit_code_2(shell: Any, arguments: list[str]) -> None:
    assert shell(*arguments).exit_code == 2


def test_a_missing_package_points_to_the_doctor(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Job, out: Path, progress: Progress) -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setattr(local, "run", run)
    result = shell("run", RECIPE, "-q")
    assert result.exit_code == 1
    assert result.stderr == "error: No module named 'torch'\n`fleetfit doctor` tells what is missing\n"


def test_an_interrupt_that_a_library_swallowed_still_stops(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Job, out: Path, progress: Progress) -> dict[str, Any]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            pass
        progress("data", 0, 1)
        return SUMMARY

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(local, "run", run)
    result = shell("run", RECIPE, "-q")
    assert result.exit_code == 143
    assert result.stderr.startswith("stopped; the same command goes on")
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_that_became_another_error_still_stops(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Job, out: Path, progress: Progress) -> dict[str, Any]:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("half imported") from None
        return SUMMARY

    monkeypatch.setattr(local, "run", run)
    assert shell("run", RECIPE, "-q").exit_code == 130


# -- report, doctor, help ---------------------------------------------------------------------------------------------


def test_report(shell: Any) -> None:
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/summary.json").touch()
    assert shell("report", "runs/x").stdout == "runs/x/report.html\n"
    assert json.loads(shell("report", "runs/x", "--json").stdout) == {"report": "runs/x/report.html"}


def test_report_of_no_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert "unexpected" not in result.stderr


def test_doctor_is_well_here(shell: Any) -> None:
    result = shell("doctor")
    assert result.exit_code == 0, result.stdout
    assert re.search(r"^ok  torch +\d", result.stdout, re.MULTILINE)
    assert result.stdout.endswith("all is well\n")
    told = json.loads(shell("doctor", "--json").stdout)
    assert told["ok"]
    names = {check["name"] for check in told["checks"]}
    assert names >= {"fleetfit", "python", "torch", "transformers", "datasets", "flwr-datasets", "safetensors"}
    assert names >= {"cpu", "memory", "gpu", "cache"}


@pytest.mark.parametrize(
    ("requires", "line"),
    [
        ("no-such-package>=3", r"NO  no-such-package missing +>=3 +pip install 'no-such-package>=3'"),
        ("typer>=99", r"NO  typer +[\d.]+ +>=99 +pip install 'typer>=99'"),
    ],
)
def test_doctor_names_what_is_wrong(shell: Any, monkeypatch: pytest.MonkeyPatch, requires: str, line: str) -> None:
    from fleetfit.cli import machine_checks as doctor

    monkeypatch.setattr(doctor.metadata, "requires", lambda name: [requires, "pytest; extra == 'dev'"])
    result = shell("doctor")
    assert result.exit_code == 1
    assert re.search(line, result.stdout)
    assert "to put right: " in result.stdout
    assert "pytest" not in result.stdout
    assert json.loads(shell("doctor", "--json").stdout)["ok"] is False


def test_doctor_lists_what_extras_need_as_optional(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fleetfit.cli import machine_checks as doctor

    extras = ["no-such-runtime>=3; extra == 'export'", "no-such-accountant; extra == 'privacy'"]
    requires = ["rich", *extras, "no-such-test; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requires)
    result = shell("doctor")
    assert result.exit_code == 0
    line = r"^ok  no-such-runtime missing +>=3 +only for fleetfit export: pip install 'no-such-runtime>=3'$"
    assert re.search(line, result.stdout, re.MULTILINE)
    line = r"^ok  no-such-accountant missing +only for \[privacy\]: pip install 'no-such-accountant'$"
    assert re.search(line, result.stdout, re.MULTILINE)
    assert "no-such-test" not in result.stdout


def test_doctor_says_why_a_package_does_not_load(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fleetfit.cli import machine_checks as doctor

    def broken(module: str) -> None:
        raise OSError("libgomp.so.1: cannot open shared object file\nmore")

    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["rich"])
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    result = shell("doctor")
    assert result.exit_code == 1
    assert "does not load: OSError: libgomp.so.1: cannot open shared object file\n" in result.stdout


def test_doctor_says_which_gpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fleetfit.cli import machine_checks as doctor

    card = type("Card", (), {"name": "Fast One", "total_memory": 8 * 2**30})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    check = doctor._gpu()
    assert (check.found, check.note) == (
        "Fast One (8 GiB)",
        "jobs run on cuda:0, unless run.torch_device says otherwise",
    )


def test_doctor_wants_a_cache_that_can_be_written(shell: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fleetfit.cli import machine_checks as doctor

    (tmp_path / "home").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: [])
    result = shell("doctor")
    assert result.exit_code == 1
    assert "not writable" in result.stdout
    assert "set run.cache to a folder of yours" in result.stdout


# -- profile ----------------------------------------------------------------------------------------------------------

TINY_PROFILE = (
    "profile",
    "--job",
    RECIPE,
    "--widths",
    "0.5,1",
    "--depths",
    "1,2,3",
    "--repeats",
    "1",
    "--watts",
    "7.5",
)


def test_profile_shows_measured_beside_predicted_and_writes_what_a_job_can_name(shell: Any) -> None:
    result = shell(*TINY_PROFILE, "-o", "boards/kitchen.toml")
    assert result.exit_code == 0, result.stderr
    profile = find_profile("boards/kitchen.toml")
    assert (profile.name, profile.power_watts) == ("kitchen", 7.5)
    rows = re.findall(r"^ (0\.5|1) × (\d) +([\d.e-]+) +([\d.e-]+) +([+-][\d.]+)% $", result.stdout, re.MULTILINE)
    assert [row[:2] for row in rows] == [(w, d) for w in ("0.5", "1") for d in "123"]
    for width, depth, measured, predicted, error in rows:
        fitted = profile.latency_seconds + profile.latency_slope_seconds * float(width) * int(depth)
        assert float(predicted) == pytest.approx(fitted, rel=1e-2)
        # All three are rounded to what is shown.
        assert float(predicted) / float(measured) == pytest.approx(1 + float(error) / 100, rel=1.2e-2, abs=2e-3)
    assert re.search(r"^time:    T = .* w d seconds, R² -?\d\.\d+, worst error [\d.]+%$", result.stdout, re.MULTILINE)
    assert "power:   not measured: 7.5 W were given, constant" in result.stdout
    assert 'profile = "boards/kitchen.toml"' in result.stdout
    assert [line for line in result.stderr.splitlines() if line.endswith(" ...")] == [
        "libraries ...",
        "model ...",
        "latency ...",
    ]


def test_profile_as_json_is_json_alone(shell: Any) -> None:
    told = json.loads(shell(*TINY_PROFILE, "--json").stdout)
    assert find_profile("profile.toml").model_dump() == told["profile"]
    assert set(told["latency"]) == {"intercept", "slope", "r_squared", "worst_error"}
    assert (told["power"], len(told["points"])) == (None, 6)
    point = told["points"][3]
    assert point["shape"] == {"width": 1.0, "depth": 1}
    assert point["predicted_latency_seconds"] == pytest.approx(told["latency"]["intercept"] + told["latency"]["slope"])


def test_profile_says_when_the_formula_says_a_machine_badly(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [BackboneShape(width=w, depth=d) for w in (0.5, 1.0) for d in (1, 3)]

    def machine(flat: bool) -> Callable[..., Any]:
        def measured(name: str, *_: object) -> Any:
            points = [
                profiling.Point(shape=s, latency_seconds=float(s.depth * (1 if flat else s.width)), power_watts=9.0)
                for s in shapes
            ]
            return profiling.fit_profile(name, points, 4, 3.0, None, "a meter", "h", "How.")

        return measured

    monkeypatch.setattr(profiling, "profile_machine", machine(flat=True))
    result = shell("profile")
    assert "a poor fit: was the machine busy?" in result.stdout
    assert (
        "power:   P = 3 + 0 w d + 1.5 p watts, R² 1.000, worst error 0.0%\n         measured, a meter\n"
        in result.stdout
    )
    monkeypatch.setattr(profiling, "profile_machine", machine(flat=False))
    assert "poor" not in shell("profile").stdout


def test_profile_without_power_says_what_stands_in(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "find_meter", lambda torch_device: (None, "no counter here"))
    result = shell(*TINY_PROFILE[:-2])
    assert "power:   not measured (no counter here): the paper's constants stand in\n" in result.stdout
    assert "give --watts if you know them" in result.stdout


def test_profile_list(shell: Any) -> None:
    result = shell("profile", "--list")
    assert result.stderr == ""
    for name, profile in ready_profiles().items():
        assert f"{name}\n  {profile.hardware}\n" in result.stdout
        assert f"  {profile.source}\n" in result.stdout
    assert json.loads(shell("profile", "--list", "--json").stdout)["nvidia-t4"]["power_watts"] == 70
    assert not Path("profile.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--widths", "a,b"), 2, "must be numbers with commas between them"),
        (("--depths", "0.5"), 2, "must be numbers with commas between them"),
        (("--repeats", "0"), 2, "--repeats"),
        (("--job", RECIPE, "--family", "vit"), 2, "a job says its family itself"),
        (("--set", "model.family=bert"), 2, "goes with --job"),
        (("--job", RECIPE, "--set", "model.config.patch_size=9"), 1, "patch_size must be <= image_size 8, got 9"),
        (("--family", "swin"), 1, f"error: --family must be one of {', '.join(FAMILIES)}, got 'swin'"),
        (("--torch-device", "tpu"), 1, "error: --torch-device must be cpu, cuda or cuda:<number>, got 'tpu'"),
        (("--job", RECIPE, "--watts", "-1"), 1, "error: --watts must be finite and > 0, got -1"),
        (("--job", RECIPE, "--depths", "7"), 1, "error: --depths must be in 1..6, the model's layers, got 7"),
        (("--job", "none.toml"), 1, "error: none.toml: No such file or directory"),
        (("--out", "job.json"), 1, "error: --out must end in .toml"),
        (("--out", RECIPE), 1, "is no device profile: "),
    ],
)
def test_profile_refuses(shell: Any, arguments: tuple[object, ...], code: int, message: str) -> None:
    recipe = RECIPE.read_bytes()
    result = shell("profile", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert not Path("profile.toml").exists()
    assert RECIPE.read_bytes() == recipe


@pytest.mark.parametrize(
    "command", ["run", "report", "export", "predict", "pretrain", "profile", "provision", "start", "doctor"]
)
def test_help_fits_into_80_columns(command: str) -> None:
    """Its lines are laid out by hand: none is broken where a terminal is as narrow as they come."""

    def prose(columns: str) -> list[str]:
        text = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": columns, "NO_COLOR": "1"}).stdout
        return [line.rstrip() for line in text.split("╭")[0].splitlines()]

    assert len(prose("80")) > 5
    assert prose("80") == prose("160")


def test_help_teaches(shell: Any) -> None:
    top = shell("--help").stdout
    assert all(
        word in top
        for word in (
            "run",
            "report",
            "export",
            "predict",
            "pretrain",
            "profile",
            "doctor",
            "fleetfit run digits",
        )
    )
    text = shell("run", "--help").stdout
    for word in ("report.html", "devices/<device>/", "--dry-run", "To go on", "fleetfit run digits"):
        assert word in text
    text_of_profile = shell("profile", "--help").stdout
    for word in ("RAPL", "fleetfit profile --list", "[[fleet.devices]]", 'profile = "boards/kitchen.toml"'):
        assert word in text_of_profile
    for help_text in (text, text_of_profile):
        assert not [family for family in FAMILIES if not re.search(rf"\b{family}\b", help_text)]
    flat = " ".join(text.split())
    assert not [ending for ending in READERS if f"{ending[1:]}" not in flat]
    for source in ("digits; a file or a pattern of files", "a folder", "Hugging Face hub", "module:function"):
        assert source in flat
    keys = re.findall(r"^ +([a-z]+(?:\.[a-z_]+)?)   ", text.partition("keys that matter")[2], re.MULTILINE)
    assert len(keys) >= 10
    for key in keys:
        node: Any = Job()
        for part in key.split("."):
            node = getattr(node, part)


def test_version(shell: Any) -> None:
    assert shell("--version").stdout == f"fleetfit {fleetfit.__version__}\n"


@pytest.mark.parametrize("number", [0, 9.94, 9.96, 59.4, 59.6, 3599, 3600, 90000])
def test_durations(number: float) -> None:
    expected = {0: "0.0 s", 9.94: "9.9 s", 9.96: "10 s", 59.4: "59 s", 59.6: "1 min 00 s"}
    expected |= {3599: "59 min 59 s", 3600: "1 h 00 min", 90000: "25 h 00 min"}
    assert terminal.format_duration(number) == expected[number]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (77176, "77.2 KB"), (120_000, "120 KB"), (999_900, "1 MB")]
)
def test_sizes(number: int, text: str) -> None:
    assert terminal.format_bytes(number) == text


# -- the process ------------------------------------------------------------------------------------------------------


def start(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*PROGRAM, *arguments], text=True, **({"stdout": pipe, "stderr": pipe} | more))


@pytest.mark.parametrize(
    ("command", "when", "number", "code"),
    [
        ("run", "libraries ...", signal.SIGINT, 130),
        ("run", "libraries ...", signal.SIGTERM, 143),
        ("run", "reference ...", signal.SIGINT, 130),
        ("pretrain", "reference ...", signal.SIGINT, 130),
    ],
)
def test_a_signal_while_importing_or_training(tmp_path: Path, command: str, when: str, number: int, code: int) -> None:
    sets = ("model.epochs=100000", f"run.cache='{tmp_path / 'cache'}'")
    arguments = [command, str(RECIPE), "-o", str(tmp_path / "run"), *(a for s in sets for a in ("--set", s))]
    with start(*arguments) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip() == when:
                break
        time.sleep(0.3)
        process.send_signal(number)
        said = process.stderr.read()
        assert process.wait(timeout=300) == code
    last = {"run": "last finished step", "pretrain": "last epoch that was kept"}[command]
    assert said.endswith(f"stopped; the same command goes on from the {last}\n")
    assert "Traceback" not in said
    assert "Exception" not in said


@pytest.mark.parametrize("arguments", [["--help"], ["run", str(RECIPE), "--dry-run"]])
def test_a_reader_that_leaves_is_no_reason_for_a_traceback(arguments: list[str]) -> None:
    with start(*arguments) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=300) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout() -> None:
    with open("/dev/full", "w") as full, start("run", str(RECIPE), "--dry-run", stdout=full) as process:
        assert process.stderr is not None
        assert process.stderr.read() == "error: No space left on device\n"
        assert process.wait(timeout=300) == 1


def test_nothing_heavy_is_imported_until_it_is_used() -> None:
    heavy = ("torch", "transformers", "datasets", "pydantic", "rich", "numpy", "sklearn")
    code = f"import sys, fleetfit; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout == "[]\n"
    code = code.replace("sys, fleetfit", "sys, fleetfit.cli")
    assert subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout == "[]\n"


# -- the package ------------------------------------------------------------------------------------------------------


def test_public_names() -> None:
    assert {"Job", "__version__", "load", "load_job", "run"} <= set(dir(fleetfit))
    assert fleetfit.Job is Job
    assert fleetfit.load_job is load_job
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        fleetfit.nope  # noqa: B018


def test_run_takes_a_path_fields_or_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Job, Path]] = []

    def run(job: Job, out: Path, progress: Progress) -> dict[str, Any]:
        progress("data", 0, 1)
        seen.append((job, out))
        return SUMMARY

    monkeypatch.setattr(local, "run", run)
    job = load_job(RECIPE)
    assert fleetfit.run(RECIPE) == SUMMARY
    fleetfit.run(job)
    fleetfit.run(job.model_dump(exclude_none=True))
    fleetfit.run({"seed": 2}, out="here", progress=lambda phase, done, total, note="": None)
    assert [j for j, _ in seen[:3]] == [job] * 3
    assert seen[0][1] == Path("runs/digits")
    assert seen[1][1] == seen[2][1]
    assert seen[1][1].parent == Path("runs")
    assert (seen[3][0].seed, Path(seen[3][1])) == (2, Path("here"))
