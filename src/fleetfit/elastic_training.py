"""Elastic training in the cloud: importance order, depth order, sampled sub-networks with distillation (Eqs. 6-9)."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from fleetfit.config import BackboneConfig
from fleetfit.data.augmentation import Augmentation
from fleetfit.data.samples import Samples
from fleetfit.hardware import autocast, moved
from fleetfit.method.distillation import distillation_loss, joint_loss
from fleetfit.method.importance import (
    contributions,
    curvature_probe,
    rank,
    reduce_contributions,
    second_order_importance,
)
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import BackboneOutput, DepthOrder, ElasticBackbone
from fleetfit.models.header import Header
from fleetfit.randomness import named_generator
from fleetfit.records import BackboneShape
from fleetfit.training import Scores, StepCallback, evaluate, fit

WEIGHT_DECAY = 0.01
CURVATURE_DRAWS = 4
HESSIAN_OVER_GAUSS_NEWTON = 2.0


@dataclass(frozen=True)
class LayerImportance:
    """Importance of every layer's attention heads and MLP neurons (Eqs. 6-8)."""

    heads: tuple[Float[Tensor, " head"], ...]
    neurons: tuple[Float[Tensor, " neuron"], ...]


def taylor_importance(
    elastic: ElasticBackbone, header: Header, samples: Samples, batch_size: int = 64
) -> LayerImportance:
    """First-order Taylor importance (Eq. 8): heads by the mean of |per-sample sum|, neurons by |whole-set sum|."""
    there = samples.labels.device
    head_sums = [torch.zeros(elastic.num_heads, device=there) for _ in range(elastic.num_layers)]
    neuron_sums = [torch.zeros(elastic.num_neurons, device=there) for _ in range(elastic.num_layers)]
    with elastic.recorded() as (heads, neurons):
        for rows in torch.split(torch.arange(len(samples), device=there), batch_size):
            logits = header(elastic.backbone(samples.inputs[rows]))
            cross_entropy(logits, samples.labels[rows], reduction="sum").backward()  # type: ignore[no-untyped-call]
            for layer in range(elastic.num_layers):
                output, activation = heads[layer], neurons[layer]
                assert output.grad is not None
                assert activation.grad is not None
                by_head = (*output.shape[:2], elastic.num_heads, elastic.head_dim)
                of_heads = contributions(output.detach().view(by_head), output.grad.view(by_head))
                of_neurons = contributions(activation.detach(), activation.grad)
                head_sums[layer] += reduce_contributions(of_heads, per="sample")
                neuron_sums[layer] += reduce_contributions(of_neurons, per="set")
    for module in (elastic.backbone, header):
        module.zero_grad(set_to_none=True)
    return LayerImportance(
        tuple(s.cpu() / len(samples) for s in head_sums), tuple(s.cpu().abs() / len(samples) for s in neuron_sums)
    )


def second_order(
    elastic: ElasticBackbone, header: Header, samples: Samples, generator: torch.Generator
) -> LayerImportance:
    """Importance of heads and neurons to second order (Beyond Eq. 8), of the whole set's mean loss.

    The loss's second derivative along a gate is estimated as twice Gauss-Newton's: what that leaves out, the logits'
    own curvature in a gate, has been about as large wherever it was measured (benchmarks/results/digits.md).
    """

    def of(series: GateSeries) -> tuple[Tensor, ...]:
        return tuple(
            second_order_importance(s, HESSIAN_OVER_GAUSS_NEWTON * c).cpu()
            for s, c in zip(series.slopes, series.curvatures, strict=True)
        )

    heads, neurons = gate_series(elastic, header, samples, generator)
    return LayerImportance(of(heads), of(neurons))


@dataclass(frozen=True)
class GateSeries:
    """By layer, the mean loss's slope along each unit's gate at 1, and Gauss-Newton's curvature there."""

    slopes: tuple[Float[Tensor, " unit"], ...]
    curvatures: tuple[Float[Tensor, " unit"], ...]


