"""Labelled samples: raw values stay as they are kept, and become a model's inputs when rows of them are looked up."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from fleetfit.core.hardware import fits_on, moved
from fleetfit.core.records import DataSummary
from fleetfit.data.preprocessing import Preprocessing, TextPreprocessing

BATCH = 256


@dataclass(frozen=True)
class Inputs:
    """Some rows of a store, as a model takes them; many owners share one store, which may be memory-mapped.

    Attributes:
        store: Pixels [sample channel row column] as bytes, token ids [sample token], or inputs that are ready.
        index: Which rows of the store these are.
        form: How pixels become inputs, or how texts became token ids; None: the store holds inputs.
        torch_device: Where inputs go when they are looked up; None: they are there, where the store is.
        path: The .npy file that the store is memory-mapped from, if it is.
    """

    store: Shaped[Tensor, "stored ..."]
    index: Int[Tensor, " sample"]
    form: Preprocessing | TextPreprocessing | None = None
    torch_device: torch.device | None = None
    path: Path | None = None

    @classmethod
    def of(cls, store: Shaped[Tensor, "sample ..."], form: Preprocessing | TextPreprocessing | None = None) -> "Inputs":
        """All rows of a store."""
        return cls(store, torch.arange(len(store), device=store.device), form)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Int[Tensor, " row"] | slice) -> Shaped[Tensor, "row ..."]:
        if isinstance(rows, Tensor):
            rows = moved(rows, self.index.device)
        values = self.store[self.index[rows]]
        if self.torch_device is not None:
            values = moved(values, self.torch_device)
        if isinstance(self.form, TextPreprocessing):
            return values.long()
        return values if self.form is None else self.form.to_inputs(values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.store.shape[1:])

    def only(self, rows: Int[Tensor, " row"]) -> "Inputs":
        """Some of these; the store is shared."""
        return replace(self, index=self.index[moved(rows, self.index.device)])

    def to(self, torch_device: torch.device) -> "Inputs":
        """The same for a model on this hardware.

        What these rows take is moved there as a whole where there is room, and else batch by batch: then each look-up
        waits for its row numbers to come back.
        """
        if torch_device == self.store.device:
            return self
        own_bytes = len(self) * self.store[:1].nbytes
        if not fits_on(torch_device, own_bytes):
            return replace(self, torch_device=torch_device)
        # Their own rows only: the store is that of all owners.
        return Inputs.of(moved(self.store[self.index], torch_device), self.form)

    @property
    def lengths(self) -> Int[Tensor, " sample"] | None:
        """Tokens of each text, without padding; None for all that is of one length."""
        if not isinstance(self.form, TextPreprocessing):
            return None
        place = torch.arange(1, self.store.shape[1] + 1, device=self.store.device)
        return (place * (self.store[self.index] != self.form.pad_id)).amax(dim=1).cpu()

    def batches(self, size: int = BATCH) -> Iterator[Shaped[Tensor, "row ..."]]:
        """All inputs in order, at least one batch, which may be empty."""
        for rows in torch.split(torch.arange(len(self)), size):
            yield self[rows]


@dataclass(frozen=True)
class Samples:
    """Model inputs and labels of some samples.

    Attributes:
        inputs: Inputs of a model.
        labels: Numbers of classes.
        label_names: Of all classes of the task.
        raw_bytes_per_sample: What a sample weighs at rest in its source, on average.
        users: Whose each sample is, as numbers; None: not known.
        fingerprint: Changes with the content of the source, and with how inputs and labels are made of it.
        summary: What was read, what was left out and why; of a whole source, not of a part of it.
    """

    inputs: Inputs
    labels: Int[Tensor, " sample"]
    label_names: tuple[str, ...]
    raw_bytes_per_sample: int
    users: Int[Tensor, " sample"] | None = None
    fingerprint: str = ""
    summary: DataSummary | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes of the task, present here or not."""
        return len(self.label_names)

    def to(self, torch_device: torch.device) -> "Samples":
        """The same for a model on this hardware."""
        return replace(self, inputs=self.inputs.to(torch_device), labels=moved(self.labels, torch_device))

    def rows(self, rows: Int[Tensor, " row"]) -> "Samples":
        """Some of the samples."""
        here = moved(rows, self.labels.device)
        users = None if self.users is None else self.users[rows]
        return replace(self, inputs=self.inputs.only(rows), labels=self.labels[here], users=users, summary=None)
