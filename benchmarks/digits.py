"""The figures of fleetfit on scikit-learn's digits, with seeds and spread: benchmarks/results/digits.md and .json.

    python benchmarks/digits.py                     all parts but one, seeds 20-24, two processes (an hour on 2 cores)
    python benchmarks/digits.py --parts devices     some parts only
    python benchmarks/digits.py --seeds 100 101     other seeds; 100-104 are the ones that defaults were chosen on

What is finished is kept under runs/benchmark-digits and not computed again; delete that folder to start afresh. No
choice was made on the seeds 20-24, and all accuracies are on samples that no choice of that run was made on. But digits
has 1,797 images: every seed, also those that defaults were chosen on, is another split of the same ones. (Seeds 0-19
were looked at before the last changes of defaults or of these tables, so they are not used any more.)
"""

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from digits_page import markdown
from digits_tables import (
    CHOICES,
    DEFAULT_RATE,
    HEADER_BACKBONES,
    HEADER_METHODS_OF,
    HEADER_SHAPES,
    RATES,
    SETTINGS,
)
from scipy.stats import spearmanr

from fleetfit.cloud.candidates import Candidates, ClusterChoice, evaluate_candidates, match
from fleetfit.cloud.clusters import fleet_of
from fleetfit.cloud.elastic import Elastic, cut_and_specialise, elastic_of, make_elastic
from fleetfit.cloud.elastic_training import evaluate_shape
from fleetfit.cloud.importance import (
    LayerImportance,
    gate_series,
    random_importance,
    removal_importance,
    reorder_by,
    second_order,
    taylor_importance,
)
from fleetfit.cloud.reference import Reference, classifier_of, shape_grid, train_reference
from fleetfit.config.job import Job, make_job
from fleetfit.config.presets import PAPER
from fleetfit.core.checkpoints import Ledger, StepFolder
from fleetfit.core.encoding import Message
from fleetfit.core.files import content_hash, write_atomically
from fleetfit.core.link import Handler
from fleetfit.core.progress import silent
from fleetfit.core.randomness import named_generator
from fleetfit.core.records import BackboneShape, DeviceAttributes, Way
from fleetfit.data.augmentation import Augmentation
from fleetfit.data.partition import FleetData, share_out
from fleetfit.data.samples import Samples
from fleetfit.data.sources import load_samples
from fleetfit.device import device
from fleetfit.device.device import DeviceState, handle
from fleetfit.device.memory import DeviceMemory
from fleetfit.device.ways import kind_of
from fleetfit.edge.header import HeaderResult, cached_features, find_header, with_views
from fleetfit.edge.header_proof import make_folds
from fleetfit.edge.header_search import search_header
from fleetfit.edge.messages import BackboneAssignment, ClusterReport, ClusterStats
from fleetfit.edge.run import gather_stats, refine_cluster
from fleetfit.engines.whole_fleet import LocalLink, counted
from fleetfit.method.aggregation import distance_from_uniform
from fleetfit.models.elastic import Backbone, ElasticBackbone
from fleetfit.models.features import Features
from fleetfit.models.header import Header
from fleetfit.models.training import evaluate

RESULTS = Path(__file__).parent / "results"
WORK = Path("runs/benchmark-digits")
RANDOM_ORDERS = 4  # of which the mean is taken: one by chance is not like another

ELASTIC: dict[str, dict[str, Any]] = {
    "default": {},
    "linear header": {"model": {"header": "linear"}},
    "paper": {"method": "paper"},
}
FEDAVG: dict[str, Any] = {
    "rounds": 2,
    "settle": False,
    "later_epochs": 0,
    "exchange": "weights",
    "similarity": "average",
    "anchor": 0.0,
    "class_prior": False,
    "guard": False,
}
FINE_TUNED = {**FEDAVG, "fine_tune": True}
LOCAL = {**FEDAVG, "similarity": "alone"}  # each device for itself; no prior, no anchor, always shipped
TUNED: dict[str, dict[str, Any]] = {
    "default": {},
    "local": LOCAL,
    "FedAvg": FEDAVG,
    "FedAvg + fine-tuning": FINE_TUNED,
}
ABLATIONS: dict[str, dict[str, Any]] = {  # at the default rate
    "default, alone": {"similarity": "alone"},
    "default, Wasserstein (Eq. 20)": {"similarity": "wasserstein"},
    "default, no class prior": {"class_prior": False},
    "paper": PAPER["refine"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"{name}/{rate:g}": {**refine, "learning_rate": rate} for name, refine in TUNED.items() for rate in RATES},
    **{f"{name}/{DEFAULT_RATE:g}": refine for name, refine in ABLATIONS.items()},
}


