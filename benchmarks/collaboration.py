"""How much devices help each other, and never cost: benchmarks/results/collaboration.md and .json.

    python benchmarks/collaboration.py                                   digits, seeds 25-29, two processes
    FLEETFIT_DATA=<folder> python benchmarks/collaboration.py --data banking77 in100-32 cifar10 --seeds 22 23 24
    python benchmarks/collaboration.py --page                      the page, of collaboration.json and newer figures

Twenty devices of one cluster, one backbone. fleetfit is the product with its defaults (``refine_cluster``); the others
are benchmarks/stacked.py, each with its rate tuned on the pooled validation. Nothing was chosen on these seeds: the
defaults were chosen on seeds 100-111 of digits, 100 of banking77, 100-102 of in100-32 and 100 of cifar10; the page says
which of its seeds showed what was wrong with the rules before.
"""

import argparse
import json
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import banking77
import digits
import numpy as np
import torch
from digits import Transient, in_memory, names_of, nothing
from digits_tables import machine
from stacked import Cluster, baselines, padded
from torch import Tensor

from fleetfit.cloud.clusters import fleet_of
from fleetfit.cloud.elastic import Elastic, class_shares, cut_and_specialise, make_elastic
from fleetfit.cloud.reference import Reference, train_reference
from fleetfit.config.job import Job, load_job, make_job
from fleetfit.core.checkpoints import Ledger, StepFolder
from fleetfit.core.encoding import take
from fleetfit.core.files import content_hash, read_json, write_atomically
from fleetfit.core.progress import silent
from fleetfit.core.randomness import named_generator
from fleetfit.core.records import BackboneShape
from fleetfit.data.partition import FleetData, Split, cut_rows, share_out
from fleetfit.data.samples import Samples
from fleetfit.data.shifts import shifted
from fleetfit.data.sources import load_samples
from fleetfit.device import device
from fleetfit.device.device import DeviceState
from fleetfit.device.memory import shipped_model
from fleetfit.edge.header import HeaderResult, find_header
from fleetfit.edge.messages import BackboneAssignment, ClusterReport
from fleetfit.edge.run import gather_stats, refine_cluster
from fleetfit.engines.whole_fleet import LocalLink
from fleetfit.models.elastic import Backbone, backbone_from_state
from fleetfit.models.features import Features
from fleetfit.models.header import header_from_state
from fleetfit.runs.adapt import estimate

RESULTS = Path(__file__).parent / "results"
WORK = Path("runs/benchmark-collaboration")
DEVICES = 20
OWN = {"digits": 30, "banking77": 60, "in100-32": 150, "cifar10": 60}  # samples to train and validate on
CLASSES = {"digits": (7, 5, 3), "banking77": (40, 20, 10), "in100-32": (50, 20, 10), "cifar10": (7, 5, 3)}
FEWER = {"banking77": 30, "in100-32": 30}  # classes, where labels or inputs are shifted
FEW_CLASSES = {k: {"split": "classes", "classes_per_device": int(k[:2])} for k in ("20 classes", "40 classes")}
FEW_CLASSES["iid"] = {"split": "iid"}
UNLABELLED = {"20 classes, unlabelled": 100, "40 classes, unlabelled": 100, "iid, unlabelled": 100}  # inputs a device
TODAY = {  # the defaults before groups
    "rounds": 2,
    "settle": False,
    "later_epochs": 0,
    "learning_rate": 3e-3,
    "similarity": "calibrated",
    "anchor": 0.1,
    "bits": 32,
}


def settings_of(name: str) -> dict[str, dict[str, Any]]:
    """The data section of each setting."""
    classes = {f"{k} classes": {"split": "classes", "classes_per_device": k} for k in CLASSES[name]}
    return {
        "iid": {"split": "iid"},
        **classes,
        "Dirichlet 0.1": {"split": "dirichlet", "alpha": 0.1},
        "Dirichlet 0.5": {"split": "dirichlet", "alpha": 0.5},
        "groups of classes": {"split": "groups"},
        "labels, 4 groups": {"split": "iid", "shift": "labels", "groups": 4},
        "labels, 2 groups": {"split": "iid", "shift": "labels", "groups": 2},
        "labels, 3 groups": {"split": "iid", "shift": "labels", "groups": 3},
        "labels, 6 groups": {"split": "iid", "shift": "labels", "groups": 6},
        "inputs, 4 groups": {"split": "iid", "shift": "inputs", "groups": 4},
    } | ({n: FEW_CLASSES[n.split(",")[0]] for n in UNLABELLED} if name == "banking77" else {})


