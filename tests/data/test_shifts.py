"""Hidden groups: the same for every engine, by the seed, and really other data."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from fleetfit.cloud.clusters import fleet_of
from fleetfit.config.job import Job, make_job
from fleetfit.data.partition import FleetData, share_out
from fleetfit.data.samples import Samples
from fleetfit.data.shifts import classes_of_groups, hidden_groups, swapped_classes
from fleetfit.data.sources import load_samples
from fleetfit.engines.simulation.device_files import SimulatedDevice, read_device, write_handover


def shared_out(**data: object) -> tuple[Job, Samples, FleetData]:
    fleet = {"devices": [{"count": 6, "cluster": "a", "storage_limit": "1 MB"}]}
    job = make_job({"data": {"split": "iid", "groups": 3, **data}, "fleet": fleet})
    samples = load_samples(job)
    return job, samples, share_out(samples, job.data, {"a": [d.device_id for d in fleet_of(job)["a"]]}, job.seed)


def test_groups_are_by_the_seed_and_as_equal_as_can_be() -> None:
    config = make_job({"data": {"split": "groups", "groups": 4}}).data
    names = [f"d{i}" for i in range(10)]
    groups = hidden_groups(config, "a", names, 0)
    assert sorted(Counter(groups.values()).values()) == [2, 2, 3, 3]
    assert groups == hidden_groups(config, "a", names, 0)
    assert groups != hidden_groups(config, "a", names, 1)
    assert hidden_groups(make_job({}).data, "a", names, 0) == {}


def test_groups_of_classes_share_none() -> None:
    job, _, data = shared_out(split="groups")
    owner = classes_of_groups(job.data, 10, job.seed)
    assert sorted(Counter(owner.tolist()).values()) == [3, 3, 4]
    for device, own in data.devices.items():
        labels = torch.cat([own.train.labels, own.validation.labels, own.test.labels])
        assert set(owner[labels].tolist()) == {data.groups[device]}


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("num_classes", [2, 3, 10, 77])
def test_swapped_labels_are_pairs(num_classes: int, group: int) -> None:
    names = swapped_classes(num_classes, group, 0)
    assert torch.equal(names[names], torch.arange(num_classes))
    assert int((names != torch.arange(num_classes)).sum()) == max(2, int(num_classes * 2 / 3) // 2 * 2)


def test_shifted_labels_are_those_of_the_same_samples() -> None:
    _, samples, data = shared_out(shift="labels")
    for device, own in data.devices.items():
        names = torch.arange(10) if data.groups[device] == 0 else swapped_classes(10, data.groups[device], 0)
        for part in (own.train, own.validation, own.test):
            assert torch.equal(part.labels, names[samples.labels[part.inputs.index]])


def test_shifted_images_are_turned_and_inverted_in_the_models_own_range() -> None:
    _, samples, data = shared_out(shift="inputs")
    _, _, plain = shared_out()
    assert set(data.groups.values()) == {0, 1, 2}
    for device, own in data.devices.items():
        before, after = plain.devices[device].train.inputs[:], own.train.inputs[:]
        expected = {
            0: before,
            1: before.rot90(1, (-2, -1)),
            2: samples.inputs[:].min() + samples.inputs[:].max() - before,
        }
        torch.testing.assert_close(after, expected[data.groups[device]])


@pytest.mark.parametrize("shift", ["labels", "inputs"])
def test_a_simulated_process_reads_what_this_one_has(tmp_path: Path, shift: str) -> None:
    job, _, data = shared_out(shift=shift, unlabelled_share=0.5)
    devices = [SimulatedDevice(a, data.devices[a.device_id], tmp_path) for a in fleet_of(job)["a"]]
    write_handover(tmp_path, devices)
    for number, device in enumerate(devices):
        back = read_device(tmp_path, number).data
        assert back.unlabelled is not None
        assert device.data.unlabelled is not None
        assert set(back.unlabelled.labels.tolist()) == {-1}
        pairs = [
            (back.unlabelled, device.data.unlabelled),
            (back.train, device.data.train),
            (back.test, device.data.test),
        ]
        for one, other in pairs:
            assert torch.equal(one.inputs[:], other.inputs[:])
            assert torch.equal(one.labels, other.labels)


def test_labels_are_taken_from_training_samples_only() -> None:
    _, _, whole = shared_out()
    _, _, data = shared_out(unlabelled_share=0.5)
    for device, own in data.devices.items():
        before = whole.devices[device]
        assert own.unlabelled is not None
        assert sorted([*own.train.inputs.index, *own.unlabelled.inputs.index]) == sorted(before.train.inputs.index)
        assert len(own.unlabelled) == round(len(before.train) * 0.5)
        assert torch.equal(own.test.inputs.index, before.test.inputs.index)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"split": "groups", "groups": 11}, r"data.groups must be <= the 10 classes .*, got 11"),
        ({"shift": "inputs", "groups": 9}, r"data.groups must be <= 8 with data.shift = \"inputs\", got 9"),
        ({"groups": 0}, "data.groups must be >= 1, got 0"),
        ({"shift": "colours"}, "data.shift must be one of"),
    ],
)
def test_what_cannot_be_is_refused(data: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        shared_out(**data)