def nothing(*_: object) -> None:
    """Report no progress."""


class Figures(Message):
    """A part's figures for one seed."""

    kind = "benchmark_figures"
    figures: dict[str, Any]


class Transient:
    """Checkpoints that keep nothing."""

    def step(self, name: str, result: type[Message], compute: Callable[[], Any], reads: object = None) -> Any:
        """Compute."""
        return compute()


@dataclass
class Bench:
    """One seed's fleet and cloud; everything that costs seconds is kept on disk."""

    seed: int
    job: Job
    data: FleetData
    samples: Samples
    fleet: Mapping[str, tuple[DeviceAttributes, ...]]
    steps: StepFolder

    @property
    def reference(self) -> Reference:
        """The trained reference."""
        return self.reference_of("default")

    def job_of(self, variant: str) -> Job:
        """A way to make the elastic backbone."""
        return make_job({"seed": self.seed, **ELASTIC[variant]})

    def reference_of(self, variant: str) -> Reference:
        """The reference of one of the ways; it depends on its own header alone."""
        job = self.job_of(variant)
        return self.steps.step(
            f"reference-{job.model.header}", Reference, lambda: train_reference(job, self.data.public, nothing)
        )

    def elastic(self, variant: str = "default") -> Elastic:
        """The elastic backbone, made in one of the ways."""
        reference = self.reference_of(variant)
        return self.steps.step(
            f"elastic-{variant}",
            Elastic,
            lambda: make_elastic(self.job_of(variant), reference, self.data.public, nothing),
        )

    @property
    def candidates(self) -> Candidates:
        """Every (w, d), evaluated."""
        return self.steps.step(
            "candidates", Candidates, lambda: evaluate_candidates(self.job, self.elastic(), self.data.public, nothing)
        )

    def choice(self, cluster: str) -> ClusterChoice:
        """Who would choose what for a cluster."""
        stats = ClusterStats(devices=self.fleet[cluster])
        return match(self.job, self.candidates.candidates, stats, cluster, num_patches=16)

    def coarse(self, cluster: str) -> tuple[BackboneAssignment, HeaderResult]:
        """A cluster's specialised backbone and the header found for it."""
        choice = self.choice(cluster)
        shape = self.candidates.candidates[choice.chosen].shape
        assignment = self.steps.step(
            f"specialise-{cluster}",
            BackboneAssignment,
            lambda: cut_and_specialise(
                self.job, self.reference, self.elastic(), self.data.public, cluster, shape, nothing
            ),
        )
        found = self.steps.step(
            f"header-{cluster}-{content_hash(self.job.header.model_dump())}",
            HeaderResult,
            lambda: find_header(self.job, assignment, self.data.edges[cluster], choice.limit_bytes, nothing),
        )
        return assignment, found


def bench(seed: int) -> Bench:
    """Prepare one seed."""
    torch.set_num_threads(1)
    job = make_job({"seed": seed})
    samples = load_samples(job)
    fleet = fleet_of(job)
    data = share_out(samples, job.data, names_of(fleet), seed)
    return Bench(seed, job, data, samples, fleet, StepFolder(WORK / key() / str(seed), Ledger()))


def key() -> str:
    """Names the defaults that the clouds' parts of these figures belong to."""
    return content_hash(make_job({}).model_dump(include={"model", "data", "fleet", "backbone"}))


def figures_key(part: str) -> str:
    """Names the defaults that a part's figures belong to."""
    sections = {"header": {"header"}, "devices": {"header", "refine"}}.get(part, set())
    of_part = {"header": [HEADER_METHODS_OF, HEADER_SHAPES], "devices": [VARIANTS, SETTINGS]}.get(part, [])
    return f"figures-{part}-{content_hash(make_job({}).model_dump(include=sections), of_part)}"


