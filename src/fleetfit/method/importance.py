"""What the loss would lose without a part: attention heads and neurons (Eqs. 6-8), header parameters (Eqs. 16-18)."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def contributions(
    output: Float[Tensor, "sample token unit *channel"], gradient: Float[Tensor, "sample token unit *channel"]
) -> Float[Tensor, "sample unit"]:
    """First-order change of each sample's loss when a unit's output is scaled up: dF/dO . O, inside Eq. 8's bars.

    Minus this is the Taylor estimate of the loss change on removal (Eqs. 6-7); it is exact where F is linear in O.

    Args:
        output: O, of attention heads [sample token attention_head channel] before the output projection, or of the
            MLP's hidden activation [sample token neuron].
        gradient: dF/dO. F must be the SUM of the samples' losses, so that each row is the gradient of its own sample.

    Returns:
        Signed, to be reduced by ``reduce_contributions``.
    """
    product = output * gradient
    return product.flatten(start_dim=3).sum(dim=3).sum(dim=1) if product.ndim > 3 else product.sum(dim=1)


def reduce_contributions(
    contributions: Float[Tensor, "sample unit"], per: Literal["sample", "set"]
) -> Float[Tensor, " unit"]:
    """Sum contributions over a batch's samples: Eq. 8's importance, up to the number of samples.

    Add the results over batches, then take ``.abs()``: it is part of Eq. 8 for "set" and changes nothing for "sample".

    Reading: which sum goes inside the absolute value is free in the paper. Attention heads: "sample", the absolute
    value of each sample's contribution. Neurons: "set", the absolute value of the whole set's sum. Each ranks closest
    to exact removal.

    Raises:
        ValueError: ``per`` is neither "sample" nor "set".
    """
    if per == "sample":
        return contributions.abs().sum(dim=0)
    if per == "set":
        return contributions.sum(dim=0)
    raise ValueError(f"per must be 'sample' or 'set', got {per!r}")


def curvature_probe(logits: Float[Tensor, "sample class"], signs: Float[Tensor, "sample class"]) -> Float[Tensor, ""]:
    """A scalar whose squared contributions are, on average over random signs, the loss's curvature (Beyond).

    Cross-entropy's Gauss-Newton matrix is J' (diag(p) - p p') J, with J the derivative of the logits. Its root times a
    vector of random signs is A e = sqrt(p) e - p sum(sqrt(p) e), so one backward pass gives an unbiased estimate of the
    whole diagonal (Hutchinson), whatever the number of classes.

    Args:
        logits: Differentiable.
        signs: -1 or 1, independent.
    """
    share = logits.detach().softmax(dim=-1)
    weight = share.sqrt() * signs
    weight = weight - share * weight.sum(dim=-1, keepdim=True)
    return (weight * logits).sum()


def second_order_importance(slope: Float[Tensor, " unit"], curvature: Float[Tensor, " unit"]) -> Float[Tensor, " unit"]:
    """The loss change on removal to second order, |-slope + curvature / 2| (Beyond Eq. 8).

    A trained model is near a minimum, where the slope is small and says little; the next term of the Taylor series
    says the rest.

    Args:
        slope: First derivative of the mean loss along each unit's gate at 1: Eq. 8 before its bars.
        curvature: Second derivative there, or an estimate of it.
    """
    return (0.5 * curvature - slope).abs()


def parameter_importance(gradient: Float[Tensor, "*axes"], value: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Importance of each parameter of a header, Q_r = (g_r v_r)^2 (Eqs. 16-17); average it over batches (Eq. 18)."""
    return (gradient * value) ** 2


def neuron_importance(parameters: Sequence[tuple[Float[Tensor, "..."], int]]) -> Float[Tensor, " neuron"]:
    """Joint importance of each neuron (conv channel, MLP unit): the sum over all its parameters (III-D).

    Args:
        parameters: Pairs (importance of a tensor's parameters, the dimension that counts the neurons).

    Raises:
        ValueError: no tensor, or the tensors count different numbers of neurons.
    """
    return _sum_by_neuron(parameters)


def gate_importance(
    parameters: Sequence[tuple[Float[Tensor, "..."], Float[Tensor, "..."], int]],
) -> Float[Tensor, " neuron"]:
    """Importance of each neuron as that of a gate in front of it, (dL/dgate)^2 at gate = 1 (Beyond).

    dL/dgate = sum of g*v over the parameters that the gate multiplies; sum the squares over mini-batches, after
    training. Unlike Eq. 18, contributions of one neuron's parameters that cancel do not count.

    Args:
        parameters: Triples (gradient, value, the dimension that counts the neurons). Give all incoming parameters,
            weights and bias (a gate before the activation), or all outgoing weights (a gate after it); both together
            count it twice.

    Raises:
        ValueError: no tensor, or the tensors count different numbers of neurons.
    """
    return _sum_by_neuron([(gradient * value, dim) for gradient, value, dim in parameters]) ** 2


def _sum_by_neuron(parameters: Sequence[tuple[Float[Tensor, "..."], int]]) -> Float[Tensor, " neuron"]:
    if not parameters:
        raise ValueError("parameters must have at least 1 tensor, got 0")
    sums = [
        tensor.movedim(dim, 0).flatten(start_dim=1).sum(dim=1) if tensor.ndim > 1 else tensor
        for tensor, dim in parameters
    ]
    counts = [len(s) for s in sums]
    if len(set(counts)) > 1:
        raise ValueError(f"parameters must all count the same number of neurons, got {counts}")
    return torch.stack(sums).sum(dim=0)


def rank(importance: Float[Tensor, " unit"]) -> Int[Tensor, " unit"]:
    """Order of the units, most important first; equal ones keep their order.

    Raises:
        ValueError: an importance is NaN or infinite.
    """
    if not bool(importance.isfinite().all()):
        raise ValueError(f"importance must be finite, got {importance.tolist()}")
    return importance.argsort(descending=True, stable=True)


def drop_neurons(
    importance_by_layer: Mapping[str, Float[Tensor, " _"]],
    kept: Mapping[str, Bool[Tensor, " _"]],
    number: int,
    minimum_kept: int = 1,
) -> dict[str, Bool[Tensor, " _"]]:
    """Drop the least important kept neurons over all layers jointly (Algorithm 2's pruning).

    Args:
        importance_by_layer: Layer -> importance of each neuron, kept or not.
        kept: Layer -> which neurons are there now.
        number: How many to drop; fewer are dropped where the layers may lose no more.
        minimum_kept: No layer falls below this many (or below what it has, where that is less already).

    Returns:
        Layer -> which neurons are kept afterwards; ties go by the layers' order in ``kept``, then by index.

    Raises:
        ValueError: layers or lengths differ, an importance is not finite, or ``number`` or ``minimum_kept`` is
            negative.
    """
    if number < 0:
        raise ValueError(f"number must be >= 0, got {number}")
    if minimum_kept < 0:
        raise ValueError(f"minimum_kept must be >= 0, got {minimum_kept}")
    if set(importance_by_layer) != set(kept):
        raise ValueError(f"importance must have the layers {sorted(kept)}, got {sorted(importance_by_layer)}")
    remaining = {layer: mask.clone() for layer, mask in kept.items()}
    neurons = []
    for place, (layer, mask) in enumerate(kept.items()):
        importance = importance_by_layer[layer]
        if importance.shape != mask.shape:
            raise ValueError(f"importance of {layer!r} must have {len(mask)} neurons, got {len(importance)}")
        if not bool(importance.isfinite().all()):
            raise ValueError(f"importance of {layer!r} must be finite, got {importance.tolist()}")
        neurons += [(float(importance[i]), place, i, layer) for i in mask.nonzero().flatten().tolist()]
    spare = {layer: int(mask.sum()) - minimum_kept for layer, mask in kept.items()}
    for _, _, index, layer in sorted(neurons):
        if number == 0:
            break
        if spare[layer] > 0:
            remaining[layer][index] = False
            spare[layer] -= 1
            number -= 1
    return remaining
