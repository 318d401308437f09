"""How important layers, attention heads and neurons are: Taylor, second order, removal (Eqs. 5-7)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from fleetfit.core.hardware import moved
from fleetfit.data.samples import Samples
from fleetfit.method.importance import (
    contributions,
    curvature_probe,
    rank,
    reduce_contributions,
    second_order_importance,
)
from fleetfit.models.elastic import ElasticBackbone
from fleetfit.models.header import Header
from fleetfit.models.training import evaluate

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
