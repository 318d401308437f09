"""The reference: built or loaded, trained on public data, and kept as a checkpoint that its whole model comes from."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from fleetfit.config.job import Job
from fleetfit.core.checkpoints import Bookmark
from fleetfit.core.encoding import Message, take
from fleetfit.core.hardware import autocast, hardware_words, torch_device_of
from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import BackboneShape, HeaderSpec, JsonDict, Real
from fleetfit.data.augmentation import Augmentation, mix
from fleetfit.data.partition import Split
from fleetfit.data.samples import Samples
from fleetfit.data.text_forms import untrained_backbone
from fleetfit.models.classifier import Classifier, num_parameters
from fleetfit.models.elastic import Backbone, backbone_from_state
from fleetfit.models.features import FeatureShape
from fleetfit.models.header import build_header, header_from_state
from fleetfit.models.packed import packed_tensors
from fleetfit.models.pretrained_header import load_header
from fleetfit.models.training import ParameterAverage, Scores, evaluate, fit, rate_share, steps_per_epoch

ProgressOf = Callable[[int, int, str], None]
VALIDATE_EVERY_SECONDS = 60.0  # of a long training, for who watches it
HEADER_EPOCHS = 2  # of a fresh header alone, before a pre-trained backbone is trained with it
HEADER_RATE = 1e-2
OWN_POOLING = 4  # cells a side
TEXT_CHANNELS = 64  # one cell has to carry what sixteen do


class Checkpoint(Message):
    """A whole model, full size. Tensors: ``backbone.*``, ``header.*``."""

    config: JsonDict


class Reference(Checkpoint):
    """The trained reference theta_0 with its header."""

    kind: ClassVar[str] = "reference"
    parameters: int
    validation_loss: Real
    validation_accuracy: Real
    accuracy: Real = Field(description="on the held-out public test split")
    curve: tuple[Real, ...] = Field((), description="training loss, some fifty points")
    hardware: str = Field("", description="that it was trained on")


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
    model, fresh_header = untrained_reference(job, public.train)
    torch_device = torch_device_of(job.run.torch_device)
    model, public = model.to(torch_device), public.to(torch_device)
    header_first = fresh_header and bool(job.model.pretrained)
    curve = fit_reference(job, model, public, progress, bookmark, header_first) if job.model.epochs else ()
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
        tensors=packed_tensors(model),
    )


def untrained_reference(job: Job, train: Samples) -> tuple[Classifier, bool]:
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


def fit_reference(
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


def scores_of(model: Classifier, samples: Samples) -> Scores:
    """Loss and accuracy of a whole model."""
    return evaluate(lambda rows: model(samples.inputs[rows]), samples.labels, lengths=samples.inputs.lengths)


def curve_of(losses: Sequence[float]) -> tuple[float, ...]:
    """About fifty points of a training's losses."""
    every = max(1, len(losses) // 50)
    return tuple(round(loss, 5) for loss in losses[every - 1 :: every])


def classifier_of(job: Job, result: Checkpoint, num_classes: int) -> Classifier:
    """The full-size model in a checkpoint."""
    backbone = backbone_from_state(job.model.family, result.config, take(result.tensors, "backbone"))
    shape = backbone.feature_shape
    header = header_from_state(own_header(job, shape), shape, num_classes, take(result.tensors, "header"))
    return Classifier(backbone, header)
