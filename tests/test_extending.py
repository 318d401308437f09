"""docs/extend.md is true: what it says is done to a copy of the package, and a job is run with it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from tiny_job import tiny_fields

ROOT = Path(__file__).parents[1]
CHANGE = re.compile(r"```python\n# file: (.*?)\n# from\n(.*?)# to\n(.*?)```", re.DOTALL)


def changed_package(folder: Path) -> Path:
    shutil.copytree(ROOT / "src" / "fleetfit", folder / "fleetfit", ignore=shutil.ignore_patterns("__pycache__"))
    changes = CHANGE.findall((ROOT / "docs" / "extend.md").read_text())
    assert len(changes) == 7
    for name, old, new in changes:
        path = folder / "fleetfit" / name
        text = path.read_text()
        assert text.count(old.rstrip("\n")) == 1, f"{name}: {old}"
        path.write_text(text.replace(old.rstrip("\n"), new.rstrip("\n")))
    return folder


@pytest.mark.long
def test_a_header_a_similarity_and_a_split(tmp_path: Path) -> None:
    package = changed_package(tmp_path / "changed")
    job = tmp_path / "job.toml"
    job.write_text(tomli_w.dumps(tiny_fields(tmp_path / "cache")))
    sets = (
        "header.search=mean_token",
        "header.keep_distilled=false",
        "refine.similarity=cosine",
        "data.split=by_order",
    )
    command = [sys.executable, "-m", "fleetfit", "run", str(job), "-o", str(tmp_path / "run")]
    command += [part for key in sets for part in ("-s", key)]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(package), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {cluster["header"] for cluster in summary["clusters"]} == {"mean_token"}


def test_what_it_changes_is_there(tmp_path: Path) -> None:
    changed_package(tmp_path)
