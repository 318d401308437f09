"""What crosses each link: typed messages, their one encoding, and the protocols of links and checkpoints.

A message is JSON fields plus named tensors. On the wire it is one safetensors blob whose metadata carries the kind, the
format version and the fields. No pickle, no code. What is decoded is validated against its type before anyone sees it.

Numbers among the fields take as much room whatever their value, so the bytes of a message follow from what it says and
not from how a processor rounds: a figure that differs in its last digit on another machine is as long as here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol, TypeVar

import safetensors.torch
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from fleetfit.bounds import FROM_DEVICE, OWN_FILE, Bounds, Header, read_header, tensors_of
from fleetfit.config import RefineConfig
from fleetfit.method.quantisation import quantised, restored
from fleetfit.records import (
    MAX_COUNT,
    MAX_SEED,
    NO_SCORES,
    Above0,
    AbsentDevice,
    BackboneShape,
    Cost,
    Count,
    DeviceAttributes,
    DeviceReport,
    Fault,
    Finite,
    HeaderSpec,
    HeaderTrial,
    JsonDict,
    Record,
    ValidationScores,
    Way,
)

FORMAT_VERSION = 1
FLOAT_WIDTH = 24  # the most characters that a double needs to come back bit by bit: -2.2250738585072014e-308
INTEGER_WIDTH = 12  # longer ones, such as seeds, stay as long as they are
MAX_REASON = 500  # characters
MAX_KIND = 100  # characters
MAX_PROBLEMS = 1000
MAX_STEP = 10**6
MAX_NOISE = 1e12


class Message(Record):
    """JSON fields plus named tensors."""

    kind: ClassVar[str]
    tensors: dict[str, Tensor] = Field(default_factory=dict, exclude=True, repr=False)


class Request(Message):
    """A message that is answered by one of the kind ``reply``."""

    reply: ClassVar[type[Message]]


# -- cloud <-> edge ---------------------------------------------------------------------------------------------------


class ClusterStats(Message):
    """Edge to cloud: the attributes of its devices (Algorithm 1, line 1)."""

    kind: ClassVar[str] = "cluster_stats"
    devices: tuple[DeviceAttributes, ...]
    silent: tuple[str, ...] = Field((), description="devices whose attributes are not known")
    faults: tuple[Fault, ...] = ()


class StatsRequest(Request):
    """Cloud to edge: tell me about your cluster."""

    kind: ClassVar[str] = "stats_request"
    reply: ClassVar[type[Message]] = ClusterStats


class ClusterReport(Message):
    """Edge to cloud: the header it chose, what it was compared with, and how its devices fared.

    Tensors, where devices send their models up: ``backbone.<name>``, and ``<device>/header.<name>`` as shipped.
    """

    kind: ClassVar[str] = "cluster_report"
    cluster: str
    header: HeaderSpec
    trials: tuple[HeaderTrial, ...]
    similarity: tuple[tuple[Finite, ...], ...] = Field(description="weights of Eq. 21, [device peer]")
    distance: tuple[tuple[Finite, ...], ...] = Field(description="what they were made from")
    rounds: tuple[JsonDict, ...] = Field(description="per round, the cluster's pooled validation scores")
    decision: JsonDict = Field(description="what the guard and the class prior decided, and on which scores")
    devices: tuple[DeviceReport, ...]
    absent: tuple[AbsentDevice, ...] = Field((), description="the others")
    faults: tuple[Fault, ...] = ()
    traffic: dict[str, Count] = Field(
        default_factory=dict, description="bytes by link, of an edge that keeps its own books"
    )
    phase_seconds: dict[str, Cost] = Field(default_factory=dict, description="of that edge, wall time")
    phase_cpu_seconds: dict[str, Cost] = Field(
        default_factory=dict, description="of that edge, CPU time, where it is known"
    )


class BackboneAssignment(Request):
    """Cloud to edge: the cluster's backbone, physically cut, and the header that was distilled with it.

    Tensors: ``backbone.<name>`` and ``header.<name>``.
    """

    kind: ClassVar[str] = "backbone_assignment"
    reply: ClassVar[type[Message]] = ClusterReport
    cluster: str
    family: str
    config: JsonDict
    shape: BackboneShape | None = Field(None, description="what was cut from the reference, for the model's card")
    labels: tuple[str, ...]
    header: HeaderSpec
    class_shares: tuple[Above0, ...] = Field((), description="of the public data that it was trained on")


# -- edge <-> device --------------------------------------------------------------------------------------------------


class DeviceMessage(Request):
    """Base of what an edge asks a device; ``step`` counts 0, 1, 2, ..., so that repeats are known."""

    step: int = Field(ge=0, le=MAX_STEP)


class DeviceReply(Message):
    """Base of what a device replies; ``step`` is that of the message it answers."""

    step: int = Field(ge=0, le=MAX_STEP)


class Declined(Message):
    """In place of any other reply: a device or an edge cannot answer, and why."""

    kind: ClassVar[str] = "declined"
    reason: str = Field(max_length=MAX_REASON)
    needs_model: bool = Field(False, description="a device that has not got the coarse model, or has lost it")


class AttributesReply(DeviceReply):
    """Device to edge: hardware and volume."""

    kind: ClassVar[str] = "attributes_reply"
    attributes: DeviceAttributes


class AttributesRequest(DeviceMessage):
    """Edge to device: tell me your hardware."""

    kind: ClassVar[str] = "attributes_request"
    reply: ClassVar[type[Message]] = AttributesReply


class CoarseReply(DeviceReply):
    """Device to edge: a sketch of its features for Eq. 19, and how the coarse model does on its validation split.

    Tensors, where the similarity needs them: ``sketch.all``, [sample feature] or [quantile projection]; the latter also
    of two halves of the sample, ``sketch.first`` and ``sketch.second``. Or ``sketch.counts``, [class], where a job has
    labels sent. Never inputs.
    """

    kind: ClassVar[str] = "coarse_reply"
    scores: ValidationScores


class CoarseModel(DeviceMessage):
    """Edge to device: the backbone and the coarse header. Tensors: ``backbone.<name>``, ``header.<name>``."""

    kind: ClassVar[str] = "coarse_model"
    reply: ClassVar[type[Message]] = CoarseReply
    family: str
    config: JsonDict
    shape: BackboneShape | None = None
    labels: tuple[str, ...]
    header: HeaderSpec
    refine: RefineConfig
    seed: int = Field(ge=0, le=MAX_SEED)
    class_shares: tuple[Above0, ...] = Field(description="q, class shares of what the model was trained on")


class RoundReply(DeviceReply):
    """Device to edge, after local training: ``importance.*``, and where weights are exchanged the header.

    That as ``header.*``, or in a byte a value: ``change.*`` to the one that was sent first, and ``level.*``, what a
    unit of it is worth (``method.quantisation``).
    """

    kind: ClassVar[str] = "round_reply"
    scores: ValidationScores = Field(description="of its own header, right after training")
    came: ValidationScores = Field(NO_SCORES, description="of the header that it was sent, with its class prior")
    average: ValidationScores = Field(NO_SCORES, description="of the whole cluster's average, if that was sent too")
    noise: float = Field(0.0, ge=0, le=MAX_NOISE, description="standard deviation of the noise in header.*")


def packed(reply: RoundReply, sent: Mapping[str, Tensor]) -> RoundReply:
    """The reply with its header as a change to the one that was sent first, in a byte a value."""
    header = take(reply.tensors, "header")
    pairs = {name: quantised(t.float() - sent[name].float()) for name, t in header.items()}
    others = {name: t for name, t in reply.tensors.items() if not name.startswith("header.")}
    changes = {name: change for name, (change, _) in pairs.items()}
    levels = {name: level for name, (_, level) in pairs.items()}
    return reply.model_copy(update={"tensors": others | put("change", changes) | put("level", levels)})


def header_of(reply: RoundReply, sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The header in a round's reply, whichever way it came; none where none did."""
    levels = take(reply.tensors, "level")
    if not levels:
        return take(reply.tensors, "header")
    changes = take(reply.tensors, "change")
    return {name: (sent[name].float() + restored(c, levels[name])).to(sent[name].dtype) for name, c in changes.items()}


