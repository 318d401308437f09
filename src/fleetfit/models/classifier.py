"""A backbone and a header: a whole model, from inputs to logits."""

from jaxtyping import Float
from torch import Tensor, nn

from fleetfit.models.elastic import Backbone
from fleetfit.models.header import Header


class Classifier(nn.Module):
    """What is trained as the reference in the cloud, and what ships to a device in the end."""

    def __init__(self, backbone: Backbone, header: Header) -> None:
        super().__init__()
        self.backbone = backbone
        self.header = header

    def forward(self, inputs: Tensor) -> Float[Tensor, "batch class"]:
        """Logits."""
        logits: Tensor = self.header(self.backbone(inputs))
        return logits


def num_parameters(module: nn.Module) -> int:
    """Trainable numbers in a module."""
    return sum(p.numel() for p in module.parameters())
