"""Whether a found header may take the place of the one that came with the backbone: held-out folds and a paired test.

Beyond: the paper ships what its search ends with. Here the header that was distilled with the backbone has seen far
more data than an edge has, and a choice among many headers on ten validation samples finds the luckiest. So each shared
sample is held out once: without its fold the whole search is run again, its choices included, and what it finds is
scored on the fold. A found header is shipped only if this is better than the given one by ``clearly_better``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import t as student_t
from torch import Tensor, nn

from fleetfit.core.records import Record
from fleetfit.edge.header_trials import FeatureSource
from fleetfit.models.features import Features, concatenated

FOLDS = 5
LEVEL = 0.025  # how often a header that is no better may pass, one-sided
VALIDATION_OF = 5  # inside a fold's search, every so many samples one chooses


@dataclass(frozen=True)
class Joined:
    """The samples of several sources, one source after the other."""

    sources: tuple[FeatureSource, ...]

    @property
    def labels(self) -> Int[Tensor, " sample"]:
        """Class numbers."""
        return torch.cat([source.labels for source in self.sources])

    def features(self, rows: Int[Tensor, " row"]) -> Features:
        """Of some samples, in their order."""
        parts, places, start = [], [], 0
        for source in self.sources:
            here = ((rows >= start) & (rows < start + len(source.labels))).nonzero().flatten()
            if len(here):
                parts.append(source.features(rows[here] - start))
                places.append(here)
            start += len(source.labels)
        return concatenated(parts).rows(torch.cat(places).argsort())

    def parameters(self) -> list[nn.Parameter]:
        """The backbone's, which all sources share."""
        return self.sources[0].parameters()


@dataclass(frozen=True)
class Subset:
    """Some samples of a source."""

    source: FeatureSource
    rows: Int[Tensor, " sample"]

    @property
    def labels(self) -> Int[Tensor, " sample"]:
        """Class numbers."""
        return self.source.labels[self.rows]

    def features(self, rows: Int[Tensor, " row"]) -> Features:
        """Of some of them."""
        return self.source.features(self.rows[rows])

    def parameters(self) -> list[nn.Parameter]:
        """The source's."""
        return self.source.parameters()


@dataclass(frozen=True)
class Fold:
    """What the search may see without one part of the shared samples, and that part."""

    train: FeatureSource
    validation: FeatureSource
    held_out: FeatureSource


def make_folds(
    train: FeatureSource, validation: FeatureSource | None, views: int, generator: torch.Generator
) -> tuple[Fold, ...]:
    """Up to five folds of all shared samples, each class spread over them; none of fewer than four samples.

    Args:
        train: ``views`` copies of the training samples, one copy of all after the other; the first as they are.
        validation: The other samples, once each; None where there are none.
        views: Copies in ``train``.
        generator: Decides which sample is in which fold.
    """
    num_train = len(train.labels) // views
    num_all = num_train + (0 if validation is None else len(validation.labels))
    if num_all < 4:
        return ()
    joined: FeatureSource = train if validation is None else Joined((train, validation))
    labels = joined.labels
    own = torch.arange(num_all)
    own[num_train:] += (views - 1) * num_train
    shuffled = torch.randperm(num_all, generator=generator)
    spread = shuffled[labels.cpu()[own[shuffled]].argsort(stable=True)]
    number = min(FOLDS, num_all // 2)

    def source(samples: Int[Tensor, " sample"], all_views: bool) -> Subset:
        rows = own[samples]
        if all_views:
            more = samples[samples < num_train]
            rows = torch.cat([rows, *(more + view * num_train for view in range(1, views))])
        return Subset(joined, rows.to(labels.device))

    folds = []
    for i in range(number):
        rest = spread[torch.arange(num_all) % number != i]
        chooses = torch.arange(len(rest)) % VALIDATION_OF == VALIDATION_OF // 2
        if not chooses.any():
            chooses[0] = True
        folds.append(Fold(source(rest[~chooses], True), source(rest[chooses], False), source(spread[i::number], False)))
    return tuple(folds)


class Proof(Record):
    """How a found header compares with the given one on samples that neither was trained or chosen on."""

    samples: int
    gain: float
    error: float | None
    correct: int
    correct_given: int
    holds: bool


NOTHING_HELD_OUT = Proof(samples=0, gain=0.0, error=None, correct=0, correct_given=0, holds=False)


def clearly_better(
    losses: Float[Tensor, " sample"],
    given: Float[Tensor, " sample"],
    right: Bool[Tensor, " sample"],
    right_given: Bool[Tensor, " sample"],
    num_folds: int = 1,
    looks: int = 1,
) -> Proof:
    """Whether losses are lower than the given header's, sample by sample, beyond doubt; and no fewer answers right.

    The mean gain must exceed Student's t (one-sided, ``LEVEL``) times its standard error. Folds share most of their
    training samples, so that their results move together: the variance is taken 1 + J / (J - 1) times as large for J
    folds (Nadeau and Bengio, Machine Learning 52, 2003: 1/J becomes 1/J + test / train). One held-out part alone
    (``num_folds`` 1) has also chosen among ``looks`` headers: the level is divided by that (Bonferroni).
    """
    gains = (given - losses).double()
    number = len(gains)
    error: float | None = None
    bound = math.inf
    if number > 1:
        factor = 1 + num_folds / (num_folds - 1) if num_folds > 1 else 1.0
        error = float(gains.std()) * math.sqrt(factor / number)
        bound = float(student_t.ppf(1 - LEVEL / looks, number - 1)) * error
    gain, correct, correct_given = float(gains.mean()), int(right.sum()), int(right_given.sum())
    holds = gain > bound and correct >= correct_given
    return Proof(samples=number, gain=gain, error=error, correct=correct, correct_given=correct_given, holds=holds)


def backbone_of(source: FeatureSource) -> list[Tensor]:
    """A copy of the backbone's trainable parameters as they are; none of a frozen one."""
    return [p.detach().clone() for p in source.parameters()]


@torch.no_grad()
def set_backbone(source: FeatureSource, values: Sequence[Tensor]) -> None:
    """Put the copy back."""
    for parameter, value in zip(source.parameters(), values, strict=True):
        parameter.copy_(value)
