"""The only fit and evaluate loops. Both take plain functions of row numbers: who trains what is the caller's."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fleetfit.core.checkpoints import Bookmark, TrainingState
from fleetfit.core.encoding import put, take
from fleetfit.core.hardware import CPU, moved
from fleetfit.core.randomness import seeded_init

StepCallback = Callable[[int, int, float], None]

POOL_BATCHES = 16
LOOK_EVERY = 20  # steps; each look at a loss makes the program wait for the accelerator


class TrainingDiverged(ValueError):
    """The loss became NaN or infinite; nothing of this phase was kept."""


@dataclass(frozen=True)
class Fitted:
    """The loss of every step of a training."""

    losses: tuple[float, ...]

    @property
    def last(self) -> float:
        """The mean of the last tenth of the steps."""
        tail = self.losses[math.floor(len(self.losses) * 0.9) :]
        return sum(tail) / max(1, len(tail))


@dataclass(frozen=True)
class Scores:
    """Mean cross-entropy (nats) and accuracy (share in 0..1) over ``num_samples``."""

    loss: float
    accuracy: float
    num_samples: int


def batches(
    num_samples: int,
    batch_size: int,
    generator: torch.Generator,
    torch_device: torch.device = CPU,
    lengths: Int[Tensor, " sample"] | None = None,
) -> Iterator[Tensor]:
    """Row numbers of one shuffled epoch; a last batch of one row joins its neighbour, unless all are of one row.

    They are drawn on the CPU, and moved once for the whole epoch. With ``lengths``, rows of like length come together:
    sorted inside pools of some batches, whose order is by chance again. A batch of texts is as slow as its longest.
    """
    order = torch.randperm(num_samples, generator=generator)
    if lengths is not None:
        pools = torch.split(order, POOL_BATCHES * batch_size)
        order = torch.cat([pool[lengths[pool].argsort(stable=True)] for pool in pools])
    rows = list(torch.split(moved(order, torch_device), batch_size))
    if batch_size > 1 and len(rows) > 1 and len(rows[-1]) == 1:
        rows[-2:] = [torch.cat(rows[-2:])]
    if lengths is not None:
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    yield from rows


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """How many batches ``batches`` yields."""
    full, rest = divmod(num_samples, batch_size)
    return max(1, full + (rest > 1 or (rest == 1 and full == 0)))


def rate_share(step: int, steps: int, warmup_share: float) -> float:
    """The learning rate of a step, counted from 0, as a share of the peak: a linear warm-up, then a cosine to 0."""
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class ParameterAverage:
    """The exponential moving average of parameters: what is worth keeping of a training whose steps are noisy.

    Args:
        parameters: Those that are trained.
        decay: Share of the average that a step leaves as it is. It rises to this number, as (1 + n) / (10 + n) after n
            steps, so that the first weights are soon forgotten.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.parameters = [p.detach() for p in parameters if p.requires_grad]
        self.values = [p.clone() for p in self.parameters]
        self.decay = decay
        self.num_steps = 0

    def update(self) -> None:
        """Count the parameters as they are now."""
        self.num_steps += 1
        decay = min(self.decay, (1 + self.num_steps) / (10 + self.num_steps))
        get_ema_multi_avg_fn(decay)(self.values, self.parameters, None)  # type: ignore[no-untyped-call]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the parameters' place for the time being."""
        own = [p.clone() for p in self.parameters]
        self.keep()
        try:
            yield
        finally:
            _copy(own, self.parameters)

    def keep(self) -> None:
        """The average in the parameters' place for good."""
        _copy(self.values, self.parameters)


