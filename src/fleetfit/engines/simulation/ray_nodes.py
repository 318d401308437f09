"""Simulated nodes: Flower's simulation runtime on Ray, inside this process, from the first message until it is left.

``flwr run`` leaves a SuperLink daemon behind, and ``run_simulation``, which is deprecated, keeps the main thread and
the numbers of the nodes to itself. Both are made of ``start_vce``, which is used here: it takes nodes, an app and a
stop, and carries messages from an in-memory SuperLink state to ClientApps in Ray's processes and back.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.common.constant import HEARTBEAT_INTERVAL_INF, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce import start_vce
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState, RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from fleetfit.core.progress import Progress
from fleetfit.engines.flower.link import CarrierFailed

log = logging.getLogger(__name__)

RUN_ID, TASK_ID = 1, 1
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # where it is 0, Ray is of one machine and listens on loopback only
LONGEST_FOLDER = 40  # characters; Ray puts sockets 65 deeper, and 107 is the most that a socket's name may have


@dataclass(frozen=True)
class Resources:
    """What a device takes while it is at work, and where: so many devices are at work at a time as there is room for.

    Attributes:
        num_cpus: CPUs of one device.
        num_gpus: GPUs of one device; 0.25: four devices share one.
        address: A Ray cluster that is there, as Ray names it; None: this machine.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.num_cpus <= 0:
            raise ValueError(f"--num-cpus must be > 0, got {self.num_cpus:g}")
        if self.num_gpus < 0:
            raise ValueError(f"--num-gpus must be >= 0, got {self.num_gpus:g}")


class SimulatedNodes:
    """Nodes that are all here, for links to talk to; Ray is started when the first message is sent.

    Args:
        app: What answers for every node.
        number: How many nodes; node ``ids[i]`` knows itself as number i.
        resources: What a node takes while it answers.
        progress: Told when Ray is started.
    """

    def __init__(self, app: ClientApp, number: int, resources: Resources, progress: Progress) -> None:
        self.app = app
        self.resources = resources
        self.progress = progress
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN_ID, TASK_ID, SUPERLINK_NODE_ID
        self._run = Run.create_empty(run_id=RUN_ID)
        self._run.primary_task_id, self._run.federation_id = TASK_ID, NOOP_FEDERATION_ID
        self._states = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        state = _State(self._states.federation_manager, self._states.objectstore_factory.store())
        state.run_ids[RUN_ID] = RunRecord(run=self._run)
        state.task_store[TASK_ID] = Task(task_id=TASK_ID, run_id=RUN_ID)
        self._states.state_instance = state
        self.ids = tuple(_register(state) for _ in range(number))
        self._grid = InMemoryGrid(self._states)
        self._grid.set_run(self._run)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._temporary: Path | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> "SimulatedNodes":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._temporary is not None:
                self.progress("Ray", 0, 0, "waiting for Ray's processes to end")
        finally:
            self.close()

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        """Send messages, as Flower's ``Grid`` does.

        Raises:
            ValueError: no machine has what one device needs; Ray is in use in this process; there is no such cluster.
            CarrierFailed: Ray did not start, or the runtime has ended.
        """
        if self._thread is None:
            self._start()
        self._check()
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
        """The replies that are there, as Flower's ``Grid`` gives them.

        Raises:
            CarrierFailed: the runtime or one of Ray's processes has ended.
        """
        self._check()
        replies = list(self._grid.pull_messages(message_ids))
        for reply in replies:
            if reply.has_error() and reply.error.code == ErrorCode.UNKNOWN:  # not the app: Ray itself
                raise CarrierFailed(
                    f"a process of Ray ended ({reply.error.reason}); was there too little memory for so many devices "
                    "at a time? --num-cpus says how many CPUs each takes"
                )
        return replies

    def close(self) -> None:
        """End Ray and the runtime; returns when all processes that were started are gone."""
        self._stop.set()
        if self._temporary is None:
            return
        import ray

        # Of a stop that came in the middle of something Ray tells on stdout, which is for results.
        with contextlib.nullcontext() if _chatty() else contextlib.redirect_stdout(io.StringIO()):
            if self._thread is not None:
                self._thread.join()
            ray.shutdown()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _check(self) -> None:
        if self._thread is not None and not self._thread.is_alive():
            raise CarrierFailed(f"Flower's simulation ended: {self._failure}") from self._failure

    def _start(self) -> None:
        self.progress("nodes", 0, 1, "Ray is started" if self.resources.address is None else self.resources.address)
        self._temporary = _short_folder()
        at_a_time = _start_ray(self.resources, self._temporary)
        self._thread = threading.Thread(target=self._carry, name="flower simulation", daemon=True)
        self._thread.start()
        self.progress("nodes", 1, 1, f"{len(self.ids)} devices, {min(at_a_time, len(self.ids))} at a time")

    def _carry(self) -> None:
        config = {
            "init_args": {},
            "client_resources": {"num_cpus": self.resources.num_cpus, "num_gpus": self.resources.num_gpus},
        }
        try:
            start_vce(
                backend_name="ray",
                backend_config_json_stream=json.dumps(config),
                app_dir="",
                is_app=False,
                f_stop=self._stop,
                run=self._run,
                metrics=VceMetrics(),
                client_app=self.app,
                state_factory=self._states,
                existing_nodes_mapping={node: number for number, node in enumerate(self.ids)},
            )
        except BaseException as error:
            self._failure = error.__cause__ or error


