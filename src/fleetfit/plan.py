"""What a run would do, before anything is trained: who is there, what fits whom, how long it takes, and what is wrong.

Sizes are exact: they follow from the configuration. Times and memory are estimates, from some steps of each phase on
this machine whose results are thrown away.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fleetfit import cloud, edge
from fleetfit.artifacts import Ledger, StepFolder
from fleetfit.cloud import Elastic
from fleetfit.clusters import fleet_notes, fleet_of
from fleetfit.config import Job
from fleetfit.data.partition import FleetData, Split, share_out
from fleetfit.data.samples import Samples
from fleetfit.data.sources import load_samples
from fleetfit.device import DeviceMemory, DeviceState, handle
from fleetfit.hardware import hardware_words, torch_device_of
from fleetfit.messages import (
    AttributesRequest,
    BackboneAssignment,
    ClusterStats,
    CoarseModel,
    Message,
    Progress,
    RefineRound,
    silent,
)
from fleetfit.models.classifier import num_parameters
from fleetfit.models.elastic import DepthOrder
from fleetfit.pipeline import reference_key
from fleetfit.privacy import promise
from fleetfit.records import DataSummary, DeviceAttributes, Record, SizedShape
from fleetfit.reference import HEADER_EPOCHS, Reference, fit_reference, shape_grid, tensors_of, untrained_reference
from fleetfit.training import steps_per_epoch

SECONDS = 0.8  # of each measurement
LEAST_STEPS = 4
FEW_SAMPLES = 128  # that importance is measured on; its time grows with their number


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


class PhaseEstimate(Record):
    """How long a phase takes, all clusters and devices together."""

    phase: str
    seconds: float
    note: str = ""


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
            shapes = cloud.sized_shapes(job, samples)
    stats = {cluster: ClusterStats(devices=members) for cluster, members in fleet.items()}
    reasons: dict[str, str] = {}
    if shapes:
        with noting():
            _, left_out = cloud.with_room(job, shapes, stats)
            reasons = {device.device_id: device.reason for device in left_out}
    if reasons:
        notes.append(f"nothing fits {len(reasons)} devices, which are left out: {', '.join(reasons)}")
    phases: tuple[PhaseEstimate, ...] = ()
    memory = None
    if estimate and data is not None and shapes and not problems:
        with noting():
            phases = tuple(_measured(job, data, fleet, shapes, reasons, progress))
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
        usable = cloud.usable_bytes(job, smallest)
        within = cloud.shapes_within(job, shapes, counted)
        fit = sorted((s for s in shapes if s.shape in within), key=lambda s: s.size_bytes)
        slowest = [max(cloud.latency_seconds(a, s) for a in counted) for s in fit] if _timed(counted) else []
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


# -- how long it takes ------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """A measurement is long enough."""


class _Watch:
    """A progress callback that ends what it watches after some steps, and knows what all of them would take."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.times: list[tuple[float, int]] = []
        self.total = 1

    def __call__(self, done: int, total: int, note: str) -> None:
        self.times.append((time.perf_counter(), done if done else len(self.times)))
        self.total = total
        now, first = self.times[-1][0], self.times[0][0]
        if len(self.times) > LEAST_STEPS and now - first > SECONDS:
            raise _Enough

    @property
    def before_steps(self) -> float:
        """What comes before the first step."""
        return self.times[0][0] - self.begun if self.times else 0.0

    def seconds(self, total: int | None = None) -> float:
        """Of all steps, and of what comes before the first."""
        if len(self.times) < 2:
            return time.perf_counter() - self.begun
        # The first step is slower than the others: memory is had, kernels are chosen.
        (start, first), (end, last) = self.times[min(1, len(self.times) - 2)], self.times[-1]
        each = (end - start) / max(1, last - first)
        return self.before_steps + each * (self.total if total is None else total)


def _watched(work: Callable[[_Watch], Any]) -> tuple[_Watch, Any]:
    """What was watched, and its result, if it came to its end."""
    watch = _Watch()
    try:
        return watch, work(watch)
    except _Enough:
        return watch, None


