"""Who answers at the other end of a link, whatever carries it: a device whose memory lives in files, and an edge."""

import logging
from collections.abc import Callable, Mapping

import torch

from fleetfit.artifacts import MemoryFolder
from fleetfit.bounds import FewLines
from fleetfit.config import Job
from fleetfit.data.partition import Split
from fleetfit.device import DeviceMemory, DeviceState, handle
from fleetfit.hardware import CPU
from fleetfit.messages import (
    AttributesRequest,
    BackboneAssignment,
    Checkpoints,
    CoarseModel,
    Declined,
    DeviceMessage,
    Link,
    Message,
    Progress,
    StatsRequest,
    printable,
)
from fleetfit.pipeline import gather_stats, run_edge
from fleetfit.privacy_ledger import PrivacyLedger
from fleetfit.records import DeviceAttributes

Handler = Callable[[Message], Message]
logger = logging.getLogger(__name__)
logger.addFilter(FewLines())
BEGIN = (AttributesRequest, CoarseModel)  # messages that need no memory


def device_handler(
    attributes: DeviceAttributes,
    data: Split,
    memories: MemoryFolder,
    torch_device: torch.device = CPU,
    ledger: PrivacyLedger | None = None,
) -> Handler:
    """A device whose memory lives in files: a message that is repeated after a kill meets the memory it met before.

    With a ledger, what it answers is clipped and noised, and each step is answered once.
    """

    def answer(message: Message) -> Message:
        if not isinstance(message, DeviceMessage):
            raise ValueError(f"device {attributes.device_id}: cannot answer a {message.kind!r}")
        if ledger:
            ledger.admit(message)
        # The coarse model begins anew, whatever there was: the device may know another run.
        known = None if isinstance(message, BEGIN) else memories.before(message.step, DeviceMemory)
        before = known or DeviceMemory()
        privacy = ledger.privacy if ledger else None
        try:
            state, reply = handle(DeviceState(attributes, data, before, torch_device, privacy), message)
        except Exception as error:
            if ledger is None:
                raise
            # What goes wrong on private data may tell of it.
            raise ValueError("privacy: what went wrong is in this device's own log") from error
        if state.memory is not before:
            memories.save(message.step, state.memory)
        return reply

    return answer


def declining(answer: Handler) -> Handler:
    """The same, but what a device cannot do is told to its edge instead of ending the program."""

    def answer_or_decline(message: Message) -> Message:
        try:
            return answer(message)
        except Exception as error:  # of a message, which may ask for anything
            logger.exception("cannot answer a %s", message.kind)
            return Declined(reason=printable(str(error)))

    return answer_or_decline


def edge_handler(
    job: Job,
    cluster: str,
    data: Split,
    devices: Link,
    steps: Checkpoints,
    progress: Progress,
    known: Mapping[str, DeviceAttributes] | None = None,
) -> Handler:
    """An edge that goes on from its finished steps: asked again after a kill, it does what is left.

    Args:
        job: The resolved job.
        cluster: Its name.
        data: The edge's shared set.
        devices: The cluster's devices.
        steps: Finished steps of this run.
        progress: Told how far each phase is.
        known: What is known of the devices' hardware, whatever they say.
    """

    def answer(message: Message) -> Message:
        if isinstance(message, StatsRequest):
            return gather_stats(job, cluster, devices, steps, known)
        if isinstance(message, BackboneAssignment):
            return run_edge(job, message, data, devices, steps, progress)
        raise ValueError(f"edge {cluster}: cannot answer a {message.kind!r}")

    return answer
