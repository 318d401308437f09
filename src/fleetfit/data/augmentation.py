"""Augmentation in tensors: shifts, flips, cutouts; mixup and cutmix of a batch.

Chance comes from a CPU generator wherever the images are, so that the same seed does the same to them on any hardware.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad

from fleetfit.core.hardware import moved

CUTOUT_VALUE = 0.0  # the middle of normalised pixel values


def is_images(inputs: Shaped[Tensor, "sample ..."]) -> bool:
    """Whether inputs are pictures; all else, such as the numbers of tokens, is left alone here."""
    return inputs.ndim == 4 and inputs.is_floating_point()


def _shifted(
    images: Float[Tensor, "sample channel row column"], pixels: int, rows: Tensor, columns: Tensor
) -> Float[Tensor, "sample channel row column"]:
    height, width = images.shape[-2:]
    padded = pad(images, (pixels,) * 4, mode="replicate")
    there = images.device
    rows, columns = moved(rows, there), moved(columns, there)
    sample = torch.arange(len(images), device=there)[:, None, None]
    row = (rows[:, None] + torch.arange(height, device=there))[:, :, None]
    column = (columns[:, None] + torch.arange(width, device=there))[:, None, :]
    return padded.permute(0, 2, 3, 1)[sample, row, column].permute(0, 3, 1, 2)


def random_shift(
    images: Float[Tensor, "sample channel row column"], pixels: int, generator: torch.Generator
) -> Float[Tensor, "sample channel row column"]:
    """Shift each image by up to ``pixels`` in both directions; the border repeats. Texts stay as they are."""
    if pixels == 0 or images.ndim != 4:
        return images
    offsets = torch.randint(0, 2 * pixels + 1, (2, len(images)), generator=generator)
    return _shifted(images, pixels, offsets[0], offsets[1])


def random_flip(
    images: Float[Tensor, "sample channel row column"], generator: torch.Generator
) -> Float[Tensor, "sample channel row column"]:
    """Swap left and right of every second image, by chance."""
    flipped = moved(torch.rand(len(images), generator=generator) < 0.5, images.device)
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def random_cutout(
    images: Float[Tensor, "sample channel row column"], pixels: int, generator: torch.Generator
) -> Float[Tensor, "sample channel row column"]:
    """Blank one square of each image, ``pixels`` wide, with its centre anywhere; it may hang over the border."""
    if pixels == 0:
        return images
    height, width = images.shape[-2:]
    first_rows = torch.randint(0, height, (len(images),), generator=generator) - pixels // 2
    first_columns = torch.randint(0, width, (len(images),), generator=generator) - pixels // 2
    inside_rows = _inside(first_rows, pixels, height, images.device)[:, None, :, None]
    inside_columns = _inside(first_columns, pixels, width, images.device)[:, None, None, :]
    return images.masked_fill(inside_rows & inside_columns, CUTOUT_VALUE)


def _inside(first: Int[Tensor, " sample"], pixels: int, length: int, there: torch.device) -> Tensor:
    offset = torch.arange(length, device=there) - moved(first, there)[:, None]
    return (offset >= 0) & (offset < pixels)


@dataclass(frozen=True)
class Augmentation:
    """What is done to images by chance, and leaves their labels as they are. Of what is no image, nothing is done."""

    shift_pixels: int = 0
    flip: bool = False
    cutout_pixels: int = 0

    def __call__(
        self, inputs: Shaped[Tensor, "sample ..."], generator: torch.Generator
    ) -> Shaped[Tensor, "sample ..."]:
        """Other views of the same samples."""
        if not is_images(inputs):
            return inputs
        images = random_shift(inputs, self.shift_pixels, generator)
        if self.flip:
            images = random_flip(images, generator)
        return random_cutout(images, self.cutout_pixels, generator)


@dataclass(frozen=True)
class Mixed:
    """Images blended in pairs. Image i is to ``share`` itself, and for the rest image ``partner[i]`` of its batch."""

    images: Float[Tensor, "sample channel row column"]
    partner: Int[Tensor, " sample"]
    share: float


def mixup(images: Float[Tensor, "sample channel row column"], alpha: float, generator: torch.Generator) -> Mixed:
    """Weighted means of pairs of images (arXiv 1710.09412); one weight from Beta(alpha, alpha) for the batch."""
    share, partner = _share(alpha, generator), _partner(images, generator)
    return Mixed(torch.lerp(images[partner], images, share), partner, share)


def cutmix(images: Float[Tensor, "sample channel row column"], alpha: float, generator: torch.Generator) -> Mixed:
    """A box of each image comes from another one (arXiv 1905.04899); labels count by area.

    The box's share of the area comes from Beta(alpha, alpha); what hangs over the border is cut off.
    """
    share, partner = _share(alpha, generator), _partner(images, generator)
    height, width = images.shape[-2:]
    rows = _interval(height, math.sqrt(1 - share), generator)
    columns = _interval(width, math.sqrt(1 - share), generator)
    mixed = images.clone()
    mixed[..., rows, columns] = images[partner][..., rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Mixed(mixed, partner, 1 - area / (height * width))


def mix(
    images: Float[Tensor, "sample channel row column"],
    mixup_alpha: float,
    cutmix_alpha: float,
    generator: torch.Generator,
) -> Mixed | None:
    """Mixup or cutmix, by turns of chance where both are on; None where both are off (0), or these are no images."""
    if not is_images(images) or not (mixup_alpha or cutmix_alpha):
        return None
    both = bool(mixup_alpha and cutmix_alpha)
    if cutmix_alpha and not (both and float(torch.rand((), generator=generator)) < 0.5):
        return cutmix(images, cutmix_alpha, generator)
    return mixup(images, mixup_alpha, generator)


def _share(alpha: float, generator: torch.Generator) -> float:
    # PyTorch's Beta takes no generator.
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _partner(images: Tensor, generator: torch.Generator) -> Int[Tensor, " sample"]:
    return moved(torch.randperm(len(images), generator=generator), images.device)


def _interval(length: int, share: float, generator: torch.Generator) -> slice:
    """So much of a side, around a centre anywhere on it."""
    size, centre = round(length * share), int(torch.randint(length, (), generator=generator))
    first = centre - size // 2
    return slice(max(0, first), max(0, min(length, first + size)))


def views_of(
    images: Shaped[Tensor, "sample ..."], views: int, augmentation: Augmentation, generator: torch.Generator
) -> Shaped[Tensor, "view_sample ..."]:
    """The samples themselves, followed by ``views - 1`` randomly changed copies of all of them."""
    return torch.cat([images, *(augmentation(images, generator) for _ in range(views - 1))])
