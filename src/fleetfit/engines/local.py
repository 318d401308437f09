"""The local engine: all tiers in one process, every message encoded, counted and decoded as on a wire."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from fleetfit.artifacts import Ledger, MemoryFolder, RunFolder, StepFolder
from fleetfit.cloud import form_clusters
from fleetfit.config import DeviceGroup, EnergyConfig, Job
from fleetfit.data.partition import FleetData, Split, share_out
from fleetfit.data.sources import load_samples
from fleetfit.device import DeviceMemory, DeviceState, handle
from fleetfit.hardware import CPU, torch_device_of
from fleetfit.messages import (
    BackboneAssignment,
    DeviceMessage,
    Message,
    Progress,
    StatsRequest,
    decode,
    decode_any,
    encode,
    silent,
)
from fleetfit.outcome import summarise, write_models
from fleetfit.pipeline import FleetResult, gather_stats, run_cloud, run_edge
from fleetfit.privacy import tell_promise
from fleetfit.privacy_ledger import PrivacyLedger, ledger_of
from fleetfit.records import DeviceAttributes, EnergyModel

M = TypeVar("M", bound=Message)
Handler = Callable[[Message], Message]


class LocalLink:
    """Members in this process. Messages cross it in their encoded form only, so what is counted is what would travel.

    Args:
        handlers: What answers for each member.
        ledger: Where bytes are counted.
        down: Name of the direction to the members.
        up: Name of the direction from them.
    """

    def __init__(self, handlers: Mapping[str, Handler], ledger: Ledger, down: str, up: str) -> None:
        self.handlers = handlers
        self.ledger = ledger
        self.down = down
        self.up = up

    @property
    def members(self) -> tuple[str, ...]:
        """Who is connected, in the order of the job."""
        return tuple(self.handlers)

    def ask(self, messages: Mapping[str, Message], reply: type[M]) -> dict[str, M]:
        """Ask one member after the other."""
        replies = {}
        for member, message in messages.items():
            sent = encode(message)
            self.ledger.traffic[self.down] += len(sent)
            answered = encode(self.handlers[member](decode_any(sent)))
            self.ledger.traffic[self.up] += len(answered)
            replies[member] = decode(answered, reply, f"reply of {member}")
        return replies


def device_handler(
    attributes: DeviceAttributes,
    data: Split,
    memories: MemoryFolder,
    torch_device: torch.device = CPU,
    ledger: PrivacyLedger | None = None,
) -> Handler:
    """A device whose memory lives in files: a message that is repeated after a kill meets the memory it met before."""

    def answer(message: Message) -> Message:
        if not isinstance(message, DeviceMessage):
            raise ValueError(f"device {attributes.device_id}: cannot answer a {message.kind!r}")
        if ledger:
            ledger.admit(message)
        memory = memories.load(message.step - 1, DeviceMemory) if message.step else DeviceMemory()
        privacy = ledger.privacy if ledger else None
        state, reply = handle(DeviceState(attributes, data, memory, torch_device, privacy), message)
        memories.save(message.step, state.memory)
        return reply

    return answer


def fleet_of(job: Job) -> dict[str, tuple[DeviceAttributes, ...]]:
    """The devices of every cluster, named <cluster>-<number>; clusters by k-means where the job names none.

    ``num_samples`` is filled in when the data is there.
    """
    devices: list[tuple[str | None, DeviceAttributes]] = []
    for group in job.fleet.devices:
        energies = _energies(group, job.fleet.energy)
        for i in range(group.count):
            energy = energies[i % len(energies)]
            limit = group.storage_limit[i % len(group.storage_limit)]
            name = f"device{len(devices) + 1}"
            attributes = DeviceAttributes(device_id=name, storage_limit_bytes=limit, energy=energy, num_samples=0)
            devices.append((group.cluster, attributes))
    clusters: dict[str, tuple[DeviceAttributes, ...]]
    if devices[0][0] is None:
        number = job.fleet.num_clusters or min(3, len(devices))
        clusters = form_clusters([a for _, a in devices], number, job.seed)
    else:
        names = dict.fromkeys(str(cluster) for cluster, _ in devices)
        clusters = {name: tuple(a for cluster, a in devices if cluster == name) for name in names}
    return {
        cluster: tuple(a.model_copy(update={"device_id": f"{cluster}-{i}"}) for i, a in enumerate(members, start=1))
        for cluster, members in clusters.items()
    }


def _energies(group: DeviceGroup, constants: EnergyConfig) -> tuple[EnergyModel, ...]:
    """Constants of a group's devices, to be dealt out in turn."""
    if group.profile is not None:
        return (group.profile.energy,)
    return tuple(
        EnergyModel(
            power_watts=watts,
            power_slope_watts=watts * constants.power_slope_share,
            patch_power_watts=watts * constants.patch_power_share,
            latency_seconds=constants.latency_seconds,
            latency_slope_seconds=constants.latency_seconds * constants.latency_slope_share,
        )
        for watts in group.gpu_capacity or ()
    )


