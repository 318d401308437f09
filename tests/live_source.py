"""A source of features whose backbone trains, for tests of header searches."""

import torch

from fleetfit.edge.header_trials import CachedFeatures
from fleetfit.models.features import Features


class LiveSource:
    """Features through a backbone of one trainable scale."""

    def __init__(self, source: CachedFeatures, scale: torch.nn.Parameter) -> None:
        self.source, self.scale, self.labels = source, scale, source.labels

    def features(self, rows: torch.Tensor) -> Features:
        cached = self.source.features(rows)
        return Features(cached.output * self.scale, cached.penultimate * self.scale)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.scale]
