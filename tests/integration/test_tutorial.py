"""docs/tutorial.md is true: its commands run, one after the other, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"


@pytest.mark.long
def test_every_command_of_the_tutorial(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 7
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    shown = []
    for block in blocks:
        done = subprocess.run(["bash", "-e", "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        shown.append(done.stdout)
    assert "nothing is wrong" in shown[2]
    assert "All 30 devices have a model" in " ".join(shown[3].split())
    assert "['IT']" in shown[6]
