"""Clusters of unlike devices, by storage and by the paper's k-means: benchmarks/results/clusters.md.

    python benchmarks/clusters.py            five seeds, about four minutes each on one core

Fifty devices of 130 KB to 2 MB, evenly in doublings, on digits. Reference, elastic backbone and candidates are the same
for both ways; nothing was chosen on these seeds.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

import fleetfit
from fleetfit.cloud.clusters import fleet_of, unused_room
from fleetfit.config.job import make_job
from fleetfit.core.files import write_atomically

RESULTS = Path(__file__).parent / "results"
LIMITS = tuple(round(130_000 * (2_000_000 / 130_000) ** (i / 49)) for i in range(50))
SEEDS = (51, 52, 53, 54, 55)


def figures(seed: int, folder: Path) -> dict[str, Any]:
    """Both ways on one seed."""
    found = {}
    for way in ("kmeans", "storage"):
        fields = {
            "seed": seed,
            "fleet": {"clustering": way, "devices": [{"count": 50, "storage_limit": LIMITS}]},
            "run": {"cache": str(folder / "cache")},
        }
        job, out = make_job(fields), folder / f"{way}-{seed}"
        for phase in ("reference", "elastic", "candidates"):
            there = folder / f"kmeans-{seed}" / "steps" / phase
            if way == "storage" and not (out / "steps" / phase).exists():
                shutil.copytree(there, out / "steps" / phase)
        summary = fleetfit.run(job, out)
        fleet = fleet_of(job)
        devices = summary["devices"]
        of = {
            key: 100 * float(np.mean([d[key] for d in devices]))
            for key in ("accuracy_coarse", "accuracy_local", "accuracy")
        }
        found[way] = of | {
            "clusters": [[len(m), min(a.storage_limit_bytes for a in m)] for m in fleet.values()],
            "below half": len(unused_room(fleet)),
            "room used": float(np.mean([d["size_bytes"] / d["limit_bytes"] for d in devices])),
            "left out": len(summary["left_out"]),
        }
        shutil.rmtree(out / "devices")
    return found


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The page."""
    lines = [
        "# Clusters of unlike devices",
        "",
        "`python benchmarks/clusters.py`. Fifty devices of 130 KB to 2 MB, evenly in doublings, on digits; seeds "
        f"{', '.join(results)}. Below half: the cluster's limit is less than half "
        "of the device's. Mean accuracy % of the devices' own test images (mean over seeds, ± standard error).",
        "",
        "| clusters | number, limits | devices below half | room used | as sent | fine-tuned alone | fleetfit |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way, name in (("storage", "by storage (default)"), ("kmeans", "k-means in plain bytes and watts")):
        rows = [r[way] for r in results.values()]
        limits = ", ".join(f"{limit / 1000:.0f} KB ({count})" for count, limit in rows[0]["clusters"])
        cells = [
            f"{np.mean([r[k] for r in rows]):.1f} ± {np.std([r[k] for r in rows], ddof=1) / len(rows) ** 0.5:.1f}"
            for k in ("accuracy_coarse", "accuracy_local", "accuracy")
        ]
        below, room = (np.mean([r[k] for r in rows]) for k in ("below half", "room used"))
        lines.append(
            f"| {name} | {len(rows[0]['clusters'])}: {limits} | {below:.0f} | {room:.0%} | {' | '.join(cells)} |"
        )
    gains = np.array([r["storage"]["accuracy"] - r["kmeans"]["accuracy"] for r in results.values()])
    sent = np.array([r["storage"]["accuracy_coarse"] - r["kmeans"]["accuracy_coarse"] for r in results.values()])
    lines += [
        "",
        f"By storage, over k-means on the same seed: {sent.mean():+.1f} points as sent, {gains.mean():+.2f} ± "
        f"{gains.std(ddof=1) / len(gains) ** 0.5:.2f} in the end ({', '.join(f'{g:+.2f}' for g in gains)}).",
        "",
        "So here it costs accuracy in the end: smaller clusters have fewer devices to learn from, and of ten training "
        "images a device that is worth more than a larger model, which its own smallest shapes hardly need on digits. "
        "What it is for is the promise that no device shares a limit of less than half of its own; "
        '`fleet.clustering = "kmeans"` or a smaller `fleet.num_clusters` is one option away.',
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-clusters"))
    parser.add_argument("--out", type=Path, default=RESULTS / "clusters")
    args = parser.parse_args()
    results = {}
    for seed in args.seeds:
        results[str(seed)] = figures(seed, args.folder)
        print(seed, json.dumps(results[str(seed)]), flush=True)
        write_atomically(args.out.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
        if len(results) > 1:
            write_atomically(args.out.with_suffix(".md"), markdown(results))


if __name__ == "__main__":
    main()
