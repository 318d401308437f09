"""Counts what crosses the wire between members and a door: bytes of TCP payload, and of which call they are.

    member  --TCP-->  counter  --TCP-->  end of the TLS  --TLS-->  door

The counter passes bytes on as they are: what it counts is what a wire would carry. To know what they are for, the TLS
of the member is ended behind it, with the door's own certificate and key, and opened again to the door. One connection
carries one call at a time, so the bytes that the counter has seen when a call is over are that call's.
"""

import asyncio
import ssl
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from fleetfit.engines.deployment.certificates import client_context
from fleetfit.engines.deployment.handshake import PATH
from fleetfit.engines.deployment.kit import Kit

CHUNK = 2**16
EMPTY_BYTES = 200  # an answer to pull-messages that has no message is shorter
UP, DOWN = "up", "down"
GREETING = PATH.rpartition("/")[2]


@dataclass
class Connection:
    """Bytes of TCP payload so far, and those that are booked already."""

    seen: Counter[str] = field(default_factory=Counter)
    booked: Counter[str] = field(default_factory=Counter)
    calls: int = 0

    def take(self, direction: str) -> int:
        """What came in a direction since it was asked last."""
        number = self.seen[direction] - self.booked[direction]
        self.booked[direction] = self.seen[direction]
        return number


class Http:
    """One direction of a connection, cut into its HTTP messages.

    Attributes:
        whole: Bytes of the messages that are complete, as (start line, bytes of head and body, bytes of the body).
    """

    def __init__(self) -> None:
        self.whole: list[tuple[str, int, int]] = []
        self._head = bytearray()
        self._line = ""
        self._size = self._body = self._left = 0

    def feed(self, data: bytes) -> None:
        """More bytes came."""
        while data:
            if self._left:
                taken = min(self._left, len(data))
                self._left -= taken
                data = data[taken:]
                if not self._left:
                    self.whole.append((self._line, self._size, self._body))
                continue
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = bytes(self._head[: end + 4]), bytes(self._head[end + 4 :])
            self._head.clear()
            fields = head.decode("latin-1").lower().split("\r\n")
            if any(line.startswith("transfer-encoding:") for line in fields):
                raise ValueError("a chunked message: its end is not known here")
            lengths = [int(line.partition(":")[2]) for line in fields if line.startswith("content-length:")]
            self._line, self._body = head.decode("latin-1").split("\r\n")[0], lengths[0] if lengths else 0
            self._left, self._size = self._body, len(head) + self._body
            if not self._left:
                self.whole.append((self._line, self._size, self._body))


class CountingDoor:
    """A door before the door of a cloud or an edge, while it is open.

    Args:
        kit: Whose door.

    Attributes:
        port: Where it listens.
        wire: Bytes of TCP payload by (call, direction).
        plain: The same without TLS: HTTP heads and bodies.
        calls: How many, by call.
        passed: All bytes of TCP payload by direction, of whatever.
    """

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.wire: Counter[tuple[str, str]] = Counter()
        self.plain: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()
        self.port = self._inner = 0
        self.errors: list[str] = []
        self._connections: dict[int, Connection] = defaultdict(Connection)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="counter", daemon=True)
        self._thread.start()
        self._ready.wait()

    def close(self) -> None:
        """Shut it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen())
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.1))
        self._loop.close()

    async def _listen(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.kit.server_certificate, self.kit.server_key)
        inner = await asyncio.start_server(self._end_of_tls, "127.0.0.1", 0, ssl=context)
        outer = await asyncio.start_server(self._count, "127.0.0.1", 0)
        self._inner, self.port = (server.sockets[0].getsockname()[1] for server in (inner, outer))
        self._ready.set()

    async def _count(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes on, and count them."""
        try:
            onward = await asyncio.open_connection("127.0.0.1", self._inner)
        except OSError:
            writer.close()
            return
        connection = self._connections[onward[1].get_extra_info("sockname")[1]]

        def note(direction: str, data: bytes) -> None:
            connection.seen[direction] += len(data)
            self.passed[direction] += len(data)

        await self._both(
            _carry(reader, onward[1], writer, lambda data: note(UP, data)),
            _carry(onward[0], writer, onward[1], lambda data: note(DOWN, data)),
        )

    async def _end_of_tls(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass what was said on to the door, and book it."""
        connection = self._connections.pop(writer.get_extra_info("peername")[1], None) or Connection()
        try:
            onward = await asyncio.open_connection(
                self.kit.server.address, self.kit.server.port, ssl=client_context(self.kit.ca)
            )
        except OSError:
            writer.close()
            return
        asked, answered = Http(), Http()
        open_call: list[str] = []
        came_before: list[int] = []  # bytes down before the first answer: the handshake

        def book(call: str) -> None:
            for direction in (UP, DOWN):
                self.wire[call, direction] += connection.take(direction)

        def up(data: bytes) -> None:
            if open_call:  # the call before is over, and its answer is all that came down since
                self.wire[open_call.pop(), DOWN] += connection.take(DOWN)
            asked.feed(data)

        def down(data: bytes) -> None:
            if not came_before:
                came_before.append(connection.take(DOWN))
            answered.feed(data)
            while answered.whole:
                (_, size, body), (line, sent, _) = answered.whole.pop(0), asked.whole.pop(0)
                call = line.split(" ")[1].rpartition("/")[2]
                if call == "pull-messages":
                    call += " (a message)" if body > EMPTY_BYTES else " (none)"
                if not connection.calls:  # what came before is the handshake
                    hands = f"handshake ({'greeting' if call == GREETING else 'Flower'})"
                    self.wire[hands, UP] += connection.take(UP) - sent
                    self.wire[call, UP] += sent
                    self.wire[hands, DOWN] += came_before[0]
                    self.calls[hands] += 1
                else:
                    self.wire[call, UP] += connection.take(UP)
                connection.calls += 1
                self.calls[call] += 1
                self.plain[call, UP] += sent
                self.plain[call, DOWN] += size
                open_call.append(call)

        await self._both(_carry(reader, onward[1], writer, up), _carry(onward[0], writer, onward[1], down))
        book(open_call.pop() if open_call else "broken off")

    async def _both(self, up: Coroutine[Any, Any, None], down: Coroutine[Any, Any, None]) -> None:
        """Until both have ended. That somebody breaks off is no error of ours."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)  # the loop itself forgets it when the connection is lost
        results = await asyncio.gather(up, down, return_exceptions=True)
        self._tasks.discard(task)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, OSError):
                self.errors.append(repr(result))


async def _carry(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    back: asyncio.StreamWriter,
    look: Callable[[bytes], None],
) -> None:
    """One direction of a connection, until it ends; then the other ends too."""
    try:
        while data := await reader.read(CHUNK):
            look(data)
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
        back.close()
