"""Flower's program on a machine answers the one that started it, and no other user of that machine."""

import asyncio
from typing import Any

import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest
from flwr.supercore.control import ControlHttpClient

from fleetfit.engines.deployment.flower_api import Api
from fleetfit.engines.deployment.inside import HEADER, Guarded, shown
from fleetfit.engines.deployment.kit import write_secret
from fleetfit.engines.deployment.server import free_port
from fleetfit.engines.deployment.subprocesses import Daemon

SECRET = b"s" * 32


def status_of(scope: dict[str, Any]) -> int:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent: list[dict[str, Any]] = []

    async def send(event: Any) -> None:
        sent.append(event)

    asyncio.run(Guarded(app, shown(SECRET))(scope, None, send))
    return int(sent[0]["status"]) if sent else 0


def test_only_what_shows_the_secret_is_passed_on() -> None:
    right = (HEADER.encode(), shown(SECRET).encode())
    for headers in ([], [(HEADER.encode(), b"")], [(HEADER.encode(), shown(b"t" * 32).encode())]):
        assert status_of({"type": "http", "path": "/v1/control/stop-run", "headers": headers}) == 401
        assert status_of({"type": "websocket", "path": "/", "headers": headers}) == 0
    assert status_of({"type": "http", "path": "/v1/control/stop-run", "headers": [right]}) == 200
    assert status_of({"type": "http", "path": "/health", "headers": []}) == 200
    assert shown(SECRET) not in (shown(b""), SECRET.hex())


def test_a_stranger_of_this_machine_registers_and_stops_nothing(tmp_path: Any) -> None:
    write_secret(tmp_path / "secret", SECRET)
    port = free_port()
    arguments = ["--insecure", "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
    arguments += ["--superexec-auth-secret-file", str(tmp_path / "secret"), "--disable-runtime-dependency-installation"]
    daemon = Daemon("flower-superlink", arguments, tmp_path)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as stranger:
            for _ in range(600):
                try:
                    assert stranger.get("/health").status_code < 500
                    break
                except httpx.TransportError:
                    assert daemon.is_running, daemon.words()
                    asyncio.run(asyncio.sleep(0.1))
            paths = stranger.get("/openapi.json")
            assert paths.status_code == 401
            for path in ("control/register-node", "control/stop-run", "control/list-runs", "fleet/pull-messages"):
                assert stranger.post(f"/v1/{path}", content=b"").status_code == 401
        owner = Api(f"127.0.0.1:{port}", SECRET, None).client(ControlHttpClient)
        assert not owner.ListNodes(ListNodesRequest()).nodes_info
        other = Api(f"127.0.0.1:{port}", b"t" * 32, None).client(ControlHttpClient)
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            other.RegisterNode(RegisterNodeRequest(public_key=b"k", name="n"))
    finally:
        daemon.stop()
