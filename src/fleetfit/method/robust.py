"""How much one device that lies, or is broken, can do to what its cluster decides together (Beyond).

Two sums are taken over devices, of header changes and of validation losses. In a plain sum the largest term decides.
Here a change is at most ``FACTOR`` times as long as the cluster's median one, and of the losses as many of the highest
and lowest as may be lies count as the next ones. In a cluster of fewer than five, votes are only bounded one by one.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

FACTOR = 3.0  # times the median; honest changes are within it (benchmarks/members_liars.py)
LIARS = 0.2  # the share of a cluster that may lie, on either side
HEAVIEST = 4.0  # times the median number of samples


def shortened(
    changes: Sequence[Mapping[str, Float[Tensor, "..."]]], factor: float = FACTOR
) -> tuple[list[dict[str, Tensor]], list[float], float]:
    """Changes of one header by several devices, none longer than a multiple of the median length.

    Args:
        changes: Named tensors of each device; the same names and shapes in all.
        factor: The multiple.

    Returns:
        The changes, their lengths before (L2), and what they are shortened to at most. The median of an even number is
        the lower one, so that one of two cannot make it large.
    """
    norms = [math.sqrt(sum(float(t.double().square().sum()) for t in change.values())) for change in changes]
    most = factor * sorted(norms)[(len(norms) - 1) // 2]
    shares = [1.0 if norm <= most else most / norm for norm in norms]
    kept = [
        dict(change) if share == 1.0 else {name: (t.double() * share).to(t.dtype) for name, t in change.items()}
        for change, share in zip(changes, shares, strict=True)
    ]
    return kept, norms, most


def vote(
    losses: Float[Tensor, "device way"], numbers: Float[Tensor, " device"], ceiling: float = math.inf
) -> Float[Tensor, " way"]:
    """The cluster's loss of each way to ship, from its devices' mean losses.

    A loss is at most ``ceiling``; a device counts by its number of samples, at most ``HEAVIEST`` times the median one;
    and of the differences to the first way, the highest and the lowest fifth count as the next ones inside
    (winsorised). For honest devices with like numbers it is the mean over all samples, but for what is cut.

    Args:
        losses: Nats a sample.
        numbers: Validation samples behind each row; 0: no voice.
        ceiling: A loss no honest device's mean is likely to have.
    """
    heard = numbers > 0
    losses, numbers = losses[heard].double(), numbers[heard].double()
    if not len(losses):
        return losses.new_full((losses.shape[1],), math.nan)
    losses = torch.where(losses.isfinite(), losses.clamp(max=ceiling), losses)
    weights = numbers.clamp(max=HEAVIEST * float(numbers.median()))
    weights = weights / weights.sum()
    first = torch.where(losses[:, :1].isfinite(), losses[:, :1], torch.zeros_like(losses[:, :1]))
    above = losses - first
    if cut := int(LIARS * len(losses) + 1e-9):
        ordered = above.sort(dim=0).values
        above = above.clamp(min=ordered[cut], max=ordered[-1 - cut])
    return weights @ (above + float(weights @ first[:, 0]))


def paired(
    differences: Float[Tensor, " device"], numbers: Float[Tensor, " device"], ceiling: float = math.inf
) -> tuple[float, float]:
    """The cluster's mean of a difference of losses that each device has measured, and its standard error.

    Bounded as ``vote`` is. With fewer than two voices the error is infinite: nothing is clear.

    Args:
        differences: Nats a sample, of two ways on the same samples.
        numbers: Validation samples behind each; 0: no voice.
        ceiling: The most that a difference may be, either way.
    """
    heard = (numbers > 0) & differences.isfinite()
    own, numbers = differences[heard].double().clamp(-ceiling, ceiling), numbers[heard].double()
    if len(own) < 2:
        return (float(own[0]) if len(own) else math.nan), math.inf
    weights = numbers.clamp(max=HEAVIEST * float(numbers.median()))
    weights = weights / weights.sum()
    if cut := int(LIARS * len(own) + 1e-9):
        ordered = own.sort().values
        own = own.clamp(min=float(ordered[cut]), max=float(ordered[-1 - cut]))
    mean = float(weights @ own)
    few = len(own) / (len(own) - 1)
    return mean, math.sqrt(few * float(weights.square() @ (own - mean).square()))
