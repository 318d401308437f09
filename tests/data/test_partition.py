"""Who gets which samples: no row twice, no row lost, the split that was asked for, the same with the same seed."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfit.config.sections import DataConfig
from fleetfit.core.randomness import named_generator
from fleetfit.data.partition import FleetData, Split, cut_rows, partition_rows, share_out
from fleetfit.data.samples import Inputs, Samples

torch.set_num_threads(1)

# flwr-datasets warns of classes that no device was given and of partitions that it draws again.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NUM_CLASSES = 6


def make_samples(number: int = 600) -> Samples:
    """A sample's input is its row number; its label follows from it."""
    rows = torch.arange(number)
    labels = (rows * 7919) % 104729 % NUM_CLASSES
    return Samples(Inputs.of(rows.float().reshape(number, 1, 1, 1)), labels, tuple("abcdef"), 1)


def rows_of(samples: Samples) -> list[int]:
    return samples.inputs[:].flatten().int().tolist()


def parts_of(data: FleetData) -> dict[str, list[int]]:
    """Every owner's every part, as row numbers."""
    owners: dict[str, Split] = {"public": data.public}
    owners |= {f"edge {c}": s for c, s in data.edges.items()} | {f"device {d}": s for d, s in data.devices.items()}
    return {
        f"{owner} {part}": rows_of(getattr(split, part))
        for owner, split in owners.items()
        for part in ("train", "validation", "test")
    }


def make_fleet(*sizes: int) -> dict[str, list[str]]:
    return {f"c{i}": [f"c{i}-{j}" for j in range(1, size + 1)] for i, size in enumerate(sizes)}


configs = st.builds(
    DataConfig,
    public_share=st.floats(0.1, 0.4),
    test_share=st.floats(0.0, 0.15),
    edge_share=st.floats(0.05, 0.3),
    validation_share=st.floats(0.05, 0.5),
    device_test_share=st.floats(0.0, 0.5),
    split=st.sampled_from(["iid", "classes", "dirichlet"]),
    classes_per_device=st.integers(1, NUM_CLASSES + 1),
    alpha=st.floats(0.3, 10),
)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(configs, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 5))
def test_nobody_shares_a_sample_and_none_is_lost(config: DataConfig, sizes: list[int], seed: int) -> None:
    samples, fleet = make_samples(), make_fleet(*sizes)
    data = share_out(samples, config, fleet, seed)
    assert list(data.edges) == list(fleet)
    assert list(data.devices) == [d for devices in fleet.values() for d in devices]
    parts = parts_of(data)
    counts = Counter(row for rows in parts.values() for row in rows)
    assert max(counts.values()) == 1
    lost = set(range(600)) - set(counts)
    if config.split == "classes":
        # A class that no device was given is nobody's; all the others are shared out in full.
        there = {int(label) for split in data.devices.values() for label in split.train.labels}
        assert not {int(samples.labels[row]) for row in lost} & there
        assert not lost or len(there) < NUM_CLASSES
    else:
        assert not lost
    for split in (data.public, *data.edges.values(), *data.devices.values()):
        assert len(split.train) >= 1
        for part in (split.train, split.validation, split.test):
            assert torch.equal(part.labels, samples.labels[part.inputs[:].flatten().long()])
            assert part.label_names == samples.label_names
    assert all(len(edge.test) == 0 for edge in data.edges.values())


def test_the_shares_are_as_asked() -> None:
    config = DataConfig(public_share=0.3, test_share=0.1, edge_share=0.2, validation_share=0.25, split="iid")
    data = share_out(make_samples(), config, make_fleet(2, 3), 0)
    sizes = {name: len(rows) for name, rows in parts_of(data).items()}
    assert [sizes[f"public {p}"] for p in ("train", "validation", "test")] == [135, 45, 60]
    for edge in ("c0", "c1"):
        assert [sizes[f"edge {edge} {p}"] for p in ("train", "validation", "test")] == [45, 15, 0]
    for device in data.devices:  # 240 in all, 48 each: 30 % test, then a quarter of the rest
        assert [sizes[f"device {device} {p}"] for p in ("train", "validation", "test")] == [26, 8, 14]


@pytest.mark.parametrize("split", ["iid", "classes", "dirichlet"])
def test_the_seed_decides(split: str) -> None:
    config, fleet = DataConfig(split=split, classes_per_device=3), make_fleet(2, 2)
    one, again, other = (parts_of(share_out(make_samples(), config, fleet, seed)) for seed in (0, 0, 1))
    assert one == again
    assert all(one[name] != other[name] for name in one if one[name])


@pytest.mark.parametrize("kept", ["split", "device_test_share"])
def test_what_is_public_does_not_depend_on_how_the_devices_split(kept: str) -> None:
    """The cache of references counts on it."""
    samples, fleet = make_samples(), make_fleet(2, 2)
    changed = {"split": {"split": "dirichlet"}, "device_test_share": {"device_test_share": 0.1}}[kept]
    one, other = (share_out(samples, DataConfig(**c), fleet, 0) for c in ({"split": "iid"}, {"split": "iid"} | changed))
    for part in ("train", "validation", "test"):
        assert rows_of(getattr(one.public, part)) == rows_of(getattr(other.public, part))
    assert parts_of(one) != parts_of(other)


