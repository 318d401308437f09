"""A first job from somebody's own data: it says what was found, is valid, and nothing is wrong with it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fleetfit.cli import app
from fleetfit.config.job import load_job
from fleetfit.recipes import FOLDER
from fleetfit.runs.plan import make_plan


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def init(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["init", *arguments])


def tickets(encoding: str = "cp1252") -> None:
    """As a spreadsheet saves it: semicolons, no UTF-8, blank rows."""
    rows = ["Betreff;Abteilung", ";"]
    for i in range(80):
        rows += [f"Drucker {i} im Büro druckt nicht mehr;IT", f"Rechnung {i} fehlt;Buchhaltung", ""]
    Path("tickets.csv").write_bytes("\r\n".join(rows).encode(encoding))


def test_texts_whose_columns_have_names_of_their_own() -> None:
    tickets()
    result = init("job.toml", "--data", "tickets.csv")
    assert result.exit_code == 0, result.output
    text = Path("job.toml").read_text()
    assert 'input_column = "Betreff"  # a guess: the longest texts' in text
    assert 'label_column = "Abteilung"  # a guess: 2 different values in 160 rows' in text
    job = load_job("job.toml")
    assert job.model.family == "bert"
    assert not make_plan(job, estimate=False).problems
    assert "fleetfit plan job.toml" in result.stdout


def test_pictures_in_folders_of_classes() -> None:
    chance = np.random.default_rng(0)
    for name in ("cat", "dog"):
        Path("photos", name).mkdir(parents=True)
        for i in range(50):
            pixels = chance.integers(0, 255, (200 + i, 300, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path("photos", name, f"IMG_{i}.jpg"))
    found = init("job.toml", "--data", "photos", "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["problems"] == []
    assert told["found"]["config"] == {"image_size": 64, "patch_size": 8, "num_channels": 3}
    job = load_job("job.toml")
    assert not job.data.label_column  # the folders say it
    plan = make_plan(job, estimate=False)
    assert not plan.problems
    assert [len(c.shapes) > 0 for c in plan.clusters] == [True, True, True]


def test_an_inventory_is_the_fleet() -> None:
    tickets()
    Path("devices.csv").write_text("Hostname;Storage (MB)\npc-1;0,5\npc-2;2\n")
    assert init("job.toml", "--data", "tickets.csv", "--inventory", "devices.csv").exit_code == 0
    assert [d.name for d in load_job("job.toml").fleet.devices] == ["pc-1", "pc-2"]


def test_a_job_that_is_there_stays() -> None:
    Path("job.toml").write_text("seed = 3")
    result = init("job.toml", "--data", "digits")
    assert result.exit_code == 1
    assert "job.toml is there already, and is not written over" in result.stderr
    assert Path("job.toml").read_text() == "seed = 3"


def test_from_a_recipe() -> None:
    assert init("mine.toml", "--recipe", "digits").exit_code == 0
    assert Path("mine.toml").read_text() == (FOLDER / "digits.toml").read_text()
    assert "must be one of" in init("other.toml", "--recipe", "digts").stderr
    assert init("other.toml", "--recipe", "digits", "--data", "x").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--data", "nothing-here.csv"), "nothing-here.csv"),
        (("--data", "digits", "--inventory", "no.csv"), "no.csv: No such file"),
        (("--data", "digits", "--model", "no-such-folder/x"), "no-such-folder/x"),
        ((), "must be given where nobody can be asked"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_written(
    arguments: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = init("job.toml", *arguments)
    assert result.exit_code != 0
    assert told in result.output
    assert not Path("job.toml").exists()
