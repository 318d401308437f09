"""One cluster of up to 1,000 devices: time, memory and bytes of its refinement: benchmarks/results/large_cluster.md.

    python benchmarks/large_cluster.py                     100, 200, 400 and 1,000 devices, each in its own process
    python benchmarks/large_cluster.py --devices 50 100

Digits, the backbone and header of benchmarks/digits.py, the product's defaults. Ten hidden groups mean other things by
the labels (``data.shift = "labels"``). There are fewer images than 1,000 devices need, so each device draws its 30 by
itself and two may hold the same: this measures cost, not accuracy.
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from digits import Transient, bench, in_memory
from digits_tables import machine, table

from fleetfit.cloud.clusters import fleet_of
from fleetfit.cloud.elastic import class_shares
from fleetfit.config.job import make_job
from fleetfit.core.checkpoints import Ledger
from fleetfit.core.files import write_atomically
from fleetfit.core.progress import silent
from fleetfit.core.randomness import named_generator
from fleetfit.data.partition import FleetData, Split
from fleetfit.data.shifts import shifted
from fleetfit.edge.run import gather_stats, refine_cluster
from fleetfit.engines.whole_fleet import LocalLink

RESULTS = Path(__file__).parent / "results"
GROUPS, OWN = 10, 30
SEED = 25


def cost(number: int) -> dict[str, Any]:
    """Of one refinement of so many devices."""
    torch.set_num_threads(1)
    b = bench(SEED)
    assignment, found = b.coarse("phones")
    shares = class_shares(b.data.public.train.labels, b.samples.num_classes)
    assignment = assignment.model_copy(update={"class_shares": shares})
    fields = b.job.model_dump(exclude_none=True)
    fields["data"] |= {"split": "iid", "shift": "labels", "groups": GROUPS}
    fields["refine"], fields["seed"] = {}, SEED
    fields["fleet"] = {"devices": [{"cluster": "phones", "count": number, "storage_limit": "1 GB"}]}
    job = make_job(fields)
    members = fleet_of(job)["phones"]
    private = [s for d in b.data.devices.values() for p in (d.train, d.validation) for s in p.inputs.index.tolist()]
    held_out = torch.cat([d.test.inputs.index for d in b.data.devices.values()])
    devices, groups = {}, {}
    for n, member in enumerate(members):
        chosen = torch.randperm(len(private), generator=named_generator(SEED, "own", member.device_id))[:OWN]
        own, group = torch.tensor(private)[chosen], n % GROUPS
        rows = (own[: OWN * 4 // 5], own[OWN * 4 // 5 :], held_out[:100])
        devices[member.device_id] = Split(*(shifted(b.samples.rows(r), job.data, group, SEED) for r in rows))
        groups[member.device_id] = group
    data = FleetData(b.data.public, b.data.edges, devices, (), groups)
    ledger = Ledger()
    link = LocalLink({a.device_id: in_memory(a, data) for a in members}, ledger, "down", "up")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    stats = gather_stats(job, "phones", link, Transient())
    report = refine_cluster(job, assignment, stats, found, data.edges["phones"], link, Transient(), silent)
    seconds = time.process_time() - start
    same = torch.tensor([[groups[a] == groups[b] for b in groups] for a in groups])
    return {
        "devices": number,
        "seconds": seconds,
        "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
        "up": ledger.traffic["up"] / number,
        "rounds": len(report.rounds) - 1,
        "groups": len({tuple(row) for row in report.similarity}),
        "right": bool(torch.equal(torch.tensor(report.similarity) > 1e-9, same)),
        "accuracy": sum(d.accuracy or 0 for d in report.devices) / number,
    }


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[100, 200, 400, 1000])
    options = parser.parse_args()
    figures = []
    for number in options.devices:  # a process each: memory is counted at its peak
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            figures.append(pool.apply(cost, (number,)))
        print(json.dumps(figures[-1]), flush=True)
    rows = []
    for i, f in enumerate(figures):
        growth = ["", ""]
        if i:
            last = figures[i - 1]
            step = math.log(f["devices"] / last["devices"])
            growth = [f"{math.log(f[k] / last[k]) / step:.2f}" for k in ("seconds", "memory")]
        rows.append(
            [
                f"{f['devices']:,}",
                f"{f['seconds']:.0f}",
                f"{f['memory'] / 1e6:.0f}",
                *growth,
                f"{f['up'] / 1e3:.0f}",
                str(f["rounds"]),
                str(f["groups"]),
                "yes" if f["right"] else "no",
            ]
        )
    head = ["devices", "processor s", "peak MB above start", "exponent of time", "exponent of memory"]
    head += ["KB up a device", "rounds", "groups found", "the hidden ones"]
    lines = [
        "# One large cluster",
        "",
        f"`python benchmarks/large_cluster.py` (its head says how), seed {SEED}, {machine()} One process.",
        "",
        *table(head, rows),
    ]
    write_atomically(RESULTS / "large_cluster.md", "\n".join(lines))


if __name__ == "__main__":
    main()
