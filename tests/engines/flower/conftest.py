"""A fleet of three devices behind two edges, and its kits, made once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

TINY: dict[str, Any] = {
    "seed": 3,
    "model": {
        "epochs": 1,
        "config": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "patch_size": 4,
        },
    },
    "fleet": {
        "devices": [
            {"count": 2, "cluster": "small", "storage_limit": "100 KB", "gpu_capacity": [40, 50]},
            {"count": 1, "cluster": "large", "storage_limit": "1 MB"},
        ]
    },
    "data": {"split": "classes", "limit": 600},
    "backbone": {"widths": [0.5, 1.0], "steps": 2, "specialise_steps": 1, "importance_samples": 32},
    "header": {"budget_steps": 20, "views": 1},
    "refine": {"rounds": 2, "epochs": 1, "prune_share": 0.3, "guard": False},
}

FLEET: dict[str, Any] = {"job": "job.toml", "edges": [{"name": "small"}, {"name": "large"}]}
Write = Callable[[Path, dict[str, Any], dict[str, Any]], Path]


def write_fleet(folder: Path, job: dict[str, Any], fleet: dict[str, Any]) -> Path:
    """A job and a FLEET.toml that names it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.toml").write_text(tomli_w.dumps(job))
    path = folder / "FLEET.toml"
    path.write_text(tomli_w.dumps(fleet))
    return path


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """The job's fields."""
    return TINY


@pytest.fixture(scope="session")
def fleet() -> dict[str, Any]:
    """The fleet's fields."""
    return FLEET


@pytest.fixture(scope="session")
def write() -> Write:
    """Writes a job and its fleet."""
    return write_fleet


@pytest.fixture(scope="session")
def made_kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kits with a part of the data each; not to be changed."""
    from fleetfit.engines.flower.provision import provision

    folder = tmp_path_factory.mktemp("fleet")
    job = TINY | {"run": {"cache": str(folder / "cache")}}
    provision(write_fleet(folder, job, FLEET), folder / "kits", split_data=True)
    return folder / "kits"


@pytest.fixture
def kits(made_kits: Path, tmp_path: Path) -> Path:
    """A copy of the kits, to do with as one likes."""
    return Path(shutil.copytree(made_kits, tmp_path / "kits"))
