"""The edge: searches the header on its shared set, weighs how alike devices are, aggregates, guards what is shipped."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from fleetfit.config import Job, RefineConfig
from fleetfit.data.augmentation import Augmentation, is_images, views_of
from fleetfit.data.partition import Split
from fleetfit.data.samples import Inputs, Samples
from fleetfit.hardware import CPU, fits_on, torch_device_of
from fleetfit.header_proof import make_folds
from fleetfit.header_search import search_header
from fleetfit.header_trials import CachedFeatures, FeatureSource
from fleetfit.messages import (
    BackboneAssignment,
    ClusterStats,
    CoarseModel,
    CoarseReply,
    Message,
    ProposeReply,
    RoundReply,
    put,
    take,
)
from fleetfit.method.aggregation import aggregate, alone_weights, average_weights, unit_sum
from fleetfit.method.privacy import clearly_lowest, noise_of_sum
from fleetfit.method.robust import FACTOR, shortened, vote
from fleetfit.method.similarity import (
    calibrated_weights,
    distance_matrix,
    js_divergence,
    self_distances,
    similarity_weights,
    sliced_wasserstein,
    wasserstein,
)
from fleetfit.method.size import safetensors_size_bytes
from fleetfit.models.elastic import Backbone, backbone_from_state
from fleetfit.models.features import Features, concatenated
from fleetfit.models.header import build_header, header_from_state
from fleetfit.randomness import derive_seed, named_generator
from fleetfit.records import Fault, HeaderSpec, HeaderTrial, JsonDict, ValidationScores
from fleetfit.refinement import nothing_to_drop

ProgressOf = Callable[[int, int, str], None]
JS_BINS = 8


class HeaderResult(Message):
    """The cluster's coarse model after the search. Tensors: ``backbone.*``, ``header.*``."""

    kind: ClassVar[str] = "header_result"
    header: HeaderSpec
    trials: tuple[HeaderTrial, ...]
    history: tuple[JsonDict, ...] = ()


