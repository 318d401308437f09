"""What we count of a message is what crosses the wire for it, but for a few percent."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from ports import reserved_port

from fleetfit.core.checkpoints import Ledger
from fleetfit.core.encoding import Message
from fleetfit.core.records import ValidationScores
from fleetfit.device.messages import RefineRound, RoundReply
from fleetfit.engines.deployment.client import Member
from fleetfit.engines.deployment.kit import hold, kit_toml, read_kit
from fleetfit.engines.deployment.server import Hub
from fleetfit.engines.deployment.start import Nodes
from fleetfit.engines.flower.door import Passed
from fleetfit.engines.flower.link import FlowerLink

pytestmark = pytest.mark.long

ROUNDS = 3
VALUES = 2**19  # 2 MiB a message
PATIENCE_SECONDS = 300.0


def with_port(folder: Path, part: str, port: int) -> None:
    kit = read_kit(folder)
    changed = getattr(kit.file, part).model_copy(update={"port": port})
    (folder / "kit.toml").write_text(kit_toml(kit.file.model_copy(update={part: changed})))


@contextmanager
def wire(to: int) -> Iterator[tuple[int, Counter[str]]]:
    """A port that passes all bytes on to another, and counts them by direction."""
    passed: Counter[str] = Counter()
    ends: list[socket.socket] = []

    def carry(direction: str, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                passed[direction] += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, far = door.accept()[0], socket.create_connection(("127.0.0.1", to))
                ends.extend((near, far))
                threading.Thread(target=carry, args=("up", near, far), daemon=True).start()
                threading.Thread(target=carry, args=("down", far, near), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as door:
        threading.Thread(target=accept, daemon=True).start()
        yield door.getsockname()[1], passed
        door.shutdown(socket.SHUT_RDWR)
        for end in ends:
            end.close()


def message(number: int) -> RefineRound:
    return RefineRound(step=number, round=number, tensors={"importance.x": torch.rand(VALUES)})


def reply(_: str, asked: Message) -> Message:
    assert isinstance(asked, RefineRound)
    scores = ValidationScores(num_samples=1, loss_sum=0.0, num_correct=1)
    return RoundReply(step=asked.step, scores=scores, tensors={"importance.x": torch.rand(VALUES)})


def test_bytes_counted_are_bytes_on_the_wire(kits: Path) -> None:
    inside = reserved_port()
    with_port(kits / "small", "server", inside)
    ledger, count, told = Ledger(), 0, []

    def until() -> bool:
        nonlocal count
        count += 1
        return count == ROUNDS

    with ExitStack() as stack:
        port, passed = stack.enter_context(wire(inside))
        with_port(kits / "small-1", "upstream", port)
        for name in ("small", "small-1"):
            stack.enter_context(hold(kits / name))
        hub = stack.enter_context(Hub(read_kit(kits / "small"), told.append))
        member = stack.enter_context(Member(read_kit(kits / "small-1"), told.append))
        serving = threading.Thread(target=member.serve, args=(reply, until), daemon=True)
        serving.start()
        ends = time.monotonic() + PATIENCE_SECONDS
        while not hub.members()["small-1"].is_there:
            assert time.monotonic() < ends, told
            time.sleep(0.1)
        carrier = hub.carrier("0" * 16)
        stack.callback(carrier.close)
        link = FlowerLink(
            carrier,
            Nodes(hub),
            ledger,
            "down",
            "up",
            max_message_bytes=2**23,
            deadline_seconds=120.0,
            passed=hub.passed,
            booked=Passed(),
        )
        for number in range(1, ROUNDS + 1):
            assert isinstance(link.ask({"small-1": message(number)})["small-1"], RoundReply)
        serving.join(PATIENCE_SECONDS)
        assert not serving.is_alive()
    link.book()
    for direction in ("up", "down"):
        counted = ledger.traffic[direction]
        assert counted > ROUNDS * VALUES * 4
        assert counted <= passed[direction] <= 1.1 * counted, (direction, passed, ledger.traffic)
        at_the_door = ledger.traffic[f"{direction}_wire"]
        assert at_the_door <= passed[direction] <= 1.005 * at_the_door, (direction, passed, ledger.traffic)
