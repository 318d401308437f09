"""A device: the only code that sees private data."""

from typing import Any


def __getattr__(name: str) -> Any:
    from fleetfit.core.moved import found

    return found("device", name)
