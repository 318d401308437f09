"""Flower's own floor: empty messages between one SuperLink and two SuperNodes, over TLS, with keys.

Two ways to run ClientApps: Flower's own, a fresh process for each message, and ours, a process that is there already.

    python benchmarks/engines_floor.py NODE_FOLDER      (a node of the second way; started by the benchmark)
"""

import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from engines_loopback import BELOW, MARK, Fleet
from flwr.app import Message
from flwr.cli.build import build_fab_from_disk
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient

from fleetfit.engines.deployment.certificates import client_context, public_pem
from fleetfit.engines.deployment.flower_api import TASK_POLL_SECONDS, Api, NodeTasks, RunCarrier, register
from fleetfit.engines.deployment.kit import Kit, write_secret
from fleetfit.engines.deployment.server import free_port
from fleetfit.engines.deployment.start import POLL_SECONDS
from fleetfit.engines.deployment.subprocesses import Daemon
from fleetfit.engines.flower.codec import MESSAGE_TYPE, pack

EDGE = "phones"
PATIENCE_SECONDS = 300.0
PROGRAMS = Path(sys.executable).parent  # where Flower's SuperLink finds Flower's SuperExec
OUT = "FLEETFIT_FLOOR"
PROJECT = """\
[project]
name = "floor"
version = "1.0.0"
description = "Empty messages."
license = { text = "Apache-2.0" }
[tool.flwr.app]
publisher = "fleetfit"
[tool.flwr.app.components]
serverapp = "floor:server"
clientapp = "floor:client"
"""
APPS = '''\
"""Empty messages, as plainly as Flower allows."""

import json
import os
import time
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server, client = ServerApp(), ClientApp()


@server.main()
def main(grid, context):
    path = Path(os.environ["FLEETFIT_FLOOR"])
    number = int(path.with_suffix(".rounds").read_text())
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    seconds = []
    for _ in range(number):
        start = time.perf_counter()
        messages = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
        replies = list(grid.send_and_receive(messages))
        assert len(replies) == 2 and not any(reply.has_error() for reply in replies), replies
        seconds.append(time.perf_counter() - start)
        path.with_suffix(".part").write_text(json.dumps(seconds))
    path.with_suffix(".part").rename(path)


@client.query()
def query(message, context):
    return Message(RecordDict(), reply_to=message)
'''


