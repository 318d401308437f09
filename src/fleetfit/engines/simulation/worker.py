"""What runs in a Ray process: the ClientApp of all simulated devices. The same device code as everywhere, from files.

A process answers for whichever device has a message; nothing of a device stays in it. It ends itself when the folder of
the simulation is gone, so that a stop does not wait for devices that are at work.
"""

import functools
import os
import threading
import time
from pathlib import Path

import torch
from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from fleetfit.config.job import Job, load_job
from fleetfit.core.bounds import FROM_ABOVE
from fleetfit.core.checkpoints import MemoryFolder
from fleetfit.core.encoding import encode
from fleetfit.core.hardware import CPU, torch_device_of
from fleetfit.device.handler import declining, device_handler
from fleetfit.device.privacy_ledger import ledger_of
from fleetfit.edge.messages import decode_any
from fleetfit.engines.flower.codec import pack, unpack
from fleetfit.engines.simulation.device_files import read_device

NUMBER = "partition-id"  # Flower's name for the number of a simulated node
LOOK_EVERY_SECONDS = 1.0


def device_app(folder: Path, threads: int, torch_device: str, max_message_bytes: int) -> ClientApp:
    """The app of all devices of a hand-over folder; it is sent to Ray's processes with every message, so it is small.

    Args:
        folder: As ``handover`` wrote it.
        threads: CPU threads of a device at work.
        torch_device: Its hardware, as ``run.torch_device``.
        max_message_bytes: The most that a message to a device may have.
    """
    app = ClientApp()
    app.query()(functools.partial(answer, str(folder.resolve()), threads, torch_device, max_message_bytes))
    return app


def answer(
    folder: str, threads: int, torch_device: str, max_message_bytes: int, message: FlowerMessage, context: Context
) -> FlowerMessage:
    """One message to one device, in the process of a Ray worker.

    Raises:
        OSError: the folder is not there: it must be on storage that all machines of the cluster share.
    """
    _begin(folder, threads)
    device = read_device(Path(folder), int(context.node_config[NUMBER]))
    hardware = torch_device_of(torch_device) if torch_device != "cpu" else CPU
    ledger = ledger_of(device.memory, _job(Path(folder)))
    handler = declining(device_handler(device.attributes, device.data, MemoryFolder(device.memory), hardware, ledger))
    reply = handler(decode_any(unpack(message.content, max_message_bytes), "it", FROM_ABOVE))
    return FlowerMessage(pack(encode(reply)), reply_to=message)


@functools.cache
def _job(folder: Path) -> Job:
    """The run's own job, in whose folder the hand-over lies."""
    return load_job(folder.parent / "job.toml")


@functools.cache
def _begin(folder: str, threads: int) -> None:
    """Once in a process."""
    torch.set_num_threads(threads)
    if not Path(folder).is_dir():
        raise OSError(f"{folder} is not there: all machines must share the storage of the run folder")
    threading.Thread(target=_end_with, args=(Path(folder),), daemon=True).start()


def _end_with(folder: Path) -> None:
    while folder.is_dir():
        time.sleep(LOOK_EVERY_SECONDS)
    os._exit(0)
