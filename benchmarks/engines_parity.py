"""Local, simulation, deployment: do they give the same models? benchmarks/results/engines_parity.md."""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from engines_loopback import DEVICES, SHORT, Fleet, leftovers
from engines_page import setting, table, verdict

from fleetfit.core.files import write_atomically

TOLERANCE = 1e-5
ENGINES = ("local", "simulation", "deployment")


def model_of(fleet: Fleet, engine: str, device: str) -> dict[str, Any]:
    """A device's tensors; in a deployment they are on the device."""
    folder = fleet.kits / device / "model" if engine == "deployment" else fleet.folder / engine / "devices" / device
    tensors: dict[str, Any] = safetensors.torch.load_file(folder / "model.safetensors")
    return tensors


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest of all tensors; infinite if they are not of the same names and shapes."""
    if {n: t.shape for n, t in one.items()} != {n: t.shape for n, t in other.items()}:
        return float("inf")
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def compare(seed: int) -> dict[str, Any]:
    """One seed by all engines, each from an empty cache."""
    with tempfile.TemporaryDirectory(prefix="fleetfit-parity-") as temporary:
        fleet = Fleet(Path(temporary), {**SHORT, "seed": seed})
        try:
            summaries = {"deployment": fleet.run()}
            summaries |= {engine: fleet.run_whole(engine) for engine in ("local", "simulation")}
        finally:
            fleet.close()
        local = summaries["local"]
        found: dict[str, Any] = {
            "seed": seed,
            "chosen": {c["id"]: chosen(c) for c in local["clusters"]},
            "seconds": {engine: summaries[engine]["wall_seconds"] for engine in ENGINES},
            "left": leftovers(fleet.mark),
        }
        for engine in ENGINES[1:]:
            other = summaries[engine]
            found[engine] = {
                "chosen": [chosen(c) for c in other["clusters"]] == [chosen(c) for c in local["clusters"]],
                "figures": all(other[key] == local[key] for key in ("reference", "clusters", "devices")),
                "weights": max(difference(model_of(fleet, "local", d), model_of(fleet, engine, d)) for d in DEVICES),
            }
        return found


def chosen(cluster: Mapping[str, Any]) -> str:
    """Backbone and header of a cluster, in one line."""
    return f"{cluster['width']:g} x {cluster['depth']}, {cluster['header']}"


def parity(options: argparse.Namespace) -> None:
    """Over several seeds."""
    rows = []
    for seed in options.seeds:
        rows.append(compare(seed))
        print(json.dumps(rows[-1]), flush=True)
        write_atomically(options.out / "engines_parity.md", "\n".join(page(rows)))


def page(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The figures as a page."""
    seeds = " ".join(str(row["seed"]) for row in rows)
    of = [(row, engine) for row in rows for engine in ENGINES[1:]]
    worst = max(row[engine]["weights"] for row, engine in of)
    same = all(row[engine]["chosen"] for row, engine in of)
    left = [process for row in rows for process in row["left"]]
    cells = [
        [
            row["seed"],
            engine,
            "same" if row[engine]["chosen"] else "**other**",
            "same" if row[engine]["figures"] else "**other**",
            f"{row[engine]['weights']:.1e}",
            f"{row['seconds']['local']:.0f}",
            f"{row['seconds'][engine]:.0f}",
        ]
        for row, engine in of
    ]
    return [
        "# One job by three engines",
        "",
        setting(f"python benchmarks/engines.py parity --seeds {seeds}", "flwr", "ray"),
        "",
        "recipes/digits-small.toml by the local engine, by the simulation on Ray, and by the fleet of "
        "recipes/fleet-loopback.toml: seven programs, one cloud, two edges, four devices, over TLS, with keys. Each "
        "engine trains its own reference, from an empty cache; training in the cloud and the header's search are cut "
        "short, which all engines do with the same code. Compared with the local engine:",
        "",
        *table(
            [
                *("seed", "engine", "backbones and headers chosen", "figures in summary.json"),
                *("largest difference of a weight", "local, s", "engine, s"),
            ],
            cells,
        ),
        "",
        "Figures: those of the reference, of clusters and of devices. Weights: of all tensors of all four devices' "
        "models; in the fleet as they lie in the devices' kits. Seconds: of the whole command, with start and end.",
        "",
        *table(
            ["figure", "target", "measured", ""],
            [
                ["chosen backbones and headers", "the same", "the same" if same else "others", verdict(same)],
                ["device weights", f"<= {TOLERANCE:.0e}", f"{worst:.1e}", verdict(worst <= TOLERANCE)],
                ["processes left", "0", len(left), verdict(not left)],
            ],
        ),
        "",
        "Chosen: "
        + "; ".join(f"seed {r['seed']}: " + ", ".join(f"{n} `{c}`" for n, c in r["chosen"].items()) for r in rows),
        "",
    ]
