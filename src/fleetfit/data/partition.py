"""Who gets which samples: cloud (public), edges (shared), devices (private). They never overlap."""

import hashlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.config.sections import DataConfig
from fleetfit.core.randomness import derive_seed, named_generator
from fleetfit.core.records import DataSummary
from fleetfit.data.samples import Samples
from fleetfit.data.shifts import classes_of_groups, hidden_groups, shifted

log = logging.getLogger(__name__)

SHOWN = 5  # of the classes that no device has


@dataclass(frozen=True)
class Split:
    """Training, validation and test samples of one owner. All choices are made on validation; test is only reported.

    Training holds at least one sample; of very few samples none is left for the others. ``summary`` tells what was read
    for an owner with files of its own. ``unlabelled`` are inputs whose labels nobody knows.
    """

    train: Samples
    validation: Samples
    test: Samples
    summary: DataSummary | None = None
    unlabelled: Samples | None = None

    @property
    def fingerprint(self) -> str:
        """Changes with the content of the samples, with which of them these are, and with their labels."""
        found = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            found.update(json.dumps([part.fingerprint, len(part), part.label_names]).encode())
            for numbers in (part.inputs.index, part.labels):
                found.update(numbers.cpu().numpy().tobytes())
        return found.hexdigest()[:16]

    def to(self, torch_device: torch.device) -> "Split":
        """The same for a model on this hardware."""
        train, validation, test = (part.to(torch_device) for part in (self.train, self.validation, self.test))
        more = None if self.unlabelled is None else self.unlabelled.to(torch_device)
        return Split(train, validation, test, self.summary, more)


@dataclass(frozen=True)
class FleetData:
    """Every owner's samples: ``public`` is the cloud's, ``edges`` by cluster, ``devices`` by device.

    ``notes`` tell a person what nobody has; ``groups`` are the hidden ones of devices, where there are any.
    """

    public: Split
    edges: Mapping[str, Split]
    devices: Mapping[str, Split]
    notes: tuple[str, ...] = ()
    groups: Mapping[str, int] = field(default_factory=dict)


def _partitioner(config: DataConfig, num_devices: int, num_classes: int, seed: int) -> Any:
    from flwr_datasets.partitioner import (
        DirichletPartitioner,
        IidPartitioner,
        NaturalIdPartitioner,
        PathologicalPartitioner,
    )

    if config.split == "natural":
        return NaturalIdPartitioner("user")
    if config.split == "iid" or (config.split == "classes" and config.classes_per_device >= num_classes):
        return IidPartitioner(num_devices)
    if config.split == "classes":
        return PathologicalPartitioner(
            num_partitions=num_devices,
            partition_by="label",
            num_classes_per_partition=config.classes_per_device,
            class_assignment_mode="first-deterministic",
            shuffle=True,
            seed=seed,
        )
    return DirichletPartitioner(
        num_partitions=num_devices,
        partition_by="label",
        alpha=config.alpha,
        min_partition_size=1,
        self_balancing=True,
        seed=seed,
    )


def _device_of_user(users: Int[Tensor, " sample"], config: DataConfig, num_devices: int, seed: int) -> dict[int, int]:
    """One user, one device: the users with the most samples, dealt out by the seed. The others have no device.

    Raises:
        ValueError: fewer users than devices.
    """
    generator = named_generator(seed, "partition", "users")
    numbers, counts = torch.unique(users, return_counts=True)
    if len(numbers) < num_devices:
        raise ValueError(
            f"data.user_column = {config.user_column!r}: the devices' private share is of {len(numbers)} users, fewer "
            f"than the {num_devices} devices; lower the number of devices"
        )
    order = torch.randperm(len(numbers), generator=generator)
    order = order[counts[order].argsort(descending=True, stable=True)][:num_devices]
    order = order[torch.randperm(num_devices, generator=generator)]
    return {int(user): device for device, user in enumerate(numbers[order])}


