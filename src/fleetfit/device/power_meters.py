"""What a machine tells of its power: Linux' energy counters (RAPL) and nvidia-smi."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Clock:
    """How time passes; tests bring their own."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep


class PowerMeter(Protocol):
    """Reads the mean power between start and stop."""

    name: str

    def start(self) -> None:
        """Power is read from now on."""

    def stop(self) -> float:
        """Mean watts since start."""


class RaplMeter:
    """Linux' energy counters of CPU packages (RAPL): everything that runs on them, other programs included.

    Args:
        folder: Where Linux shows them.
        clock: How time passes.

    Raises:
        OSError: there is none, or it may not be read.
    """

    name = "RAPL, the CPU package with everything that runs on it"

    def __init__(self, folder: Path = POWERCAP, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        # Also on AMD. Other zones are parts of a package (core, dram), or count it once more (psys, intel-rapl-mmio).
        zones = sorted(folder.glob("intel-rapl:*"))
        self.packages = [z for z in zones if (z / "name").read_text(encoding="ascii").startswith("package")]
        if not self.packages:
            raise FileNotFoundError(f"no energy counter in {folder}")
        self._read()

    def _read(self) -> list[int]:
        return [int((z / "energy_uj").read_text(encoding="ascii")) for z in self.packages]

    def start(self) -> None:
        """Remember the counters."""
        self._before, self._since = self._read(), self.clock.now()

    def stop(self) -> float:
        """Mean watts; a counter that began anew meanwhile is put right."""
        microjoules = 0
        for zone, before, after in zip(self.packages, self._before, self._read(), strict=True):
            if after < before:
                after += int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
            microjoules += after - before
        return microjoules / 1e6 / (self.clock.now() - self._since)


class NvidiaMeter:
    """``nvidia-smi``, ten times a second: the power of one GPU, without the computer around it.

    Args:
        gpu: Number or UUID of the GPU.

    Raises:
        OSError: there is no nvidia-smi.
    """

    name = "nvidia-smi, the GPU alone"

    def __init__(self, gpu: str) -> None:
        program = shutil.which("nvidia-smi")
        if program is None:
            raise FileNotFoundError("there is no nvidia-smi")
        query = ("--query-gpu=power.draw", "--format=csv,noheader,nounits", "--loop-ms=100", f"--id={gpu}")
        self.command = (program, *query)

    def start(self) -> None:
        """Begin to listen."""
        self._process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def stop(self) -> float:
        """Mean watts of the second half: the driver's figure is an average that lags behind.

        Raises:
            ValueError: it told no watts.
        """
        self._process.terminate()
        output, _ = self._process.communicate()
        watts = [float(line) for line in output.splitlines() if re.fullmatch(r"\s*\d+(\.\d+)?\s*", line)]
        if not watts:
            raise ValueError("nvidia-smi tells no power.draw of this GPU; give --watts, or measure without power")
        late = watts[len(watts) // 2 :]
        return sum(late) / len(late)


def find_meter(torch_device: str, folder: Path = POWERCAP) -> tuple[PowerMeter | None, str]:
    """What reads the power of this hardware, or None; and what it is called, or why there is none."""
    try:
        meter: PowerMeter = NvidiaMeter(_gpu_id(torch_device)) if torch_device != "cpu" else RaplMeter(folder)
    except PermissionError as error:
        return None, f"{error.filename} may be read by root only"
    except (OSError, ValueError) as error:
        return None, str(error)
    return meter, meter.name


def _gpu_id(torch_device: str) -> str:
    """CUDA may number GPUs otherwise than nvidia-smi does; their UUIDs are the same."""
    properties = torch.cuda.get_device_properties(torch.device(torch_device))
    uuid = getattr(properties, "uuid", None)
    return f"GPU-{uuid}" if uuid else str(torch.device(torch_device).index or 0)
