"""The cloud: reference in, one backbone per cluster out (Phase 1, Algorithm 1). Sees public data and attributes."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from fleetfit.cloud.elastic import Elastic, elastic_of
from fleetfit.cloud.elastic_training import evaluate_shape
from fleetfit.cloud.reference import (
    ProgressOf,
    check_inputs,
    own_header,
    shape_grid,
)
from fleetfit.config.job import Job
from fleetfit.config.profiles import SAMPLES_PER_EPOCH, vit_operations
from fleetfit.core.encoding import Message
from fleetfit.core.hardware import torch_device_of
from fleetfit.core.randomness import named_generator
from fleetfit.core.records import BackboneShape, Candidate, DeviceAttributes, LeftOut, Record, SizedShape
from fleetfit.data.partition import Split
from fleetfit.data.samples import Samples
from fleetfit.data.text_forms import described_backbone
from fleetfit.edge.messages import ClusterStats
from fleetfit.method.choices import (
    greedy_accuracy,
    greedy_size,
    optimum,
    random_choice,
    smallest,
    trade_off_score,
    trade_off_score_accuracy,
)
from fleetfit.method.energy import cluster_energy_joules
from fleetfit.method.pareto_grid import choose, make_grid, pareto_front_grid
from fleetfit.method.size import safetensors_size_bytes, zeta
from fleetfit.models.classifier import num_parameters
from fleetfit.models.elastic import ElasticBackbone
from fleetfit.models.header import Header, build_header
from fleetfit.models.memory import peak_bytes


class Candidates(Message):
    """Every (w, d), evaluated once; the objectives that do not depend on the cluster."""

    kind: ClassVar[str] = "candidates"
    candidates: tuple[Candidate, ...]


class ClusterChoice(Record):
    """One cluster's view of all candidates and who would choose which; lists run along the candidates.

    Grid coordinates are None, and ``on_front`` false, for candidates over the limit.
    """

    cluster: str
    limit_bytes: int
    fits: tuple[bool, ...]
    energy_joules: tuple[float, ...]
    coordinates: tuple[tuple[int, ...] | None, ...]
    on_front: tuple[bool, ...]
    trade_off: tuple[float, ...] = Field(description="score (a) over all candidates; lower is better")
    trade_off_accuracy: tuple[float, ...] = Field(description="score (b) over all candidates; higher is better")
    chosen_by: dict[str, int] = Field(description="method -> index of the candidate it chooses")
    chosen: int = Field(description="index of the candidate that the job's method chooses")


def evaluate_candidates(job: Job, result: Elastic, public: Split, progress: ProgressOf) -> Candidates:
    """Loss, accuracy and size of every (w, d), once: none of them depends on the cluster."""
    elastic, model = elastic_of(job, result, public.train.num_classes)
    model.to(torch_device_of(job.run.torch_device))  # and with it the elastic backbone, which is in it
    validation = public.validation.to(torch_device_of(job.run.torch_device))
    candidates = []
    shapes = shape_grid(job, elastic.num_layers)
    for done, shape in enumerate(shapes, start=1):
        scores = evaluate_shape(elastic, model.header, validation, shape)
        sized = _sized(elastic, model.header, shape)
        candidates.append(
            Candidate(
                shape=shape,
                loss=scores.loss,
                accuracy=scores.accuracy,
                parameters=sized.parameters,
                size_bytes=sized.size_bytes,
                zeta=sized.zeta,
            )
        )
        progress(done, len(shapes), f"{done} of {len(shapes)} evaluated")
    return Candidates(candidates=tuple(candidates))


def sized_shapes(job: Job, samples: Samples) -> tuple[SizedShape, ...]:
    """Every (w, d) in bytes, from the configuration alone: nothing is trained, and no weights are made.

    Args:
        job: The resolved job.
        samples: Some that have the form of all: they say what inputs are, and how many classes there are.

    Raises:
        ValueError: the model cannot be built, has fewer layers than a depth of the job, or takes other inputs.
    """
    backbone = described_backbone(job.model, samples.inputs.form)
    check_inputs(job, backbone, samples.inputs.shape)
    with torch.device("meta"):
        features = backbone.feature_shape
        header = build_header(own_header(job, features), features, samples.num_classes)
        elastic = ElasticBackbone(backbone)
        sized = tuple(_sized(elastic, header, shape) for shape in shape_grid(job, elastic.num_layers))
    if not any(group.memory_limit for group in job.fleet.devices):
        return sized
    # Weights are needed to run, but not their values.
    elastic, header = ElasticBackbone(backbone.to_empty(device="cpu").eval()), header.to_empty(device="cpu").eval()
    one = torch.zeros(1, *samples.inputs.shape, dtype=samples.inputs[torch.arange(1)].dtype)
    return tuple(
        s.model_copy(
            update={
                "memory_bytes": s.size_bytes + peak_bytes(lambda s=s: header(elastic.run(one, s.shape).features))  # type: ignore[misc]
            }
        )
        for s in sized
    )


def operations(elastic: ElasticBackbone, shape: BackboneShape) -> float:
    """Floating-point operations of one sample's forward pass in matrix products, header not counted."""
    config, takes = elastic.backbone.config, elastic.backbone.input_shape
    patch = config.get("patch_size")
    if len(takes) == 3 and isinstance(patch, int):
        channels, rows, columns = takes
        patches = (rows // patch) * (columns // patch)
        embedding, layer = vit_operations(elastic.hidden_size, elastic.num_neurons, patches, channels * patch**2, 1)
    else:
        embedding, (_, layer) = 0.0, vit_operations(elastic.hidden_size, elastic.num_neurons, takes[0], 1, 0)
    return embedding + shape.width * shape.depth * layer


def latency_seconds(device: DeviceAttributes, shape: SizedShape) -> float:
    """How long one sample takes on a device, by its profile (T of Eq. 2 is that of 1,000 samples)."""
    if device.latency is not None and device.latency.seconds_per_operation is not None:
        return device.latency.seconds_per_operation * shape.operations
    volume = shape.shape.width * shape.shape.depth
    return (device.energy.latency_seconds + device.energy.latency_slope_seconds * volume) / SAMPLES_PER_EPOCH


def over(job: Job, device: DeviceAttributes, shape: SizedShape) -> str:
    """Which limit of a device a shape does not keep, in words; empty: it keeps all."""
    what = f"the smallest candidate, width {shape.shape.width:g} and depth {shape.shape.depth}"
    if shape.size_bytes > usable_bytes(job, device):
        return (
            f"its storage limit of {device.storage_limit_bytes} bytes ({usable_bytes(job, device):.0f} without the "
            f"room for a header, header.room = {job.header.room:g}) is too small for {what}, of "
            f"{shape.size_bytes} bytes"
        )
    if device.memory_limit_bytes is not None and shape.memory_bytes > device.memory_limit_bytes:
        return (
            f"its memory limit of {device.memory_limit_bytes} bytes is too small for {what}, which takes "
            f"{shape.memory_bytes} bytes"
        )
    if device.latency is not None and (takes := latency_seconds(device, shape)) > device.latency.seconds:
        return f"its latency limit of {device.latency.seconds:g} s is too short for {what}, which takes {takes:.3g} s"
    return ""


def _sized(elastic: ElasticBackbone, header: Header, shape: BackboneShape) -> SizedShape:
    state = {f"backbone.model.{n}": (tuple(t.shape), t.dtype) for n, t in elastic.sliced_state(shape).items()}
    header_state = {f"header.{n}": (tuple(t.shape), t.dtype) for n, t in header.state_dict().items()}
    return SizedShape(
        shape=shape,
        parameters=sum(math.prod(s) for s, _ in state.values()) + num_parameters(header),
        size_bytes=safetensors_size_bytes(state | header_state, {"format": "pt"}),
        zeta=zeta(shape, elastic.hidden_size, elastic.num_heads * elastic.head_dim, elastic.num_neurons),
        operations=operations(elastic, shape),
    )


def fitting(
    job: Job, candidates: Sequence[SizedShape], stats: ClusterStats, cluster: str
) -> tuple[ClusterStats, tuple[LeftOut, ...]]:
    """The devices of a cluster that some candidate fits, and those that none does: they would end everybody's run.

    ``header.room`` of a limit stays free for a header that the edge may find.
    """
    least = min(candidates, key=lambda c: c.size_bytes)
    fitted = [d for d in stats.devices if any(not over(job, d, c) for c in candidates)]
    left_out = tuple(
        LeftOut(device_id=d.device_id, cluster=cluster, limit_bytes=d.storage_limit_bytes, reason=over(job, d, least))
        for d in stats.devices
        if d not in fitted
    )
    return stats.model_copy(update={"devices": tuple(fitted)}), left_out


def shapes_within(
    job: Job, shapes: Sequence[SizedShape], devices: Sequence[DeviceAttributes]
) -> frozenset[BackboneShape]:
    """The shapes that keep all limits of all these devices."""
    return frozenset(s.shape for s in shapes if not any(over(job, d, s) for d in devices))


def with_room(
    job: Job, shapes: Sequence[SizedShape], stats: Mapping[str, ClusterStats]
) -> tuple[dict[str, ClusterStats], tuple[LeftOut, ...]]:
    """The clusters as they are matched, without devices that nothing fits, and those devices.

    Raises:
        ValueError: nothing fits any device; names each cluster, its largest limit, the smallest shape, and a way out.
    """
    kept: dict[str, ClusterStats] = {}
    left_out: list[LeftOut] = []
    for cluster, of_cluster in stats.items():
        fitted, others = fitting(job, shapes, of_cluster, cluster)
        left_out += others
        if fitted.devices:
            kept[cluster] = fitted
    if not kept:
        least = min(shapes, key=lambda s: s.size_bytes)
        of = {c: max((d.storage_limit_bytes for d in s.devices), default=0) for c, s in stats.items()}
        limits = "; ".join(f"cluster {cluster!r}: storage limit of {most} bytes" for cluster, most in of.items())
        other = next((f"{d.device_id}: {d.reason}; " for d in left_out if "storage limit" not in d.reason), "")
        raise ValueError(
            f"{other}nothing fits any device ({limits}; header.room = {job.header.room:g} of it stays free): the "
            f"smallest candidate, width {least.shape.width:g} and depth {least.shape.depth}, has {least.size_bytes} "
            "bytes; raise fleet.devices.storage_limit, add smaller backbone.widths or backbone.depths, or take a "
            "smaller model.config"
        )
    return kept, tuple(left_out)


def usable_bytes(job: Job, device: DeviceAttributes) -> float:
    """What a device has for a backbone and the header that was distilled with it."""
    return device.storage_limit_bytes * (1 - job.header.room)


def match(
    job: Job,
    candidates: Sequence[Candidate],
    stats: ClusterStats,
    cluster: str,
    num_patches: int,
    within: Set[BackboneShape] | None = None,
) -> ClusterChoice:
    """The Pareto Front Grid's choice for one cluster (Eqs. 10-13), beside what the other methods would choose.

    Whatever the objective f3 is, only candidates whose bytes fit are looked at: ``header.room`` of the limit stays free
    for a header that the edge may find.

    Raises:
        ValueError: no candidate fits; names the cluster, its limit and the smallest candidate.
    """
    limit = min(d.storage_limit_bytes for d in stats.devices)
    usable = limit * (1 - job.header.room)
    fits = np.array([c.size_bytes <= usable and (within is None or c.shape in within) for c in candidates])
    if not fits.any():
        least = min(candidates, key=lambda c: c.size_bytes)
        raise ValueError(
            f"cluster {cluster!r}: nothing fits its storage limit of {limit} bytes ({usable:.0f} without the room for "
            f"a header, header.room = {job.header.room:g}); the smallest candidate, width {least.shape.width:g} and "
            f"depth {least.shape.depth}, has {least.size_bytes} bytes"
        )
    devices = [d.energy for d in stats.devices]
    energy = np.array(
        [cluster_energy_joules(c.shape, devices, num_patches, job.fleet.energy.epochs) for c in candidates]
    )
    loss = np.array([c.loss for c in candidates])
    accuracy = np.array([c.accuracy for c in candidates])
    size = np.array([float(c.size_bytes) if job.backbone.size == "exact" else c.zeta for c in candidates])
    inside = np.flatnonzero(fits)
    objectives = np.stack([loss, energy, size], axis=1)[inside]
    grid = make_grid(objectives, job.backbone.gamma_p)
    on_front = pareto_front_grid(grid.coordinates)
    score_a = trade_off_score(loss, energy, size)
    generator = named_generator(job.seed, "choice", cluster)
    chosen_by = {
        "pareto_grid": choose(
            objectives, grid.coordinates, on_front, job.backbone.grid_distance, job.backbone.grid_ties
        ),
        "greedy_accuracy": greedy_accuracy(accuracy[inside], loss[inside]),
        "greedy_size": greedy_size(size[inside]),
        "random": random_choice(len(inside), generator),
        "smallest": smallest(size[inside]),
        "optimum": optimum(score_a[inside], "lower"),
    }
    chosen_by = {name: int(inside[i]) for name, i in chosen_by.items()}
    place = {int(index): i for i, index in enumerate(inside)}
    return ClusterChoice(
        cluster=cluster,
        limit_bytes=limit,
        fits=tuple(bool(f) for f in fits),
        energy_joules=tuple(float(e) for e in energy),
        coordinates=tuple(
            tuple(int(v) for v in grid.coordinates[place[i]]) if i in place else None for i in range(len(candidates))
        ),
        on_front=tuple(i in place and bool(on_front[place[i]]) for i in range(len(candidates))),
        trade_off=tuple(float(s) for s in score_a),
        trade_off_accuracy=tuple(float(s) for s in trade_off_score_accuracy(accuracy, energy, size)),
        chosen_by=chosen_by,
        chosen=chosen_by[job.backbone.choice],
    )
