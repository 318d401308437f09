"""The local engine: all tiers in one process, every message encoded, counted and decoded as on a wire."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fleetfit.cloud.clusters import Fleet
from fleetfit.config.job import Job
from fleetfit.core.hardware import torch_device_of
from fleetfit.core.link import Link
from fleetfit.core.progress import Progress, silent
from fleetfit.data.partition import FleetData
from fleetfit.device.handler import device_handler
from fleetfit.device.privacy_ledger import ledger_of
from fleetfit.engines.whole_fleet import LocalLink, run_whole_fleet
from fleetfit.runs.folder import RunFolder


def run(job: Job, out: str | Path, progress: Progress = silent) -> dict[str, Any]:
    """Run a job on this machine; a folder with a run that was killed is gone on with.

    Args:
        job: The resolved job.
        out: The run folder.
        progress: Told how far each phase is.

    Returns:
        The summary, as in summary.json.

    Raises:
        ValueError: bad data, limits that nothing fits, a damaged run folder, a loss that is not finite.
        OSError: the folder cannot be written.
        ImportError: the job asks for privacy, and its accountant is missing.
    """
    torch_device = torch_device_of(job.run.torch_device)

    @contextmanager
    def connect(folder: RunFolder, fleet: Fleet, data: FleetData) -> Iterator[Mapping[str, Link]]:
        links = {}
        for cluster, members in fleet.items():
            handlers = {}
            for a in members:
                memories = folder.memory_of(a.device_id)
                ledger = ledger_of(memories.folder, job)
                handlers[a.device_id] = device_handler(a, data.devices[a.device_id], memories, torch_device, ledger)
            links[cluster] = LocalLink(handlers, folder.ledger, "edge_to_device", "device_to_edge", job.links)
        yield links

    return run_whole_fleet(job, Path(out), progress, connect)
