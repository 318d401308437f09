"""Settings that belong together: the paper's choices, a pre-trained start's, and those of a job with privacy."""

from collections.abc import Mapping
from typing import Any

PAPER: dict[str, dict[str, Any]] = {
    "model": {"header": "linear"},
    "backbone": {
        "importance": "taylor",
        "depth_order": "spread",
        "distillation": "paper",
        "size": "zeta",
        "grid_distance": "l1",
        "grid_ties": "loss",
        "specialise_steps": 0,
    },
    "header": {
        "search": "enas",
        "hidden": 32,
        "freeze_backbone": False,
        "keep_distilled": False,
        "quick_test": False,
        "warm_start": False,
        "views": 1,
    },
    "refine": {
        "rounds": 2,
        "settle": False,
        "later_epochs": 0,
        "learning_rate": 3e-3,
        "exchange": "importance",
        "similarity": "wasserstein",
        "sketch": "samples",
        "anchor": 0.0,
        "class_prior": False,
        "balanced_training": False,
        "importance": "parameter",
        "prune_share": 0.2,
        "guard": False,
    },
    "members": {"robust": False},
    "fleet": {"clustering": "kmeans"},
}

# The rates of the defaults are those of a small model that starts from nothing, and would spoil a pre-trained one.
PRETRAINED: dict[str, dict[str, Any]] = {
    "model": {"epochs": 4, "learning_rate": 2e-4},
    "backbone": {"learning_rate": 5e-4},
    "header": {"backbone_learning_rate": 2e-5},
}

# Every round is a noised release more, and what tells that they have settled stays on the devices.
PRIVATE: dict[str, dict[str, Any]] = {"refine": {"rounds": 2, "similarity": "average"}}


def preset_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a job's fields leave to the presets of its method and of its start; the method's choices win."""
    preset = PAPER if fields.get("method") == "paper" else {}
    privacy = fields.get("privacy")
    if not preset and isinstance(privacy, dict) and privacy.get("noise_multiplier"):
        preset = PRIVATE
    model = fields.get("model")
    return merged(PRETRAINED, preset) if isinstance(model, dict) and model.get("pretrained") else dict(preset)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested fields with others over them, table by table."""
    fields = dict(base)
    for key, value in over.items():
        both = isinstance(fields.get(key), dict) and isinstance(value, dict)
        fields[key] = merged(fields[key], value) if both else value
    return fields
