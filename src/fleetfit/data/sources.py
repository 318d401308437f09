"""Where samples come from: a source name -> tensors in memory with their labels."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fleetfit.config import DataConfig
from fleetfit.data.preprocessing import Preprocessing


@dataclass(frozen=True)
class Samples:
    """Model inputs and labels of some samples, and what they weighed before they became tensors.

    ``preprocessing`` says how they became tensors, where that is more than reading them.
    """

    inputs: Float[Tensor, "sample channel row column"]
    labels: Int[Tensor, " sample"]
    label_names: tuple[str, ...]
    raw_bytes_per_sample: int
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes of the task, present here or not."""
        return len(self.label_names)

    def rows(self, rows: Int[Tensor, " row"]) -> "Samples":
        """Some of the samples."""
        return replace(self, inputs=self.inputs[rows], labels=self.labels[rows])


def _digits() -> Samples:
    from sklearn.datasets import load_digits

    digits = load_digits()
    form = Preprocessing(size=(8, 8), channels=1, maximum=16, mean=(0.5,), std=(0.5,))
    inputs = torch.from_numpy(form.apply(digits.images[:, None]))
    labels = torch.tensor(digits.target, dtype=torch.long)
    # One byte a pixel is what they need at rest.
    return Samples(inputs, labels, tuple(str(d) for d in range(10)), raw_bytes_per_sample=64, preprocessing=form)


SOURCES = {"digits": _digits}


def load_samples(config: DataConfig) -> Samples:
    """All samples of the job's source."""
    return SOURCES[config.source]()
