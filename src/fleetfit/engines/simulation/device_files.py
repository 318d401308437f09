"""What the processes of simulated devices are given: who each device is, and which rows of one store are its own.

The folder is there while a simulation runs:

samples.json            what all devices share
store.npy               the values of all samples, unless they are in such a file already (images are, in the cache)
<number>.safetensors    one device: row numbers and labels of its splits, and its attributes; values that are its own
                        (data.shift) lie here too

A process maps the store into memory and reads one small file a device: no data set is copied, none is in a message.
"""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fleetfit.core.files import write_atomically
from fleetfit.core.records import DeviceAttributes, Record
from fleetfit.data.partition import Split
from fleetfit.data.preprocessing import Form
from fleetfit.data.samples import Inputs, Samples

SPLITS = ("train", "validation", "test")
SHARED_FILE = "samples.json"


class SharedSamples(Record):
    """samples.json: what all devices' samples have in common."""

    store: str
    form: Form | None
    label_names: tuple[str, ...]
    raw_bytes_per_sample: int


@dataclass(frozen=True)
class SimulatedDevice:
    """One device: its hardware, its private data, and the folder of its memory."""

    attributes: DeviceAttributes
    data: Split
    memory: Path


def write_handover(folder: Path, devices: Sequence[SimulatedDevice]) -> None:
    """Write all devices, numbered from 0; but for shifted ones, their samples are of one store.

    Args:
        folder: Where to; it is there.
        devices: At least one.

    Raises:
        OSError: the folder cannot be written.
    """
    parts = [part for device in devices for part in _parts(device.data).values()]
    samples = max(parts, key=lambda part: len(part.inputs.store))  # shifted samples have a small store of their own
    common = samples.inputs.store.data_ptr()
    path = samples.inputs.path
    if path is None:
        path = folder / "store.npy"
        np.save(path, samples.inputs.store.numpy(), allow_pickle=False)
    shared = SharedSamples(
        store=str(path.resolve()),
        form=samples.inputs.form,
        label_names=samples.label_names,
        raw_bytes_per_sample=samples.raw_bytes_per_sample,
    )
    write_atomically(folder / SHARED_FILE, shared.model_dump_json())
    for number, device in enumerate(devices):
        tensors: dict[str, Tensor] = {}
        for name, part in _parts(device.data).items():
            tensors |= {f"{name}.rows": part.inputs.index, f"{name}.labels": part.labels}
            if part.inputs.store.data_ptr() != common:
                tensors[f"{name}.store"] = part.inputs.store
        # Labels and rows may be views of one another's memory, which the format refuses.
        tensors = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        metadata = {"attributes": device.attributes.model_dump_json(), "memory": str(device.memory.resolve())}
        (folder / f"{number}.safetensors").write_bytes(safetensors.torch.save(tensors, metadata))


def read_device(folder: Path, number: int) -> SimulatedDevice:
    """One device; its inputs stay in their file until they are looked up.

    Raises:
        OSError: the folder is not there.
    """
    shared, store = _shared(folder)
    with safetensors.safe_open(folder / f"{number}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)

    def split(name: str) -> Samples:
        own = tensors.get(f"{name}.store")
        path = Path(shared.store) if own is None else None
        inputs = Inputs(store if own is None else own, tensors[f"{name}.rows"], shared.form, path=path)
        return Samples(inputs, tensors[f"{name}.labels"], shared.label_names, shared.raw_bytes_per_sample)

    attributes = DeviceAttributes.model_validate_json(metadata["attributes"])
    more = split("unlabelled") if "unlabelled.rows" in tensors else None
    data = Split(split("train"), split("validation"), split("test"), unlabelled=more)
    return SimulatedDevice(attributes, data, Path(metadata["memory"]))


def _parts(data: Split) -> dict[str, Samples]:
    """All that a device has, by name."""
    parts: dict[str, Samples] = {name: getattr(data, name) for name in SPLITS}
    return parts if data.unlabelled is None else {**parts, "unlabelled": data.unlabelled}


@functools.cache
def _shared(folder: Path) -> tuple[SharedSamples, Tensor]:
    """Read once in a process, which answers for many devices."""
    shared = SharedSamples.model_validate_json((folder / SHARED_FILE).read_text(encoding="utf-8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may not be written to, and nobody does
        return shared, torch.from_numpy(np.load(shared.store, mmap_mode="r", allow_pickle=False))
