"""What the cloud asks of an edge, what the edge answers, and all kinds of messages by name."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from fleetfit.core.bounds import OWN_FILE, Bounds, read_header
from fleetfit.core.encoding import MAX_KIND, Declined, Message, Request, _decoded, printable
from fleetfit.core.link import Refused
from fleetfit.core.records import (
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
)
from fleetfit.device.messages import (
    AttributesReply,
    AttributesRequest,
    CoarseModel,
    CoarseReply,
    Finish,
    FinishReply,
    Propose,
    ProposeReply,
    RefineRound,
    RoundReply,
)
from fleetfit.models.packed import PackedModel

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


class BackboneAssignment(PackedModel, Request):
    """Cloud to edge: the cluster's backbone, physically cut, and the header that was distilled with it.

    Tensors: ``backbone.<name>`` and ``header.<name>``.
    """

    kind: ClassVar[str] = "backbone_assignment"
    reply: ClassVar[type[Message]] = ClusterReport
    cluster: str
    shape: BackboneShape | None = Field(None, description="what was cut from the reference, for the model's card")
    class_shares: tuple[Above0, ...] = Field((), description="of the public data that it was trained on")


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
