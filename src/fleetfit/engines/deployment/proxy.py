"""The door of a cloud or an edge: the one port that others reach. It lets greetings and Flower's fleet calls in.

Flower's SuperLink serves all it can do at one port, to whoever reaches it: who may take part, what runs, whose messages
go where. Here it listens on this machine only, and this door passes what nodes need, up to a size, and nothing else.
"""

import asyncio
import base64
import contextlib
import logging
import resource
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fleetfit.core.bounds import FewLines
from fleetfit.core.encoding import printable
from fleetfit.engines.deployment.certificates import client_context, public_pem
from fleetfit.engines.deployment.flower_api import speaks_for_itself
from fleetfit.engines.deployment.handshake import (
    GONE_SECONDS,
    MAX_BYTES,
    PATH,
    SIGNATURE,
    Greeting,
    Status,
    Welcome,
    objection,
    other_version,
    read_greeting,
)
from fleetfit.engines.deployment.inside import HEADER, shown
from fleetfit.engines.deployment.kit import Kit
from fleetfit.engines.deployment.kit_file import bracketed
from fleetfit.engines.flower.door import AT_ONCE, Door

log = logging.getLogger(__name__)

CALLS = {  # what Flower's nodes need
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "pull-object",
    "confirm-message-received",
    "get-run",
    "get-fab",
    "push-messages",
    "push-object",
}
CALLS_WITHOUT_KEYS = CALLS | {"register-node", "unregister-node"}  # of nodes that nobody knows beforehand
MAX_CALL_BYTES = 8 * 2**20  # Flower cuts what it sends into pieces of 5 MiB
AROUND = 2**20  # what Flower adds to a message at most
NOT_PASSED_ON = {
    HEADER,
    "connection",
    "host",
    "content-length",
    "transfer-encoding",
    "content-encoding",
    "keep-alive",
    "te",
}
MAX_CONNECTIONS = 4096
MAX_DESCRIPTORS = 65536
SECONDS = 60.0  # for one call
REPEATED_SECONDS = 60.0  # the same refusal is told once in so long
MAX_TOLD = 30  # different ones in that time
CHUNK_SECONDS = 10.0  # for the next piece of a body, and for the first
LEAST_RATE = 4096  # bytes a second of a body, after that
START_SECONDS = 10.0
KEY, PUSH_START, PUSH = "flwr-public-key", "push-messages", "push-object"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Presence:
    """A member as it was last heard.

    Attributes:
        instance: Drawn when its program started.
        address: Where it called from.
        seen: By this machine's monotonic clock.
        node: Its number in Flower, as it says.
        status: How far it is.
    """

    instance: str
    address: str
    seen: float
    node: int = 0
    status: Status | None = None

    @property
    def is_there(self) -> bool:
        """Whether it was heard of late."""
        return time.monotonic() - self.seen < GONE_SECONDS


