"""Bytes that we count against bytes on the wire of a deployment: benchmarks/results/engines_wire.md."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines_counter import DOWN, GREETING, UP, CountingDoor
from engines_loopback import BELOW, SHORT, Fleet, leftovers
from engines_page import setting, table, verdict

from fleetfit.core.files import read_json, write_atomically

TARGET = 0.10
JOBS: dict[str, dict[str, Any]] = {
    "digits-small": SHORT,
    "hidden size 128": {
        **SHORT,
        "model": {
            **SHORT["model"],
            "config": {
                "hidden_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "intermediate_size": 512,
            },
        },
        "backbone": {**SHORT["backbone"], "widths": [1.0], "depths": [1, 3]},
        "fleet": {
            "devices": [
                {"count": 2, "cluster": "phones", "storage_limit": "2 MB", "gpu_capacity": [40, 50]},
                {"count": 2, "cluster": "boxes", "storage_limit": "5 MB", "gpu_capacity": [80, 100]},
            ]
        },
    },
}
LINKS = {"cloud - edges": ("cloud",), "edges - devices": ("phones", "boxes")}
COUNTED = {
    ("cloud - edges", DOWN): "cloud_to_edge_bytes",
    ("cloud - edges", UP): "edge_to_cloud_bytes",
    ("edges - devices", DOWN): "edge_to_device_bytes",
    ("edges - devices", UP): "device_to_edge_bytes",
}
MESSAGES = ("pull-messages (a message)", "pull-object", "confirm-message-received", "push-messages", "push-object")
KINDS = {
    "messages": MESSAGES,
    "polls": ("pull-messages (none)", "send-node-heartbeat"),
    "greetings": (GREETING,),
    "run and node": ("get-run", "get-fab", "activate-node", "deactivate-node"),
}
TLS = "TLS"
HANDSHAKE = "handshake (greeting)"


def measure(changed: dict[str, Any]) -> dict[str, Any]:
    """One job: by link and direction what was counted, what was on the wire, and what it was for."""
    with tempfile.TemporaryDirectory(prefix="fleetfit-wire-") as temporary:
        fleet = Fleet(Path(temporary), changed)
        doors = {upper: CountingDoor(fleet.kit(upper)) for upper in BELOW}
        try:
            for upper, door in doors.items():
                fleet.set_port(upper, door.port, server=False)
            summary = fleet.run()
        finally:
            fleet.close()
            for door in doors.values():
                door.close()
        for door in doors.values():
            if door.errors:
                raise SystemExit(f"the counter failed: {door.errors[:3]}")
        found: dict[str, Any] = {"seconds": summary["wall_seconds"], "left": leftovers(fleet.mark), "links": []}
        for (link, direction), key in COUNTED.items():
            of_link = [doors[upper] for upper in LINKS[link]]
            passed = sum(door.passed[direction] for door in of_link)
            names = sorted({call for door in of_link for call, way in door.wire if way == direction})
            found["links"].append(
                {
                    "link": link,
                    "direction": direction,
                    "counted": summary["traffic"][key],
                    "door": summary["traffic"][key.replace("_bytes", "_wire_bytes")],
                    "wire": passed,
                    "calls": {
                        name: {
                            "calls": sum(door.calls[name] for door in of_link),
                            "wire": sum(door.wire[name, direction] for door in of_link),
                            "without_tls": sum(door.plain[name, direction] for door in of_link),
                        }
                        for name in names
                    },
                }
            )
        return found


def wire(options: argparse.Namespace) -> None:
    """Some jobs, one after the other; figures of those that were measured before are kept."""
    path = options.out / "engines_wire.json"
    known = read_json(path) if path.exists() else {}
    for name in options.jobs:
        known[name] = measure(JOBS[name])
        found = {job: known[job] for job in JOBS if job in known}
        print(json.dumps({name: found[name]}), flush=True)
        write_atomically(path, json.dumps(found, indent=1) + "\n")
        write_atomically(options.out / "engines_wire.md", "\n".join(page(found)))


def kinds_of(row: dict[str, Any]) -> dict[str, int]:
    """Bytes of HTTP by what they are for; the rest is TLS, handshakes and all."""
    kinds = {
        kind: sum(row["calls"].get(call, {}).get("without_tls", 0) for call in calls) for kind, calls in KINDS.items()
    }
    return kinds | {TLS: row["wire"] - sum(kinds.values())}


def over(wire_bytes: float, counted: float) -> str:
    """So much more, in percent."""
    return f"{100 * (wire_bytes / counted - 1):+.1f} %"


def page(found: dict[str, Any]) -> list[str]:
    """The figures as a page."""
    lines = [
        "# Bytes counted, and bytes on the wire",
        "",
        setting("python benchmarks/engines.py wire", "flwr"),
        "",
        "What summary.json says of traffic is the bytes of our encoded messages. Here it is beside the bytes of TCP "
        "payload between members and doors of the fleet of recipes/fleet-loopback.toml (TLS, keys; one cloud, two "
        "edges, four devices), counted by a program between the two that passes bytes on as they are. Behind it the "
        "member's TLS is ended with the door's own certificate, so that bytes can be told by the call that they are "
        "of. Not in it: heads of TCP and IP. Two jobs: recipes/digits-small.toml, and the same with a model of "
        "hidden size 128 in place of 64, three layers in place of six; both with the cloud's training and the header's "
        "search cut short.",
        "",
        "summary.json of a deployment has two figures for each link: bytes of our messages (`..._bytes`), as all "
        "engines count them, and all bytes that have passed the doors of cloud and edges (`..._wire_bytes`), as the "
        "doors count them: heads of HTTP, polls, greetings and TLS included. The cloud's door, open for this run "
        "only, counts until it is shut. That of an edge, which may stay open for many runs, counts from the run's "
        "first question to its last: what passes before (first handshakes) and after is on the wire and in no summary.",
        "",
        f"- **messages**: all calls that carry a message or its reply, with their HTTP heads: {', '.join(MESSAGES)}",
        "- **polls**: what a node says every 3 s while there is nothing for it, and its heartbeats",
        "- **greetings**: who is there and how far, every 3 s",
        "- **run and node**: a run's description and its (empty) bundle, nodes that come and go",
        "- **TLS**: all that is not HTTP; mostly handshakes, and a head of some 22 bytes on each record",
        "",
    ]
    by_job: dict[str, list[dict[str, Any]]] = {}
    for name, job in found.items():
        lines += [f"## {name}: {job['seconds']:.0f} s", ""]
        links = [row | {"kinds": kinds_of(row)} for row in job["links"]]
        rows = by_job[name] = [*links, *sums(links)]
        lines += table(
            [
                *("link", "direction", "counted", "messages", "overhead", "polls", "greetings", "run and node", TLS),
                *("all on the wire", "overhead", "counted at the door", "overhead"),
            ],
            [
                [
                    *(row["link"], row["direction"], f"{row['counted']:,}", f"{row['kinds']['messages']:,}"),
                    over(row["kinds"]["messages"], row["counted"]),
                    *(f"{row['kinds'][kind]:,}" for kind in ("polls", "greetings", "run and node", TLS)),
                    *(f"{row['wire']:,}", over(row["wire"], row["counted"])),
                    *(f"{row['door']:,}", over(row["wire"], row["door"])),
                ]
                for row in rows
            ],
        )
        lines += ["", "By call, both directions of both links together:", ""]
        calls = sorted({call for row in job["links"] for call in row["calls"]})

        def total(call: str, key: str, rows: Sequence[dict[str, Any]] = job["links"]) -> int:
            return sum(row["calls"].get(call, {}).get(key, 0) for row in rows)

        lines += table(
            ["call", "calls", "bytes of HTTP"],
            [[call, f"{total(call, 'calls') // 2:,}", f"{total(call, 'without_tls'):,}"] for call in calls],
        )
        shaken = total(HANDSHAKE, "wire")
        lines += [
            "",
            f"Handshakes of greetings: {shaken:,} bytes, {100 * shaken / rows[-1]['wire']:.0f} % of all on the wire; "
            "a member greets over one connection while it lasts.",
        ]
        exchanges = total("push-messages", "calls") // 2
        around = sum(row["kinds"]["messages"] - row["counted"] for row in links) / exchanges
        lines += [
            "",
            f"A message and its reply cost {around:,.0f} bytes around what is counted, on the average of {exchanges}: "
            "13 HTTP requests, five of them for the parts of a message and five for those of its reply, each with the "
            f"node's key and signature in its head. That is {TARGET:.0%} of {around / TARGET / 1e3:,.0f} KB.",
            "",
        ]
    verdicts = []
    for name in found:
        for row in by_job[name]:
            cells: list[object] = [name, row["link"], row["direction"], f"<= {TARGET:.0%}"]
            for overhead in (row["kinds"]["messages"] / row["counted"] - 1, row["wire"] / row["door"] - 1):
                cells += [f"{overhead:+.1%}", verdict(overhead <= TARGET)]
            verdicts.append(cells)
    left = [process for job in found.values() for process in job["left"]]
    return [
        *lines,
        "## Against the target",
        "",
        *table(
            [
                *("job", "link", "direction", "target", "messages over what our messages count", ""),
                *("all on the wire over what the door counts", ""),
            ],
            verdicts,
        ),
        "",
        f"Processes left: {len(left)}.",
        "",
    ]


def sums(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each link both ways, and all together."""
    made = []
    for link in (*LINKS, "all"):
        of_link = [row for row in rows if link in (row["link"], "all")]
        made.append(
            {
                "link": link,
                "direction": "both",
                "counted": sum(row["counted"] for row in of_link),
                "door": sum(row["door"] for row in of_link),
                "wire": sum(row["wire"] for row in of_link),
                "kinds": {kind: sum(row["kinds"][kind] for row in of_link) for kind in of_link[0]["kinds"]},
            }
        )
    return made