def names_of(fleet: Mapping[str, tuple[DeviceAttributes, ...]]) -> dict[str, list[str]]:
    """Device names by cluster."""
    return {cluster: [a.device_id for a in members] for cluster, members in fleet.items()}


# -- parts: seed -> figures -------------------------------------------------------------------------------------------


def reference_part(b: Bench) -> dict[str, Any]:
    """Accuracy of the reference on the held-out public test split."""
    return {"accuracy": b.reference.accuracy, "parameters": b.reference.parameters}


def importance_part(b: Bench) -> dict[str, Any]:
    """Rank correlation of importance by series with exact removal, both on held-out images."""
    model = classifier_of(b.job, b.reference, 10).eval()
    elastic = ElasticBackbone(model.backbone)
    public = b.data.public
    held_out = b.samples.rows(torch.cat([public.validation.inputs.index, public.test.inputs.index]))
    taylor = taylor_importance(elastic, model.header, held_out)
    second = second_order(elastic, model.header, held_out, named_generator(b.seed, "benchmark", "curvature"))
    exact = removal_importance(elastic, model.header, held_out)

    def overall(x: tuple[torch.Tensor, ...], y: tuple[torch.Tensor, ...]) -> float:
        return float(spearmanr(torch.cat(x), torch.cat(y)).statistic)

    def within(x: tuple[torch.Tensor, ...], y: tuple[torch.Tensor, ...]) -> float:
        return float(np.mean([spearmanr(a, c).statistic for a, c in zip(x, y, strict=True)]))

    figures: dict[str, Any] = {"curvature_ratio": curvature_ratio(elastic, model.header, held_out, b.seed)}
    for unit in ("heads", "neurons"):
        for name, importance in (("", second), ("_taylor", taylor)):
            x, y = getattr(importance, unit), getattr(exact, unit)
            figures[f"{unit}{name}"], figures[f"{unit}{name}_within_layers"] = overall(x, y), within(x, y)
    return figures


def curvature_ratio(elastic: ElasticBackbone, header: Header, samples: Samples, seed: int) -> float:
    """The loss's second derivative in a head's gate, by central differences, over Gauss-Newton's: median of heads."""

    def loss(layer: int, index: int, change: float) -> float:
        gate = torch.ones(elastic.num_heads)
        gate[index] += change
        with elastic.gated({layer: gate}, {}):
            return evaluate(lambda rows: header(elastic.backbone(samples.inputs[rows])), samples.labels).loss

    series, _ = gate_series(elastic, header, samples, named_generator(seed, "benchmark", "curvature"))
    step, ratios = 0.1, []
    base = loss(0, 0, 0.0)
    for layer in range(elastic.num_layers):
        for i in range(elastic.num_heads):
            bent = (loss(layer, i, step) + loss(layer, i, -step) - 2 * base) / step**2
            ratios.append(bent / float(series.curvatures[layer][i]))
    return float(np.median(ratios))


def elastic_part(b: Bench) -> dict[str, Any]:
    """Accuracies of all sub-networks on the test split, after either distillation; and before any, by order."""
    shapes = shape_grid(b.job, int(b.job.model.config["num_hidden_layers"]))
    test = b.data.public.test

    def mean(elastic: ElasticBackbone, header: Any, only: Callable[[BackboneShape], bool] = lambda s: True) -> float:
        return float(np.mean([evaluate_shape(elastic, header, test, s).accuracy for s in shapes if only(s)]))

    figures: dict[str, Any] = {}
    for variant in HEADER_BACKBONES:
        elastic, model = elastic_of(b.job_of(variant), b.elastic(variant), 10)
        grid = {f"{s.width:g}/{s.depth}": evaluate_shape(elastic, model.header, test, s).accuracy for s in shapes}
        figures[variant] = {"mean": float(np.mean(list(grid.values()))), "grid": grid}
    reference = classifier_of(b.job, b.reference, 10).eval()
    samples = b.data.public.train
    orders: dict[str, Callable[[ElasticBackbone], LayerImportance]] = {
        "second_order": lambda e: second_order(e, reference.header, samples, named_generator(b.seed, "curvature")),
        "taylor": lambda e: taylor_importance(e, reference.header, samples),
        **{
            f"random {i}": lambda e, i=i: random_importance(e, named_generator(b.seed, "benchmark", "random", i))  # type: ignore[misc]
            for i in range(RANDOM_ORDERS)
        },
    }
    for order, importance_of in orders.items():
        elastic = ElasticBackbone(reference.backbone, depth_order="first")
        reorder_by(elastic, importance_of(elastic))
        figures[f"before_{order}"] = mean(elastic, reference.header, lambda s: s.width < 1 and s.depth == 6)
    figures["before_random"] = float(np.mean([figures.pop(f"before_random {i}") for i in range(RANDOM_ORDERS)]))
    return figures