def partition_rows(
    labels: Int[Tensor, " sample"],
    config: DataConfig,
    num_devices: int,
    num_classes: int,
    seed: int,
    users: Int[Tensor, " sample"] | None = None,
) -> list[Int[Tensor, " row"]]:
    """Row numbers for each device: iid, a number of classes per device, Dirichlet(alpha) shares of classes, or a user.

    Raises:
        ValueError: fewer samples than devices, or a split that leaves a device without samples.
    """
    if len(labels) < num_devices:
        raise ValueError(
            f"data: the devices' private share holds {len(labels)} samples, fewer than the {num_devices} devices; "
            "lower data.public_share, data.edge_share or the number of devices"
        )
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("flwr_datasets").setLevel(logging.ERROR)
    partitioner = _partitioner(config, num_devices, num_classes, derive_seed(seed, "partition") % 2**31)
    order = torch.randperm(len(labels), generator=named_generator(seed, "partition", "order"))
    columns = {}
    if config.split == "natural":
        assert users is not None, "a natural split without users is no valid job"
        device_of = _device_of_user(users, config, num_devices, seed)
        order = order[[int(user) in device_of for user in users[order]]]
        columns = {"user": np.array([device_of[int(user)] for user in users[order]])}

    class Rows(Dataset):  # type: ignore[misc]
        def select(self, indices: Any, **options: Any) -> Any:
            """The same, of an array: ``datasets`` hashes the rows, of a list each number by itself."""
            return super().select(np.asarray(indices, np.int64), **options)

    table = Rows.from_dict({"row": order.numpy(), "label": labels[order].numpy(), **columns})
    partitioner.dataset = table.with_format("numpy")  # without it, values are read one by one
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # classes that no device has are noted by the caller
            return [torch.from_numpy(partitioner.load_partition(i)["row"][:]) for i in range(num_devices)]
    except ValueError as error:
        raise ValueError(
            f"data.split: {len(labels)} samples cannot be split by {config.split!r} among {num_devices} devices: lower "
            "data.classes_per_device, raise data.alpha, or lower the number of devices"
        ) from error


def cut_rows(rows: Int[Tensor, " row"], shares: Sequence[float], generator: torch.Generator) -> list[Tensor]:
    """Shuffle and cut into one piece a share; the rest comes first. The rest keeps at least one row."""
    rows = rows[torch.randperm(len(rows), generator=generator)]
    sizes = []
    left = len(rows) - 1
    for share in shares:
        size = min(round(len(rows) * share), max(0, left))
        sizes.append(size)
        left -= size
    first = len(rows) - sum(sizes)
    return list(torch.split(rows, [first, *sizes]))


def split_rows(samples: Samples, rows: Tensor, config: DataConfig, test_share: float, *names: str | int) -> Split:
    """Cut one owner's rows into training, validation and test samples."""
    generator = named_generator(int(names[0]), "split", *names[1:])
    rest, test = cut_rows(rows, [test_share], generator)
    train, validation = cut_rows(rest, [config.validation_share], generator)
    return Split(samples.rows(train), samples.rows(validation), samples.rows(test))


