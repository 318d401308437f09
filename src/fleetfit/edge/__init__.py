"""An edge server: its header search, its devices' rounds, and what they ship."""

from typing import Any


def __getattr__(name: str) -> Any:
    from fleetfit.core.moved import found

    return found("edge", name)
