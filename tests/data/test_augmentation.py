"""Augmentation against NumPy: shifts are rolls, flips are flips, cutouts squares, mixtures means and boxes."""

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest

from fleetfit.core.randomness import named_generator
from fleetfit.data.augmentation import (
    CUTOUT_VALUE,
    Augmentation,
    _shifted,
    cutmix,
    mix,
    mixup,
    random_cutout,
    random_flip,
    random_shift,
    views_of,
)

torch.set_num_threads(1)


def make_images(number: int = 4, channels: int = 2, rows: int = 5, columns: int = 7) -> torch.Tensor:
    return torch.randn(number, channels, rows, columns, generator=named_generator(0, "images"))


def rolled(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Roll, then paint what came in from the other side with the edge: [channel row column]."""
    out = np.roll(image, (down, right), axis=(1, 2))
    if down > 0:
        out[:, :down] = out[:, down : down + 1]
    if down < 0:
        out[:, down:] = out[:, down - 1 : down]
    if right > 0:
        out[:, :, :right] = out[:, :, right : right + 1]
    if right < 0:
        out[:, :, right:] = out[:, :, right - 1 : right]
    return out


@pytest.mark.parametrize("pixels", [1, 2, 3])
def test_a_shift_is_a_roll_with_the_edge_repeated(pixels: int) -> None:
    """An offset o moves the content by pixels - o."""
    images = make_images(1)
    for row in range(2 * pixels + 1):
        for column in range(2 * pixels + 1):
            out = _shifted(images, pixels, torch.tensor([row]), torch.tensor([column]))
            assert np.array_equal(out[0].numpy(), rolled(images[0].numpy(), pixels - row, pixels - column))


def test_every_image_has_a_shift_of_its_own() -> None:
    images = make_images()
    rows, columns = torch.tensor([0, 1, 2, 4]), torch.tensor([3, 2, 0, 2])
    out = _shifted(images, 2, rows, columns)
    for i in range(4):
        expected = rolled(images[i].numpy(), 2 - int(rows[i]), 2 - int(columns[i]))
        assert np.array_equal(out[i].numpy(), expected)


def test_random_shifts_use_all_offsets_and_no_other() -> None:
    pixels = 2
    image = make_images(1)
    out = random_shift(image.expand(400, -1, -1, -1), pixels, named_generator(0, "shifts"))
    offsets = range(-pixels, pixels + 1)
    possible = {rolled(image[0].numpy(), down, right).tobytes() for down in offsets for right in offsets}
    assert len(possible) == 25
    assert {o.numpy().tobytes() for o in out} == possible


def test_random_shifts_repeat_with_the_seed() -> None:
    images = make_images(50)
    one = random_shift(images, 1, named_generator(0, "shifts"))
    assert torch.equal(one, random_shift(images, 1, named_generator(0, "shifts")))
    assert not torch.equal(one, random_shift(images, 1, named_generator(1, "shifts")))
    assert one.shape == images.shape


def test_no_shift_is_the_image_and_draws_nothing() -> None:
    images, generator = make_images(), named_generator(0, "shifts")
    before = generator.get_state()
    assert torch.equal(random_shift(images, 0, generator), images)
    assert torch.equal(generator.get_state(), before)


def test_nothing_to_shift() -> None:
    assert random_shift(make_images(0), 1, named_generator(0, "shifts")).shape == (0, 2, 5, 7)


@pytest.mark.parametrize("views", [1, 2, 5])
def test_views_begin_with_the_images_and_keep_their_order(views: int) -> None:
    images = make_images()
    out = views_of(images, views, Augmentation(shift_pixels=1), named_generator(0, "views"))
    assert out.shape == (views * 4, 2, 5, 7)
    assert torch.equal(out[:4], images)
    for i, view in enumerate(out):
        of = images[i % 4].numpy()
        assert any(np.array_equal(view.numpy(), rolled(of, down, right)) for down in (-1, 0, 1) for right in (-1, 0, 1))
    if views > 2:
        assert not torch.equal(out[4:8], out[8:12])


# -- flips and cutouts ------------------------------------------------------------------------------------------------


def test_a_flip_is_numpys_and_about_every_second_image_has_one() -> None:
    images = make_images(400)
    out = random_flip(images, named_generator(0, "flips"))
    flipped = [not torch.equal(a, b) for a, b in zip(out, images, strict=True)]
    for image, view, swapped in zip(images, out, flipped, strict=True):
        assert np.array_equal(view.numpy(), np.flip(image.numpy(), axis=2) if swapped else image.numpy())
    assert 160 < sum(flipped) < 240


@pytest.mark.parametrize("pixels", [1, 2, 3, 4, 20])
def test_a_cutout_is_one_square_around_a_pixel(pixels: int) -> None:
    rows, columns = 5, 7
    images = 1 + make_images(300).abs()
    out = random_cutout(images, pixels, named_generator(0, "cutouts"))
    possible = set()
    for row in range(rows):
        for column in range(columns):
            blank = np.zeros((rows, columns), bool)
            top, left = max(0, row - pixels // 2), max(0, column - pixels // 2)
            blank[top : row - pixels // 2 + pixels, left : column - pixels // 2 + pixels] = True
            possible.add(blank.tobytes())
    seen = {(view == CUTOUT_VALUE).all(0).numpy().tobytes() for view in out}
    assert seen <= possible
    assert len(seen) > 0.9 * len(possible)
    there = out != CUTOUT_VALUE
    assert torch.equal(out[there], images[there])


def test_an_augmentation_is_its_parts_in_turn() -> None:
    images, one, other = make_images(20), named_generator(0, "all"), named_generator(0, "all")
    shifted = random_shift(images, 1, one)
    expected = random_cutout(random_flip(shifted, one), 2, one)
    assert torch.equal(Augmentation(1, True, 2)(images, other), expected)
    assert Augmentation()(images, other) is images


@pytest.mark.parametrize(
    "inputs", [torch.arange(12).reshape(3, 4), torch.ones(3, 4), torch.ones(3, 1, 4, 4, dtype=torch.uint8)]
)
def test_what_is_no_image_stays_as_it_is_and_draws_nothing(inputs: torch.Tensor) -> None:
    generator = named_generator(0, "tokens")
    before = generator.get_state()
    assert Augmentation(2, True, 3)(inputs, generator) is inputs
    assert mix(inputs, 1.0, 1.0, generator) is None
    assert torch.equal(generator.get_state(), before)


# -- mixtures ---------------------------------------------------------------------------------------------------------


def test_mixup_is_a_weighted_mean_of_partners() -> None:
    images = make_images(6).double()
    mixed = mixup(images, 0.5, named_generator(0, "mixup"))
    assert sorted(mixed.partner.tolist()) == list(range(6))
    for i, other in enumerate(mixed.partner.tolist()):
        expected = mixed.share * images[i].numpy() + (1 - mixed.share) * images[other].numpy()
        assert np.allclose(mixed.images[i].numpy(), expected)


def test_cutmix_takes_a_box_from_the_partner_and_counts_its_area() -> None:
    images = torch.arange(6.0)[:, None, None, None].expand(6, 2, 8, 8).contiguous()
    generator, shares = named_generator(0, "cutmix"), []
    for _ in range(200):
        mixed = cutmix(images, 1.0, generator)
        box = None
        for i, other in enumerate(mixed.partner.tolist()):
            assert set(mixed.images[i].unique().tolist()) <= {float(i), float(other)}
            if other == i:
                continue
            assert torch.equal(mixed.images[i, 0], mixed.images[i, 1])
            foreign = (mixed.images[i, 0] == other).numpy()
            assert box is None or np.array_equal(foreign, box)
            box = foreign
        if box is not None:
            rows, columns = box.any(1).nonzero()[0], box.any(0).nonzero()[0]
            assert box.sum() == len(rows) * len(columns)
            assert not len(rows) or box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert mixed.share == pytest.approx(1 - box.mean())
        shares.append(mixed.share)
    assert min(shares) < 0.3
    assert max(shares) > 0.9


@pytest.mark.parametrize("alpha", [0.1, 1.0, 5.0])
def test_shares_are_distributed_as_beta(alpha: float) -> None:
    generator, images = named_generator(0, "shares"), make_images(2, 1, 1, 1)
    shares = [mixup(images, alpha, generator).share for _ in range(1000)]
    assert kstest(shares, beta(alpha, alpha).cdf).pvalue > 0.01


def test_mixup_and_cutmix_take_turns() -> None:
    images, generator = (
        torch.arange(4.0)[:, None, None, None].expand(4, 1, 4, 4).contiguous(),
        named_generator(0, "mix"),
    )
    assert mix(images, 0.0, 0.0, generator) is None
    kinds = []
    for _ in range(200):
        mixed = mix(images, 1.0, 1.0, generator)
        assert mixed is not None
        kinds.append(bool((mixed.images == mixed.images.round()).all()))  # a box of whole numbers, or means of them
    assert 60 < sum(kinds) < 140
    assert all((m := mix(images, 0.0, 1.0, generator)) and (m.images == m.images.round()).all() for _ in range(20))
    assert all((m := mix(images, 1.0, 0.0, generator)) and 0 < m.share < 1 for _ in range(20))


def test_mixtures_repeat_with_the_seed() -> None:
    images = make_images(8)
    for alphas in ((1.0, 0.0), (0.0, 1.0)):
        one, again, other = (mix(images, *alphas, named_generator(seed, "mix")) for seed in (0, 0, 1))
        assert one is not None and again is not None and other is not None  # noqa: PT018
        assert torch.equal(one.images, again.images)
        assert not torch.equal(one.images, other.images)
