"""Old places of modules: each still finds what it had, and says where that is now."""

import importlib
import subprocess
import sys

import pytest

from fleetfit.core.moved import PLACES


@pytest.mark.parametrize("old", PLACES)
def test_new_places_are_there_and_old_ones_are_not_files(old: str) -> None:
    for place in PLACES[old]:
        importlib.import_module(f"fleetfit.{place}")
    if old not in ("config", "cloud", "edge", "device"):
        assert importlib.import_module(f"fleetfit.{old}").__spec__.origin is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("line", "now"),
    [
        ("from fleetfit.config import load_job", "fleetfit.config.job.load_job"),
        ("from fleetfit.config import RefineConfig", "fleetfit.config.sections.RefineConfig"),
        ("from fleetfit.report.layout import section", "fleetfit.runs.report.layout.section"),
        ("from fleetfit.messages import take", "fleetfit.core.encoding.take"),
        ("from fleetfit.device import handle", "fleetfit.device.device.handle"),
        ("from fleetfit.engines.flower.kit import read_kit", "fleetfit.engines.deployment.kit.read_kit"),
        ("from fleetfit.engines.flower import simulation; simulation.run", "fleetfit.engines.simulation.run.run"),
        ("import fleetfit.power_meters as m; m.no_such_meter", ""),
    ],
)
def test_an_import_of_before_works_and_says_where_it_is_now(line: str, now: str) -> None:
    result = subprocess.run([sys.executable, "-W", "always", "-c", line], capture_output=True, text=True)
    if now:
        assert result.returncode == 0, result.stderr
        assert f"is now {now}" in result.stderr
    else:
        assert "module 'fleetfit.power_meters' has no attribute 'no_such_meter'" in result.stderr


def test_what_was_never_there_is_not_found() -> None:
    for line in ("import fleetfit.nothing", "from fleetfit.config import nothing"):
        result = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True)
        assert result.returncode == 1
        assert "Error" in result.stderr
