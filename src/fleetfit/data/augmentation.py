"""Augmentation in tensors: small random shifts of images."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad


def _shifted(
    images: Float[Tensor, "sample channel row column"], pixels: int, rows: Tensor, columns: Tensor
) -> Float[Tensor, "sample channel row column"]:
    height, width = images.shape[-2:]
    padded = pad(images, (pixels,) * 4, mode="replicate")
    sample = torch.arange(len(images))[:, None, None]
    row = (rows[:, None] + torch.arange(height))[:, :, None]
    column = (columns[:, None] + torch.arange(width))[:, None, :]
    return padded.permute(0, 2, 3, 1)[sample, row, column].permute(0, 3, 1, 2)


def random_shift(
    images: Float[Tensor, "sample channel row column"], pixels: int, generator: torch.Generator
) -> Float[Tensor, "sample channel row column"]:
    """Shift each image by up to ``pixels`` in both directions; the border repeats. Texts stay as they are."""
    if pixels == 0 or images.ndim != 4:
        return images
    offsets = torch.randint(0, 2 * pixels + 1, (2, len(images)), generator=generator)
    return _shifted(images, pixels, offsets[0], offsets[1])


def shifted_views(
    images: Float[Tensor, "sample channel row column"], views: int, pixels: int, generator: torch.Generator
) -> Float[Tensor, "view_sample channel row column"]:
    """The images themselves, followed by ``views - 1`` randomly shifted copies of all of them."""
    return torch.cat([images, *(random_shift(images, pixels, generator) for _ in range(views - 1))])
