"""What comes from outside, bounded before it costs anything: how long a blob, its header and its metadata may be, how
many tensors, of which names, dtypes and shapes.

A blob is a safetensors file in memory: eight bytes of length, a header, and the tensors. The header is read here in the
one form that its writers give it, without building what it describes. Only what passes is given room.
"""

import json
import logging
import math
import re
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it is imported when a blob is read: a job is checked without it
    import torch
    from torch import Tensor

MIB = 2**20
FEW_SECONDS = 60.0
MAX_MESSAGE_RULE = "links.max_message_bytes"
MAX_DIMENSIONS = 8
MAX_LENGTH = 2**31 - 1  # of a dimension
MAX_ELEMENTS = 2**48  # of a tensor, counting a dimension of 0 as 1: the steps between its elements are numbers too
MAX_NAME = 600  # characters; a device's name has 200 at most
MAX_VALUE = 1e6  # of a feature or a weight; one that is larger would drown everybody else's in an average
MAX_IMPORTANCE = 1e12  # a square of one
MAX_LOSS = 1e6  # nats a sample
MAX_DEPTH = 16  # of lists and tables in one another, in free fields
_TEXT = rb'"((?:[^"\\]*+(?:\\.)?+)*+)"'
_METADATA = re.compile(rb'"__metadata__":\{((?:%b:%b,?)*+)\}' % (_TEXT, _TEXT))
_PAIR = re.compile(rb"%b:%b,?" % (_TEXT, _TEXT))
_TENSOR = re.compile(
    rb'%b:\{"dtype":"([A-Z0-9_]{1,12})","shape":\[([0-9,]{0,99})\],"data_offsets":\[([0-9]{1,18}),([0-9]{1,18})\]\}'
    % _TEXT
)


@dataclass(frozen=True)
class Bounds:
    """How much a blob may hold. The defaults are for files that this program has written.

    Attributes:
        size_bytes: Of all of it; None: any.
        size_rule: What the limit is called, for the one who reads the error.
        header_bytes: Of names, shapes and fields.
        tensors: Their number.
    """

    size_bytes: int | None = None
    size_rule: str = "the most that it may have"
    header_bytes: int = 64 * MIB  # the similarities and distances of 1,000 devices of one edge
    tensors: int = 1_000_000

    def within(self, size_bytes: int, size_rule: str) -> "Bounds":
        """The same, of at most this length."""
        if self.size_bytes is not None and self.size_bytes <= size_bytes:
            return self
        return replace(self, size_bytes=size_bytes, size_rule=size_rule)


OWN_FILE = Bounds()
FROM_ABOVE = Bounds(header_bytes=2 * MIB, tensors=8192)  # a model, and the names of some 30,000 classes
FROM_DEVICE = Bounds(header_bytes=MIB, tensors=4096)


def from_edge(num_devices: int) -> Bounds:
    """Of an edge's reply: two numbers for each pair of devices, a report of each device, and its header's tensors."""
    header_bytes = 2 * MIB + num_devices * (64 * 1024 + 64 * num_devices)
    return Bounds(header_bytes=min(header_bytes, Bounds.header_bytes), tensors=4096 + 512 * num_devices)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a blob, and what it is."""

    dtype: "torch.dtype"
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a blob says that it holds. ``begin`` is where its tensors begin."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, Place]
    begin: int


def read_header(blob: bytes, what: str = "message", bounds: Bounds = OWN_FILE) -> Header:
    """The header of a blob, whole and checked; no tensor is touched.

    Raises:
        ValueError: it is longer than it may be, truncated, not in the form of safetensors; or two tensors have one
            name, a tensor has an unknown dtype, too many or too large dimensions, or not the bytes that they need.
    """
    if bounds.size_bytes is not None and len(blob) > bounds.size_bytes:
        raise ValueError(f"{what} has {len(blob)} bytes, {bounds.size_rule} is {bounds.size_bytes}")
    if len(blob) < 8:
        raise ValueError(f"{what} is truncated: {len(blob)} bytes, at least 8 expected")
    (length,) = struct.unpack("<Q", blob[:8])
    if length > len(blob) - 8:
        raise ValueError(f"{what} is truncated or foreign: it announces a header of {length} bytes in {len(blob)}")
    if length > bounds.header_bytes:
        raise ValueError(f"{what} has a header of {length} bytes, at most {bounds.header_bytes} are read")
    text = blob[8 : 8 + length].rstrip(b" ")
    if not (text.startswith(b"{") and text.endswith(b"}")):
        raise ValueError(f"{what} is corrupt: its header is not that of safetensors")
    metadata, at = _metadata(text, what)
    return Header(metadata, _places(text, at, len(blob) - 8 - length, what, bounds), 8 + length)


def tensors_of(blob: bytes, header: Header) -> "dict[str, Tensor]":
    """The tensors of a blob whose header has been read, each in memory of its own.

    They do not stay where the blob's bytes happened to lie: with MKL, the last digits of a product depend on where its
    factors begin, and PyTorch's own memory begins at multiples of 64 bytes, in every process.
    """
    import torch

    tensors = {}
    for name, place in header.tensors.items():
        dtype = torch.uint8 if place.dtype == torch.bool else place.dtype  # any byte but 0 and 1 is no bool
        tensor = torch.empty(place.shape, dtype=dtype)
        if tensor.numel():
            content = bytearray(memoryview(blob)[header.begin + place.begin : header.begin + place.end])
            tensor.copy_(torch.frombuffer(content, dtype=dtype).view(place.shape))
        tensors[name] = tensor != 0 if place.dtype == torch.bool else tensor
    return tensors


class FewLines(logging.Filter):
    """Lets some lines of one kind pass in a minute: whoever sends messages can cause as many as he likes.

    Args:
        most: Of one kind, and of kinds.
    """

    def __init__(self, most: int = 30) -> None:
        super().__init__()
        self.most = most
        self._passed: dict[str, list[float]] = {}

    def passes(self, kind: str) -> bool:
        """Whether another line of this kind is written."""
        now = time.monotonic()
        if kind not in self._passed and len(self._passed) >= self.most:
            self._passed = {k: at for k, at in self._passed.items() if now - at[-1] < FEW_SECONDS}
            if len(self._passed) >= self.most:
                return False
        times = [at for at in self._passed.get(kind, ()) if now - at < FEW_SECONDS]
        if len(times) >= self.most:
            return False
        self._passed[kind] = [*times, now]
        return True

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written; its kind is its text without what is filled in."""
        return self.passes(f"{record.name} {record.msg}"[:MAX_NAME])


