"""What `fleetfit plan` said beside what a run then took: benchmarks/results/plan.md.

    python benchmarks/plan.py digits
    FLEETFIT_DATA=<folder> python benchmarks/plan.py cifar10
    FLEETFIT_DATA=<folder> python benchmarks/plan.py banking77 --set model.pretrained=<folder>

Plan and run are processes of their own, one after the other, with one thread and an empty cache of references.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from fleetfit.core.files import write_atomically

RESULTS = Path(__file__).parent / "results"
PHASES = {"refine": ("refine", "propose", "finish")}  # of the estimate -> of the run


def measured(recipe: str, sets: list[str]) -> dict[str, Any]:
    """A plan, and the run."""
    with tempfile.TemporaryDirectory() as folder:
        keys = [part for key in (*sets, "run.threads=1", f"run.cache={folder}/cache") for part in ("-s", key)]
        fleetfit = [sys.executable, "-m", "fleetfit"]
        begun = time.perf_counter()
        plan = json.loads(subprocess.run([*fleetfit, "plan", recipe, *keys, "--json"], capture_output=True).stdout)
        took = time.perf_counter() - begun
        out = Path(folder, "run")
        subprocess.run([*fleetfit, "run", recipe, *keys, "-o", str(out), "--quiet"], check=True)
        summary = json.loads((out / "summary.json").read_text())
        front = (out / "cloud" / "front.csv").read_text().splitlines()
    columns = front[0].split(",")
    sizes = {
        (r["cluster"], float(r["width"]), int(r["depth"])): int(r["size_bytes"])
        for r in (dict(zip(columns, line.split(","), strict=True)) for line in front[1:])
    }
    planned = {
        (c["id"], s["shape"]["width"], s["shape"]["depth"]): s["size_bytes"]
        for c in plan["clusters"]
        for s in c["shapes"]
    }
    ran = {
        p["phase"]: sum(summary["seconds"].get(name, 0.0) for name in PHASES.get(p["phase"], (p["phase"],)))
        for p in plan["phases"]
    }
    return {
        "seconds of the plan": took,
        "samples": plan["data"]["num_samples"],
        "phases": {p["phase"]: [p["seconds"], ran[p["phase"]]] for p in plan["phases"]},
        "memory, bytes": [plan["peak_memory_bytes"], summary["peak_memory_bytes"]],
        "shapes": len(planned),
        "sizes that differ": sum(sizes[key] != size for key, size in planned.items()),
    }


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# What a plan says, and what a run takes",
        "",
        "`python benchmarks/plan.py RECIPE`. One run each, one thread, references not in the cache; another such "
        "benchmark was at work on the second core of two. Estimated / taken.",
        "",
        "| recipe | samples | seconds of the plan | minutes | memory, MB | shapes, of other bytes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for recipe, r in results.items():
        said, took = (sum(p[i] for p in r["phases"].values()) / 60 for i in (0, 1))
        memory = " / ".join(f"{n / 1e6:,.0f}" for n in r["memory, bytes"])
        lines.append(
            f"| {recipe} | {r['samples']:,} | {r['seconds of the plan']:.0f} | {said:.1f} / {took:.1f} | {memory} | "
            f"{r['shapes']}, {r['sizes that differ']} |"
        )
    lines += [
        "",
        "Seconds by phase:",
        "",
        "| phase | " + " | ".join(results) + " |",
        "| --- |" + " --- |" * len(results),
    ]
    phases = next(iter(results.values()))["phases"]
    for phase in phases:
        cells = (" / ".join(f"{s:.0f}" for s in r["phases"][phase]) for r in results.values())
        lines.append(f"| {phase.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path, default=RESULTS / "plan")
    args = parser.parse_args()
    found = measured(args.recipe, args.set)
    path = args.out.with_suffix(".json")
    results = (json.loads(path.read_text()) if path.exists() else {}) | {args.recipe: found}
    write_atomically(path, json.dumps(results, indent=1) + "\n")
    write_atomically(args.out.with_suffix(".md"), markdown(results))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
