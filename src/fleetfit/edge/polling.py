"""Ask a cluster's devices until enough of them have replied validly; who does not harms nobody else."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fleetfit.config.sections import LinksConfig
from fleetfit.core.bounds import FewLines
from fleetfit.core.encoding import Message, printable
from fleetfit.core.link import Link, Refused
from fleetfit.core.records import Fault
from fleetfit.device.messages import CoarseModel, CoarseReply, DeviceMessage
from fleetfit.edge.checks import Expected, check_reply, reply_bounds

M = TypeVar("M", bound=Message)
ATTEMPTS = 3
NO_REPLY = "no reply"
logger = logging.getLogger(__name__)
logger.addFilter(FewLines(1000))  # of a large cluster too, and the report has all


@dataclass(frozen=True)
class Answers(Generic[M]):
    """What came of one step of a cluster."""

    replies: dict[str, M]
    joined: dict[str, CoarseReply]
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Cluster:
    """A cluster's devices, as their edge asks them.

    Args:
        name: Of the cluster.
        devices: Its link.
        links: Quorum and deadline.
        expected: What valid replies are like.
        coarse: What a device must have before it can join in; None: nothing.
        left_out: Devices that are not asked, and that no quorum needs.
    """

    name: str
    devices: Link
    links: LinksConfig
    expected: Expected = field(default_factory=Expected)
    coarse: CoarseModel | None = None
    left_out: frozenset[str] = frozenset()

    def ask(
        self, step: str, kind: type[M], question: Callable[[str], DeviceMessage], members: Collection[str]
    ) -> Answers[M]:
        """One step: the question to all devices; those that do not have the coarse model get it first.

        Who has just got the coarse model, or has lost it, is asked again at once. Who does not reply, or not validly,
        is asked again only while there is no quorum.

        Args:
            step: Its name for a person.
            kind: Of a reply to the question.
            question: The message for a device.
            members: Who has the coarse model.

        Returns:
            Valid replies, and those of devices that joined, in the order of the link.

        Raises:
            ValueError: no quorum after some attempts; names who is missing, and why.
        """
        everybody = [d for d in self.devices.members if d not in self.left_out]
        needed = max(1, math.ceil(self.links.quorum * len(everybody) - 1e-9))
        ready = set(members)
        replies: dict[str, M] = {}
        joined: dict[str, CoarseReply] = {}
        faults: Counter[tuple[str, str]] = Counter()
        asked = list(everybody)
        for _ in range(ATTEMPTS):
            messages = {d: question(d) if d in ready or self.coarse is None else self.coarse for d in asked}
            bounds = [reply_bounds(m, self.expected) for m in messages.values()]
            came, at_once = self.devices.ask(messages, max(bounds, key=lambda b: b.size_bytes or 0)), []
            for device, message in messages.items():
                reply = self._checked(device, message, came.get(device))
                if isinstance(reply, kind):
                    replies[device] = reply
                elif isinstance(reply, CoarseReply):
                    joined[device] = reply
                    ready.add(device)
                    at_once.append(device)
                elif isinstance(reply, Refused):
                    faults[device, reply.reason] += 1
                    logger.warning("%s, %s: %s: %s", self.name, step, device, reply.reason)
                    if reply.needs_model and self.coarse is not None:
                        ready.discard(device)
                        at_once.append(device)
            asked = at_once if len(replies) >= needed else [d for d in everybody if d not in replies]
            if not asked:
                break
        told = tuple(
            Fault(device_id=device, step=step, reason=reason, times=times, recovered=device in replies)
            for (device, reason), times in faults.items()
        )
        if len(replies) < needed:
            raise ValueError(self._stopped(step, len(replies), needed, told))
        return Answers(
            {d: replies[d] for d in everybody if d in replies}, {d: joined[d] for d in everybody if d in joined}, told
        )

    def _checked(self, device: str, message: DeviceMessage, reply: Message | Refused | None) -> Message | Refused:
        if reply is None:
            return Refused(reason=NO_REPLY)
        if isinstance(reply, Refused):
            return reply
        try:
            check_reply(device, message, reply, self.expected)
        except ValueError as error:
            return Refused(reason=printable(str(error)))
        return reply

    def _stopped(self, step: str, number: int, needed: int, faults: tuple[Fault, ...]) -> str:
        number_asked = len(self.devices.members) - len(self.left_out)
        missing = "; ".join(f"{f.device_id} ({f.reason})" for f in faults if not f.recovered)
        return (
            f"{self.name}, {step}: {number} of {number_asked} devices replied validly, {needed} must "
            f"(links.quorum {self.links.quorum:g}; asked {ATTEMPTS} times, for links.deadline_seconds "
            f"{self.links.deadline_seconds:g} each). Missing: {missing}. Run again when they are back: it goes on from "
            "here, also with another [links]"
        )