class Floor:
    """One SuperLink, two SuperNodes, with the certificates and keys of an edge and its devices.

    Args:
        fleet: Whose kits; none of its programs runs.
        ours: Whether ClientApps are run as we do.
        name: Of its folder.
    """

    def __init__(self, fleet: Fleet, ours: bool, name: str) -> None:
        self.ours = ours
        self.edge = fleet.kit(EDGE)
        self.folder = fleet.folder / f"floor-{'ours' if ours else 'plain'}-{name}"
        self.folder.mkdir()
        self.secret = secrets.token_bytes(32)
        self.secret_file = self.folder / "secret"
        write_secret(self.secret_file, self.secret)
        self.api = Api(f"127.0.0.1:{free_port()}", self.secret, self.edge.ca)
        self.out = self.folder / "floor.json"

    @property
    def isolation(self) -> list[str]:
        """Who runs apps."""
        if self.ours:
            return ["--isolation", "process", "--superexec-auth-secret-file", str(self.secret_file)]
        return ["--isolation", "subprocess"]

    @contextmanager
    def running(self, fleet: Fleet) -> Iterator[list[int]]:
        """All programs; the nodes' numbers."""
        os.environ |= {OUT: str(self.out), MARK: fleet.mark, "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"}
        with ExitStack() as stack:
            edge, (host, _, port) = self.edge, self.api.address.partition(":")
            link = Daemon(
                "flower-superlink",
                [
                    *("--host", host, "--port", port, "--ssl-ca-certfile", str(edge.ca)),
                    *("--ssl-certfile", str(edge.server_certificate), "--ssl-keyfile", str(edge.server_key)),
                    *("--enable-supernode-auth", "--disable-runtime-dependency-installation", *self.isolation),
                ],
                self.folder,
            )
            stack.callback(link.stop)
            self._until(self._answers, link)
            numbers = register(self.api, {m.name: public_pem(m.public_key) for m in edge.file.members})
            for name in BELOW[EDGE]:
                self._start_node(stack, fleet.kit(name))
            yield list(numbers.values())

    def _start_node(self, stack: ExitStack, kit: Kit) -> None:
        folder, port = self.folder / kit.file.name, free_port()
        folder.mkdir()
        found: list[str] = []
        node = Daemon(
            "flower-supernode",
            [
                *("--superlink", self.api.address, "--root-certificates", str(kit.ca)),
                *("--auth-supernode-private-key", str(kit.node_key), *self.isolation),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            folder,
            lambda line: found.append(line) if "SuperNode ID" in line else None,
        )
        stack.callback(node.stop)
        self._until(lambda: bool(found), node)
        if self.ours:
            (folder / "node.json").write_text(json.dumps([f"127.0.0.1:{port}", self.secret.hex()]))
            program = subprocess.Popen([sys.executable, __file__, str(folder)])
            stack.callback(program.wait)
            stack.callback(program.terminate)

    def _answers(self) -> bool:
        try:
            with httpx.Client(verify=client_context(self.edge.ca)) as client:
                client.get(f"https://{self.api.address}/health")
        except httpx.TransportError:
            return False
        return True

    @staticmethod
    def _until(done: Callable[[], bool], daemon: Daemon) -> None:
        ends = time.monotonic() + PATIENCE_SECONDS
        while not done():
            if not daemon.is_running or time.monotonic() > ends:
                raise SystemExit(f"{daemon.program} does not start:\n{daemon.words()}")
            time.sleep(0.1)

    def measure(self, fleet: Fleet, rounds: int) -> list[float]:
        """Seconds of each round: two messages are sent, two replies are there."""
        with self.running(fleet) as nodes:
            return self._ours(nodes, rounds) if self.ours else self._plain(rounds)

    def _plain(self, rounds: int) -> list[float]:
        self.out.with_suffix(".rounds").write_text(str(rounds))
        app = self.folder / "app"
        app.mkdir()
        (app / "pyproject.toml").write_text(PROJECT)
        (app / "floor.py").write_text(APPS)
        content = build_fab_from_disk(app)
        control = self.api.client(ControlHttpClient)
        control.StartRun(StartRunRequest(fab=Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)))
        control.close()
        ends = time.monotonic() + PATIENCE_SECONDS + 20.0 * rounds
        while not self.out.exists():
            if time.monotonic() > ends:
                log = (self.folder / "logs" / "flower-superlink.log").read_text()[-4000:]
                raise SystemExit(f"Flower's own apps do not come to an end:\n{log}")
            time.sleep(0.2)
        seconds: list[float] = json.loads(self.out.read_text())
        return seconds

    def _ours(self, nodes: list[int], rounds: int) -> list[float]:
        carrier = RunCarrier(self.api, "0" * 16)
        try:
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                sent = carrier.push_messages([Message(pack(b""), node, MESSAGE_TYPE) for node in nodes])
                missing = [message for message in sent if message]
                assert len(missing) == len(nodes), "every node takes its message"
                while missing:
                    time.sleep(POLL_SECONDS)
                    came = carrier.pull_messages(missing)
                    assert not any(reply.has_error() for reply in came), came
                    gone = {reply.metadata.reply_to_message_id for reply in came}
                    missing = [message for message in missing if message not in gone]
                seconds.append(time.perf_counter() - start)
            return seconds
        finally:
            carrier.close()


def answer_for_ever(folder: Path) -> None:
    """A node of the second way: empty replies, until it is ended."""
    address, secret = json.loads((folder / "node.json").read_text())
    tasks = NodeTasks(Api(address, bytes.fromhex(secret), None))

    def answer(_: Any) -> Any:
        return pack(b"")

    while True:
        try:
            if tasks.answer_one(answer):
                continue
        except httpx.HTTPError:
            pass
        time.sleep(TASK_POLL_SECONDS)


if __name__ == "__main__":
    answer_for_ever(Path(sys.argv[1]))
