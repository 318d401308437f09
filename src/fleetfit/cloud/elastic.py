"""The elastic backbone: made from the reference, kept, and cut to a shape for a cluster (Phase 1)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.cloud.elastic_training import better_depth_order, specialise, train_elastic
from fleetfit.cloud.importance import (
    LayerImportance,
    random_importance,
    removal_importance,
    reorder_by,
    second_order,
    taylor_importance,
)
from fleetfit.cloud.reference import (
    Checkpoint,
    ProgressOf,
    Reference,
    classifier_of,
    shape_grid,
)
from fleetfit.config.job import Job
from fleetfit.core.checkpoints import Bookmark
from fleetfit.core.hardware import torch_device_of
from fleetfit.core.randomness import named_generator
from fleetfit.core.records import BackboneShape
from fleetfit.data.augmentation import Augmentation
from fleetfit.data.partition import Split
from fleetfit.edge.messages import BackboneAssignment
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import DepthOrder, ElasticBackbone
from fleetfit.models.packed import packed_tensors


class Elastic(Checkpoint):
    """The elastic backbone after distillation, full size and sorted."""

    kind: ClassVar[str] = "elastic"
    depth_order: DepthOrder
    head_importance: tuple[tuple[float, ...], ...]
    neuron_importance_mean: tuple[float, ...]
    curve: tuple[float, ...] = ()


def some_points(losses: Sequence[float]) -> tuple[float, ...]:
    """About fifty points of the loss."""
    every = max(1, len(losses) // 50)
    return tuple(round(loss, 5) for loss in losses[every - 1 :: every])


def label_keeping(job: Job) -> Augmentation:
    """What is done to public images after the reference; a student learns enough from other views of them."""
    return Augmentation(job.model.shift_pixels, job.model.flip)


def elastic_of(job: Job, result: Elastic, num_classes: int) -> tuple[ElasticBackbone, Classifier]:
    """The elastic backbone in a checkpoint, and the full-size model around it (its header is shared by all shapes)."""
    model = classifier_of(job, result, num_classes).eval()
    elastic = ElasticBackbone(model.backbone, result.depth_order)
    return elastic, Classifier(elastic.backbone, model.header)


def make_elastic(
    job: Job, reference: Reference, public: Split, progress: ProgressOf, bookmark: Bookmark | None = None
) -> Elastic:
    """Importance, reordering, depth order, and elastic training with distillation (Eqs. 6-9).

    Args:
        job: The resolved job.
        reference: The teacher.
        public: D_c.
        progress: Told how far it is.
        bookmark: Where a long training is kept, to be resumed; for distillation in one stage.

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
    depths = sorted({shape.depth for shape in shapes})
    losses = train_elastic(
        elastic,
        header,
        public.train,
        config,
        depths,
        label_keeping(job),
        job.seed,
        lambda step, steps, loss: progress(step, steps, f"loss {loss:.3f}"),
        job.run.precision,
        bookmark,
    )
    return Elastic(
        config=elastic.backbone.config,
        depth_order=elastic.depth_order,
        head_importance=tuple(tuple(i.tolist()) for i in importance.heads),
        neuron_importance_mean=tuple(float(i.mean()) for i in importance.neurons),
        curve=some_points(losses),
        tensors=packed_tensors(Classifier(elastic.backbone, header)),
    )


def cut_and_specialise(
    job: Job,
    reference: Reference,
    result: Elastic,
    public: Split,
    cluster: str,
    shape: BackboneShape,
    progress: ProgressOf,
    bookmark: Bookmark | None = None,
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
            bookmark,
        )
    return BackboneAssignment(
        cluster=cluster,
        family=job.model.family,
        config=model.backbone.config,
        shape=shape,
        labels=public.train.label_names,
        header=model.header.spec,
        class_shares=class_shares(public.train.labels, num_classes),
        tensors=packed_tensors(model),
    )


def class_shares(labels: Int[Tensor, " sample"], num_classes: int) -> tuple[float, ...]:
    """Shares of the classes, none of them 0: each class counts one sample more than there are."""
    counts = torch.bincount(labels, minlength=num_classes).double() + 1.0
    return tuple((counts / counts.sum()).tolist())
