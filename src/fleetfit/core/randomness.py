"""Named, independent streams of randomness: the same (seed, names) gives the same numbers in any engine or order."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it is imported where numbers are drawn: jobs are checked without it
    import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Mix a job's seed with the names of a place in the method into a 63-bit seed."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def named_generator(seed: int, *names: str | int) -> "torch.Generator":
    """A CPU generator of its own for one place in the method."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *names))


@contextmanager
def seeded_init(seed: int, *names: str | int) -> Iterator[None]:
    """Initialise modules, or drop out, reproducibly inside; the caller's global generators are restored afterwards.

    PyTorch's and Transformers' initialisers and dropout take no generator, so the global one is forked for the time
    being, and that of the GPU where one is used.
    """
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, *names))
        yield
