"""Choose a cluster's backbone: grid coordinates (Eqs. 10-11), Pareto Front Grid (Eq. 12), choice (Eq. 13)."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

MOST_CELLS = 10**9  # of an objective: squares of distances in cells, summed, stay within 64 bits


@dataclass(frozen=True)
class Grid:
    """The grid of Eq. 11 over the objectives (loss first), every one to be minimised, each in its own unit.

    ``num_cells`` is K, the same for all objectives; coordinates Psi count from 1 (at the ideal) to K (at the worst).
    """

    ideal: Float[np.ndarray, " objective"]
    worst: Float[np.ndarray, " objective"]
    cell_size: Float[np.ndarray, " objective"]
    num_cells: int
    coordinates: Int[np.ndarray, "candidate objective"]


def make_grid(objectives: Float[np.ndarray, "candidate objective"], gamma_p: float, sigma: float = 1e-9) -> Grid:
    """Lay candidates on a grid whose cells are no larger in the loss than ``gamma_p``, Eq. 11.

    K = ceil((f_1(worst) - f_1(ideal)) / gamma_p), at least 1; r_l = (f_l(worst) - f_l(ideal) + 2 sigma_l) / K;
    Psi_l = ceil((f_l - f_l(ideal) + sigma_l) / r_l).

    Reading: ideal and worst are taken componentwise over the candidates given, those within the limit (Eq. 10's
    truncated front).
    Reading: sigma_l = sigma * (f_l(worst) - f_l(ideal)), relative to the objective's range. One absolute sigma for
    nats, joules and bytes is lost to rounding in one and a whole cell in another; this one gives 1..K in all, whatever
    the units.
    Reading: an objective that is equal for all candidates has r_l = 0 and Psi_l = 1: it is at its ideal.

    Args:
        objectives: f_l of each candidate; objective 0 is the loss.
        gamma_p: The loss difference that does not matter to the user, in units of the loss.
        sigma: Share of the range that keeps the ideal off the border of its cell.

    Raises:
        ValueError: no candidate, an objective that is not finite or of no finite range, gamma_p or sigma not above 0,
            or a gamma_p that makes more than ``MOST_CELLS`` cells.
    """
    if objectives.size == 0:
        raise ValueError(f"objectives must have at least 1 candidate and 1 objective, got shape {objectives.shape}")
    if not np.isfinite(objectives).all():
        raise ValueError(f"objectives must be finite, got {objectives.tolist()}")
    if not gamma_p > 0:
        raise ValueError(f"gamma_p must be > 0, got {gamma_p}")
    if not 0 < sigma < 1:
        raise ValueError(f"sigma must be in 0..1, borders excluded, got {sigma}")
    objectives = objectives.astype(np.float64)
    ideal, worst = objectives.min(axis=0), objectives.max(axis=0)
    with np.errstate(over="ignore"):
        span = worst - ideal
        ratio = float(span[0] / gamma_p)
    if not np.isfinite(span).all():
        raise ValueError(f"objectives must have a finite range, got {ideal.tolist()} to {worst.tolist()}")
    if not ratio <= MOST_CELLS:
        raise ValueError(
            f"gamma_p must be >= {span[0] / MOST_CELLS:.3g}, a {MOST_CELLS:.0e}th of the range {span[0]:.3g} of the "
            f"losses, got {gamma_p:g}"
        )
    num_cells = max(1, math.ceil(ratio))
    share = (objectives - ideal) / np.where(span > 0, span, 1.0)
    coordinates = np.ceil((share + sigma) * num_cells / (1 + 2 * sigma)).astype(np.int64)
    # The formula stays within 1..K but for rounding, where sigma is near machine precision.
    coordinates = np.where(span > 0, coordinates.clip(1, num_cells), 1)
    return Grid(ideal, worst, span * (1 + 2 * sigma) / num_cells, num_cells, coordinates)


def pareto_front_grid(
    coordinates: Int[np.ndarray, "candidate objective"], drop_dominated: bool = True
) -> Bool[np.ndarray, " candidate"]:
    """Which candidates are on the Pareto Front Grid, Eq. 12 (printed wrongly; repaired from CDG and PFG-MOEA).

    For an objective l and a cell index k over the other objectives: S_l(k) = {x : Psi_j(x) = k_j for all j != l}; those
    with the smallest Psi_l in S_l(k) are on the front. PFG = the union over all l and k.

    Reading (``drop_dominated``): with few candidates this keeps nearly all of them, so cells that another cell
    dominates in grid coordinates are dropped. What is left is exactly the non-dominated cells, as every one of them is
    in Eq. 12's union.
    """
    num_candidates, num_objectives = coordinates.shape
    on_front = np.zeros(num_candidates, dtype=bool)
    for objective in range(num_objectives):
        others = np.delete(coordinates, objective, axis=1)
        for candidate in range(num_candidates):
            line = (others == others[candidate]).all(axis=1)
            on_front[candidate] |= coordinates[candidate, objective] == coordinates[line, objective].min()
    if drop_dominated:
        for candidate in range(num_candidates):
            no_worse = (coordinates <= coordinates[candidate]).all(axis=1)
            better = (coordinates < coordinates[candidate]).any(axis=1)
            on_front[candidate] &= not (no_worse & better).any()
    return on_front


def choose(
    objectives: Float[np.ndarray, "candidate objective"],
    coordinates: Int[np.ndarray, "candidate objective"],
    on_front: Bool[np.ndarray, " candidate"],
    distance: Literal["euclidean", "l1"] = "euclidean",
    ties: Literal["cheaper", "loss"] = "loss",
) -> int:
    """Index of the backbone a cluster gets, Eq. 13.

    The front's best-performing candidate sets the performance interval (equal Psi_1, that is within gamma_p); in it,
    the smallest distance in grid coordinates to the ideal (1, ..., 1) wins; then ``ties``, then the index.

    Beyond (``ties`` "cheaper"): of candidates in equally near cells the one with the least energy and size, each over
    its range. Their losses differ by less than gamma_p, which does not matter to the user, so "loss" would take the
    dearest: where all losses are within gamma_p there is one cell, and it would be Greedy-Accuracy.

    Reading: Eq. 13 prints a sum of norms, which is L1, where the text says Euclidean; hence the option.

    Where all losses are within gamma_p there is a single cell (K = 1), all tie, and this is Greedy-Accuracy.

    Args:
        objectives: f_l of each candidate within the limit; objective 0 is the loss.
        coordinates: Psi, from ``make_grid``.
        on_front: From ``pareto_front_grid``.
        distance: "euclidean" or "l1".
        ties: "loss": lower loss; "cheaper": lower sum of the other objectives, then lower loss.

    Raises:
        ValueError: nobody is on the front, an objective that is not finite, or an unknown distance or rule for ties.
    """
    if not np.isfinite(objectives).all():
        raise ValueError(f"objectives must be finite, got {objectives.tolist()}")
    if ties not in ("cheaper", "loss"):
        raise ValueError(f"ties must be 'cheaper' or 'loss', got {ties!r}")
    if distance not in ("euclidean", "l1"):
        raise ValueError(f"distance must be 'euclidean' or 'l1', got {distance!r}")
    front = np.flatnonzero(on_front)
    if front.size == 0:
        raise ValueError("on_front must hold at least 1 candidate, got 0")
    loss = objectives[:, 0]
    best = front[loss[front].argmin()]
    interval = front[coordinates[front, 0] == coordinates[best, 0]]
    steps = coordinates[interval].astype(np.int64) - 1
    # Integers, so that ties are exact; the square orders as the Euclidean distance does.
    distances = (steps**2 if distance == "euclidean" else steps).sum(axis=1)
    span = np.ptp(objectives, axis=0)
    cost = ((objectives - objectives.min(axis=0)) / np.where(span > 0, span, 1.0))[interval, 1:].sum(axis=1)
    first = cost if ties == "cheaper" else np.zeros(len(interval))
    return int(interval[np.lexsort((interval, loss[interval], first, distances))[0]])
