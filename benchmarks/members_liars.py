"""What lying devices do to honest ones, with and without members.robust: benchmarks/results/members_liars.json.

    python benchmarks/members_liars.py --data digits                      three seeds
    FLEETFIT_DATA=<folder> python benchmarks/members_liars.py --data banking77

Clusters of ten devices of which none, one or two lie, in every split and in six ways. Each honest device is compared
with itself in the same cluster without the liars, and with the model as it was sent. Nothing was chosen on the default
seeds; ``method.robust``'s numbers were looked at on seed 100.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import banking77
import digits
import numpy as np
import torch
from torch import Tensor

from fleetfit.cloud.clusters import fleet_of
from fleetfit.config.job import Job, make_job
from fleetfit.config.sections import MembersConfig
from fleetfit.core.checkpoints import Ledger
from fleetfit.core.encoding import Message, take
from fleetfit.core.files import write_atomically
from fleetfit.core.link import Handler
from fleetfit.core.progress import silent
from fleetfit.core.randomness import named_generator
from fleetfit.core.records import DeviceAttributes
from fleetfit.data.partition import FleetData, share_out
from fleetfit.device.device import DeviceState, handle
from fleetfit.device.memory import DeviceMemory
from fleetfit.device.messages import AttributesReply, CoarseModel, ProposeReply, RoundReply
from fleetfit.device.ways import ways_to_ship
from fleetfit.edge.header import HeaderResult
from fleetfit.edge.messages import BackboneAssignment, ClusterReport
from fleetfit.edge.run import gather_stats, refine_cluster
from fleetfit.engines.whole_fleet import LocalLink, counted

RESULTS = Path(__file__).parent / "results"
CLUSTER = "boxes"
KINDS = ("scaled", "flipped", "random", "label-flipped", "constant", "huge")
DIGITS_SPLITS: dict[str, dict[str, Any]] = {
    "iid": {"split": "iid"},
    "5 classes": {"split": "classes", "classes_per_device": 5},
    "dirichlet 0.5": {"split": "dirichlet", "alpha": 0.5},
}
SEEDS = {"digits": (41, 42, 43), "banking77": (19, 20, 21)}


def lying(kind: str, attributes: DeviceAttributes, data: FleetData, seed: int) -> Handler:
    """A device that trains honestly and says something else; with flipped labels it believes what it says."""
    own = data.devices[attributes.device_id]
    if kind == "label-flipped":
        top = own.train.num_classes - 1
        flipped = (replace(part, labels=top - part.labels) for part in (own.train, own.validation, own.test))
        own = replace(own, **dict(zip(("train", "validation", "test"), flipped, strict=True)))
    state = DeviceState(counted(attributes, data), own, DeviceMemory())
    generator = named_generator(seed, "liar", attributes.device_id)
    coarse: dict[str, Tensor] = {}

    def header(name: str, tensor: Tensor) -> Tensor:
        change = tensor - coarse[name]
        if kind == "scaled":
            return coarse[name] + 1000 * change
        if kind == "flipped":
            return coarse[name] - change
        if kind == "random":
            return torch.randn(tensor.shape, generator=generator)
        if kind == "constant":
            return torch.full_like(tensor, 0.5)
        return torch.full_like(tensor, 1e6)

    def answer(message: Message) -> Message:
        nonlocal state
        if isinstance(message, CoarseModel):
            coarse.update(take(message.tensors, "header"))
        state, reply = handle(state, message)
        if kind == "label-flipped":
            return reply
        if isinstance(reply, AttributesReply):
            claimed = reply.attributes.model_copy(update={"num_samples": 2**40})
            return reply.model_copy(update={"attributes": claimed})
        if isinstance(reply, RoundReply):
            tensors = {
                n: header(n.removeprefix("header."), t) if n.startswith("header.") else t
                for n, t in reply.tensors.items()
            }
            return reply.model_copy(update={"tensors": tensors})
        if isinstance(reply, ProposeReply):
            losses = torch.full_like(reply.tensors["losses"], 1e5)
            for i, way in enumerate(ways_to_ship(state.memory.refine, len(state.memory.labels))):
                if way.header == "refined":
                    losses[i] = 0.0
            return reply.model_copy(update={"num_samples": 1000, "tensors": {"losses": losses}})
        return reply

    return answer


def refined(
    job: Job, sent: tuple[BackboneAssignment, HeaderResult], data: FleetData, members: Mapping[str, Handler]
) -> ClusterReport:
    """One cluster's refinement."""
    link = LocalLink(members, Ledger(), "down", "up")
    steps = digits.Transient()
    stats = gather_stats(job, CLUSTER, link, steps)
    return refine_cluster(job, *_with(stats, sent), data.edges[CLUSTER], link, steps, silent)