def _measured(
    job: Job,
    data: FleetData,
    fleet: Mapping[str, Sequence[DeviceAttributes]],
    shapes: Sequence[SizedShape],
    left_out: Mapping[str, str],
    progress: Progress,
) -> Iterator[PhaseEstimate]:
    """Every phase in the order of a run, each with what the one before it would have given, untrained."""
    steps = iter(range(100))

    def at(phase: str) -> None:
        progress("estimate", next(steps), 7, f"{phase}")

    at("reference")
    public = data.public
    model, is_fresh = untrained_reference(job, public.train)
    reference = Reference(
        config=model.backbone.config,
        parameters=num_parameters(model),
        validation_loss=0.0,
        validation_accuracy=0.0,
        accuracy=0.0,
        tensors=tensors_of(model),
    )
    yield PhaseEstimate(phase="reference", **_of_reference(job, model, is_fresh, public))
    at("elastic training")
    few = min(FEW_SAMPLES, job.backbone.importance_samples)
    quick = {"importance_samples": few, "depth_order": _any_order(job)}
    quickly = job.model_copy(update={"backbone": job.backbone.model_copy(update=quick)})
    watch, _ = _watched(lambda w: cloud.make_elastic(quickly, reference, public, w))
    importance = watch.before_steps
    training = watch.seconds() - importance + importance * job.backbone.importance_samples / few
    at("candidates")
    elastic = Elastic(
        config=reference.config,
        depth_order=_any_order(job),
        head_importance=(),
        neuron_importance_mean=(),
        tensors=reference.tensors,
    )
    watch, _ = _watched(lambda w: cloud.evaluate_candidates(job, elastic, public, w))
    grid = shape_grid(job, max(s.shape.depth for s in shapes))
    work = [s.width * s.depth for s in grid]
    share = sum(work) / max(sum(work[: len(watch.times)]), 1e-9)
    candidates = (watch.times[-1][0] - watch.begun) * share
    orders = 2 if job.backbone.depth_order == "auto" else 0  # each is tried on all candidates
    yield PhaseEstimate(phase="elastic", seconds=training + orders * candidates)
    yield PhaseEstimate(phase="candidates", seconds=candidates)

    kept = {c: [a for a in m if a.device_id not in left_out] for c, m in fleet.items()}
    kept = {c: m for c, m in kept.items() if m}
    middle = {c: _middle(job, m, shapes) for c, m in kept.items()}
    distinct = {sized.shape: c for c, sized in middle.items()}
    at("specialise")
    seconds, sent = 0.0, dict[str, BackboneAssignment]()
    at_once = job.model_copy(update={"backbone": job.backbone.model_copy(update={"specialise_steps": 0})})
    for shape, cluster in distinct.items():
        cut = cloud.cut_and_specialise(at_once, reference, elastic, public, cluster, shape, lambda *_: None)
        sent |= {c: cut.model_copy(update={"cluster": c}) for c, sized in middle.items() if sized.shape == shape}
    if job.backbone.specialise_steps:
        shape, cluster = sorted(distinct.items(), key=lambda s: s[0].width * s[0].depth)[len(distinct) // 2]
        watch, _ = _watched(lambda w: cloud.cut_and_specialise(job, reference, elastic, public, cluster, shape, w))
        seconds = watch.seconds() * len(distinct)
    yield PhaseEstimate(phase="specialise", seconds=seconds, note=f"{len(distinct)} shapes, of middle size")
    at("header search")
    cluster = sorted(sent, key=lambda c: middle[c].size_bytes)[len(sent) // 2]
    limit = min(a.storage_limit_bytes for a in kept[cluster])
    watch, _ = _watched(lambda w: edge.find_header(job, sent[cluster], data.edges[cluster], limit, w))
    yield PhaseEstimate(phase="header_search", seconds=watch.seconds() * len(sent))
    at("devices")
    distilled = job.model_copy(update={"header": job.header.model_copy(update={"search": "distilled"})})
    found = edge.find_header(distilled, sent[cluster], data.edges[cluster], limit, lambda *_: None)
    coarse = edge.coarse_model(job, sent[cluster], found, data.edges[cluster], step=1)
    seconds = _of_devices(job, kept, cluster, coarse, data.devices)
    yield PhaseEstimate(phase="refine", seconds=seconds, note=f"{sum(map(len, kept.values()))} devices, one by one")
    progress("estimate", 7, 7, "")


def _any_order(job: Job) -> DepthOrder:
    return "spread" if job.backbone.depth_order == "auto" else job.backbone.depth_order


def _middle(job: Job, members: Sequence[DeviceAttributes], shapes: Sequence[SizedShape]) -> SizedShape:
    """Of the shapes that fit a cluster the one of middle size: which is chosen is known after the training."""
    within = cloud.shapes_within(job, shapes, members)
    fit = sorted((s for s in shapes if s.shape in within), key=lambda s: s.size_bytes)
    return fit[len(fit) // 2]


def _of_reference(job: Job, model: Any, is_fresh: bool, public: Split) -> dict[str, Any]:
    cache = StepFolder(Path(job.run.cache).expanduser(), Ledger(), is_cache=True)
    if (cache.folder / f"{reference_key(job, public)}.safetensors").exists():
        return {"seconds": 0.0, "note": "trained before, in run.cache"}
    if not job.model.epochs:
        return {"seconds": 0.0, "note": "as it is"}
    torch_device = torch_device_of(job.run.torch_device)
    model, there = model.to(torch_device), public.to(torch_device)
    watch, _ = _watched(lambda w: fit_reference(job, model, there, w, None, header_first=False))
    seconds = watch.seconds()
    if is_fresh and job.model.pretrained:
        watch, _ = _watched(lambda w: fit_reference(job, model, there, w, None, header_first=True))
        seconds += watch.seconds(HEADER_EPOCHS * steps_per_epoch(len(there.train), job.model.batch_size))
        model.backbone.requires_grad_(True)
    return {"seconds": seconds}


def _of_devices(
    job: Job,
    fleet: Mapping[str, Sequence[DeviceAttributes]],
    cluster: str,
    coarse: CoarseModel,
    data: Mapping[str, Split],
) -> float:
    """All devices, from how long one takes for the samples that it has."""
    attributes = sorted(fleet[cluster], key=lambda a: len(data[a.device_id].train))[len(fleet[cluster]) // 2]
    own = data[attributes.device_id]
    known = attributes.model_copy(update={"num_samples": len(own.train) + len(own.validation)})
    state = DeviceState(known, own, DeviceMemory(), torch_device_of(job.run.torch_device))
    took = []
    messages: list[Message] = [AttributesRequest(step=0), coarse, RefineRound(step=2, round=1, tensors={})]
    for message in messages:
        begun = time.perf_counter()
        state, _ = handle(state, message)
        took.append(time.perf_counter() - begun)
    _, features, round_ = took
    each = 2 * features + job.refine.rounds * round_  # in the end it trains alone too, to compare
    samples = sum(len(data[a.device_id].train) for members in fleet.values() for a in members)
    return each * samples / max(1, len(own.train))
