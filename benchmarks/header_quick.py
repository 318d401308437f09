"""Where the edge's header search pays, and whether the quick test before it knows: benchmarks/results/header_quick.md.

    python benchmarks/header_quick.py                      digits, seeds 30-34, two processes
    python benchmarks/header_quick.py --seeds 100 101 102  what its numbers were chosen on

Backbones with shared weights of three sizes, distilled with the pooled header (the default) and with a linear one; an
edge has its own 48 shared images, or 300. All headers are tested on what neither cloud nor edge saw. ``searched`` is
the search without the quick test, which a proof on held-out folds still guards; ``quick test`` is the default.
"""

import argparse
import itertools
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from digits import HEADER_SHAPES, bench
from digits_tables import gain, machine, table

from fleetfit.cloud.elastic import elastic_of
from fleetfit.core.files import write_atomically
from fleetfit.core.randomness import named_generator
from fleetfit.core.records import BackboneShape
from fleetfit.data.augmentation import Augmentation
from fleetfit.edge.header import cached_features, with_views
from fleetfit.edge.header_proof import make_folds
from fleetfit.edge.header_search import search_header
from fleetfit.models.training import evaluate

RESULTS = Path(__file__).parent / "results"
SHARED = (48, 300)
VARIANTS = ("default", "linear header")


def run_seed(seed: int) -> list[dict[str, Any]]:
    """All cells of one seed."""
    torch.set_num_threads(1)
    b = bench(seed)
    owners = list(b.data.devices.values())
    parts = [part for d in owners for part in (d.train, d.validation, d.test)] + [b.data.public.test]
    unseen = torch.cat([part.inputs.index for part in parts])
    cluster = next(iter(b.fleet))
    edge, config = b.data.edges[cluster], b.job.header
    own = torch.cat([edge.train.inputs.index, edge.validation.inputs.index])
    cells = []
    for variant, (width, depth), number in itertools.product(VARIANTS, HEADER_SHAPES, SHARED):
        elastic, model = elastic_of(b.job_of(variant), b.elastic(variant), 10)
        backbone = elastic.extract(BackboneShape(width=width, depth=depth)).eval()
        rows = torch.cat([own, unseen])[:number]
        train = b.samples.rows(rows[: 4 * number // 5])
        views = with_views(train, config.views, Augmentation(shift_pixels=1), named_generator(seed, "views", cluster))
        shared = cached_features(backbone, views), cached_features(backbone, b.samples.rows(rows[4 * number // 5 :]))
        folds = make_folds(*shared, config.views, named_generator(seed, "folds", cluster))
        tested = b.samples.rows(unseen[max(0, number - len(own)) :])
        test = cached_features(backbone, tested)
        for method in ("distilled", "searched", "quick test"):
            start = time.process_time()
            result = search_header(
                "distilled" if method == "distilled" else "halving",
                *shared,
                config.model_copy(update={"quick_test": method == "quick test"}),
                backbone.feature_shape,
                10,
                200_000,
                seed,
                given=[model.header],
                folds=folds,
            )
            seconds, header = time.process_time() - start, result.header.eval()
            accuracy = evaluate(lambda r, h=header, t=test: h(t.features(r)), tested.labels).accuracy  # type: ignore[misc]
            found = {point["name"]: point for point in result.history}
            cells.append(
                {
                    "cell": f"{variant}, w {width:g}, d {depth}, {number} images",
                    "method": method,
                    "accuracy": accuracy,
                    "seconds": seconds,
                    "replaced": bool(found.get("held out", {}).get("holds")),
                    "searched": len(result.trials) > 1,
                }
            )
    return cells


def markdown(seeds: list[int], by_seed: list[list[dict[str, Any]]]) -> str:
    """The page."""
    rows = []
    for name in dict.fromkeys(c["cell"] for c in by_seed[0]):
        own = [{c["method"]: c for c in cells if c["cell"] == name} for cells in by_seed]
        accuracy = {m: [c[m]["accuracy"] for c in own] for m in own[0]}
        rows.append(
            [
                name,
                f"{100 * np.mean(accuracy['distilled']):.1f}",
                gain(accuracy["searched"], accuracy["distilled"]),
                f"{sum(c['searched']['replaced'] for c in own)} of {len(own)}",
                gain(accuracy["quick test"], accuracy["distilled"]),
                f"{sum(c['quick test']['searched'] for c in own)} of {len(own)}",
                f"{np.mean([c['searched']['seconds'] for c in own]):.1f}",
                f"{np.mean([c['quick test']['seconds'] for c in own]):.1f}",
            ]
        )
    head = ["", "distilled, %", "searched, points", "replaced", "quick test, points", "searched then"]
    lines = [
        "# Where the edge's header search pays",
        "",
        f"`python benchmarks/header_quick.py --seeds {' '.join(map(str, seeds))}` (its head says how). Differences are "
        f"paired by seed, ± standard error. {machine()}",
        "",
        *table([*head, "seconds searched", "with quick test"], rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the seeds and write the page, or print it where the seeds are those that the numbers were chosen on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[30, 31, 32, 33, 34])
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        page = markdown(options.seeds, pool.map(run_seed, options.seeds, chunksize=1))
    print(page)
    if min(options.seeds) < 100:
        write_atomically(RESULTS / "header_quick.md", page)


if __name__ == "__main__":
    main()