class RefineRound(DeviceMessage):
    """Edge to device: do one round. Tensors, once there are any: the personal ``importance.*`` and ``header.*``.

    Where groups were just found, ``average.*`` too: the whole cluster's average header, scored beside the group's.
    """

    kind: ClassVar[str] = "refine_round"
    reply: ClassVar[type[Message]] = RoundReply
    round: int = Field(ge=1, le=MAX_STEP)


class ProposeReply(DeviceReply):
    """Device to edge: ``losses``, [way] float32: summed validation loss (nats) of each ``shipping.ways_to_ship``."""

    kind: ClassVar[str] = "propose_reply"
    num_samples: int = Field(ge=0, le=MAX_COUNT)
    noise: float = Field(0.0, ge=0, le=MAX_NOISE, description="standard deviation of the noise in each loss")


class Propose(DeviceMessage):
    """Edge to device: the last personal tensors; how do the ways to ship them do on your validation split?"""

    kind: ClassVar[str] = "propose"
    reply: ClassVar[type[Message]] = ProposeReply


class FinishReply(DeviceReply):
    """Device to edge: the device's report. Tensors: ``header.*`` as shipped, if it lets its model go up, else none."""

    kind: ClassVar[str] = "finish_reply"
    report: DeviceReport


class Finish(DeviceMessage):
    """Edge to device: what the cluster decided; build what you ship and report.

    Tensors: the last personal ones, for a device that missed the proposal.
    """

    kind: ClassVar[str] = "finish"
    reply: ClassVar[type[Message]] = FinishReply
    way: Way = Field(description="what this device ships, unless it is clearly worse there")


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
        Propose,
        ProposeReply,
        Finish,
        FinishReply,
        Declined,
    )
}

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


