"""The cloud: reference, elastic backbone, candidates, and one backbone for each cluster."""

from typing import Any


def __getattr__(name: str) -> Any:
    from fleetfit.core.moved import found

    return found("cloud", name)
