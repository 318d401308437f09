"""A model as one value: what rebuilds it, and the one way in which its tensors are named, measured, built and packed.

Wherever a whole model is sent or stored, its tensors are ``backbone.<name>`` and ``header.<name>``; in a device's file
they have the names of ``Classifier``, which has the Hugging Face model as ``backbone.model``.
"""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from fleetfit.core.encoding import put, take
from fleetfit.core.records import HeaderSpec, JsonDict, Record
from fleetfit.method.size import safetensors_size_bytes
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone, backbone_from_state, check_state
from fleetfit.models.families import feature_shape_of
from fleetfit.models.features import FeatureShape
from fleetfit.models.header import Header, header_from_state


class PackedModel(Record):
    """A model without its tensors; messages, memories and model cards are ones."""

    family: str
    config: JsonDict = Field(description="of the Hugging Face class, of the backbone as it was cut")
    header: HeaderSpec
    labels: tuple[str, ...]

    @property
    def feature_shape(self) -> FeatureShape:
        """What the backbone yields, from its configuration alone.

        Raises:
            ValueError: it is not one of the family.
        """
        return feature_shape_of(self.family, self.config)

    def backbone_of(self, state: Mapping[str, Tensor]) -> Backbone:
        """The backbone with these tensors, where they are.

        Raises:
            ValueError: they are not those of the configuration; nothing was given room.
        """
        backbone = backbone_from_state(self.family, self.config, state)
        return backbone.to(next(iter(state.values())).device).eval()

    def header_of(self, state: Mapping[str, Tensor]) -> Header:
        """A header with these tensors, where they are; also one of fewer neurons.

        Raises:
            ValueError: they are not those of such a header.
        """
        header = header_from_state(self.header, self.feature_shape, len(self.labels), state)
        return header.to(next(iter(state.values())).device)

    def build(self, tensors: Mapping[str, Tensor]) -> Classifier:
        """The whole model.

        Raises:
            ValueError: as ``backbone_of`` and ``header_of``.
        """
        return Classifier(self.backbone_of(take(tensors, "backbone")), self.header_of(take(tensors, "header")))

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Whether these tensors make this model; nothing is built for them.

        Raises:
            ValueError: they do not.
        """
        shape = check_state(self.family, self.config, take(tensors, "backbone"))
        header_from_state(self.header, shape, len(self.labels), take(tensors, "header"))


def packed_tensors(model: Classifier) -> dict[str, Tensor]:
    """A whole model's tensors, on the CPU, and nobody else's."""
    parts = put("backbone", model.backbone.model.state_dict()) | put("header", model.header.state_dict())
    return {name: t.detach().cpu().clone() for name, t in parts.items()}


def stored_size_bytes(backbone: Mapping[str, Tensor], header: Mapping[str, Tensor]) -> int:
    """Size of the safetensors file that a device keeps of a model with these tensors."""
    held = put("backbone.model", backbone) | put("header", header)
    return safetensors_size_bytes({n: (tuple(t.shape), t.dtype) for n, t in held.items()}, {"format": "pt"})