def check_values(tensors: "Mapping[str, Tensor]") -> None:
    """Whether all numbers are finite and of a size that real ones have, before anything is computed from them.

    Raises:
        ValueError: names the tensor.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"tensor {name!r} must be finite")
        most = MAX_IMPORTANCE if name.startswith("importance.") else MAX_VALUE
        if (largest := float(tensor.abs().max())) > most:
            raise ValueError(f"tensor {name!r} must be within {most:g}, got {largest:g}")


def check_free(value: Any, depth: int = 0) -> Any:
    """A free field of JSON as it is, if it holds only finite numbers, none over 64 bits, and is not nested too deep.

    Raises:
        ValueError: it is not like that.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"must not have more than {MAX_DEPTH} lists or tables in one another")
    if isinstance(value, dict):
        for key, item in value.items():
            check_free(key, depth + 1)
            check_free(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_free(item, depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"must hold finite numbers, got {value}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"must hold integers of at most 64 bits, got one of {value.bit_length()}")
    return value


@cache
def _dtypes() -> "dict[str, torch.dtype]":
    """As safetensors calls them."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }


def _metadata(text: bytes, what: str) -> tuple[dict[str, str], int]:
    """The texts beside the tensors, and where what follows them begins."""
    found = _METADATA.match(text, 1)
    if found is None:
        return {}, 1
    metadata: dict[str, str] = {}
    for pair in _PAIR.finditer(found[1]):
        key = _text(pair[1], what)
        if key in metadata:
            raise ValueError(f"{what} is corrupt: its metadata has {key[:MAX_NAME]!r} twice")
        metadata[key] = _text(pair[2], what)
    return metadata, found.end() + (text[found.end() : found.end() + 1] == b",")


def _places(text: bytes, at: int, size: int, what: str, bounds: Bounds) -> dict[str, Place]:
    places: dict[str, Place] = {}
    end = 0
    while at < len(text) - 1:
        found = _TENSOR.match(text, at)
        if found is None or len(found[1]) > 4 * MAX_NAME:
            raise ValueError(f"{what} is corrupt: its header is not that of safetensors, from byte {8 + at} on")
        if len(places) >= bounds.tensors:
            raise ValueError(f"{what} has more than {bounds.tensors} tensors")
        name = _text(found[1], what)
        if len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(f"{what} has a tensor whose name is no line of at most {MAX_NAME} characters")
        if name in places:
            raise ValueError(f"{what} is corrupt: it has two tensors {name!r}")
        place = _place(found, name, what)
        if place.begin != end or place.end > size:
            raise ValueError(f"{what} is corrupt: tensor {name!r} does not lie where the one before it ends")
        places[name], end = place, place.end
        at = found.end() + 1
        if text[at - 1 : at] not in (b",", b"}") or (text[at - 1 : at] == b"}") != (at == len(text)):
            raise ValueError(f"{what} is corrupt: its header is not that of safetensors, from byte {7 + at} on")
    if at == len(text) - 1 and text[at - 1 : at] == b",":
        raise ValueError(f"{what} is corrupt: its header is not that of safetensors, from byte {7 + at} on")
    if end != size:
        raise ValueError(f"{what} is truncated or corrupt: its tensors have {size} bytes, its header says {end}")
    return places


def _place(found: re.Match[bytes], name: str, what: str) -> Place:
    dtype = _dtypes().get(found[2].decode())
    if dtype is None:
        raise ValueError(f"{what} is corrupt: tensor {name!r} has the unknown dtype {found[2].decode()!r}")
    lengths = found[3].split(b",") if found[3] else []
    if len(lengths) > MAX_DIMENSIONS or not all(n and len(n) <= 10 and int(n) <= MAX_LENGTH for n in lengths):
        rule = f"at most {MAX_DIMENSIONS} dimensions, each of at most {MAX_LENGTH}"
        raise ValueError(f"{what} is corrupt: tensor {name!r} must have {rule}, got [{found[3].decode()[:60]}]")
    shape, begin, end = tuple(map(int, lengths)), int(found[4]), int(found[5])
    if math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{what} is corrupt: tensor {name!r} of {shape} has {end - begin} bytes")
    return Place(dtype, shape, begin, end)


def _text(written: bytes, what: str) -> str:
    try:
        text: str = json.loads(b'"%b"' % written)
        text.encode()  # half of a surrogate pair is no character
    except ValueError as error:
        raise ValueError(f"{what} is corrupt: its header is not that of safetensors") from error
    return text
