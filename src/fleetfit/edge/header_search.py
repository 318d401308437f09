"""Find a header for a backbone on an edge's few shared samples: halving, random, enas or a fixed one; one signature.

A search chooses on its validation source. Whether what it found replaces a given header is tested on held-out folds
(header_proof.py). Halving is not begun where a quick test on such folds promises nothing. A budget counts a search's
optimiser steps of headers, alike for all methods.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from fleetfit.config.sections import HeaderConfig
from fleetfit.core.randomness import derive_seed, named_generator
from fleetfit.core.records import FIXED_HEADERS, Block, FixedHeaderKind, HeaderSpec, HeaderTrial, JsonDict
from fleetfit.edge.enas import search_enas
from fleetfit.edge.header_proof import NOTHING_HELD_OUT, Fold, Proof, backbone_of, clearly_better, set_backbone
from fleetfit.edge.header_trials import (
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

CANDIDATES = 8  # of halving; more of them get too few steps each to be told apart
RANDOM_HEADERS = 4  # trained fully by random search
QUICK_CANDIDATES = 3  # of halving's population, in its order
QUICK_FOLDS = 3
QUICK_SHARE = 40  # of the budget, for each candidate and fold
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
    folds: Sequence[Fold] | None = None,
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
        given: Trained headers; the best of them wins unless what is found is clearly better on held-out samples.
        folds: Of all that ``train`` and ``validation`` have, for that test; of too few samples there are none, and
            nothing replaces a given header. None: it is made on ``validation``, which must not be what was trained on.
            Searches without each fold come on top of the budget, and only where a found header has the lower loss.
        on_progress: Called as (done, total, note) in steps of the budget.

    Returns:
        The header with the lowest validation loss among those trained to the end; a given one unless clearly worse.
        Where the backbone trains, it is left as the header needs it.

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
    came = backbone_of(train)
    given_ones = [search.finalist(f"given {spec_name(h.spec)}", copy.deepcopy(h).eval()) for h in given]
    if config.quick_test and start is not None and not _promises(search, folds, given_ones):
        on_progress(config.budget_steps, config.budget_steps, "not searched: a quick test promises nothing")
        kept = min(given_ones, key=lambda f: f.scores.loss)
        trials = sorted((_trial(f, f is kept) for f in given_ones), key=lambda t: t.loss)
        return SearchResult(kept.header, tuple(trials), search.steps_used, search.history)
    found = METHODS[method](search)
    best = winner_of(method, found)
    if best is None and not given_ones:
        raise ValueError(f"header.search {method!r} needs given headers, got none")
    note = ""
    if given_ones:
        incumbent = min(given_ones, key=lambda f: f.scores.loss)
        if best is not None and best.scores.loss < incumbent.scores.loss:
            trained = backbone_of(train)
            proof = _prove(search, found, best, incumbent, folds, came)
            search.history.append({"step": search.steps_used, "name": "held out", **proof.model_dump(mode="json")})
            note = f", the given one {'replaced' if proof.holds else 'stays'} by {proof.samples} held-out samples"
            set_backbone(train, trained)
            best = best if proof.holds else None
        else:
            best = None
        if best is None:
            set_backbone(train, came)
            best = incumbent
    assert best is not None
    trials = sorted((_trial(f, f is best) for f in (*found, *given_ones)), key=lambda t: t.loss)
    on_progress(config.budget_steps, config.budget_steps, f"{len(trials)} headers compared{note}")
    return SearchResult(best.header, tuple(trials), search.steps_used, search.history)


def winner_of(method: str, found: Sequence[Finalist]) -> Finalist | None:
    """The best by validation loss of those that were trained to the end; others, which come later, cannot win."""
    contenders = found if method == "random" else found[:1]
    return min(contenders, key=lambda f: f.scores.loss, default=None)


def _promises(search: Search, folds: Sequence[Fold] | None, given: Sequence[Finalist]) -> bool:
    """The quick test: whether one of the first candidates, trained a little, is better on folds that it did not see.

    Better by more than a standard error of the mean difference. That many searches will find nothing all the same is no
    harm: what they find is proved. Where nothing is held out, nothing found could replace a given header.
    """
    if folds is None:
        return True
    incumbent = min(given, key=lambda f: f.scores.loss)
    specs = sample_specs(search, QUICK_CANDIDATES, ("population",))
    steps = max(1, search.config.budget_steps // QUICK_SHARE)
    gains: dict[str, list[Tensor]] = {spec_name(spec): [] for spec in specs}
    for i, fold in enumerate(folds[:QUICK_FOLDS]):
        quick = replace(
            search,
            train=fold.train,
            validation=fold.held_out,
            seed=derive_seed(search.seed, "quick", i),
            on_progress=lambda done, total, note: search.on_progress(0, search.config.budget_steps, "quick test"),
            steps_used=0,
            history=[],
        )
        before = quick.finalist(incumbent.name, incumbent.header).losses
        for number, spec in enumerate(specs):
            header = quick.build(spec, number)
            quick.train_alone(header, steps, "quick", number)
            gains[spec_name(spec)].append(before - quick.finalist(spec_name(spec), header).losses)
    best: JsonDict = {"candidate": None, "gain": 0.0, "error": None, "samples": 0}
    promising = False
    for name, own in ((name, torch.cat(parts).double()) for name, parts in gains.items() if parts):
        gain, error = float(own.mean()), float(own.std()) / math.sqrt(len(own))
        if not math.isfinite(gain) or not math.isfinite(error):
            return True  # training diverges: the search says so
        if best["candidate"] is None or gain > best["gain"]:
            best = {"candidate": name, "gain": gain, "error": error, "samples": len(own)}
        promising |= gain > error
    search.history.append({"step": 0, "name": "quick test", "promising": promising, **best})
    return promising


def _prove(
    search: Search,
    found: Sequence[Finalist],
    best: Finalist,
    incumbent: Finalist,
    folds: Sequence[Fold] | None,
    came: Sequence[Tensor],
) -> Proof:
    """The test of a found header: search again without each fold, and compare on it."""
    if folds is None:
        return clearly_better(best.losses, incumbent.losses, best.right, incumbent.right, looks=max(1, len(found)))
    if not folds:
        return NOTHING_HELD_OUT
    budget = search.config.budget_steps
    pairs = []
    for i, fold in enumerate(folds):

        def on_progress(done: int, total: int, note: str, i: int = i) -> None:
            search.on_progress(budget - 1, budget, f"held-out fold {i + 1} of {len(folds)}")

        set_backbone(fold.train, came)
        without = replace(
            search,
            train=fold.train,
            validation=fold.validation,
            seed=derive_seed(search.seed, "fold", i),
            on_progress=on_progress,
            steps_used=0,
            history=[],
        )
        scored = replace(without, validation=fold.held_out)
        of_given = scored.finalist(incumbent.name, incumbent.header)
        winner = winner_of(search.method, METHODS[search.method](without))
        assert winner is not None, "a search that found a header on all samples finds one on fewer"
        pairs.append((scored.finalist(winner.name, winner.header), of_given))
    losses, given = (torch.cat([p[j].losses for p in pairs]) for j in (0, 1))
    right, right_given = (torch.cat([p[j].right for p in pairs]) for j in (0, 1))
    return clearly_better(losses, given, right, right_given, num_folds=len(folds))


def _trial(finalist: Finalist, chosen: bool) -> HeaderTrial:
    return HeaderTrial(
        name=finalist.name,
        spec=finalist.header.spec,
        loss=finalist.scores.loss,
        accuracy=finalist.scores.accuracy,
        parameters=sum(p.numel() for p in finalist.header.parameters()),
        chosen=chosen,
    )
