"""A device's class priors: from its labelled samples, and, where it has them, from its inputs without labels."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fleetfit.core.hardware import moved
from fleetfit.core.records import HeaderKept, Way
from fleetfit.data.partition import Split
from fleetfit.device.memory import DeviceMemory, split_of
from fleetfit.device.scoring import class_counts, logits_of
from fleetfit.method.class_prior import (
    ShiftPrior,
    class_prior,
    floored,
    harmless_shifts,
    label_shift,
    support_prior,
)
from fleetfit.models.header import Header

TRAINING_PRIOR_STRENGTH = 3.0
FEWEST_TO_TRUST = 20  # validation samples; with fewer, training samples say too whether new shares can be trusted
SHIFT_STEPS = 20  # of estimating class shares on inputs: more change nothing that shows
BETWEEN = {"quarter": 0.25, "half": 0.5}  # how far from the coarse to the refined header


def header_of_way(memory: DeviceMemory, way: Way) -> Header:
    """The header of a way to ship, without its temperature and prior."""
    if way.header in BETWEEN:
        refined, share = memory.refined, BETWEEN[way.header]
        return memory.header_of(
            {n: t.lerp(refined[n], share) if t.is_floating_point() else t for n, t in memory.coarse.items()}
        )
    weights = {"coarse": memory.coarse, "refined": memory.refined, "own": memory.own, "local": memory.local}
    return memory.header_of(weights[way.header])


def prior_of(memory: DeviceMemory, counts: Float[Tensor, "... class"], way: Way) -> Float[Tensor, "... class"]:
    """log p - log q of a way that has a prior, for one or many rows of counts."""
    assert way.prior_strength is not None, "only ways with a prior have one"
    if way.prior_classes is None:
        return class_prior(counts, _shares(memory, counts), way.prior_strength)
    return support_prior(counts, _shares(memory, counts), way.prior_strength, way.prior_classes)


def all_counts(memory: DeviceMemory, data: Split) -> Float[Tensor, " class"]:
    """Of the device's labelled samples that are not for testing."""
    return class_counts(data.train, len(memory.labels)) + class_counts(data.validation, len(memory.labels))


def training_prior(memory: DeviceMemory, data: Split) -> Float[Tensor, " class"] | None:
    """What is added to logits in training and while rounds are scored, before anything was chosen."""
    if not memory.refine.class_prior:
        return None
    counts = class_counts(data.train, len(memory.labels))
    return class_prior(counts, _shares(memory, counts), TRAINING_PRIOR_STRENGTH)


def left_out_priors(memory: DeviceMemory, data: Split, way: Way) -> Float[Tensor, "class class"]:
    """Row c: the prior from all samples of the device but one of class c."""
    counts = all_counts(memory, data)
    left_out = (counts - torch.eye(len(counts), device=counts.device)).clamp(min=0)
    return prior_of(memory, left_out, way)


def moved_by_inputs(memory: DeviceMemory, data: Split, priors: Mapping[Way, Tensor]) -> dict[Way, Tensor]:
    """By how much the device's inputs without labels move the priors of ways that look at them, if there are any.

    Rows of priors are re-estimated each for itself; a prior is worth the labelled samples that it was made of. A header
    whose logits are not finite, by what others' weights do to it here, moves nothing.
    """
    worth = float(max(1, len(data.train) + len(data.validation)))
    logits_of_header: dict[HeaderKept, Tensor] = {}
    moved_by: dict[Way, Tensor] = {}
    for way, before in priors.items() if memory.has_features("unlabelled") else ():
        if way.shift_concentration is None:
            continue
        if way.header not in logits_of_header:
            with torch.no_grad():
                logits_of_header[way.header] = header_of_way(memory, way)(memory.features("unlabelled"))
        logits = logits_of_header[way.header] / way.temperature
        if bool(logits.isfinite().all()):
            shares = _shares(memory, logits)
            moved_by[way] = label_shift(logits, before, shares, worth, way.shift_concentration, SHIFT_STEPS) - before
    return moved_by


def expected_shares(memory: DeviceMemory, data: Split, way: Way, prior: Float[Tensor, " class"]) -> tuple[float, ...]:
    """The class shares that a header with this prior (log p - log q) takes for granted.

    A header that was trained here without the prior in its logits has learned the device's own shares.
    """
    log_shares = floored(_shares(memory, prior)).log()
    if way.header == "local" or (way.header != "coarse" and not memory.refine.balanced_training):
        log_shares = log_shares + class_prior(
            class_counts(data.train, len(prior)), log_shares.exp(), TRAINING_PRIOR_STRENGTH
        )
    return tuple((log_shares + prior).softmax(-1).tolist())


def trusted_shifts(
    memory: DeviceMemory, header: Header, data: Split, expected: tuple[float, ...]
) -> tuple[ShiftPrior, ...]:
    """With which class shares may be estimated anew later, as the device's own labelled samples tell."""
    splits = ("validation",) if len(data.validation) >= FEWEST_TO_TRUST else ("train", "validation")
    logits, labels = [], []
    for name in splits:
        if len(samples := split_of(data, name)):
            logits.append(logits_of(memory, header, data, name).double())
            labels.append(samples.labels)
    shares = moved(torch.tensor(expected, dtype=torch.float64), data.train.labels.device)
    return harmless_shifts(torch.cat(logits), torch.cat(labels), shares)


def _shares(memory: DeviceMemory, like: Tensor) -> Tensor:
    return moved(torch.tensor(memory.class_shares, dtype=like.dtype), like.device)
