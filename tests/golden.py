"""The golden figures: what small seeded jobs gave when they were last written down, in golden.json.

    python tests/golden.py            write them anew: only for a change that is meant to change figures, and says so

A change that only moves code gives the same figures to the last digit on one machine; between machines and versions of
PyTorch they differ by rounding, and decisions and sizes not at all. The simulation is compared with the local engine in
its own tests.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GOLDEN = HERE / "golden.json"
sys.path += [str(HERE), str(HERE / "data")]


def jobs(folder: Path) -> dict[str, dict[str, Any]]:
    """Fields of each job, by name."""
    from make_data import text_csv, text_fields
    from tiny_job import tiny_fields

    cache = folder / "cache"
    two = {"widths": [0.5, 1.0], "steps": 6, "specialise_steps": 2, "importance_samples": 32}
    shifted = {"split": "iid", "shift": "labels", "groups": 2}
    return {
        "fleetfit": tiny_fields(cache, backbone=two, refine={"guard": True, "rounds": 2, "epochs": 2}),
        "paper": tiny_fields(cache, method="paper", backbone=two),
        "groups": tiny_fields(cache, {"small": 4, "large": 4}, data=shifted, refine={"guard": True, "rounds": 3}),
        "text": text_fields(text_csv(folder / "rows.csv", 288), cache, split="iid"),
    }


def figures(fields: dict[str, Any], out: Path) -> dict[str, Any]:
    """What a job gives that does not depend on time and memory, and not on where it lies."""
    import fleetfit

    summary = fleetfit.run(fields, out)
    kept = {k: summary[k] for k in ("method", "reference", "clusters", "devices", "absent", "faults", "traffic")}
    return json.loads(json.dumps(kept))  # type: ignore[no-any-return]


def main() -> None:
    """Write the golden figures."""
    found = {}
    for name in jobs(Path(tempfile.mkdtemp())):
        folder = Path(tempfile.mkdtemp())
        found[name] = figures(jobs(folder)[name], folder / "run")
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
