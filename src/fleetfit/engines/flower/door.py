"""A listening socket that nobody can fill: who does not say who it is has to go soon.

Its connections are Python's own sockets, so whatever serves at it must run under asyncio's own loop.
"""

import contextlib
import errno
import socket
import threading
import time
from collections import Counter
from typing import Any

UNKNOWN_SECONDS = 10.0  # for the handshake and the head of a first request that says who calls
MAX_UNKNOWN = 256  # connections of an address that have not said who they are, beside two of each member
MAX_OF_MEMBER = 64  # connections of one member
HELLO_BYTES = 128  # of a TLS handshake or of a request's head: who has sent so many means to say something
AT_ONCE = 16  # connections that are accepted together, or go when there is no descriptor for another
WAITING = 1024  # connections that the system keeps until they are accepted
PAUSE_SECONDS = 0.01
Address = tuple[str, int]


class Door(socket.socket):
    """A socket to listen at.

    Args:
        family: Of its address.
        num_members: How many are expected; they may all come from one address.
        most: Connections in all. When there are more, those go first that have not said who they are: ``_first_to_go``.
    """

    def __init__(self, family: socket.AddressFamily, num_members: int = 0, most: int = 4096) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self.most = most
        self.most_unknown = MAX_UNKNOWN + 2 * num_members
        self._lock = threading.Lock()
        self._unknown: dict[Address, _Connection] = {}  # in the order in which they came
        self._known: dict[Address, tuple[str, _Connection]] = {}
        self._of_address: Counter[str] = Counter()

    def listen(self, backlog: int = WAITING, /) -> None:
        """Begin to. asyncio's argument says how many it accepts in a row, which is not how many may wait."""
        super().listen(max(backlog, WAITING))

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection, and the address of its other end.

        Raises:
            BlockingIOError: there is none, or no descriptor for it; then some that nobody knows have to go.
        """
        try:
            line, address = super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            with self._lock:
                for connection in self._first_to_go()[:AT_ONCE]:
                    _end(connection)
            time.sleep(PAUSE_SECONDS)  # asyncio would ask again at once, and write a page of log each time
            raise BlockingIOError from error
        connection = _Connection(self, line, address[:2])
        with self._lock:
            self._unknown[connection.address] = connection
            self._of_address[connection.address[0]] += 1
            self._make_room(connection)
        return connection, address

    def know(self, address: Address, name: str) -> None:
        """The connection from this address is a member's: it stays, but of too many of one member the oldest goes."""
        with self._lock:
            if (connection := self._unknown.pop(address, None)) is not None:
                self._of_address[address[0]] -= 1
                self._known[address] = name, connection
            own = [a for a, (known, _) in self._known.items() if known == name]
            for oldest in own[: max(0, len(own) - MAX_OF_MEMBER)]:
                _end(self._known[oldest][1])

    def look(self) -> None:
        """End the connections that have not said in time who they are. Called every second or so."""
        late = time.monotonic() - UNKNOWN_SECONDS
        with self._lock:
            for connection in list(self._unknown.values()):
                if connection.since > late:
                    break
                _end(connection)

    def left(self, address: Address) -> None:
        """A connection is closed."""
        with self._lock:
            if self._unknown.pop(address, None) is not None:
                self._of_address[address[0]] -= 1
            self._known.pop(address, None)

    @property
    def num_connections(self) -> tuple[int, int]:
        """Members' connections, and those of nobody knows whom."""
        with self._lock:
            return len(self._known), len(self._unknown)

    def _make_room(self, new: "_Connection") -> None:
        host = new.address[0]
        going = self._first_to_go()
        if self._of_address[host] > self.most_unknown:
            of_host = [c for c in going if c.address[0] == host]
            if len(of_host) > self.most_unknown:
                _end(of_host[0])
        if len(going) + len(self._known) > self.most:
            _end(going[0])

    def _first_to_go(self) -> list["_Connection"]:
        """Those that nobody knows: who has said next to nothing first, and of these the oldest.

        A member that comes among a thousand callers says who it is within milliseconds, if it is left the time to.
        """
        return sorted((c for c in self._unknown.values() if not c.is_ended), key=lambda c: c.received >= HELLO_BYTES)


class _Connection(socket.socket):
    """A connection that knows how much it has read, by the calls that asyncio makes; its door hears of its end."""

    def __init__(self, door: Door, line: socket.socket, address: Address) -> None:
        super().__init__(line.family, line.type, line.proto, fileno=line.detach())
        self.door = door
        self.address = address
        self.since = time.monotonic()
        self.is_ended = False
        self.received = 0

    def recv(self, *arguments: Any) -> bytes:
        data = super().recv(*arguments)
        self.received += len(data)
        return data

    def recv_into(self, *arguments: Any) -> int:
        number = super().recv_into(*arguments)
        self.received += number
        return number

    def close(self) -> None:
        super().close()
        self.door.left(self.address)


def _end(connection: _Connection) -> None:
    """Both ends see that it is over; whoever has it closes it."""
    if not connection.is_ended:
        connection.is_ended = True
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