class _State(InMemoryLinkState):
    """Flower's state, which knows who has mail.

    Ten times a second Flower asks for the mail of every node, and looks through all messages for each: with a thousand
    nodes and fifty messages on their way that takes a third of a second.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._waiting: Counter[int] = Counter()

    def store_message_ins(self, message: FlowerMessage) -> str | None:
        stored = super().store_message_ins(message)
        if stored is not None:
            self._waiting[message.metadata.dst_node_id] += 1
        return stored

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[FlowerMessage]:
        if not self._waiting[node_id]:
            return []
        found = super().get_message_ins(node_id, limit, run_id=run_id)
        self._waiting[node_id] -= len(found)
        return found


def _register(state: InMemoryLinkState) -> int:
    node_id = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, os.urandom(32), HEARTBEAT_INTERVAL_INF)
    state.acknowledge_node_heartbeat(node_id, HEARTBEAT_INTERVAL_INF)
    return node_id


def _start_ray(resources: Resources, temporary: Path) -> int:
    """Start or join Ray; how many devices can be at work at a time."""
    chatty = _chatty()
    if resources.address is None:
        os.environ.setdefault(LOOPBACK_ONLY, "0")
    import ray

    if ray.is_initialized():
        raise ValueError("Ray is in use in this process; call ray.shutdown() before a simulation")
    if not chatty:
        logging.getLogger("flwr").setLevel(logging.CRITICAL)
    common = {"log_to_driver": chatty, "logging_level": logging.INFO if chatty else logging.ERROR}
    with _handlers_as_they_were():
        if resources.address is None:
            try:
                ray.init("local", include_dashboard=False, _temp_dir=str(temporary), **common)
            except Exception as error:  # so Ray tells of a start that took too long
                raise CarrierFailed(
                    f"Ray did not start: {error} Has the machine too much to do, or too little memory? Run again later"
                ) from error
        else:
            try:
                ray.init(resources.address, **common)
            except ConnectionError as error:
                raise ValueError(f"--address {resources.address}: there is no Ray cluster that answers") from error
    room = [_room(node["Resources"], resources) for node in ray.nodes()]
    if not sum(room):
        raise ValueError(
            f"--num-cpus {resources.num_cpus:g} --num-gpus {resources.num_gpus:g}: no machine has that much for one "
            f"device; there are {_words(ray.cluster_resources())}"
        )
    return sum(room)


def _chatty() -> bool:
    """Whether the user wants to see what Flower and Ray log, as with --debug."""
    return log.isEnabledFor(logging.INFO)


def _room(machine: Mapping[str, float], resources: Resources) -> int:
    """How many devices can be at work at a time on one machine, as Flower counts it."""
    room = int(machine.get("CPU", 0) / resources.num_cpus)
    return min(room, int(machine.get("GPU", 0) / resources.num_gpus)) if resources.num_gpus else room


def _words(machine: Mapping[str, float]) -> str:
    return f"{machine.get('CPU', 0):g} CPUs and {machine.get('GPU', 0):g} GPUs in all"


def _short_folder() -> Path:
    """An empty folder whose name is short enough for Ray's sockets."""
    usual = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="fleetfit-ray-", dir=usual if len(usual) <= LONGEST_FOLDER - 22 else "/tmp"))


@contextlib.contextmanager
def _handlers_as_they_were() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and would end the process in the middle of a step."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
