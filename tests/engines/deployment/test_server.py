"""A hub's own Flower program: at which port inside it runs."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from fleetfit.engines.deployment import server as hub_module
from fleetfit.engines.deployment.kit import Kit, read_kit
from fleetfit.engines.deployment.server import STARTS, Hub


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def answering() -> Iterator[int]:
    """A port at which somebody is well."""
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


class Pretended:
    """Flower's program: it ends where a port is taken, as Flower's does, or for another reason."""

    started: list[str]
    taken: tuple[str, ...]
    says = "ERROR [uvicorn.error] [Errno 98] error while attempting to bind on address: address already in use"
    log_file = Path("log")

    def __init__(self, program: str, arguments: list[str], *_: object) -> None:
        self.port = arguments[arguments.index("--port") + 1]
        self.started.append(self.port)
        self.is_running = self.port not in self.taken

    def words(self) -> str:
        return self.says if self.port in self.taken else ""

    def stop(self) -> None:
        self.is_running = False


def starting(monkeypatch: pytest.MonkeyPatch, kits: Path, ports: list[int], says: str = Pretended.says) -> Hub:
    """A hub of which nothing is there yet, whose ports are these; all but the last are taken."""
    program = type("Program", (Pretended,), {"started": [], "taken": tuple(map(str, ports[:-1])), "says": says})
    given = iter(ports)
    monkeypatch.setattr(hub_module, "Daemon", program)
    monkeypatch.setattr(hub_module, "free_port", lambda: next(given))
    hub = Hub.__new__(Hub)
    kit = read_kit(kits / "small")
    hub.kit = Kit(kit.folder, kit.file.model_copy(update={"insecure": True}), kit.job, kit.task)
    return hub


def test_a_port_that_somebody_took_in_between_is_left_to_them(
    kits: Path, monkeypatch: pytest.MonkeyPatch, answering: int
) -> None:
    hub = starting(monkeypatch, kits, [1, 2, answering])
    hub._start(b"secret", kits / "secret")
    assert hub._superlink.started == ["1", "2", str(answering)]  # type: ignore[attr-defined]
    assert hub._inside == f"127.0.0.1:{answering}"


def test_another_reason_to_end_is_told_at_once(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = starting(monkeypatch, kits, [1, 2], says="no such option")
    with pytest.raises(ValueError, match="no such option"):
        hub._start(b"secret", kits / "secret")
    assert hub._superlink.started == ["1"]  # type: ignore[attr-defined]


def test_it_does_not_try_for_ever(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = starting(monkeypatch, kits, list(range(1, STARTS + 2)))
    with pytest.raises(ValueError, match="address already in use"):
        hub._start(b"secret", kits / "secret")
    assert len(hub._superlink.started) == STARTS  # type: ignore[attr-defined]
