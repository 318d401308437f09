"""Recipes by name, and mistakes that are told before anything heavy is imported."""

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fleetfit.cli import app
from fleetfit.config.explain import explained_toml
from fleetfit.config.job import load_job, make_job
from fleetfit.recipes import FOLDER, headline, job_path, noted, recipe_names


def test_a_name_is_a_recipe_unless_there_is_such_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a folder is no job
    assert job_path("digits") == FOLDER / "digits.toml"
    (tmp_path / "digits-small").write_text("seed = 5")
    assert load_job("digits-small").seed == 5
    assert job_path(tmp_path / "mine.toml") == tmp_path / "mine.toml"  # whoever opens it is told


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("digts", "digts: No such file, and no recipe of that name; did you mean 'digits'?"),
        ("nothing-like-it", "nothing-like-it: No such file, and no recipe of that name. Recipes: banking77,"),
        ("elsewhere/digits.toml", "elsewhere/digits.toml: No such file; the recipe of that name is called digits"),
    ],
)
def test_neither_is_told(named: str, told: str) -> None:
    with pytest.raises(ValueError, match="No such file") as error:
        job_path(named)
    assert str(error.value).startswith(told)


def test_each_recipe_says_what_it_is_and_needs() -> None:
    for name in recipe_names():
        assert len(headline(name)) > 20
        assert noted(name, "command").startswith(
            f"fleetfit {'provision' if name.startswith('fleet-') else 'run'} {name}"
        ) or (name == "digits")
        assert noted(name, "hardware")
    assert noted("digits", "hardware") == "2 CPU cores; no GPU, no network"


def test_they_are_listed_and_printed() -> None:
    def shell(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["recipes", *arguments])

    assert set(json.loads(shell("--json").stdout)) == set(recipe_names())
    assert "digits-small" in shell().stdout
    assert shell("digits").stdout == (FOLDER / "digits.toml").read_text()
    wrong = shell("digts")
    assert wrong.exit_code == 1
    assert "must be one of" in wrong.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "no-such-file.toml"],
        ["run", "digits", "--set", "refine.roundz=3"],
        ["run", "digits", "--set", "refine.rounds=0"],
        ["report", "no-such-folder"],
        ["export", "no-such-folder", "--all"],
        ["predict", "no-such-folder", "x.png"],
        ["pretrain", "no-such-file.toml"],
        ["profile", "--job", "no-such-file.toml"],
        ["provision", "no-such-file.toml"],
        ["start", "no-such-kit"],
    ],
)
def test_mistakes_in_words_keys_and_files_do_not_wait_for_libraries(arguments: list[str]) -> None:
    program = f"""
import sys
from fleetfit.cli import main
sys.argv[1:] = {arguments!r}
try:
    main()
finally:
    print(sorted({{"torch", "transformers", "datasets"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert done.stdout.strip() == "[]"


def test_keys_that_are_not_set_are_comments_and_those_of_other_families_are_left_out() -> None:
    images, texts = make_job({}), make_job({"model": {"family": "bert"}})
    of_images, of_texts = explained_toml(images), explained_toml(texts)
    assert "# limit =  # use so many samples" in of_images
    assert "# num_clusters =" in of_images
    assert "# profile =" in of_images
    assert "max_tokens" not in of_images
    assert "# max_tokens =" in of_texts
    assert "flip =" in of_images
    assert "flip =" not in of_texts
    set_anyway = explained_toml(make_job({"model": {"frequent_tokens": 7}}))
    assert "frequent_tokens = 7" in set_anyway
    for job, text in ((images, of_images), (texts, of_texts)):
        assert make_job(tomllib.loads(text)) == job


@pytest.mark.long
def test_the_wheel_has_them(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, root], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert {f"fleetfit/recipes/{name}.toml" for name in recipe_names()} <= set(zipfile.ZipFile(wheel).namelist())
