"""The workbench of every header search: sources of features, a budget of steps, headers built, trained and scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fleetfit.config.sections import HeaderConfig
from fleetfit.core.hardware import moved
from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import Block, HeaderSpec
from fleetfit.method.search_space import sample_blocks
from fleetfit.method.size import safetensors_size_bytes
from fleetfit.models.features import Features, FeatureShape
from fleetfit.models.header import Header, build_header, can_start_as
from fleetfit.models.pruning import ConvOp, prunable_layers
from fleetfit.models.training import Scores, evaluate, fit, predict, score

ProgressCallback = Callable[[int, int, str], None]

LABEL_SMOOTHING = 0.1
OFFSET_BYTES = 16
SAMPLING_TRIES = 200
WARM_RATE_SHARE = 1 / 3  # a header that starts as a trained one moves less


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
        home = self.cached.output.device  # not where the labels are, if there was no room
        return self.cached.rows(moved(rows, home)).to(self.labels.device)

    def parameters(self) -> list[nn.Parameter]:
        """None: the backbone is frozen."""
        return []


@dataclass(frozen=True)
class Finalist:
    """A trained header with its scores on the validation source, and how it does on each sample there."""

    name: str
    header: Header
    scores: Scores
    losses: Float[Tensor, " sample"]
    right: Bool[Tensor, " sample"]


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
    start: Header | None = None
    steps_used: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def torch_device(self) -> torch.device:
        """Where headers are trained: where the labels are."""
        return self.train.labels.device

    def fits(self, spec: HeaderSpec) -> bool:
        """Whether a header is within ``max_bytes``."""
        return header_bytes(spec, self.shape, self.num_classes) <= self.max_bytes

    def build(self, spec: HeaderSpec, *names: str | int) -> Header:
        """A header with fresh weights, or one that starts as ``start`` where it can."""
        with seeded_init(self.seed, "header_search", self.method, "init", *names):
            header = build_header(spec, self.shape, self.num_classes)
        header.to(self.torch_device)
        if self.starts(spec):
            assert self.start is not None
            header.start_as(self.start)
        return header

    def starts(self, spec: HeaderSpec) -> bool:
        """Whether a header of this kind starts as the given one."""
        return self.start is not None and can_start_as(spec, self.start.spec)

    def fit(
        self,
        loss_of: Callable[[Tensor], Tensor],
        parameters: list[nn.Parameter],
        steps: int,
        *names: str | int,
        cost: int = 1,
        rate_share: float = 1.0,
        backbone: Sequence[nn.Parameter] = (),
    ) -> None:
        """Train something at a share of the job's rate; each step takes ``cost`` of the budget.

        The backbone's parameters, where they are trained too, have a rate of their own.
        """
        note = " ".join(map(str, names))
        start = self.steps_used

        def each_step() -> None:
            self.steps_used += cost

        def after_step(step: int, steps: int, loss: float) -> None:
            budget = self.config.budget_steps
            self.on_progress(min(start + step * cost, budget - 1), budget, note)

        fit(
            loss_of,
            parameters,
            len(self.train.labels),
            steps=steps,
            batch_size=self.config.batch_size,
            learning_rate=self.config.learning_rate * rate_share,
            weight_decay=self.config.weight_decay,
            generator=named_generator(self.seed, "header_search", self.method, "batches", *names),
            each_step=each_step,
            after_step=after_step,
            slower=backbone,
            slower_rate=self.config.backbone_learning_rate,
            name=f"header search ({self.method}): {note}",
        )

    def train_alone(self, header: Header, steps: int, *names: str | int) -> None:
        """Train one header; the backbone stays as it is."""

        def loss_of(rows: Tensor) -> Tensor:
            logits = header(self.train.features(rows).detached())
            return cross_entropy(logits, self.train.labels[rows], label_smoothing=LABEL_SMOOTHING)

        header.train()
        rate_share = WARM_RATE_SHARE if self.starts(header.spec) else 1.0
        self.fit(loss_of, list(header.parameters()), steps, *names, rate_share=rate_share)
        header.eval()

    def scores(self, header: Callable[[Features], Tensor]) -> Scores:
        """Scores on the validation source."""
        return evaluate(lambda rows: header(self.validation.features(rows)), self.validation.labels)

    def finalist(self, name: str, header: Header) -> Finalist:
        """Score a trained header and note it."""
        labels = self.validation.labels
        logits = predict(lambda rows: header(self.validation.features(rows)), len(labels), torch_device=labels.device)
        scores = score(logits, labels)
        point = {"step": self.steps_used, "name": name, "loss": scores.loss, "accuracy": scores.accuracy}
        self.history.append(point)
        losses = cross_entropy(logits, labels, reduction="none").cpu()
        return Finalist(name, header, scores, losses, (logits.argmax(-1) == labels).cpu())


def header_bytes(spec: HeaderSpec, shape: FeatureShape, num_classes: int) -> int:
    """The most that a header adds to a model's safetensors file, also after pruning; nothing is allocated.

    A pruned convolution also stores which channels it kept; ``OFFSET_BYTES`` a tensor covers the longer offsets that
    tensors have in a file behind a backbone.
    """
    with torch.device("meta"):
        header = build_header(spec, shape, num_classes)
    stored = {f"header.{name}": (tuple(t.shape), t.dtype) for name, t in header.state_dict().items()}
    for name, layer in prunable_layers(header).items():
        if isinstance(layer, ConvOp):
            stored[f"header.{name}.kept"] = ((layer.num_neurons,), torch.int64)
    return safetensors_size_bytes(stored) + OFFSET_BYTES * len(stored)


def spec_name(spec: HeaderSpec) -> str:
    """A short name for tables: kind, number of blocks and channels, pooling, hidden units."""
    if spec.kind != "blocks":
        return spec.kind
    number = len(spec.blocks)
    body = f"{number} block{'' if number == 1 else 's'} of {spec.channels}" if number else f"pooled {spec.channels}"
    return f"{body}, pooling {spec.pooling}" + (f", hidden {spec.hidden}" if spec.hidden else "")


def nothing_fits(search: Search) -> ValueError:
    """The error of a search whose space holds no header that is small enough."""
    return ValueError(f"no header of search {search.method!r} fits: max_bytes must be larger, got {search.max_bytes}")


def cell_spec(search: Search) -> HeaderSpec:
    """The one space of random search and ENAS: B blocks, all else fixed; this is one header of it.

    Where none of many samples fits, it is that with pooling to one cell, and then without an inner MLP.

    Raises:
        ValueError: none of those fits either.
    """
    config = search.config
    generator = named_generator(search.seed, "header_search", search.method, "space")
    for pooling, hidden in ((config.pooling, config.hidden), (1, config.hidden), (1, 0)):
        for _ in range(SAMPLING_TRIES):
            spec = HeaderSpec(
                kind="blocks",
                blocks=sample_blocks(config.max_blocks, config.operations, generator),
                repeats=config.repeats,
                channels=config.channels,
                pooling=pooling,
                hidden=hidden,
            )
            if search.fits(spec):
                return spec
    raise nothing_fits(search)


def draw_fitting(search: Search, spec: HeaderSpec, draw: Callable[[], tuple[Block, ...]]) -> HeaderSpec:
    """Draw blocks until they fit; ``spec`` itself, which fits, when none does."""
    for _ in range(SAMPLING_TRIES):
        drawn = spec.model_copy(update={"blocks": draw()})
        if search.fits(drawn):
            return drawn
    return spec
