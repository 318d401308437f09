"""What a device's header gains on Banking77 if it is told more: benchmarks/results/banking77_ceilings.md and .json.

    FLEETFIT_DATA=<folder> python benchmarks/banking77_ceilings.py                  seeds 16-18, two processes
    FLEETFIT_DATA=<folder> python benchmarks/banking77_ceilings.py --seeds 100      other ones

But for the recipe, nothing here is a method: each row knows something that no device or edge knows, or is chosen on
the test texts. Clouds, fleets and texts are those of benchmarks/banking77.py; what that has finished is not computed
again.
"""

import argparse
import json
import math
import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from banking77 import (
    DEVICES_OF,
    RESULTS,
    SETTINGS,
    SHAPES,
    Bench,
    bench,
    figures_of,
    job_of,
    parts_of,
    sent_model,
    with_texts,
)
from banking77_page import RECIPE_RATE
from digits import Figures, names_of
from digits_tables import collect, machine, mean, spread, table
from torch import Tensor
from torch.nn.functional import cross_entropy

from fleetfit.core.encoding import take
from fleetfit.core.files import write_atomically
from fleetfit.data.partition import share_out
from fleetfit.edge.messages import BackboneAssignment
from fleetfit.models.classifier import Classifier
from fleetfit.models.header import header_from_state
from fleetfit.models.training import predict

PULLS = (0.03, 0.01, 0.003, 0.001, 0.0003)  # weight of the squared distance from the header as it was sent
RECIPE, GENERAL, CLASSES, NUMBER, OWN, TOGETHER, BOTH = (
    "fleetfit, the recipe",
    "general",
    "its classes are known",
    "the number of its classes is known",
    "the same, and trained on its own texts",
    "the cluster's texts in one place",
    "the same, and the number of its classes is known",
)


def ceilings(b: Bench) -> dict[str, Any]:
    """Mean test accuracy of each cluster's devices, by setting, ceiling and shape."""
    figures = {}
    for shape, cluster in zip(SHAPES, DEVICES_OF, strict=True):
        inputs, logits = last_layer(b, b.specialised(shape, cluster), cluster)
        for setting in SETTINGS:
            for name, accuracy in of_cluster(b, cluster, setting, inputs, logits).items():
                figures[f"{setting}/{name}/{shape.width:g}/{shape.depth}"] = accuracy
    return figures


def of_cluster(b: Bench, cluster: str, setting: str, inputs: Tensor, logits: Tensor) -> dict[str, float]:
    """Mean test accuracy of one cluster's devices in one setting, by ceiling."""
    labels, num_classes = b.samples.labels, b.samples.num_classes
    data = with_texts(b, share_out(b.samples, job_of(b.seed, data=SETTINGS[setting]).data, names_of(b.fleet), b.seed))
    own, test = [], []
    for member in b.fleet[cluster]:
        train, validation, later = (part.inputs.index for part in parts_of(data.devices[member.device_id]))
        own.append(torch.cat([train, validation]))
        test.append(later)

    def accuracy(changes: list[Tensor], priors: list[Tensor]) -> float:
        """With what changes in each device's last layer, and what is added to its logits."""
        hits = [
            (logits[rows] + inputs[rows] @ change + prior).argmax(-1) == labels[rows]
            for rows, change, prior in zip(test, changes, priors, strict=True)
        ]
        return float(np.mean([hit.double().mean() for hit in hits]))

    def trained(rows: Tensor, pull: float, prior: Tensor | float = 0.0) -> Tensor:
        return change_of_last_layer(inputs[rows], logits[rows] + prior, labels[rows], pull)

    none = [torch.zeros(num_classes)] * len(own)
    seen = [counts_of(labels[rows], num_classes) > 0 for rows in own]
    there = [s | (counts_of(labels[rows], num_classes) > 0) for s, rows in zip(seen, test, strict=True)]
    known = [torch.where(t, 0.0, -math.inf) for t in there]
    number = [number_prior(s, int(t.sum())) for s, t in zip(seen, there, strict=True)]
    unchanged = [inputs.new_zeros(inputs.shape[1], num_classes)] * len(own)
    together = [[trained(torch.cat(own), pull)] * len(own) for pull in PULLS]
    alone = [[trained(rows, pull, prior) for rows, prior in zip(own, number, strict=True)] for pull in PULLS]
    return {
        GENERAL: accuracy(unchanged, none),
        CLASSES: accuracy(unchanged, known),
        NUMBER: accuracy(unchanged, number),
        OWN: max(accuracy(changes, number) for changes in (unchanged, *alone)),
        TOGETHER: max(accuracy(changes, none) for changes in (unchanged, *together)),
        BOTH: max(accuracy(changes, number) for changes in (unchanged, *together)),
    }