def fit(
    loss_of: Callable[[Tensor], Tensor],
    parameters: Iterable[Tensor],
    num_samples: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    lengths: Int[Tensor, " sample"] | None = None,
    weight_decay: float = 0.0,
    warmup_share: float = 0.1,
    gradient_clip: float = 1.0,
    average: ParameterAverage | None = None,
    each_step: Callable[[], None] | None = None,
    after_step: StepCallback | None = None,
    after_epoch: Callable[[int], None] | None = None,
    bookmark: Bookmark | None = None,
    also_drawn_from: Sequence[torch.Generator] = (),
    slower: Iterable[Tensor] = (),
    slower_rate: float = 0.0,
    name: str = "training",
) -> Fitted:
    """Minimise ``loss_of(rows)`` by AdamW, with warm-up and cosine decay.

    ``loss_of`` may also run backward itself (several sub-networks a step) and return a detached loss. It gets rows on
    the hardware that the parameters are on. What it draws from PyTorch's global generator (dropout) is seeded for every
    epoch.

    Args:
        loss_of: Row numbers of a batch, [batch] -> scalar loss.
        parameters: What is trained; weight decay is applied to matrices only.
        num_samples: Rows to draw from, shuffled epoch by epoch.
        steps: Optimiser steps.
        batch_size: Rows a step.
        learning_rate: Peak rate.
        generator: Decides the order of the rows.
        lengths: Rows of like length share a batch; see ``batches``.
        weight_decay: AdamW's.
        warmup_share: Share of the steps with a rising rate.
        gradient_clip: Largest norm of the gradient.
        average: Told of every step; its owner decides what becomes of it.
        each_step: Called right after every step of the optimiser.
        after_step: Called as (step, steps, loss) for every step; away from the CPU, for some steps at a time.
        after_epoch: Called with the number of steps done.
        bookmark: Where the training is kept at the end of an epoch, and gone on with.
        also_drawn_from: Generators that ``loss_of`` draws from; the bookmark keeps their states too.
        slower: Trained with them, at a peak rate of their own: ``slower_rate``.
        slower_rate: Of ``slower``.
        name: For the error message.

    Raises:
        TrainingDiverged: the loss is not finite.
        ValueError: no samples, or a bookmark of another training.
    """
    if num_samples < 1:
        raise ValueError(f"{name}: needs at least 1 sample, got {num_samples}")
    rated = [(p, learning_rate) for p in parameters] + [(p, slower_rate) for p in slower]
    trained = [p for p, _ in rated if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p, r in rated if r == rate and (p.ndim > 1) == matrices and p.requires_grad]}
        | {"weight_decay": weight_decay if matrices else 0.0, "peak": rate}
        for rate in dict.fromkeys([learning_rate, *(r for _, r in rated)])
        for matrices in (True, False)
    ]
    torch_device = trained[0].device if trained else CPU
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True if torch_device.type == "cuda" else None)
    losses = _Losses(name, steps, _look_every(torch_device), after_step)
    whole = _Training(
        [p for group in groups for p in group["params"]], optimizer, average, (generator, *also_drawn_from), losses
    )
    step = 0
    if bookmark is not None and (kept := bookmark.load()) is not None:
        try:
            step = whole.restore(kept, steps)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ValueError(f"{name}: {bookmark.where} is of another training ({error}); delete it") from error
    while step < steps:
        with seeded_init(generator.initial_seed(), "epoch from step", step):
            for rows in batches(num_samples, batch_size, generator, torch_device, lengths):
                optimizer.zero_grad(set_to_none=True)
                loss = loss_of(rows)
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                losses.add(loss.detach())
                torch.nn.utils.clip_grad_norm_(trained, gradient_clip)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate_share(step, steps, warmup_share)
                optimizer.step()
                step += 1
                if average is not None:
                    average.update()
                if each_step is not None:
                    each_step()
                losses.tell()
                if step >= steps:
                    break
        if after_epoch is not None:
            after_epoch(step)
        if bookmark is not None and step < steps and bookmark.due():
            bookmark.save(whole.state())
    return Fitted(tuple(losses.values))


def _look_every(torch_device: torch.device) -> int:
    return 1 if torch_device.type == "cpu" else LOOK_EVERY


class _Losses:
    """The loss of every step. They stay on the accelerator until some are looked at together."""

    def __init__(self, name: str, steps: int, look_every: int, after_step: StepCallback | None) -> None:
        self.name = name
        self.steps = steps
        self.look_every = look_every
        self.after_step = after_step
        self.values: list[float] = []
        self.num_told = 0
        self.unseen: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """A step's loss, before its gradient is used."""
        self.unseen.append(loss)
        if len(self.unseen) >= self.look_every or len(self.values) + len(self.unseen) >= self.steps:
            self.look()

    def look(self) -> None:
        """Fetch what is unseen.

        Raises:
            TrainingDiverged: one of them is not finite.
        """
        if not self.unseen:
            return
        for value in torch.stack(self.unseen).cpu().tolist():
            self.values.append(value)
            if not math.isfinite(value):
                step = len(self.values)
                why = "lower the learning rate"
                if step == 1:
                    why = "its inputs or the weights that it began with are at fault; if these were trained, lower the "
                    why += "learning rate of that"
                raise TrainingDiverged(f"{self.name}: the loss became {value} at step {step} of {self.steps}; {why}")
        self.unseen = []

    def tell(self) -> None:
        """Tell of the steps that were looked at."""
        for number in range(self.num_told + 1, len(self.values) + 1):
            if self.after_step is not None:
                self.after_step(number, self.steps, self.values[number - 1])
        self.num_told = len(self.values)


