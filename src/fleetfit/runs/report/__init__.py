"""A finished run folder -> report.html: one self-contained page: how well each device does, what was built, and why."""

from pathlib import Path

from fleetfit.core.files import write_atomically
from fleetfit.runs.report.page import render
from fleetfit.runs.report.run_data import read_run


def build_report(run: Path) -> Path:
    """Write report.html into a finished run's folder, and return its path.

    Raises:
        ValueError: a file of the run is missing or damaged; names it.
        OSError: the page cannot be written.
    """
    path = run / "report.html"
    write_atomically(path, render(read_run(run)))
    return path