def paper_part(b: Bench) -> dict[str, Any]:
    """Mean accuracy of all sub-networks on the test split after the paper's two stages, with a linear header."""
    elastic, model = elastic_of(b.job_of("paper"), b.elastic("paper"), 10)
    shapes = shape_grid(b.job, elastic.num_layers)
    accuracies = [evaluate_shape(elastic, model.header, b.data.public.test, s).accuracy for s in shapes]
    return {"mean": float(np.mean(accuracies))}


def choice_part(b: Bench) -> dict[str, Any]:
    """Trade-off scores, test accuracies and sizes of what each method chooses, mean over the clusters."""
    elastic, model = elastic_of(b.job, b.elastic(), 10)
    candidates = b.candidates.candidates
    tested = [evaluate_shape(elastic, model.header, b.data.public.test, c.shape).accuracy for c in candidates]
    figures: dict[str, Any] = {}
    for method in CHOICES:
        rows = []
        for cluster in b.fleet:
            choice = b.choice(cluster)
            i = choice.chosen_by[method]
            assert candidates[i].size_bytes <= choice.limit_bytes
            rows.append((choice.trade_off[i], choice.trade_off_accuracy[i], tested[i], candidates[i].size_bytes))
        score_a, score_b, accuracy, size = np.mean(rows, axis=0)
        figures[method] = {"a": score_a, "b": score_b, "accuracy": accuracy, "size_bytes": size}
    figures["shapes"] = {
        c: [candidates[b.choice(c).chosen].shape.width, candidates[b.choice(c).chosen].shape.depth] for c in b.fleet
    }
    return figures


def header_part(b: Bench) -> dict[str, Any]:
    """Headers found on one edge's shared set, on backbones with shared weights, tested on what no edge or cloud saw."""
    owners = list(b.data.devices.values())
    parts = [part for d in owners for part in (d.train, d.validation, d.test)] + [b.data.public.test]
    unseen = b.samples.rows(torch.cat([p.inputs.index for p in parts]))
    cluster = next(iter(b.fleet))
    edge = b.data.edges[cluster]
    config = b.job.header
    views = with_views(
        edge.train, config.views, Augmentation(shift_pixels=1), named_generator(b.seed, "views", cluster)
    )
    figures: dict[str, Any] = {}
    made = {v: elastic_of(b.job_of(v), b.elastic(v), 10) for v in HEADER_BACKBONES}
    for variant, (width, depth) in itertools.product(HEADER_BACKBONES, HEADER_SHAPES):
        elastic, model = made[variant]
        backbone = elastic.extract(BackboneShape(width=width, depth=depth)).eval()
        train, validation = cached_features(backbone, views), cached_features(backbone, edge.validation)
        folds = make_folds(train, validation, config.views, named_generator(b.seed, "folds", cluster))
        test = cached_features(backbone, unseen)
        for method in HEADER_METHODS_OF[variant]:
            result = search_header(
                method.removesuffix(" alone"),
                train,
                validation,
                config,
                backbone.feature_shape,
                10,
                200_000,
                b.seed,
                given=[model.header] if method in ("halving", "distilled") else [],
                folds=folds,
            )
            header = result.header.eval()
            accuracy = evaluate(lambda rows, h=header, t=test: h(t.features(rows)), unseen.labels).accuracy  # type: ignore[misc]
            held_out = [point for point in result.history if point["name"] == "held out"]
            figures[f"{variant}/{width:g}/{depth}/{method}"] = {
                "accuracy": accuracy,
                "parameters": sum(p.numel() for p in header.parameters()),
                "held_out": held_out[0] if held_out else None,
            }
    return figures


