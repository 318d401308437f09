"""A job of half a second on digits, through every phase; a test says what it needs otherwise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
}


def tiny_fields(cache: Path | None = None, devices: Mapping[str, int] | None = None, **sections: Any) -> dict[str, Any]:
    """The job's keys.

    Args:
        cache: Of references; by default the user's.
        devices: How many each cluster has: "small" with 100 KB, others with 1 MB. By default 2 small, 1 large.
        sections: Keys of sections, instead of those here or besides; other keys of the job as they are.
    """
    base: dict[str, Any] = {
        "model": {"epochs": 1, "config": TINY_VIT},
        "fleet": {
            "devices": [
                {"count": number, "cluster": cluster, "storage_limit": "100 KB" if cluster == "small" else "1 MB"}
                for cluster, number in (devices or {"small": 2, "large": 1}).items()
            ]
        },
        "backbone": {"widths": [0.5, 1.0], "steps": 2, "specialise_steps": 1, "importance_samples": 32},
        "header": {"search": "cnn_add", "budget_steps": 5, "views": 1},
        "refine": {"rounds": 2, "epochs": 1, "guard": False},
        "run": {} if cache is None else {"cache": str(cache)},
    }
    changed = {key: {**base.get(key, {}), **own} if isinstance(own, dict) else own for key, own in sections.items()}
    return base | changed