def cloud_of(name: str, seed: int) -> tuple[Job, Samples, BackboneAssignment, HeaderResult]:
    """One backbone and its header; what takes minutes is kept."""
    shape = BackboneShape(width=0.5, depth=3)
    if name == "digits":
        b = digits.bench(seed)
        assignment, found = b.coarse("phones")
        samples, public, job = b.samples, b.data.public, b.job
    elif name == "banking77":
        bank = banking77.bench(seed)
        assignment = bank.specialised(banking77.SHAPES[0], "phones")
        found, samples, public, job = bank.header(assignment, "phones"), bank.samples, bank.data.public, bank.job
    else:
        fields = load_job(Path(__file__).parent.parent / "recipes" / f"{name}.toml").model_dump(exclude_none=True)
        fields["model"] |= {"pretrained": f"checkpoints/{name}", "epochs": 0}
        del fields["model"]["config"]
        fields["data"] |= {"public_share": 0.6}
        job = make_job(fields | {"seed": seed})
        samples, fleet = load_samples(job), {"phones": fleet_of(job)["phones"]}
        data = share_out(samples, job.data, names_of(fleet), seed)
        public, steps = data.public, StepFolder(WORK / name / str(seed), Ledger())
        reference = steps.step("reference", Reference, lambda: train_reference(job, public, nothing))
        elastic = steps.step("elastic", Elastic, lambda: make_elastic(job, reference, public, nothing))
        assignment = steps.step(
            "spec",
            BackboneAssignment,
            lambda: cut_and_specialise(job, reference, elastic, public, "phones", shape, nothing),
        )
        found = steps.step(
            "header", HeaderResult, lambda: find_header(job, assignment, data.edges["phones"], 10**9, nothing)
        )
    shares = class_shares(public.train.labels, samples.num_classes)
    return job, samples, assignment.model_copy(update={"class_shares": shares}), found


def fleet_data(name: str, job: Job, samples: Samples, seed: int, unlabelled: int = 0) -> tuple[Job, FleetData]:
    """Twenty devices; each keeps so many samples for itself, and the others of its share are for testing.

    Of those for testing, some may be ``unlabelled``: the device has them too, but nobody knows what they are.
    """
    names = {"phones": [f"phones-{i}" for i in range(1, DEVICES + 1)]}
    data = share_out(samples, job.data.model_copy(update={"shift": "none"}), names, seed)
    if job.data.shift != "none" or job.data.split == "groups":
        data = replace(data, groups=share_out(samples, job.data, names, seed).groups)
    few = FEWER.get(name) if job.data.shift != "none" else None
    kept = torch.randperm(samples.num_classes, generator=named_generator(seed, "fewer"))[:few]
    devices = {}
    for d, own in data.devices.items():
        rows = torch.cat([part.inputs.index for part in (own.train, own.validation, own.test)])
        rows = rows[torch.isin(samples.labels[rows], kept)]
        share = max(0.25, 1 - OWN[name] / len(rows))
        rest, test = cut_rows(rows, [min(share, 0.9)], named_generator(seed, "bench", d))
        train, validation = cut_rows(rest[: OWN[name]], [0.2], named_generator(seed, "bench", d, "validation"))
        group = data.groups.get(d, 0)
        test, more = test[unlabelled:][:400], test[:unlabelled]
        parts = [shifted(samples.rows(r), job.data, group, seed) for r in (train, validation, test)]
        hidden = samples.rows(more)
        hidden = replace(hidden, labels=torch.full_like(hidden.labels, -1))
        devices[d] = Split(*parts, unlabelled=hidden if unlabelled else None)
    return job, FleetData(data.public, data.edges, devices, (), data.groups)


