"""The page of members.py and members_liars.py."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np


def markdown(results: Path) -> str:
    """benchmarks/results/members.md, of whatever parts there are."""
    lines = [
        "# What members of a fleet, and strangers, can do to others",
        "",
        "`python benchmarks/members_fuzz.py`, `members.py privacy`, `members.py connections`, and "
        "`members_liars.py --data digits` (and `banking77`); each writes its JSON and this page. 2 CPU cores, one "
        "thread a process.",
    ]
    for part, write in (("fuzz", _fuzz), ("liars", _liars), ("privacy", _privacy), ("connections", _connections)):
        path = results / f"members_{part}.json"
        if path.exists():
            lines += ["", *write(json.loads(path.read_text()))]
    return "\n".join(lines) + "\n"


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]


def _fuzz(found: dict[str, Any]) -> list[str]:
    rows = [
        [name, f"{r['messages']:,}", f"{r['refused']:,}"]
        + [f"{r[f'milliseconds, {k}']:.2f}" for k in ("median", "99.9th percentile", "longest")]
        for name, r in found["rows"].items()
    ]
    ended = sum(found["ended"].values())
    return [
        "## Messages that no program sends",
        "",
        f"{ended} of {sum(r['messages'] for r in found['rows'].values()):,} ended a program (target 0). All together "
        f"took {found['memory over idle, MiB']:.0f} MiB over the idle program at most (target: 64 a message) and "
        f"{found['log, MB']:.2f} MB of log (target 10). What is not refused is a message that another honest member "
        "could have sent: a changed digit is a digit.",
        "",
        *_table(["to", "messages", "refused", "ms, median", "ms, 99.9th percentile", "ms, longest"], rows),
    ]


def _liars(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Devices that lie",
        "",
        "Clusters of ten. Points of test accuracy of the honest devices, mean over them and over seeds: against the "
        "same devices in the cluster without the liars. In brackets the worst mean of a seed. `huge`: all weights a "
        "million. All but `label-flipped` vote with 2^40 samples, a loss of 1,000 for what was sent, and 0 for what "
        "they want.",
    ]
    for name, of_data in found.items():
        rows = of_data["rows"]
        settings = list(dict.fromkeys(r["setting"] for r in rows))
        cells: dict[tuple[str, int, bool, str], list[dict[str, Any]]] = defaultdict(list)
        for r in rows:
            cells[r["kind"], r["liars"], r["robust"], r["setting"]].append(r)
        table = []
        for kind in dict.fromkeys(r["kind"] for r in rows):
            for liars in (0, 1, 2):
                for robust in (True, False):
                    own = [cells[kind, liars, robust, s] for s in settings]
                    if not any(own):
                        continue
                    row = [kind, str(liars), "bounded" if robust else "not"]
                    for of in own:
                        gains = [r["against without"] for r in of]
                        row.append(f"{np.mean(gains):+.2f} ({min(gains):+.2f})" if of else "")
                    table.append(row)
        worst = [r for r in rows if r["robust"] and r["liars"] == 1]
        under = min(r["worst against sent"] for r in worst)
        none = min(r["worst against sent"] for r in rows if r["robust"] and r["liars"] == 0)
        named = [r for r in worst if r["kind"] in ("scaled", "random", "constant", "huge")]
        lines += [
            "",
            f"### {name}, seeds {', '.join(map(str, of_data['seeds']))}",
            "",
            f"With bounds and one liar of ten, the lowest mean of any kind, setting and seed is "
            f"{min(r['against without'] for r in worst):+.2f} points (target -1). The worst single device is "
            f"{under:+.1f} points against the model as it was sent, and {none:+.1f} where nobody lies: a device has "
            f"so few test samples that one of them is several points. Of liars with long changes "
            f"{sum(r['named'] for r in named)} of {len(named)} are named, and "
            f"{sum(r['named wrongly'] for r in rows if r['robust'])} honest devices in "
            f"{sum(r['robust'] for r in rows)} runs.",
            "",
            *_table(["liars", "number", "header changes and votes", *settings], table),
        ]
    return lines


def _privacy(found: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{r['advantage']:+.2f} ({r['low']:+.2f} to {r['high']:+.2f})",
            "yes" if r["forms differ"] else "no",
        ]
        for name, r in found["rows"].items()
    ]
    return [
        "## An edge that wants to know which classes a device has",
        "",
        f"`[privacy]` with z = {found['z']:g}: epsilon {found['epsilon']:.1f} at delta {found['delta']:g}, for one "
        f"run and for 200, since a device answers only the first (lifetime epsilon by default: one run's). "
        f"{found['trials']} devices, half with the class; the attacker has seen half of them with their classes, "
        "sends the coarse header named, reads all numbers of all replies of a run, and guesses for the other half. "
        "Advantage: share of hits less share of false alarms, with a 95 % interval. No attack of this kind can have "
        f"more than {found['the most that the noise allows']:.2f}. The same attacker on devices without "
        "`[privacy]` shows what it can tell.",
        "",
        *_table(["coarse header", "advantage", "replies differ in kind, length or refusals"], rows),
    ]


def _connections(found: dict[str, Any]) -> list[str]:
    times, slow = found["milliseconds, median"], found["milliseconds, slowest"]
    rows = [
        [when, *(f"{times[when][k]:.1f} ({slow[when][k]:.0f})" for k in ("kept", "new"))]
        for when in ("before", "just after", "12 s later")
    ]
    ratio = max(times[when][k] / times["before"][k] for when in times for k in ("kept", "new"))
    return [
        "## Callers that do not hang up",
        "",
        f"{found['callers']:,} connections from the address of the members: half say nothing, half send a byte a "
        "second and call again when they are cut off. A member's greeting in milliseconds, median (slowest), over a "
        f"connection that it has and over a new one. At most {ratio:.1f} times as long as without (target 2). The "
        f"thread that keeps the state {'lives' if found['the thread of the state lives'] else 'has died'}; "
        f"{found['recovered after, s']:.1f} s after they have gone there is no trace of them (target 10); "
        f"{found['lines told']} lines told.",
        "",
        *_table(["", "kept connection", "new connection"], rows),
    ]
