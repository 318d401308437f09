"""What a refine round costs in a deployment, beside Flower's own floor: benchmarks/results/engines_rounds.md."""

import argparse
import json
import re
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines_floor import Floor
from engines_loopback import BELOW, DEVICES, SHORT, Fleet, leftovers
from engines_page import setting, table, verdict

from fleetfit.core.files import write_atomically

REPLIED = re.compile(r"(\S+) replied to a (\w+) after ([\d.]+) s")
ANSWERED = re.compile(r"a (\w+) is answered in ([\d.]+) s")
FACTOR = 1.3
KIND = "refine_round"
WARM_UP = 1  # rounds that are not counted: a first message brings the run's description and the bundle


def measure(rounds: int) -> dict[str, Any]:
    """Both floors, a fleet, both floors again, one after the other on the same machine: others may work there too."""
    with tempfile.TemporaryDirectory(prefix="fleetfit-rounds-") as temporary:
        fleet = Fleet(Path(temporary), {**SHORT, "refine": {"rounds": rounds}})
        try:
            before = both_floors(fleet, rounds, "before")
            summary = fleet.run("--debug")
            after = both_floors(fleet, rounds, "after")
            floors = {name: before[name] + after[name] for name in before}
            messages = {name: ANSWERED.findall(fleet.log(name).read_text()) for name in DEVICES}
            replies = {edge: REPLIED.findall(fleet.log(edge).read_text()) for edge in ("phones", "boxes")}
        finally:
            fleet.close()
        found: dict[str, Any] = {"floors": floors, "seconds": summary["seconds"], "messages": [], "rounds": []}
        found["floors by when"] = {"before": before, "after": after}
        for edge, heard in replies.items():
            took = {d: [float(s) for name, kind, s in heard if name == d and kind == KIND] for d in BELOW[edge]}
            compute = {d: [float(s) for kind, s in messages[d] if kind == KIND] for d in BELOW[edge]}
            if any(len(took[d]) != rounds or len(compute[d]) != rounds for d in BELOW[edge]):
                raise SystemExit(f"{edge}: not every message was answered once: {took} {compute}")
            for number in range(WARM_UP, rounds):
                of_round = [(took[d][number], compute[d][number]) for d in BELOW[edge]]
                found["messages"] += of_round
                found["rounds"].append((max(t for t, _ in of_round), max(c for _, c in of_round)))
        kinds = {kind for heard in replies.values() for _, kind, _ in heard}
        found["kinds"] = {
            kind: (
                statistics.median(float(s) for heard in replies.values() for _, k, s in heard if k == kind),
                statistics.median(float(s) for own in messages.values() for k, s in own if k == kind),
            )
            for kind in sorted(kinds)
        }
        found["left"] = leftovers(fleet.mark)
        return found


def both_floors(fleet: Fleet, rounds: int, when: str) -> dict[str, list[float]]:
    """Seconds of empty rounds, by way; half as many as the fleet does."""
    number = WARM_UP + (rounds - WARM_UP + 1) // 2
    floors = {name: Floor(fleet, name == "ours", when).measure(fleet, number)[WARM_UP:] for name in ("plain", "ours")}
    print(json.dumps({when: floors}), flush=True)
    return floors


def middle(values: Sequence[float]) -> str:
    """Median, and the range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def rounds(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    found = measure(options.rounds)
    print(json.dumps(found))
    write_atomically(options.out / "engines_rounds.md", "\n".join(page(found, options.rounds)))


def page(found: dict[str, Any], number: int) -> list[str]:
    """The figures as a page."""
    walls, computes = zip(*found["rounds"], strict=True)
    message_walls, message_computes = zip(*found["messages"], strict=True)
    around = [wall - compute for wall, compute in found["rounds"]]
    floors = {name: statistics.median(seconds) for name, seconds in found["floors"].items()}
    wall, compute = statistics.median(walls), statistics.median(computes)
    names = {"plain": "Flower's own way, a process a message", "ours": "our way, a process that is there"}
    verdicts = []
    for name, floor in floors.items():
        most = FACTOR * floor + compute
        verdicts.append(
            [
                *(
                    names[name],
                    f"{floor:.2f}",
                    f"<= {FACTOR} x {floor:.2f} + {compute:.2f} = {most:.2f}",
                    f"{wall:.2f}",
                ),
                verdict(wall <= most),
            ]
        )
    return [
        "# A round of refinement, and Flower's floor",
        "",
        setting(f"python benchmarks/engines.py rounds --rounds {number}", "flwr"),
        "",
        "The fleet of recipes/fleet-loopback.toml with recipes/digits-small.toml, both edges and all four devices at "
        "work at a time on the same cores. The floor: one SuperLink and two SuperNodes with the certificates and keys "
        "of an edge and its devices, nothing else of ours at work; a round sends an empty `query` to both and waits "
        f"for both replies. {number - WARM_UP} rounds each, half of the floors' before the fleet and half after it, "
        "without the first. Median (lowest to highest), in seconds. Where the load is more than the number of cores, "
        "others worked on the machine too, and seconds are those of a busy machine: the floors before and after tell "
        "how busy.",
        "",
        *table(
            ["what", "seconds"],
            [
                ["floor, " + names["plain"] + ", Flower's `send_and_receive`", middle(found["floors"]["plain"])],
                ["floor, " + names["ours"] + ", replies looked for as we do", middle(found["floors"]["ours"])],
                ["a refine round", middle(walls)],
                ["of it, computing on the device that takes longest", middle(computes)],
                ["what is left", middle(around)],
                *(
                    [f"floor, {when} the fleet: {name}", middle(floors[name])]
                    for when, floors in found["floors by when"].items()
                    for name in floors
                ),
                ["a message of a refine round, sent to reply", middle(message_walls)],
                ["of it, computing on the device", middle(message_computes)],
            ],
        ),
        "",
        *table(["floor", "seconds", "target of a refine round", "measured", ""], verdicts),
        "",
        "By kind of message, medians over all four devices:",
        "",
        *table(
            ["message", "sent to reply, s", "computing on the device, s"],
            [[kind, f"{took:.2f}", f"{own:.2f}"] for kind, (took, own) in found["kinds"].items()],
        ),
        "",
        f"Processes left: {len(found['left'])}.",
        "",
    ]