def devices_part(b: Bench) -> dict[str, Any]:
    """Every way to refine, in every setting, on the same coarse models, splits and batches."""
    figures: dict[str, Any] = {}
    for setting, split in SETTINGS.items():
        data = share_out(b.samples, make_job({"seed": b.seed, "data": split}).data, names_of(b.fleet), b.seed)
        reports: dict[str, list[ClusterReport]] = {variant: [] for variant in VARIANTS}
        for cluster, members in b.fleet.items():
            assignment, found = b.coarse(cluster)
            with nothing_twice():
                for variant, refine in VARIANTS.items():
                    job = make_job({"seed": b.seed, "data": split, "refine": refine})
                    link = LocalLink({a.device_id: in_memory(a, data) for a in members}, Ledger(), "down", "up")
                    stats, edge_data = gather_stats(job, cluster, link, Transient()), data.edges[cluster]
                    report = refine_cluster(job, assignment, stats, found, edge_data, link, Transient(), silent)
                    reports[variant].append(report)
        for variant, of_clusters in reports.items():
            table = np.array([(d.accuracy_coarse, d.accuracy) for r in of_clusters for d in r.devices], dtype=float)
            loss = np.array([loss_of(r) for r in of_clusters])
            weight = np.array([r.rounds[0]["num_samples"] for r in of_clusters])
            figures[f"{setting}/{variant}"] = {
                "coarse": table[:, 0].mean(),
                "accuracy": table[:, 1].mean(),
                "worst": table[:, 1].min(),
                "by_device": [round(float(v), 6) for v in table[:, 1]],
                "validation_loss": float((loss * weight).sum() / weight.sum()),
                "from_uniform": max(distance_from_uniform(torch.tensor(r.similarity)) for r in of_clusters),
                "shipped": [way_of(r) for r in of_clusters],
            }
    return figures


@contextmanager
def nothing_twice() -> Iterator[None]:
    """Inside, devices compute the same features once for all ways to refine.

    Features are those of one backbone, so this is for one cluster.
    """
    run, kept = device._run, {}

    def once(backbone: Backbone, samples: Samples) -> Features:
        key = samples.inputs.index.numpy().tobytes()
        if key not in kept:
            kept[key] = run(backbone, samples)
        return kept[key]

    device._run = once
    try:
        yield
    finally:
        device._run = run


def way_of(report: ClusterReport) -> str:
    """What a cluster shipped, as its decision names it."""
    return Way(**report.decision["way"]).name


def loss_of(report: ClusterReport) -> float:
    """The pooled validation loss of what a cluster shipped, nats a sample."""
    return float(report.decision["loss_by_way"][kind_of(Way(**report.decision["way"]))])


def in_memory(attributes: DeviceAttributes, data: FleetData, finished: dict[str, DeviceState] | None = None) -> Handler:
    """A device that lives in this process; ``finished`` gets what it is in the end."""
    state = DeviceState(counted(attributes, data), data.devices[attributes.device_id], DeviceMemory())

    def answer(message: Message) -> Message:
        nonlocal state
        state, reply = handle(state, message)
        if finished is not None:
            finished[attributes.device_id] = state
        return reply

    return answer


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "reference": reference_part,
    "importance": importance_part,
    "elastic": elastic_part,
    "paper": paper_part,
    "choice": choice_part,
    "header": header_part,
    "devices": devices_part,
}


def run_seed(task: tuple[int, tuple[str, ...]]) -> tuple[int, dict[str, Any]]:
    """All parts of one seed."""
    seed, parts = task
    b = bench(seed)
    done = {}
    for part in parts:
        start = time.perf_counter()
        done[part] = b.steps.step(figures_key(part), Figures, lambda p=part: Figures(figures=PARTS[p](b))).figures  # type: ignore[misc]
        print(f"seed {seed}: {part} in {time.perf_counter() - start:.0f} s", flush=True)
    return seed, done


def main() -> None:
    """Run what is asked for and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22, 23, 24])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "digits", help="without the ending")
    options = parser.parse_args()
    parts = tuple(options.parts)
    tasks = [(seed, parts) for seed in options.seeds]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        results = dict(pool.imap_unordered(run_seed, tasks))
    page = markdown(results, parts)
    write_atomically(options.out.with_suffix(".json"), json.dumps(results, indent=1, sort_keys=True) + "\n")
    write_atomically(options.out.with_suffix(".md"), page)
    print(page)


if __name__ == "__main__":
    main()
