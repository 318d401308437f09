"""The simulation's time and memory over the number of devices: benchmarks/results/engines_simulation.md.

scikit-learn's digits are 1,797, too few for a thousand devices: each is moved by up to one pixel to all sides, which
makes nine of it, 16,173 images in a Parquet file. A fleet of n devices uses 3,200 of them for cloud and edges and eight
more for each device, so that nothing but the number of devices differs between two fleets.
"""

import argparse
import io
import json
import math
import os
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
from engines_loopback import MARK, leftovers
from engines_page import setting, table, verdict

from fleetfit.core.files import write_atomically

CLUSTERS = 20
PER_DEVICE = 8
EXPONENT, DEVICE_BYTES, MEMORY_BYTES = 1.1, 2e6, 24 * 2**30  # targets
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
        try:
            done = subprocess.run(line, env={**os.environ, MARK: mark}, stdout=subprocess.PIPE, check=False)
        finally:
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
        "left": len(leftovers(str(folder))),
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
        fitted = fit(rows)
        print(json.dumps(fitted), flush=True)
        write_atomically(options.out / "engines_simulation.md", page(rows, fitted))


def fit(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How time and memory grow with the number of devices."""
    numbers = [row["devices"] for row in rows]
    keys = {"devices' phases": "seconds_of_devices", "in all": "seconds", "processor": "processor_seconds"}
    fitted = {name: exponent(numbers, [row[key] for row in rows]) for name, key in keys.items()}
    slope = float(np.polyfit(numbers, [row["peak_bytes"] for row in rows], 1)[0]) if len(rows) > 1 else math.nan
    return fitted | {"bytes a device": slope}


def page(rows: Sequence[Mapping[str, float]], fitted: Mapping[str, float]) -> str:
    """The figures as a page."""
    numbers = " ".join(f"{row['devices']:.0f}" for row in rows)
    most = rows[-1]
    lines = [
        "# Simulation: time and memory over the number of devices",
        "",
        setting(f"python benchmarks/engines.py simulation --devices {numbers}", "flwr", "ray"),
        "",
        f"{CLUSTERS} clusters, {PER_DEVICE} images of digits a device, two rounds of refinement, from an empty cache, "
        "Ray started and ended, every device's model and the page written.",
        "",
        *table(
            [
                *("devices", "seconds in all", "of devices' phases", "a device, ms", "processor seconds"),
                *("peak memory, MB", "processes left"),
            ],
            [
                [
                    *(f"{r['devices']:,.0f}", f"{r['seconds']:.0f}", f"{r['seconds_of_devices']:.0f}"),
                    *(f"{1000 * r['seconds_of_devices'] / r['devices']:.0f}", f"{r['processor_seconds']:.0f}"),
                    *(f"{r['peak_bytes'] / 1e6:,.0f}", f"{r['left']:.0f}"),
                ]
                for r in rows
            ],
        ),
        "",
        "Devices' phases: refinement, what to ship, finish; of all clusters but the first, in which Ray's "
        "processes load PyTorch, and scaled to all. Processor seconds: of all processes that a run started. Memory: "
        "resident, of all processes together, at its highest; pages that processes share count in each.",
        "",
        *table(
            ["figure", "target", "measured", ""],
            [
                [
                    *("devices of a job that finished", "1,000", f"{most['devices']:,.0f}"),
                    verdict(most["devices"] >= 1000),
                ],
                [
                    *("its peak memory", f"<= {MEMORY_BYTES / 1e6:,.0f} MB", f"{most['peak_bytes'] / 1e6:,.0f} MB"),
                    verdict(most["peak_bytes"] <= MEMORY_BYTES),
                ],
                [
                    *("memory of one device more", f"<= {DEVICE_BYTES / 1e6:g} MB"),
                    f"{fitted['bytes a device'] / 1e6:.2f} MB",
                    verdict(fitted["bytes a device"] <= DEVICE_BYTES),
                ],
                *(
                    [
                        *(f"exponent of time: {name}", f"<= {EXPONENT}", f"{fitted[key]:.2f}"),
                        verdict(fitted[key] <= EXPONENT),
                    ]
                    for name, key in (
                        ("wall clock, devices' phases", "devices' phases"),
                        ("wall clock, all", "in all"),
                        ("processor, all", "processor"),
                    )
                ),
            ],
        ),
        "",
        "nan: not measured yet, so not met. Exponent: of the power law through the runs, by least squares on "
        "logarithms; 1 is linear.",
        "",
    ]
    return "\n".join(lines)
