"""Groups of devices whose data asks the same of a header, found from the changes that they made to it (Beyond).

Devices that mean other things by the same inputs, or the same by others, pull the same header elsewhere; those with
like data pull it the same way. Sattler et al. 2020 (clustered federated learning) is the neighbour: there a cluster is
split in two when its devices' gradients disagree at a stationary point; here one free training tells all at once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import silhouette_score
from torch import Tensor

ALWAYS_TRIED = 8  # so many groups, in clusters of at least twice as many devices; more where devices are more
MOST_GROUPS = 32  # each number costs time that grows as the square of the devices
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
    """Groups by average linkage of 1 - cosine; their number is the one with the highest silhouette, or one.

    Average linkage needs no start by chance, and puts who is like nobody in a group of its own. There may be a third as
    many groups as devices, 32 at most, in small clusters 8 and half as many as devices; and one group where no grouping
    has a mean silhouette above ``least``.
    """
    number = len(cosine)
    if number < 4:
        return Groups((0,) * number, {})
    distance = (1 - cosine).numpy()
    distance = np.clip((distance + distance.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average")
    found: dict[int, tuple[float, tuple[int, ...]]] = {}
    most = min(max(ALWAYS_TRIED, number // 3), MOST_GROUPS, number // 2)
    for count in range(2, most + 1):
        labels = fcluster(tree, count, "maxclust")
        if (different := len(set(labels.tolist()))) > 1 and different not in found:
            score = float(silhouette_score(distance, labels, metric="precomputed"))
            found[different] = score, tuple(labels.tolist())
    silhouettes = {count: score for count, (score, _) in found.items()}
    best = max(silhouettes, key=lambda count: (silhouettes[count], -count), default=1)
    if silhouettes.get(best, -1.0) <= least:
        return Groups((0,) * number, silhouettes)
    names = list(dict.fromkeys(found[best][1]))
    return Groups(tuple(names.index(label) for label in found[best][1]), silhouettes)


def group_weights(of_device: tuple[int, ...]) -> Float[Tensor, "device peer"]:
    """Weights under which each device gets the plain mean of its group."""
    groups = torch.tensor(of_device)
    same = (groups[:, None] == groups[None, :]).double()
    return same / same.sum(dim=1, keepdim=True)
