"""What `fleetfit start` runs: a cloud that waits for a run, an edge between cloud and devices, a device."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from fleetfit.core.checkpoints import Ledger, MemoryFolder, StepFolder
from fleetfit.core.encoding import Message, printable, put
from fleetfit.core.hardware import torch_device_of
from fleetfit.core.records import BackboneShape
from fleetfit.data.participant import load_owned
from fleetfit.data.partition import Split
from fleetfit.data.tables import FUNCTION
from fleetfit.device.handler import device_handler
from fleetfit.device.memory import DeviceMemory, shipped_model
from fleetfit.device.messages import CoarseModel, Finish, FinishReply, RefineRound
from fleetfit.device.privacy_ledger import LEDGER_FILE, LifetimeLedger, ledger_of
from fleetfit.edge.messages import ClusterReport
from fleetfit.edge.run import edge_handler
from fleetfit.engines.deployment.client import Member
from fleetfit.engines.deployment.flower_api import RunCarrier
from fleetfit.engines.deployment.handshake import Status
from fleetfit.engines.deployment.kit import Kit, hold
from fleetfit.engines.deployment.proxy import Tell
from fleetfit.engines.deployment.server import Hub, Server
from fleetfit.engines.flower.link import FlowerLink, Heard
from fleetfit.runs.device_folder import write_model
from fleetfit.runs.folder import DATA_FILE, claim_data
from fleetfit.runs.summary import device_card

log = logging.getLogger(__name__)

KEPT_RUNS = 2
POLL_SECONDS = 0.5
IDLE_SECONDS = 1.0
WORDS = {
    "attributes_request": "told what it can do",
    "coarse_model": "has the coarse model",
    "propose": "compared the ways to ship",
    "finish": "finished",
}


def start(kit: Kit, once: bool, tell: Tell, check: Callable[[], None], allow_code: bool = False) -> None:
    """Take part until the end.

    Args:
        kit: Whose part.
        once: The end is when the job is finished; otherwise when ``check`` raises.
        tell: Told in words what happens.
        check: Called every second or so; raises to stop.
        allow_code: The kit's data may be a function of Python, which is run.

    Raises:
        ValueError: a bad kit or data, a function that is not allowed, a port that is taken, one above that does not
            let this participant take part.
        OSError: a file cannot be read or written.
    """
    check_code(kit.data_source, allow_code)
    with hold(kit.folder):
        torch.set_num_threads(kit.job.run.threads)
        {"cloud": _cloud, "edge": _edge, "device": _device}[kit.file.role](kit, once, tell, check)


# -- the cloud --------------------------------------------------------------------------------------------------------


def _cloud(kit: Kit, once: bool, tell: Tell, check: Callable[[], None]) -> None:
    if once:
        raise ValueError("--once is for edges and devices: a cloud is done when `fleetfit run` is")
    with Hub(kit, tell) as hub:
        names = ", ".join(member.name for member in kit.file.members)
        tell(f"{kit.file.name} listens at {kit.server.address}:{kit.server.port} for {names}")
        while True:
            time.sleep(IDLE_SECONDS)
            check()
            hub.check()


# -- an edge ----------------------------------------------------------------------------------------------------------


class Nodes(Mapping[str, int]):
    """Nodes of those below, as they are now.

    Args:
        server: Who knows them.
    """

    def __init__(self, server: Server) -> None:
        self.server = server

    def __getitem__(self, name: str) -> int:
        return self.server.members()[name].node

    def __iter__(self) -> Iterator[str]:
        return iter(self.server.members())

    def __len__(self) -> int:
        return len(self.server.members())


class _Edge:
    """An edge at work: what it keeps between messages of one run."""

    def __init__(self, kit: Kit, data: Split, hub: Hub, member: Member, tell: Tell, check: Callable[[], None]) -> None:
        self.kit = kit
        self.data = data
        self.hub = hub
        self.member = member
        self.is_finished = False
        self._tell = tell
        self._check = check
        self._told = ""
        self._carrier: RunCarrier | None = None

    def handle(self, run: str, message: Message) -> Message:
        """Answer the cloud, by asking the devices; from finished steps as far as there are any."""
        folder = _folder_of(self.kit, run, self.data, self._tell)
        ledger = Ledger()
        links, heard = self.kit.job.links, Heard(self._progress)
        carrier = self._carrier_of(run)
        link = FlowerLink(
            carrier,
            Nodes(self.hub),
            ledger,
            "edge_to_device",
            "device_to_edge",
            max_message_bytes=links.max_message_bytes,
            deadline_seconds=links.deadline_seconds,
            poll_seconds=POLL_SECONDS,
            replied=self._replied(heard),
        )
        steps = StepFolder(folder / "steps", ledger)
        cluster = self.kit.file.name
        reply = edge_handler(self.kit.job, cluster, self.data, link, steps, heard, self.kit.known_devices)(message)
        if isinstance(reply, ClusterReport):
            self.is_finished = True
            self._tell("finished; the cloud has the report")
            costs = {"phase_seconds": dict(ledger.seconds), "phase_cpu_seconds": ledger.known_cpu_seconds}
            reply = reply.model_copy(update={"traffic": dict(ledger.traffic), **costs})
        return reply

    def close(self) -> None:
        """No more questions to the devices."""
        if self._carrier is not None:
            self._carrier.close()

    def _carrier_of(self, run: str) -> RunCarrier:
        if self._carrier is None or self._carrier.run != run:
            self.close()
            self._carrier = self.hub.carrier(run)
        return self._carrier

    def _replied(self, heard: Heard) -> Callable[[int, int], None]:
        def replied(number: int, asked: int) -> None:
            self._check()
            self.hub.check()
            heard.replied(number, asked)

        return replied

    def _progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        """For the cloud, with the next greeting; and here, a line when a phase or round begins."""
        self._check()
        what = note.removeprefix(f"{self.kit.file.name}: ")
        self.member.status = Status(phase=phase, done=min(done, total), total=max(total, 1), note=what[:200])
        line = f"{phase}: {what}" if phase == "refine" else phase
        line = line.partition(", ")[0]
        if line != self._told:
            self._told = line
            self._tell(line)


def _hub(kit: Kit, member: Member, tell: Tell) -> Hub:
    try:
        return Hub(kit, tell)
    except (ValueError, OSError) as error:
        member.give_up(f"it cannot listen for its devices: {kit.without_path(error)}")
        raise


def _edge(kit: Kit, once: bool, tell: Tell, check: Callable[[], None]) -> None:
    with Member(kit, tell) as member:
        member.knock()
        data = _load(kit, member, 0.0, ("edge", kit.file.name), tell)
        with _hub(kit, member, tell) as hub:
            names = ", ".join(m.name for m in kit.file.members)
            tell(f"{kit.file.name} listens at {kit.server.address}:{kit.server.port} for {names}")
            edge = _Edge(kit, data, hub, member, tell, check)

            def check_both() -> None:
                check()
                hub.check()

            try:
                member.serve(edge.handle, lambda: once and edge.is_finished, check_both)
            finally:
                edge.close()


# -- a device ---------------------------------------------------------------------------------------------------------


class _Device:
    """A device at work: what it keeps lies in files, the last messages' memories of each run."""

    def __init__(self, kit: Kit, data: Split, member: Member, tell: Tell) -> None:
        self.kit = kit
        self.member = member
        self.is_finished = False
        self._data = data
        self._tell = tell
        self._torch_device = torch_device_of(kit.job.run.torch_device)
        self._lifetime: LifetimeLedger | None = None
        if kit.job.privacy.on:
            limit, runs = kit.file.privacy.lifetime_epsilon, kit.state / "runs"
            self._lifetime = LifetimeLedger(kit.lifetime_file, kit.job, limit, runs)
            tell(f"privacy: {self._lifetime.words}")

    def handle(self, run: str, message: Message) -> Message:
        """Answer the edge."""
        self._check(message)
        if self._lifetime:
            known = (self.kit.of_run(run) / "memory" / LEDGER_FILE).exists()
            self._lifetime.check(run, known, message)
        memories = MemoryFolder(_folder_of(self.kit, run, self._data, self._tell) / "memory")
        attributes = self.kit.attributes(len(self._data.train) + len(self._data.validation))
        ledger = ledger_of(memories.folder, self.kit.job)
        if self._lifetime:
            self._lifetime.count(run, message)
        reply = device_handler(attributes, self._data, memories, self._torch_device, ledger)(message)
        rounds = self.kit.job.refine.rounds
        number = message.round if isinstance(message, RefineRound) else 0
        what = f"round {number} of {rounds}" if number else WORDS.get(message.kind, message.kind)
        self.member.status = Status(phase="refine", done=number, total=rounds, note=what)
        self._tell(what)
        if isinstance(message, Finish) and isinstance(reply, FinishReply):
            memory = memories.load(message.step, DeviceMemory)
            self._write(memory)
            self.is_finished = True
            if self.kit.job.links.send_models:
                reply = with_model(reply, memory)
        return reply

    def _check(self, message: Message) -> None:
        """Whether a coarse model is of this device's own job, whatever its edge says."""
        if not isinstance(message, CoarseModel):
            return
        job = self.kit.job
        for key, mine, theirs in (
            ("refine", job.refine, message.refine),
            ("seed", job.seed, message.seed),
            ("labels", self.kit.task.labels, message.labels),
        ):
            if mine != theirs:
                raise ValueError(f"its {key} must be as in this device's own job")

    def _write(self, memory: DeviceMemory) -> None:
        report, form = memory.report, self.kit.task.form
        assert report is not None, "it has finished"
        shape = memory.shape or BackboneShape(width=1.0, depth=1)
        card = device_card(self.kit.upstream.name, memory, report, shape, form, form.words)
        folder = self.kit.folder / "model"
        write_model(folder, shipped_model(memory), card)
        self._tell(f"model: {folder}")


