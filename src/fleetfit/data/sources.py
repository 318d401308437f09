"""Where samples come from: a source name -> tensors in memory with their labels."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fleetfit.config import DataConfig


@dataclass(frozen=True)
class Samples:
    """Model inputs and labels of some samples, and what they weighed before they became tensors."""

    inputs: Float[Tensor, "sample channel row column"]
    labels: Int[Tensor, " sample"]
    label_names: tuple[str, ...]
    raw_bytes_per_sample: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes of the task, present here or not."""
        return len(self.label_names)

    def rows(self, rows: Int[Tensor, " row"]) -> "Samples":
        """Some of the samples."""
        return Samples(self.inputs[rows], self.labels[rows], self.label_names, self.raw_bytes_per_sample)


def _digits() -> Samples:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target, dtype=torch.long)
    # Pixels are 0..16; one byte each is what they need at rest.
    return Samples((pixels / 16 - 0.5) / 0.5, labels, tuple(str(d) for d in range(10)), raw_bytes_per_sample=64)


SOURCES = {"digits": _digits}


def load_samples(config: DataConfig) -> Samples:
    """All samples of the job's source."""
    return SOURCES[config.source]()
