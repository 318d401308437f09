"""A link over a pretended Grid: who is asked what and how often, what is refused, what is counted."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count, pairwise
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity
from httpx import ConnectError

from fleetfit.core.checkpoints import Ledger
from fleetfit.core.encoding import Declined, Message, Request, encode
from fleetfit.core.link import Refused
from fleetfit.core.records import DeviceAttributes, EnergyModel, ValidationScores
from fleetfit.device.messages import AttributesReply, AttributesRequest, RefineRound, RoundReply
from fleetfit.edge.messages import decode_any
from fleetfit.engines.flower import link as link_module
from fleetfit.engines.flower.codec import MESSAGE_TYPE, pack, unpack
from fleetfit.engines.flower.link import MAX_CRASHES, CarrierFailed, FlowerLink, Heard

NODES = {"far-2": 22, "far-1": 11, "far-3": 33}
SCORES = ValidationScores(num_samples=0, loss_sum=0.0, num_correct=0)
Answer = Callable[[Request], Any]


class Clock:
    """Time that passes only while someone sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        assert self.now < 10**5, "it waits for ever"


class PretendedGrid:
    """Nodes that answer by a function of (message, how often this node was sent one): a message, a Flower error, an
    exception to raise when it is fetched, or None for silence."""

    def __init__(self, clock: Clock, answer: Callable[[int, Request, int], Any], seconds: float = 0.1) -> None:
        self.clock, self.answer, self.seconds = clock, answer, seconds
        self.sent: list[tuple[float, int, Request, float]] = []
        self.ready: dict[str, tuple[float, Any, FlowerMessage]] = {}
        self.ids: Iterator[int] = count()

    def push_messages(self, messages: Iterable[FlowerMessage]) -> list[str | None]:
        ids: list[str | None] = []
        for message in messages:
            assert message.metadata.message_type == MESSAGE_TYPE
            node = message.metadata.dst_node_id
            asked = decode_any(unpack(message.content, 10**9))
            assert isinstance(asked, Request)
            self.sent.append((self.clock.now, node, asked, message.metadata.ttl))
            answer = self.answer(node, asked, sum(n == node for _, n, _, _ in self.sent))
            if isinstance(answer, str):
                ids.append(None)
                continue
            name = f"message {next(self.ids)}"
            message.metadata.__dict__["_message_id"] = name
            if answer is not None:
                self.ready[name] = (self.clock.now + self.seconds, answer, message)
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[FlowerMessage]:
        found = []
        for name in message_ids:
            at, answer, message = self.ready.get(name, (float("inf"), None, None))
            if at > self.clock.now:
                continue
            del self.ready[name]
            if isinstance(answer, Exception):
                raise answer
            content = pack(encode(answer)) if isinstance(answer, Message) else answer
            found.append(FlowerMessage(content, reply_to=message))
        return found

    def times(self, member: str) -> list[float]:
        return [at for at, node, _, _ in self.sent if node == NODES[member]]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(link_module, "time", clock)
    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)
    return clock


def linked(grid: PretendedGrid, deadline: float | None = 60.0, limit: int = 10**6, **more: Any) -> FlowerLink:
    return FlowerLink(
        grid, NODES, Ledger(), "down", "up", max_message_bytes=limit, deadline_seconds=deadline, **more
    )  # fmt: skip


def replied(node: int, asked: Request, times: int) -> Message:
    assert isinstance(asked, RefineRound)
    return RoundReply(step=asked.step, scores=SCORES.model_copy(update={"num_samples": node}))


def rounds(*members: str) -> dict[str, Request]:
    return {member: RefineRound(step=2, round=1) for member in members or NODES}


def test_replies_come_in_the_order_of_the_messages_and_all_bytes_are_counted(clock: Clock) -> None:
    grid = PretendedGrid(clock, replied)
    link = linked(grid)
    assert link.members == tuple(NODES)
    messages = {m: RefineRound(step=2 + i, round=1) for i, m in enumerate(("far-3", "far-1"))}
    replies = link.ask(messages)
    assert list(replies) == ["far-3", "far-1"]
    for i, (member, reply) in enumerate(replies.items()):
        assert isinstance(reply, RoundReply)
        assert (reply.step, reply.scores.num_samples) == (2 + i, NODES[member])
    assert [(node, asked) for _, node, asked, _ in grid.sent] == [(NODES[m], messages[m]) for m in messages]
    assert link.ledger.traffic == {
        "down": sum(len(encode(m)) for m in messages.values()),
        "up": sum(len(encode(r)) for r in replies.values() if isinstance(r, Message)),
    }


def test_one_message_to_all_is_encoded_once(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Message] = []
    monkeypatch.setattr(link_module, "encode", lambda m: encoded.append(m) or encode(m))
    link = linked(PretendedGrid(clock, replied))
    one = RefineRound(step=2, round=1)
    assert len(link.ask(dict.fromkeys(NODES, one))) == 3
    assert encoded == [one]
    assert link.ledger.traffic["down"] == 3 * len(encode(one))


