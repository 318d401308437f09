"""One image, of any size and kind -> the bytes of a model's size and colours."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from fleetfit.data.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

Pixels = UInt8[np.ndarray, "channel row column"]


def to_pixels(image: "Image.Image", form: Preprocessing) -> Pixels:
    """Turn it upright, give it the form's colours, bring it to the form's size; 0..255.

    Resizing and cutting are those of Transformers' image processors.

    Raises:
        Exception: any; a decoder may raise anything at bytes that are no image.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # converting these clips them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), coloured)
    image = image.convert("L" if form.channels == 1 else "RGB")
    rows, columns = _resized(image.height, image.width, form)
    if (image.height, image.width) != (rows, columns):
        image = image.resize((columns, rows), Image.Resampling[form.resample.upper()])
    if (rows, columns) != form.size:
        top, left = (rows - form.size[0]) // 2, (columns - form.size[1]) // 2
        image = image.crop((left, top, left + form.size[1], top + form.size[0]))
    return np.asarray(image, np.uint8).reshape(*form.size, form.channels).transpose(2, 0, 1)


def _resized(height: int, width: int, form: Preprocessing) -> tuple[int, int]:
    """Rows and columns before the middle is cut out."""
    if isinstance(form.resize, int):
        short, long = form.resize, int(form.resize * max(height, width) / min(height, width))
        return (long, short) if height >= width else (short, long)
    return form.resize or form.size


def as_image(values: Any) -> "Image.Image":
    """An array of bytes as an image: [row column], [row column channel] or [channel row column].

    Raises:
        ValueError: not bytes, or not such an array.
    """
    from PIL import Image

    array = np.asarray(values)
    if array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255:
        array = array.astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"pixels must be whole numbers from 0 to 255, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"an image must be [row, column] or [row, column, channel], got {list(np.shape(values))}")
    return Image.fromarray(array)
