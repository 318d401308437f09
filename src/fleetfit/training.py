"""The only fit and evaluate loops. Both take plain functions of row numbers: who trains what is the caller's."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

StepCallback = Callable[[int, int, float], None]


class TrainingDiverged(ValueError):
    """The loss became NaN or infinite; nothing of this phase was kept."""


@dataclass(frozen=True)
class Scores:
    """Mean cross-entropy (nats) and accuracy (share in 0..1) over ``num_samples``."""

    loss: float
    accuracy: float
    num_samples: int


def batches(num_samples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of one shuffled epoch; a last batch of one row joins its neighbour, unless all are of one row."""
    order = torch.randperm(num_samples, generator=generator)
    rows = list(torch.split(order, batch_size))
    if batch_size > 1 and len(rows) > 1 and len(rows[-1]) == 1:
        rows[-2:] = [torch.cat(rows[-2:])]
    yield from rows


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """How many batches ``batches`` yields."""
    full, rest = divmod(num_samples, batch_size)
    return max(1, full + (rest > 1 or (rest == 1 and full == 0)))


def fit(
    loss_of: Callable[[Tensor], Tensor],
    parameters: Iterable[Tensor],
    num_samples: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    weight_decay: float = 0.0,
    warmup_share: float = 0.1,
    gradient_clip: float = 1.0,
    after_step: StepCallback | None = None,
    name: str = "training",
) -> float:
    """Minimise ``loss_of(rows)`` by AdamW, warm-up and cosine decay; return the mean loss of the last tenth of steps.

    ``loss_of`` may also run backward itself (several sub-networks a step) and return a detached loss.

    Args:
        loss_of: Row numbers of a batch, [batch] -> scalar loss.
        parameters: What is trained; weight decay is applied to matrices only.
        num_samples: Rows to draw from, shuffled epoch by epoch.
        steps: Optimiser steps.
        batch_size: Rows a step.
        learning_rate: Peak rate.
        generator: Decides the order of the rows.
        weight_decay: AdamW's.
        warmup_share: Share of the steps with a rising rate.
        gradient_clip: Largest norm of the gradient.
        after_step: Called as (step, steps, loss).
        name: For the error message.

    Raises:
        TrainingDiverged: the loss is not finite.
        ValueError: no samples.
    """
    if num_samples < 1:
        raise ValueError(f"{name}: needs at least 1 sample, got {num_samples}")
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    warmup = max(1, round(steps * warmup_share))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    tail: list[float] = []
    step = 0
    while step < steps:
        for rows in batches(num_samples, batch_size, generator):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(rows)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingDiverged(
                    f"{name}: the loss became {value} at step {step + 1} of {steps}; lower the learning rate"
                )
            torch.nn.utils.clip_grad_norm_(trained, gradient_clip)
            optimizer.step()
            schedule.step()
            step += 1
            if step > steps * 0.9:
                tail.append(value)
            if after_step is not None:
                after_step(step, steps, value)
            if step >= steps:
                break
    return sum(tail) / max(1, len(tail))


@torch.no_grad()
def predict(logits_of: Callable[[Tensor], Tensor], num_samples: int, batch_size: int = 256) -> Tensor:
    """Logits of all rows in order, [sample, class]."""
    return torch.cat([logits_of(rows) for rows in torch.split(torch.arange(num_samples), batch_size)])


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Cross-entropy and accuracy of logits [sample, class] against labels [sample]."""
    if len(labels) == 0:
        return Scores(math.nan, math.nan, 0)
    return Scores(
        float(cross_entropy(logits, labels)), float((logits.argmax(-1) == labels).double().mean()), len(labels)
    )


def evaluate(logits_of: Callable[[Tensor], Tensor], labels: Tensor, batch_size: int = 256) -> Scores:
    """Scores of a model over all rows."""
    return score(predict(logits_of, len(labels), batch_size), labels)