def more_descriptors() -> int:
    """As many open files as this process may have, up to a limit that others can live with; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


_FEW = FewLines()


class Gate:
    """The door while it is open.

    Args:
        kit: The cloud's or the edge's.
        inside: Where Flower's SuperLink listens on this machine.
        door: The port that others reach, from ``listen``; the gate closes it.
        nodes: Members' numbers in Flower, as far as it knows them.
        tell: Told in words who comes, goes, and is not let in.
        secret: What the SuperLink answers to.

    Raises:
        ValueError: no server can be started with the kit's certificate and key.
    """

    def __init__(
        self, kit: Kit, inside: str, door: Door, nodes: Mapping[str, int], tell: Tell, secret: bytes = b""
    ) -> None:
        self.kit = kit
        self.nodes = nodes
        self.instance = secrets.token_hex(8)
        self._tell = tell
        self._present: dict[str, Presence] = {}
        self._told: dict[str, float] = {}
        self._untold = 0
        self._pushed: dict[str, int] = {}
        self._lock = threading.Lock()
        insecure = kit.file.insecure
        self._keys: frozenset[str] | None = None
        self.know_members(())
        self._inside = f"{'http' if insecure else 'https'}://{inside}"
        self._client = httpx.AsyncClient(verify=not insecure and client_context(kit.ca), timeout=SECONDS)
        self._client.headers[HEADER] = shown(secret)
        self._door = door
        app = Starlette(
            routes=[
                Route(PATH, self._greeting, methods=["POST"]),
                Route("/v1/fleet/{call}", self._pass_on, methods=["POST"]),
            ]
        )
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=round(GONE_SECONDS),  # a member greets over one connection
            backlog=AT_ONCE,  # that asyncio accepts before it reads from those that it has
        )
        if not insecure:
            config.ssl_certfile, config.ssl_keyfile = str(kit.server_certificate), str(kit.server_key)
        self._server = uvicorn.Server(config)
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).addFilter(_FEW)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="gate", daemon=True)
        self._thread.start()
        ends = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > ends:
                raise ValueError(f"{kit.folder}: no server can be started with its certificate and key")
            time.sleep(0.05)

    @property
    def present(self) -> dict[str, Presence]:
        """Who is there, in the order of the kit."""
        with self._lock:
            return {m.name: p for m in self.kit.file.members if (p := self._present.get(m.name)) and p.is_there}

    def know_members(self, gone: Collection[str]) -> None:
        """Let those in who are in the kit now; who is gone, or has another key, is not there any more."""
        keys = (base64.b64encode(public_pem(member.public_key)).decode() for member in self.kit.file.members)
        self._keys = None if self.kit.file.insecure else frozenset(keys)
        with self._lock:
            for name in gone:
                self._present.pop(name, None)

    def look(self) -> None:
        """Tell of those who went without a word; end connections of nobody. Called every second or so."""
        self._door.look()
        with self._lock:
            gone = [name for name, presence in self._present.items() if not presence.is_there]
            for name in gone:
                del self._present[name]
        for name in gone:
            self._tell(f"{name} is gone: nothing heard of it for {GONE_SECONDS:.0f} seconds")

    def close(self) -> None:
        """Shut the door."""
        self._server.should_exit = True
        self._server.force_exit = True  # those outside keep connections open for their next call
        self._thread.join(timeout=START_SECONDS)
        self._door.close()

    async def _serve(self) -> None:
        """Under asyncio: uvloop, which uvicorn prefers, would accept past the door, and its limits."""
        async with self._client:
            await self._server.serve(sockets=[self._door])

    # -- greetings ----------------------------------------------------------------------------------------------------

    async def _greeting(self, request: Request) -> Response:
        body = await _read(request, MAX_BYTES)
        if body is None:
            return Response(status_code=413)
        address = request.client.host if request.client else ""
        try:
            greeting = read_greeting(body)
        except ValueError as error:
            problem = other_version(self.kit, body)
            self._refuse(address, problem or str(error))
            if not problem:
                return Response(status_code=400)
            answer = Welcome(instance=self.instance, problem=problem)
            return Response(answer.model_dump_json(), media_type="application/json")
        welcome = self.welcome(greeting, body, request.headers.get(SIGNATURE, ""), address)
        if not welcome.problem:
            self._know(request, greeting.name)
        return Response(welcome.model_dump_json(), media_type="application/json")

    def welcome(self, greeting: Greeting, body: bytes, signature: str, address: str) -> Welcome:
        """The answer to a greeting, and what is remembered of it."""
        if problem := objection(self.kit, greeting, body, signature):
            self._refuse(address, problem)
            return Welcome(problem=problem)
        name = greeting.name
        if greeting.problem:
            self._refuse(address, f"{name} cannot take part: {printable(greeting.problem)}")
            return Welcome(instance=self.instance)
        with self._lock:
            before = self._present.get(name)
            there = before is not None and before.is_there
            if there and before is not None and before.instance != greeting.instance:
                problem = (
                    f"{name!r} is taken: a program with the same kit is at work at {before.address}. Stop one of the "
                    "two; each participant needs a kit of its own"
                )
            elif greeting.leaves:
                self._present.pop(name, None)
            else:
                self._present[name] = Presence(
                    greeting.instance, address, time.monotonic(), greeting.node, greeting.status
                )
        if problem:
            self._refuse(address, problem)
            return Welcome(instance=self.instance, problem=problem, taken=True)
        if greeting.leaves and there:
            self._tell(f"{name} has left")
        elif not there and not greeting.leaves:
            self._tell(f"{name} is there ({address})")
        return Welcome(instance=self.instance, node=self.nodes.get(name, 0))

    def _know(self, request: Request, name: str) -> None:
        """The connection is a member's, as far as one can tell before its call is passed on."""
        if request.client:
            self._door.know((request.client.host, request.client.port), name)

    def _refuse(self, address: str, problem: str) -> None:
        """Tell of it, if it was not told just now; of very many different ones, only how many there were."""
        now = time.monotonic()
        with self._lock:
            self._told = {text: at for text, at in self._told.items() if now - at < REPEATED_SECONDS}
            new, many = problem not in self._told, len(self._told) >= MAX_TOLD
            self._untold += new and many
            untold = self._untold if new and not many else 0
            if new and not many:
                self._told[problem] = now
                self._untold = 0
        if untold:
            self._tell(f"refused: {untold} more callers")
        if new and not many:
            self._tell(printable(f"refused ({address}): {problem}"))

    # -- Flower's calls -----------------------------------------------------------------------------------------------

    async def _pass_on(self, request: Request) -> Response:
        call = request.path_params["call"]
        if call not in (CALLS_WITHOUT_KEYS if self.kit.file.insecure else CALLS):
            return Response(status_code=404)
        address = request.client.host if request.client else ""
        key = request.headers.get(KEY, "")
        if self._keys is not None and key not in self._keys:  # Flower checks that the caller has it
            self._refuse(address, f"a node whose key is not that of a member of {self.kit.file.name} ({call})")
            return Response(status_code=401)
        self._know(request, key)
        body = await _read(request, MAX_CALL_BYTES)
        if body is None or self._is_too_much(key, call, len(body)):  # its other calls go on: it can answer again
            self._refuse(address, f"a member sends more than links.max_message_bytes ({call})")
            return Response(status_code=413)
        if call == PUSH_START and not speaks_for_itself(body):
            self._refuse(address, "a member answers in the name of another")
            return Response(status_code=403)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in NOT_PASSED_ON}
        try:
            answer = await self._client.post(f"{self._inside}/v1/fleet/{call}", content=body, headers=headers)
        except httpx.TransportError as error:
            log.info("%s: %s", call, error)
            return Response(status_code=503)
        back = {k: v for k, v in answer.headers.items() if k.lower() not in NOT_PASSED_ON}
        return Response(answer.content, answer.status_code, back)

    def _is_too_much(self, key: str, call: str, size: int) -> bool:
        """Whether with this call a node's message has grown beyond what the job allows."""
        if call == PUSH_START:
            self._pushed[key] = 0
        if call != PUSH:
            return False
        self._pushed[key] = self._pushed.get(key, 0) + size
        return self._pushed[key] > self.kit.job.links.max_message_bytes + AROUND