def cut_tiers(samples: Sized, config: DataConfig, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row numbers of (the devices' private, public, public test, the edges' shared) samples."""
    shares = [config.public_share, config.test_share, config.edge_share]
    private, public, test, shared = cut_rows(
        torch.arange(len(samples)), shares, named_generator(seed, "split", "tiers")
    )
    return private, public, test, shared


def public_test(samples: Samples, config: DataConfig, seed: int) -> Samples:
    """The held-out public samples, as ``share_out`` gives the cloud; no device and no edge has them."""
    return samples.rows(cut_tiers(samples, config, seed)[2])


def share_out(
    samples: Samples, config: DataConfig, devices_by_cluster: Mapping[str, Sequence[str]], seed: int
) -> FleetData:
    """Split all samples between the cloud, the edges and the devices.

    Args:
        samples: All samples of the source.
        config: Shares and kind of split.
        devices_by_cluster: Device names of every cluster.
        seed: The job's.

    Raises:
        ValueError: too few samples for this fleet.
    """
    private, public, test, shared = cut_tiers(samples, config, seed)
    if len(public) < 2:
        raise ValueError(f"data.public_share: the cloud needs at least 2 public samples, got {len(public)}")
    if len(shared) < 2 * len(devices_by_cluster):
        raise ValueError(
            f"data.edge_share: {len(devices_by_cluster)} edges need at least 2 shared samples each, "
            f"got {len(shared)} in all"
        )
    train, validation = cut_rows(public, [config.validation_share], named_generator(seed, "split", "public"))
    public_split = Split(samples.rows(train), samples.rows(validation), samples.rows(test))
    edges = {
        cluster: split_rows(samples, rows, config, 0.0, seed, "edge", cluster)
        for cluster, rows in zip(devices_by_cluster, shared.tensor_split(len(devices_by_cluster)), strict=True)
    }
    names = [device for devices in devices_by_cluster.values() for device in devices]
    users = None if samples.users is None else samples.users[private]
    groups = {d: g for c, own in devices_by_cluster.items() for d, g in hidden_groups(config, c, own, seed).items()}
    if config.split == "groups":
        group_of_class = classes_of_groups(config, samples.num_classes, seed)
        parts = rows_of_groups(group_of_class[samples.labels[private]], [groups[name] for name in names], seed)
    else:
        parts = partition_rows(samples.labels[private], config, len(names), samples.num_classes, seed, users)
    devices = {}
    for name, part in zip(names, parts, strict=True):
        own = split_rows(samples, private[part], config, config.device_test_share, seed, "device", name)
        own = without_labels(own, config.unlabelled_share, named_generator(seed, "unlabelled", name))
        devices[name] = _in_group(own, config, groups.get(name, 0), seed)
    notes = (*_not_shared_out(samples, private, parts), *_rare(samples, public_split, devices))
    if groups:
        log.info("data: hidden groups of devices: %s", ", ".join(f"{d} {g}" for d, g in groups.items()))
    return FleetData(public_split, edges, devices, notes, groups)


def rows_of_groups(
    group_of_row: Int[Tensor, " sample"], group_of_device: Sequence[int], seed: int
) -> list[Int[Tensor, " row"]]:
    """Row numbers for each device: the rows of its group, dealt out evenly inside it.

    Raises:
        ValueError: a device that would have no sample.
    """
    order = torch.randperm(len(group_of_row), generator=named_generator(seed, "partition", "order"))
    rows: list[Tensor] = [torch.empty(0, dtype=torch.long)] * len(group_of_device)
    for group in sorted(set(group_of_device)):
        members = [i for i, g in enumerate(group_of_device) if g == group]
        own = order[group_of_row[order] == group]
        if len(own) < len(members):
            raise ValueError(
                f'data.split = "groups": {len(own)} private samples for the {len(members)} devices of group {group}; '
                "lower data.groups, or the number of devices"
            )
        for member, part in zip(members, own.tensor_split(len(members)), strict=True):
            rows[member] = part
    return rows


def without_labels(own: Split, share: float, generator: torch.Generator) -> Split:
    """A share of an owner's training samples without their labels; one keeps its own."""
    if not share:
        return own
    rows, without = cut_rows(torch.arange(len(own.train)), [share], generator)
    hidden = own.train.rows(without)
    return replace(
        own, train=own.train.rows(rows), unlabelled=replace(hidden, labels=torch.full_like(hidden.labels, -1))
    )


def _in_group(own: Split, config: DataConfig, group: int, seed: int) -> Split:
    """An owner's data as its group has it."""
    if group == 0 or config.shift == "none":
        return own
    train, validation, test = (shifted(part, config, group, seed) for part in (own.train, own.validation, own.test))
    more = own.unlabelled
    if more is not None and config.shift == "inputs":
        more = shifted(more, config, group, seed)
    return Split(train, validation, test, own.summary, more)


def _rare(samples: Samples, public: Split, devices: Mapping[str, Split]) -> tuple[str, ...]:
    """Classes that are too rare to be where they should be, in words: no score speaks for them there."""
    owners = devices.values()
    places = {
        "on no device": [part for own in owners for part in (own.train, own.validation, own.test)],
        "in no device's test split": [own.test for own in owners],
        "in nothing that the cloud trains on": [public.train],
        "not in the cloud's test split": [public.test],
    }
    total = torch.bincount(samples.labels, minlength=samples.num_classes)
    on_none: set[int] = set()
    notes = []
    for where, parts in places.items():
        there = torch.zeros_like(total)
        for part in parts:
            there += torch.bincount(part.labels, minlength=samples.num_classes)
        absent = set(((total > 0) & (there == 0)).nonzero().flatten().tolist()) if there.any() else set()
        if where == "in no device's test split":
            absent -= on_none  # told already
        elif where == "on no device":
            on_none = absent
        if absent:
            listed = ", ".join(f"{samples.label_names[c]} {int(total[c]):,}" for c in sorted(absent)[:SHOWN])
            more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
            are = "1 class is" if len(absent) == 1 else f"{len(absent)} classes are"
            notes.append(f"{are} {where} ({listed}{more})")
    for note in notes:
        log.info("data: %s", note)
    return tuple(notes)


def _not_shared_out(samples: Samples, private: Tensor, parts: Sequence[Tensor]) -> tuple[str, ...]:
    """What of the private samples no device has, in words."""
    left = len(private) - sum(map(len, parts))
    return (f"{left:,} private samples are no device's",) if left else ()
