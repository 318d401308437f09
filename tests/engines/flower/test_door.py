"""Who does not say who it is does not stay, and no number of such callers keeps members out."""

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Iterator

import pytest

from fleetfit.core.bounds import FewLines
from fleetfit.engines.deployment.proxy import MAX_TOLD, _read
from fleetfit.engines.flower import door as module
from fleetfit.engines.flower.door import Door


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    monkeypatch.setattr(module, "MAX_UNKNOWN", 4)
    with Door(socket.AF_INET, most=10) as door:
        door.bind(("127.0.0.1", 0))
        door.listen(64)
        yield door


def call(door: Door) -> tuple[socket.socket, socket.socket]:
    """Both ends of a new connection."""
    outside = socket.create_connection(door.getsockname(), timeout=5)
    inside, _ = door.accept()
    return outside, inside


def is_over(outside: socket.socket) -> bool:
    outside.setblocking(False)
    try:
        return outside.recv(1) == b""
    except BlockingIOError:
        return False


def test_the_oldest_unknown_of_an_address_goes_and_a_member_stays(door: Door) -> None:
    calls = [call(door) for _ in range(2)]
    member = calls[0]
    door.know(member[0].getsockname(), "anna")
    strangers = [calls[1], *(call(door) for _ in range(6))]
    assert [is_over(outside) for outside, _ in strangers] == [True, True, True, False, False, False, False]
    assert not is_over(member[0])
    for _, inside in strangers:
        inside.close()
    assert door.num_connections == (1, 0)
    for outside, inside in (member, *strangers):
        outside.close()
        inside.close()
    assert door.num_connections == (0, 0)


def test_who_has_begun_to_say_something_goes_after_those_that_have_not(door: Door) -> None:
    speaking, silent = call(door), [call(door)]
    speaking[0].send(b"x" * 200)
    assert len(speaking[1].recv(4096)) == 200
    silent += [call(door) for _ in range(6)]
    assert not is_over(speaking[0])
    assert [is_over(outside) for outside, _ in silent] == [True, True, True, True, False, False, False]
    for line in (line for both in (speaking, *silent) for line in both):
        line.close()


def test_who_says_nothing_goes_after_some_seconds(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = call(door), call(door)
    late = time.monotonic() + module.UNKNOWN_SECONDS + 0.01
    new[1].since = late  # type: ignore[attr-defined]
    monkeypatch.setattr(module.time, "monotonic", lambda: late)
    door.look()
    assert (is_over(old[0]), is_over(new[0])) == (True, False)
    for line in (*old, *new):
        line.close()


def test_a_member_has_not_more_connections_than_it_needs(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OF_MEMBER", 2)
    calls = []
    for name in ("anna", "ben", "anna", "anna"):
        calls.append(call(door))
        door.know(calls[-1][0].getsockname(), name)
    assert [is_over(outside) for outside, _ in calls] == [True, False, False, False]
    for line in (line for both in calls for line in both):
        line.close()


def test_without_a_descriptor_strangers_go_and_nothing_is_raised_that_asyncio_logs(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside, inside = call(door)

    def full(self: socket.socket) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", full)
    with pytest.raises(BlockingIOError):
        door.accept()
    assert is_over(outside)
    outside.close()
    inside.close()


def test_lines_of_one_kind_are_few() -> None:
    few = FewLines()
    record = logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, "Invalid HTTP request received.", None, None)
    assert sum(few.filter(record) for _ in range(10_000)) == MAX_TOLD
    others = (logging.LogRecord("asyncio", logging.ERROR, "", 0, f"kind {i}", None, None) for i in range(10_000))
    assert sum(few.filter(other) for other in others) <= MAX_TOLD


class Slow:
    """A request whose body comes in pieces, with a pause before each."""

    def __init__(self, pieces: int, pause: float) -> None:
        self.pieces, self.pause = pieces, pause

    async def stream(self):  # type: ignore[no-untyped-def]
        for _ in range(self.pieces):
            await asyncio.sleep(self.pause)
            yield b"x" * 1000


def test_a_body_comes_in_time_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetfit.engines.deployment.proxy.CHUNK_SECONDS", 0.2)
    assert asyncio.run(_read(Slow(20, 0.0), 10**6)) == b"x" * 20_000  # type: ignore[arg-type]
    assert asyncio.run(_read(Slow(20, 0.0), 19_999)) is None  # type: ignore[arg-type]
    assert asyncio.run(_read(Slow(3, 0.1), 10**6)) == b"x" * 3000  # slow, but at the least rate  # type: ignore[arg-type]
    assert asyncio.run(_read(Slow(1, 30.0), 10**6)) is None  # type: ignore[arg-type]
    monkeypatch.setattr("fleetfit.engines.deployment.proxy.LEAST_RATE", 10**9)
    assert asyncio.run(_read(Slow(1000, 0.05), 10**9)) is None  # a trickle  # type: ignore[arg-type]