@dataclass
class _Training:
    """All that decides how a training goes on."""

    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    average: ParameterAverage | None
    generators: tuple[torch.Generator, ...]
    losses: _Losses

    def state(self) -> TrainingState:
        """A copy of it at the end of an epoch."""
        self.losses.look()
        self.losses.tell()
        tensors = put("parameter", _numbered(self.parameters))
        for number, entry in self.optimizer.state_dict()["state"].items():
            tensors |= put(f"optimizer.{number}", entry)
        if self.average is not None:
            tensors |= put("average", _numbered(self.average.values))
        tensors |= put("generator", _numbered([g.get_state() for g in self.generators]))
        tensors["losses"] = torch.tensor(self.losses.values, dtype=torch.float64)
        return TrainingState(step=len(self.losses.values), tensors=tensors)

    def restore(self, state: TrainingState, steps: int) -> int:
        """Go on from a state; returns the number of steps done.

        Raises:
            ValueError, KeyError, RuntimeError: it is of another training.
        """
        tensors = state.tensors
        values: list[float] = tensors["losses"].tolist()
        if not len(values) == state.step <= steps:
            raise ValueError(f"it is at step {state.step} with {len(values)} losses; there are {steps} steps")
        _copy_numbered(take(tensors, "parameter"), self.parameters)
        number = len(self.parameters)
        entries = {i: entry for i in range(number) if (entry := take(tensors, f"optimizer.{i}"))}
        for i, entry in entries.items():
            if not {tuple(t.shape) for t in entry.values()} <= {(), tuple(self.parameters[i].shape)}:
                raise ValueError(f"the moments of parameter {i} have another shape")
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})
        if self.average is not None:
            _copy_numbered(take(tensors, "average"), self.average.values)
            self.average.num_steps = state.step
        for i, generator in enumerate(self.generators):
            generator.set_state(tensors[f"generator.{i}"])
        self.losses.values = values
        self.losses.num_told = len(values)
        return state.step


def _numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(i): t for i, t in enumerate(tensors)}


def _copy_numbered(source: dict[str, Tensor], target: Sequence[Tensor]) -> None:
    own = [tuple(t.shape) for t in target]
    there = [tuple(source[str(i)].shape) for i in range(len(source))]
    if own != there:
        raise ValueError(f"it has {len(there)} tensors of other shapes, {len(own)} are trained")
    _copy([source[str(i)] for i in range(len(source))], target)


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for values, into in zip(source, target, strict=True):
        into.copy_(values)


@torch.no_grad()
def predict(
    logits_of: Callable[[Tensor], Tensor],
    num_samples: int,
    batch_size: int = 256,
    torch_device: torch.device = CPU,
    lengths: Int[Tensor, " sample"] | None = None,
) -> Tensor:
    """Logits of all rows in order, [sample, class]; ``logits_of`` gets rows on ``torch_device``.

    With ``lengths``, rows of like length are computed together.
    """
    order = torch.arange(num_samples) if lengths is None else lengths.argsort(stable=True)
    logits = torch.cat([logits_of(rows) for rows in torch.split(moved(order, torch_device), batch_size)])
    return logits if lengths is None else logits[moved(order.argsort(), logits.device)]


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Cross-entropy and accuracy of logits [sample, class] against labels [sample]; computed on the CPU."""
    if len(labels) == 0:
        return Scores(math.nan, math.nan, 0)
    logits, labels = logits.cpu(), labels.cpu()
    return Scores(
        float(cross_entropy(logits, labels)), float((logits.argmax(-1) == labels).double().mean()), len(labels)
    )


def evaluate(
    logits_of: Callable[[Tensor], Tensor],
    labels: Tensor,
    batch_size: int = 256,
    lengths: Int[Tensor, " sample"] | None = None,
) -> Scores:
    """Scores of a model over all rows; rows are where the labels are."""
    return score(predict(logits_of, len(labels), batch_size, labels.device, lengths), labels)
