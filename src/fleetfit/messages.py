"""What crosses each link: typed messages, their one encoding, and the protocols of links and checkpoints.

A message is JSON fields plus named tensors. On the wire it is one safetensors blob whose metadata carries the kind, the
format version and the fields. No pickle, no code. A decoded message is validated against its type before anyone sees it.
"""

import json
import struct
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, TypeVar

import safetensors.torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from fleetfit.records import DeviceAttributes, DeviceReport, HeaderSpec, HeaderTrial, JsonDict, Record

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 16 * 2**20


class Message(Record):
    """JSON fields plus named tensors. ``step`` orders what one device is asked: a repeat is answered from the state before."""

    kind: ClassVar[str]
    tensors: dict[str, Tensor] = Field(default_factory=dict, exclude=True, repr=False)


# -- cloud <-> edge ---------------------------------------------------------------------------------------------------


class StatsRequest(Message):
    """Cloud to edge: tell me about your cluster."""

    kind: ClassVar[str] = "stats_request"


class ClusterStats(Message):
    """Edge to cloud: the attributes of its devices (Algorithm 1, line 1)."""

    kind: ClassVar[str] = "cluster_stats"
    devices: tuple[DeviceAttributes, ...]


class BackboneAssignment(Message):
    """Cloud to edge: the cluster's backbone, physically cut, and the header that was distilled with it.

    Tensors: ``backbone.<name>`` and ``header.<name>``.
    """

    kind: ClassVar[str] = "backbone_assignment"
    cluster: str
    family: str
    config: JsonDict
    labels: tuple[str, ...]
    header: HeaderSpec
    limit_bytes: int


class ClusterReport(Message):
    """Edge to cloud: the header it chose, what it was compared with, and how its devices fared."""

    kind: ClassVar[str] = "cluster_report"
    cluster: str
    header: HeaderSpec
    trials: tuple[HeaderTrial, ...]
    similarity: tuple[tuple[float, ...], ...]
    devices: tuple[DeviceReport, ...]
    rounds: tuple[JsonDict, ...]
    refined: str
    traffic: JsonDict = Field(default_factory=dict)


# -- edge <-> device --------------------------------------------------------------------------------------------------


class DeviceMessage(Message):
    """Base of what an edge asks a device; ``step`` counts 0, 1, 2, ... per device."""

    step: int = Field(ge=0)


class AttributesRequest(DeviceMessage):
    """Edge to device: tell me your hardware."""

    kind: ClassVar[str] = "attributes_request"


class AttributesReply(Message):
    """Device to edge: hardware and volume."""

    kind: ClassVar[str] = "attributes_reply"
    attributes: DeviceAttributes


class CoarseModel(DeviceMessage):
    """Edge to device: the backbone and the coarse header. Tensors: ``backbone.<name>``, ``header.<name>``."""

    kind: ClassVar[str] = "coarse_model"
    family: str
    config: JsonDict
    labels: tuple[str, ...]
    header: HeaderSpec
    class_shares: tuple[float, ...] = Field(description="q, the edge's shared set's class shares")


class CoarseReply(Message):
    """Device to edge: a feature sketch for Eq. 19 and how the coarse model does on the device's validation split.

    Tensors: ``sketch``, [sample, feature] or [quantile, projection]; never inputs or labels.
    """

    kind: ClassVar[str] = "coarse_reply"
    scores: dict[str, list[float]]


class RefineRound(DeviceMessage):
    """Edge to device: do one round. Tensors: ``importance.<name>`` and/or ``header.<name>``, personal to this device."""

    kind: ClassVar[str] = "refine_round"
    round: int = Field(ge=1)


class RoundReply(Message):
    """Device to edge: ``importance.<name>`` and/or ``header.<name>`` after local training, and validation scores."""

    kind: ClassVar[str] = "round_reply"
    scores: dict[str, list[float]]