def decode_any(blob: bytes, what: str = "message", bounds: Bounds = OWN_FILE) -> Message:
    """The message in a blob, of whichever kind crosses links.

    Raises:
        ValueError: as ``decode``, or a kind that does not cross links.
    """
    header = read_header(blob, what, bounds)
    kind = header.metadata.get("kind")
    if kind is None:
        raise ValueError(f"{what} is foreign: fleetfit's metadata is missing")
    if kind not in MESSAGES:
        raise ValueError(f"{what} is of the unknown kind {kind[:MAX_KIND]!r}")
    return _decoded(blob, header, MESSAGES[kind], what)


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
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def take(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under ``prefix.``, with the prefix removed."""
    start = prefix + "."
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}


def put(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with ``prefix.`` in front of their names."""
    return {f"{prefix}.{name}": t for name, t in tensors.items()}


class Refused(Record):
    """A member's reply that the link does not pass on, and why."""

    reason: str
    needs_model: bool = Field(False, description="the member declined for want of the coarse model")


def read_reply(blobs: Sequence[bytes], request: Request, bounds: Bounds) -> Message | Refused:
    """A member's reply, decoded, of the kind that the request asks for; or why it is refused.

    Args:
        blobs: All that came in answer to the request, at least one. The same reply twice is one.
        request: What was asked.
        bounds: How much it may hold.
    """
    try:
        replies = [decode_any(blob, "it", bounds) for blob in blobs]
    except ValueError as error:
        return Refused(reason=printable(str(error)))
    first = replies[0]
    if not all(_same(first, other) for other in replies[1:]):
        return Refused(reason=f"it came {len(replies)} times, with different content")
    if isinstance(first, Declined):
        return Refused(reason=printable(f"declined: {first.reason}"), needs_model=first.needs_model)
    if type(first) is not request.reply:
        return Refused(reason=f"it is a {first.kind!r}, expected a {request.reply.kind!r}")
    return first


def _same(one: Message, other: Message) -> bool:
    return (
        type(one) is type(other)
        and one.model_dump_json() == other.model_dump_json()
        and one.tensors.keys() == other.tensors.keys()
        and all(t.dtype == other.tensors[n].dtype and torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())
    )


def printable(text: str) -> str:
    """What others wrote, fit to be shown: one line, not long, no control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:MAX_REASON])


class Link(Protocol):
    """One tier's connection to the members below it; knows how messages travel, not what they mean."""

    @property
    def members(self) -> tuple[str, ...]:
        """Who belongs here, connected or not, in a fixed order."""

    def ask(self, messages: Mapping[str, Request], bounds: Bounds = FROM_DEVICE) -> dict[str, Message | Refused]:
        """Send each member its message; wait until all have replied, or until the deadline.

        Args:
            messages: The question to each member that is asked.
            bounds: How much a reply may hold; a longer one is not decoded.

        Returns:
            In the order of ``messages``: each member's reply, of the kind ``message.reply``; or why what came is
            refused (``read_reply``). Who did not reply in time is absent. What comes later is dropped.
        """


class TrainingState(Message):
    """A long training at the end of an epoch: all that decides how it goes on.

    Tensors: ``parameter.<i>``, ``average.<i>``, ``optimizer.<i>.<name>``, ``generator.<i>`` (their states) and
    ``losses`` (of all steps so far).
    """

    kind: ClassVar[str] = "training_state"
    step: int = Field(ge=1)
    seconds: float = Field(0.0, ge=0, description="wall time so far")
    cpu_seconds: float | None = Field(0.0, ge=0, description="CPU time so far; None: not known")


class Bookmark(Protocol):
    """Where one long training is kept, to be gone on with after a kill."""

    @property
    def where(self) -> str:
        """Its name for a person."""

    def load(self) -> TrainingState | None:
        """What was kept, if anything."""

    def due(self) -> bool:
        """Whether it is time to keep it again."""

    def save(self, state: TrainingState) -> None:
        """Keep this, instead of what was kept before."""


class Checkpoints(Protocol):
    """Finished steps that survive a kill."""

    def step(self, name: str, result: type[M], compute: Callable[[], M]) -> M:
        """The saved result of this step, or compute and save it."""

    def bookmark(self, name: str) -> Bookmark:
        """Where the training inside this step is kept until the step is finished."""


class Progress(Protocol):
    """The one progress callback: a phase, how far it is, how far it goes, and a short note.

    With a total of 0 the note is something to be told once, and the phase goes on as it was.
    """

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """Called often; must be cheap."""


def silent(phase: str, done: int, total: int, note: str = "") -> None:
    """A progress callback that shows nothing."""
