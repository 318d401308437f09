"""A whole fleet run from one process, which has all data: load, share out, connect the devices, run, write the results.

Cloud and edges are in this process; where the devices are is the engine's choice.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from fleetfit.cloud.clusters import Fleet, fleet_notes, fleet_of
from fleetfit.cloud.run import FleetResult, run_cloud
from fleetfit.config.job import Job
from fleetfit.config.sections import LinksConfig
from fleetfit.core.bounds import FROM_ABOVE, FROM_DEVICE, MAX_MESSAGE_RULE, Bounds
from fleetfit.core.checkpoints import Ledger
from fleetfit.core.encoding import Message, Request, encode
from fleetfit.core.hardware import torch_device_of
from fleetfit.core.link import Handler, Link, Refused
from fleetfit.core.progress import Progress
from fleetfit.core.records import DeviceAttributes
from fleetfit.data.partition import FleetData, share_out
from fleetfit.data.sources import load_samples
from fleetfit.device.privacy import tell_promise
from fleetfit.edge.messages import decode_any, read_reply
from fleetfit.edge.run import edge_handler
from fleetfit.runs.folder import RunFolder
from fleetfit.runs.summary import raw_bytes, summarise, write_devices, write_front, write_models
from fleetfit.runs.tracking import tracking

Connect = Callable[[RunFolder, Fleet, FleetData], AbstractContextManager[Mapping[str, Link]]]


class LocalLink:
    """Members in this process. Messages cross it in their encoded form only, so what is counted is what would travel.

    Args:
        handlers: What answers for each member.
        ledger: Where bytes are counted.
        down: Name of the direction to the members.
        up: Name of the direction from them.
        links: How long a message may be. There is no deadline: in one process all reply.
    """

    def __init__(
        self, handlers: Mapping[str, Handler], ledger: Ledger, down: str, up: str, links: LinksConfig | None = None
    ) -> None:
        self.handlers = handlers
        self.ledger = ledger
        self.down = down
        self.up = up
        self.max_bytes = (links or LinksConfig()).max_message_bytes

    @property
    def members(self) -> tuple[str, ...]:
        """Who is connected, in the order of the job."""
        return tuple(self.handlers)

    def ask(self, messages: Mapping[str, Request], bounds: Bounds = FROM_DEVICE) -> dict[str, Message | Refused]:
        """Ask one member after the other."""
        bounds = bounds.within(self.max_bytes, MAX_MESSAGE_RULE)
        replies = {}
        for member, message in messages.items():
            sent = encode(message)
            self.ledger.traffic[self.down] += len(sent)
            answers = self.deliver(member, sent)
            self.ledger.traffic[self.up] += sum(len(answer) for answer in answers)
            if answers:
                replies[member] = read_reply(answers, message, bounds)
        return replies

    def deliver(self, member: str, sent: bytes) -> list[bytes]:
        """What comes back for a message, encoded: here always one reply."""
        bounds = FROM_ABOVE.within(self.max_bytes, MAX_MESSAGE_RULE)
        return [encode(self.handlers[member](decode_any(sent, f"message to {member}", bounds)))]


def run_whole_fleet(job: Job, out: Path, progress: Progress, connect: Connect) -> dict[str, Any]:
    """Run a job; a folder with a run that was killed is gone on with.

    Args:
        job: The resolved job.
        out: The run folder.
        progress: Told how far each phase is.
        connect: Makes the link of every edge to its devices, and takes them down in the end. It is given devices as
            they are known when the data is there.

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
    with RunFolder(out, job) as folder, tracking(job, out, progress) as progress:
        progress("data", 0, 1, job.data.source)
        samples = load_samples(job, progress)
        fleet = fleet_of(job)
        data = share_out(
            samples, job.data, {c: [a.device_id for a in members] for c, members in fleet.items()}, job.seed
        )
        assert samples.summary is not None, "it is of a whole source"
        read = samples.summary.model_copy(update={"notes": (*samples.summary.notes, *data.notes)})
        folder.claim_data(read)
        if data.groups:  # for the reader of a study; no edge and no device sees them
            folder.write_json("groups.json", dict(data.groups))
        progress("data", 1, 1, f"{len(samples):,} samples")
        for line in (*read.lines, *fleet_notes(job, fleet)):
            progress("data", 0, 0, line)
        known = {cluster: tuple(counted(a, data) for a in members) for cluster, members in fleet.items()}
        with connect(folder, known, data) as links:
            result = _run_tiers(job, folder, links, data, progress)
        summary = summarise(job, folder, raw_bytes(data), result, read)
        write_front(folder, result)
        write_models(job, folder, result, samples)
        write_devices(folder, summary)
        folder.write_json("summary.json", summary)
        progress.finish(summary)
    return summary


def counted(attributes: DeviceAttributes, data: FleetData) -> DeviceAttributes:
    """A device as it is known when its data is there: with the number of its samples for training and validation."""
    own = data.devices[attributes.device_id]
    return attributes.model_copy(update={"num_samples": len(own.train) + len(own.validation)})


def _run_tiers(
    job: Job, folder: RunFolder, links: Mapping[str, Link], data: FleetData, progress: Progress
) -> FleetResult:
    cache = folder.cache(progress)
    edges = {
        cluster: edge_handler(job, cluster, data.edges[cluster], devices, folder.steps, progress, cache=cache)
        for cluster, devices in links.items()
    }
    link = LocalLink(edges, folder.ledger, "cloud_to_edge", "edge_to_cloud", job.links)
    return run_cloud(job, data.public, link, folder.steps, cache, progress)
