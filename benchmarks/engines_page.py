"""What all pages of benchmarks/engines.py say alike: versions, cores, load; targets beside values."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version


def setting(command: str, *packages: str) -> str:
    """The command, and what it ran on."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("fleetfit", "torch", *packages))
    return (
        f"`{command}` on {os.cpu_count()} cores, Python {platform.python_version()}, {versions}. Load of the machine "
        f"in the last 1, 5 and 15 minutes, at the end: {', '.join(f'{load:.1f}' for load in os.getloadavg())}."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]


def verdict(holds: bool) -> str:
    """Met or missed."""
    return "met" if holds else "**missed**"
