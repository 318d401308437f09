"""What a run would do, before anything is trained: who is there, what fits whom, how long it takes, and what is wrong.

Sizes are exact: they follow from the configuration. Times and memory are estimates, from some steps of each phase on
this machine whose results are thrown away.
"""

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from fleetfit.cloud import candidates
from fleetfit.cloud.clusters import fleet_notes, fleet_of
from fleetfit.config.job import Job
from fleetfit.core.hardware import hardware_words, torch_device_of
from fleetfit.core.progress import Progress, silent
from fleetfit.core.records import DataSummary, DeviceAttributes, Record, SizedShape
from fleetfit.data.partition import FleetData, share_out
from fleetfit.data.samples import Samples
from fleetfit.data.sources import load_samples
from fleetfit.device.privacy import promise
from fleetfit.edge.messages import ClusterStats
from fleetfit.runs.estimates import PhaseEstimate, measured


class PlannedDevice(Record):
    """A device, as far as it is known before a run. Samples and classes are None where the data cannot be read."""

    id: str
    cluster: str
    limit_bytes: int
    train_samples: int | None = None
    validation_samples: int | None = None
    test_samples: int | None = None
    classes: int | None = None
    problem: str = ""


class PlannedCluster(Record):
    """A cluster, and every shape that keeps all limits of all its devices, smallest first.

    ``usable_bytes`` of the storage limit count. ``seconds`` of one sample, on the slowest device, where a device has a
    latency limit.
    """

    id: str
    devices: int
    limit_bytes: int
    usable_bytes: int
    shapes: tuple[SizedShape, ...]
    seconds: tuple[float, ...] = ()


class Plan(Record):
    """What a run would do. With ``problems`` it would fail; ``notes`` are worth a look."""

    data: DataSummary | None
    clusters: tuple[PlannedCluster, ...]
    devices: tuple[PlannedDevice, ...]
    phases: tuple[PhaseEstimate, ...]
    peak_memory_bytes: int | None
    hardware: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(phase.seconds for phase in self.phases)


def make_plan(job: Job, progress: Progress = silent, estimate: bool = True) -> Plan:
    """Look at everything that a run needs, and go on after what is wrong: all problems are found at once.

    Args:
        job: The resolved job.
        progress: Told how far it is.
        estimate: Measure how long a run takes, too.
    """
    torch.set_num_threads(job.run.threads)
    problems: list[str] = []
    notes: list[str] = []

    @contextmanager
    def noting() -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            problems.append(_words(error))

    with noting():
        torch_device_of(job.run.torch_device)
    with noting():
        promise(job)
    progress("data", 0, 1, job.data.source)
    fleet = fleet_of(job)
    notes += fleet_notes(job, fleet)
    samples: Samples | None = None
    with noting():
        samples = load_samples(job, progress)
    progress("data", 1, 1, f"{len(samples):,} samples" if samples else "cannot be read")
    data: FleetData | None = None
    shapes: tuple[SizedShape, ...] = ()
    if samples is not None:
        with noting():
            names = {c: [a.device_id for a in members] for c, members in fleet.items()}
            data = share_out(samples, job.data, names, job.seed)
            notes += data.notes
        with noting():
            shapes = candidates.sized_shapes(job, samples)
    stats = {cluster: ClusterStats(devices=members) for cluster, members in fleet.items()}
    reasons: dict[str, str] = {}
    if shapes:
        with noting():
            _, left_out = candidates.with_room(job, shapes, stats)
            reasons = {device.device_id: device.reason for device in left_out}
    if reasons:
        notes.append(f"nothing fits {len(reasons)} devices, which are left out: {', '.join(reasons)}")
    phases: tuple[PhaseEstimate, ...] = ()
    memory = None
    if estimate and data is not None and shapes and not problems:
        with noting():
            phases = tuple(measured(job, data, fleet, shapes, reasons, progress))
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Plan(
        data=samples.summary if samples is not None else None,
        clusters=tuple(_clusters(job, fleet, shapes, reasons)),
        devices=tuple(
            _device(a, cluster, data, reasons.get(a.device_id, "")) for cluster, m in fleet.items() for a in m
        ),
        phases=phases,
        peak_memory_bytes=memory,
        hardware=hardware_words(torch_device_of("auto"), job.run.threads),
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(notes),
    )


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _clusters(
    job: Job,
    fleet: Mapping[str, Sequence[DeviceAttributes]],
    shapes: Sequence[SizedShape],
    reasons: Mapping[str, str],
) -> Iterator[PlannedCluster]:
    for cluster, members in fleet.items():
        counted = [a for a in members if a.device_id not in reasons] or list(members)
        smallest = min(counted, key=lambda a: a.storage_limit_bytes)
        usable = candidates.usable_bytes(job, smallest)
        within = candidates.shapes_within(job, shapes, counted)
        fit = sorted((s for s in shapes if s.shape in within), key=lambda s: s.size_bytes)
        slowest = [max(candidates.latency_seconds(a, s) for a in counted) for s in fit] if _timed(counted) else []
        yield PlannedCluster(
            id=cluster,
            devices=len(members),
            limit_bytes=smallest.storage_limit_bytes,
            usable_bytes=int(usable),
            shapes=tuple(fit),
            seconds=tuple(slowest),
        )


def _timed(devices: Sequence[DeviceAttributes]) -> bool:
    return any(a.latency is not None for a in devices)


def _device(attributes: DeviceAttributes, cluster: str, data: FleetData | None, problem: str) -> PlannedDevice:
    own = data.devices[attributes.device_id] if data else None
    return PlannedDevice(
        id=attributes.device_id,
        cluster=cluster,
        limit_bytes=attributes.storage_limit_bytes,
        train_samples=len(own.train) if own else None,
        validation_samples=len(own.validation) if own else None,
        test_samples=len(own.test) if own else None,
        classes=len(set(own.train.labels.tolist())) if own else None,
        problem=problem,
    )
