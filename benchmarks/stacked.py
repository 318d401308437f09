"""Plain federated baselines on cached features, all devices of a cluster trained at once.

Independent of the product's training: a stack of headers under ``torch.func``, AdamW by hand, with the same warm-up,
cosine, clipping and decay. What each method is, with its source, is said at its function.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fleetfit.models.features import Features
from fleetfit.models.header import Header
from fleetfit.models.training import rate_share

Stack = dict[str, Tensor]  # name -> [device ...]
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
PULLS = (0.01, 0.1)
ROUNDS = 10


@dataclass
class Part:
    """A split of all devices, padded: output [device sample token channel], mask, labels, which samples are real."""

    output: Tensor
    mask: Tensor | None
    labels: Tensor
    real: Tensor


def padded(features: Sequence[Features], labels: Sequence[Tensor]) -> Part:
    """One part of each device."""
    most = max(1, *(len(y) for y in labels))

    def pad(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(most - len(tensor), *tensor.shape[1:])])

    masks = [f.mask for f in features]
    mask = None if masks[0] is None else torch.stack([pad(m) for m in masks if m is not None])
    if mask is not None:
        mask[..., 0] = True  # a row of padding needs a token
    real = torch.stack([pad(torch.ones(len(y))) for y in labels])
    return Part(torch.stack([pad(f.output) for f in features]), mask, torch.stack([pad(y) for y in labels]), real)


@dataclass
class Cluster:
    """A cluster's devices and the header that all were sent."""

    header: Header
    train: Part
    validation: Part
    test: Part

    @property
    def sent(self) -> Stack:
        """The header for each."""
        number = len(self.train.labels)
        return {n: p.detach().expand(number, *p.shape).clone() for n, p in self.header.named_parameters()}

    def _logits(self, parameters: Mapping[str, Tensor], output: Tensor, mask: Tensor | None) -> Tensor:
        features = Features(output, output) if mask is None else Features(output, output, mask)
        logits: Tensor = functional_call(
            self.header, (dict(parameters), dict(self.header.named_buffers())), (features,)
        )
        return logits

    def logits(self, stack: Stack, part: Part) -> Tensor:
        """[device sample class]"""
        with torch.no_grad():
            rows = [
                self._logits(
                    {n: v[i] for n, v in stack.items()}, part.output[i], None if part.mask is None else part.mask[i]
                )
                for i in range(len(part.labels))
            ]
        return torch.stack(rows)

    def loss(self, stack: Stack) -> float:
        """Pooled over all validation samples."""
        losses = cross_entropy(
            self.logits(stack, self.validation).flatten(0, 1), self.validation.labels.flatten(), reduction="none"
        )
        real = self.validation.real.flatten()
        return float((losses * real).sum() / real.sum())

    def accuracy(self, stack: Stack) -> list[float]:
        """Of each device's test samples."""
        hits = (self.logits(stack, self.test).argmax(-1) == self.test.labels).float() * self.test.real
        return [float(v) for v in hits.sum(1) / self.test.real.sum(1)]

    def trained(
        self, start: Stack, epochs: int, rate: float, seed: int, pull: float = 0.0, to: Stack | None = None
    ) -> Stack:
        """Each device's header after local training; ``pull`` times the squared distance to ``to`` is added."""
        part, stack = self.train, {n: v.clone() for n, v in start.items()}
        anchor = to or start
        number, size = part.labels.shape
        batches = max(1, size // 16 + (size % 16 > 1))
        steps, generator = epochs * batches, torch.Generator().manual_seed(seed)

        def loss(p: Any, output: Tensor, mask: Any, labels: Tensor, real: Tensor, a: Any) -> Tensor:
            each = cross_entropy(self._logits(p, output, mask), labels, reduction="none")
            value = (each * real).sum() / real.sum().clamp(min=1)
            return value + pull * sum(((p[n] - a[n]) ** 2).sum() for n in p) if pull else value

        gradient = vmap(grad(loss), in_dims=(0, 0, None if part.mask is None else 0, 0, 0, 0))
        first, second = ({n: torch.zeros_like(v) for n, v in stack.items()} for _ in range(2))
        rows = torch.arange(number)[:, None]
        step = 0
        for _ in range(epochs):
            order = (torch.rand(number, size, generator=generator) + 10 * (1 - part.real)).argsort(1)
            for b in range(batches):
                picked = order[:, b * 16 : (b + 1) * 16 if b < batches - 1 else size]
                real = part.real.gather(1, picked)
                mask = None if part.mask is None else part.mask[rows, picked]
                found = gradient(stack, part.output[rows, picked], mask, part.labels.gather(1, picked), real, anchor)
                norm = torch.sqrt(sum((v.reshape(number, -1) ** 2).sum(1) for v in found.values()))  # type: ignore[arg-type]
                scale = (1 / norm.clamp(min=1e-12)).clamp(max=1.0)
                now, step = rate * rate_share(step, steps, 0.1), step + 1
                for n, value in stack.items():
                    each = (-1,) + (1,) * (value.ndim - 1)
                    g = found[n] * scale.view(each)
                    first[n] = 0.9 * first[n] + 0.1 * g
                    second[n] = 0.999 * second[n] + 0.001 * g * g
                    moved = (first[n] / (1 - 0.9**step)) / ((second[n] / (1 - 0.999**step)).sqrt() + 1e-8)
                    decay = 1 - now * 0.01 if value.ndim > 2 else 1.0
                    stack[n] = value * decay - now * moved * (real.sum(1) > 0).float().view(each)
        return stack

    def averaged(self, stack: Stack, groups: Sequence[int]) -> Stack:
        """Each device's the mean of its group, by numbers of samples (McMahan et al. 2017)."""
        g = torch.tensor(groups)
        weights = (g[:, None] == g[None, :]).float() * self.train.real.sum(1)[None, :]
        weights = weights / weights.sum(1, keepdim=True)
        return {n: torch.einsum("dp,p...->d...", weights, v) for n, v in stack.items()}

    def federated(self, rate: float, groups: Sequence[int], seed: int) -> Stack:
        """FedAvg of the header, 10 rounds of 2 epochs; within given groups it is what knows them can have."""
        stack = self.sent
        for number in range(ROUNDS):
            stack = self.averaged(self.trained(stack, 2, rate, seed * 100 + number), groups)
        return stack


def baselines(cluster: Cluster, groups: Sequence[int], seed: int) -> dict[str, list[float]]:
    """Accuracy of each device by method, each at the rate (and pull) with the lowest pooled validation loss."""
    everybody = [0] * len(cluster.train.labels)

    def best(found: Sequence[Stack]) -> Stack:
        return min(found, key=cluster.loss)

    result = {"as sent": cluster.accuracy(cluster.sent)}
    alone = [cluster.trained(cluster.sent, 20, rate, seed) for rate in RATES]
    result["local"] = cluster.accuracy(best(alone))
    federated = [cluster.federated(rate, everybody, seed) for rate in RATES]
    result["FedAvg"] = cluster.accuracy(best(federated))
    tuned = [cluster.trained(one, 10, rate, seed + 1) for one, rate in zip(federated, RATES, strict=True)]
    result["FedAvg + fine-tuning"] = cluster.accuracy(best(tuned))
    shared = best(federated)  # Ditto (Li et al. 2021): each device's own model, pulled to the federated one
    ditto = [cluster.trained(shared, 10, rate, seed + 2, pull, shared) for pull in PULLS for rate in RATES]
    result["Ditto"] = cluster.accuracy(best(ditto))
    if len(set(groups)) > 1:
        inside = [cluster.federated(rate, groups, seed) for rate in RATES]
        tuned = [cluster.trained(one, 10, rate, seed + 1) for one, rate in zip(inside, RATES, strict=True)]
        result["oracle groups"] = cluster.accuracy(best([*inside, *tuned]))
    return result