def last_layer(b: Bench, assignment: BackboneAssignment, cluster: str) -> tuple[Tensor, Tensor]:
    """What enters the header's last layer, with a 1 for its bias (text, feature + 1), and the logits (text, class)."""
    sent, found = sent_model(assignment), b.header(assignment, cluster)
    shape, state = sent.backbone.feature_shape, take(found.tensors, "header")
    model = Classifier(sent.backbone, header_from_state(found.header, shape, b.samples.num_classes, state)).eval()
    caught: list[Tensor] = []
    handle = model.header.last_linear.register_forward_pre_hook(lambda _, entering: caught.append(entering[0]))

    def both(rows: Tensor) -> Tensor:
        logits = model(b.samples.inputs[rows])
        return torch.cat([caught.pop(), logits], dim=1)

    computed = predict(both, len(b.samples), b.job.model.batch_size, lengths=b.samples.inputs.lengths)
    handle.remove()
    features, logits = computed.split([computed.shape[1] - b.samples.num_classes, b.samples.num_classes], dim=1)
    return torch.cat([features, torch.ones(len(features), 1)], dim=1), logits


def counts_of(labels: Tensor, num_classes: int) -> Tensor:
    """How many samples each class has."""
    return torch.bincount(labels, minlength=num_classes)


def number_prior(seen: Tensor, number: int) -> Tensor:
    """Bayes' rule for a device that has ``number`` of the classes, each set of them as likely, and saw some of them.

    A class that it did not see is one of the others with probability (number - seen) / (classes - seen); the classes
    that it has are alike. Nats, to be added to logits of a model that holds all classes alike.
    """
    of_seen, classes = int(seen.sum()), len(seen)
    unseen = (number - of_seen) / max(1, classes - of_seen)
    return torch.where(seen, 0.0, math.log(unseen) if unseen else -math.inf)


def change_of_last_layer(inputs: Tensor, logits: Tensor, labels: Tensor, pull: float) -> Tensor:
    """What training on these texts changes in the last layer (feature + 1, class); convex, solved to its end."""
    change = inputs.new_zeros(inputs.shape[1], logits.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([change], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = cross_entropy(logits + inputs @ change, labels) + pull * change.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[arg-type]
    return change.detach()


def markdown(results: Mapping[int, Mapping[str, Any]]) -> str:
    """The page."""

    def over(setting: str, name: str) -> list[float]:
        """Gain over the general model, mean of the shapes, of each seed."""
        own, general = (
            np.mean([collect(results, f"{setting}/{n}/{s.width:g}/{s.depth}") for s in SHAPES], axis=0)
            for n in (name, GENERAL)
        )
        return list(own - general)

    seeds = " ".join(map(str, sorted(results)))
    most = list(np.max([over("40 classes", name) for name in (NUMBER, OWN, TOGETHER, BOTH)], axis=0))
    return "\n".join(
        [
            "# What a device's header gains on Banking77 if it is told more",
            "",
            f"`python benchmarks/banking77_ceilings.py --seeds {seeds}`; points over the general model, mean ± "
            f"standard error over seeds. {machine()} Fleets, texts and models are those of benchmarks/banking77.py "
            "with the same seeds.",
            "",
            *table(
                ["", *SETTINGS],
                [
                    [name, *(spread(over(s, name)) for s in SETTINGS)]
                    for name in (RECIPE, CLASSES, NUMBER, OWN, TOGETHER, BOTH)
                ],
            ),
            "- **Its classes are known**: also those of which the device has no text yet. No method can know them.",
            "- **The number of its classes is known**: Bayes' rule for it and the classes of the device's 60 texts; "
            "about the most that a class prior can do.",
            "- **Trained on its own texts**: the last layer, with that prior in the logits, on the 60 texts.",
            "- **The cluster's texts in one place**: the last layer trained on all 600 of them, which no edge may see.",
            f"- Whatever is trained is pulled to the header as it was sent, by the best of {len(PULLS)} weights or not "
            "trained at all: best on the test texts of the cluster.",
            "",
            "No row is a proof: a method that none of them tries may gain more, and between knowing the classes and "
            "their number lies whatever tells of those that a device has not seen yet.",
            "",
            f"The target for 40 classes is +1. The best of the last four rows, again by test texts, is "
            f"{100 * mean(most):+.1f} on the mean and {', '.join(f'{100 * v:+.1f}' for v in most)} by seed.",
            "",
        ]
    )


def run_seed(seed: int) -> tuple[int, dict[str, Any]]:
    """One seed."""
    b = bench(seed)
    figures = b.steps.step("figures-ceilings", Figures, lambda: Figures(figures=ceilings(b))).figures
    devices = figures_of(b, "devices")
    recipe = {
        f"{setting}/{RECIPE}/{shape.width:g}/{shape.depth}": devices[
            f"{setting}/recipe/{RECIPE_RATE:g}/{shape.width:g}/{shape.depth}"
        ]["accuracy"]
        for setting in SETTINGS
        for shape in SHAPES
    }
    print(f"seed {seed}: done", flush=True)
    return seed, figures | recipe


def main() -> None:
    """Run what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[16, 17, 18])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "banking77_ceilings", help="without the ending")
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        results = dict(pool.imap_unordered(run_seed, options.seeds))
    page = markdown(results)
    write_atomically(options.out.with_suffix(".json"), json.dumps(results, indent=1, sort_keys=True) + "\n")
    write_atomically(options.out.with_suffix(".md"), page)
    print(page)


if __name__ == "__main__":
    main()
