"""What a header sees of a backbone: the tokens of its last two layers, and how they lie on their grid."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class FeatureShape:
    """Static facts about features: channels, the token grid (rows, columns; one row for text), and prefix tokens.

    ``num_prefix_tokens`` counts the tokens before the grid; the first of them is [CLS].
    """

    channels: int
    grid: tuple[int, int]
    num_prefix_tokens: int = 1

    @property
    def num_tokens(self) -> int:
        """Prefix tokens and grid tokens together."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Features:
    """Tokens of the last layer (after the final LayerNorm) and of the penultimate layer.

    Tokens are row-major on the grid, after the prefix tokens. ``mask`` is true for tokens that are there (text padding
    is false); None means all are.
    """

    output: Float[Tensor, "batch token channel"]
    penultimate: Float[Tensor, "batch token channel"]
    mask: Bool[Tensor, "batch token"] | None = None

    def __len__(self) -> int:
        return len(self.output)

    def rows(self, rows: Int[Tensor, " row"] | slice) -> "Features":
        """The features of some samples."""
        return Features(self.output[rows], self.penultimate[rows], None if self.mask is None else self.mask[rows])

    def to(self, torch_device: torch.device) -> "Features":
        """The same on this hardware."""
        mask = None if self.mask is None else self.mask.to(torch_device)
        return Features(self.output.to(torch_device), self.penultimate.to(torch_device), mask)

    def detached(self) -> "Features":
        """The same values, cut from the graph."""
        return replace(self, output=self.output.detach(), penultimate=self.penultimate.detach())


def concatenated(parts: Sequence[Features]) -> Features:
    """The features of all samples of some batches; masks too, where there are masks."""
    masks = [part.mask for part in parts if part.mask is not None]
    return Features(
        torch.cat([part.output for part in parts]),
        torch.cat([part.penultimate for part in parts]),
        torch.cat(masks) if masks else None,
    )


def tokens_to_grid(
    tokens: Float[Tensor, "batch token channel"], shape: FeatureShape
) -> Float[Tensor, "batch channel row column"]:
    """Lay the tokens without their prefix back on their grid: a transpose, never a bare view."""
    channels_first = tokens[:, shape.num_prefix_tokens :].transpose(1, 2)
    return torch.unflatten(channels_first, 2, shape.grid)
