"""Groups of devices whose data asks the same of a header, found from the changes that they made to it (Beyond).

Devices that mean other things by the same inputs, or the same by others, pull the same header elsewhere; those with
like data pull it the same way. Sattler et al. 2020 (clustered federated learning) is the neighbour: there a cluster is
split in two when its devices' gradients disagree at a stationary point; here one free training tells all at once.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import silhouette_score
from torch import Tensor

ALWAYS_TRIED = 8  # so many groups, in clusters of at least twice as many devices; more where devices are more
MOST_GROUPS = 32  # each number costs time that grows as the square of the devices
MOST_MOVES = 4  # a device: they end by themselves, but for cycles
SAME = 1e-9
CLEAR_SILHOUETTE = 0.15  # where all data is alike, chance gave up to .1 on digits


@dataclass(frozen=True)
class Groups:
    """Devices by group, and the evidence.

    Args:
        of_device: Group number of each device, 0 for the first device's; all 0: one group.
        silhouettes: Number of groups -> mean silhouette of the best grouping into so many, -1..1.
    """

    of_device: tuple[int, ...]
    silhouettes: dict[int, float]

    @property
    def number(self) -> int:
        """How many groups."""
        return len(set(self.of_device))


def cosine_of_changes(changes: Float[Tensor, "device value"]) -> Float[Tensor, "device device"]:
    """Cosine of each pair of devices' changes, less the cluster's mean change.

    What all devices change alike says nothing of groups. A device whose change is the mean, or nothing, is like nobody:
    its cosines are 0.

    Raises:
        ValueError: a change that is not finite.
    """
    if not bool(changes.isfinite().all()):
        raise ValueError("changes must be finite")
    if len(changes) < 2:
        return torch.eye(len(changes), dtype=torch.float64)
    own = changes.double()
    own = own / own.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # squares of small or large numbers
    own = own - own.mean(dim=0)
    norms = own.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 1e-12, own / norms.clamp(min=1e-300), torch.zeros_like(own))
    cosine = (unit @ unit.T).clamp(-1, 1)
    return cosine.fill_diagonal_(1.0)


def groups_of(cosine: Float[Tensor, "device device"], least: float = CLEAR_SILHOUETTE) -> Groups:
    """The grouping of which two numbers, a cosine inside groups and one between them, tell most of all pairs' cosines.

    For each number of groups, average linkage of 1 - cosine makes a grouping: it needs no start by chance, and puts who
    is like nobody in a group of its own. Then devices move to the group that they are more like on the average, one by
    one. Between the groupings decides the likelihood of all pairs' cosines, normal around those two numbers, less the
    logarithm of the number of pairs for each group.

    There may be a third as many groups as devices, 32 at most, in small clusters 8 and half as many as devices; and one
    group where the grouping's mean silhouette is not above ``least``.
    """
    number = len(cosine)
    if number < 4:
        return Groups((0,) * number, {})
    likeness = ((cosine + cosine.T) / 2).numpy()
    distance = np.clip(1 - likeness, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average")
    found: dict[int, tuple[float, tuple[int, ...]]] = {}
    best, most_likely = 1, -math.inf
    for count in range(2, min(max(ALWAYS_TRIED, number // 3), MOST_GROUPS, number // 2) + 1):
        labels = _settled(likeness, fcluster(tree, count, "maxclust").astype(np.int64))
        different = int(labels.max()) + 1
        if different < 2 or different in found:
            continue
        found[different] = float(silhouette_score(distance, labels, metric="precomputed")), tuple(labels.tolist())
        if (likelihood := _likelihood(likeness, labels)) > most_likely:
            best, most_likely = different, likelihood
    silhouettes = {count: score for count, (score, _) in found.items()}
    if silhouettes.get(best, -1.0) <= least:
        return Groups((0,) * number, silhouettes)
    names = list(dict.fromkeys(found[best][1]))
    return Groups(tuple(names.index(label) for label in found[best][1]), silhouettes)


def _levels(likeness: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[float, float, float]:
    """Mean cosine inside groups and between them, and the mean square of what these two leave."""
    pairs = np.triu_indices(len(labels), 1)
    cosine, same = likeness[pairs], (labels[:, None] == labels)[pairs]
    if same.all() or not same.any():
        return float(cosine.mean()), float(cosine.mean()), float(cosine.var())
    inside, between = cosine[same].mean(), cosine[~same].mean()
    return float(inside), float(between), float(np.square(cosine - np.where(same, inside, between)).mean())


def _likelihood(likeness: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    num_pairs = len(labels) * (len(labels) - 1) / 2
    left = max(_levels(likeness, labels)[2], np.finfo(np.float64).tiny)
    return -num_pairs / 2 * math.log(left) - (int(labels.max()) + 1) * math.log(num_pairs)


def _settled(likeness: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The grouping after each device has moved to the group that it is more like; nobody moves to be alone.

    Who is alone stays so unless it is more like a group than halfway between strangers and members.
    """
    labels = np.unique(labels, return_inverse=True)[1]
    inside, between, _ = _levels(likeness, labels)
    if inside <= between:
        return labels
    others = likeness - (inside + between) / 2
    np.fill_diagonal(others, 0)
    members = np.eye(int(labels.max()) + 1)[labels]
    devices, sums = np.arange(len(labels)), others @ members
    for _ in range(MOST_MOVES * len(labels)):
        size = members.sum(axis=0)
        in_group = size - members
        more = np.where(in_group > 0, sums / np.maximum(in_group, 1), 0)
        gain = np.where(size > 0, more, -np.inf) - more[devices, labels][:, None]
        device, group = np.unravel_index(gain.argmax(), gain.shape)
        if gain[device, group] <= SAME:
            break
        sums[:, labels[device]] -= others[:, device]
        sums[:, group] += others[:, device]
        members[device], labels[device] = 0, group
        members[device, group] = 1
    return np.unique(labels, return_inverse=True)[1]


def group_weights(of_device: tuple[int, ...]) -> Float[Tensor, "device peer"]:
    """Weights under which each device gets the plain mean of its group."""
    groups = torch.tensor(of_device)
    same = (groups[:, None] == groups[None, :]).double()
    return same / same.sum(dim=1, keepdim=True)
