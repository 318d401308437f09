"""A header built from its specification: searched blocks (Section III-C, Eq. 14) or a fixed kind, then a classifier."""

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, max_pool2d

from fleetfit.core.records import Block, HeaderSpec, Operation
from fleetfit.method.search_space import loose_ends, validate_blocks
from fleetfit.models.features import Features, FeatureShape, tokens_to_grid
from fleetfit.models.fixed_headers import (
    ClassTokenBody,
    ConvAddBody,
    ConvBody,
    ConvProjectBody,
    MixerBody,
    ResMLPBody,
    TransformerBody,
    class_token,
    mask_on_grid,
    pool,
)
from fleetfit.models.pruning import MLP, ConvOp, prunable_layers
from fleetfit.models.weights import first_few

Grid = Float[Tensor, "batch channel _ _"]  # blocks may halve the rows and columns

CLS_GATE = 0.3  # where the learned gate of [CLS] starts: below full scale, so that the grid is heard


class Identity(nn.Module):
    """The input as it is."""

    def forward(self, grid: Grid) -> Grid:
        """Pass."""
        return grid


class Downsample(nn.Module):
    """Average to half the grid, rounded up."""

    def forward(self, grid: Grid) -> Grid:
        """Halve."""
        return adaptive_avg_pool2d(grid, ((grid.shape[-2] + 1) // 2, (grid.shape[-1] + 1) // 2))


class Pool3(nn.Module):
    """A 3x3 pool (1x3 on one row) with stride 1: the grid stays."""

    def __init__(self, maximum: bool, one_row: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.size = (1 if one_row else 3, 3)

    def forward(self, grid: Grid) -> Grid:
        """Pool."""
        padding = (self.size[0] // 2, 1)
        if self.maximum:
            return max_pool2d(grid, self.size, stride=1, padding=padding)
        return avg_pool2d(grid, self.size, stride=1, padding=padding, count_include_pad=False)


OPERATION_MODULES: dict[Operation, Callable[[int, bool], nn.Module]] = {
    "conv1": lambda channels, one_row: ConvOp(channels, 1, one_row),
    "conv3": lambda channels, one_row: ConvOp(channels, 3, one_row),
    "conv5": lambda channels, one_row: ConvOp(channels, 5, one_row),
    "identity": lambda channels, one_row: Identity(),
    "downsample": lambda channels, one_row: Downsample(),
    "avg_pool": lambda channels, one_row: Pool3(maximum=False, one_row=one_row),
    "max_pool": lambda channels, one_row: Pool3(maximum=True, one_row=one_row),
}


def to_smallest(grids: Iterable[Grid]) -> list[Grid]:
    """Bring tensors of different grids to the smallest by averaging."""
    grids = list(grids)
    smallest = (min(g.shape[-2] for g in grids), min(g.shape[-1] for g in grids))
    return [g if g.shape[-2:] == smallest else adaptive_avg_pool2d(g, smallest) for g in grids]


class BlockModule(nn.Module):
    """One block: an operation on each of two inputs, add, normalise the sum.

    It holds the operations it may be asked for: one a side in a header of its own, all in the search's shared weights.
    GroupNorm, not BatchNorm: batches are small and headers are averaged. It is on the sum, so that a dropped channel is
    a zero before it, and masked and cut headers agree.
    """

    def __init__(
        self, channels: int, one_row: bool, operations_1: Iterable[Operation], operations_2: Iterable[Operation]
    ) -> None:
        super().__init__()
        self.side_1 = nn.ModuleDict({o: OPERATION_MODULES[o](channels, one_row) for o in operations_1})
        self.side_2 = nn.ModuleDict({o: OPERATION_MODULES[o](channels, one_row) for o in operations_2})
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, input_1: Grid, input_2: Grid, operation_1: Operation, operation_2: Operation) -> Grid:
        """(O1(I1) + O2(I2)), normalised."""
        first, second = to_smallest([self.side_1[operation_1](input_1), self.side_2[operation_2](input_2)])
        out: Tensor = self.norm(first + second)
        return out


class BlocksBody(nn.Module):
    """Cells of B blocks, repeated U times, on the grids of the last two layers; pooled, and joined by [CLS].

    Without blocks it is a projection and a pooling. Loose ends of a cell are averaged. Padding is zero before every
    block. ``operations`` None builds what ``spec.blocks`` needs; otherwise each block holds all of them.
    """

    def __init__(self, spec: HeaderSpec, shape: FeatureShape, operations: tuple[Operation, ...] | None = None) -> None:
        super().__init__()
        if spec.blocks:
            validate_blocks(spec.blocks)
        self.shape = shape
        channels, one_row = spec.channels, shape.grid[0] == 1
        self.cells = (min(spec.pooling, shape.grid[0]), min(spec.pooling, shape.grid[1]))
        self.num_features = channels * self.cells[0] * self.cells[1] + shape.channels
        self.project_output: nn.Module
        if spec.blocks or operations is not None:
            self.project_output = nn.Conv2d(shape.channels, channels, 1)
        else:  # its channels are all the neurons there are
            self.project_output = ConvOp(channels, 1, one_row, inputs=shape.channels)
        needs_penultimate = operations is not None or any(1 in (b.input_1, b.input_2) for b in spec.blocks)
        # The output comes through the backbone's final LayerNorm, the penultimate layer's tokens do not.
        self.penultimate_norm = nn.LayerNorm(shape.channels) if needs_penultimate else None
        self.project_penultimate = nn.Conv2d(shape.channels, channels, 1) if needs_penultimate else None
        repeats = range(spec.repeats if spec.blocks else 0)
        self.repeats = nn.ModuleList(
            nn.ModuleList(
                BlockModule(channels, one_row, operations or (b.operation_1,), operations or (b.operation_2,))
                for b in spec.blocks
            )
            for _ in repeats
        )
        self.cls_gate = nn.Parameter(torch.tensor(CLS_GATE))

    def forward(self, features: Features, blocks: tuple[Block, ...]) -> Float[Tensor, "batch feature"]:
        """Run the cells as ``blocks`` says."""
        mask = mask_on_grid(features, self.shape)
        current = before = self.project_output(tokens_to_grid(features.output, self.shape))
        if self.penultimate_norm is not None and self.project_penultimate is not None:
            tokens = self.penultimate_norm(features.penultimate)
            before = self.project_penultimate(tokens_to_grid(tokens, self.shape))
        for cell in self.repeats:
            assert isinstance(cell, nn.ModuleList)
            current, before = self._cell(cell, current, before, blocks, mask), current
        pooled = pool(current, mask, self.cells).flatten(1)
        return torch.cat([pooled, self.cls_gate * class_token(features, self.shape)], 1)

    def _cell(
        self, cell: nn.ModuleList, current: Grid, before: Grid, blocks: tuple[Block, ...], mask: Tensor | None
    ) -> Grid:
        states = [_padding_zeroed(current, mask), _padding_zeroed(before, mask)]
        for module, block in zip(cell, blocks, strict=True):
            out = module(states[block.input_1], states[block.input_2], block.operation_1, block.operation_2)
            states.append(_padding_zeroed(out, mask))
        ends = to_smallest(states[2 + i] for i in loose_ends(blocks))
        return torch.stack(ends).mean(0)


def _padding_zeroed(grid: Grid, mask: Float[Tensor, "batch 1 row column"] | None) -> Grid:
    return grid if mask is None else grid * (pool(mask, None, (grid.shape[-2], grid.shape[-1])) > 0)


Body = ClassTokenBody | ConvBody | TransformerBody | MixerBody | ResMLPBody | BlocksBody


def _conv_pooling(spec: HeaderSpec) -> int:
    return max(2, spec.pooling)  # pooling to one cell would make a weak baseline


BODIES: dict[str, Callable[[HeaderSpec, FeatureShape], Body]] = {
    "blocks": lambda spec, shape: BlocksBody(spec, shape),
    "linear": lambda spec, shape: ClassTokenBody(shape),
    "mlp": lambda spec, shape: ClassTokenBody(shape),
    "cnn_ignore": lambda spec, shape: ConvBody(shape, spec.channels, _conv_pooling(spec)),
    "cnn_add": lambda spec, shape: ConvAddBody(shape, spec.channels, _conv_pooling(spec)),
    "cnn_project": lambda spec, shape: ConvProjectBody(shape, spec.channels, _conv_pooling(spec)),
    "vit_block": lambda spec, shape: TransformerBody(shape, spec.channels),
    "mlp_mixer": lambda spec, shape: MixerBody(shape, spec.channels),
    "resmlp": lambda spec, shape: ResMLPBody(shape, spec.channels),
}


class Header(nn.Module):
    """A body that makes one vector of a sample's tokens, and a classifier on it.

    ``spec`` is what it was built from; a pruned header keeps it and has fewer neurons.
    """

    def __init__(self, spec: HeaderSpec, shape: FeatureShape, num_classes: int, body: Body) -> None:
        super().__init__()
        self.spec = spec
        self.shape = shape
        self.num_classes = num_classes
        self.body = body
        hidden = {"linear": 0, "mlp": spec.hidden or 64}.get(spec.kind, spec.hidden)
        self.classifier = MLP(body.num_features, hidden, num_classes)

    def forward(self, features: Features) -> Float[Tensor, "batch class"]:
        """Logits."""
        body = self.body
        vector = body(features, self.spec.blocks) if isinstance(body, BlocksBody) else body(features)
        logits: Tensor = self.classifier(vector)
        return logits

    @torch.no_grad()
    def start_as(self, other: "Header") -> None:
        """Compute what another header computes, to be trained on from there (Beyond); see ``can_start_as``.

        As a linear one: the classifier reads [CLS] with that header's weights, and everything else with zeros.

        Raises:
            ValueError: this header cannot start as the other.
        """
        if not can_start_as(self.spec, other.spec):
            raise ValueError(
                "a header starts as one of its own kind, or one of blocks without a hidden layer as a linear one, "
                f"got {self.spec.kind!r} with {self.spec.hidden} hidden units and {other.spec.kind!r}"
            )
        if self.spec == other.spec:
            self.load_state_dict(other.state_dict())
            return
        assert isinstance(self.body, BlocksBody)
        channels = self.shape.channels
        self.last_linear.weight.zero_()
        self.last_linear.weight[:, -channels:] = other.last_linear.weight / self.body.cls_gate
        self.last_linear.bias.copy_(other.last_linear.bias)

    @property
    def last_linear(self) -> nn.Linear:
        """The final layer; a class prior goes into its bias."""
        return self.classifier.last


def can_start_as(spec: HeaderSpec, other: HeaderSpec) -> bool:
    """Whether a header of one specification can compute what one of another does, before it is trained."""
    return spec == other or (other.kind == "linear" and spec.kind == "blocks" and spec.hidden == 0)


def build_header(spec: HeaderSpec, shape: FeatureShape, num_classes: int) -> Header:
    """A header with fresh weights.

    Raises:
        ValueError: ``spec.blocks`` name inputs that are not there, or operations that are unknown.
    """
    return Header(spec, shape, num_classes, BODIES[spec.kind](spec, shape))


def header_from_state(spec: HeaderSpec, shape: FeatureShape, num_classes: int, state: Mapping[str, Tensor]) -> Header:
    """Rebuild a saved header, also a physically pruned one: its neurons are counted from the tensors.

    Raises:
        ValueError: a tensor is missing, unexpected, or has a wrong shape.
    """
    own = _cut_as(state, spec, shape, num_classes).state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in own]
    problems += [
        f"{name} must have shape {tuple(own[name].shape)}, got {tuple(state[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if problems:
        raise ValueError(f"header of kind {spec.kind!r} does not fit its tensors: {first_few(problems)}")
    header = _cut_as(state, spec, shape, num_classes, "cpu")
    header.load_state_dict(dict(state))
    return header


def _cut_as(
    state: Mapping[str, Tensor], spec: HeaderSpec, shape: FeatureShape, num_classes: int, device: str = "meta"
) -> Header:
    """A header without weights, of which as many neurons are there as of a saved one."""
    with torch.device("meta"):
        header = build_header(spec, shape, num_classes)
    header.to_empty(device=device)
    for name, layer in prunable_layers(header).items():
        layer.cut_as(state, f"{name}.")
    return header


def count_parameters(spec: HeaderSpec, shape: FeatureShape, num_classes: int) -> int:
    """How many trainable parameters the header has; nothing is allocated."""
    with torch.device("meta"):
        header = build_header(spec, shape, num_classes)
    return sum(p.numel() for p in header.parameters())
