"""The local engine: all tiers in one process, every message encoded, counted and decoded as on a wire."""

import math
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from fleetfit.artifacts import Ledger, MemoryFolder, ModelCard, RunFolder, StepFolder
from fleetfit.cloud import form_clusters
from fleetfit.config import Job
from fleetfit.data.partition import FleetData, Split, share_out
from fleetfit.data.sources import Samples, load_samples
from fleetfit.device import DeviceMemory, DeviceState, handle, shipped_model
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
from fleetfit.pipeline import FleetResult, gather_stats, run_cloud, run_edge
from fleetfit.records import DeviceAttributes, EnergyModel, Record

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


def device_handler(attributes: DeviceAttributes, data: Split, memories: MemoryFolder) -> Handler:
    """A device whose memory lives in files: a message that is repeated after a kill meets the memory it met before."""

    def answer(message: Message) -> Message:
        if not isinstance(message, DeviceMessage):
            raise ValueError(f"device {attributes.device_id}: cannot answer a {message.kind!r}")
        memory = memories.load(message.step - 1, DeviceMemory) if message.step else DeviceMemory()
        state, reply = handle(DeviceState(attributes, data, memory), message)
        memories.save(message.step, state.memory)
        return reply

    return answer


def fleet_of(job: Job) -> dict[str, tuple[DeviceAttributes, ...]]:
    """The devices of every cluster, named <cluster>-<number>; clusters by k-means where the job names none.

    ``num_samples`` is filled in when the data is there.
    """
    constants = job.fleet.energy
    devices: list[tuple[str | None, DeviceAttributes]] = []
    for group in job.fleet.devices:
        for i in range(group.count):
            watts = group.gpu_capacity[i % len(group.gpu_capacity)]
            energy = EnergyModel(
                power_watts=watts,
                power_slope_watts=watts * constants.power_slope_share,
                patch_power_watts=watts * constants.patch_power_share,
                latency_seconds=constants.latency_seconds,
                latency_slope_seconds=constants.latency_seconds * constants.latency_slope_share,
            )
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
    """
    torch.set_num_threads(job.run.threads)
    with RunFolder(Path(out), job) as folder:
        progress("data", 0, 1, job.data.source)
        samples = load_samples(job.data)
        fleet = fleet_of(job)
        data = share_out(
            samples, job.data, {c: [a.device_id for a in members] for c, members in fleet.items()}, job.seed
        )
        progress("data", 1, 1, f"{len(samples)} samples")
        result = _run_tiers(job, folder, fleet, data, progress)
        summary = _summary(job, folder, fleet, data, result)
        _write(job, folder, result, samples)
        folder.write_json("summary.json", summary)
    return summary


def _run_tiers(
    job: Job,
    folder: RunFolder,
    fleet: Mapping[str, tuple[DeviceAttributes, ...]],
    data: FleetData,
    progress: Progress,
) -> FleetResult:
    device_links = {}
    for cluster, members in fleet.items():
        handlers = {}
        for attributes in members:
            own = data.devices[attributes.device_id]
            known = attributes.model_copy(update={"num_samples": len(own.train) + len(own.validation)})
            handlers[known.device_id] = device_handler(known, own, folder.memory_of(known.device_id))
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


def _write(job: Job, folder: RunFolder, result: FleetResult, samples: Samples) -> None:
    """The table of candidates, the cloud's view for the report, and every device's model."""
    rows = []
    for cluster, choice in result.choices.items():
        for i, candidate in enumerate(result.candidates.candidates):
            coordinates = choice.coordinates[i] or ("", "", "")
            rows.append(
                {
                    "cluster": cluster,
                    "width": candidate.shape.width,
                    "depth": candidate.shape.depth,
                    "loss": candidate.loss,
                    "accuracy": candidate.accuracy,
                    "energy_joules": choice.energy_joules[i],
                    "parameters": candidate.parameters,
                    "size_bytes": candidate.size_bytes,
                    "zeta": candidate.zeta,
                    "fits": choice.fits[i],
                    "grid_loss": coordinates[0],
                    "grid_energy": coordinates[1],
                    "grid_size": coordinates[2],
                    "on_front": choice.on_front[i],
                    "trade_off": choice.trade_off[i],
                    "trade_off_accuracy": choice.trade_off_accuracy[i],
                    "chosen_by": " ".join(name for name, index in choice.chosen_by.items() if index == i),
                    "chosen": choice.chosen == i,
                }
            )
    folder.write_table("cloud/front.csv", rows)
    last_step = job.refine.rounds + 3
    form = samples.preprocessing
    for cluster, report in result.reports.items():
        shape = result.candidates.candidates[result.choices[cluster].chosen].shape
        for device in report.devices:
            memory = folder.memory_of(device.device_id).load(last_step, DeviceMemory)
            card = ModelCard(
                device_id=device.device_id,
                cluster=cluster,
                family=memory.family,
                config=memory.config,
                header=memory.header,
                labels=memory.labels,
                width=shape.width,
                depth=shape.depth,
                inputs=form.words if form else f"samples as data.source {job.data.source!r} gives them",
                preprocessing=form,
                size_bytes=device.size_bytes,
                limit_bytes=device.limit_bytes,
                accuracy=device.accuracy,
            )
            folder.write_device(shipped_model(memory), card)


class ClusterSummary(Record):
    """One cluster's line of the summary."""

    id: str
    limit_bytes: int
    width: float
    depth: int
    parameters: int
    size_bytes: int
    energy_joules: float
    loss: float
    accuracy: float
    header: str


