"""Ports that nobody else takes between the moment they are chosen and the moment that a server listens there.

The system hands ports out of one range (on Linux 32768 to 60999) to whoever asks for any, and to each outgoing
connection. Those here lie below it, and a socket with a name, which ends with this process, keeps each for it alone.
"""

import errno
import itertools
import os
import socket
import sys

FIRST, NUMBER = 20_000, 12_000

_kept: list[socket.socket] = []


def reserved_port() -> int:
    """A port of this machine at which nobody listens, and which no other test is given."""
    for number in itertools.islice(itertools.count(os.getpid() * 97 + len(_kept)), NUMBER):
        port = FIRST + number % NUMBER
        if _reserved(port) and _is_free(port):
            return port
    raise OSError(errno.EADDRINUSE, f"all ports from {FIRST} to {FIRST + NUMBER - 1} are taken")


def _reserved(port: int) -> bool:
    """Whether it is ours from now on; where sockets have no names, it is for who asks."""
    if sys.platform != "linux":
        return True
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0fleetfit-test-port-{port}")
    except OSError:
        name.close()
        return False
    _kept.append(name)
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) != 0
