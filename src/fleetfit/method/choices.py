"""What the Pareto Front Grid is compared with: greedy and random choices, trade-off scores, efficiency ratios (IV)."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float


def greedy_accuracy(accuracy: Float[np.ndarray, " candidate"], loss: Float[np.ndarray, " candidate"]) -> int:
    """Greedy-Accuracy: the most accurate of the candidates within the limit; ties by lower loss, then by index.

    Reading: on a validation set of some hundred samples ties are common. The order of the candidates, smallest first,
    must not settle them: a method that looks at performance alone would be frugal by chance. Eq. 13 takes the loss too.
    """
    best = accuracy == accuracy[optimum(accuracy, "higher")]
    return optimum(np.where(best, loss, np.inf), "lower")


def greedy_size(size: Float[np.ndarray, " candidate"]) -> int:
    """Greedy-Size: the largest of the candidates within the limit; ties by index.

    Reading: "greedy" fills the storage. The smallest that fits is reported beside it, see ``smallest``.
    """
    return optimum(size, "higher")


def smallest(size: Float[np.ndarray, " candidate"]) -> int:
    """The smallest of the candidates; ties by index."""
    return optimum(size, "lower")


def random_choice(num_candidates: int, generator: torch.Generator) -> int:
    """Random: one of the candidates, each as likely.

    Raises:
        ValueError: no candidate.
    """
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be >= 1, got {num_candidates}")
    return int(torch.randint(num_candidates, (), generator=generator))


def trade_off_score(
    loss: Float[np.ndarray, " candidate"],
    energy: Float[np.ndarray, " candidate"],
    size: Float[np.ndarray, " candidate"],
) -> Float[np.ndarray, " candidate"]:
    """Trade-off Score (a), L + E + zeta, in 0..3; lower is better.

    Reading: each is min-max normalised over the candidates given; raw sums of nats, joules and counts mean nothing.
    """
    score: Float[np.ndarray, " candidate"] = _normalised(loss) + _normalised(energy) + _normalised(size)
    return score


def trade_off_score_accuracy(
    accuracy: Float[np.ndarray, " candidate"],
    energy: Float[np.ndarray, " candidate"],
    size: Float[np.ndarray, " candidate"],
) -> Float[np.ndarray, " candidate"]:
    """Trade-off Score (b), accuracy - 0.5*(size + energy), in -1..1; HIGHER is better.

    Reading: each is min-max normalised over the candidates given; the paper's headline number was computed with this
    one.
    """
    score: Float[np.ndarray, " candidate"] = _normalised(accuracy) - 0.5 * (_normalised(size) + _normalised(energy))
    return score


def _normalised(values: Float[np.ndarray, " candidate"]) -> Float[np.ndarray, " candidate"]:
    """(x - min) / (max - min) over the candidates; 0 where all are equal."""
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"values must be finite, at least 1, got {values.tolist()}")
    with np.errstate(over="ignore"):
        span = values.max() - values.min()
    if not np.isfinite(span):
        raise ValueError(f"values must have a finite range, got {values.tolist()}")
    normalised: Float[np.ndarray, " candidate"] = (values - values.min()) / (span if span > 0 else 1.0)
    return normalised


def energy_efficiency_ratio(
    accuracy: Float[np.ndarray, " candidate"], energy_joules: Float[np.ndarray, " candidate"]
) -> Float[np.ndarray, " candidate"]:
    """Energy Efficiency Ratio, accuracy / energy, per joule; higher is better.

    Raises:
        ValueError: an energy that is NaN or not above 0.
    """
    return _ratio(accuracy, energy_joules, "energy_joules")


def size_efficiency_ratio(
    accuracy: Float[np.ndarray, " candidate"], size: Float[np.ndarray, " candidate"]
) -> Float[np.ndarray, " candidate"]:
    """Size Efficiency Ratio, accuracy / size, per unit of size; higher is better.

    Raises:
        ValueError: a size that is NaN or not above 0.
    """
    return _ratio(accuracy, size, "size")


def _ratio(
    gain: Float[np.ndarray, " candidate"], cost: Float[np.ndarray, " candidate"], name: str
) -> Float[np.ndarray, " candidate"]:
    if not (cost > 0).all():
        raise ValueError(f"{name} must be > 0, got {cost.tolist()}")
    ratio: Float[np.ndarray, " candidate"] = gain / cost
    return ratio


def optimum(score: Float[np.ndarray, " candidate"], better: Literal["lower", "higher"]) -> int:
    """Index of the best score; ties by index.

    Raises:
        ValueError: no candidate, a score that is NaN, or an unknown direction.
    """
    if score.size == 0 or np.isnan(score).any():
        raise ValueError(f"score must have at least 1 candidate and no NaN, got {score.tolist()}")
    if better not in ("lower", "higher"):
        raise ValueError(f"better must be 'lower' or 'higher', got {better!r}")
    return int(score.argmin() if better == "lower" else score.argmax())
