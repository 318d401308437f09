"""What crosses each link: typed messages, their one encoding, and the protocols of links and checkpoints.

A message is JSON fields plus named tensors. On the wire it is one safetensors blob whose metadata carries the kind, the
format version and the fields. No pickle, no code. What is decoded is validated against its type before anyone sees it.

Numbers among the fields take as much room whatever their value, so the bytes of a message follow from what it says and
not from how a processor rounds: a figure that differs in its last digit on another machine is as long as here.
"""

import re
from collections.abc import Mapping
from typing import ClassVar, TypeVar

import safetensors.torch
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from fleetfit.core.bounds import OWN_FILE, Bounds, Header, read_header, tensors_of
from fleetfit.core.records import (
    Record,
)

FORMAT_VERSION = 1
FLOAT_WIDTH = 24  # the most characters that a double needs to come back bit by bit: -2.2250738585072014e-308
INTEGER_WIDTH = 12  # longer ones, such as seeds, stay as long as they are
MAX_REASON = 500  # characters
MAX_KIND = 100  # characters
MAX_PROBLEMS = 1000


class Message(Record):
    """JSON fields plus named tensors."""

    kind: ClassVar[str]
    tensors: dict[str, Tensor] = Field(default_factory=dict, exclude=True, repr=False)


class Request(Message):
    """A message that is answered by one of the kind ``reply``."""

    reply: ClassVar[type[Message]]


class Declined(Message):
    """In place of any other reply: a device or an edge cannot answer, and why."""

    kind: ClassVar[str] = "declined"
    reason: str = Field(max_length=MAX_REASON)
    needs_model: bool = Field(False, description="a device that has not got the coarse model, or has lost it")


M = TypeVar("M", bound=Message)

# Texts, so that no number inside one is touched, and numbers, together with those that follow: matrices are long.
_TEXTS_AND_NUMBERS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|-?\d[-+.\deE]*(?:,-?\d[-+.\deE]*)*')
_NOT_FINITE = frozenset({'"NaN"', '"Infinity"', '"-Infinity"'})


def encode(message: Message, **extra: str) -> bytes:
    """One safetensors blob: tensors as they are, fields as JSON in the metadata, beside any extra metadata."""
    fields = _TEXTS_AND_NUMBERS.sub(_padded, message.model_dump_json())
    metadata = {"kind": message.kind, "version": str(FORMAT_VERSION), "fields": fields, **extra}
    # The format refuses tensors that share memory.
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in message.tensors.items()
    }
    blob: bytes = safetensors.torch.save(tensors, metadata=metadata)
    return blob


def _padded(found: re.Match[str]) -> str:
    """Blanks in front of numbers, where JSON allows them; the digits are the shortest that give the number back."""
    text = found[0]
    if text.startswith('"'):  # as pydantic writes what is not finite; inside the metadata, quotes take two bytes each
        return text.rjust(FLOAT_WIDTH - 2) if text in _NOT_FINITE else text
    return ",".join([n.rjust(FLOAT_WIDTH if "." in n or "e" in n else INTEGER_WIDTH) for n in text.split(",")])


def decode(blob: bytes, expected: type[M], what: str = "message", bounds: Bounds = OWN_FILE) -> M:
    """The message in a blob, validated; what it costs to refuse one is bounded by ``bounds``.

    Raises:
        ValueError: longer or of more than it may be, truncated, foreign, of another version or kind, or fields of the
            wrong type or out of range. Nothing else, whatever the bytes are.
    """
    return _decoded(blob, read_header(blob, what, bounds), expected, what)


def _decoded(blob: bytes, header: Header, expected: type[M], what: str) -> M:
    metadata = header.metadata
    if not {"kind", "version", "fields"} <= metadata.keys():
        raise ValueError(f"{what} is foreign: fleetfit's metadata is missing")
    if metadata["version"] != str(FORMAT_VERSION):
        version = metadata["version"][:MAX_KIND]
        raise ValueError(f"{what} has format version {version}, this fleetfit reads {FORMAT_VERSION}")
    if metadata["kind"] != expected.kind:
        raise ValueError(f"{what} is a {metadata['kind'][:MAX_KIND]!r}, expected a {expected.kind!r}")
    try:
        # Strictly: true, "1" and 1.0 are no integers.
        message = expected.model_validate_json(metadata["fields"], strict=True)
    except ValidationError as error:
        raise ValueError(f"{what} is corrupt: {first_problem(error)}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"{what} is corrupt: its fields cannot be read ({type(error).__name__})") from error
    return message.model_copy(update={"tensors": tensors_of(blob, header)})


def first_problem(error: ValidationError) -> str:
    """One line of a validation error; of very many they are only counted, as each costs its own."""
    if error.error_count() > MAX_PROBLEMS:
        return f"{error.error_count()} fields are wrong"
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg']}" if where else problem["msg"]


def take(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under ``prefix.``, with the prefix removed."""
    start = prefix + "."
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}


def put(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with ``prefix.`` in front of their names."""
    return {f"{prefix}.{name}": t for name, t in tensors.items()}


def printable(text: str) -> str:
    """What others wrote, fit to be shown: one line, not long, no control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:MAX_REASON])
