"""A model's scores on labelled data are those of its predictions, file by file."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from tiny_job import tiny_fields
from typer.testing import CliRunner

import fleetfit
from fleetfit.cli import app
from fleetfit.runs.evaluate import evaluate_folder
from fleetfit.runs.predict import predict


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    fleetfit.run(tiny_fields(folder / "cache"), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of classes, as a person saves them: bytes up to 255, where the model's source had 16."""
    from sklearn.datasets import load_digits

    folder, digits = tmp_path_factory.mktemp("pictures"), load_digits()
    for i in range(120):
        path = folder / str(digits.target[i]) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((digits.images[i] / 16 * 255).astype(np.uint8)).save(path)
    return folder


def test_scores_are_those_of_predict(run: Path, pictures: Path) -> None:
    model = run / "devices" / "small-1"
    paths = sorted(pictures.rglob("*.png"))
    said = [p.label for p in predict(model, paths)]
    true = [path.parent.name for path in paths]
    labels = [str(i) for i in range(10)]
    found = evaluate_folder(model, str(pictures))
    assert np.array_equal(found.confusion, confusion_matrix(true, said, labels=labels))
    assert found.samples == 120
    assert found.accuracy == pytest.approx(np.mean([a == b for a, b in zip(true, said, strict=True)]))
    precision, recall, _, support = precision_recall_fscore_support(true, said, labels=labels, zero_division=np.nan)
    for score, p, r, s in zip(found.classes, precision, recall, support, strict=True):
        assert (score.support, score.recall) == (s, pytest.approx(r))
        assert score.precision is None if np.isnan(p) else score.precision == pytest.approx(p)


def test_pixels_as_the_source_had_them_are_taken_as_they_are(run: Path, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits, model = load_digits(), run / "devices" / "small-1"
    for i in range(60):
        path = tmp_path / str(digits.target[i]) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(digits.images[i].astype(np.uint8)).save(path)
    raw = torch.tensor(digits.images[:60, None], dtype=torch.float32)
    with torch.no_grad():
        said = fleetfit.load(model)((raw / 16 - 0.5) / 0.5).argmax(1).numpy()
    assert np.array_equal(
        evaluate_folder(model, str(tmp_path)).confusion, confusion_matrix(digits.target[:60], said, labels=range(10))
    )


def test_an_export_has_the_scores_of_its_model(run: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "exports"
    made = CliRunner().invoke(app, ["export", str(run), "--device", "small-1", "--out", str(out)])
    assert made.exit_code == 0, made.output
    exported = evaluate_folder(out / "small-1", str(pictures))
    assert exported.confusion == evaluate_folder(run / "devices" / "small-1", str(pictures)).confusion


def test_labels_that_the_model_does_not_know_are_named(run: Path, pictures: Path, tmp_path: Path) -> None:
    for name in ("3", "seven"):
        shutil.copytree(pictures / ("7" if name == "seven" else name), tmp_path / name)
    with pytest.raises(ValueError, match="'seven', which the job does not know"):
        evaluate_folder(run / "devices" / "small-1", str(tmp_path))


def invoked(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_the_command(run: Path, pictures: Path, tmp_path: Path) -> None:
    model = run / "devices" / "small-1"
    result = invoked(model, "--data", pictures)
    assert result.exit_code == 0, result.output
    found = json.loads(invoked(model, "--data", pictures, "--json").stdout)
    assert f"{found['correct']} of 120" in result.stdout
    assert invoked(tmp_path, "--data", pictures).exit_code == 1
    assert "is missing" in invoked(tmp_path, "--data", pictures).stderr
    assert invoked(model, "--data", tmp_path / "nothing").exit_code == 1
