"""The simulation engine: cloud and edges in this process, devices as Flower ClientApps on Ray, here or on a cluster.

The same run folder, messages, checkpoints and models as the local engine's; only who computes for devices differs.
There is no deadline: a device that waits for a CPU is not late.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fleetfit.cloud.clusters import Fleet
from fleetfit.config.job import Job
from fleetfit.core.link import Link
from fleetfit.core.progress import Progress, silent
from fleetfit.data.partition import FleetData
from fleetfit.engines.flower.link import FlowerLink, Heard
from fleetfit.engines.simulation.device_files import SimulatedDevice, write_handover
from fleetfit.engines.simulation.ray_nodes import Resources, SimulatedNodes
from fleetfit.engines.simulation.worker import device_app
from fleetfit.engines.whole_fleet import run_whole_fleet
from fleetfit.runs.folder import RunFolder

POLL_SECONDS = 0.05


def run(
    job: Job,
    out: str | Path,
    progress: Progress = silent,
    resources: Resources = Resources(),  # noqa: B008  (frozen)
) -> dict[str, Any]:
    """Run a job with simulated devices; a folder with a run that was killed is gone on with.

    Args:
        job: The resolved job.
        out: The run folder; where Ray has several machines, on storage that all of them share, as is ``run.cache``.
        progress: Told how far each phase is.
        resources: What a device takes while it is at work, and on which Ray.

    Returns:
        The summary, as in summary.json.

    Raises:
        ValueError: bad data, limits that nothing fits, a damaged run folder, a loss that is not finite; no machine has
            what a device needs.
        CarrierFailed: Ray or one of its processes ended.
        OSError: the folder cannot be written.
    """
    if job.run.torch_device == "cuda" and not resources.num_gpus:
        raise ValueError(
            "run.torch_device = 'cuda' needs --num-gpus > 0, the share of a GPU that a device takes, got 0"
        )
    torch_device = job.run.torch_device if resources.num_gpus else "cpu"
    heard = Heard(progress)

    @contextmanager
    def connect(folder: RunFolder, fleet: Fleet, data: FleetData) -> Iterator[Mapping[str, Link]]:
        handover = folder.path / "handover"
        devices = [
            SimulatedDevice(a, data.devices[a.device_id], folder.memory_of(a.device_id).folder)
            for members in fleet.values()
            for a in members
        ]
        app = device_app(handover, job.run.threads, torch_device, job.links.max_message_bytes)
        with (
            _there_meanwhile(handover),
            SimulatedNodes(app, len(devices), resources, progress) as nodes,
            _gone_if_it_fails(handover),
        ):
            write_handover(handover, devices)
            node_of = {device.attributes.device_id: node for device, node in zip(devices, nodes.ids, strict=True)}
            yield {
                cluster: FlowerLink(
                    nodes,
                    {a.device_id: node_of[a.device_id] for a in members},
                    folder.ledger,
                    "edge_to_device",
                    "device_to_edge",
                    max_message_bytes=job.links.max_message_bytes,
                    poll_seconds=POLL_SECONDS,
                    replied=heard.replied,
                )
                for cluster, members in fleet.items()
            }

    return run_whole_fleet(job, Path(out), heard, connect)


@contextmanager
def _there_meanwhile(folder: Path) -> Iterator[None]:
    """An empty folder, which is gone in the end; what a run that was killed has left in it goes before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _gone_if_it_fails(folder: Path) -> Iterator[None]:
    """Whatever Ray's processes are doing when a run is stopped, they end when the folder is gone."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