def listen(kit: Kit) -> Door:
    """The port that others reach.

    Raises:
        ValueError: it is taken, or the address is not one of this machine; says what to do.
    """
    server = kit.server
    family = socket.AF_INET6 if ":" in server.listen else socket.AF_INET
    door = Door(family, len(kit.file.members), min(MAX_CONNECTIONS, more_descriptors() // 2))
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((server.listen, server.port))
    except OSError as error:
        door.close()
        where = f"{bracketed(server.listen)}:{server.port}"
        raise ValueError(
            f"{kit.file.name} cannot listen at {where}: {error.strerror}. Stop what has this port, or give another in "
            "FLEET.toml and provision with --anew (or change server.port here and upstream.port in the kits below)"
        ) from None
    return door


async def _read(request: Request, most: int) -> bytes | None:
    """A body up to a size; None if there is more, or if it does not come.

    A slow line has the time that it needs at ``LEAST_RATE``.
    """
    body, begun, stream = bytearray(), time.monotonic(), request.stream().__aiter__()
    while True:
        left = begun + CHUNK_SECONDS + len(body) / LEAST_RATE - time.monotonic()
        try:
            body += await asyncio.wait_for(anext(stream), min(max(left, 0.0), CHUNK_SECONDS))
        except StopAsyncIteration:
            return bytes(body)
        except TimeoutError:
            return None
        if len(body) > most:
            return None
