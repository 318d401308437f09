"""What a second run costs when something changed: benchmarks/results/again.md.

    python benchmarks/again.py                        the recipe digits
    python benchmarks/again.py --recipe digits-small

The recipe is run once with an empty cache; then again in its folder, and with one thing changed each, in new folders,
with the cache. Processor time is that of the whole command, imports included, so the empty command is listed too.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
from digits_tables import machine, table

from fleetfit.core.files import write_atomically
from fleetfit.recipes import FOLDER

RESULTS = Path(__file__).parent / "results"
Fields = dict[str, Any]


def one_more(fields: Fields) -> None:
    """A device more in the first cluster."""
    fields["fleet"]["devices"][0]["count"] = fields["fleet"]["devices"][0].get("count", 1) + 1


def another_fleet(fields: Fields) -> None:
    """Each cluster has another number of devices, and twice the storage."""
    for group in fields["fleet"]["devices"]:
        group["count"] = group.get("count", 1) + 2
        number, unit = str(group["storage_limit"]).split()
        group["storage_limit"] = f"{2 * float(number):g} {unit}"


def setting(section: str, **keys: Any) -> Callable[[Fields], None]:
    """Some keys of a section are others."""
    return lambda fields: fields.setdefault(section, {}).update(keys)


CHANGES: dict[str, Callable[[Fields], None]] = {
    "one more device in one cluster": one_more,
    "another fleet": another_fleet,
    "refine.epochs": setting("refine", epochs=3),
    "backbone.gamma_p": setting("backbone", gamma_p=0.2),
    "header.search = linear": setting("header", search="linear"),
}


def run(job: Path, out: Path) -> dict[str, Any]:
    """Seconds of a command, and what it took from the cache."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "fleetfit", "run", str(job), "--out", str(out), "--quiet"]
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = json.loads((out / "summary.json").read_text())["from_cache"]
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"processor": processor, "wall": time.perf_counter() - start, "taken": taken}


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fleetfit-again-"))
    text = (FOLDER / f"{options.recipe}.toml").read_text(encoding="utf-8")

    def job(change: Callable[[Fields], None] = lambda fields: None) -> Path:
        fields = tomllib.loads(text)
        change(fields)
        fields.setdefault("run", {})["cache"] = str(folder / "cache")
        path = folder / "job.toml"
        path.write_text(tomli_w.dumps(fields))
        return path

    figures = {"first, the cache empty": run(job(), folder / "first")}
    figures["nothing changed, the same folder"] = run(job(), folder / "first")
    for number, (name, change) in enumerate(CHANGES.items()):
        figures[name] = run(job(change), folder / str(number))
        print(name, figures[name], flush=True)
    whole = figures["first, the cache empty"]["processor"]
    rows = [
        [
            name,
            f"{f['processor']:.1f}",
            f"{f['processor'] / whole:.0%}",
            f"{f['wall']:.1f}",
            ", ".join(f["taken"]) or "–",
        ]
        for name, f in figures.items()
    ]
    lines = [
        "# What a second run costs",
        "",
        f"`python benchmarks/again.py --recipe {options.recipe}` (its head says how), {machine()}",
        "",
        *table(["run", "processor s", "of the first", "wall s", "taken from the cache"], rows),
    ]
    write_atomically(RESULTS / "again.md", "\n".join(lines))


if __name__ == "__main__":
    main()
