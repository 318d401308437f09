"""From which value to which the pixels of a file or an array go, as the file or the type says: scaled, or refused.

Files. Pixels of up to 8 bits go over what their bits can say. Those of 16 bits go from 0 to 65535, or to what the file
says: the maxval of a PGM, MaxSampleValue of a TIFF, sBIT of a PNG that was not scaled up as PNG asks for. Where a
picture of 16 bits says nothing and no value is over 4095, it is of a camera of 12 bits or fewer, or nearly black: it
cannot be known, and is refused. So are whole numbers of 32 bits, signed numbers and floats without a range in the file.
MaxSampleValue is a range where it is all ones in binary (4095, say) or above the picture's own largest value; it may
also be no more than that largest value, and then says nothing.

Arrays. A bool goes from 0 to 1, bytes from 0 to 255. Other numbers are taken to go from 0 to 255 too if they are within
that and some are over 1; but whole numbers that are only 0 and 1, and floats that are not over 1, could mean white or
nearly black by their 1. Unsigned numbers of 16 bits that go over 255 are those of a file of 16 bits. All else is
refused.
"""

import re
import struct
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Shaped, UInt8

if TYPE_CHECKING:
    from PIL import Image

WHITE = 255
WHITE_16 = 65535
DIM_16 = 4095  # of 65535: what a camera of 12 bits gives at most, and a sixteenth of white
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
REMEDY = "save it as 8 bits, or as 16 bits with white at 65535"
# Tags of TIFF.
BITS, WHITE_IS_0, NUMBER, LOW_WHOLE, HIGH_WHOLE, LOW_ANY, HIGH_ANY = 258, 262, 339, 280, 281, 340, 341
CHANNELS, PLANES = 277, 284


@dataclass(frozen=True)
class Depth:
    """How a file keeps its pixels; to be read before they are decoded.

    Attributes:
        file: The kind of file; empty: the picture comes from memory.
        bits: Of one value; 0: not known.
        number: What kind of number a value is.
        low: The smallest value that the file says there can be.
        high: The largest that it says there can be; None: it does not say.
        exact: The file says so in words that can mean nothing else.
        significant: Bits that a PNG says to be significant.
        inverted: White is the smallest value, and the decoder leaves it so.
        planes: Its colours lie one after the other, not pixel by pixel.
        unused: Channels of it that are not decoded.
    """

    file: str
    bits: int = 8
    number: Literal["whole", "signed", "float"] = "whole"
    low: float | None = None
    high: float | None = None
    exact: bool = False
    significant: int | None = None
    inverted: bool = False
    planes: bool = False
    unused: int = 0

    @property
    def words(self) -> str:
        """For a person: PNG 16 bit."""
        number = {"whole": "", "signed": " signed", "float": " float"}[self.number]
        unused = f" without {self.unused} of its channels" if self.unused else ""
        return f"{self.file or 'in memory,'} {self.bits} bit{number}{unused}" if self.bits else self.file


def depth_of(image: "Image.Image") -> Depth:
    """How an image that was opened, and not decoded yet, is kept in its file."""
    file, mode = image.format or "", image.mode
    if file == "TIFF":
        return _depth_of_tiff(image)
    tile: Any = getattr(image, "tile", None)
    codec, layout = (tile[0][0], tile[0][3]) if tile else ("", "")
    if file == "PPM" and mode != "F":
        white = layout[-1] if isinstance(layout, tuple) else WHITE_16 if "16" in layout else 1 if mode == "1" else WHITE
        # Pillow scales by maxval already, to 65535 or 255; 65535 itself is also written by those who know no better.
        told = mode in DEEP_MODES and white != WHITE_16
        return Depth(file, int(white).bit_length(), high=WHITE_16 if told else None, exact=told)
    if mode in DEEP_MODES:
        sixteen = file == "PNG" or (mode.startswith("I;16") and file in ("", "JPEG2000"))
        bits = _significant_bits(image.fp) if file == "PNG" else None  # type: ignore[attr-defined]
        return Depth(file, 16 if sixteen else 0, "float" if mode == "F" else "whole", significant=bits)
    if file == "SGI" and "16" in f"{codec} {layout}":
        return Depth(file, 16)
    of_png = re.search(r";(\d+)", str(layout)) if file == "PNG" else None
    return Depth(file, int(of_png[1]) if of_png else 1 if mode == "1" else 8)


