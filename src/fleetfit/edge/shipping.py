"""What a group of devices may ship, and the choice among it by their pooled validation losses (Beyond).

Each device scores every way on its own validation split; the edge adds the losses up and chooses for the whole group. A
choice on one device's few samples would be a choice by chance.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fleetfit.config.sections import RefineConfig
from fleetfit.core.encoding import Message
from fleetfit.core.records import Fault, HeaderKept, Record, Way
from fleetfit.device.messages import ProposeReply
from fleetfit.device.ways import kind_of, ways_to_ship
from fleetfit.method.noise import clearly_lowest
from fleetfit.method.robust import paired, vote

ERRORS = 1.0  # standard errors by which another way must be better than the preferred one
PREFERRED: tuple[HeaderKept, ...] = ("refined", "half", "quarter", "own", "coarse", "local")
FEWEST_VOICES = 5  # devices of a group that chooses for itself: in fewer, a vote is not bounded
FEWEST_SAMPLES = 60


class Choice(NamedTuple):
    """What a group ships, and the pooled loss (nats a sample) of the best way of each kind."""

    way: Way
    loss_by_way: dict[str, float]


def choose(
    refine: RefineConfig, ways: Sequence[Way], replies: Mapping[str, ProposeReply], num_classes: int | None
) -> Choice:
    """Choose how a group ships, by validation loss pooled over its devices.

    Of the headers that are not clearly worse than the best way (by ``ERRORS`` standard errors of the paired
    difference), the first in the order ``PREFERRED`` is taken, and of its ways the one with the lowest loss. But never
    one with a higher pooled loss than the header as it was sent, or than fine-tuning alone. Without the guard, refined
    headers ship always. Where no device has validation samples nothing speaks for a change, and where losses are noised
    (``[privacy]``) only what stands out of the noise does. A way whose loss is not finite ships nowhere.

    Args:
        refine: The guard.
        ways: In the order of the replies' losses.
        replies: Of the group's devices.
        num_classes: With ``members.robust``: votes are bounded (``method.robust``), a mean loss at twice that of a
            guess among so many.

    Raises:
        ValueError: no way has a finite loss.
    """
    numbers = torch.tensor([float(r.num_samples) for r in replies.values()], dtype=torch.float64)
    if not float(numbers.sum()):
        return Choice(Way(header="coarse" if refine.guard else "refined"), {})
    sums = torch.stack([r.tensors["losses"].double() for r in replies.values()])
    means = sums / numbers.clamp(min=1)[:, None]
    ceiling = 2 * math.log(max(num_classes, 2)) if num_classes is not None else math.inf
    pooled = vote(means, numbers, ceiling) if num_classes is not None else sums.sum(0) / numbers.sum()
    loss = {way: value for way, value in zip(ways, pooled.tolist(), strict=True) if math.isfinite(value)}
    if not loss:
        raise ValueError(f"no way to ship has a finite validation loss ({', '.join(w.name for w in ways)})")
    by_kind: dict[str, float] = {}
    for way, value in loss.items():
        by_kind[kind_of(way)] = min(value, by_kind.get(kind_of(way), math.inf))
    refined = [way for way in loss if way.header == "refined"]
    allowed = list(loss) if refine.guard else refined or list(loss)
    if noise := sum(r.noise**2 for r in replies.values()) ** 0.5 / float(numbers.sum()):
        names = {way.name: way for way in allowed}
        return Choice(names[clearly_lowest({name: loss[way] for name, way in names.items()}, noise)], by_kind)
    if not refine.guard:
        return Choice(min(allowed, key=loss.__getitem__), by_kind)
    return Choice(_preferred(allowed, loss, means, numbers, ways, ceiling), by_kind)


def _preferred(
    allowed: Sequence[Way],
    loss: Mapping[Way, float],
    means: Float[Tensor, "device way"],
    numbers: Float[Tensor, " device"],
    ways: Sequence[Way],
    ceiling: float,
) -> Way:
    place = {way: i for i, way in enumerate(ways)}
    best = min(allowed, key=loss.__getitem__)
    plain = [Way(header="coarse"), Way(header="local")]
    floor = min((loss[way] for way in plain if way in loss), default=math.inf)
    clamped = means.clamp(max=ceiling)
    for header in PREFERRED:
        own = [way for way in allowed if way.header == header]
        if not own:
            continue
        first = min(own, key=loss.__getitem__)
        mean, error = paired(clamped[:, place[first]] - clamped[:, place[best]], numbers)
        if loss[first] <= floor and (first == best or (math.isfinite(error) and mean <= ERRORS * error)):
            return first
    return best


class GroupDecision(Record):
    """What one group ships."""

    devices: tuple[str, ...]
    way: Way
    loss_by_way: dict[str, float] = Field(default_factory=dict)


class Decision(Message):
    """How the cluster ships, and the pooled validation loss (nats a sample) of the best way of each kind."""

    kind: ClassVar[str] = "decision"
    way: Way
    loss_by_way: dict[str, float] = Field(default_factory=dict)
    groups: tuple[GroupDecision, ...] = Field((), description="those with enough samples to choose for themselves")
    devices: tuple[str, ...] = Field((), description="those that had a voice in it")
    joined: tuple[str, ...] = Field((), description="those that got the coarse model in this step")
    faults: tuple[Fault, ...] = ()

    def way_of(self, device: str) -> Way:
        """What a device ships: as its group, or as the cluster."""
        return next((group.way for group in self.groups if device in group.devices), self.way)


def decide(
    refine: RefineConfig,
    replies: Mapping[str, ProposeReply],
    groups: Mapping[str, int],
    num_classes: int,
    *,
    robust: bool,
    private: bool = False,
) -> Decision:
    """What the cluster ships, and each of its groups that has enough voices and samples to choose for itself.

    Raises:
        ValueError: no way has a finite loss.
    """
    ways, bound = ways_to_ship(refine, num_classes, private), num_classes if robust else None
    chosen = choose(refine, ways, replies, bound)
    own = []
    for number in sorted(set(groups.values())) if len(set(groups.values())) > 1 and not private else []:
        members = tuple(d for d, group in groups.items() if group == number)
        heard = {d: replies[d] for d in members if d in replies}
        voices = [r.num_samples for r in heard.values() if r.num_samples]
        if len(voices) >= FEWEST_VOICES and sum(voices) >= FEWEST_SAMPLES:
            way, losses = choose(refine, ways, heard, bound)
            own.append(GroupDecision(devices=members, way=way, loss_by_way=losses))
    return Decision(way=chosen.way, loss_by_way=chosen.loss_by_way, groups=tuple(own))
