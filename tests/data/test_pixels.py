"""What becomes of pixels that files and arrays keep in every way there is, against arithmetic on the values written.

Files that Pillow cannot write are written here, byte by byte.
"""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fleetfit.data.pixels import Decoded, as_image, decode, open_image
from fleetfit.data.preprocessing import Preprocessing

SIDE = 12
GREY = Preprocessing(size=(SIDE, SIDE), channels=1, maximum=255, mean=(0.5,), std=(0.5,))
COLOUR = Preprocessing(size=(SIDE, SIDE), channels=3, maximum=255, mean=(0.5,) * 3, std=(0.5,) * 3)
RAMP = np.rint(np.linspace(0, 65535, SIDE * SIDE)).astype(np.uint16).reshape(SIDE, SIDE)
COLOURS = np.stack([RAMP, RAMP.T, RAMP[::-1]], axis=2)


def decoded(content: bytes, form: Preprocessing = GREY) -> Decoded:
    return decode(open_image(content), form)


def pixels(content: bytes, form: Preprocessing = GREY) -> np.ndarray:
    """[row column], or [row column channel] for a form of colours."""
    return decoded(content, form).pixels.transpose(1, 2, 0).squeeze()


def check(content: bytes, expected: np.ndarray, form: Preprocessing = GREY) -> None:
    """Within one level of what the values are, of 0 to 255."""
    assert expected.min() >= 0
    assert 0 < np.ptp(expected) <= 255.001 or not expected.any(), "an expectation that was computed wrongly"
    found = pixels(content, form).astype(float)
    assert np.abs(found - expected).max() <= 1.001


def refused(content: bytes, says: str, form: Preprocessing = GREY) -> None:
    with pytest.raises(ValueError, match=says):
        decoded(content, form)


def saved(image: Image.Image | np.ndarray, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **how)
    return file.getvalue()