def gate_series(
    elastic: ElasticBackbone,
    header: Header,
    samples: Samples,
    generator: torch.Generator,
    batch_size: int = 64,
    draws: int = CURVATURE_DRAWS,
) -> tuple[GateSeries, GateSeries]:
    """The Taylor series of the loss in the gates of (attention heads, neurons).

    Args:
        elastic: The backbone at full size.
        header: Its header.
        samples: What the loss is the mean over.
        generator: Draws the random signs of the curvature.
        batch_size: Samples a pass.
        draws: Random signs a sample; one more backward pass each.
    """
    there = samples.labels.device
    sizes = [elastic.num_heads] * elastic.num_layers + [elastic.num_neurons] * elastic.num_layers
    slopes = [torch.zeros(size, device=there) for size in sizes]
    curvatures = [torch.zeros(size, device=there) for size in sizes]
    with elastic.recorded() as (heads, neurons):
        for rows in torch.split(torch.arange(len(samples), device=there), batch_size):
            logits = header(elastic.backbone(samples.inputs[rows]))
            outputs = [heads[i] for i in range(elastic.num_layers)] + [neurons[i] for i in range(elastic.num_layers)]

            def along_gates(scalar: Tensor, outputs: list[Tensor] = outputs) -> list[Tensor]:
                gradients = torch.autograd.grad(scalar, outputs, retain_graph=True)
                return [
                    contributions(o.detach().view(*o.shape[:2], size, -1), g.reshape(*o.shape[:2], size, -1))
                    for o, g, size in zip(outputs, gradients, sizes, strict=True)
                ]

            changes = along_gates(cross_entropy(logits, samples.labels[rows], reduction="sum"))
            for slope, change in zip(slopes, changes, strict=True):
                slope += change.sum(dim=0) / len(samples)
            for _ in range(draws):
                signs = moved(torch.randint(0, 2, logits.shape, generator=generator) * 2.0 - 1.0, there)
                for curvature, change in zip(curvatures, along_gates(curvature_probe(logits, signs)), strict=True):
                    curvature += (change**2).sum(dim=0) / (draws * len(samples))
    n = elastic.num_layers
    return (
        GateSeries(tuple(slopes[:n]), tuple(curvatures[:n])),
        GateSeries(tuple(slopes[n:]), tuple(curvatures[n:])),
    )


def removal_importance(
    elastic: ElasticBackbone,
    header: Header,
    samples: Samples,
    after_each: Callable[[int, int], None] | None = None,
    neurons: bool = True,
) -> LayerImportance:
    """Exact importance (Eqs. 6-7): the absolute change of the loss when a head, or a neuron, is removed."""

    def loss() -> float:
        return evaluate(lambda rows: header(elastic.backbone(samples.inputs[rows])), samples.labels).loss

    base = loss()
    total = elastic.num_layers * (elastic.num_heads + neurons * elastic.num_neurons)
    done = 0

    def removed(layer: int, number: int, of_heads: bool) -> Tensor:
        nonlocal done
        changes = torch.zeros(number)
        for i in range(number):
            gate = torch.ones(number, device=samples.labels.device)
            gate[i] = 0
            with elastic.gated({layer: gate} if of_heads else {}, {} if of_heads else {layer: gate}):
                changes[i] = abs(loss() - base)
            done += 1
            if after_each is not None:
                after_each(done, total)
        return changes

    layers = range(elastic.num_layers)
    by_head = tuple(removed(layer, elastic.num_heads, True) for layer in layers)
    by_neuron = tuple(
        removed(layer, elastic.num_neurons, False) if neurons else torch.zeros(elastic.num_neurons) for layer in layers
    )
    return LayerImportance(by_head, by_neuron)


def random_importance(elastic: ElasticBackbone, generator: torch.Generator) -> LayerImportance:
    """Importance drawn by chance: what the order by importance is compared with."""
    layers = range(elastic.num_layers)
    return LayerImportance(
        tuple(torch.rand(elastic.num_heads, generator=generator) for _ in layers),
        tuple(torch.rand(elastic.num_neurons, generator=generator) for _ in layers),
    )


def reorder_by(elastic: ElasticBackbone, importance: LayerImportance) -> None:
    """Sort heads and neurons of every layer, most important first."""
    elastic.reorder([rank(i) for i in importance.heads], [rank(i) for i in importance.neurons])


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
) -> None:
    """Distil the reference into all its sub-networks, in place.

    ``joint`` (Beyond): one stage; the teacher is the full reference, the loss MSE on logits plus cross-entropy.
    ``paper`` (Eq. 9): stage 1 width-elastic with the reference as teacher; stage 2 width- and depth-elastic with the
    result of stage 1 as teacher; MSE on logits, embeddings and hidden states. The steps are divided between the stages.

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    if config.distillation == "joint":
        _stage(elastic, header, train, config, depths, augmentation, config.steps, seed, "joint", after_step, precision)
        return
    first = max(1, config.steps // 2)
    second = max(1, config.steps - first)

    def counted_from(start: int) -> StepCallback | None:
        if after_step is None:
            return None
        return lambda step, _, loss: after_step(start + step, first + second, loss)

    full_depth = (elastic.num_layers,)
    _stage(elastic, header, train, config, full_depth, augmentation, first, seed, "width", counted_from(0), precision)
    _stage(
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
    )


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
) -> None:
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

    fit(
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
        name=f"elastic training ({stage})",
    )


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
        name=f"specialising {name}",
    )
