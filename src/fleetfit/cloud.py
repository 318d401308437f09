"""The cloud: reference in, one backbone per cluster out (Phase 1, Algorithm 1). Sees public data and attributes."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from fleetfit.config import Job
from fleetfit.data.augmentation import Augmentation, mix
from fleetfit.data.partition import Split
from fleetfit.data.samples import Samples
from fleetfit.data.text_forms import untrained_backbone
from fleetfit.elastic_training import (
    LayerImportance,
    better_depth_order,
    evaluate_shape,
    random_importance,
    removal_importance,
    reorder_by,
    second_order,
    specialise,
    taylor_importance,
    train_elastic,
)
from fleetfit.hardware import autocast, hardware_words, torch_device_of
from fleetfit.messages import BackboneAssignment, Bookmark, ClusterStats, Message, put, take
from fleetfit.method.energy import cluster_energy_joules
from fleetfit.method.matching import (
    greedy_accuracy,
    greedy_size,
    optimum,
    random_choice,
    smallest,
    trade_off_score,
    trade_off_score_accuracy,
)
from fleetfit.method.pareto_grid import choose, make_grid, pareto_front_grid
from fleetfit.method.size import safetensors_size_bytes, zeta
from fleetfit.models.classifier import Classifier, num_parameters
from fleetfit.models.elastic import Backbone, DepthOrder, ElasticBackbone
from fleetfit.models.features import FeatureShape
from fleetfit.models.header import build_header, header_from_state
from fleetfit.models.pretrained_header import load_header
from fleetfit.randomness import derive_seed, named_generator, seeded_init
from fleetfit.records import BackboneShape, Candidate, DeviceAttributes, HeaderSpec, JsonDict, Record
from fleetfit.training import ParameterAverage, Scores, evaluate, fit, rate_share, steps_per_epoch

ProgressOf = Callable[[int, int, str], None]
VALIDATE_EVERY_SECONDS = 60.0  # of a long training, for who watches it

HEADER_EPOCHS = 2  # of a fresh header alone, before a pre-trained backbone is trained with it
HEADER_RATE = 1e-2

OWN_POOLING = 4  # cells a side
TEXT_CHANNELS = 64  # one cell has to carry what sixteen do


class Reference(Message):
    """The trained reference theta_0 with its header. Tensors: ``backbone.*``, ``header.*``."""

    kind: ClassVar[str] = "reference"
    config: JsonDict
    parameters: int
    validation_loss: float
    validation_accuracy: float
    accuracy: float = Field(description="on the held-out public test split")
    curve: tuple[float, ...] = Field((), description="training loss, some fifty points")
    hardware: str = Field("", description="that it was trained on")


class Elastic(Message):
    """The elastic backbone after distillation, full size and sorted. Tensors: ``backbone.*``, ``header.*``."""

    kind: ClassVar[str] = "elastic"
    config: JsonDict
    depth_order: DepthOrder
    head_importance: tuple[tuple[float, ...], ...]
    neuron_importance_mean: tuple[float, ...]
    curve: tuple[float, ...] = ()


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


class CurveKeeper:
    """Passes progress on, and keeps about fifty points of the loss."""

    def __init__(self, progress: ProgressOf) -> None:
        self.progress = progress
        self.points: list[float] = []

    def __call__(self, step: int, steps: int, loss: float) -> None:
        """A training step is done."""
        if step % max(1, steps // 50) == 0:
            self.points.append(round(loss, 5))
        self.progress(step, steps, f"loss {loss:.3f}")


def shape_grid(job: Job, num_layers: int) -> tuple[BackboneShape, ...]:
    """All (w, d) of the job, for a reference of so many layers.

    Raises:
        ValueError: a depth over the reference's layers.
    """
    depths = job.backbone.depths or tuple(range(1, num_layers + 1))
    if max(depths) > num_layers:
        raise ValueError(f"backbone.depths must be <= the reference's {num_layers} layers, got {max(depths)}")
    widths = sorted(set(job.backbone.widths))
    return tuple(BackboneShape(width=w, depth=d) for w in widths for d in sorted(set(depths)))


def own_header(job: Job, shape: FeatureShape) -> HeaderSpec:
    """The header that the reference is trained with, and all its sub-networks are distilled with.

    Beyond: not only [CLS] is read. A narrow or shallow backbone has no time to gather all that matters in one token;
    where it lies on the grid is half of what there is to know. Text, whose words may stand anywhere, is pooled to one.
    """
    if job.model.header == "linear":
        return HeaderSpec()
    if shape.grid[0] == 1:
        return HeaderSpec(kind="blocks", channels=TEXT_CHANNELS, pooling=1)
    return HeaderSpec(kind="blocks", channels=job.header.channels, pooling=min(OWN_POOLING, max(shape.grid)))


def check_inputs(job: Job, backbone: Backbone, has: tuple[int, ...]) -> None:
    """Raises ValueError, with both numbers, if the model takes other inputs than the data has."""
    takes = backbone.input_shape
    if takes != has:
        name = f"model.pretrained = {job.model.pretrained!r}" if job.model.pretrained else "model.config"
        way = "give a model of that size" if job.model.pretrained else "set num_channels and image_size to the data's"
        raise ValueError(
            f"{name} takes inputs of {' x '.join(map(str, takes))} (channels x rows x columns), but data.source = "
            f"{job.data.source!r} has {' x '.join(map(str, has))}; {way}"
        )


def train_reference(job: Job, public: Split, progress: ProgressOf, bookmark: Bookmark | None = None) -> Reference:
    """Build the reference from its configuration, or load it pre-trained, and train it on the public split.

    Args:
        job: The resolved job.
        public: D_c.
        progress: Told of every step.
        bookmark: Where a long training is kept, to be gone on with.

    Raises:
        ValueError: the model cannot be built or loaded, or does not take the data's inputs; or there is nothing to
            train and no header.
        TrainingDiverged: the loss is not finite.
    """
    model, fresh_header = _untrained_reference(job, public.train)
    torch_device = torch_device_of(job.run.torch_device)
    model, public = model.to(torch_device), public.to(torch_device)
    header_first = fresh_header and bool(job.model.pretrained)
    curve = _fit_reference(job, model, public, progress, bookmark, header_first) if job.model.epochs else ()
    model.eval()
    validation, test = scores_of(model, public.validation), scores_of(model, public.test)
    return Reference(
        config=model.backbone.config,
        parameters=num_parameters(model),
        validation_loss=validation.loss,
        validation_accuracy=validation.accuracy,
        accuracy=test.accuracy,
        curve=curve,
        hardware=hardware_words(torch_device, job.run.threads),
        tensors=_tensors(model),
    )


def _untrained_reference(job: Job, train: Samples) -> tuple[Classifier, bool]:
    """The whole model as its training begins: pre-trained, with its header where classes agree, or fresh.

    The second value says whether its header is fresh.
    """
    config = job.model
    with seeded_init(job.seed, "reference"):
        backbone = untrained_backbone(config, train.inputs.form)
        check_inputs(job, backbone, train.inputs.shape)
        shape_grid(job, backbone.num_layers)  # a depth that is not there is told now, not after the training
        shape = backbone.feature_shape
        spec = own_header(job, shape)
        header = load_header(config.pretrained, spec, shape, train.label_names) if config.pretrained else None
        if header is None and not config.epochs:
            raise ValueError(
                f"model.epochs = 0 takes the reference as it is, but model.pretrained = {config.pretrained!r} has no "
                f"header of this kind (model.header, header.channels) for the data's {train.num_classes} classes; "
                "set model.epochs >= 1 to train one"
            )
        return Classifier(backbone, header or build_header(spec, shape, train.num_classes)), header is None


def _fit_reference(
    job: Job,
    model: Classifier,
    public: Split,
    progress: ProgressOf,
    bookmark: Bookmark | None,
    header_first: bool,
) -> tuple[float, ...]:
    """Train the whole model in place, and keep the average of its weights where the job says so; returns the curve.

    ``header_first``: the header is trained alone before (Beyond). The gradient that reaches the backbone through a
    fresh one is noise, and spoils what the backbone was pre-trained for.
    """
    config, train = job.model, public.train
    torch_device = public.train.labels.device
    augmentation = Augmentation(config.shift_pixels, config.flip, config.cutout_pixels)
    shifts = named_generator(job.seed, "reference", "shifts")
    per_epoch = steps_per_epoch(len(train), config.batch_size)

    def loss_of(rows: Tensor) -> Tensor:
        inputs, labels = augmentation(train.inputs[rows], shifts), train.labels[rows]
        mixed = mix(inputs, config.mixup, config.cutmix, shifts)
        with autocast(torch_device, job.run.precision):
            logits = model(inputs if mixed is None else mixed.images)
            loss = cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            if mixed is None:
                return loss
            partner = cross_entropy(logits, labels[mixed.partner], label_smoothing=config.label_smoothing)
        return mixed.share * loss + (1 - mixed.share) * partner

    model.train()
    if header_first and (bookmark is None or bookmark.load() is None):
        model.backbone.requires_grad_(False)
        fit(
            loss_of,
            model.header.parameters(),
            len(train),
            lengths=train.inputs.lengths,
            steps=HEADER_EPOCHS * per_epoch,
            batch_size=config.batch_size,
            learning_rate=HEADER_RATE,
            warmup_share=config.warmup_share,
            weight_decay=config.weight_decay,
            generator=named_generator(job.seed, "reference", "header", "order"),
            after_step=lambda step, steps, loss: progress(
                0, config.epochs * per_epoch, f"header alone, loss {loss:.3f}"
            ),
            name="reference, header alone",
        )
        model.backbone.requires_grad_(True)
    average = ParameterAverage(model.parameters(), config.ema) if config.ema else None
    note = ReferenceNote(model, average, public.validation)

    def tell(step: int, steps: int, loss: float) -> None:
        epoch = 1 + (step - 1) // per_epoch
        rate = config.learning_rate * rate_share(step - 1, steps, config.warmup_share)
        progress(step, steps, f"epoch {epoch} of {config.epochs}, loss {loss:.3f}, rate {rate:.1e}{note.validation}")

    fitted = fit(
        loss_of,
        model.parameters(),
        len(train),
        lengths=train.inputs.lengths,
        steps=config.epochs * per_epoch,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_share=config.warmup_share,
        weight_decay=config.weight_decay,
        generator=named_generator(job.seed, "reference", "order"),
        average=average,
        after_step=tell,
        after_epoch=note.renew,
        bookmark=bookmark,
        also_drawn_from=(shifts,),
        name="reference",
    )
    if average is not None:
        average.keep()
    return curve_of(fitted.losses)


class ReferenceNote:
    """What is told of a long training: the validation accuracy, computed now and then."""

    def __init__(self, model: Classifier, average: ParameterAverage | None, samples: Samples) -> None:
        self.model = model
        self.average = average
        self.samples = samples
        self.validation = ""
        self._computed = time.perf_counter()

    def renew(self, step: int) -> None:
        """After an epoch: look again, unless it is not long ago; short trainings are not held up."""
        if len(self.samples) == 0 or time.perf_counter() - self._computed < VALIDATE_EVERY_SECONDS:
            return
        self.model.eval()
        with self.average.in_place() if self.average else nullcontext():
            self.validation = f", validation {scores_of(self.model, self.samples).accuracy:.1%}"
        self.model.train()
        self._computed = time.perf_counter()


def label_keeping(job: Job) -> Augmentation:
    """What is done to public images after the reference; a student learns enough from other views of them."""
    return Augmentation(job.model.shift_pixels, job.model.flip)


def scores_of(model: Classifier, samples: Samples) -> Scores:
    """Loss and accuracy of a whole model."""
    return evaluate(lambda rows: model(samples.inputs[rows]), samples.labels, lengths=samples.inputs.lengths)


def curve_of(losses: Sequence[float]) -> tuple[float, ...]:
    """About fifty points of a training's losses."""
    every = max(1, len(losses) // 50)
    return tuple(round(loss, 5) for loss in losses[every - 1 :: every])


def classifier_of(job: Job, result: Reference | Elastic, num_classes: int) -> Classifier:
    """The full-size model in a checkpoint."""
    backbone = Backbone(job.model.family, result.config)
    backbone.model.load_state_dict(take(result.tensors, "backbone"), strict=True)
    shape = backbone.feature_shape
    header = header_from_state(own_header(job, shape), shape, num_classes, take(result.tensors, "header"))
    return Classifier(backbone, header)


def elastic_of(job: Job, result: Elastic, num_classes: int) -> tuple[ElasticBackbone, Classifier]:
    """The elastic backbone in a checkpoint, and the full-size model around it (its header is shared by all shapes)."""
    model = classifier_of(job, result, num_classes).eval()
    elastic = ElasticBackbone(model.backbone, result.depth_order)
    return elastic, Classifier(elastic.backbone, model.header)


def make_elastic(job: Job, reference: Reference, public: Split, progress: ProgressOf) -> Elastic:
    """Importance, reordering, depth order, and elastic training with distillation (Eqs. 6-9).

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    config, torch_device = job.backbone, torch_device_of(job.run.torch_device)
    public = public.to(torch_device)
    model = classifier_of(job, reference, public.train.num_classes).to(torch_device).eval()
    elastic, header = ElasticBackbone(model.backbone), model.header
    subset = torch.randperm(len(public.train), generator=named_generator(job.seed, "importance"))
    samples = public.train.rows(subset[: config.importance_samples])
    importance: LayerImportance
    if config.importance == "taylor":
        importance = taylor_importance(elastic, header, samples)
    elif config.importance == "second_order":
        importance = second_order(elastic, header, samples, named_generator(job.seed, "importance", "curvature"))
    elif config.importance == "exact":
        importance = removal_importance(elastic, header, samples, lambda i, n: progress(i, n, "removing each part"))
    else:
        importance = random_importance(elastic, named_generator(job.seed, "importance", "random"))
    reorder_by(elastic, importance)
    shapes = shape_grid(job, elastic.num_layers)
    if config.depth_order == "auto":
        elastic.depth_order = better_depth_order(elastic, header, public.validation, shapes)
    else:
        elastic.depth_order = config.depth_order
    elastic.backbone.train()
    curve = CurveKeeper(progress)
    depths = sorted({shape.depth for shape in shapes})
    train_elastic(elastic, header, public.train, config, depths, label_keeping(job), job.seed, curve, job.run.precision)
    return Elastic(
        config=elastic.backbone.config,
        depth_order=elastic.depth_order,
        head_importance=tuple(tuple(i.tolist()) for i in importance.heads),
        neuron_importance_mean=tuple(float(i.mean()) for i in importance.neurons),
        curve=tuple(curve.points),
        tensors=_tensors(Classifier(elastic.backbone, header)),
    )


def evaluate_candidates(job: Job, result: Elastic, public: Split, progress: ProgressOf) -> Candidates:
    """Loss, accuracy and size of every (w, d), once: none of them depends on the cluster."""
    elastic, model = elastic_of(job, result, public.train.num_classes)
    model.to(torch_device_of(job.run.torch_device))  # and with it the elastic backbone, which is in it
    validation = public.validation.to(torch_device_of(job.run.torch_device))
    header_shapes = {f"header.{n}": (tuple(t.shape), t.dtype) for n, t in model.header.state_dict().items()}
    candidates = []
    shapes = shape_grid(job, elastic.num_layers)
    for done, shape in enumerate(shapes, start=1):
        scores = evaluate_shape(elastic, model.header, validation, shape)
        state = {f"backbone.model.{n}": (tuple(t.shape), t.dtype) for n, t in elastic.sliced_state(shape).items()}
        weights = sum(int(np.prod(s)) for s, _ in state.values()) + num_parameters(model.header)
        candidates.append(
            Candidate(
                shape=shape,
                loss=scores.loss,
                accuracy=scores.accuracy,
                parameters=weights,
                size_bytes=safetensors_size_bytes(state | header_shapes, {"format": "pt"}),
                zeta=zeta(shape, elastic.hidden_size, elastic.num_heads * elastic.head_dim, elastic.num_neurons),
            )
        )
        progress(done, len(shapes), f"{done} of {len(shapes)} evaluated")
    return Candidates(candidates=tuple(candidates))


def match(
    job: Job, candidates: Sequence[Candidate], stats: ClusterStats, cluster: str, num_patches: int
) -> ClusterChoice:
    """The Pareto Front Grid's choice for one cluster (Eqs. 10-13), beside what the other methods would choose.

    Whatever the objective f3 is, only candidates whose bytes fit are looked at: ``header.room`` of the limit stays free
    for a header that the edge may find.

    Raises:
        ValueError: no candidate fits; names the cluster, its limit and the smallest candidate.
    """
    limit = min(d.storage_limit_bytes for d in stats.devices)
    usable = limit * (1 - job.header.room)
    fits = np.array([c.size_bytes <= usable for c in candidates])
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


def cut_and_specialise(
    job: Job,
    reference: Reference,
    result: Elastic,
    public: Split,
    cluster: str,
    shape: BackboneShape,
    progress: ProgressOf,
) -> BackboneAssignment:
    """Cut the chosen sub-network out, train it briefly alone, and address it to its cluster."""
    num_classes = public.train.num_classes
    elastic, full = elastic_of(job, result, num_classes)
    model = Classifier(elastic.extract(shape), full.header)
    if job.backbone.specialise_steps:
        torch_device = torch_device_of(job.run.torch_device)
        model, teacher = model.to(torch_device), classifier_of(job, reference, num_classes).to(torch_device)
        name = f"width {shape.width:g}, depth {shape.depth}"
        model.train()
        specialise(
            model,
            teacher,
            public.train.to(torch_device),
            job.backbone,
            label_keeping(job),
            job.seed,
            name,
            lambda step, steps, loss: progress(step, steps, f"{cluster}: {name}"),
            job.run.precision,
        )
    return BackboneAssignment(
        cluster=cluster,
        family=job.model.family,
        config=model.backbone.config,
        shape=shape,
        labels=public.train.label_names,
        header=model.header.spec,
        tensors=_tensors(model),
    )


def form_clusters(
    devices: Sequence[DeviceAttributes], num_clusters: int, seed: int
) -> dict[str, tuple[DeviceAttributes, ...]]:
    """Group devices by k-means on their attributes (G, C), each scaled to 0..1; clusters are numbered by storage.

    Fewer clusters come out where fewer devices differ.
    """
    from sklearn.cluster import KMeans

    points = np.array([[d.energy.power_watts, d.storage_limit_bytes] for d in devices], dtype=np.float64)
    span = np.ptp(points, axis=0)
    points = (points - points.min(axis=0)) / np.where(span > 0, span, 1.0)
    num_clusters = min(num_clusters, len(np.unique(points, axis=0)))
    state = derive_seed(seed, "k-means") % 2**31
    label = KMeans(num_clusters, n_init=10, random_state=state).fit_predict(points)
    groups = [tuple(d for d, g in zip(devices, label, strict=True) if g == k) for k in range(num_clusters)]
    groups.sort(key=lambda group: min(d.storage_limit_bytes for d in group))
    return {f"cluster{i + 1}": group for i, group in enumerate(groups)}


def _tensors(model: Classifier) -> dict[str, Tensor]:
    backbone: Mapping[str, Tensor] = model.backbone.model.state_dict()
    header: Mapping[str, Tensor] = model.header.state_dict()
    return {n: t.detach().cpu().clone() for n, t in (put("backbone", backbone) | put("header", header)).items()}
