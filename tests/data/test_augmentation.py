"""Shifts of images: a roll whose edge repeats; the images themselves come first."""

import numpy as np
import pytest
import torch

from fleetfit.data.augmentation import _shifted, random_shift, shifted_views
from fleetfit.randomness import named_generator

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
    out = shifted_views(images, views, 1, named_generator(0, "views"))
    assert out.shape == (views * 4, 2, 5, 7)
    assert torch.equal(out[:4], images)
    for i, view in enumerate(out):
        of = images[i % 4].numpy()
        assert any(np.array_equal(view.numpy(), rolled(of, down, right)) for down in (-1, 0, 1) for right in (-1, 0, 1))
    if views > 2:
        assert not torch.equal(out[4:8], out[8:12])
