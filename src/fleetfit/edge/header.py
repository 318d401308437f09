"""The edge before its rounds: the header that it searches on its shared set, and what its devices are sent."""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fleetfit.config.job import Job, narrowed, reads_of
from fleetfit.core.checkpoints import Checkpoints
from fleetfit.core.encoding import Message, take
from fleetfit.core.hardware import CPU, fits_on, torch_device_of
from fleetfit.core.randomness import derive_seed, named_generator
from fleetfit.core.records import Fault, HeaderSpec, HeaderTrial, JsonDict
from fleetfit.core.step_cache import cached, code_of, content_of
from fleetfit.data.augmentation import Augmentation, is_images, views_of
from fleetfit.data.partition import Split
from fleetfit.data.samples import Inputs, Samples
from fleetfit.device.messages import COARSE_STEP, CoarseModel
from fleetfit.device.refinement import nothing_to_drop
from fleetfit.edge.header_proof import make_folds
from fleetfit.edge.header_search import search_header
from fleetfit.edge.header_trials import CachedFeatures, FeatureSource
from fleetfit.edge.messages import BackboneAssignment, ClusterStats
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone
from fleetfit.models.features import Features, concatenated
from fleetfit.models.header import build_header
from fleetfit.models.packed import packed_tensors, stored_size_bytes

ProgressOf = Callable[[int, int, str], None]
JS_BINS = 8


class HeaderResult(Message):
    """The cluster's coarse model after the search. Tensors: ``backbone.*``, ``header.*``."""

    kind: ClassVar[str] = "header_result"
    header: HeaderSpec
    trials: tuple[HeaderTrial, ...]
    history: tuple[JsonDict, ...] = ()


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
    torch_device = torch_device_of(job.run.torch_device)
    model = assignment.build(assignment.tensors).to(torch_device)
    backbone, distilled = model.backbone, model.header
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
    result = search_header(
        config.search,
        *sources,
        config,
        backbone.feature_shape,
        len(assignment.labels),
        limit_bytes - stored_size_bytes(backbone.model.state_dict(), {}),
        derive_seed(job.seed, "header", assignment.cluster),
        given=[distilled] if config.keep_distilled or config.search == "distilled" else [],
        folds=folds,
        on_progress=lambda done, total, note: progress(done, total, f"{assignment.cluster}: {note}"),
    )
    return HeaderResult(
        header=result.header.spec,
        trials=result.trials,
        history=tuple(result.history),
        tensors=packed_tensors(Classifier(backbone, result.header)),
    )


CODE = ("edge", "models", "method", "data", "core")
OF_HEADER = ("seed", "model.shift_pixels", "model.flip", "header")


def cached_header(
    job: Job, assignment: BackboneAssignment, data: Split, limit_bytes: int, cache: Checkpoints, progress: ProgressOf
) -> HeaderResult:
    """The header for a cluster's backbone, from the cache or into it."""
    own = {f"header.{name}": value for name, value in job.header.model_dump(mode="json").items()}
    inputs = {"backbone": content_of(assignment), "shared samples": data.fingerprint, "storage limit": limit_bytes}
    narrow = narrowed(job, OF_HEADER)
    return cached(
        cache,
        "header_search",
        reads_of(job, OF_HEADER[:-1]) | own | inputs | {"fleetfit's code": code_of(*CODE)},
        HeaderResult,
        lambda _: find_header(narrow, assignment, data, limit_bytes, progress),
    )


def too_small(job: Job, assignment: BackboneAssignment, stats: ClusterStats) -> dict[str, Fault]:
    """Devices that the cluster's model was not made for, since nothing fits them; they are not asked any more.

    The cloud chose for the smallest of the others, with ``header.room`` of its limit left free.
    """
    size_bytes = stored_size_bytes(take(assignment.tensors, "backbone"), take(assignment.tensors, "header"))
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


def coarse_model(job: Job, assignment: BackboneAssignment, found: HeaderResult) -> CoarseModel:
    """What every device of the cluster is sent."""
    num_classes = len(assignment.labels)
    shares = assignment.class_shares or (1 / num_classes,) * num_classes
    return CoarseModel(
        step=COARSE_STEP,
        family=assignment.family,
        config=assignment.config,
        shape=assignment.shape,
        labels=assignment.labels,
        header=found.header,
        refine=job.refine,
        seed=job.seed,
        class_shares=shares,
        tensors=found.tensors,
    )


def pruning_note(job: Job, assignment: BackboneAssignment, found: HeaderResult) -> str | None:
    """That Algorithm 2 will drop nothing of the header that was found, and why; None if it will, or is not asked to."""
    with torch.device("meta"):
        header = build_header(found.header, assignment.feature_shape, len(assignment.labels))
    return nothing_to_drop(header, job.refine)