class EdgeState(Message):
    """What the edge knows between rounds.

    Tensors: ``<device>/importance.*`` and ``<device>/header.*``, personal; ``<device>/sketch.*``, as it came.
    """

    kind: ClassVar[str] = "edge_state"
    round: int = 0
    devices: tuple[str, ...] = Field(
        (), description="those that have the coarse model: rows and columns of what follows"
    )
    distance: tuple[tuple[float, ...], ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    scores: ValidationScores = Field(description="the cluster's pooled validation scores when this state was made")
    faults: tuple[Fault, ...] = Field((), description="of this round")


class Decision(Message):
    """How the cluster ships, and the pooled validation loss (nats a sample) of every way it could."""

    kind: ClassVar[str] = "decision"
    header: Literal["coarse", "refined"]
    prior_strength: float | None = None
    loss_by_way: dict[str, float] = Field(default_factory=dict)
    devices: tuple[str, ...] = Field((), description="those that had a voice in it")
    joined: tuple[str, ...] = Field((), description="those that got the coarse model in this step")
    faults: tuple[Fault, ...] = ()


class LiveFeatures:
    """Features computed anew from inputs, so that the backbone can be trained with the header."""

    def __init__(self, backbone: Backbone, samples: Samples) -> None:
        self.backbone = backbone
        self.samples = samples
        self.labels = samples.labels

    def features(self, rows: Tensor) -> Features:
        """Features of some samples; gradients reach the backbone."""
        features: Features = self.backbone(self.samples.inputs[rows])
        return features

    def parameters(self) -> list[nn.Parameter]:
        """The backbone's."""
        return list(self.backbone.parameters())


def cached_features(backbone: Backbone, samples: Samples) -> CachedFeatures:
    """Features of a frozen backbone, computed once; they stay where it is, or wait on the CPU where that is full."""
    shape, there = backbone.feature_shape, samples.labels.device
    num_bytes = 2 * len(samples) * shape.num_tokens * shape.channels * torch.float32.itemsize
    home = there if fits_on(there, num_bytes) else CPU
    with torch.no_grad():
        parts = [backbone(inputs).to(home) for inputs in samples.inputs.batches()]
    return CachedFeatures(concatenated(parts), samples.labels)


def with_views(samples: Samples, views: int, augmentation: Augmentation, generator: torch.Generator) -> Samples:
    """The samples and randomly changed copies of them. Of what is no image there is one view."""
    if not is_images(samples.inputs[:1]):
        return samples
    inputs = views_of(samples.inputs[:], views, augmentation, generator)
    return replace(samples, inputs=Inputs.of(inputs), labels=samples.labels.repeat(views))


def find_header(
    job: Job, assignment: BackboneAssignment, data: Split, limit_bytes: int, progress: ProgressOf
) -> HeaderResult:
    """Search the header that suits the cluster's backbone (Section III-C).

    Raises:
        ValueError: no header fits into what the backbone leaves of the storage limit.
        TrainingDiverged: the loss is not finite.
    """
    config = job.header
    sent = take(assignment.tensors, "backbone")
    backbone = backbone_from_state(assignment.family, assignment.config, sent)
    torch_device = torch_device_of(job.run.torch_device)
    backbone.to(torch_device).eval()
    shape, num_classes = backbone.feature_shape, len(assignment.labels)
    distilled = header_from_state(assignment.header, shape, num_classes, take(assignment.tensors, "header"))
    distilled.to(torch_device)
    generator = named_generator(job.seed, "views", assignment.cluster)
    images = is_images(data.train.inputs[:1])
    train = with_views(data.train, config.views, Augmentation(job.model.shift_pixels, job.model.flip), generator)
    train, alone = train.to(torch_device), len(data.validation) > 0
    validation = (data.validation if alone else data.train).to(torch_device)
    trains_backbone = not config.freeze_backbone and config.search == "enas"
    source_of = LiveFeatures if trains_backbone else cached_features
    sources: tuple[FeatureSource, FeatureSource] = source_of(backbone, train), source_of(backbone, validation)
    folds = make_folds(
        sources[0],
        sources[1] if alone else None,
        config.views if images else 1,
        named_generator(job.seed, "folds", assignment.cluster),
    )
    held = {f"backbone.model.{n}": (tuple(t.shape), t.dtype) for n, t in backbone.model.state_dict().items()}
    result = search_header(
        config.search,
        *sources,
        config,
        shape,
        num_classes,
        limit_bytes - safetensors_size_bytes(held, {"format": "pt"}),
        derive_seed(job.seed, "header", assignment.cluster),
        given=[distilled] if config.keep_distilled or config.search == "distilled" else [],
        folds=folds,
        on_progress=lambda done, total, note: progress(done, total, f"{assignment.cluster}: {note}"),
    )
    tensors = put("backbone", dict(backbone.model.state_dict())) | put("header", dict(result.header.state_dict()))
    return HeaderResult(
        header=result.header.spec,
        trials=result.trials,
        history=tuple(result.history),
        tensors={n: t.detach().cpu().clone() for n, t in tensors.items()},
    )


def too_small(job: Job, assignment: BackboneAssignment, stats: ClusterStats) -> dict[str, Fault]:
    """Devices that the cluster's model was not made for, since nothing fits them; they are not asked any more.

    The cloud chose for the smallest of the others, with ``header.room`` of its limit left free.
    """
    sent = {
        f"{prefix}{name}": (tuple(t.shape), t.dtype)
        for prefix, tensors in (
            ("backbone.model.", take(assignment.tensors, "backbone")),
            ("header.", take(assignment.tensors, "header")),
        )
        for name, t in tensors.items()
    }
    size_bytes = safetensors_size_bytes(sent, {"format": "pt"})
    return {
        d.device_id: Fault(
            device_id=d.device_id,
            step="coarse model",
            reason=f"left out: nothing fits its limit of {d.storage_limit_bytes} bytes, this has {size_bytes}",
            times=1,
            recovered=False,
        )
        for d in stats.devices
        if d.storage_limit_bytes * (1 - job.header.room) < size_bytes
    }


def coarse_model(job: Job, assignment: BackboneAssignment, found: HeaderResult, data: Split, step: int) -> CoarseModel:
    """What every device of the cluster is sent."""
    labels = torch.cat([data.train.labels, data.validation.labels])
    counts = torch.bincount(labels, minlength=len(assignment.labels)).double() + 1.0
    if job.refine.prior_shares == "uniform":
        counts = torch.ones_like(counts)
    return CoarseModel(
        step=step,
        family=assignment.family,
        config=assignment.config,
        shape=assignment.shape,
        labels=assignment.labels,
        header=found.header,
        refine=job.refine,
        seed=job.seed,
        class_shares=tuple((counts / counts.sum()).tolist()),
        tensors=found.tensors,
    )


def pruning_note(job: Job, assignment: BackboneAssignment, found: HeaderResult) -> str | None:
    """That Algorithm 2 will drop nothing of the header that was found, and why; None if it will, or is not asked to."""
    with torch.device("meta"):
        shape = Backbone(assignment.family, assignment.config).feature_shape
        header = build_header(found.header, shape, len(assignment.labels))
    return nothing_to_drop(header, job.refine)


def pooled(scores: Sequence[ValidationScores]) -> ValidationScores:
    """Several devices' scores as one."""
    return ValidationScores(
        num_samples=sum(s.num_samples for s in scores),
        loss_sum=sum(s.loss_sum for s in scores),
        num_correct=sum(s.num_correct for s in scores),
    )


def weigh_devices(
    refine: RefineConfig, sketches: Sequence[Mapping[str, Tensor]]
) -> tuple[Float[Tensor, "device peer"], Float[Tensor, "device peer"]]:
    """How alike devices are: (distances, weights of Eq. 21), both [device, peer].

    With one device, or for alone and average, nothing is measured and the distances are 0.
    """
    number = len(sketches)
    if refine.similarity == "alone" or number == 1:
        return torch.zeros(number, number), alone_weights(number)
    if refine.similarity == "average":
        return torch.zeros(number, number), average_weights(number)
    whole = [sketch["all"] for sketch in sketches]
    if refine.similarity == "js":
        distance = distance_matrix(whole, lambda a, b: js_divergence(a, b, JS_BINS))
        return distance, similarity_weights(distance)
    measure = sliced_wasserstein if refine.sketch == "sliced" else wasserstein
    distance = distance_matrix(whole, measure)
    if refine.similarity == "wasserstein":
        return distance, similarity_weights(distance)
    if refine.sketch == "sliced":
        within = torch.tensor([measure(s["first"], s["second"]) for s in sketches], dtype=torch.float64)
    else:
        # A device with one sample cannot show its own noise; it takes the cluster's mean below.
        within = self_distances([torch.cat([w, w]) if len(w) < 2 else w for w in whole], measure)
    known = within[within > 0]
    if len(known) == 0:
        return distance, average_weights(number)
    within = torch.where(within > 0, within, known.mean())
    return distance, calibrated_weights(distance, within, refine.temperature)


def first_state(refine: RefineConfig, replies: Mapping[str, CoarseReply]) -> EdgeState:
    """What the edge knows after the devices have shown their sketches."""
    return with_joined(refine, EdgeState(scores=pooled([r.scores for r in replies.values()])), replies, tuple(replies))


def with_joined(
    refine: RefineConfig, state: EdgeState, replies: Mapping[str, CoarseReply], order: Sequence[str]
) -> EdgeState:
    """The state with the devices that have got the coarse model just now; all are weighed again, in this order."""
    if not replies:
        return state
    tensors = dict(state.tensors)
    for device, reply in replies.items():
        tensors |= put(f"{device}/sketch", take(reply.tensors, "sketch"))
    devices = tuple(d for d in order if d in state.devices or d in replies)
    distance, weights = weigh_devices(refine, [take(tensors, f"{d}/sketch") for d in devices])
    return state.model_copy(
        update={
            "devices": devices,
            "distance": tuple(tuple(row) for row in distance.tolist()),
            "weights": tuple(tuple(row) for row in weights.tolist()),
            "tensors": tensors,
        }
    )


def weights_among(state: EdgeState, devices: Collection[str]) -> Float[Tensor, "device peer"]:
    """Weights of these devices for each other, [device, peer]; where others are left out, rows sum to 1 again.

    Who has never been weighed listens to itself.
    """
    weights = torch.tensor(state.weights, dtype=torch.float64)
    if tuple(devices) == state.devices:
        return weights
    among = alone_weights(len(devices))
    for row, device in enumerate(devices):
        if device in state.devices:
            own = weights[state.devices.index(device)]
            known = {d: own[i] for i, d in enumerate(state.devices) if d in devices}
            among[row] = torch.stack([known.get(d, torch.zeros_like(own[0])) for d in devices]) / sum(known.values())
    return among


def distance_among(state: EdgeState, devices: Collection[str]) -> tuple[tuple[float, ...], ...]:
    """Distances of these devices, [device, peer]; 0 from and to who has never been weighed."""
    place = {device: i for i, device in enumerate(state.devices)}
    return tuple(
        tuple(state.distance[place[a]][place[b]] if a in place and b in place else 0.0 for b in devices)
        for a in devices
    )


def next_state(
    state: EdgeState, replies: Mapping[str, RoundReply], sent: Mapping[str, Tensor] | None = None
) -> EdgeState:
    """Aggregate a round's replies for each device (Eq. 21): importance sets scaled to unit sum, weights as they are.

    Only who replied is listened to. For who did not, what the edge knew before stays.

    Args:
        state: Before the round.
        replies: Of the round.
        sent: The coarse header, with ``members.robust``: changes to it are shortened to a multiple of the median one,
            and who sent a longer one is named among the faults.
    """
    weights = weights_among(state, replies)
    importance = aggregate(weights, [unit_sum(take(r.tensors, "importance")) for r in replies.values()])
    headers: list[dict[str, Tensor]] = [{} for _ in replies]
    sets = [take(r.tensors, "header") for r in replies.values()]
    faults: tuple[Fault, ...] = ()
    if all(sets):
        if sent is not None:
            sets, faults = _within_reason(sent, dict(zip(replies, sets, strict=True)), state.round + 1)
        headers = aggregate(weights, sets)
    tensors = dict(state.tensors)
    for device, of_importance, of_header in zip(replies, importance, headers, strict=True):
        tensors |= put(f"{device}/importance", of_importance) | put(f"{device}/header", of_header)
    noise = noise_of_sum(weights, [r.noise for r in replies.values()])
    if bool(noise.any()):
        tensors |= {f"{device}/noise.header": of_device for device, of_device in zip(replies, noise, strict=True)}
    return state.model_copy(
        update={
            "round": state.round + 1,
            "tensors": tensors,
            "scores": pooled([r.scores for r in replies.values()]),
            "faults": faults,
        }
    )


def _within_reason(
    sent: Mapping[str, Tensor], sets: Mapping[str, Mapping[str, Tensor]], number: int
) -> tuple[list[dict[str, Tensor]], tuple[Fault, ...]]:
    """Header weights whose changes are not too long, and whose were."""
    changes = [{name: t.double() - sent[name].double() for name, t in one.items()} for one in sets.values()]
    changes, norms, most = shortened(changes)
    kept, faults = [], []
    for (device, one), change, norm in zip(sets.items(), changes, norms, strict=True):
        if norm <= most:
            kept.append(dict(one))
            continue
        kept.append({name: (sent[name].double() + change[name]).to(t.dtype) for name, t in one.items()})
        reason = f"its header changed by {norm:.3g}, shortened to {most:.3g}: {FACTOR:g} times the cluster's median"
        faults.append(Fault(device_id=device, step=f"round {number}", reason=reason, times=1, recovered=True))
    return kept, tuple(faults)


def personal(state: EdgeState, device: str) -> dict[str, Tensor]:
    """The tensors addressed to one device; none if it has not finished a round yet."""
    start, sketch = f"{device}/", f"{device}/sketch."
    return {
        name[len(start) :]: t
        for name, t in state.tensors.items()
        if name.startswith(start) and not name.startswith(sketch)
    }


def decide(refine: RefineConfig, replies: Mapping[str, ProposeReply], num_classes: int | None = None) -> Decision:
    """Choose how the whole cluster ships, by validation loss pooled over its devices.

    Given ``num_classes``, no single device decides it (``method.robust.vote``): a mean loss counts for at most twice
    that of a guess among so many.

    Choosing per device on a few samples is noise and loses. With the guard, refined headers ship only where they are no
    worse than those sent; without it, always. Where no device has validation samples nothing speaks for a change, and
    where scores are noised (``[privacy]``) only what stands out of the noise does. A way whose loss is not finite ships
    nowhere: where no refined header has one that is, those sent ship, without the guard too.

    Raises:
        ValueError: no way has a finite loss.
    """
    ways = list(next(iter(replies.values())).scores)
    total = {way: pooled([r.scores[way] for r in replies.values()]) for way in ways}
    if total[ways[0]].num_samples == 0:
        return Decision(header="coarse" if refine.guard else "refined")
    loss = {way: s.loss_sum / s.num_samples for way, s in total.items()}
    if num_classes is not None:
        loss = dict(zip(ways, _votes(ways, replies, num_classes), strict=True))
    loss = {way: nats for way, nats in loss.items() if math.isfinite(nats)}
    if not loss:
        raise ValueError(f"no way to ship has a finite validation loss ({', '.join(ways)})")
    refined = [way for way in loss if way.startswith("refined")]
    allowed = list(loss) if refine.guard else refined or list(loss)
    # The refined way wins ties: it carries the same accuracy in fewer parameters.
    best = min(allowed, key=lambda way: (loss[way], way.startswith("coarse")))
    if noise := sum(r.noise**2 for r in replies.values()) ** 0.5 / total[ways[0]].num_samples:
        best = clearly_lowest({way: loss[way] for way in allowed}, noise)
    header, _, strength = best.partition("/")
    return Decision(
        header="coarse" if header == "coarse" else "refined",
        prior_strength=float(strength) if strength else None,
        loss_by_way=loss,
    )


def _votes(ways: Sequence[str], replies: Mapping[str, ProposeReply], num_classes: int) -> list[float]:
    """The cluster's loss of each way; where losses are noised they are differences, and may be below 0."""
    numbers = torch.tensor([float(r.scores[ways[0]].num_samples) for r in replies.values()])
    losses = [[r.scores[way].loss_sum / max(r.scores[way].num_samples, 1) for way in ways] for r in replies.values()]
    ceiling = 2 * math.log(max(num_classes, 2))
    result: list[float] = vote(torch.tensor(losses, dtype=torch.float64), numbers, ceiling).tolist()
    return result
