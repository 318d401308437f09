"""How alike devices' data is, from sketches of their features: distances, and the weights of Eqs. 19-20."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import eye_array, kron, vstack
from scipy.spatial.distance import cdist
from torch import Tensor

Distance = Callable[[Tensor, Tensor], float]


def wasserstein(
    a: Float[Tensor, "sample feature"], b: Float[Tensor, "peer_sample feature"], per_dimension: bool = True
) -> float:
    """Wasserstein distance (p = 1, L1 ground cost) of two samples, each point with equal mass; exact (Eq. 19).

    Reading (``per_dimension``): the ground cost is the mean, not the sum, over features. In a few hundred dimensions
    the sum is so large that 1 / (1 + distance) is near 0 for every pair.

    Raises:
        ValueError: a sample without a point, or a value that is not finite.
    """
    if len(a) == 0 or len(b) == 0:
        raise ValueError(f"both samples must have at least 1 point, got {len(a)} and {len(b)}")
    cost = cdist(_array(a), _array(b), "cityblock")
    if per_dimension:
        cost /= a.shape[1]
    if len(a) == len(b):
        return float(cost[linear_sum_assignment(cost)].mean())
    # Unequal sizes: the transport plan, row-major [len(a), len(b)], with given sums of rows and of columns.
    sums: Any = vstack([kron(eye_array(len(a)), np.ones((1, len(b)))), kron(np.ones((1, len(a))), eye_array(len(b)))])
    masses = np.concatenate([np.full(len(a), 1 / len(a)), np.full(len(b), 1 / len(b))])
    plan: Any = linprog(cost.ravel(), A_eq=sums.tocsr(), b_eq=masses, method="highs")
    return max(0.0, float(plan.fun))


def random_projections(
    num_features: int, num_projections: int, generator: torch.Generator
) -> Float[Tensor, "feature projection"]:
    """Unit directions, uniform on the sphere; every device of a cluster must use the same.

    On them, sliced distances are of the size of per-dimension ones: both go as a shift's length over
    sqrt(num_features).

    Raises:
        ValueError: a number below 1.
    """
    if num_features < 1 or num_projections < 1:
        raise ValueError(f"num_features and num_projections must be >= 1, got {num_features} and {num_projections}")
    directions = torch.randn(num_features, num_projections, generator=generator)
    unit: Tensor = directions / directions.norm(dim=0)
    return unit


def sketch_quantiles(
    features: Float[Tensor, "sample feature"], projections: Float[Tensor, "feature projection"], num_quantiles: int
) -> Float[Tensor, "quantile projection"]:
    """What a device sends instead of samples: quantiles of its features on shared random directions (Beyond).

    The quantiles at (i + 1/2) / num_quantiles, each a value that occurs. With ``num_quantiles`` a multiple of the
    number of samples nothing is lost, and ``sliced_wasserstein`` is the exact mean of the one-dimensional distances.

    Raises:
        ValueError: no sample, or ``num_quantiles`` below 1.
    """
    num_samples = len(features)
    if num_samples < 1:
        raise ValueError(f"features must have at least 1 sample, got {num_samples}")
    if num_quantiles < 1:
        raise ValueError(f"num_quantiles must be >= 1, got {num_quantiles}")
    # ceil((2 i + 1) n / (2 q)) - 1 in integers: the smallest sample with at least that share of samples up to it.
    midpoints = 2 * torch.arange(num_quantiles) + 1
    rows = (midpoints * num_samples + 2 * num_quantiles - 1) // (2 * num_quantiles) - 1
    return (features @ projections).sort(dim=0).values[rows]


def sliced_wasserstein(a: Float[Tensor, "quantile projection"], b: Float[Tensor, "quantile projection"]) -> float:
    """Sliced Wasserstein distance (p = 1) of two sketches: the mean absolute difference of quantiles (Beyond).

    Raises:
        ValueError: sketches of different shapes or without a value, or a value that is not finite.
    """
    if a.shape != b.shape or a.numel() == 0:
        raise ValueError(f"sketches must be of one shape, not empty, got {tuple(a.shape)} and {tuple(b.shape)}")
    return float(np.abs(_array(a) - _array(b)).mean())


def js_divergence(a: Float[Tensor, "sample feature"], b: Float[Tensor, "peer_sample feature"], num_bins: int) -> float:
    """Jensen-Shannon divergence of two samples' features, 0..1; the paper's comparison to Eq. 19.

    Reading: the mean over features of the divergence (not its root), in bits, of histograms with ``num_bins`` equal
    bins from the smaller minimum to the larger maximum of the two samples. One that is constant over both counts 0.

    Raises:
        ValueError: a sample without a point, a value that is not finite, or ``num_bins`` below 1.
    """
    if len(a) == 0 or len(b) == 0:
        raise ValueError(f"both samples must have at least 1 point, got {len(a)} and {len(b)}")
    if num_bins < 1:
        raise ValueError(f"num_bins must be >= 1, got {num_bins}")
    points = np.concatenate([_array(a), _array(b)])
    span = points.max(axis=0) - points.min(axis=0)
    share = (points - points.min(axis=0)) / np.where(span > 0, span, 1.0)
    bins = np.minimum((share * num_bins).astype(np.int64), num_bins - 1)
    divergences = []
    for feature in bins.T:
        p = np.bincount(feature[: len(a)], minlength=num_bins) / len(a)
        q = np.bincount(feature[len(a) :], minlength=num_bins) / len(b)
        middle = (p + q) / 2
        divergences.append((_relative_entropy_bits(p, middle) + _relative_entropy_bits(q, middle)) / 2)
    return max(0.0, float(np.mean(divergences)))


def _relative_entropy_bits(p: Float[np.ndarray, " bin"], q: Float[np.ndarray, " bin"]) -> float:
    there = p > 0
    return float((p[there] * np.log2(p[there] / q[there])).sum())


def _array(sample: Float[Tensor, "sample feature"]) -> Float[np.ndarray, "sample feature"]:
    values = sample.detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        raise ValueError("samples must be finite, got NaN or infinity")
    return values


def distance_matrix(sketches: Sequence[Float[Tensor, "_ _"]], distance: Distance) -> Float[Tensor, "device peer"]:
    """Distance of every pair of devices, in the order given; symmetric, zero on the diagonal."""
    matrix = torch.zeros(len(sketches), len(sketches), dtype=torch.float64)
    for i, a in enumerate(sketches):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = distance(a, sketches[j])
    return matrix


def self_distances(sketches: Sequence[Float[Tensor, "_ feature"]], distance: Distance) -> Float[Tensor, " device"]:
    """d_ii of each device: the distance of two disjoint halves of its own sample, its noise floor (Beyond).

    The halves are the first and the last floor(n/2) rows, which must be samples in random order. A sketch of quantiles
    cannot be halved: let the device sketch its two halves, and take ``sliced_wasserstein`` of these.

    Raises:
        ValueError: a device with fewer than 2 samples.
    """
    for device, sketch in enumerate(sketches):
        if len(sketch) < 2:
            raise ValueError(f"sketches.{device} must have at least 2 samples, got {len(sketch)}")
    halves = [len(sketch) // 2 for sketch in sketches]
    distances = [distance(sketch[:half], sketch[-half:]) for sketch, half in zip(sketches, halves, strict=True)]
    return torch.tensor(distances, dtype=torch.float64)


def similarity_weights(distance: Float[Tensor, "device peer"]) -> Float[Tensor, "device peer"]:
    """Weight each peer by how alike its data is, as the paper does (Eqs. 19-20).

    W = 1 / (1 + distance); W-bar = sqrt(W W^T); each row of the result is the softmax of its row of W-bar.

    Reading: W-bar in both parts of Eq. 20, so that rows sum to 1 as Eq. 21 requires; the root and the product under it
    are elementwise, so that W-bar is W made symmetric. All its entries are in 0..1, so weights of two peers differ by a
    factor of at most e.

    Raises:
        ValueError: a distance that is negative, NaN or infinite.
    """
    _check_distances("distance", distance)
    similarity = 1 / (1 + distance)
    return (similarity * similarity.T).sqrt().softmax(dim=1)


def calibrated_weights(
    distance_between: Float[Tensor, "device device"], distance_within: Float[Tensor, " device"], temperature: float
) -> Float[Tensor, "device device"]:
    """Weight each peer by its distance in units of the sampling noise (Beyond).

    softmax over j of -max(0, d_ij / sqrt(d_ii d_jj) - 1) / tau: a device as near as oneself counts fully. Where the
    noise is 0, a peer at distance 0 counts fully and any other not at all.

    Args:
        distance_between: d_ij, from ``distance_matrix``; its diagonal is taken as 0.
        distance_within: d_ii, from ``self_distances``.
        temperature: tau; small: only the nearest count; large: all count alike.

    Raises:
        ValueError: a distance that is negative, NaN or infinite, or a temperature that is infinite or not above 0.
    """
    _check_distances("distance_between", distance_between)
    _check_distances("distance_within", distance_within)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    between = distance_between.clone().fill_diagonal_(0)
    root = distance_within.sqrt()  # the product of two small numbers would be 0, of two large ones infinite
    noise = root[:, None] * root[None, :]
    ratio = torch.where(between > 0, between / noise, 0)
    return (-(ratio - 1).clamp(min=0) / temperature).softmax(dim=1)


def _check_distances(name: str, distances: Tensor) -> None:
    if not bool(((distances >= 0) & distances.isfinite()).all()):
        raise ValueError(f"{name} must be finite and >= 0, got {distances.tolist()}")
