"""Kill the demo at random moments and go on: is the summary the same? Writes benchmarks/results/resume.md.

    python benchmarks/resume.py              five kills of one run, against a run that was not killed (about 5 minutes)

Both runs start with an empty cache. Each kill is a SIGKILL up to three seconds after a random step has finished, so
that the moments lie all over the run and not only in its longest phase; the process is then started again.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fleetfit.core.files import read_json, write_atomically

RESULTS = Path(__file__).parent / "results"
NOT_COMPARED = ("seconds", "cpu_seconds", "peak_memory_bytes")


def command(job: Path, out: Path) -> list[str]:
    """The command line of a run with a cache of its own."""
    return [sys.executable, "-m", "fleetfit", "run", str(job), "--out", str(out), "--set", f"run.cache={out}-cache"]


def comparable(out: Path) -> dict[str, Any]:
    """The summary without what may differ."""
    return {k: v for k, v in read_json(out / "summary.json").items() if k not in NOT_COMPARED}


def finished(out: Path) -> int:
    """How many steps a run has finished."""
    return len(list((out / "steps").rglob("[!.]*.safetensors")))


def main() -> None:
    """Run, kill, go on, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=Path("recipes/digits.toml"))
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=RESULTS / "resume.md")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="fleetfit-resume-"))
    try:
        start = time.perf_counter()
        subprocess.run(command(options.job, folder / "whole"), check=True, stderr=subprocess.DEVNULL)
        whole_seconds = time.perf_counter() - start
        summary = read_json(folder / "whole" / "summary.json")
        peak = summary["peak_memory_bytes"]
        phases = ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in summary["seconds"].items() if seconds >= 1)
        rows = []
        out = folder / "killed"
        total = finished(folder / "whole")
        for target in sorted(chance.sample(range(total), options.kills)):
            pause = chance.uniform(0, 3)
            process = subprocess.Popen(command(options.job, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None and finished(out) < target:
                time.sleep(0.02)
            try:
                process.wait(timeout=pause)
                ended = "ended before"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                ended = "killed"
            rows.append(f"| {target} | {pause:.1f} | {ended} | {finished(out)} of {total} |")
            print(f"{pause:.1f} s after step {target}: {ended}, {finished(out)} of {total} steps finished", flush=True)
        subprocess.run(command(options.job, out), check=True, stderr=subprocess.DEVNULL)
        same = comparable(out) == comparable(folder / "whole")
    finally:
        shutil.rmtree(folder)
    lines = [
        "# Killed and gone on",
        "",
        f"`python benchmarks/resume.py --seed {options.seed}`, job {options.job}. The run that was not killed took "
        f"{whole_seconds:.0f} s from an empty cache, and {peak / 1e6:.0f} MB at its peak. Seconds by phase: {phases}.",
        "",
        "| after step | and seconds | what happened | steps finished by then |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Summary equal to that of the run that was not killed, but for {' and '.join(NOT_COMPARED)}: "
        f"**{'yes' if same else 'no'}**.",
    ]
    write_atomically(options.out, "\n".join(lines) + "\n")
    print(json.dumps({"same": same, "seconds": round(whole_seconds, 1), "peak_memory_bytes": peak}))
    sys.exit(not same)


if __name__ == "__main__":
    main()
