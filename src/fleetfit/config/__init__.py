"""The job: sections, defaults, presets, profiles, errors."""

from typing import Any


def __getattr__(name: str) -> Any:
    from fleetfit.core.moved import found

    return found("config", name)