@pytest.mark.parametrize(
    "failure",
    [
        Error(ErrorCode.NODE_UNAVAILABLE, "gone"),
        Error(ErrorCode.MESSAGE_UNAVAILABLE, "late"),
        Error(ErrorCode.CLIENT_APP_CRASHED, "killed"),
        "not taken",
    ],
)
def test_an_error_is_asked_again_after_a_growing_pause(clock: Clock, failure: Any) -> None:
    grid = PretendedGrid(clock, lambda node, m, n: failure if node == 11 and n < 5 else replied(node, m, n))
    link = linked(grid, poll_seconds=0.05)
    replies = link.ask(rounds())
    assert list(replies) == list(NODES)
    assert all(isinstance(r, RoundReply) for r in replies.values())
    assert len(grid.times("far-2")) == 1
    at = grid.times("far-1")
    pauses = [b - a for a, b in pairwise(at)]
    assert pauses == pytest.approx([0.5, 1.0, 2.0, 4.0], abs=0.25)
    accepted = 3 if isinstance(failure, str) else 7  # what Flower did not take has not crossed
    assert link.ledger.traffic["down"] == accepted * len(encode(RefineRound(step=2, round=1)))


def test_a_program_that_always_fails_is_refused_with_its_reason(clock: Clock) -> None:
    failure = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "no such layer")
    grid = PretendedGrid(clock, lambda node, m, n: failure if node == 11 else replied(node, m, n))
    replies = linked(grid, deadline=None).ask(rounds())
    assert len(grid.times("far-1")) == MAX_CRASHES
    assert list(replies) == list(NODES)
    assert isinstance(replies["far-1"], Refused)
    assert "its program failed 5 times" in replies["far-1"].reason
    assert "no such layer" in replies["far-1"].reason


def test_a_node_that_is_away_is_waited_for_until_the_deadline(clock: Clock) -> None:
    away = Error(ErrorCode.NODE_UNAVAILABLE, "gone")
    grid = PretendedGrid(clock, lambda node, m, n: away if node == 11 else replied(node, m, n))
    replies = linked(grid, deadline=90.0).ask(rounds())
    assert list(replies) == ["far-2", "far-3"]
    assert 190 <= clock.now <= 192
    at = grid.times("far-1")
    assert len(at) > MAX_CRASHES + 2
    assert max(b - a for a, b in pairwise(at)) <= 10 + 1.5  # never longer apart
    assert all(ttl == pytest.approx(max(190 - now, 1.0)) for now, _, _, ttl in grid.sent)


def test_who_is_silent_is_absent_after_the_deadline(clock: Clock) -> None:
    grid = PretendedGrid(clock, lambda node, m, n: None if node == 22 else replied(node, m, n))
    assert list(linked(grid, deadline=30.0).ask(rounds())) == ["far-1", "far-3"]
    assert clock.now == pytest.approx(130, abs=1.1)
    assert len(grid.sent) == 3


def test_a_reply_after_the_deadline_is_not_that_of_the_next_question(clock: Clock) -> None:
    slow = PretendedGrid(clock, replied, seconds=12.0)
    link = linked(slow, deadline=10.0)
    assert link.ask(rounds()) == {}
    slow.seconds = 5.0
    replies = link.ask({"far-1": RefineRound(step=3, round=2)})
    assert isinstance(replies["far-1"], RoundReply)
    assert replies["far-1"].step == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (pack(b"some bytes that are no message of ours"), "truncated or foreign"),
        (pack(b"x" * 2001), "has 2001 bytes, links.max_message_bytes is 2000"),
        (RecordDict({"other": ConfigRecord({"a": 1})}), "is foreign"),
        (
            AttributesReply(
                step=2,
                attributes=DeviceAttributes(device_id="x", storage_limit_bytes=1, energy=EnergyModel(), num_samples=1),
            ),
            "expected a 'round_reply'",
        ),
        (AttributesRequest(step=2), "expected a 'round_reply'"),
        (Declined(reason="no room on the disk"), "declined: no room on the disk"),
        (ValueError("Unexpected set of `children`"), "cannot be read: ValueError: Unexpected set"),
        (KeyError("arraychunk_ids"), "cannot be read: KeyError"),
    ],
)
def test_a_reply_that_is_no_good_is_refused_and_harms_no_other(clock: Clock, answer: Any, reason: str) -> None:
    grid = PretendedGrid(clock, lambda node, m, n: answer if node == 11 else replied(node, m, n))
    replies = linked(grid, limit=2000).ask(rounds())
    assert list(replies) == list(NODES)
    refused = replies["far-1"]
    assert isinstance(refused, Refused)
    assert reason in refused.reason
    assert all(isinstance(replies[m], RoundReply) for m in ("far-2", "far-3"))
    assert len(grid.sent) == 3


@pytest.mark.parametrize("error", [CarrierFailed("Ray is gone"), ConnectError("no SuperLink"), OSError("no socket")])
def test_a_carrier_that_is_gone_is_nobodys_fault(clock: Clock, error: Exception) -> None:
    grid = PretendedGrid(clock, lambda node, m, n: error if node == 11 else replied(node, m, n))
    with pytest.raises(type(error), match=str(error)):
        linked(grid).ask(rounds())


def test_it_tells_how_many_have_replied(clock: Clock) -> None:
    told: list[tuple[str, int, int, str]] = []
    heard = Heard(lambda phase, done, total, note="": told.append((phase, done, total, note)))
    heard.replied(1, 3)  # no phase is at work: nothing to add to
    heard("refine", 1, 5, "far: round 1 of 2")
    grid = PretendedGrid(clock, lambda node, m, n: None if node == 11 else replied(node, m, n))
    linked(grid, deadline=5.0, replied=heard.replied).ask(rounds())
    heard("refine", 5, 5, "far: done")
    heard.replied(2, 3)
    assert told[0] == ("refine", 1, 5, "far: round 1 of 2")
    assert told[1] == ("refine", 1, 5, "far: round 1 of 2, 0 of 3 replied")
    assert told[-2] == ("refine", 1, 5, "far: round 1 of 2, 2 of 3 replied")
    assert told[-1] == ("refine", 5, 5, "far: done")
