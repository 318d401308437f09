"""Who answers at the other end of a link, whatever carries it: a device whose memory lives in files, and an edge."""

from collections.abc import Callable

import torch

from fleetfit.artifacts import MemoryFolder
from fleetfit.config import Job
from fleetfit.data.partition import Split
from fleetfit.device import DeviceMemory, DeviceState, handle
from fleetfit.hardware import CPU
from fleetfit.messages import BackboneAssignment, Checkpoints, DeviceMessage, Link, Message, Progress, StatsRequest
from fleetfit.pipeline import gather_stats, run_edge
from fleetfit.records import DeviceAttributes

Handler = Callable[[Message], Message]


def device_handler(
    attributes: DeviceAttributes, data: Split, memories: MemoryFolder, torch_device: torch.device = CPU
) -> Handler:
    """A device whose memory lives in files: a message that is repeated after a kill meets the memory it met before."""

    def answer(message: Message) -> Message:
        if not isinstance(message, DeviceMessage):
            raise ValueError(f"device {attributes.device_id}: cannot answer a {message.kind!r}")
        memory = memories.load(message.step - 1, DeviceMemory) if message.step else DeviceMemory()
        state, reply = handle(DeviceState(attributes, data, memory, torch_device), message)
        memories.save(message.step, state.memory)
        return reply

    return answer


def edge_handler(job: Job, cluster: str, data: Split, devices: Link, steps: Checkpoints, progress: Progress) -> Handler:
    """An edge that goes on from its finished steps: asked again after a kill, it does what is left.

    Args:
        job: The resolved job.
        cluster: Its name.
        data: The edge's shared set.
        devices: The cluster's devices.
        steps: Finished steps of this run.
        progress: Told how far each phase is.
    """

    def answer(message: Message) -> Message:
        if isinstance(message, StatsRequest):
            return gather_stats(cluster, devices, steps)
        if isinstance(message, BackboneAssignment):
            return run_edge(job, message, data, devices, steps, progress)
        raise ValueError(f"edge {cluster}: cannot answer a {message.kind!r}")

    return answer
