"""One image, of any size and kind -> the bytes of a model's size and colours.

What is transparent is laid on a ground on which the rest can be seen: white where what is visible is dark on average
(the mean luminance, weighted by how visible each pixel is, is below the middle), else black.
"""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import UInt8

from fleetfit.data.pixel_range import DEEP_MODES, array_to_bytes, depth_of, to_bytes
from fleetfit.data.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

Pixels = UInt8[np.ndarray, "channel row column"]
Ground = Literal["", "white", "black"]

INVISIBLE = 15  # of 255
FLAT = 16  # of 255: an image whose channels span no more is nearly of one colour
CHANNELS = (1, 3, 4)
PREVIEWS = ("MPO", "PSD")  # what follows their first picture are previews, depths and layers
STARTS = {
    b"\xff\xd8\xff": "a JPEG that is damaged",
    b"\x89PNG": "a PNG that is damaged",
    b"GIF8": "a GIF that is damaged",
    b"II*\0": "a TIFF that is damaged, or of a layout that Pillow does not know",
    b"MM\0*": "a TIFF that is damaged, or of a layout that Pillow does not know",
    b"\x93NUMPY": "an array of numpy",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a ZIP archive",
}


@dataclass(frozen=True)
class Decoded:
    """An image as a model takes it, and what had to be done for that.

    Attributes:
        pixels: Its bytes.
        extremes: The smallest value of each channel, then the largest of each.
        kind: How its file keeps it, for a person: PNG 16 bit grey.
        ground: What its transparent parts were laid on; empty: it has none.
        frames: It is the first of several pictures in one file.
    """

    pixels: Pixels
    extremes: bytes
    kind: str
    ground: Ground = ""
    frames: bool = False

    @property
    def is_flat(self) -> bool:
        """It is (nearly) of one colour."""
        half = len(self.extremes) // 2
        return all(high - low <= FLAT for low, high in zip(self.extremes[:half], self.extremes[half:], strict=True))


def open_image(content: bytes) -> "Image.Image":
    """The image that the bytes of a file are, not decoded yet.

    Raises:
        ValueError: they are none; says what they look like.
        Exception: any; a decoder may raise anything at bytes that are no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError(f"it is no image of a known kind: {_looks_like(content)}") from None


def decode(image: "Image.Image", form: Preprocessing) -> Decoded:
    """Turn it upright, bring its values to 0..255, give it the form's colours and size.

    Resizing and cutting are those of Transformers' image processors.

    Raises:
        ValueError: the range of its values cannot be known, or nothing of it is visible.
        Exception: any; a decoder may raise anything at bytes that are no image.
    """
    from PIL import Image, ImageOps

    depth = depth_of(image)
    frames = image.format not in PREVIEWS and bool(getattr(image, "is_animated", False))
    image = ImageOps.exif_transpose(image)
    invisible = _invisible_value(image, depth.bits)
    image = to_bytes(image, depth)
    if invisible is not None:
        image.putalpha(invisible)
    colours = "grey" if image.mode in ("1", "L", "LA", "La") else "colour"
    if image.mode in ("LAB", "HSV"):
        image = image.convert("RGB")
    image, ground = _on_ground(image)
    image = image.convert("L" if form.channels == 1 else "RGB")
    rows, columns = _resized(image.height, image.width, form)
    if (image.height, image.width) != (rows, columns):
        image = image.resize((columns, rows), Image.Resampling[form.resample.upper()])
    if (rows, columns) != form.size:
        top, left = (rows - form.size[0]) // 2, (columns - form.size[1]) // 2
        image = image.crop((left, top, left + form.size[1], top + form.size[0]))
    pixels = np.asarray(image, np.uint8).reshape(*form.size, form.channels).transpose(2, 0, 1)
    extremes = np.reshape(image.getextrema(), (-1, 2)).T.astype(np.uint8).tobytes()
    return Decoded(pixels, extremes, f"{depth.words} {colours}", ground, frames)


def as_image(values: Any) -> "Image.Image":
    """An array as an image of 8 bits: [row column], [row column channel] or [channel row column].

    There are 1, 3 or 4 channels: grey, RGB, or RGB and how visible a pixel is.

    Raises:
        ValueError: not such an array, two of these at once, or values whose range cannot be known.
    """
    from PIL import Image

    array = np.asarray(values)
    shape = list(array.shape)
    if array.ndim == 3 and shape[0] in CHANNELS and shape[2] in CHANNELS:
        raise ValueError(f"an array of {shape} may be [row, column, channel] or [channel, row, column]: which?")
    if array.ndim == 3 and shape[0] in CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in CHANNELS):
        raise ValueError(f"an image must be [row, column] or [row, column, channel], got {shape}")
    return Image.fromarray(np.ascontiguousarray(array_to_bytes(array)))


def _resized(height: int, width: int, form: Preprocessing) -> tuple[int, int]:
    """Rows and columns before the middle is cut out."""
    if isinstance(form.resize, int):
        short, long = form.resize, int(form.resize * max(height, width) / min(height, width))
        return (long, short) if height >= width else (short, long)
    return form.resize or form.size


def _invisible_value(image: "Image.Image", bits: int) -> "Image.Image | None":
    """How visible each pixel is, of a PNG that calls one value invisible; Pillow knows that of 8 bits a value alone."""
    from PIL import Image

    said = image.info.get("transparency")
    if not isinstance(said, int | tuple) or bits not in (2, 4, 16) or image.mode == "P":
        return None
    del image.info["transparency"]
    values = np.asarray(image)
    if image.mode not in DEEP_MODES:  # scaled to 8 bits, of which those of 16 lost the lower half
        said = np.asarray(said) >> 8 if bits == 16 else np.asarray(said) * (255 // (2**bits - 1))
    hidden = values == said if values.ndim == 2 else (values == said).all(axis=2)
    return Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8))


def _on_ground(image: "Image.Image") -> tuple["Image.Image", Ground]:
    from PIL import Image

    if not image.has_transparency_data:
        return image, ""
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    visible = np.asarray(image.getchannel("A"))
    if visible.min() == 255:
        return image, ""
    if visible.max() <= INVISIBLE:
        raise ValueError("all of it is transparent: nothing of it can be seen")
    light = np.average(np.asarray(image.convert("RGB").convert("L")), weights=visible)
    ground: Ground = "white" if light < 127.5 else "black"
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image), ground


def _looks_like(content: bytes) -> str:
    """What bytes are that are no image, for a person."""
    if not content:
        return "the file is empty"
    for start, name in STARTS.items():
        if content.startswith(start):
            return f"it begins like {name}"
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "it begins like a HEIC photo; save it as JPEG or PNG"
    head = content[:512]
    if head.lstrip()[:1] == b"<":
        return "it begins like HTML or XML"
    return "it holds text" if all(b >= 32 or b in b"\t\r\n" for b in head) else "its bytes begin like nothing known"