def _with(stats: Any, sent: tuple[BackboneAssignment, HeaderResult]) -> tuple[Any, Any, Any]:
    assignment, found = sent
    return assignment, stats, found


def digits_fleet(seed: int) -> tuple[Any, Callable[[Mapping[str, Any]], tuple[Job, FleetData]]]:
    """The demo's cloud, and ten devices of the demo's middle size."""
    b = digits.bench(seed)
    fleet = {"devices": [{"count": 10, "cluster": CLUSTER, "storage_limit": "400 KB", "gpu_capacity": 80}]}

    def split(changed: Mapping[str, Any]) -> tuple[Job, FleetData]:
        job = make_job({"seed": seed, "data": changed, "fleet": fleet, "refine": {"bits": 32}})
        return job, share_out(b.samples, job.data, digits.names_of(fleet_of(job)), seed)

    return b.coarse(CLUSTER), split


def banking77_fleet(seed: int) -> tuple[Any, Callable[[Mapping[str, Any]], tuple[Job, FleetData]]]:
    """The recipe's cloud, and the ten devices of its middle cluster, with sixty texts each."""
    b = banking77.bench(seed)
    assignment = b.specialised(banking77.SHAPES[1], CLUSTER)

    def split(changed: Mapping[str, Any]) -> tuple[Job, FleetData]:
        job = banking77.job_of(seed, data=changed, refine={"bits": 32})
        return job, banking77.with_texts(b, share_out(b.samples, job.data, banking77.names_of(b.fleet), seed))

    return (assignment, b.header(assignment, CLUSTER)), split


FLEETS = {"digits": (digits_fleet, DIGITS_SPLITS), "banking77": (banking77_fleet, banking77.SETTINGS)}


def seed_figures(name: str, seed: int) -> Iterator[list[dict[str, Any]]]:
    """All runs of one seed, a row each, setting by setting."""
    prepare, splits = FLEETS[name]
    sent, split = prepare(seed)
    with digits.nothing_twice():
        for setting, changed in splits.items():
            rows = []
            job, data = split(changed)
            members = fleet_of(job)[CLUSTER]
            honest = {a.device_id: digits.in_memory for a in members}
            for liars in (0, 1, 2):
                true = list(members[: len(members) - liars])
                without = None
                for robust in (True, False) if liars < 2 or name == "digits" else (True,):
                    job_now = job.model_copy(update={"members": MembersConfig(robust=robust)})
                    known = {a.device_id: honest[a.device_id](a, data) for a in true}
                    alone = refined(job_now, sent, data, known)
                    without = without or alone
                    for kind in KINDS if liars else ("none",):
                        known = {a.device_id: honest[a.device_id](a, data) for a in true}
                        lies = {a.device_id: lying(kind, a, data, seed) for a in members[len(true) :]}
                        report = refined(job_now, sent, data, known | lies) if liars else alone
                        rows.append(
                            {"seed": seed, "setting": setting, "liars": liars, "kind": kind, "robust": robust}
                            | compared(report, without, alone, set(known), set(lies))
                        )
            print(f"{name}, seed {seed}: {setting}", flush=True)
            yield rows


def compared(
    report: ClusterReport, without: ClusterReport, plain: ClusterReport, honest: set[str], lies: set[str]
) -> dict[str, Any]:
    """Points of accuracy of honest devices: mean, over the same without liars, and the worst one's over as sent."""
    now = {d.device_id: d for d in report.devices if d.device_id in honest}
    before = {d.device_id: d for d in without.devices}
    gains = [100 * (now[d].accuracy - before[d].accuracy) for d in now]
    over_sent = [100 * (now[d].accuracy - now[d].accuracy_coarse) for d in now]
    named = {f.device_id for f in report.faults}
    return {
        "accuracy": 100 * float(np.mean([d.accuracy for d in now.values()])),
        "against without": float(np.mean(gains)),
        "worst against without": float(np.min(gains)),
        "worst against sent": float(np.min(over_sent)),
        "shipped": digits.way_of(report),
        "refused": sum(any(n.startswith("shipped as it was sent") for n in d.notes) for d in now.values()),
        "named": len(named & lies),
        "named wrongly": len(named & honest),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=FLEETS, required=True)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--out", type=Path, default=RESULTS / "members_liars.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = args.seeds or SEEDS[args.data]
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for of_setting in seed_figures(args.data, seed):
            rows += of_setting
            kept = json.loads(args.out.read_text()) if args.out.exists() else {}
            kept[args.data] = {"seeds": sorted({row["seed"] for row in rows}), "rows": rows}
            write_atomically(args.out, json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