def _known(value: float) -> float | None:
    """A measured share, or None where there was nothing to measure it on."""
    return None if math.isnan(value) else value


def _summary(
    job: Job,
    folder: RunFolder,
    fleet: Mapping[str, tuple[DeviceAttributes, ...]],
    data: FleetData,
    result: FleetResult,
) -> dict[str, Any]:
    traffic = folder.ledger.traffic
    raw = sum(
        (len(d.train) + len(d.validation) + len(d.test)) * d.train.raw_bytes_per_sample for d in data.devices.values()
    )
    clusters = []
    for cluster, choice in result.choices.items():
        candidate = result.candidates.candidates[choice.chosen]
        clusters.append(
            ClusterSummary(
                id=cluster,
                limit_bytes=choice.limit_bytes,
                width=candidate.shape.width,
                depth=candidate.shape.depth,
                parameters=candidate.parameters,
                size_bytes=candidate.size_bytes,
                energy_joules=choice.energy_joules[choice.chosen],
                loss=candidate.loss,
                accuracy=candidate.accuracy,
                header=result.reports[cluster].header.kind,
            )
        )
    devices = [
        {
            "id": d.device_id,
            "cluster": cluster,
            "accuracy_coarse": d.accuracy_coarse,
            "accuracy_local": d.accuracy_local,
            "accuracy": d.accuracy,
            "parameters": d.parameters,
            "size_bytes": d.size_bytes,
            "limit_bytes": d.limit_bytes,
            "notes": list(d.notes),
        }
        for cluster, report in result.reports.items()
        for d in report.devices
    ]
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "method": job.method,
        "seed": job.seed,
        "reference": {"accuracy": _known(result.reference.accuracy), "parameters": result.reference.parameters},
        "clusters": [c.model_dump() for c in clusters],
        "devices": devices,
        "traffic": {
            "device_to_edge_bytes": traffic["device_to_edge"],
            "edge_to_device_bytes": traffic["edge_to_device"],
            "edge_to_cloud_bytes": traffic["edge_to_cloud"],
            "cloud_to_edge_bytes": traffic["cloud_to_edge"],
            "raw_data_bytes": raw,
            "upload_ratio": traffic["device_to_edge"] / raw,
        },
        "seconds": {phase: round(s, 3) for phase, s in folder.ledger.seconds.items()},
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
    }
