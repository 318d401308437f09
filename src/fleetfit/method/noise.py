"""Clipping, Gaussian noise nobody else can guess, and what it promises; and how to read noised values (Beyond).

The mechanism is the Gaussian one: a vector of L2 norm at most C changes by at most 2 C when the data behind it is
replaced, so noise with a standard deviation of z times 2 C hides the data. N such releases together, each of which may
depend on those before, are exactly as one with the multiplier z / sqrt(N) (Dong, Roth and Su, "Gaussian Differential
Privacy", 2022).
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.special import ndtri
from torch import Tensor

SIMPLEX_SENSITIVITY = math.sqrt(2)  # the L2 distance of two vectors of non-negative numbers that sum to 1, at most


def flat(tensors: Mapping[str, Float[Tensor, "..."]]) -> Float64[Tensor, " value"]:
    """All values of some tensors as one vector on the CPU, in the order of their names."""
    values = [tensors[name].detach().cpu().double().flatten() for name in sorted(tensors)]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *values])


def shaped(vector: Float64[Tensor, " value"], like: Mapping[str, Float[Tensor, "..."]]) -> dict[str, Tensor]:
    """The inverse of ``flat``: the values as tensors like ``like``, under the same names."""
    names = sorted(like)
    parts = dict(zip(names, torch.split(vector, [like[name].numel() for name in names]), strict=True))
    return {name: parts[name].view(tensor.shape).to(tensor) for name, tensor in like.items()}


def clipped(vector: Float64[Tensor, " value"], norm: float) -> Float64[Tensor, " value"]:
    """The vector, shortened to the L2 norm ``norm`` if it is longer; its direction stays.

    One that is not finite becomes 0: it says that a training went wrong, and nothing that can be bounded.
    """
    if not bool(vector.isfinite().all()):
        return torch.zeros_like(vector)
    length = float(vector.norm())
    if math.isinf(length):  # its square is over the range of numbers
        return clipped(vector / vector.abs().max(), norm)
    return vector * min(1.0, norm / max(length, 1e-300))


def secret_noise(key: bytes, label: bytes, number: int) -> Float64[Tensor, " value"]:
    """Standard normal numbers that only the owner of the key can compute: the same for the same key and label.

    SHAKE-256 gives 52 bits a number, uniform inside (0, 1); the normal distribution's quantile function does the rest.
    The generators of NumPy and PyTorch will not do: from enough of their numbers one can compute all the others, and
    where a device has nothing to say (a difference of 0) the noise lies open.

    Args:
        key: Secret, of at least 32 bytes.
        label: What the noise is for; a label may be used for one vector only.
        number: How many.

    Raises:
        ValueError: a key that is too short.
    """
    if len(key) < 32:
        raise ValueError(f"key must have at least 32 bytes, got {len(key)}")
    stream = hashlib.shake_256(len(key).to_bytes(8, "little") + key + label).digest(8 * number)
    uniform = ((np.frombuffer(stream, dtype="<u8") >> 12) + 0.5) * 2.0**-52
    return torch.from_numpy(ndtri(uniform))


def epsilon_of(noise_multiplier: float, num_releases: int, delta: float) -> float:
    """The epsilon that holds, with delta, for ``num_releases`` Gaussian releases of one device's data together.

    Exact (Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", 2018), by ``dp_accounting``.

    Args:
        noise_multiplier: z, the noise's standard deviation over the sensitivity, above 0.
        num_releases: N; with none nothing is revealed.
        delta: In (0, 1).

    Raises:
        ValueError: a number outside of these bounds.
        ImportError: ``dp_accounting`` is missing; with the command that installs it.
    """
    if not 0 < noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be finite and > 0, got {noise_multiplier}")
    if num_releases < 0:
        raise ValueError(f"num_releases must be >= 0, got {num_releases}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in 0..1, borders excluded, got {delta}")
    if num_releases == 0:
        return 0.0
    try:
        from dp_accounting import get_epsilon_gaussian
    except ImportError as error:
        raise ImportError(f"[privacy] needs dp-accounting: {error}; pip install dp-accounting") from error
    return float(get_epsilon_gaussian(noise_multiplier / math.sqrt(num_releases), delta))


# -- reading what is noised: no more is known of the data afterwards ---------------------------------------------------


def noise_of_sum(weights: Float[Tensor, "device peer"], noise: Sequence[float]) -> Float64[Tensor, " device"]:
    """Standard deviation of the noise in each row's weighted sum of independently noised values."""
    return (weights.double().square() @ torch.tensor(noise, dtype=torch.float64).square()).sqrt()


def shrunk(vector: Float64[Tensor, " value"], noise: float) -> Float64[Tensor, " value"]:
    """A noised vector, shortened by the share of its energy that the noise explains; 0 where it explains all.

    The factor max(0, 1 - p s^2 / |v|^2) of James and Stein, for p values with noise of standard deviation s. It needs
    no guess: among few devices, where noise drowns all else, nothing is left; among many it does nothing.
    """
    energy = float(vector.square().sum())
    return vector * max(0.0, 1 - len(vector) * noise**2 / energy) if energy > 0 else vector


def clearly_lowest(losses: Mapping[str, float], noise: float) -> str:
    """The name of the lowest loss if it stands out of the noise, and else the first name.

    It stands out where it is below the first by more than noise alone is likely to put the lowest of so many:
    sqrt(2 log n) standard deviations for n others, and one at least.

    Raises:
        ValueError: no loss, one that is not finite, or noise that is negative or not finite.
    """
    if not losses or not all(map(math.isfinite, losses.values())):
        raise ValueError(f"losses must be finite, at least 1, got {dict(losses)}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be finite and >= 0, got {noise}")
    first = next(iter(losses))
    best = min(losses, key=lambda name: losses[name])
    margin = noise * max(1.0, math.sqrt(2 * math.log(max(1, len(losses) - 1))))
    return best if losses[best] < losses[first] - margin else first
