"""Shared weights of the header search (ENAS): every operation of every block and side, and one classifier."""

from jaxtyping import Float
from torch import Tensor, nn

from fleetfit.core.records import Block, HeaderSpec, Operation
from fleetfit.models.features import Features, FeatureShape
from fleetfit.models.header import BlocksBody, Header, build_header


class HeaderSupernet(nn.Module):
    """All headers of one search space at once; a child's parameters have the names they have in the child alone."""

    def __init__(
        self,
        spec: HeaderSpec,
        operations: tuple[Operation, ...],
        shape: FeatureShape,
        num_classes: int,
    ) -> None:
        """Build the shared weights.

        Args:
            spec: Any child: gives B, U, channels, pooling and hidden; all children share them.
            operations: O, the operations of the space.
            shape: What features look like.
            num_classes: Classes.
        """
        super().__init__()
        self.header = Header(spec, shape, num_classes, BlocksBody(spec, shape, operations))

    def forward(self, features: Features, blocks: tuple[Block, ...]) -> Float[Tensor, "batch class"]:
        """Logits of the child with these blocks."""
        logits: Tensor = self.header.classifier(self.header.body(features, blocks))
        return logits

    def child_spec(self, blocks: tuple[Block, ...]) -> HeaderSpec:
        """The specification of the child with these blocks."""
        return self.header.spec.model_copy(update={"blocks": blocks})

    def child(self, blocks: tuple[Block, ...]) -> Header:
        """A header of its own with a copy of the child's share of the weights."""
        header = build_header(self.child_spec(blocks), self.header.shape, self.header.num_classes)
        shared = self.header.state_dict()
        header.load_state_dict({name: shared[name] for name in header.state_dict()})
        return header