def to_bytes(image: "Image.Image", depth: Depth) -> "Image.Image":
    """The same picture with 8 bits a value, which it may have already.

    Raises:
        ValueError: the range of its values cannot be known; says why, and what to do.
    """
    from PIL import Image

    if image.mode in DEEP_MODES:
        values = np.asarray(image)
        if not depth.file:
            return Image.fromarray(array_to_bytes(values))
        if depth.number == "whole" and values.dtype == np.int32 and depth.bits == 32:
            values = values.view(np.uint32)
        low, high = _limits(values, depth)
        scaled = np.rint((values.astype(np.float64) - low) * (WHITE / (high - low))).astype(np.uint8)
        return Image.fromarray(WHITE - scaled if depth.inverted else scaled)
    if depth.number != "whole":
        raise ValueError(f"its values are {depth.number} numbers, whose range cannot be known: {REMEDY}")
    if depth.bits == 16 and depth.planes:  # Pillow takes half of them for other pixels
        raise ValueError(f"its colours have 16 bits and lie in planes, which cannot be read: {REMEDY}, pixel by pixel")
    if depth.bits == 16:  # of which the upper 8 are left
        bands = zip(image.getbands(), np.reshape(image.getextrema(), (-1, 2)), strict=True)
        brightest = max(int(high) for band, (_, high) in bands if band not in "Aa")
        if brightest <= DIM_16 // 256 + (depth.file == "PPM"):  # where they are rounded
            raise _too_dim(256 * brightest + 255)
    return image


def array_to_bytes(values: Shaped[np.ndarray, "..."], white: float = WHITE) -> UInt8[np.ndarray, "..."]:
    """An array's values as bytes.

    Raises:
        ValueError: they are none, or their range cannot be known.
    """
    scaled = np.rint(scale_array(values, white) * (WHITE / white))
    return scaled.astype(np.uint8)


def scale_array(values: Shaped[np.ndarray, "..."], white: float = WHITE) -> Shaped[np.ndarray, "..."]:
    """An array's values from 0 to ``white``, which they mostly are already.

    Raises:
        ValueError: they are not, and their range cannot be known.
    """
    if values.dtype.kind not in "buif" or not values.size:
        what = values.dtype if values.size else "nothing"
        raise ValueError(f"raw values must be numbers from 0 to {white:g}, got {what}")
    if values.dtype.kind == "b":
        return values.astype(np.float32) * white
    low, high = values.min(), values.max()
    if values.dtype == np.uint16 and white == WHITE and high > WHITE:
        if high <= DIM_16:
            raise _too_dim(int(high))
        return values * (WHITE / WHITE_16)
    if not (low >= 0 and high <= white):  # also false for what is not a number
        raise ValueError(f"raw values must be from 0 to {white:g}, got {low:g} to {high:g}")
    if white > 1 and 0 < high <= 1 and (values.dtype.kind == "f" or low == 0):
        raise ValueError(
            f"raw values must be from 0 to {white:g}, got {low:g} to {high:g}: is {high:g} white, or nearly black? "
            f"It cannot be known; multiply them by what makes white {white:g}"
        )
    return values


