"""What Flower's programs let others do for them: start a run and speak as its server, take a node's tasks and answer.

Flower itself starts a fresh process for each message, which loads code that came over the wire. In its isolation mode
"process" whoever knows a secret takes the tasks instead. We do: a node's messages are answered by this process, which
is there already, with its own installed code; nothing that comes with a run is ever executed. This is the only file
that uses parts of Flower that are not in its documented API, so the versions are checked.
"""

import hashlib
import io
import logging
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import DeactivateNodeRequest, PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    pull_and_inflate_object_from_tree,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import (
    ProtobufCall,
    ProtobufClient,
    ProtobufClientInterceptor,
    ProtobufRequestContext,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.runtime.run_clientapp import push_message
from google.protobuf.message import DecodeError

from fleetfit.engines.deployment.inside import HEADER, shown
from fleetfit.engines.flower.link import CarrierFailed

log = logging.getLogger(__name__)

FIRST_VERSION, AFTER_LAST_VERSION = (1, 41), (1, 43)
HEARTBEAT_SECONDS = 8.0  # Flower gives up a task that is silent for 30
LOOK_SECONDS = 2.0  # between two looks at which nodes are there
TASK_POLL_SECONDS = 0.25
TRIES = 4
MAX_PULLS = 16  # replies that are fetched at a time
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
APP = """\
[project]
name = "fleetfit"
version = "1.0.0"
description = "Carries no code: participants run what they have installed."
license = { text = "Apache-2.0" }
[tool.flwr.app]
publisher = "fleetfit"
[tool.flwr.app.components]
serverapp = "fleetfit:none"
clientapp = "fleetfit:none"
"""

C = TypeVar("C", bound=ProtobufClient)
M = TypeVar("M")


def check_version() -> None:
    """Raises ValueError if the installed Flower is not one that this file knows."""
    found = version("flwr")
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if not FIRST_VERSION <= numbers < AFTER_LAST_VERSION:
        first, after = (".".join(map(str, v)) for v in (FIRST_VERSION, AFTER_LAST_VERSION))
        raise ValueError(f"flwr {found} is installed; a deployment needs flwr>={first},<{after}")


class _Inside:
    """Shows with each call that it is ours."""

    def __init__(self, secret: bytes) -> None:
        self._headers = {HEADER: shown(secret)}

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add what a guarded program asks for."""
        context.request.headers.update(self._headers)
        return call_next(context)


class Api:
    """How to reach one of Flower's programs on this machine.

    Args:
        address: Its host and port.
        secret: What lets us take its tasks.
        ca: Whom to trust; None: it speaks no TLS.
    """

    def __init__(self, address: str, secret: bytes, ca: Path | None) -> None:
        self.address = address
        self.secret = secret
        self.ca = ca

    def client(self, kind: type[C], token: str = "") -> C:
        """A client of one of its services, for a task if there is a token."""
        auth = (
            RuntimeTokenHttpInterceptor(token)
            if token
            else SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods={ACQUIRE})
        )
        root = None if self.ca is None else self.ca.read_bytes()
        of_version = RuntimeVersionHttpInterceptor(component_name="fleetfit")
        interceptors: list[ProtobufClientInterceptor] = [of_version, _Inside(self.secret), auth]
        return kind.from_server_address(self.address, root is None, root, interceptors)


def app_bundle() -> bytes:
    """What Flower wants of a run: a bundle. Ours holds a name, and no code."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as bundle:
        bundle.writestr(zipfile.ZipInfo("pyproject.toml"), APP)
    return file.getvalue()


def register(api: Api, keys: dict[str, bytes]) -> dict[str, int]:
    """Let the owners of these public keys take part, and nobody else: node ids by name."""
    client = api.client(ControlHttpClient)
    try:
        return {
            name: client.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id
            for name, key in keys.items()
        }
    finally:
        client.close()


def unregister(api: Api, nodes: Iterable[int]) -> None:
    """Take these nodes' part away."""
    client = api.client(ControlHttpClient)
    try:
        for node in nodes:
            client.UnregisterNode(UnregisterNodeRequest(node_id=node))
    finally:
        client.close()


def list_nodes(api: Api) -> dict[int, bytes]:
    """Public keys of all nodes that are known, by node id."""
    client = api.client(ControlHttpClient)
    try:
        return {node.node_id: node.public_key for node in client.ListNodes(ListNodesRequest()).nodes_info}
    finally:
        client.close()


class _Heartbeat:
    """Keeps a task alive while we work at it."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client = client
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="task heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with suppress(httpx.HTTPError):  # whoever works at the task finds out
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

    def stop(self) -> None:
        """Let it go."""
        self._stop.set()
        self._thread.join()


# -- the server's side ------------------------------------------------------------------------------------------------


class _Grid(HttpGrid):
    """Flower's own, without its way to meet errors: it waits for ever, or interrupts the process."""

    def __init__(self, api: Api, token: str) -> None:
        super().__init__(api.address, api.ca is None, None if api.ca is None else api.ca.read_bytes(), token=token)
        self._client = api.client(RuntimeHttpClient, token)

    @property
    def runtime(self) -> RuntimeHttpClient:
        """The connection."""
        return self._runtime_client


class RunCarrier:
    """Carries messages of one run to nodes and fetches their replies: what a link needs of Flower.

    A node that was started anew has lost what it was working at; whoever asks for that reply is told of an error, as
    Flower tells of a node that is gone, so that it asks again.

    Args:
        api: The server's program.
        run: The run's id, which goes with each message.
    """

    def __init__(self, api: Api, run: str) -> None:
        self.run = run
        control = api.client(ControlHttpClient)
        bundle = app_bundle()
        fab = Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
        try:
            run_id = control.StartRun(StartRunRequest(fab=fab)).run_id
        finally:
            control.close()
        task, token = _acquire(api, TaskType.SERVER_APP, run_id)
        self._grid = _Grid(api, token)
        taken = self._grid.runtime.PullTaskInput(PullTaskInputRequest())
        self._grid.set_run(run_from_proto(taken.run))
        TaskIdentity.run_id, TaskIdentity.task_id = taken.run.run_id, task
        TaskIdentity.node_id = taken.context.node_id
        self._heartbeat = _Heartbeat(self._grid.runtime)
        self._pool = ThreadPoolExecutor(MAX_PULLS, thread_name_prefix="replies")
        self._pulls: dict[str, Future[list[Message]]] = {}
        self._sent: dict[str, tuple[Message, str]] = {}
        self._activations: dict[int, str] = {}
        self._looked_at = 0.0

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        """Send messages; an id for each, or none where it could not be sent."""
        ids: list[str | None] = []
        for message in messages:
            if not message.metadata.dst_node_id:  # not known yet
                ids.append(None)
                continue
            message.metadata.group_id = self.run
            activation = self._activation(message.metadata.dst_node_id)
            message_id = self._push(message)
            ids.append(message_id or None)
            if message_id:
                self._sent[message_id] = (message, activation)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages that are there by now. Those that are still being sent hold up no other."""
        found: list[Message] = []
        for message_id in message_ids:
            pull = self._pulls.get(message_id)
            if pull is None:
                pull = self._pulls[message_id] = self._pool.submit(self._pull, message_id)
            if pull.done():
                del self._pulls[message_id]
                replies = pull.result() or self._lost(message_id)
            else:  # half of it may be all that ever comes
                replies = self._lost(message_id)
            if replies:
                self._pulls.pop(message_id, None)
                self._sent.pop(message_id, None)
            found += replies
        return found

    def close(self) -> None:
        """The run is over."""
        self._heartbeat.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        with suppress(httpx.HTTPError):
            self._grid.runtime.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))
        self._grid.close()

    def _push(self, message: Message) -> str:
        (message_id,) = self._tried(lambda: list(self._grid.push_messages([message])))
        return message_id

    def _pull(self, message_id: str) -> list[Message]:
        return self._tried(lambda: list(self._grid.pull_messages([message_id])))

    def _lost(self, message_id: str) -> list[Message]:
        message, before = self._sent[message_id]
        now = self._activation(message.metadata.dst_node_id)
        if not before or now in ("", before):
            return []
        error = Error(code=ErrorCode.NODE_UNAVAILABLE, reason="it was started anew while it worked at this")
        return [Message(error, reply_to=message)]

    def _activation(self, node: int) -> str:
        """When a node was started, in Flower's words; empty if it is not there."""
        now = time.monotonic()
        if now - self._looked_at > LOOK_SECONDS:
            nodes = self._tried(lambda: list(self._grid.runtime.GetNodes(GetNodesRequest()).nodes))
            self._activations = {n.node_id: n.last_activated_at for n in nodes}
            self._looked_at = now
        return self._activations.get(node, "")

    def _tried(self, call: Callable[[], list[M]]) -> list[M]:
        """Flower's program is on this machine: if it does not answer a few times, it is gone."""
        for number in range(1, TRIES + 1):
            try:
                return call()
            except httpx.TransportError as error:
                if number == TRIES:
                    raise CarrierFailed(f"Flower's SuperLink does not answer: {error}") from error
                time.sleep(0.5 * number)
            except httpx.HTTPStatusError as error:
                text = error.response.text[:200]
                raise CarrierFailed(f"Flower's SuperLink refuses: {error.response.status_code} {text}") from error
        raise AssertionError("the loop returns or raises")


def _acquire(api: Api, kind: TaskType, run_id: int) -> tuple[int, str]:
    """The server's task of a run that was just started: (task id, token)."""
    client = api.client(RuntimeHttpClient)
    try:
        for _ in range(50):
            taken = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
            if taken.token and taken.task.run_id == run_id:
                return taken.task.task_id, taken.token
            time.sleep(TASK_POLL_SECONDS)
    finally:
        client.close()
    raise CarrierFailed("Flower's SuperLink does not hand out the run's task")


# -- the node's side --------------------------------------------------------------------------------------------------


@contextmanager
def _task(api: Api, token: str) -> Iterator[RuntimeHttpClient]:
    """A connection for one task, which is kept alive."""
    client = api.client(RuntimeHttpClient, token)
    heartbeat = _Heartbeat(client)
    try:
        yield client
    finally:
        heartbeat.stop()
        client.close()


@contextmanager
def _given_up() -> Iterator[None]:
    """What Flower raises where a run has ended meanwhile: nobody waits for its messages any more."""
    try:
        yield
    except (ObjectPullError, ObjectPushError, ObjectUnavailableError) as error:
        raise httpx.HTTPError(str(error)) from error


def speaks_for_itself(body: bytes) -> bool:
    """Whether the replies that a node pushes are its own: Flower checks who pushes, and not whose it says they are."""
    request = PushMessagesRequest()
    try:
        request.ParseFromString(body)
    except DecodeError:
        return False
    return all(m.metadata.src_node_id == request.node.node_id for m in request.messages_list)


def sign_off(address: str, ca: Path, key: ec.EllipticCurvePrivateKey, node: int) -> None:
    """Tell the server that a node is not there: it lets none come that it still believes to be there.

    A program that was killed has not said so itself.

    Raises:
        httpx.HTTPError: the server does not answer.
    """
    signed = NodeAuthHttpInterceptor(key, key.public_key())
    version_told = RuntimeVersionHttpInterceptor(component_name="fleetfit")
    client = FleetHttpClient.from_server_address(address, False, ca.read_bytes(), [version_told, signed])
    try:
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    except httpx.HTTPStatusError as error:  # it knows already
        log.info("signing off: %s", error)
    finally:
        client.close()


class NodeTasks:
    """The messages that wait at a node, one after the other.

    Args:
        api: The node's program.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._client = api.client(RuntimeHttpClient)

    def close(self) -> None:
        """No more."""
        self._client.close()

    def answer_one(self, answer: Callable[[Message], RecordDict]) -> bool:
        """Answer one message, if there is one.

        Args:
            answer: Makes the content of the reply.

        Returns:
            Whether there was one.

        Raises:
            httpx.HTTPError: the node's program does not answer, or has given up the task meanwhile.
        """
        taken = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if not taken.token:
            return False
        with _task(self._api, taken.token) as client:
            given = client.PullTaskInput(PullTaskInputRequest())
            run_id, node = given.run.run_id, Node(node_id=given.context.node_id)
            waiting = client.PullMessages(PullAppMessagesRequest())
            if not waiting.messages_list:
                raise httpx.HTTPError("the message is gone")
            tree = waiting.message_object_trees[0]
            with _given_up():
                message = pull_and_inflate_object_from_tree(
                    tree,
                    make_pull_object_fn_protobuf(client.PullObject, node, run_id),
                    make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run_id),
                    return_type=Message,
                )
            message.metadata.__dict__["_message_id"] = tree.object_id  # it is not part of what is sent
            reply = Message(answer(message), reply_to=message)
            with _given_up():
                push_message(client, reply, context_from_proto(given.context))
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))
        return True
