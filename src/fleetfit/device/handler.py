"""Who answers at the other end of a link, whatever carries it: a device whose memory lives in files, and an edge."""

import logging

import torch

from fleetfit.core.bounds import FewLines
from fleetfit.core.checkpoints import MemoryFolder
from fleetfit.core.encoding import Declined, Message, printable
from fleetfit.core.hardware import CPU
from fleetfit.core.link import Handler
from fleetfit.core.records import DeviceAttributes
from fleetfit.data.partition import Split
from fleetfit.device.device import DeviceState, handle
from fleetfit.device.memory import DeviceMemory
from fleetfit.device.messages import AttributesRequest, CoarseModel, DeviceMessage
from fleetfit.device.privacy_ledger import PrivacyLedger

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
