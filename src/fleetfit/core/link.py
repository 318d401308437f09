"""What carries a message to another participant and its reply back, and what answers there."""

from collections.abc import Callable, Mapping
from typing import Protocol

from pydantic import Field

from fleetfit.core.bounds import FROM_DEVICE, Bounds
from fleetfit.core.encoding import Message, Request
from fleetfit.core.records import (
    Record,
)


class Refused(Record):
    """A member's reply that the link does not pass on, and why."""

    reason: str
    needs_model: bool = Field(False, description="the member declined for want of the coarse model")


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


Handler = Callable[[Message], Message]
