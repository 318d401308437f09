"""The hand-over: what a device's process reads is what the device has, and no process reads more than it looks at."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.supercore.task_identity import TaskIdentity

from fleetfit.cloud.clusters import fleet_of
from fleetfit.config.job import make_job
from fleetfit.core.bounds import FROM_DEVICE
from fleetfit.core.encoding import Declined, Message, encode
from fleetfit.core.link import Refused
from fleetfit.data.partition import Split, share_out
from fleetfit.data.samples import Inputs, Samples
from fleetfit.data.sources import load_samples
from fleetfit.device.messages import AttributesReply, AttributesRequest, RefineRound
from fleetfit.edge.messages import decode_any, read_reply
from fleetfit.engines.flower.codec import pack, unpack
from fleetfit.engines.simulation import device_files as handover
from fleetfit.engines.simulation import worker as simulated_device
from fleetfit.engines.simulation.device_files import SimulatedDevice, read_device, write_handover
from fleetfit.engines.simulation.worker import NUMBER, answer, device_app


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> list[SimulatedDevice]:
    job = make_job({"data": {"split": "classes", "limit": 400}})
    fleet = fleet_of(job)
    data = share_out(load_samples(job), job.data, {c: [a.device_id for a in m] for c, m in fleet.items()}, 0)
    memories = tmp_path_factory.mktemp("memories")
    return [
        SimulatedDevice(a, data.devices[a.device_id], memories / a.device_id)
        for members in fleet.values()
        for a in members
    ]


@pytest.fixture(autouse=True)
def forget() -> None:
    handover._shared.cache_clear()


def same(a: Samples, b: Samples) -> None:
    assert torch.equal(a.inputs[:], b.inputs[:])
    assert torch.equal(a.labels, b.labels)
    assert (a.label_names, a.raw_bytes_per_sample, a.inputs.form) == (
        b.label_names,
        b.raw_bytes_per_sample,
        b.inputs.form,
    )


def test_every_device_reads_its_own(devices: list[SimulatedDevice], tmp_path: Path) -> None:
    write_handover(tmp_path, devices)
    for number, device in enumerate(devices):
        read = read_device(tmp_path, number)
        assert (read.attributes, read.memory) == (device.attributes, device.memory)
        for name in ("train", "validation", "test"):
            same(getattr(read.data, name), getattr(device.data, name))
    # One device's file is small: the data are in the store, once.
    assert (tmp_path / "store.npy").stat().st_size == 1797 * 64 + 128
    assert max(f.stat().st_size for f in tmp_path.glob("*.safetensors")) < 2000


def test_a_store_in_a_file_is_mapped_from_there(tmp_path: Path, devices: list[SimulatedDevice]) -> None:
    """Images are in the cache: they are neither copied nor read before they are looked up."""
    path = tmp_path / "pixels.npy"
    np.save(path, np.arange(5 * 4, dtype=np.uint8).reshape(5, 1, 2, 2))
    store = torch.from_numpy(np.load(path))
    rows = torch.tensor([3, 1])
    own = Samples(Inputs(store, rows, path=path), torch.tensor([0, 1]), ("a", "b"), 4)
    folder = tmp_path / "handover"
    folder.mkdir()
    device = SimulatedDevice(devices[0].attributes, Split(own, own.rows(rows[:0]), own.rows(rows[:0])), tmp_path)
    write_handover(folder, [device])
    assert not (folder / "store.npy").exists()
    read = read_device(folder, 0).data
    assert read.train.inputs[:].flatten().tolist() == [12, 13, 14, 15, 4, 5, 6, 7]
    assert len(read.validation) == len(read.test) == 0
    changed = np.load(path, mmap_mode="r+")
    changed[3] = 9
    changed.flush()
    assert read.train.inputs[:1].flatten().tolist() == [9] * 4  # it was not read before


# -- the app ----------------------------------------------------------------------------------------------------------


class Node:
    """A node of the simulation without Ray."""

    def __init__(self, folder: Path, number: int, limit: int = 10**6) -> None:
        self.app = device_app(folder, 1, "cpu", limit)
        self.context = Context(1, 7, {NUMBER: number}, RecordDict(), {})

    def ask(self, message: Message) -> Message | Refused:
        sent = FlowerMessage(pack(encode(message)), 7, "query")
        sent.metadata.__dict__["_message_id"] = "message"
        reply = self.app(sent, self.context)
        assert reply.metadata.reply_to_message_id == "message"
        return decode_any(unpack(reply.content, 10**6))


@pytest.fixture
def folder(devices: list[SimulatedDevice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(simulated_device, "_begin", lambda folder, threads: None)  # it would end the tests' process
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    path = tmp_path / "handover"
    path.mkdir()
    write_handover(path, devices)
    (tmp_path / "job.toml").write_text("")  # the run's own: here all defaults
    return path


def test_a_node_is_the_device_of_its_number(folder: Path, devices: list[SimulatedDevice]) -> None:
    for number in (0, 7):
        reply = Node(folder, number).ask(AttributesRequest(step=0))
        assert isinstance(reply, AttributesReply)
        assert reply.attributes == devices[number].attributes


def test_what_a_device_cannot_do_is_declined_not_tried_again(folder: Path, devices: list[SimulatedDevice]) -> None:
    request = RefineRound(step=2, round=1)
    reply = Node(folder, 1).ask(request)
    assert isinstance(reply, Declined)
    refused = read_reply([encode(reply)], request, FROM_DEVICE)
    assert isinstance(refused, Refused)


def test_a_message_that_is_too_long_is_not_read(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"links\.max_message_bytes is 10"):
        Node(folder, 1, limit=10).ask(AttributesRequest(step=0))


def test_the_app_goes_to_ray_without_the_data(folder: Path) -> None:
    """It crosses with every message."""
    from ray import cloudpickle

    assert len(cloudpickle.dumps(Node(folder, 0).app)) < 2000


def test_a_machine_that_does_not_share_the_storage_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone is not there: all machines must share the storage"):
        answer(str(tmp_path / "gone"), 1, "cpu", 100, None, None)  # type: ignore[arg-type]
