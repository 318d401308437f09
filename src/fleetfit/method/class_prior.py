"""What a device's class counts say of its classes to come: a prior for the last bias of its header (Beyond).

A header gives logits as if classes came with the shares q of what it was trained on. Where a device's shares p differ,
log p - log q is what Bayes' rule adds to them. Only p is estimated, and no weight is trained.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

SHIFT_STRENGTHS = (10.0, 30.0, 60.0, 100.0, 300.0)  # how many inputs the shares expected before may be worth
SHIFT_CONCENTRATIONS = (1.0, 0.7, 0.4, 0.1)
MOST_HARM = 0.01  # nats a sample: less says nothing


def class_prior(
    counts: Float[Tensor, "*device class"], class_shares: Float[Tensor, " class"], strength: float, floor: float = 0.01
) -> Float[Tensor, "*device class"]:
    """What to add to the last bias of a header for a device's own class frequencies, empirical Bayes.

    log((n_c + k q_c) / (n + k)) - log q_c, n = sum of n_c; nats. A device without samples gets 0 everywhere. A class
    that the device has not seen gets log(k / (n + k)), whatever q_c: it is ``strength`` that keeps it reachable.

    Args:
        counts: n_c, the device's training samples of each class.
        class_shares: q_c, shares of the classes in what the header was trained on; any positive scale.
        strength: k, how many samples those shares are worth; as k grows the prior goes to 0.
        floor: Smallest q_c, in units of 1 / number of classes (shares are normalised again after it). It keeps the
            prior finite for a class that nobody has seen.

    Raises:
        ValueError: a count or share that is negative, NaN or infinite, shares that are all 0, strength or floor that
            are infinite or not above 0, or a prior that is not finite because they are too far apart.
    """
    _check(counts, class_shares, strength=strength, floor=floor)
    shares = floored(class_shares, floor)
    posterior = (counts + strength * shares) / (counts.sum(-1, keepdim=True) + strength)
    return _finite(posterior.log() - shares.log(), counts, class_shares, strength, floor)


def support_prior(
    counts: Float[Tensor, "*device class"],
    class_shares: Float[Tensor, " class"],
    strength: float,
    num_present: float,
    floor: float = 0.01,
) -> Float[Tensor, "*device class"]:
    """The same for a device that has only ``num_present`` of the classes, any of them as likely as another.

    With a = k / K: a class that was seen gets the share (n_c + a) / (n + K a), and the K - seen others that the device
    has share out (K - seen) a / (n + K a) among all that were not seen. With K = the number of classes and even q it is
    ``class_prior``.

    Args:
        counts: n_c, the device's samples of each class.
        class_shares: q_c, shares of the classes in what the header was trained on; any positive scale.
        strength: k, how many samples the knowledge is worth that a device's classes are alike.
        num_present: K, how many of the classes a device has; at least those that were seen.
        floor: Smallest share of the cluster's, and of the device's classes, in units of 1 / number of classes: a class
            that should not come still can.

    Raises:
        ValueError: as ``class_prior``, or a number of classes that is infinite or not above 0.
    """
    _check(counts, class_shares, strength=strength, floor=floor, num_present=num_present)
    num_classes = counts.shape[-1]
    seen = counts > 0
    num_seen = seen.sum(-1, keepdim=True).to(counts.dtype)
    present = num_seen.clamp(min=num_present).clamp(max=num_classes)
    each = strength / num_present  # a
    total = counts.sum(-1, keepdim=True) + present * each
    unseen = (present - num_seen) * each / total / (num_classes - num_seen).clamp(min=1)
    posterior = torch.where(seen, (counts + each) / total, unseen).clamp(min=floor / num_classes)
    posterior = posterior / posterior.sum(-1, keepdim=True)
    prior = posterior.log() - floored(class_shares, floor).log()
    return _finite(prior, counts, class_shares, strength, floor)


def label_shift(
    logits: Float[Tensor, "sample class"],
    prior: Float[Tensor, "*way class"],
    class_shares: Float[Tensor, " class"],
    strength: float,
    concentration: float | Float[Tensor, "*way"] = 1.0,
    num_steps: int = 30,
    floor: float = 0.01,
) -> Float[Tensor, "*way class"]:
    """A prior re-estimated on inputs without labels, by expectation and maximisation.

    Saerens et al. 2002, with a Dirichlet of parameters k p0_c + a: its mode is p_c ~ max(0, k p0_c + n_c + a - 1), n_c
    the sum of the samples' p(c | x), the softmax of logits + log p - log q. With a = 1 that is a Dirichlet around what
    was known before; the lower a, the fewer classes the device has that hardly any sample speaks for.

    Args:
        logits: Of the samples, without a prior, from a calibrated header.
        prior: log p0 - log q, what was known before; one, or several that are re-estimated beside each other.
        class_shares: q_c.
        strength: k, how many samples it is worth.
        concentration: a, above 0; one, or one a prior.
        num_steps: Of the algorithm; each raises the posterior.
        floor: As above.

    Returns:
        log p - log q; without samples, the prior as it was.

    Raises:
        ValueError: logits or a prior that are not finite, or as ``class_prior``.
    """
    for name, values in (("logits", logits), ("prior", prior)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} must be finite")
    for extreme in (
        (concentration.min(), concentration.max()) if isinstance(concentration, Tensor) else (concentration,)
    ):
        _check(class_shares, class_shares, strength=strength, floor=floor, concentration=float(extreme))
    if not len(logits):
        return prior
    less = (1 - concentration)[..., None] if isinstance(concentration, Tensor) else 1 - concentration
    log_shares = floored(class_shares, floor).log()
    before = (prior + log_shares).softmax(-1)
    now = before
    for _ in range(num_steps):
        of_each = (logits + (now.log() - log_shares)[..., None, :]).softmax(-1)
        counts = strength * before + of_each.sum(-2)
        spread = (counts - less).clamp(min=0)
        now = torch.where(spread.sum(-1, keepdim=True) > 0, spread, counts)
        now = (now / now.sum(-1, keepdim=True)).clamp(min=floor / now.shape[-1])
        now = now / now.sum(-1, keepdim=True)
    return now.log() - log_shares


class ShiftPrior(NamedTuple):
    """How much the shares expected before say of new ones: ``strength`` and ``concentration`` of ``label_shift``."""

    strength: float
    concentration: float = 1.0


SHIFT_PRIORS = tuple(ShiftPrior(k, a) for k in SHIFT_STRENGTHS for a in SHIFT_CONCENTRATIONS)


def new_shares(
    logits: Float[Tensor, "sample class"], class_shares: Float[Tensor, " class"], known: ShiftPrior
) -> Float[Tensor, " class"]:
    """``label_shift`` for a model that expects exactly these shares, all above 0: log of new over old ones.

    Raises:
        ValueError: as ``label_shift``, or a share of 0.
    """
    if not bool((class_shares > 0).all()):
        raise ValueError(f"class_shares must be > 0, got {class_shares.tolist()}")
    smallest = float(class_shares.min() / class_shares.sum()) * len(class_shares)
    return label_shift(logits, torch.zeros_like(class_shares), class_shares, *known, floor=min(0.01, smallest))


def held_out_gain(
    logits: Float[Tensor, "sample class"],
    class_shares: Float[Tensor, " class"],
    known: ShiftPrior,
    num_folds: int = 5,
) -> tuple[float, float]:
    """How much likelier re-estimated class shares make inputs that they were not estimated on.

    The inputs are dealt into folds. Of an input x in fold f the gain is log sum_c p(c | x) p_f(c) / p(c), with p(c | x)
    the softmax of its logits and p_f from ``label_shift`` on the other folds: the log of the ratio of its likelihoods
    under the two label distributions, if classes look as they did in training (Saerens et al. 2002).

    Args:
        logits: Of inputs in any order that is not by class, from a calibrated model that expects ``class_shares``.
        class_shares: What the model expects.
        known: How much these say of the new ones.
        num_folds: At least 2; fewer where there are fewer inputs.

    Returns:
        The mean gain, nats an input, and its standard error; (0, inf) for fewer than two inputs.

    Raises:
        ValueError: as ``label_shift``, or fewer than 2 folds.
    """
    if num_folds < 2:
        raise ValueError(f"num_folds must be at least 2, got {num_folds}")
    number = len(logits)
    if number < 2:
        return 0.0, math.inf
    fold = torch.arange(number, device=logits.device) % num_folds
    gains = torch.empty(number, dtype=logits.dtype, device=logits.device)
    for f in range(min(num_folds, number)):
        moved_by = new_shares(logits[fold != f], class_shares, known)
        held_out = logits[fold == f]
        gains[fold == f] = (held_out + moved_by).logsumexp(-1) - held_out.logsumexp(-1)
    return float(gains.mean()), float(gains.std()) / math.sqrt(number)


def harmless_shifts(
    logits: Float[Tensor, "sample class"],
    labels: Int[Tensor, " sample"],
    class_shares: Float[Tensor, " class"],
    candidates: Sequence[ShiftPrior] = SHIFT_PRIORS,
) -> tuple[ShiftPrior, ...]:
    """With which of these ``new_shares`` does not make known labels less likely, but for ``MOST_HARM``.

    Shares are estimated on the samples' inputs and scored on their labels. A calibrated model finds the shares of these
    very samples, which can only help; one that takes a class for another too often finds its own mistakes.

    Args:
        logits: From a model that expects ``class_shares``.
        labels: Their classes.
        class_shares: What the model expects.
        candidates: To choose from.

    Returns:
        Some of the candidates; none without samples.

    Raises:
        ValueError: as ``new_shares``.
    """
    if not len(labels):
        return ()
    most = cross_entropy(logits, labels) + MOST_HARM
    return tuple(
        known for known in candidates if cross_entropy(logits + new_shares(logits, class_shares, known), labels) <= most
    )


def _check(counts: Tensor, class_shares: Tensor, **positive: float) -> None:
    for name, values in (("counts", counts), ("class_shares", class_shares)):
        if not bool(((values >= 0) & values.isfinite()).all()):
            raise ValueError(f"{name} must be finite and >= 0, got {values.tolist()}")
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {value}")
    if not float(class_shares.sum()) > 0:
        raise ValueError(f"class_shares must not all be 0, got {class_shares.tolist()}")


def floored(class_shares: Float[Tensor, " class"], floor: float = 0.01) -> Float[Tensor, " class"]:
    """Shares that sum to 1, none below ``floor`` over the number of classes before that."""
    shares = (class_shares / class_shares.sum()).clamp(min=floor / len(class_shares))
    return shares / shares.sum()


def _finite(prior: Tensor, counts: Tensor, class_shares: Tensor, strength: float, floor: float) -> Tensor:
    if not bool(prior.isfinite().all()):
        raise ValueError(
            f"counts {counts.tolist()}, class_shares {class_shares.tolist()}, strength {strength} and floor {floor} "
            "are too far apart for a finite prior"
        )
    return prior
