"""Find a header for a backbone on an edge's few shared samples: halving, random, enas or a fixed one; one signature.

Every decision is made on the validation source. A budget counts optimiser steps of headers, alike for all methods.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fleetfit.config import HeaderConfig
from fleetfit.method.policy_gradient import policy_loss, shared_weight_loss, update_baseline
from fleetfit.method.search_space import sample_blocks
from fleetfit.models.controller import Controller
from fleetfit.models.features import Features, FeatureShape
from fleetfit.models.header import Header, build_header
from fleetfit.models.header_supernet import HeaderSupernet
from fleetfit.randomness import named_generator, seeded_init
from fleetfit.records import FIXED_HEADERS, Block, HeaderKind, HeaderSpec, HeaderTrial
from fleetfit.training import Scores, evaluate, fit, predict, score

ProgressCallback = Callable[[int, int, str], None]

LABEL_SMOOTHING = 0.1
CANDIDATES = 8  # of halving; more of them get too few steps each to be told apart
RANDOM_HEADERS = 4  # trained fully by random search
POOLINGS = (1, 2, 4)
HIDDEN = (0, 0, 32)
RESIDUAL_CELL = (  # the hand-made cell of the space; halving always looks at it
    Block(input_1=0, input_2=1, operation_1="conv3", operation_2="identity"),
    Block(input_1=2, input_2=0, operation_1="conv3", operation_2="identity"),
)
CELL_POOLING = 2  # random, enas: final pooling of their space
FIXED_POOLING = 4  # of the convolutional fixed headers
FIXED_STEPS = 600  # more does not help one small header
CHILDREN_PER_STEP = 2  # enas, both phases: children a gradient is averaged over
CONTROLLER_EVERY = 5  # enas: steps of the shared weights to one of the controller
CONTROLLER_CLIP = 5.0  # largest norm of its gradient
FINAL_CHILDREN = 10  # enas: children ranked by shared weights at the end
BYTES_PER_PARAMETER = 4
BYTES_PER_TENSOR = 100  # a name and a shape in a safetensors file
SAMPLING_TRIES = 200


@runtime_checkable
class FeatureSource(Protocol):
    """Labelled samples as the backbone sees them."""

    @property
    def labels(self) -> Int[Tensor, " sample"]:
        """Class numbers."""
        ...

    def features(self, rows: Int[Tensor, " row"]) -> Features:
        """Features of some samples; differentiable where the backbone trains."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """The backbone's trainable parameters; none when it is frozen."""
        ...


@dataclass(frozen=True)
class CachedFeatures:
    """Features of a frozen backbone, computed once."""

    cached: Features
    labels: Int[Tensor, " sample"]

    def features(self, rows: Int[Tensor, " row"]) -> Features:
        """Look them up."""
        return self.cached.rows(rows)

    def parameters(self) -> list[nn.Parameter]:
        """None: the backbone is frozen."""
        return []


@dataclass(frozen=True)
class SearchResult:
    """The header to ship, what it was compared with (best first), and what it cost."""

    header: Header
    trials: tuple[HeaderTrial, ...]
    steps_used: int
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Finalist:
    """A trained header with its scores on the validation source, and its loss on each sample there."""

    name: str
    header: Header
    scores: Scores
    losses: Float[Tensor, " sample"]


