"""Small seeded jobs give what they gave before: a change that should change nothing changes nothing."""

import json
from pathlib import Path

import pytest
from golden import GOLDEN, figures, jobs
from same_run import differences


@pytest.mark.parametrize("name", ["fleetfit", "paper", "groups", "text"])
def test_a_job_gives_its_golden_figures(name: str, tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())[name]
    found = figures(jobs(tmp_path)[name], tmp_path / "run")
    assert list(differences(found, expected, test_samples=5, rounding=1e-3)) == []
