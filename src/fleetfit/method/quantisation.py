"""Header changes in a byte a value, for the way up (Beyond)."""

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

LEVELS = 127


def quantised(change: Float[Tensor, "..."]) -> tuple[Int8[Tensor, "..."], Float32[Tensor, " row"]]:
    """A change as integers, and what one of them is worth in each row (of a vector or a number: in all of it).

    The nearest of 255 levels between the row's largest change and its negative: off by at most half a level, which is
    less than 0.4 % of that largest change.
    """
    rows = change.float().flatten(1) if change.ndim > 1 else change.float().reshape(1, -1)
    level = rows.abs().amax(dim=1) / LEVELS if rows.numel() else rows.new_zeros(len(rows))
    numbers = torch.where(level[:, None] > 0, rows / level[:, None], torch.zeros_like(rows))
    return numbers.round().clamp(-LEVELS, LEVELS).to(torch.int8).reshape(change.shape), level


def restored(numbers: Int8[Tensor, "..."], level: Float32[Tensor, " row"]) -> Float32[Tensor, "..."]:
    """The change that ``quantised`` made these of, but for the rounding."""
    shape = (-1,) + (1,) * (numbers.ndim - 1) if numbers.ndim > 1 else (1,) * numbers.ndim
    return numbers.float() * level.reshape(shape)
