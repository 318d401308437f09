"""Combine devices' importance or weight sets by similarity (Eq. 21), with its comparisons."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def aggregate(
    weights: Float[Tensor, "device peer"], sets: Sequence[Mapping[str, Float[Tensor, "..."]]]
) -> list[dict[str, Tensor]]:
    """Personal set of each device, Q'_n = sum_i w_ni Q_i, Eq. 21.

    Sums are taken in float64 and returned in each tensor's dtype. Importance sets are to be scaled by ``unit_sum``
    first.

    Args:
        weights: w, [device, peer]; each row sums to 1.
        sets: One set of named tensors per peer; the same names and shapes in all.

    Returns:
        One set per row of ``weights``; names in the order of the first set.

    Raises:
        ValueError: not one set per peer, names or shapes that differ, a row of weights that does not sum to 1, or a
            value that is not finite: it would reach devices that give its sender no weight, since 0 times it is NaN.
    """
    if not sets or weights.shape[1] != len(sets):
        raise ValueError(f"sets must be one per peer ({weights.shape[1]}, at least 1), got {len(sets)}")
    sums = weights.double().sum(dim=1)
    if not torch.allclose(sums, torch.ones_like(sums), atol=1e-5):
        raise ValueError(f"each row of weights must sum to 1, got {sums.tolist()}")
    shapes = {name: tensor.shape for name, tensor in sets[0].items()}
    for peer, one in enumerate(sets):
        if {name: tensor.shape for name, tensor in one.items()} != shapes:
            got = {name: tuple(tensor.shape) for name, tensor in one.items()}
            raise ValueError(f"sets.{peer} must have the names and shapes of sets.0, got {got}")
        for name, tensor in one.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"sets.{peer}: {name!r} must be finite")
    mixed = {
        name: torch.tensordot(weights.double(), torch.stack([one[name].double() for one in sets]), dims=1).to(
            tensor.dtype
        )
        for name, tensor in sets[0].items()
    }
    return [{name: tensor[device] for name, tensor in mixed.items()} for device in range(len(weights))]


def unit_sum(importance_set: Mapping[str, Float[Tensor, "..."]]) -> dict[str, Tensor]:
    """Scale an importance set so that all its entries together sum to 1; a set of zeros stays one.

    Reading: of "each Q_i" in Eq. 21. Without it the device with the largest gradients outvotes all others.

    Raises:
        ValueError: an importance that is negative, NaN or infinite.
    """
    for name, importance in importance_set.items():
        if not bool((importance >= 0).all()):
            raise ValueError(f"importance of {name!r} must be >= 0, got a smallest value of {float(importance.min())}")
        if not bool(importance.isfinite().all()):
            raise ValueError(f"importance of {name!r} must be finite, got a largest value of {float(importance.max())}")
    # Of the largest first: a sum of numbers near the end of their range is infinite.
    most = max((float(i.max()) for i in importance_set.values() if i.numel()), default=0.0) or 1.0
    total = sum(float((importance.double() / most).sum()) for importance in importance_set.values()) or 1.0
    return {
        name: (importance.double() / most / total).to(importance.dtype) for name, importance in importance_set.items()
    }


def average_weights(num_devices: int) -> Float[Tensor, "device peer"]:
    """Weights under which every device gets the plain mean.

    Raises:
        ValueError: no device.
    """
    if num_devices < 1:
        raise ValueError(f"num_devices must be >= 1, got {num_devices}")
    return torch.full((num_devices, num_devices), 1 / num_devices, dtype=torch.float64)


def alone_weights(num_devices: int) -> Float[Tensor, "device peer"]:
    """Weights under which every device keeps its own."""
    return torch.eye(num_devices, dtype=torch.float64)


def distance_from_uniform(weights: Float[Tensor, "device peer"]) -> float:
    """Largest absolute difference of a weight from 1 / number of peers; 0 = not personal at all."""
    return float((weights - 1 / weights.shape[1]).abs().max())
