"""Samples that a person has: images of any size and kind, .npy arrays of raw values, texts in files or as they are."""

import codecs
import os
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from fleetfit.data.pixel_range import scale_array
from fleetfit.data.pixels import decode, open_image
from fleetfit.data.preprocessing import Preprocessing

BYTE_ORDER_MARK = "\ufeff"
MARKS = {  # UTF-32's begins like UTF-16's
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

Samples = Shaped[np.ndarray, "sample channel row column"]


def read_samples(path: Path, form: Preprocessing) -> tuple[Samples, str]:
    """Raw values 0..``form.maximum``, and what had to be done for them; one sample of an image, one or more of a .npy.

    Raises:
        ValueError: not an image or array that can be read, or an array of a wrong shape or range; names the file.
        OSError: the file cannot be opened.
    """
    return (_array(path, form), "") if path.suffix.lower() == ".npy" else _image(path, form)


def _array(path: Path, form: Preprocessing) -> Samples:
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
    try:
        scaled = scale_array(values, form.maximum)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    high = float(scaled.max())
    if values.dtype != np.uint8 and 0 < high <= form.maximum / 16:  # bytes say what is white
        raise ValueError(
            f"{path}: no raw value is over {high:g}, and white is {form.maximum:g}: are they of another range? "
            f"Multiply them by what makes white {form.maximum:g}, or save them as bytes"
        )
    return scaled.reshape(-1, *form.shape)


def _image(path: Path, form: Preprocessing) -> tuple[Samples, str]:
    try:
        found = decode(open_image(path.read_bytes()), form)
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # a decoder may raise anything at bytes that are no image
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from None
    done = ["it has several frames; the first is taken"] if found.frames else []
    if found.ground:
        done.append(f"parts of it are transparent and laid on {found.ground}")
    low, high = min(found.extremes), max(found.extremes)
    if found.is_flat:
        done.append(f"it is (nearly) of one colour: its pixels go from {low} to {high} of 0 to 255")
    return found.pixels[None].astype(np.float32) / 255 * form.maximum, "; ".join(done)


def read_texts(name: str) -> dict[int, str]:
    """The lines of a .txt file that are not blank, by number from 0; anything else is one text itself.

    A line ends in LF or CR LF, as for wc, grep and git: a CR alone, a form feed and the line ends of Unicode are white
    space within it. The file is in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, which is no text.

    Raises:
        ValueError: there is no text in it, it is in another encoding, or no .txt; names the file.
        OSError: the file cannot be opened.
    """
    path = Path(name)
    exists = os.path.isfile(name)  # also of a text that is too long for a name
    if not name.lower().endswith(".txt") or (len(name.split()) > 1 and not exists):
        if exists:
            raise ValueError(f"{name} is a file, but no .txt file with a text in each line")
        if not name.strip():
            raise ValueError("a text must not be empty")
        return {0: name}
    lines = _decoded(path).split("\n")
    if len(lines) == 1 and "\r" in lines[0].strip("\r"):
        raise ValueError(f"{path}: its lines end in CR alone, as on an old Mac; save it with LF or CR LF")
    lines = [line.removesuffix("\r").removeprefix(BYTE_ORDER_MARK) for line in lines]
    texts = {number: line for number, line in enumerate(lines) if line.strip()}
    if not texts:
        raise ValueError(f"{path} has no line with a text")
    return texts


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        known = "" if encoding != "utf-8" else "; save it as UTF-8"
        raise ValueError(f"{path} is not a text in {encoding.upper()}: {error}{known}") from None
    if "\0" in text:
        raise ValueError(
            f"{path} has characters of number 0: is it in UTF-16 without a mark, or no text? Save it as UTF-8"
        )
    return text
