"""Where samples come from: a source name -> samples with their labels."""

import torch

from fleetfit.config import DataConfig
from fleetfit.data.preprocessing import Preprocessing
from fleetfit.data.samples import Inputs, Samples


def _digits() -> Samples:
    from sklearn.datasets import load_digits

    digits = load_digits()
    form = Preprocessing(size=(8, 8), channels=1, maximum=16, mean=(0.5,), std=(0.5,))
    pixels = torch.from_numpy(digits.images[:, None].astype("uint8"))
    labels = torch.tensor(digits.target, dtype=torch.long)
    # One byte a pixel is what they need at rest.
    return Samples(Inputs.of(pixels, form), labels, tuple(str(d) for d in range(10)), raw_bytes_per_sample=64)


SOURCES = {"digits": _digits}


def load_samples(config: DataConfig) -> Samples:
    """All samples of the job's source."""
    return SOURCES[config.source]()
