"""A link over Flower: our messages go to the members' nodes, their replies come back, errors are asked again.

What crosses is counted as every engine counts it, in bytes of our encoded messages (what Flower adds is in codec.py).
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from flwr.common.constant import ErrorCode
from httpx import HTTPError

from fleetfit.core.bounds import FROM_DEVICE, MAX_MESSAGE_RULE, Bounds
from fleetfit.core.checkpoints import Ledger
from fleetfit.core.encoding import MAX_REASON, Message, Request, encode
from fleetfit.core.link import Refused
from fleetfit.core.progress import Progress
from fleetfit.edge.messages import read_reply
from fleetfit.engines.flower.codec import MESSAGE_TYPE, pack, unpack

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5  # before a member whose node reported an error is asked again; doubled each time
LONGEST_PAUSE_SECONDS = 10.0
MAX_CRASHES = 5  # of a member's program at one message; the same message would end the same way
CRASHES = (
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION,
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
    ErrorCode.CLIENT_APP_CRASHED,
)


class CarrierFailed(ConnectionError):
    """What carries the messages is gone, so that no member can be asked."""


class Carrier(Protocol):
    """The part of Flower's ``Grid`` that a link needs."""

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str | None]:
        """Send messages; an id for each, or none where it could not be sent."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
        """The replies to these messages that are there by now; each is handed out once."""


class Heard:
    """A progress callback that passes all on, and adds how many members have replied to the note of the phase at work.

    Args:
        progress: Where to pass it on.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._last: tuple[str, int, int, str] | None = None

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """A phase went on."""
        self._last = (phase, done, total, note) if done < total else None
        self.progress(phase, done, total, note)

    def replied(self, number: int, asked: int) -> None:
        """So many of those who were asked have replied."""
        if self._last is not None:
            phase, done, total, note = self._last
            self.progress(phase, done, total, f"{note}{', ' if note else ''}{number} of {asked} replied")


@dataclass
class _Waiting:
    """What one member owes: the message on its way, since when, when to send it again, and what went wrong so far."""

    message_id: str | None = None
    since: float = 0.0
    again_at: float = 0.0
    errors: int = 0
    crashes: int = 0


class FlowerLink:
    """Members that are nodes of a Flower federation.

    Args:
        carrier: Sends and fetches, as Flower's ``Grid`` does.
        nodes: The node of each member, in the order of the job; all others are never asked and never heard. Looked up
            each time: a member may come back as another node.
        ledger: Where bytes are counted.
        down: Name of the direction to the members.
        up: Name of the direction from them.
        max_message_bytes: The most that a reply may have.
        deadline_seconds: How long one question waits for its replies; None: for ever.
        poll_seconds: The pause between two looks for replies.
        replied: Told (how many have replied, how many were asked) at every look.
    """

    def __init__(
        self,
        carrier: Carrier,
        nodes: Mapping[str, int],
        ledger: Ledger,
        down: str,
        up: str,
        *,
        max_message_bytes: int,
        deadline_seconds: float | None = None,
        poll_seconds: float = 1.0,
        replied: Callable[[int, int], None] = lambda number, asked: None,
    ) -> None:
        self.carrier = carrier
        self.nodes = nodes
        self.ledger = ledger
        self.down = down
        self.up = up
        self.max_message_bytes = max_message_bytes
        self.deadline_seconds = deadline_seconds
        self.poll_seconds = poll_seconds
        self.replied = replied

    @property
    def members(self) -> tuple[str, ...]:
        """Who is connected, in the order of the job."""
        return tuple(self.nodes)

    def ask(self, messages: Mapping[str, Request], bounds: Bounds = FROM_DEVICE) -> dict[str, Message | Refused]:
        """Ask all at once and wait for their replies, at most until the deadline.

        A member whose node reports an error is asked again, after a pause that grows. Who does not reply in time is
        absent; a reply that cannot be read, is too large or of another kind, and a program that crashes again and
        again, are ``Refused``.

        Raises:
            CarrierFailed: nobody can be asked any more.
        """
        bounds = bounds.within(self.max_message_bytes, MAX_MESSAGE_RULE)
        ends_at = None if self.deadline_seconds is None else time.monotonic() + self.deadline_seconds
        waiting = {member: _Waiting(since=time.monotonic()) for member in messages}
        replies: dict[str, Message | Refused] = {}
        while True:
            self._send_what_is_due(waiting, messages, ends_at)
            for member, state in list(waiting.items()):
                reply = self._look(member, state, messages[member], bounds)
                if reply is not None:
                    replies[member] = reply
                    del waiting[member]
                    took = time.monotonic() - state.since
                    log.info("%s replied to a %s after %.3f s", member, messages[member].kind, took)
            self.replied(len(replies), len(messages))
            if not waiting or (ends_at is not None and time.monotonic() >= ends_at):
                break
            time.sleep(self.poll_seconds)
        return {member: replies[member] for member in messages if member in replies}

    def _send_what_is_due(
        self, waiting: Mapping[str, _Waiting], messages: Mapping[str, Request], ends_at: float | None
    ) -> None:
        content: RecordDict | None = None
        size, packed = 0, None
        for member, state in waiting.items():
            now = time.monotonic()
            if state.message_id is not None or now < state.again_at:
                continue
            if content is None or packed is not messages[member]:  # one message to all is encoded once
                packed = messages[member]
                blob = encode(packed)
                size, content = len(blob), pack(blob)
            lives = None if ends_at is None else max(ends_at - now, 1.0)  # after it, nobody need compute the answer
            sent = FlowerMessage(content, self.nodes[member], MESSAGE_TYPE, ttl=lives)
            state.message_id = next(iter(self.carrier.push_messages([sent])), None) or None
            if state.message_id is None:
                self._try_later(member, state, "its node does not take messages")
            else:
                self.ledger.traffic[self.down] += size

    def _look(self, member: str, state: _Waiting, message: Request, bounds: Bounds) -> Message | Refused | None:
        """The reply of one member, if it is there. Fetched one by one, so that a reply that breaks harms no other."""
        if state.message_id is None:
            return None
        try:
            found = list(self.carrier.pull_messages([state.message_id]))
        except (HTTPError, OSError):
            raise
        except Exception as error:  # Flower rebuilds what the member sent, and may stumble over anything in it
            return Refused(reason=f"it cannot be read: {type(error).__name__}: {str(error)[:MAX_REASON]}")
        for reply in found:
            if reply.metadata.reply_to_message_id != state.message_id:
                continue
            if not reply.has_error():
                return self._read(reply.content, message, bounds)
            state.crashes += reply.error.code in CRASHES
            reason = f"Flower error {reply.error.code}: {reply.error.reason}"
            if state.crashes >= MAX_CRASHES:
                return Refused(reason=f"its program failed {state.crashes} times: {reason[:MAX_REASON]}")
            self._try_later(member, state, reason)
        return None

    def _try_later(self, member: str, state: _Waiting, reason: str) -> None:
        pause = min(FIRST_PAUSE_SECONDS * 2**state.errors, LONGEST_PAUSE_SECONDS)
        log.info("%s is asked again in %.1f s: %s", member, pause, reason)
        state.message_id, state.again_at, state.errors = None, time.monotonic() + pause, state.errors + 1

    def _read(self, content: RecordDict, message: Request, bounds: Bounds) -> Message | Refused:
        try:
            blob = unpack(content, self.max_message_bytes, "it")
        except ValueError as error:
            return Refused(reason=str(error))
        self.ledger.traffic[self.up] += len(blob)
        return read_reply([blob], message, bounds)
