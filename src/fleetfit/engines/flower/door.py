"""A listening socket that counts what passes it: TCP payload, TLS and its handshakes included, whatever it is for."""

import socket
from typing import Any, NamedTuple


class Passed(NamedTuple):
    """Bytes since a door was opened; down is away from it."""

    down: int = 0
    up: int = 0


class Door(socket.socket):
    """A socket to listen at; all connections that it accepts are counted together.

    Args:
        family: Of its address.
    """

    def __init__(self, family: socket.AddressFamily) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self.passed = Passed()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection, and the address of its other end."""
        line, address = super().accept()
        return _Counted(self, line), address

    def count(self, *, down: int = 0, up: int = 0) -> None:
        """So much more has passed."""
        self.passed = Passed(self.passed.down + down, self.passed.up + up)


class _Counted(socket.socket):
    """A connection that tells its door of all that it reads and writes, by the calls that asyncio makes."""

    def __init__(self, door: Door, line: socket.socket) -> None:
        super().__init__(line.family, line.type, line.proto, fileno=line.detach())
        self.door = door

    def recv(self, *arguments: Any) -> bytes:
        data = super().recv(*arguments)
        self.door.count(up=len(data))
        return data

    def recv_into(self, *arguments: Any) -> int:
        number = super().recv_into(*arguments)
        self.door.count(up=number)
        return number

    def send(self, *arguments: Any) -> int:
        number = super().send(*arguments)
        self.door.count(down=number)
        return number

    def sendmsg(self, *arguments: Any) -> int:
        number = super().sendmsg(*arguments)
        self.door.count(down=number)
        return number