@dataclass
class Search:
    """What all methods share, and what has been spent so far; lives for one search."""

    train: FeatureSource
    validation: FeatureSource
    config: HeaderConfig
    shape: FeatureShape
    num_classes: int
    max_bytes: int
    seed: int
    method: str
    on_progress: ProgressCallback
    steps_used: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def fits(self, spec: HeaderSpec) -> bool:
        """Whether a header is within ``max_bytes``."""
        return header_bytes(spec, self.shape, self.num_classes) <= self.max_bytes

    def build(self, spec: HeaderSpec, *names: str | int) -> Header:
        """A fresh header."""
        with seeded_init(self.seed, "header_search", self.method, "init", *names):
            return build_header(spec, self.shape, self.num_classes)

    def fit(
        self,
        loss_of: Callable[[Tensor], Tensor],
        parameters: list[nn.Parameter],
        steps: int,
        *names: str | int,
        cost: int = 1,
    ) -> None:
        """Train something; each step takes ``cost`` of the budget."""
        note = " ".join(map(str, names))
        start = self.steps_used

        def after_step(step: int, steps: int, loss: float) -> None:
            self.steps_used = start + step * cost
            self.on_progress(self.steps_used, self.config.budget_steps, note)

        fit(
            loss_of,
            parameters,
            len(self.train.labels),
            steps=steps,
            batch_size=self.config.batch_size,
            learning_rate=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            generator=named_generator(self.seed, "header_search", self.method, "batches", *names),
            after_step=after_step,
            name=f"header search ({self.method}): {note}",
        )

    def train_alone(self, header: Header, steps: int, *names: str | int) -> None:
        """Train one header; the backbone stays as it is."""

        def loss_of(rows: Tensor) -> Tensor:
            logits = header(self.train.features(rows).detached())
            return cross_entropy(logits, self.train.labels[rows], label_smoothing=LABEL_SMOOTHING)

        header.train()
        self.fit(loss_of, list(header.parameters()), steps, *names)
        header.eval()

    def scores(self, header: Callable[[Features], Tensor]) -> Scores:
        """Scores on the validation source."""
        return evaluate(lambda rows: header(self.validation.features(rows)), self.validation.labels)

    def finalist(self, name: str, header: Header) -> Finalist:
        """Score a trained header and note it."""
        labels = self.validation.labels
        logits = predict(lambda rows: header(self.validation.features(rows)), len(labels))
        scores = score(logits, labels)
        point = {"step": self.steps_used, "name": name, "loss": scores.loss, "accuracy": scores.accuracy}
        self.history.append(point)
        return Finalist(name, header, scores, cross_entropy(logits, labels, reduction="none"))


def header_bytes(spec: HeaderSpec, shape: FeatureShape, num_classes: int) -> int:
    """About the size of a stored header: 4 bytes a parameter and a name a tensor; nothing is allocated."""
    with torch.device("meta"):
        parameters = list(build_header(spec, shape, num_classes).parameters())
    return BYTES_PER_PARAMETER * sum(p.numel() for p in parameters) + BYTES_PER_TENSOR * len(parameters)


def spec_name(spec: HeaderSpec) -> str:
    """A short name for tables: kind, number of blocks and channels, pooling, hidden units."""
    if spec.kind != "blocks":
        return spec.kind
    return f"{len(spec.blocks)} blocks of {spec.channels}, pooling {spec.pooling}" + (
        f", hidden {spec.hidden}" if spec.hidden else ""
    )


def sample_specs(search: Search, num_specs: int, names: tuple[str, ...]) -> list[HeaderSpec]:
    """Halving's population: linear, a pooled projection, a residual cell, then free B, channels, pooling and hidden.

    Pooling is drawn from the two largest: final pooling matters most, and where one cell is best, linear does as well.
    No MLP on [CLS]: never better than both, and chosen by the noise of few validation samples. Only headers that fit.

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
    specs = [HeaderSpec(kind="linear"), pooled]
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
            hidden=HIDDEN[draw(len(HIDDEN))],
        )
        if spec not in specs and search.fits(spec):
            specs.append(spec)
    if not specs:
        raise _nothing_fits(search)
    return specs[:num_specs]


def search_halving(search: Search) -> list[Finalist]:
    """Beyond: successive halving. Each rung trains all survivors, alike, and keeps the better half by held-out loss.

    A survivor trains on with twice the steps. All rungs cost the same; the last one trains the winner.
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


def cell_spec(search: Search) -> HeaderSpec:
    """The one space of random search and ENAS: B blocks, all else fixed; this is one header of it.

    Raises:
        ValueError: none of many samples fits, even with pooling to one cell.
    """
    config = search.config
    generator = named_generator(search.seed, "header_search", search.method, "space")
    for pooling in (CELL_POOLING, 1):
        for _ in range(SAMPLING_TRIES):
            spec = HeaderSpec(
                kind="blocks",
                blocks=sample_blocks(config.max_blocks, config.operations, generator),
                repeats=config.repeats,
                channels=config.channels,
                pooling=pooling,
            )
            if search.fits(spec):
                return spec
    raise _nothing_fits(search)


def draw_fitting(search: Search, spec: HeaderSpec, draw: Callable[[], tuple[Block, ...]]) -> HeaderSpec:
    """Draw blocks until they fit; ``spec`` itself, which fits, when none does."""
    for _ in range(SAMPLING_TRIES):
        drawn = spec.model_copy(update={"blocks": draw()})
        if search.fits(drawn):
            return drawn
    return spec


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


