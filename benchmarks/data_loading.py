"""Seconds and memory of loading 50,000 images and splitting them into 50 devices: benchmarks/results/data_loading.md.

    FLEETFIT_DATA=... python benchmarks/data_loading.py        CIFAR-10, from a folder cifar10 or from the hub

Each load runs in a process of its own, as a run of fleetfit does: first with an empty cache, then with a full one. The
peak is what the system says of that process. It counts PyTorch and all other libraries, and pages of the memory map.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SPLITS: dict[str, dict[str, Any]] = {
    "iid": {"split": "iid"},
    "5 classes a device": {"split": "classes", "classes_per_device": 5},
    "Dirichlet(0.5)": {"split": "dirichlet", "alpha": 0.5},
}


def load(source: str, cache: str, images: int, devices: int) -> dict[str, Any]:
    """One load and all splits, measured in this process."""
    begin = time.perf_counter()
    from fleetfit.config.job import make_job
    from fleetfit.data.partition import share_out
    from fleetfit.data.sources import load_samples

    fields = {
        "data": {"source": source, "limit": images, "splits": "train"},
        "model": {"config": {"image_size": 32, "num_channels": 3}},
        "run": {"cache": cache},
    }
    imported = time.perf_counter()
    samples = load_samples(make_job(fields))
    loaded = time.perf_counter()
    assert len(samples) == images, f"{len(samples)} images, not {images}"
    names = {"all": [f"all-{i}" for i in range(1, devices + 1)]}
    seconds = {}
    for name, keys in SPLITS.items():
        start = time.perf_counter()
        data = share_out(samples, make_job({"data": keys}).data, names, 0)
        seconds[name] = time.perf_counter() - start
        assert len(data.devices) == devices
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "import": imported - begin,
        "load": loaded - imported,
        "split": seconds,
        "cpu": time.process_time(),
        "peak_bytes": peak,
        "from": samples.notes[0],
        "pixel_bytes": samples.inputs.store.nbytes,
    }


def in_a_process(options: argparse.Namespace, cache: str) -> dict[str, Any]:
    """The same in a process of its own."""
    arguments = [sys.executable, __file__, "--source", options.source, "--images", str(options.images)]
    arguments += ["--devices", str(options.devices), "--cache", cache]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    """Load twice and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="cifar10")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--devices", type=int, default=50)
    parser.add_argument("--cache", default="", help="measure one load with this cache and print it; of this program")
    parser.add_argument("--out", type=Path, default=RESULTS / "data_loading.md")
    options = parser.parse_args()
    if options.cache:
        print(json.dumps(load(options.source, options.cache, options.images, options.devices)))
        return
    with tempfile.TemporaryDirectory(prefix="fleetfit-data-") as cache:
        loads = {name: in_a_process(options, cache) for name in ("empty", "full")}
    head = " | ".join(f"split {name}, s" for name in SPLITS)
    rows = [
        f"| {name} | {m['import']:.1f} | {m['load']:.1f} | {' | '.join(f'{s:.1f}' for s in m['split'].values())} "
        f"| {m['import'] + m['load'] + max(m['split'].values()):.1f} | {m['cpu']:.1f} | {m['peak_bytes'] / 1e9:.2f} |"
        for name, m in loads.items()
    ]
    page = f"""# Loading data

`python benchmarks/data_loading.py`: {options.images:,} images of {options.source} into {options.devices} devices,
on {os.cpu_count()} CPU cores with one thread ({platform.machine()}, Python {platform.python_version()}), load average
{os.getloadavg()[0]:.1f}. The pixels are {loads["full"]["pixel_bytes"] / 1e6:.0f} MB on disk, memory-mapped. The peak is
of the whole process, libraries included.

| cache | imports, s | loading, s | {head} | in all with the slowest split, s | CPU with all splits, s | peak, GB |
|---|---|---|---|{"---|" * len(SPLITS)}---|---|
{chr(10).join(rows)}
"""
    options.out.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
