"""How a header does on a device's own samples, from features that are there already."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fleetfit.core.bounds import MAX_LOSS
from fleetfit.core.records import NO_SCORES, ValidationScores
from fleetfit.data.partition import Split
from fleetfit.data.samples import Samples
from fleetfit.device.memory import DeviceMemory, split_of
from fleetfit.models.header import Header
from fleetfit.models.training import predict, score


def class_counts(samples: Samples, num_classes: int) -> Float[Tensor, " class"]:
    """How many samples of each class there are."""
    return torch.bincount(samples.labels, minlength=num_classes).float()


def logits_of(memory: DeviceMemory, header: Header, data: Split, split: str) -> Float[Tensor, "sample class"]:
    """What a header makes of a split."""
    features, samples = memory.features(split), split_of(data, split)
    return predict(lambda rows: header(features.rows(rows)), len(samples), torch_device=samples.labels.device)


def scores_of(
    memory: DeviceMemory, header: Header, data: Split, split: str, prior: Float[Tensor, " class"] | None = None
) -> ValidationScores:
    """A header's summed loss (nats) and right answers on a split, with a class prior in its logits if one is given."""
    samples = split_of(data, split)
    if len(samples) == 0:
        return NO_SCORES
    logits = logits_of(memory, header, data, split)
    result = score(logits if prior is None else logits + prior, samples.labels)
    # What others' weights do to a header here is no reason to be refused.
    loss = min(result.loss, MAX_LOSS) if not math.isnan(result.loss) else MAX_LOSS
    return ValidationScores(
        num_samples=len(samples), loss_sum=loss * len(samples), num_correct=round(result.accuracy * len(samples))
    )


def accuracy_of(memory: DeviceMemory, header: Header, data: Split) -> float | None:
    """A header's share of right answers on the device's test split; None without one."""
    result = scores_of(memory, header, data, "test")
    return result.num_correct / result.num_samples if result.num_samples else None