def search_enas(search: Search) -> list[Finalist]:
    """The paper's search: shared weights (Eq. 15) and an LSTM policy (REINFORCE) in turn; the best child trains alone.

    Where the training source has trainable parameters, the backbone is trained with the shared weights. A step of one
    child is one step of the budget; the last ``final_share`` of it trains the child that inherits its weights.

    Reading: AdamW for the shared weights, as for every header here, so that searches differ in their search only.
    """
    config = search.config
    space = cell_spec(search)
    generator = named_generator(search.seed, "header_search", search.method, "children")
    with seeded_init(search.seed, "header_search", search.method, "init"):
        shared = HeaderSupernet(space, config.operations, search.shape, search.num_classes)
        controller = Controller(config.max_blocks, config.operations)
    optimizer = torch.optim.Adam(controller.parameters(), lr=config.controller_learning_rate)
    final_steps = max(1, round(config.budget_steps * config.final_share))
    steps = max(1, (config.budget_steps - final_steps) // CHILDREN_PER_STEP)
    baseline: float | None = None
    done = 0

    def draw() -> tuple[Block, ...]:
        with torch.no_grad():
            return draw_fitting(search, space, lambda: controller.sample(generator).blocks).blocks

    def controller_step() -> None:
        nonlocal baseline
        choices = [controller.score(draw()) for _ in range(CHILDREN_PER_STEP)]
        rewards = [search.scores(partial(shared, blocks=c.blocks)).accuracy for c in choices]
        reward = sum(rewards) / len(rewards)
        loss = policy_loss(
            torch.stack([c.log_probability for c in choices]),
            torch.tensor(rewards),
            reward if baseline is None else baseline,
            torch.stack([c.entropy for c in choices]),
            config.controller_entropy,
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(controller.parameters(), CONTROLLER_CLIP)
        optimizer.step()
        baseline = update_baseline(baseline, reward, config.controller_baseline_decay)
        search.history.append({"step": search.steps_used, "name": "controller", "reward": reward, "baseline": baseline})

    def loss_of(rows: Tensor) -> Tensor:
        nonlocal done
        if done and done % CONTROLLER_EVERY == 0:
            controller_step()
        done += 1
        features, labels = search.train.features(rows), search.train.labels[rows]
        losses = [
            cross_entropy(shared(features, draw()), labels, label_smoothing=LABEL_SMOOTHING)
            for _ in range(CHILDREN_PER_STEP)
        ]
        return shared_weight_loss(torch.stack(losses))

    parameters = [*shared.parameters(), *search.train.parameters()]
    search.fit(loss_of, parameters, steps, "shared weights", cost=CHILDREN_PER_STEP)
    ranked = []
    for _ in range(FINAL_CHILDREN):
        blocks = draw()
        scores = search.scores(partial(shared, blocks=blocks))
        ranked.append((-scores.accuracy, scores.loss, blocks))
    child = shared.child(min(ranked, key=lambda r: r[:2])[2])
    search.train_alone(child, final_steps, "best child")
    return [search.finalist(spec_name(child.spec), child)]


def search_fixed(search: Search) -> list[Finalist]:
    """One fixed kind, trained alone."""
    spec = HeaderSpec(kind=cast(HeaderKind, search.method), channels=search.config.channels, pooling=FIXED_POOLING)
    if not search.fits(spec):
        raise _nothing_fits(search)
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


def _nothing_fits(search: Search) -> ValueError:
    return ValueError(f"no header of search {search.method!r} fits: max_bytes must be larger, got {search.max_bytes}")


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
    search = Search(train, validation, config, shape, num_classes, max_bytes, seed, method, on_progress)
    found = METHODS[method](search)
    given_ones = [search.finalist(f"given {spec_name(h.spec)}", copy.deepcopy(h).eval()) for h in given]
    # Found ones come with the one trained to the end first: those that dropped out on the way cannot win.
    contenders = [*found, *given_ones] if method == "random" else [*found[:1], *given_ones]
    if not contenders:
        raise ValueError(f"header.search {method!r} needs given headers, got none")
    winner = min(contenders, key=lambda f: f.scores.loss)
    if given_ones:
        incumbent = min(given_ones, key=lambda f: f.scores.loss)
        winner = winner if clearly_better(winner.losses, incumbent.losses) else incumbent
    trials = sorted((_trial(f) for f in (*found, *given_ones)), key=lambda t: t.loss)
    return SearchResult(winner.header, tuple(trials), search.steps_used, search.history)


def _trial(finalist: Finalist) -> HeaderTrial:
    return HeaderTrial(
        name=finalist.name,
        spec=finalist.header.spec,
        loss=finalist.scores.loss,
        accuracy=finalist.scores.accuracy,
        parameters=sum(p.numel() for p in finalist.header.parameters()),
    )