def png(values: np.ndarray, bits: int, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of values [row column ...] that are written as they are; colour types 0 grey, 2 RGB, 4 LA, 6 RGBA."""
    rows, columns = values.shape[:2]
    flat = values.reshape(rows, -1)
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in flat]
    else:
        spread = (flat[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        lines = [np.packbits(row.astype(np.uint8).ravel()).tobytes() for row in spread]

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", columns, rows, bits, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + line for line in lines))
    named = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, content) for name, content in named)


def tiff(
    values: np.ndarray, order: str = "<", tags: dict[int, Any] | None = None, bits: int = 0, body: bytes = b""
) -> bytes:
    """A TIFF of [row column ...], in one strip or in ``body`` as ``tags`` say.

    Tags are by number (letter of struct, value or values).
    """
    channels = values.shape[2] if values.ndim == 3 else 1
    body = body or values.astype(values.dtype.newbyteorder(order)).tobytes()
    if bits == 12:
        pairs = values.astype(int).reshape(-1, 2)
        body = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())
    number = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries: dict[int, tuple[str, Any]] = {
        256: ("H", values.shape[1]),
        257: ("H", values.shape[0]),
        258: ("H", (bits or values.dtype.itemsize * 8,) * channels),
        259: ("H", 1),
        262: ("H", 2 if channels >= 3 else 1),
        273: ("I", 8),
        277: ("H", channels),
        278: ("H", values.shape[0]),
        279: ("I", len(body)),
        339: ("H", (number,) * channels),
        **(tags or {}),
    }
    codes = {"H": 3, "I": 4, "h": 8, "i": 9, "f": 11, "d": 12}
    body += b"\0" * (len(body) % 2)
    start = 8 + len(body)
    extra_start = start + 2 + 12 * len(entries) + 4
    directory, extra = struct.pack(order + "H", len(entries)), b""
    for name in sorted(entries):
        letter, value = entries[name]
        value = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(order + letter * len(value), *value)
        place = packed.ljust(4, b"\0")
        if len(packed) > 4:
            place = struct.pack(order + "I", extra_start + len(extra))
            extra += packed
        directory += struct.pack(order + "HHI", name, codes[letter], len(value)) + place
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return mark + struct.pack(order + "I", start) + body + directory + b"\0" * 4 + extra


# -- files of more than 8 bits ----------------------------------------------------------------------------------------


def test_grey_of_16_bits_in_every_file_is_the_picture_of_8_bits() -> None:
    eight = np.rint(RAMP / 257)
    check(saved(eight.astype(np.uint8), "PNG"), eight)
    for content in (
        png(RAMP, 16, 0),
        saved(RAMP, "PNG"),
        saved(RAMP, "PPM"),
        b"P2 12 12 65535\n" + " ".join(map(str, RAMP.ravel())).encode(),
        *(tiff(RAMP, order) for order in "<>"),
        saved(RAMP, "JPEG2000"),
        *(saved(RAMP, "TIFF", compression=way) for way in ("tiff_lzw", "tiff_adobe_deflate", "packbits")),
    ):
        check(content, eight)
        check(content, eight[..., None], COLOUR)


def test_colours_of_16_bits() -> None:
    eight = COLOURS / 257
    body = COLOURS.astype(">u2").tobytes()
    for content in (png(COLOURS, 16, 2), tiff(COLOURS), tiff(COLOURS, ">"), b"P6 12 12 65535\n" + body):
        check(content, eight, COLOUR)


def test_the_maxval_of_a_pgm_is_white() -> None:
    for white in (10, 100, 255, 300, 1023, 4095, 10000, 65535):
        values = np.rint(np.linspace(0, white, SIDE * SIDE)).astype(int).reshape(SIDE, SIDE)
        body = values.astype(">u2" if white > 255 else "u1").tobytes()
        check(f"P5 {SIDE} {SIDE} {white}\n".encode() + body, values * 255 / white)
        plain = " ".join(map(str, values.ravel().tolist()))
        check(f"P2\n# grey\n{SIDE} {SIDE}\n{white}\n{plain}\n".encode(), values * 255 / white)
    dark = (RAMP // 4096).astype(">u2")  # 0..15 of 4095 is dark, and known to be
    check(b"P5 12 12 4095\n" + dark.tobytes(), dark * 255.0 / 4095)


@pytest.mark.parametrize("most", [255, 1023, 4095])
def test_16_bits_of_which_few_are_used_and_none_says_so_are_refused(most: int) -> None:
    values = np.rint(RAMP / 65535 * most).astype(np.uint16)
    says = f"have 16 bits and none is over {most}: of fewer bits, or nearly black.*save it as 8 bits"
    for content in (png(values, 16, 0), tiff(values), tiff(values, ">"), saved(values, "PPM")):
        refused(content, says)
    colours = np.stack([values] * 3, axis=2)
    for content in (png(colours, 16, 2), tiff(colours), b"P6 12 12 65535\n" + colours.astype(">u2").tobytes()):
        refused(content, "have 16 bits and none is over", COLOUR)


def test_black_is_black_in_any_range_and_dim_is_not_refused() -> None:
    black = np.zeros_like(RAMP)
    for content in (png(black, 16, 0), tiff(black), saved(black, "PPM")):
        check(content, black)
    dim = RAMP // 15
    check(png(dim, 16, 0), dim / 257)


@pytest.mark.parametrize("bits", [4, 8, 10, 12, 14, 15])
def test_significant_bits_of_a_png(bits: int) -> None:
    """A PNG that says so and keeps its values unscaled is read by it; one that scales as it should is as it is."""
    small = np.rint(RAMP / 65535 * (2**bits - 1)).astype(np.uint16)
    right = small * (255.0 / (2**bits - 1))
    says = (b"sBIT", bytes([bits]))
    check(png(small, 16, 0, says), right)
    shifted = (small << (16 - bits)).astype(np.uint16)
    check(png(shifted, 16, 0, says), shifted / 257)
    dim = ((small // 5) << (16 - bits)).astype(np.uint16)
    if dim.max() > 4095:
        check(png(dim, 16, 0, says), dim / 257)
    repeated = np.zeros_like(small)
    for shift in range(16 - bits, -bits, -bits):
        repeated |= (small << shift) if shift >= 0 else small >> -shift
    check(png(repeated, 16, 0, says), right)


def test_a_tiff_of_12_bits_a_value() -> None:
    values = RAMP >> 4
    check(tiff(values, bits=12), values * 255.0 / 4095)
    check(tiff(np.minimum(values, 9), bits=12), np.minimum(values, 9) * 255.0 / 4095)


def test_white_that_is_0() -> None:
    check(tiff(RAMP, tags={262: ("H", 0)}), 255 - RAMP / 257)
    eight = (RAMP >> 8).astype(np.uint8)
    check(tiff(eight, tags={262: ("H", 0)}), 255 - eight)
    dark = np.full_like(RAMP, 65535) - RAMP
    check(tiff(dark, tags={262: ("H", 0), 281: ("H", 65535)}), RAMP / 257)


def test_compressed_tiffs_of_either_byte_order() -> None:
    for values, form in ((RAMP, GREY), (COLOURS, COLOUR)):
        for order in "<>":
            body = zlib.compress(values.astype(order + "u2").tobytes())
            check(tiff(values, order, {259: ("H", 8)}, body=body), values / 257, form)


def test_planes_of_colours() -> None:
    """One colour after the other; of 16 bits Pillow takes the halves for pixels of their own."""

    def planes(values: np.ndarray, compressed: bool) -> bytes:
        parts = [np.ascontiguousarray(values[..., i]).tobytes() for i in range(3)]
        if compressed:
            parts = [zlib.compress(part) for part in parts]
        starts = np.cumsum([8, *map(len, parts)])[:3].tolist()
        layout = {284: ("H", 2), 273: ("I", tuple(starts)), 279: ("I", tuple(map(len, parts)))}
        return tiff(values, tags={**layout, 259: ("H", 8 if compressed else 1)}, body=b"".join(parts))

    eight = (COLOURS >> 8).astype(np.uint8)
    for compressed in (False, True):
        check(planes(eight, compressed), eight, COLOUR)
        refused(planes(COLOURS, compressed), "have 16 bits and lie in planes.*, pixel by pixel", COLOUR)


def test_channels_that_are_not_used_are_told() -> None:
    five = np.dstack([COLOURS >> 8, RAMP >> 8, RAMP.T >> 8]).astype(np.uint8)
    content = tiff(five, tags={338: ("H", (0, 0))})
    check(content, five[..., :3], COLOUR)
    assert decoded(content, COLOUR).kind == "TIFF 8 bit without 2 of its channels colour"


# -- what a TIFF says of its range ------------------------------------------------------------------------------------


def test_the_largest_value_that_a_tiff_says() -> None:
    twelve = RAMP >> 4
    for order in "<>":
        check(tiff(twelve, order, {281: ("H", 4095)}), twelve * 255.0 / 4095)
    check(tiff(twelve // 3, tags={281: ("H", 4095)}), twelve // 3 * 255.0 / 4095)
    check(tiff(twelve, tags={280: ("H", 0), 281: ("H", 10000)}), twelve * 255.0 / 10000)
    check(tiff(twelve, tags={281: ("H", 65535)}), twelve / 257)
    wide = RAMP.astype(np.uint32) * 3
    check(tiff(wide, tags={341: ("I", 2**18 - 1)}), wide * 255.0 / (2**18 - 1))
    everything = RAMP.astype(np.uint32) * 65537
    check(tiff(everything, tags={341: ("I", 2**32 - 1)}), RAMP / 257)


def test_ranges_of_signed_numbers_and_floats() -> None:
    floats = (RAMP / 65535).astype(np.float32)
    for order in "<>":
        check(tiff(floats, order, {340: ("f", 0.0), 341: ("f", 1.0)}), floats * 255)
    check(tiff(floats * 200, tags={340: ("f", -100.0), 341: ("f", 300.0)}), (floats * 200 + 100) * 255 / 400)
    signed = RAMP.astype(np.int32) - 30000
    check(tiff(signed, tags={340: ("i", -40000), 341: ("i", 40000)}), (signed + 40000) * 255 / 80000)
    short = (signed // 2).astype(np.int16)
    check(tiff(short, tags={340: ("h", -20000), 341: ("h", 20000)}), (short + 20000.0) * 255 / 40000)
    white_is_0 = {262: ("H", 0), 340: ("f", 0.0), 341: ("f", 1.0)}
    check(tiff(floats, tags=white_is_0), 255 - floats * 255)


@pytest.mark.parametrize(
    ("values", "tags", "says"),
    [
        (RAMP.astype(np.uint32), {}, "whole numbers of 32 bits from 0 to 65535, and it does not say which is white"),
        (RAMP.astype(np.int32), {}, "signed numbers of 32 bits from 0 to 65535"),
        ((RAMP // 2).astype(np.int16), {}, "signed numbers of 16 bits from 0 to 32767"),
        ((RAMP / 65535).astype(np.float32), {}, "floats of 32 bits from 0 to 1, and it does not say which is white"),
        ((RAMP / 257).astype(np.float32), {}, "floats of 32 bits from 0 to 255"),
        ((RAMP / 65535).astype(np.float32), {341: ("f", 1.0)}, "floats of 32 bits"),
        ((RAMP // 512).astype(np.int8), {}, "signed numbers, whose range cannot be known"),
        (RAMP.astype(np.float32) * np.nan, {340: ("f", 0.0), 341: ("f", 1.0)}, "not finite"),
        (np.where(RAMP > 9, 0.5, np.inf).astype(np.float32), {}, "not finite"),
        (RAMP, {281: ("H", 4095)}, "says that its values go from 0 to 4095, and they go from 0 to 65535"),
        (RAMP // 2, {281: ("I", 99999)}, "from 0 to 99999, .* in 16 bits"),
        (RAMP // 7, {281: ("H", 9362)}, "perhaps just what is in it"),
        ((RAMP / 3).astype(np.float32), {340: ("f", 0.0), 341: ("f", 21845.0)}, "perhaps just what is in it"),
        (np.stack([RAMP / 65535] * 3, 2).astype(np.float32), {}, "begins like a TIFF that .* Pillow does not know"),
        (RAMP / 65535, {}, "begins like a TIFF"),
    ],
)
def test_ranges_that_cannot_be_known(values: np.ndarray, tags: dict[int, Any], says: str) -> None:
    refused(tiff(values, tags=tags), says)


def test_floats_of_a_pfm_and_files_of_other_kinds_are_refused() -> None:
    floats = (RAMP / 65535).astype(np.float32)
    refused(saved(floats, "PPM"), "floats from 0 to 1")
    refused(saved(Image.fromarray(RAMP), "IM"), "whole numbers from 0 to 65535, and it does not say which is white")


# -- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
)
def test_every_mode_of_8_bits_is_the_same_picture(mode: str) -> None:
    marks = np.where(RAMP > 30000, 255, 0).astype(np.uint8)
    image: Any = Image.fromarray(marks)
    if mode == "LAB":
        image = Image.merge("LAB", [image, *[Image.new("L", image.size, 128)] * 2])  # lightness alone
    elif mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    elif mode == "PA":
        image = image.convert("RGBA").quantize(2).convert("PA")
    else:
        image = image.convert(mode)
    for form in (GREY, COLOUR):
        found = decode(image, form)
        assert np.abs(found.pixels.astype(int) - marks).max() <= 6  # of LAB: littlecms rounds
        assert found.ground == ""


def test_kinds_are_told() -> None:
    eight = (RAMP >> 8).astype(np.uint8)
    kinds = {
        "PNG 16 bit grey": png(RAMP, 16, 0),
        "PNG 16 bit colour": png(COLOURS, 16, 2),
        "PNG 8 bit grey": saved(eight, "PNG"),
        "PNG 4 bit grey": png(eight >> 4, 4, 0),
        "PNG 1 bit grey": saved(Image.fromarray(eight).convert("1"), "PNG"),
        "JPEG 8 bit colour": saved((COLOURS >> 8).astype(np.uint8), "JPEG"),
        "TIFF 12 bit grey": tiff((RAMP >> 4), bits=12),
        "TIFF 32 bit float grey": tiff((RAMP / 65535).astype(np.float32), tags={340: ("f", 0.0), 341: ("f", 1.0)}),
        "PPM 12 bit grey": b"P5 12 12 4095\n" + (RAMP >> 4).astype(">u2").tobytes(),
        "GIF 8 bit colour": saved(eight, "GIF"),
    }
    assert [decoded(content).kind for content in kinds.values()] == list(kinds)


def test_all_eight_orientations_of_every_depth() -> None:
    turns: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: a[::-1, ::-1],
        lambda a: a[::-1],
        lambda a: a.swapaxes(0, 1),
        lambda a: np.rot90(a, 1),
        lambda a: a[::-1, ::-1].swapaxes(0, 1),
        lambda a: np.rot90(a, -1),
    ]
    exif = Image.Exif()
    for number, turn in enumerate(turns, 1):
        exif[0x112] = number
        raw = exif.tobytes()[6:]
        lying = np.ascontiguousarray(turn(RAMP))
        check(png(lying, 16, 0, (b"eXIf", raw)), RAMP / 257)
        colours = np.ascontiguousarray(turn(COLOURS))
        check(png(colours, 16, 2, (b"eXIf", raw)), COLOURS / 257, COLOUR)
        check(tiff(lying, tags={274: ("H", number)}), RAMP / 257)
        check(tiff(lying, ">", tags={274: ("H", number)}), RAMP / 257)
        check(tiff(lying, tags={274: ("H", number), 262: ("H", 0)}), 255 - RAMP / 257)


# -- transparency -----------------------------------------------------------------------------------------------------

INSIDE = np.zeros((SIDE, SIDE), bool)
INSIDE[3:9, 4:7] = True
ALPHA = np.where(INSIDE, 255, 0).astype(np.uint8)


def on_nothing(light: int, mode: str) -> Image.Image:
    """A drawing of one grey; nothing else is visible, whatever colour it would have."""
    bands = len(mode) - 1
    colours = [np.where(INSIDE, light, 255 - light if light else 0).astype(np.uint8)] * bands
    return Image.merge(mode, [Image.fromarray(band) for band in (*colours, ALPHA)])


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize(
    ("light", "ground"), [(0, "white"), (60, "white"), (127, "white"), (128, "black"), (255, "black")]
)
def test_a_drawing_on_nothing_is_seen(mode: str, light: int, ground: str) -> None:
    expected = np.where(INSIDE, light, 255 if ground == "white" else 0)
    for content in (saved(on_nothing(light, mode), "PNG"), saved(on_nothing(light, mode), "TIFF")):
        found = decoded(content)
        assert found.ground == ground
        assert np.array_equal(found.pixels[0], expected)
        assert np.array_equal(pixels(content, COLOUR), np.stack([expected] * 3, 2))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dark", [True, False])
def test_a_png_that_calls_one_grey_transparent(bits: int, dark: bool) -> None:
    most = 2**bits - 1
    drawn, other = (0, most) if dark else (most, 0)
    values = np.where(INSIDE, drawn, other).astype(np.uint16)
    content = png(values, bits, 0, (b"tRNS", struct.pack(">H", other)))
    found = decoded(content)
    assert found.ground == ("white" if dark else "black")
    assert np.array_equal(found.pixels[0], np.where(INSIDE, 0 if dark else 255, 255 if dark else 0))
    values[0, 0] = drawn  # what is not drawn is transparent still
    assert decoded(png(values, bits, 0, (b"tRNS", struct.pack(">H", other)))).ground == found.ground
    between = np.where(INSIDE, most, most // 3).astype(np.uint16)
    found = decoded(png(between, bits, 0, (b"tRNS", struct.pack(">H", most // 3))))
    assert np.array_equal(found.pixels[0], ALPHA)


def test_one_colour_of_16_bits_that_is_transparent() -> None:
    values = np.stack([np.where(INSIDE, 0, v) for v in (1000, 60000, 30000)], axis=2).astype(np.uint16)
    values[3, 4] = 40000
    found = decoded(png(values, 16, 2, (b"tRNS", struct.pack(">3H", 1000, 60000, 30000))), COLOUR)
    assert found.ground == "white"
    right = np.where(INSIDE[..., None], values // 257, 255)
    assert np.abs(found.pixels.transpose(1, 2, 0).astype(int) - right).max() <= 1


def test_palettes_with_transparency() -> None:
    image = Image.fromarray(INSIDE.astype(np.uint8))
    image.putpalette([200, 200, 200, 10, 20, 30])
    for content in (
        saved(image, "PNG", transparency=0),
        saved(image, "PNG", transparency=b"\0\xff"),
        saved(image, "GIF", transparency=0),
    ):
        found = decoded(content, COLOUR)
        assert found.ground == "white"
        assert found.pixels[:, 4, 5].tolist() == [10, 20, 30]
        assert found.pixels[:, 0, 0].tolist() == [255, 255, 255]


def test_half_visible_pixels_are_mixed_with_the_ground() -> None:
    alpha = np.full((SIDE, SIDE), 51, np.uint8)  # a fifth
    image = Image.merge("LA", [Image.new("L", (SIDE, SIDE), 100), Image.fromarray(alpha)])
    assert np.abs(pixels(saved(image, "PNG")) - (0.2 * 100 + 0.8 * 255)).max() <= 1


def test_what_is_not_transparent_has_no_ground_and_what_is_all_transparent_is_refused() -> None:
    whole = np.dstack([COLOURS >> 8, np.full_like(RAMP, 255)]).astype(np.uint8)
    assert decoded(saved(whole, "PNG"), COLOUR).ground == ""
    check(saved(whole, "PNG"), COLOURS >> 8, COLOUR)
    for visible in (0, 1):  # 1: somebody thought that it is the most
        whole[..., 3] = visible
        refused(saved(whole, "PNG"), "all of it is transparent", COLOUR)


def test_alpha_of_16_bits() -> None:
    alpha = np.where(INSIDE, 65535, 0).astype(np.uint16)
    grey = np.where(INSIDE, 300, 50000).astype(np.uint16)
    for content in (
        png(np.dstack([grey, alpha]), 16, 4),
        png(np.dstack([grey, grey, grey, alpha]), 16, 6),
        tiff(np.dstack([grey, grey, grey, alpha]), tags={338: ("H", 2)}),
    ):
        found = decoded(content)
        assert found.ground == "white"
        assert np.abs(found.pixels[0].astype(int) - np.where(INSIDE, 1, 255)).max() <= 1


# -- several pictures in a file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_of_several_pictures_is_taken_and_told(kind: str) -> None:
    first, second = Image.fromarray((RAMP >> 8).astype(np.uint8)), Image.new("L", (SIDE, SIDE), 9)
    how = {"lossless": True} if kind == "WEBP" else {}
    content = saved(first, kind, save_all=True, append_images=[second], **how)
    assert decoded(content).frames
    check(content, RAMP >> 8)
    assert not decoded(saved(first, kind, **how)).frames


# -- arrays -----------------------------------------------------------------------------------------------------------


def test_arrays_whose_range_is_known() -> None:
    eight = np.arange(5 * 6 * 3).reshape(5, 6, 3).astype(np.uint8)
    for values in (eight, eight.tolist(), eight.transpose(2, 0, 1), eight.astype(np.int64), eight.astype(np.float32)):
        assert np.array_equal(np.asarray(as_image(values)), eight)
    for values in (eight[..., 0], eight[..., :1], eight[None, ..., 0], eight[..., 0].astype(np.uint16)):
        assert np.array_equal(np.asarray(as_image(values)), eight[..., 0])
    assert np.array_equal(np.asarray(as_image(INSIDE)), ALPHA)
    assert np.array_equal(np.asarray(as_image(INSIDE.tolist())), ALPHA)
    assert np.array_equal(np.asarray(as_image(RAMP)), np.rint(RAMP / 257))
    assert np.array_equal(np.asarray(as_image(eight + 0.3)), eight)
    assert np.asarray(as_image(np.zeros((5, 6), np.int64))).max() == 0
    assert as_image(np.zeros((5, 6, 4), np.uint8)).mode == "RGBA"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (RAMP / 65535, "from 0 to 255, got 0 to 1: is 1 white, or nearly black"),
        (RAMP / 65535 / 2, r"got 0 to 0\.5: is 0\.5 white"),
        (INSIDE.astype(np.uint8), "got 0 to 1: is 1 white"),
        (INSIDE.astype(np.int64).tolist(), "got 0 to 1: is 1 white"),
        (RAMP.astype(np.int64), "from 0 to 255, got 0 to 65535"),
        (RAMP.astype(np.float32), "from 0 to 255, got 0 to 65535"),
        (RAMP // 16, "have 16 bits and none is over 4095"),
        (RAMP.astype(np.int64) // 257 - 1, "from 0 to 255, got -1 to 254"),
        (RAMP / 65535 - 0.5, r"got -0\.5 to 0\.5"),
        (np.where(INSIDE, 99, np.nan), "got nan to nan"),
        (np.array([["a", "b"]]), "numbers from 0 to 255, got <U1"),
        (np.zeros((0, 4)), "got nothing"),
        (np.full((4, 4), 1j), "got complex128"),
    ],
)
def test_arrays_whose_range_cannot_be_known(values: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        as_image(values)


@pytest.mark.parametrize("shape", [(3, 6, 3), (4, 6, 3), (3, 6, 4), (1, 6, 3), (3, 6, 1), (1, 1, 1)])
def test_arrays_that_can_be_read_in_two_ways_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"may be \[row, column, channel\] or \[channel, row, column\]: which\?"):
        as_image(np.full(shape, 200, np.uint8))


@pytest.mark.parametrize("shape", [(6,), (1, 3, 6, 6), (5, 6, 7), (5, 6, 2)])
def test_arrays_that_are_no_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"an image must be \[row, column\] or"):
        as_image(np.full(shape, 200, np.uint8))


def test_images_from_memory_are_like_arrays() -> None:
    for values in (RAMP, (RAMP >> 8).astype(np.int32), (RAMP >> 8).astype(np.float32)):
        assert np.abs(decode(Image.fromarray(values), GREY).pixels[0].astype(int) - RAMP / 257).max() <= 1
    for values in ((RAMP / 65535).astype(np.float32), RAMP.astype(np.int32)):
        with pytest.raises(ValueError, match="raw values must be from 0 to 255"):
            decode(Image.fromarray(values), GREY)


# -- what is no image -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><body>404", "it begins like HTML or XML"),
        (b"\n <svg xmlns='http://www.w3.org/2000/svg'/>", "it begins like HTML or XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "it holds text"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it begins like a HEIC photo; save it as JPEG or PNG"),
        (b"%PDF-1.7\n", "it begins like a PDF"),
        (b"\xff\xd8\xff", "it begins like a JPEG that is damaged"),
        (bytes(range(1, 99)), "its bytes begin like nothing known"),
    ],
)
def test_bytes_that_are_no_image_are_told_by_what_they_look_like(content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=f"it is no image of a known kind: {says}$"):
        open_image(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA"])
def test_files_that_are_cut_are_no_images(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = saved(noise, kind)
    assert decoded(content, COLOUR).pixels.any()
    with pytest.raises(Exception, match=r".+"):
        decoded(content[: len(content) * 2 // 3], COLOUR)


def test_a_bomb_is_refused() -> None:
    """A file of some bytes that says to have 40,000 x 40,000 pixels."""
    content = bytearray(png(np.zeros((2, 2), np.uint8), 8, 0))
    content[16:24] = struct.pack(">II", 40_000, 40_000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    with pytest.raises(Image.DecompressionBombError, match="exceeds limit"):
        decoded(bytes(content))
