"""What a device keeps between messages: the model it was sent, features of its samples, and headers on their way."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fleetfit.config.sections import RefineConfig
from fleetfit.core.encoding import Message, put, take
from fleetfit.core.records import BackboneShape, DeviceReport, HeaderSpec, JsonDict
from fleetfit.data.partition import Split
from fleetfit.data.samples import Samples
from fleetfit.device.messages import CoarseModel
from fleetfit.method.class_prior import ShiftPrior
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone
from fleetfit.models.features import Features
from fleetfit.models.header import Header
from fleetfit.models.packed import PackedModel
from fleetfit.models.pruning import prunable_layers

Weights = dict[str, Tensor]  # of a header, by the names of its state_dict


class DeviceMemory(PackedModel, Message):
    """What a device keeps between messages, savable as it is. Its tensors are read and set by the properties below."""

    kind: ClassVar[str] = "device_memory"
    step: int = Field(-1, description="the last message this memory has seen")
    family: str = ""
    config: JsonDict = Field(default_factory=dict)
    shape: BackboneShape | None = None
    labels: tuple[str, ...] = ()
    header: HeaderSpec = HeaderSpec()
    refine: RefineConfig = RefineConfig()
    seed: int = 0
    class_shares: tuple[float, ...] = ()
    report: DeviceReport | None = None
    trained_on: tuple[str, ...] = Field((), description="classes in its training data; empty with [privacy]")
    expected_shares: tuple[float, ...] = Field(
        (), description="of the classes, in the data to come, as the shipped model takes them; empty with [privacy]"
    )
    shifts: tuple[ShiftPrior, ...] = Field(
        (), description="with which new shares may be estimated on inputs alone: here they did not harm known labels"
    )

    @property
    def backbone_weights(self) -> Weights:
        """Of the backbone, frozen."""
        return take(self.tensors, "backbone")

    @property
    def coarse(self) -> Weights:
        """The header as it was sent."""
        return take(self.tensors, "coarse")

    @property
    def own(self) -> Weights:
        """The header after its last training here."""
        return take(self.tensors, "header")

    @property
    def refined(self) -> Weights:
        """The header that the edge made for this device, last."""
        return take(self.tensors, "refined")

    @property
    def local(self) -> Weights:
        """The header that was fine-tuned here alone; empty before the end."""
        return take(self.tensors, "local")

    @property
    def shipped(self) -> Weights:
        """The header of the device's model; empty before the end."""
        return take(self.tensors, "shipped")

    @property
    def kept(self) -> Weights:
        """Masks of the neurons that were not dropped, [neuron] bool, by layer."""
        return take(self.tensors, "kept")

    def features(self, split: str) -> Features:
        """Of the samples of a split, computed once.

        Raises:
            TypeError: there are none of this split; see ``has_features``.
        """
        return Features(**take(self.tensors, f"features.{split}"))

    def has_features(self, split: str) -> bool:
        """Whether there are any of this split."""
        return f"features.{split}.output" in self.tensors

    def with_weights(self, **weights: Mapping[str, Tensor]) -> "DeviceMemory":
        """The memory with some of its headers or masks set, each by the name of its property."""
        names = {"own": "header"}
        tensors = dict(self.tensors)
        for name, of_name in weights.items():
            tensors |= put(names.get(name, name), of_name)
        return self.model_copy(update={"tensors": tensors})

    def with_features(self, split: str, features: Features) -> "DeviceMemory":
        """The memory with the features of a split."""
        parts = {"output": features.output, "penultimate": features.penultimate}
        if features.mask is not None:
            parts["mask"] = features.mask
        return self.model_copy(update={"tensors": self.tensors | put(f"features.{split}", parts)})

    def backbone(self) -> Backbone:
        """The backbone, ready to run."""
        return self.backbone_of(self.backbone_weights)


def memory_of(message: CoarseModel) -> DeviceMemory:
    """The memory of a device that has got the coarse model just now, without features."""
    coarse = take(message.tensors, "header")
    memory = DeviceMemory(
        family=message.family,
        config=message.config,
        shape=message.shape,
        labels=message.labels,
        header=message.header,
        refine=message.refine,
        seed=message.seed,
        class_shares=message.class_shares,
        tensors={k: v for k, v in message.tensors.items() if k.startswith("backbone.")},
    )
    layers = prunable_layers(memory.header_of(coarse))
    masks = {name: torch.ones(layer.num_neurons, dtype=torch.bool) for name, layer in layers.items()}
    return memory.with_weights(coarse=coarse, own=coarse, refined=coarse, kept=masks)


def shipped_model(memory: DeviceMemory) -> Classifier:
    """The model a finished device runs.

    Raises:
        ValueError: the device has not finished.
    """
    if not memory.shipped:
        raise ValueError("this device has not finished: it has no model yet")
    return Classifier(memory.backbone(), memory.header_of(memory.shipped))


def weights_of(header: Header) -> Weights:
    """A header's weights as they are now."""
    return {name: t.detach().clone() for name, t in header.state_dict().items()}


def split_of(data: Split, name: str) -> Samples:
    """The samples of a split by its name."""
    samples: Samples = getattr(data, name)
    return samples
