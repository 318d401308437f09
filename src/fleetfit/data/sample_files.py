"""Samples that a person has: images of any size and kind, .npy arrays of raw values, texts in files or as they are."""

from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from fleetfit.data.pixels import to_pixels
from fleetfit.data.preprocessing import Preprocessing


def read_samples(path: Path, form: Preprocessing) -> Shaped[np.ndarray, "sample channel row column"]:
    """Raw values 0..``form.maximum``: one sample of an image file, one or more of a .npy file.

    Raises:
        ValueError: not an image or array that can be read, or an array of a wrong shape or range; names the file.
        OSError: the file cannot be opened.
    """
    return _array(path, form) if path.suffix.lower() == ".npy" else _image(path, form)


def _array(path: Path, form: Preprocessing) -> Shaped[np.ndarray, "sample channel row column"]:
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a .npy array that can be read: {error}") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "buif":
        raise ValueError(f"{path} must hold an array of numbers")
    channels, rows, columns = form.shape
    one_sample = values.shape == form.shape or (channels == 1 and values.shape == (rows, columns))
    many = values.shape[1:] == form.shape or (channels == 1 and values.shape[1:] == (rows, columns))
    if not (one_sample or many) or not values.size:
        raise ValueError(
            f"{path} must have shape [{channels}, {rows}, {columns}] or [sample, {channels}, {rows}, {columns}]"
            f"{f', or these without the {channels}' if channels == 1 else ''}, got {list(values.shape)}"
        )
    if not (values.min() >= 0 and values.max() <= form.maximum):  # also false for what is not a number
        raise ValueError(
            f"{path} must hold raw values from 0 to {form.maximum:g}, got {values.min():g} to {values.max():g}"
        )
    return values.reshape(-1, *form.shape)


def _image(path: Path, form: Preprocessing) -> Shaped[np.ndarray, "sample channel row column"]:
    from PIL import Image, UnidentifiedImageError

    with path.open("rb") as file:
        try:
            pixels = to_pixels(Image.open(file), form)
        except UnidentifiedImageError:
            raise ValueError(f"{path} is neither an image of a known kind nor a .npy file") from None
        except Exception as error:  # a decoder may raise anything at bytes that are no image
            raise ValueError(f"{path} is not an image that can be read: {error}") from None
    return pixels[None].astype(np.float32) / 255 * form.maximum


def read_texts(name: str) -> dict[int, str]:
    """The lines of a .txt file that are not empty, by number from 0; anything else is one text itself.

    Raises:
        ValueError: there is no text in it, or it is not UTF-8; names the file.
        OSError: the file cannot be opened.
    """
    path = Path(name)
    if not name.endswith(".txt") or (len(name.split()) > 1 and not path.exists()):
        if not name.strip():
            raise ValueError("a text must not be empty")
        return {0: name}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from None
    texts = {number: line for number, line in enumerate(lines) if line.strip()}
    if not texts:
        raise ValueError(f"{path} has no line with a text")
    return texts
