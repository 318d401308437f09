"""Find a header for a backbone on an edge's few shared samples: halving, random, enas or a fixed one; one signature.

Every decision is made on the validation source. A budget counts optimiser steps of headers, alike for all methods.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from fleetfit.config import HeaderConfig
from fleetfit.enas import search_enas
from fleetfit.header_trials import (
    SAMPLING_TRIES,
    FeatureSource,
    Finalist,
    ProgressCallback,
    Search,
    cell_spec,
    draw_fitting,
    nothing_fits,
    spec_name,
)
from fleetfit.method.search_space import sample_blocks
from fleetfit.models.features import FeatureShape
from fleetfit.models.header import Header
from fleetfit.randomness import named_generator
from fleetfit.records import FIXED_HEADERS, Block, FixedHeaderKind, HeaderSpec, HeaderTrial

CANDIDATES = 8  # of halving; more of them get too few steps each to be told apart
RANDOM_HEADERS = 4  # trained fully by random search
POOLINGS = (1, 2, 4)
HIDDEN = (0, 0, 32)
FIXED_POOLING = 4  # of the convolutional fixed headers
FIXED_STEPS = 600  # more does not help one small header
RESIDUAL_CELL = (  # the hand-made cell of the space; halving always looks at it
    Block(input_1=0, input_2=1, operation_1="conv3", operation_2="identity"),
    Block(input_1=2, input_2=0, operation_1="conv3", operation_2="identity"),
)


@dataclass(frozen=True)
class SearchResult:
    """The header to ship, what it was compared with (best first), and what it cost."""

    header: Header
    trials: tuple[HeaderTrial, ...]
    steps_used: int
    history: list[dict[str, Any]]


def sample_specs(search: Search, num_specs: int, names: tuple[str, ...]) -> list[HeaderSpec]:
    """Halving's population: linear, a pooled projection, a residual cell, then free B, channels, pooling and hidden.

    Pooling is drawn from the two largest: final pooling matters most, and where one cell is best, linear does as well.
    No MLP on [CLS]: with few validation samples noise would choose among more. Only headers that fit.

    Raises:
        ValueError: nothing fits.
    """
    config = search.config
    generator = named_generator(search.seed, "header_search", search.method, *names)

    def draw(number: int) -> int:
        return int(torch.randint(number, (), generator=generator))

    poolings = [p for p in POOLINGS if p <= max(search.shape.grid)]
    pooled = HeaderSpec(kind="blocks", channels=config.channels, pooling=poolings[-1])
    residual = pooled.model_copy(update={"blocks": RESIDUAL_CELL[: config.max_blocks], "repeats": config.repeats})
    wider = residual.model_copy(update={"channels": 2 * config.channels})
    from_linear = search.starts(residual)
    specs = [pooled] if from_linear else [HeaderSpec(kind="linear"), pooled]
    if search.start is not None and search.start.spec.kind != "linear":
        specs = [search.start.spec, *(s for s in specs if s != search.start.spec)]
    if {"conv3", "identity"} <= set(config.operations):
        specs += [wider, residual]
    specs = [s for s in specs if search.fits(s)]
    for _ in range(SAMPLING_TRIES):
        if len(specs) >= num_specs:
            break
        spec = HeaderSpec(
            kind="blocks",
            blocks=sample_blocks(1 + draw(config.max_blocks), config.operations, generator),
            repeats=config.repeats,
            channels=config.channels * (1 + draw(2)),
            pooling=poolings[-2:][draw(min(2, len(poolings)))],
            hidden=0 if from_linear else HIDDEN[draw(len(HIDDEN))],
        )
        if spec not in specs and search.fits(spec):
            specs.append(spec)
    if not specs:
        raise nothing_fits(search)
    return specs[:num_specs]


def search_halving(search: Search) -> list[Finalist]:
    """Beyond: successive halving. Each rung trains all survivors, alike, and keeps the better half by held-out loss.

    A survivor trains on with twice the steps. All rungs cost the same; the last one trains the winner. With a header
    given, and ``header.warm_start``, those that can start as that one computes and are trained on from there.
    """
    specs = sample_specs(search, CANDIDATES, ("population",))
    survivors = [(i, search.build(spec, i)) for i, spec in enumerate(specs)]
    num_rungs = 1 + math.ceil(math.log2(max(1, len(specs))))
    finalists: list[Finalist] = []
    for rung in range(num_rungs):
        share = search.config.budget_steps // num_rungs
        steps = max(1, share // len(survivors))
        scored = []
        for i, header in survivors:
            search.train_alone(header, steps, "rung", rung, "header", i)
            scored.append((search.finalist(spec_name(header.spec), header), i))
        scored.sort(key=lambda pair: pair[0].scores.loss)
        keep = max(1, (len(scored) + 1) // 2)
        finalists = [f for f, _ in scored[keep:]] + finalists
        survivors = [(i, f.header) for f, i in scored[:keep]]
        if rung == num_rungs - 1:
            finalists = [f for f, _ in scored[:keep]] + finalists
    return finalists


def search_random(search: Search) -> list[Finalist]:
    """Random search: a few headers of ENAS's space, each trained alone for its share of the budget."""
    config = search.config
    generator = named_generator(search.seed, "header_search", search.method, "population")
    space = cell_spec(search)
    finalists = []
    for i in range(min(RANDOM_HEADERS, config.budget_steps)):
        spec = draw_fitting(search, space, lambda: sample_blocks(config.max_blocks, config.operations, generator))
        header = search.build(spec, i)
        search.train_alone(header, config.budget_steps // RANDOM_HEADERS or 1, "header", i)
        finalists.append(search.finalist(spec_name(spec), header))
    return finalists


def search_fixed(search: Search) -> list[Finalist]:
    """One fixed kind, trained alone."""
    spec = HeaderSpec(kind=cast(FixedHeaderKind, search.method), channels=search.config.channels, pooling=FIXED_POOLING)
    if not search.fits(spec):
        raise nothing_fits(search)
    header = search.build(spec)
    search.train_alone(header, min(search.config.budget_steps, FIXED_STEPS), "header")
    return [search.finalist(spec_name(spec), header)]


def search_none(search: Search) -> list[Finalist]:
    """Nothing is searched: the given headers alone are compared."""
    return []


METHODS: dict[str, Callable[[Search], list[Finalist]]] = {
    "halving": search_halving,
    "random": search_random,
    "enas": search_enas,
    "distilled": search_none,
    **dict.fromkeys(FIXED_HEADERS, search_fixed),
}


def clearly_better(losses: Float[Tensor, " sample"], incumbent: Float[Tensor, " sample"]) -> bool:
    """Whether losses are lower than an incumbent's, sample by sample, by more than the standard error of the mean.

    A given header saw far more data than the edge has; ten validation samples alone would replace it by chance.
    """
    gain = incumbent - losses
    error = float(gain.std() / math.sqrt(len(gain))) if len(gain) > 1 else 0.0
    return float(gain.mean()) > error


def _no_progress(done: int, total: int, note: str) -> None:
    """Say nothing."""


def search_header(
    method: str,
    train: FeatureSource,
    validation: FeatureSource,
    config: HeaderConfig,
    shape: FeatureShape,
    num_classes: int,
    max_bytes: int,
    seed: int,
    given: Sequence[Header] = (),
    on_progress: ProgressCallback = _no_progress,
) -> SearchResult:
    """Search a header by one of the methods, and train it.

    Args:
        method: halving, random, enas, a fixed header's kind, or "distilled" (the best of ``given`` as it is).
        train: What headers are trained on.
        validation: What every decision is made on.
        config: Budget, optimiser and space.
        shape: What features look like.
        num_classes: Classes.
        max_bytes: Larger headers are never sampled.
        seed: Decides all randomness, with the method's name.
        given: Trained headers; the best of them wins unless a found one is clearly better.
        on_progress: Called as (done, total, note) in steps of the budget.

    Returns:
        The header with the lowest validation loss among those trained to the end; a given one unless clearly worse.

    Raises:
        ValueError: unknown method, no samples, or no header fits.
        TrainingDiverged: a loss is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"header.search must be one of {', '.join(METHODS)}, got {method!r}")
    for name, source in (("train", train), ("validation", validation)):
        if len(source.labels) < 1:
            raise ValueError(f"header search: {name} must have at least 1 sample, got 0")
    start = given[0] if given and config.warm_start and method == "halving" else None
    search = Search(train, validation, config, shape, num_classes, max_bytes, seed, method, on_progress, start)
    found = METHODS[method](search)
    given_ones = [search.finalist(f"given {spec_name(h.spec)}", copy.deepcopy(h).eval()) for h in given]
    # Found ones come with the one trained to the end first: those that dropped out on the way cannot win.
    contenders = [*found, *given_ones] if method == "random" else [*found[:1], *given_ones]
    if not contenders:
        raise ValueError(f"header.search {method!r} needs given headers, got none")
    winner = min(contenders, key=lambda f: f.scores.loss)
    if given_ones:
        incumbent = min(given_ones, key=lambda f: f.scores.loss)
        # One that started as the given header knows what that knows; a fresh one has to prove itself.
        warm = search.starts(winner.header.spec) and winner.scores.loss < incumbent.scores.loss
        winner = winner if warm or clearly_better(winner.losses, incumbent.losses) else incumbent
    trials = sorted((_trial(f) for f in (*found, *given_ones)), key=lambda t: t.loss)
    on_progress(config.budget_steps, config.budget_steps, f"{len(trials)} headers compared")
    return SearchResult(winner.header, tuple(trials), search.steps_used, search.history)


def _trial(finalist: Finalist) -> HeaderTrial:
    return HeaderTrial(
        name=finalist.name,
        spec=finalist.header.spec,
        loss=finalist.scores.loss,
        accuracy=finalist.scores.accuracy,
        parameters=sum(p.numel() for p in finalist.header.parameters()),
    )