# -- among devices ----------------------------------------------------------------------------------------------------


def partition(split: str, devices: int, number: int = 600, seed: int = 0, **keys: object) -> list[torch.Tensor]:
    config = DataConfig(split=split, **keys)
    return partition_rows(make_samples(number).labels, config, devices, NUM_CLASSES, seed)


@pytest.mark.parametrize(("number", "devices"), [(600, 7), (30, 30), (31, 4), (5, 1)])
def test_iid_shares_are_equal_and_mixed(number: int, devices: int) -> None:
    parts = partition("iid", devices, number)
    sizes = [len(p) for p in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sorted(torch.cat(parts).tolist()) == list(range(number))
    if number == 600:
        labels = make_samples().labels
        counts = torch.stack([labels[p].bincount(minlength=NUM_CLASSES) for p in parts])
        assert counts.min() >= 3  # 14 expected in each cell
        assert not any(sorted(p.tolist()) == list(range(int(p.min()), int(p.max()) + 1)) for p in parts)


@pytest.mark.parametrize("classes", [1, 2, 4, 6, 9])
@pytest.mark.parametrize("devices", [3, 10])
def test_every_device_has_the_classes_it_was_promised(classes: int, devices: int) -> None:
    labels = make_samples().labels
    parts = partition("classes", devices, classes_per_device=classes)
    assert [len(labels[p].unique()) for p in parts] == [min(classes, NUM_CLASSES)] * devices
    rows = torch.cat(parts).tolist()
    assert len(rows) == len(set(rows))
    if devices >= NUM_CLASSES:
        assert len(rows) == 600, "with a device for each class, every class is somebody's"


def test_dirichlet_mixes_more_the_larger_alpha_is() -> None:
    labels = make_samples().labels

    def unevenness(alpha: float) -> float:
        """Mean total variation between a device's class shares and the fleet's."""
        whole = labels.bincount(minlength=NUM_CLASSES) / len(labels)
        found = []
        for seed in range(3):
            parts = partition("dirichlet", 5, seed=seed, alpha=alpha)
            assert sorted(torch.cat(parts).tolist()) == list(range(600))
            assert min(len(p) for p in parts) >= 1
            shares = [labels[p].bincount(minlength=NUM_CLASSES) / len(p) for p in parts]
            found += [float((s - whole).abs().sum() / 2) for s in shares]
        return float(np.mean(found))

    some = [unevenness(a) for a in (0.05, 1.0, 1000.0)]
    assert some[0] > some[1] > some[2]
    assert some[0] > 0.5
    assert some[2] < 0.05


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_tiny_alpha_loses_nothing() -> None:
    """The partitioner divides by zero there."""
    for seed in range(3):
        parts = partition("dirichlet", 5, seed=seed, alpha=1e-6)
        assert sorted(torch.cat(parts).tolist()) == list(range(600))


# -- by user ----------------------------------------------------------------------------------------------------------


def make_users(number: int = 600) -> torch.Tensor:
    """Users 0..9; user u has about u + 1 of every 55 samples."""
    return torch.repeat_interleave(torch.arange(10), torch.arange(1, 11)).repeat(number // 55 + 1)[:number]


def natural(devices: int, seed: int = 0) -> FleetData:
    samples = replace(make_samples(), users=make_users())
    config = DataConfig(split="natural", user_column="who", public_share=0.3, edge_share=0.1)
    return share_out(samples, config, make_fleet(devices), seed)


def owners_of(data: FleetData) -> list[set[int]]:
    """The users in each device's samples."""
    parts = ([*rows_of(s.train), *rows_of(s.validation), *rows_of(s.test)] for s in data.devices.values())
    return [set(make_users()[rows].tolist()) for rows in parts]


def test_a_device_has_all_private_samples_of_one_user_and_of_no_other() -> None:
    data = natural(4)
    owners = owners_of(data)
    assert all(len(owner) == 1 for owner in owners)
    chosen = set().union(*owners)
    assert len(chosen) == 4
    counts = Counter(row for rows in parts_of(data).values() for row in rows)
    assert max(counts.values()) == 1
    lost = Counter(make_users()[sorted(set(range(600)) - set(counts))].tolist())
    assert not lost.keys() & chosen, "all private samples of a user are on one device"
    sizes = [len(s.train) + len(s.validation) + len(s.test) for s in data.devices.values()]
    assert max(lost.values()) <= min(sizes), "those with the most samples have devices"
    assert data.notes == (f"{lost.total()} private samples are no device's",)
    for split in data.devices.values():
        assert torch.equal(split.train.users, make_users()[rows_of(split.train)])  # type: ignore[arg-type]


def test_the_seed_says_which_user_is_where() -> None:
    orders = {tuple(next(iter(owner)) for owner in owners_of(natural(10, seed))) for seed in range(3)}
    assert len(orders) == 3


def test_fewer_users_than_devices() -> None:
    assert len(natural(10).devices) == 10
    with pytest.raises(
        ValueError, match=r"data\.user_column = 'who': .* is of 10 users, fewer than the 11 devices; lower"
    ):
        natural(11)


def test_classes_that_no_device_has_are_noted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fleetfit")
    data = share_out(make_samples(), DataConfig(split="classes", classes_per_device=2), make_fleet(2), 0)
    there = {int(label) for split in data.devices.values() for label in split.train.labels}
    left = [name for i, name in enumerate("abcdef") if i not in there]
    assert len(left) >= 2
    there = [f"{name} {int((make_samples().labels == 'abcdef'.index(name)).sum())}" for name in left]
    assert data.notes[1] == f"{len(left)} classes are on no device ({', '.join(there)})"
    assert data.notes[1] in caplog.text
    assert share_out(make_samples(), DataConfig(split="iid"), make_fleet(2), 0).notes == ()


def test_classes_that_are_too_rare_to_be_tested_are_named() -> None:
    """Three samples of a class: nobody tests on it, or the cloud never sees it, and each is told by name and number."""
    samples = make_samples()
    labels = torch.cat([torch.arange(len(samples) - 3) % 2, torch.tensor([2, 2, 2])])
    rare = replace(samples, labels=labels, label_names=("often", "as often", "seldom"))
    for seed in range(4):
        data = share_out(rare, DataConfig(split="iid"), make_fleet(2), seed)
        owners = list(data.devices.values())
        expected = {
            "on no device": not any((p.labels == 2).any() for o in owners for p in (o.train, o.validation, o.test)),
            "in nothing that the cloud trains on": not (data.public.train.labels == 2).any(),
            "not in the cloud's test split": not (data.public.test.labels == 2).any(),
        }
        for where, is_so in expected.items():
            assert (f"1 class is {where} (seldom 3)" in data.notes) == is_so
        assert any("seldom 3" in note for note in data.notes)


# -- too few ----------------------------------------------------------------------------------------------------------


def test_fewer_samples_than_devices() -> None:
    with pytest.raises(ValueError, match=r"holds 5 samples, fewer than the 6 devices; lower data\.public_share"):
        partition("iid", 6, 5)


@pytest.mark.parametrize(
    ("split", "devices", "keys"),
    [("classes", 20, {"classes_per_device": 5}), ("dirichlet", 24, {"alpha": 0.05})],
)
def test_a_split_that_leaves_a_device_without_samples_names_the_keys(split: str, devices: int, keys: dict) -> None:
    with pytest.raises(ValueError, match=rf"data\.split: 24 samples cannot be split by '{split}' among {devices}"):
        partition(split, devices, 24, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"public_share": 0.0}, r"data\.public_share: the cloud needs at least 2 public samples, got 0"),
        ({"edge_share": 0.0}, r"data\.edge_share: 2 edges need at least 2 shared samples each, got 0"),
        ({"edge_share": 0.005}, r"data\.edge_share: 2 edges need at least 2 shared samples each, got 3"),
    ],
)
def test_too_few_for_a_tier(keys: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        share_out(make_samples(), DataConfig(split="iid", **keys), make_fleet(1, 1), 0)


def test_devices_of_one_sample_train_on_it() -> None:
    config = DataConfig(public_share=0.4, test_share=0.1, edge_share=0.4, split="iid")
    data = share_out(make_samples(60), config, make_fleet(6), 0)
    for split in data.devices.values():
        assert (len(split.train), len(split.validation), len(split.test)) == (1, 0, 0)


# -- cutting ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 60), st.lists(st.floats(0, 1), max_size=4), st.integers(0, 3))
def test_cutting_keeps_all_rows_and_gives_the_rest_one(number: int, shares: list[float], seed: int) -> None:
    rows = 10 + 3 * torch.arange(number)
    pieces = cut_rows(rows, shares, named_generator(seed, "cut"))
    assert len(pieces) == len(shares) + 1
    assert sorted(torch.cat(pieces).tolist()) == rows.tolist()
    assert len(pieces[0]) >= min(1, number)
    left = number - 1
    for piece, share in zip(pieces[1:], shares, strict=True):
        assert len(piece) == max(0, min(round(number * share), left))
        left -= len(piece)
    again = cut_rows(rows, shares, named_generator(seed, "cut"))
    assert all(torch.equal(a, b) for a, b in zip(pieces, again, strict=True))


def test_cutting_shuffles() -> None:
    cuts = [cut_rows(torch.arange(40), [0.5], named_generator(seed, "cut"))[1].tolist() for seed in range(3)]
    assert all(a != b for a, b in combinations(cuts, 2))
    assert all(c != sorted(c) for c in cuts)
