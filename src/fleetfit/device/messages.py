"""What an edge asks of a device, and what the device answers."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fleetfit.config.sections import RefineConfig
from fleetfit.core.encoding import Message, Request, put, take
from fleetfit.core.records import (
    MAX_COUNT,
    MAX_SEED,
    NO_SCORES,
    Above0,
    BackboneShape,
    DeviceAttributes,
    DeviceReport,
    ValidationScores,
    Way,
)
from fleetfit.method.quantisation import quantised, restored
from fleetfit.models.packed import PackedModel

MAX_STEP = 10**6
ATTRIBUTES_STEP, COARSE_STEP = 0, 1
MAX_NOISE = 1e12


# -- edge <-> device --------------------------------------------------------------------------------------------------


def round_step(number: int) -> int:
    """The step of a round, which are counted from 1."""
    return COARSE_STEP + number


def propose_step(rounds: int) -> int:
    """The step of the proposal, after so many rounds at most; fewer leave a gap."""
    return round_step(rounds) + 1


def finish_step(rounds: int) -> int:
    """The last step."""
    return propose_step(rounds) + 1


class DeviceMessage(Request):
    """Base of what an edge asks a device; ``step`` counts 0, 1, 2, ..., so that repeats are known."""

    step: int = Field(ge=0, le=MAX_STEP)


class DeviceReply(Message):
    """Base of what a device replies; ``step`` is that of the message it answers."""

    step: int = Field(ge=0, le=MAX_STEP)


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


class CoarseModel(PackedModel, DeviceMessage):
    """Edge to device: the backbone and the coarse header. Tensors: ``backbone.<name>``, ``header.<name>``."""

    kind: ClassVar[str] = "coarse_model"
    reply: ClassVar[type[Message]] = CoarseReply
    shape: BackboneShape | None = None
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
    average: ValidationScores = Field(NO_SCORES, description="of the other average, if that was sent too")
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

    Where groups were just found, ``average.*`` too: the other of the cluster's and the group's average, only scored.
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
