"""What two processes found of one job, compared as the product promises it: the same, but for rounding.

On one machine, in one process, the same seed gives the same bits, and tests of that compare bits. Between processes,
which may compute with other threads or another instruction set, what is promised is less: the same messages of the same
sizes, the same decisions, and numbers that differ in their last digits.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch

ROUNDING = 1e-5  # of losses, shares and weights; what was seen between instruction sets is a tenth of it


def differences(
    found: Any, expected: Any, test_samples: int, where: str = "", rounding: float = ROUNDING
) -> Iterator[str]:
    """Where two results differ by more than rounding, however they are nested.

    Args:
        found: One.
        expected: The other.
        test_samples: The fewest that an accuracy is a share of: rounding may turn one answer over, so accuracies may
            differ by one sample.
        where: The path to it.
        rounding: Of losses, shares and weights.
    """
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        for key in expected:
            yield from differences(found[key], expected[key], test_samples, f"{where}/{key}", rounding)
    elif isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            yield from differences(one, other, test_samples, f"{where}/{number}", rounding)
    elif isinstance(expected, float) and isinstance(found, float):
        allowed = rounding + 1 / test_samples if "accuracy" in where.rpartition("/")[2] else rounding
        if not math.isclose(found, expected, rel_tol=rounding, abs_tol=allowed):
            yield f"{where}: {found} instead of {expected}"
    elif found != expected:
        yield f"{where}: {found!r} instead of {expected!r}"


def weight_differences(found: Path, expected: Path) -> Iterator[str]:
    """Where the tensors of two files differ by more than rounding."""
    one, other = safetensors.torch.load_file(found), safetensors.torch.load_file(expected)
    if one.keys() != other.keys():
        yield f"{found}: {sorted(one)} instead of {sorted(other)}"
        return
    for name, tensor in one.items():
        if tensor.shape != other[name].shape or tensor.dtype != other[name].dtype:
            yield f"{found}: {name} is {tuple(tensor.shape)} instead of {tuple(other[name].shape)}"
        elif tensor.numel() and not float((tensor - other[name]).abs().max()) <= ROUNDING:
            yield f"{found}: {name} differs by {float((tensor - other[name]).abs().max())}"
