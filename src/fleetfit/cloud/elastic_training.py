"""Elastic training in the cloud: importance order, depth order, sampled sub-networks with distillation (Eqs. 6-9)."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from fleetfit.config.sections import BackboneConfig
from fleetfit.core.checkpoints import Bookmark
from fleetfit.core.hardware import autocast
from fleetfit.core.randomness import named_generator
from fleetfit.core.records import BackboneShape
from fleetfit.data.augmentation import Augmentation
from fleetfit.data.samples import Samples
from fleetfit.method.distillation import distillation_loss, joint_loss
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import BackboneOutput, DepthOrder, ElasticBackbone
from fleetfit.models.header import Header
from fleetfit.models.training import Scores, StepCallback, evaluate, fit

WEIGHT_DECAY = 0.01


def evaluate_shape(elastic: ElasticBackbone, header: Header, samples: Samples, shape: BackboneShape) -> Scores:
    """Scores of one sub-network with the shared header."""
    return evaluate(
        lambda rows: header(elastic.run(samples.inputs[rows], shape).features),
        samples.labels,
        lengths=samples.inputs.lengths,
    )


def better_depth_order(
    elastic: ElasticBackbone, header: Header, validation: Samples, shapes: Sequence[BackboneShape]
) -> DepthOrder:
    """``spread`` or ``first``: the one with the lower mean validation loss over the shapes before training."""

    def mean_loss(order: DepthOrder) -> float:
        elastic.depth_order = order
        return sum(evaluate_shape(elastic, header, validation, shape).loss for shape in shapes) / len(shapes)

    chosen = elastic.depth_order
    losses: dict[DepthOrder, float] = {order: mean_loss(order) for order in ("first", "spread")}
    elastic.depth_order = chosen
    return min(losses, key=lambda order: losses[order])


def sample_shapes(
    widths: Sequence[float], depths: Sequence[int], generator: torch.Generator
) -> tuple[BackboneShape, ...]:
    """The sandwich of a step: largest, smallest, and two at random."""

    def draw(values: Sequence[float]) -> float:
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    shapes = [BackboneShape(width=max(widths), depth=max(depths)), BackboneShape(width=min(widths), depth=min(depths))]
    shapes += [BackboneShape(width=draw(widths), depth=int(draw(depths))) for _ in range(2)]
    return tuple(dict.fromkeys(shapes))


def hidden_pairs(
    elastic: ElasticBackbone, shape: BackboneShape, student: BackboneOutput, teacher: BackboneOutput
) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states after each student layer, beside those after the teacher layer it was kept from."""
    kept = elastic.layers_of(shape)
    return list(student.hidden[1:]), [teacher.hidden[full + 1] for full in kept]


def train_elastic(
    elastic: ElasticBackbone,
    header: Header,
    train: Samples,
    config: BackboneConfig,
    depths: Sequence[int],
    augmentation: Augmentation,
    seed: int,
    after_step: StepCallback | None = None,
    precision: str = "float32",
    bookmark: Bookmark | None = None,
) -> tuple[float, ...]:
    """Distil the reference into all its sub-networks, in place; returns the loss of every step.

    ``joint`` (Beyond): one stage; the teacher is the full reference, the loss MSE on logits plus cross-entropy.
    ``paper`` (Eq. 9): stage 1 width-elastic with the reference as teacher; stage 2 width- and depth-elastic with the
    result of stage 1 as teacher; MSE on logits, embeddings and hidden states. The steps are divided between the stages.

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    if config.distillation == "joint":
        return _stage(
            *(elastic, header, train, config, depths, augmentation, config.steps, seed, "joint"),
            *(after_step, precision, bookmark),
        )
    first = max(1, config.steps // 2)
    second = max(1, config.steps - first)

    def counted_from(start: int) -> StepCallback | None:
        if after_step is None:
            return None
        return lambda step, _, loss: after_step(start + step, first + second, loss)

    full_depth = (elastic.num_layers,)
    wide = _stage(
        *(elastic, header, train, config, full_depth, augmentation, first, seed, "width"),
        *(counted_from(0), precision, None),
    )
    deep = _stage(
        elastic,
        header,
        train,
        config,
        depths,
        augmentation,
        second,
        seed,
        "width-depth",
        counted_from(first),
        precision,
        None,  # its teacher is the first stage's result, so it is resumed with that
    )
    return (*wide, *deep)


def _stage(
    elastic: ElasticBackbone,
    header: Header,
    train: Samples,
    config: BackboneConfig,
    depths: Sequence[int],
    augmentation: Augmentation,
    steps: int,
    seed: int,
    stage: str,
    after_step: StepCallback | None,
    precision: str,
    bookmark: Bookmark | None,
) -> tuple[float, ...]:
    there = train.labels.device
    teacher = copy.deepcopy(Classifier(elastic.backbone, header)).eval()
    shapes = named_generator(seed, "elastic", stage, "shapes")
    shifts = named_generator(seed, "elastic", stage, "shifts")

    def loss_of(rows: Tensor) -> Tensor:
        inputs, labels = augmentation(train.inputs[rows], shifts), train.labels[rows]
        with torch.no_grad(), autocast(there, precision):
            taught = teacher.backbone.run(inputs)
            teacher_logits = teacher.header(taught.features)
        drawn = sample_shapes(config.widths, depths, shapes)
        total = torch.zeros((), device=there)
        for shape in drawn:
            with autocast(there, precision):
                student = elastic.run(inputs, shape)
                logits = header(student.features)
                if stage == "joint":
                    loss = joint_loss(logits, teacher_logits, labels, config.weight_logits)
                else:
                    loss = distillation_loss(
                        logits,
                        teacher_logits,
                        student.hidden[0],
                        taught.hidden[0],
                        *hidden_pairs(elastic, shape, student, taught),
                        config.weight_logits,
                        config.weight_embeddings,
                    )
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total / len(drawn)

    return fit(
        loss_of,
        [*elastic.backbone.parameters(), *header.parameters()],
        len(train),
        lengths=train.inputs.lengths,
        steps=steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=WEIGHT_DECAY,
        generator=named_generator(seed, "elastic", stage, "order"),
        after_step=after_step,
        bookmark=bookmark,
        also_drawn_from=(shapes, shifts),
        name=f"elastic training ({stage})",
    ).losses


def specialise(
    model: Classifier,
    teacher: Classifier,
    train: Samples,
    config: BackboneConfig,
    augmentation: Augmentation,
    seed: int,
    name: str,
    after_step: StepCallback | None = None,
    precision: str = "float32",
    bookmark: Bookmark | None = None,
) -> None:
    """Train one cut sub-network alone on the public set before it is sent, in place (Beyond).

    Weights that all shapes share are a compromise, for the smallest shapes most of all.
    """
    teacher.eval()
    shifts = named_generator(seed, "specialise", name, "shifts")

    def loss_of(rows: Tensor) -> Tensor:
        inputs = augmentation(train.inputs[rows], shifts)
        with autocast(train.labels.device, precision):
            with torch.no_grad():
                teacher_logits = teacher(inputs)
            return joint_loss(model(inputs), teacher_logits, train.labels[rows], config.weight_logits)

    fit(
        loss_of,
        model.parameters(),
        len(train),
        lengths=train.inputs.lengths,
        steps=config.specialise_steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=WEIGHT_DECAY,
        generator=named_generator(seed, "specialise", name, "order"),
        after_step=after_step,
        bookmark=bookmark,
        also_drawn_from=(shifts,),
        name=f"specialising {name}",
    )
