"""Where tensors are computed: ``run.torch_device`` resolved, the way of tensors to it, and the precision there."""

import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

CPU = torch.device("cpu")
RESIDENT_SHARE = 0.25  # of an accelerator's free memory, the most that one owner's samples may take


def torch_device_of(name: str) -> torch.device:
    """The hardware that a job asks for; ``auto`` is a GPU with CUDA where there is one, and else the CPU.

    Raises:
        ValueError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    missing = {
        "cuda": not torch.cuda.is_available(),
        "mps": not torch.backends.mps.is_available(),
    }
    if missing.get(name, False):
        found = "" if torch.version.cuda or name != "cuda" else " (this PyTorch is a build without CUDA)"
        raise ValueError(
            f"run.torch_device = {name!r}, but PyTorch {torch.__version__} finds none here{found}; "
            "set it to 'auto' or 'cpu', or ask `fleetfit doctor`"
        )
    # With its number, as tensors have it.
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def hardware_words(torch_device: torch.device, threads: int) -> str:
    """The hardware for a person."""
    if torch_device.type == "cuda":
        return torch.cuda.get_device_name(torch_device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, ValueError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch_device.type}, {threads} thread{'' if threads == 1 else 's'}"


def moved(tensor: Tensor, torch_device: torch.device) -> Tensor:
    """A tensor where it is needed; on its way to a GPU the program does not wait for it."""
    if torch_device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(torch_device, non_blocking=True)
    return tensor.to(torch_device)


def fits_on(torch_device: torch.device, num_bytes: int) -> bool:
    """Whether samples of so many bytes may stay on this hardware as a whole."""
    if torch_device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(torch_device)
    return num_bytes <= RESIDENT_SHARE * free


def autocast(torch_device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The precision of a forward pass, ``run.precision``; parameters and optimiser stay in 32 bits.

    ``auto`` is bfloat16 on a GPU that has it. On a CPU it is float32: bfloat16 makes forward passes faster there, but
    hardly the whole step (docs/job.md).
    """
    if precision == "auto":
        has_bfloat16 = torch_device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bfloat16" if has_bfloat16 else "float32"
    if precision == "float32":
        return nullcontext()
    return torch.autocast(torch_device.type, dtype=torch.bfloat16)
