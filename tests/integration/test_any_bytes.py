"""No bytes end a program, whoever sends them to whom."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_changed_messages_end_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import members_fuzz

    found = members_fuzz.fuzz(3_000, seed=7)
    assert not found["ended"]
    assert all(row["refused"] > 0.5 * row["messages"] for row in found["rows"].values()), found["rows"]


def test_the_check_sees_a_program_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import members_fuzz

    monkeypatch.setattr(members_fuzz, "check_reply", lambda *_: [][0])
    assert any("IndexError" in error for error in members_fuzz.fuzz(100)["ended"])


@pytest.mark.long
def test_messages_that_reach_new_code_end_no_program(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    command = [
        sys.executable,
        str(BENCHMARKS / "members_fuzz.py"),
        "--seconds",
        "120",
        "--out",
        str(tmp_path / "found"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
