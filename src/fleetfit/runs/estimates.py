"""How long each phase of a run takes, from some steps of each on this machine whose results are thrown away."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fleetfit.cloud import candidates as cloud_candidates
from fleetfit.cloud import elastic as cloud_elastic
from fleetfit.cloud.elastic import Elastic
from fleetfit.cloud.reference import (
    HEADER_EPOCHS,
    Reference,
    fit_reference,
    shape_grid,
    untrained_reference,
)
from fleetfit.cloud.run import reference_key
from fleetfit.config.job import Job
from fleetfit.core.encoding import Message
from fleetfit.core.hardware import torch_device_of
from fleetfit.core.progress import Progress
from fleetfit.core.records import DeviceAttributes, Record, SizedShape
from fleetfit.data.partition import FleetData, Split
from fleetfit.device.device import DeviceState, handle
from fleetfit.device.memory import DeviceMemory
from fleetfit.device.messages import ATTRIBUTES_STEP, AttributesRequest, CoarseModel, RefineRound, round_step
from fleetfit.edge import header as edge
from fleetfit.edge.messages import BackboneAssignment
from fleetfit.models.classifier import num_parameters
from fleetfit.models.elastic import DepthOrder
from fleetfit.models.packed import packed_tensors
from fleetfit.models.training import steps_per_epoch

SECONDS = 0.8  # of each measurement
LEAST_STEPS = 4
FEW_SAMPLES = 128  # that importance is measured on; its time grows with their number


class PhaseEstimate(Record):
    """How long a phase takes, all clusters and devices together."""

    phase: str
    seconds: float
    note: str = ""


class Enough(Exception):
    """A measurement is long enough."""


class Watch:
    """A progress callback that ends what it watches after some steps, and knows what all of them would take."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.times: list[tuple[float, int]] = []
        self.total = 1

    def __call__(self, done: int, total: int, note: str) -> None:
        """A step is done.

        Raises:
            Enough: it is known how long they take.
        """
        self.times.append((time.perf_counter(), done if done else len(self.times)))
        self.total = total
        now, first = self.times[-1][0], self.times[0][0]
        if len(self.times) > LEAST_STEPS and now - first > SECONDS:
            raise Enough

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


def _watched(work: Callable[[Watch], Any]) -> tuple[Watch, Any]:
    """What was watched, and its result, if it came to its end."""
    watch = Watch()
    try:
        return watch, work(watch)
    except Enough:
        return watch, None


def measured(
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
        tensors=packed_tensors(model),
    )
    yield PhaseEstimate(phase="reference", **_of_reference(job, model, is_fresh, public))
    at("elastic training")
    few = min(FEW_SAMPLES, job.backbone.importance_samples)
    quick = {"importance_samples": few, "depth_order": _any_order(job)}
    quickly = job.model_copy(update={"backbone": job.backbone.model_copy(update=quick)})
    watch, _ = _watched(lambda w: cloud_elastic.make_elastic(quickly, reference, public, w))
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
    watch, _ = _watched(lambda w: cloud_candidates.evaluate_candidates(job, elastic, public, w))
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
        cut = cloud_elastic.cut_and_specialise(at_once, reference, elastic, public, cluster, shape, lambda *_: None)
        sent |= {c: cut.model_copy(update={"cluster": c}) for c, sized in middle.items() if sized.shape == shape}
    if job.backbone.specialise_steps:
        shape, cluster = sorted(distinct.items(), key=lambda s: s[0].width * s[0].depth)[len(distinct) // 2]
        watch, _ = _watched(
            lambda w: cloud_elastic.cut_and_specialise(job, reference, elastic, public, cluster, shape, w)
        )
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
    coarse = edge.coarse_model(job, sent[cluster], found)
    seconds = _of_devices(job, kept, cluster, coarse, data.devices)
    yield PhaseEstimate(phase="refine", seconds=seconds, note=f"{sum(map(len, kept.values()))} devices, one by one")
    progress("estimate", 7, 7, "")


def _any_order(job: Job) -> DepthOrder:
    return "spread" if job.backbone.depth_order == "auto" else job.backbone.depth_order


def _middle(job: Job, members: Sequence[DeviceAttributes], shapes: Sequence[SizedShape]) -> SizedShape:
    """Of the shapes that fit a cluster the one of middle size: which is chosen is known after the training."""
    within = cloud_candidates.shapes_within(job, shapes, members)
    fit = sorted((s for s in shapes if s.shape in within), key=lambda s: s.size_bytes)
    return fit[len(fit) // 2]


def _of_reference(job: Job, model: Any, is_fresh: bool, public: Split) -> dict[str, Any]:
    if (job.run.cache_folder / f"{reference_key(job, public)}.safetensors").exists():
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
    messages: list[Message] = [
        AttributesRequest(step=ATTRIBUTES_STEP),
        coarse,
        RefineRound(step=round_step(1), round=1, tensors={}),
    ]
    for message in messages:
        begun = time.perf_counter()
        state, _ = handle(state, message)
        took.append(time.perf_counter() - begun)
    _, features, round_ = took
    each = 2 * features + job.refine.rounds * round_  # in the end it trains alone too, to compare
    samples = sum(len(data[a.device_id].train) for members in fleet.values() for a in members)
    return each * samples / max(1, len(own.train))