def run(job: Job, out: str | Path, progress: Progress = silent) -> dict[str, Any]:
    """Run a job on this machine; a folder with a run that was killed is gone on with.

    Args:
        job: The resolved job.
        out: The run folder.
        progress: Told how far each phase is.

    Returns:
        The summary, as in summary.json.

    Raises:
        ValueError: bad data, limits that nothing fits, a damaged run folder, a loss that is not finite.
        OSError: the folder cannot be written.
        ImportError: the job asks for privacy, and its accountant is missing.
    """
    torch.set_num_threads(job.run.threads)
    torch_device_of(job.run.torch_device)  # what is not there is told before anything is done
    tell_promise(job, progress)
    with RunFolder(Path(out), job) as folder:
        progress("data", 0, 1, job.data.source)
        samples = load_samples(job, progress)
        fleet = fleet_of(job)
        data = share_out(
            samples, job.data, {c: [a.device_id for a in members] for c, members in fleet.items()}, job.seed
        )
        progress("data", 1, 1, ", ".join((f"{len(samples)} samples", *samples.notes, *data.notes)))
        result = _run_tiers(job, folder, fleet, data, progress)
        summary = summarise(job, folder, data, result)
        write_models(job, folder, result, samples)
        folder.write_json("summary.json", summary)
    return summary


def _run_tiers(
    job: Job,
    folder: RunFolder,
    fleet: Mapping[str, tuple[DeviceAttributes, ...]],
    data: FleetData,
    progress: Progress,
) -> FleetResult:
    torch_device = torch_device_of(job.run.torch_device)
    device_links = {}
    for cluster, members in fleet.items():
        handlers = {}
        for attributes in members:
            own = data.devices[attributes.device_id]
            known = attributes.model_copy(update={"num_samples": len(own.train) + len(own.validation)})
            memories = folder.memory_of(known.device_id)
            ledger = ledger_of(memories.folder, job)
            handlers[known.device_id] = device_handler(known, own, memories, torch_device, ledger)
        device_links[cluster] = LocalLink(handlers, folder.ledger, "edge_to_device", "device_to_edge")

    def edge_handler(cluster: str) -> Handler:
        def answer(message: Message) -> Message:
            if isinstance(message, StatsRequest):
                return gather_stats(cluster, device_links[cluster], folder.steps)
            if isinstance(message, BackboneAssignment):
                return run_edge(job, message, data.edges[cluster], device_links[cluster], folder.steps, progress)
            raise ValueError(f"edge {cluster}: cannot answer a {message.kind!r}")

        return answer

    edges = LocalLink({c: edge_handler(c) for c in fleet}, folder.ledger, "cloud_to_edge", "edge_to_cloud")
    cache = StepFolder(Path(job.run.cache).expanduser(), Ledger())
    return run_cloud(job, data.public, edges, folder.steps, cache, progress)