class RememberedFeatures:
    """Features of one backbone by row of each table of inputs; while it is entered, devices use them.

    Room for all rows of a table is asked for at once; the system gives it as rows are filled.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor, Features]] = {}  # by address: the table, which rows, all rows
        self._run = device._run

    def __call__(self, backbone: Backbone, samples: Samples) -> Features:
        """As ``device._run``."""
        table, rows = samples.inputs.store, samples.inputs.index
        known = self._known.get(table.data_ptr())
        missing = rows.unique() if known is None else rows[~known[1][rows]].unique()
        if len(missing):
            new = self._run(backbone, replace(samples, inputs=replace(samples.inputs, index=missing)))
            if known is None:
                parts = (new.output, new.penultimate, new.mask)
                room = [None if t is None else t.new_empty(len(table), *t.shape[1:]) for t in parts]
                known = table, torch.zeros(len(table), dtype=torch.bool), Features(*room)
                self._known[table.data_ptr()] = known
            known[1][missing] = True
            for name in ("output", "penultimate", "mask"):
                if (part := getattr(new, name)) is not None:
                    getattr(known[2], name)[missing] = part
        if known is None:  # no row of a table that nobody has looked at
            return self._run(backbone, samples)
        return known[2].rows(rows)

    def __enter__(self) -> "RememberedFeatures":
        device._run = self
        return self

    def __exit__(self, *_: object) -> None:
        device._run = self._run


def fleetfit(
    job: Job,
    assignment: BackboneAssignment,
    found: HeaderResult,
    data: FleetData,
    finished: dict[str, DeviceState] | None = None,
) -> tuple[ClusterReport, float, int]:
    """The product's refinement: its report, seconds of processor time, and bytes up; devices in the end on request."""
    fleet = {
        a.device_id: in_memory(a, data, finished)
        for a in fleet_of(
            make_job(
                {
                    "seed": job.seed,
                    "fleet": {"devices": [{"count": DEVICES, "cluster": "phones", "storage_limit": "1 GB"}]},
                }
            )
        )["phones"]
    }
    ledger = Ledger()
    link = LocalLink(fleet, ledger, "down", "up")
    stats = gather_stats(job, "phones", link, Transient())
    start = time.process_time()
    report = refine_cluster(job, assignment, stats, found, data.edges["phones"], link, Transient(), silent)
    return report, time.process_time() - start, ledger.traffic["up"]


def adapted(finished: dict[str, DeviceState]) -> list[float]:
    """Accuracy of shipped models that were adapted to inputs without labels, as ``fleetfit adapt`` does."""
    found = []
    for state in finished.values():
        memory, model = state.memory, shipped_model(state.memory)
        parts = []
        for own in (state.data.unlabelled, state.data.test):
            with torch.no_grad():
                parts.append(model.header(device._run(model.backbone, own)).double())
        shares = torch.tensor(memory.expected_shares, dtype=torch.float64)
        change = estimate(parts[0], shares, memory.shifts)[0] if memory.shifts else None
        bias = 0.0 if change is None else torch.tensor(change.class_shares).log() - shares.log()
        right = (parts[1] + bias).argmax(-1) == state.data.test.labels
        found.append(float(right.double().mean()) if len(right) else float("nan"))
    return found