class Finish(DeviceMessage):
    """Edge to device: the last personal tensors and the cluster's decision; the device builds what it ships."""

    kind: ClassVar[str] = "finish"
    header: str = Field(description="which header to ship: coarse, or refined")
    prior_strength: float | None = Field(None, description="k of the class prior; None = no prior")


class FinishReply(Message):
    """Device to edge: the device's report."""

    kind: ClassVar[str] = "finish_reply"
    report: DeviceReport


MESSAGES: dict[str, type[Message]] = {
    m.kind: m
    for m in (
        StatsRequest,
        ClusterStats,
        BackboneAssignment,
        ClusterReport,
        AttributesRequest,
        AttributesReply,
        CoarseModel,
        CoarseReply,
        RefineRound,
        RoundReply,
        Finish,
        FinishReply,
    )
}

M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """One safetensors blob: tensors as they are, fields as JSON in the metadata."""
    metadata = {"kind": message.kind, "version": str(FORMAT_VERSION), "fields": message.model_dump_json()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in message.tensors.items()}
    return safetensors.torch.save(tensors, metadata=metadata)


def read_metadata(blob: bytes, what: str = "message") -> dict[str, str]:
    """The metadata of a safetensors blob, checked for length and form before anything is decoded.

    Raises:
        ValueError: the blob is truncated or is not ours.
    """
    if len(blob) < 8:
        raise ValueError(f"{what} is truncated: {len(blob)} bytes, at least 8 expected")
    (length,) = struct.unpack("<Q", blob[:8])
    if length > min(MAX_HEADER_BYTES, len(blob) - 8):
        raise ValueError(f"{what} is truncated or foreign: it announces a header of {length} bytes in {len(blob)}")
    try:
        metadata = json.loads(blob[8 : 8 + length]).get("__metadata__")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{what} is corrupt: its header is not JSON") from error
    if not isinstance(metadata, dict) or not {"kind", "version", "fields"} <= set(metadata):
        raise ValueError(f"{what} is foreign: fleetfit's metadata is missing")
    return {str(k): str(v) for k, v in metadata.items()}


def decode(blob: bytes, expected: type[M], what: str = "message") -> M:
    """The message in a blob, validated.

    Raises:
        ValueError: truncated, foreign, of another version or kind, or fields of the wrong type.
    """
    metadata = read_metadata(blob, what)
    if metadata["version"] != str(FORMAT_VERSION):
        raise ValueError(f"{what} has format version {metadata['version']}, this fleetfit reads {FORMAT_VERSION}")
    if metadata["kind"] != expected.kind:
        raise ValueError(f"{what} is a {metadata['kind']!r}, expected a {expected.kind!r}")
    try:
        message = expected.model_validate_json(metadata["fields"])
        tensors = safetensors.torch.load(blob)
    except (ValidationError, SafetensorError) as error:
        raise ValueError(f"{what} is corrupt: {error}") from error
    return message.model_copy(update={"tensors": tensors})


def take(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under ``prefix.``, with the prefix removed."""
    start = prefix + "."
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}


def put(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with ``prefix.`` in front of their names."""
    return {f"{prefix}.{name}": t for name, t in tensors.items()}


class Link(Protocol):
    """One tier's connection to the members below it; knows how messages travel, not what they mean."""

    @property
    def members(self) -> tuple[str, ...]:
        """Who is connected, in a fixed order."""

    def ask(self, messages: Mapping[str, Message], reply: type[M]) -> dict[str, M]:
        """Send each member its message; return the replies by member, in the order of ``messages``."""


class Checkpoints(Protocol):
    """Finished steps that survive a kill."""

    def step(self, name: str, result: type[M], compute: Callable[[], M]) -> M:
        """The saved result of this step, or compute and save it."""


class Progress(Protocol):
    """The one progress callback: a phase, how far it is, how far it goes, and a short note."""

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """Called often; must be cheap."""


def silent(phase: str, done: int, total: int, note: str = "") -> None:
    """A progress callback that shows nothing."""