def _limits(values: Shaped[np.ndarray, "..."], depth: Depth) -> tuple[float, float]:
    """The values that become black and white."""
    own_low, own_high = float(values.min()), float(values.max())
    if not (np.isfinite(own_low) and np.isfinite(own_high)):
        raise ValueError(f"some of its values are not finite: {REMEDY}")
    if depth.high is not None:
        return _told_limits(own_low, own_high, depth)
    if depth.number != "whole" or not 0 < depth.bits <= 16:
        what = {"whole": "whole numbers", "signed": "signed numbers", "float": "floats"}[depth.number]
        of = f" of {depth.bits} bits" if depth.bits else ""
        raise ValueError(
            f"its values are {what}{of} from {own_low:g} to {own_high:g}, and it does not say which is white: {REMEDY}"
        )
    if depth.significant is not None and _is_unscaled(values, depth.significant):
        return 0, 2**depth.significant - 1
    if depth.bits == 16 and 0 < own_high <= DIM_16:
        raise _too_dim(int(own_high))
    return 0, 2**depth.bits - 1


def _told_limits(own_low: float, own_high: float, depth: Depth) -> tuple[float, float]:
    low, high = depth.low or 0, depth.high or 0
    said = f"it says that its values go from {low:g} to {high:g}, and they go from {own_low:g} to {own_high:g}"
    too_high = depth.number == "whole" and not depth.exact and high >= 2**depth.bits
    if own_low < low or own_high > high or low >= high or too_high:
        raise ValueError(f"{said} in {depth.bits} bits: {REMEDY}")
    round_number = low == 0 and (high == 1 or (high == int(high) and int(high) & (int(high) + 1) == 0))
    if not depth.exact and not round_number and (own_high == high or (low != 0 and own_low == low)):
        raise ValueError(f"{said}: what it says is perhaps just what is in it, and not what is white: {REMEDY}")
    return low, high


def _is_unscaled(values: Shaped[np.ndarray, "..."], bits: int) -> bool:
    """Whether a PNG's values of fewer bits were left as they are; PNG wants them scaled up to all 16."""
    if not 0 < bits < 16 or values.max() >= 2**bits:
        return False
    return bool((values.astype(np.int64) & (2 ** (16 - bits) - 1)).any())  # of scaled ones that are so small: none


def _too_dim(most: int) -> ValueError:
    return ValueError(
        f"its values have 16 bits and none is over {most}: of fewer bits, or nearly black? It cannot be known; "
        f"{REMEDY} (or say the range in the file: maxval of PGM, MaxSampleValue of TIFF, sBIT of PNG)"
    )


def _depth_of_tiff(image: "Image.Image") -> Depth:
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    bits, number = int(_tag(tags, BITS) or 1), _tag(tags, NUMBER) or 1
    kind: Literal["whole", "signed", "float"] = "float" if number == 3 else "signed" if number == 2 else "whole"
    low: float | None = 0
    high = _tag(tags, HIGH_WHOLE) or _tag(tags, HIGH_ANY)
    if kind != "whole":
        low, high = _tag(tags, LOW_ANY), _tag(tags, HIGH_ANY)
    if low is None or high is None or image.mode not in DEEP_MODES:
        low = high = None
    inverted = tags.get(WHITE_IS_0) == 0 and image.mode in DEEP_MODES
    unused = int(_tag(tags, CHANNELS) or 1) - len(image.getbands()) if image.mode != "P" else 0
    planes = _tag(tags, PLANES) == 2
    return Depth("TIFF", bits, kind, low, high, inverted=inverted, planes=planes, unused=max(0, unused))


def _tag(tags: Any, number: int) -> float | None:
    """The largest of a tag's numbers, one for each channel."""
    value = tags.get(number)
    numbers = value if isinstance(value, tuple) else (value,)
    return max((float(n) for n in numbers if isinstance(n, int | float)), default=None)


def _significant_bits(file: IO[bytes]) -> int | None:
    """The first number of a PNG's chunk sBIT, which Pillow passes over."""
    place = file.tell()
    file.seek(8)
    try:
        while True:
            length, name = struct.unpack(">I4s", file.read(8))
            if name in (b"IDAT", b"IEND"):
                return None
            if name == b"sBIT":
                return file.read(1)[0]
            file.seek(length + 4, 1)
    except (struct.error, IndexError):
        return None
    finally:
        file.seek(place)