def with_model(reply: FinishReply, memory: DeviceMemory) -> FinishReply:
    """The report together with what is the device's own of its model; the backbone is the cluster's."""
    return reply.model_copy(update={"tensors": put("header", memory.shipped)})


def _device(kit: Kit, once: bool, tell: Tell, check: Callable[[], None]) -> None:
    with Member(kit, tell) as member:
        member.knock()
        data = _load(kit, member, kit.job.data.device_test_share, ("device", kit.file.name), tell)
        device = _Device(kit, data, member, tell)
        member.serve(device.handle, lambda: once and device.is_finished, check)


# -- for all ----------------------------------------------------------------------------------------------------------


def check_code(source: str, allow_code: bool) -> None:
    """Whoever made a kit says what its data is; that must not be a program, unless this machine's owner agrees.

    Raises:
        ValueError: it is one, and that is not allowed.
    """
    if FUNCTION.fullmatch(source) and not allow_code:
        raise ValueError(
            f"data.source of the kit is {source!r}, a function of Python, which would run here with all your "
            "rights; start with --allow-code if you know it, or let data.source name a file or folder"
        )


def load_data(kit: Kit, test_share: float, names: tuple[str, ...]) -> Split:
    """A participant's samples, as its kit says; a device's inputs without labels too, where the job has a use for them.

    Raises:
        ValueError: they are not there, cannot be read, or have labels that the job does not know.
        OSError: a file cannot be read.
    """
    unlabelled = names[0] == "device" and kit.job.refine.unlabelled
    task, cut = kit.task, kit.file.data.cut
    return load_owned(kit.job, kit.data_source, cut, task.labels, task.form, test_share, names, unlabelled=unlabelled)