def cell(
    name: str, seed: int, setting: str, cloud: tuple[Job, Samples, BackboneAssignment, HeaderResult]
) -> dict[str, Any]:
    """All methods on one seed's devices in one setting; the devices' features are there, their time is not counted."""
    base, samples, assignment, found = cloud
    fields = base.model_dump(exclude_none=True)
    fields["data"] |= settings_of(name)[setting]
    fields["refine"], fields["seed"] = {}, seed
    more = UNLABELLED.get(setting, 0)
    job, data = fleet_data(name, make_job(fields), samples, seed, more)
    backbone = backbone_from_state(assignment.family, assignment.config, take(assignment.tensors, "backbone")).eval()
    coarse = take(found.tensors, "header")
    header = header_from_state(found.header, backbone.feature_shape, samples.num_classes, coarse).eval()
    parts = []
    for part in ("train", "validation", "test"):
        own: list[Samples] = [getattr(d, part) for d in data.devices.values()]
        parts.append(padded([device._run(backbone, s) for s in own], [s.labels for s in own]))
    for of_device in data.devices.values():
        if of_device.unlabelled is not None:
            device._run(backbone, of_device.unlabelled)
    finished: dict[str, DeviceState] = {}
    report, seconds, up = fleetfit(job, assignment, found, data, finished)
    before = make_job(fields | {"refine": TODAY})
    earlier, seconds_before, up_before = fleetfit(before, assignment, found, data)
    groups = [data.groups.get(d, 0) for d in data.devices]
    rows = baselines(Cluster(header, *parts), groups, seed)
    rows["fleetfit"] = [float("nan") if d.accuracy is None else d.accuracy for d in report.devices]
    if more:
        with_inputs, seconds, up = fleetfit(
            make_job(fields | {"refine": {"unlabelled": True}}), assignment, found, data
        )
        rows["fleetfit, labels only"] = rows["fleetfit"]
        rows["fleetfit, adapted later"] = adapted(finished)
        rows["fleetfit"] = [float("nan") if d.accuracy is None else d.accuracy for d in with_inputs.devices]
        report = with_inputs
    rows["defaults before"] = [float("nan") if d.accuracy is None else d.accuracy for d in earlier.devices]
    weights = torch.tensor(report.similarity)
    same = torch.tensor([[a == b for b in groups] for a in groups])
    return {
        "accuracy": rows,
        "groups_right": bool(torch.equal(weights > 1e-9, same))
        if len(set(groups)) > 1
        else report.decision["grouping"] != "kept",
        "grouping": report.decision["grouping"],
        "rounds": len(report.rounds) - 1,
        "shipped": report.decision["way"],
        "by_group": [g["way"] for g in report.decision["groups"]],
        "cpu_ratio": seconds / seconds_before,
        "bytes_ratio": up / up_before,
    }


def run_seed(task: tuple[str, int, tuple[str, ...]]) -> None:
    """All settings of one seed, each kept when it is done."""
    name, seed, only = task
    torch.set_num_threads(1)
    cloud, remembered = None, RememberedFeatures()
    for setting in settings_of(name):
        key = content_hash(make_job({}).refine.model_dump(), OWN, FEWER, settings_of(name)[setting])
        path = WORK / "figures" / name / str(seed) / f"{setting.replace(' ', '_')}-{key}.json"
        if path.exists() or (only and setting not in only):
            continue
        cloud = cloud or cloud_of(name, seed)
        start = time.perf_counter()
        try:
            with RememberedFeatures() if settings_of(name)[setting].get("shift") == "inputs" else remembered:
                figures = cell(name, seed, setting, cloud)
        except ValueError as error:
            print(f"{name}, seed {seed}, {setting}: {error}", flush=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"setting": setting, "seed": seed, "data": name, **figures}) + "\n")
        means = ", ".join(f"{k} {100 * np.mean(v):.1f}" for k, v in figures["accuracy"].items())
        took = time.perf_counter() - start
        print(
            f"{name}, seed {seed}, {setting}: {means}; {figures['grouping']}, right {figures['groups_right']}, "
            f"{figures['rounds']} rounds, x{figures['cpu_ratio']:.1f} cpu, x{figures['bytes_ratio']:.1f} bytes; "
            f"{took:.0f} s",
            flush=True,
        )


def main() -> None:
    """Run what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(OWN), default=["digits"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[25, 26, 27, 28, 29])
    parser.add_argument("--settings", nargs="+", default=[])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    if not options.page:
        tasks = [(name, seed, tuple(options.settings)) for name in options.data for seed in options.seeds]
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            list(pool.imap_unordered(run_seed, tasks))
    from collaboration_page import markdown

    page = RESULTS / "collaboration.json"
    kept = json.loads(page.read_text()) if page.exists() else []
    here = [read_json(path) for path in sorted((WORK / "figures").rglob("*.json"), key=lambda p: p.stat().st_mtime)]
    latest = {(c["data"], c["setting"], c["seed"]): c for c in (*kept, *here) if c["seed"] < 100}
    cells = [latest[key] for key in sorted(latest)]
    write_atomically(RESULTS / "collaboration.json", json.dumps(cells, indent=0, sort_keys=True) + "\n")
    write_atomically(RESULTS / "collaboration.md", markdown(cells, machine()))


if __name__ == "__main__":
    main()
