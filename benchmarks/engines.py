"""What the engines cost beside the local one: benchmarks/results/engines_*.md.

    python benchmarks/engines.py simulation                     100, 200, 500 and 1,000 devices in 20 clusters
    python benchmarks/engines.py simulation --devices 20 40     fewer, to see that it works

scikit-learn's digits are 1,797, too few for a thousand devices: each is moved by up to one pixel to all sides, which
makes nine of it, 16,173 images in a Parquet file. A fleet of n devices uses 3,200 of them for cloud and edges and eight
more for each device, so that nothing but the number of devices differs between two fleets.
"""

import argparse
import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from fleetfit.artifacts import write_atomically

RESULTS = Path(__file__).parent / "results"
MARK = "FLEETFIT_BENCHMARK"
CLUSTERS = 20
PER_DEVICE = 8
TIERS = {"public_share": 2000, "test_share": 400, "edge_share": 800}  # samples, whatever the fleet
DEVICE_PHASES = ("refine", "propose", "finish")


def write_table(path: Path, number: int) -> None:
    """So many images of digits, moved by up to one pixel, as PNG in a Parquet file."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(9 * len(digits.images))[:number]
    if len(order) < number:
        raise SystemExit(f"at most {9 * len(digits.images)} images can be made, {number} are needed")
    images = []
    for chosen in order:
        shift, which = divmod(int(chosen), len(digits.images))
        padded = np.pad(digits.images[which], 1)
        row, column = divmod(shift, 3)
        pixels = Image.fromarray((padded[row : row + 8, column : column + 8] * 255 / 16).astype(np.uint8))
        file = io.BytesIO()
        pixels.save(file, "png")
        images.append({"bytes": file.getvalue(), "path": None})
    labels = [int(digits.target[int(chosen) % len(digits.images)]) for chosen in order]
    features = {"image": {"_type": "Image"}, "label": {"names": [str(d) for d in range(10)], "_type": "ClassLabel"}}
    table = pyarrow.table({"image": images, "label": labels}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pyarrow.parquet.write_table(table, path)


def job_of(folder: Path, devices: int) -> dict[str, Any]:
    """The job of a fleet: 20 clusters, each device eight samples of five digits; the phases before it kept short."""
    total = sum(TIERS.values()) + PER_DEVICE * devices
    write_table(folder / "digits.parquet", total)
    limits = ("160 KB", "400 KB", "1 MB")
    return {
        "data": {
            "source": str(folder / "digits.parquet"),
            "split": "iid",
            **{share: number / total for share, number in TIERS.items()},
        },
        "model": {"epochs": 5},
        "backbone": {"steps": 100, "specialise_steps": 20},
        "header": {"budget_steps": 100},
        "fleet": {
            "devices": [
                {
                    "count": devices // CLUSTERS,
                    "cluster": f"site{i + 1}",
                    "storage_limit": limits[i % 3],
                    "gpu_capacity": [40, 50, 60],
                }
                for i in range(CLUSTERS)
            ]
        },
        "run": {"cache": str(folder / "cache")},
    }


class Watched:
    """A command and all processes that come of it: how long, and how much memory they hold together at most."""

    def __init__(self, line: Sequence[str], mark: str) -> None:
        self.mark = f"{MARK}={mark}".encode()
        self.peak_bytes = self.processor_seconds = 0.0
        self._ended = threading.Event()
        watcher = threading.Thread(target=self._watch)
        start = time.perf_counter()
        watcher.start()
        done = subprocess.run(line, env={**os.environ, MARK: mark}, stdout=subprocess.PIPE, check=False)
        self.seconds = time.perf_counter() - start
        self._ended.set()
        watcher.join()
        if done.returncode:
            raise SystemExit(f"{' '.join(line)} ended with {done.returncode}")
        self.summary = json.loads(done.stdout)

    def _watch(self) -> None:
        page, tick = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
        processor: dict[str, float] = {}
        while not self._ended.wait(0.5):
            held = 0
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if self.mark not in (process / "environ").read_bytes():
                        continue
                    held += int((process / "statm").read_text().split()[1]) * page
                    fields = (process / "stat").read_text().rpartition(")")[2].split()
                    processor[process.name] = (int(fields[11]) + int(fields[12])) / tick
                except OSError:  # it is gone
                    continue
            self.peak_bytes = max(self.peak_bytes, held)
        self.processor_seconds = sum(processor.values())


def simulate(devices: int, engine: str = "simulation") -> dict[str, float]:
    """One fleet, from an empty cache, in seconds and bytes."""
    with tempfile.TemporaryDirectory(prefix="fleetfit-engines-") as temporary:
        folder = Path(temporary)
        job = folder / "job.toml"
        job.write_text(tomli_w.dumps(job_of(folder, devices)))
        line = [sys.executable, "-m", "fleetfit", "run", str(job), "--out", str(folder / "run"), "--engine", engine]
        run = Watched([*line, "--json", "--quiet"], str(folder))
        steps = [json.loads(text) for text in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    phases = run.summary["seconds"]
    assert len(run.summary["devices"]) == devices
    later = [s for s in steps if s["step"].split("/")[0] in DEVICE_PHASES and s["step"].split("/")[1] != "site1"]
    of_devices = sum(s["seconds"] for s in later) * CLUSTERS / (CLUSTERS - 1)
    return {
        "devices": devices,
        "seconds": run.seconds,
        "seconds_of_devices": of_devices,
        "seconds_of_steps": sum(phases.values()),
        "processor_seconds": run.processor_seconds,
        "peak_bytes": run.peak_bytes,
        **{f"seconds_{phase}": phases.get(phase, 0.0) for phase in phases},
    }


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the power law through the points, by least squares on logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x) > 1 else math.nan


def simulation(options: argparse.Namespace) -> None:
    """Fleets of several sizes, one after the other."""
    rows = []
    for devices in options.devices:
        if devices % CLUSTERS:
            raise SystemExit(f"--devices must be a multiple of the {CLUSTERS} clusters, got {devices}")
        rows.append(simulate(devices))
        print(json.dumps({k: round(v, 2) for k, v in rows[-1].items()}), flush=True)
    numbers = [row["devices"] for row in rows]
    slope = float(np.polyfit(numbers, [row["peak_bytes"] for row in rows], 1)[0]) if len(rows) > 1 else math.nan
    fitted = {
        "exponent of the devices' phases": exponent(numbers, [row["seconds_of_devices"] for row in rows]),
        "exponent in all": exponent(numbers, [row["seconds"] for row in rows]),
        "bytes a device": slope,
    }
    print(json.dumps(fitted))
    write_atomically(options.out / "engines_simulation.md", page(rows, fitted))


def page(rows: Sequence[Mapping[str, float]], fitted: Mapping[str, float]) -> str:
    """The figures as a page."""
    numbers = " ".join(f"{row['devices']:.0f}" for row in rows)
    of_devices, in_all = fitted["exponent of the devices' phases"], fitted["exponent in all"]
    return "\n".join(
        [
            "# Simulation: time and memory over the number of devices",
            "",
            f"`python benchmarks/engines.py simulation --devices {numbers}` on {os.cpu_count()} cores, Python "
            f"{platform.python_version()}: {CLUSTERS} clusters, {PER_DEVICE} images of digits a device, two rounds of "
            "refinement, from an empty cache, Ray started and ended, every device's model and the page written.",
            "",
            "| devices | seconds in all | of devices' phases | a device, ms | processor seconds | peak memory, MB |",
            "|---|---|---|---|---|---|",
            *(
                f"| {r['devices']:,.0f} | {r['seconds']:.0f} | {r['seconds_of_devices']:.0f} "
                f"| {1000 * r['seconds_of_devices'] / r['devices']:.0f} | {r['processor_seconds']:.0f} "
                f"| {r['peak_bytes'] / 1e6:,.0f} |"
                for r in rows
            ),
            "",
            "Devices' phases: refinement, what to ship, finish; of all clusters but the first, in which Ray's "
            "processes load PyTorch, and scaled to all. Memory: resident, of all processes together, at its highest; "
            "pages that processes share count in each.",
            "",
            f"- time of the devices' phases grows with the number of devices to the power of **{of_devices:.2f}**, "
            f"time in all to the power of **{in_all:.2f}**",
            f"- memory: **{fitted['bytes a device'] / 1e6:.2f} MB a device**",
            "",
        ]
    )


PARTS = {"simulation": simulation}


def main() -> None:
    """The part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--devices", type=int, nargs="+", default=[100, 200, 500, 1000])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the pages")
    options = parser.parse_args()
    PARTS[options.part](options)


if __name__ == "__main__":
    main()