def _load(kit: Kit, member: Member, test_share: float, names: tuple[str, ...], tell: Tell) -> Split:
    tell(f"data: reading {printable(kit.data_source)}")
    try:
        data = load_data(kit, test_share, names)
    except (ValueError, OSError):
        member.give_up("its data are missing, cannot be read, or have labels that the job does not know")
        raise
    for line in data.summary.lines if data.summary else ():
        tell(f"data: {line}")
    tell(f"data: {len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test samples")
    return data


def _folder_of(kit: Kit, run: str, data: Split, tell: Tell) -> Path:
    """What is kept of one run. When a new one begins, all are forgotten but it and the one before it.

    Raises:
        ValueError: the run began with other data.
    """
    folder = kit.of_run(run)
    if not folder.exists():
        folder.mkdir(parents=True)
        known = sorted(folder.parent.iterdir(), key=lambda f: f.stat().st_mtime)
        for old in known[:-KEPT_RUNS]:
            shutil.rmtree(old)
    if data.summary is not None:
        begun = next(folder.rglob("*.safetensors"), None) is not None
        try:
            claim_data(folder / DATA_FILE, data.summary, begun, "start another run from the cloud (another --out)")
        except ValueError as error:
            tell(str(error))
            raise ValueError("its data changed since the run began") from None  # what is different stays here
    return folder
