"""Layers of a header whose neurons can be dropped: masked while refining, cut out when shipped (Section III-D).

A neuron is an output channel of a convolution or a hidden unit of an MLP. Dropping one sets all parameters it owns to
zero, or takes them away: both give the same outputs, because whatever normalises comes after the neurons are back in
their places.
"""

import abc
import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Prunable(nn.Module, abc.ABC):
    """A layer with neurons; parameter names are relative to it, each with the dimension the neurons run along."""

    @property
    @abc.abstractmethod
    def num_neurons(self) -> int:
        """How many neurons the layer has now."""

    @abc.abstractmethod
    def neuron_parameters(self) -> list[tuple[str, int]]:
        """The parameters that neurons own; with neuron j's part of each at zero, the layer is as without the neuron."""

    @abc.abstractmethod
    def gate_parameters(self) -> list[tuple[str, int]]:
        """Parameters v in which neuron j's contribution is linear: dL/dgate_j = sum of g * v over j's part of them."""

    @abc.abstractmethod
    def keep(self, indices: Int[Tensor, " kept"]) -> None:
        """Cut all other neurons out; at least one stays."""

    @abc.abstractmethod
    def cut_as(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Cut this whole layer to the shapes of a saved one whose names begin with ``prefix``.

        Raises:
            ValueError: the saved layer cannot be a cut of this one.
        """


class ConvOp(Prunable):
    """ReLU, then a convolution with the grid kept; on a grid of one row the kernel is (1, k).

    With ``inputs`` it is a projection of so many channels, without the ReLU. After pruning the remaining channels go
    back to their places among all ``channels``; the others are zero.
    """

    kept: Int[Tensor, " kept"] | None
    places: Int[Tensor, " channel"] | None

    def __init__(self, channels: int, kernel: int, one_row: bool, inputs: int | None = None) -> None:
        super().__init__()
        size = (1 if one_row else kernel, kernel)
        self.channels = channels
        self.projects = inputs is not None
        self.conv = nn.Conv2d(inputs or channels, channels, size, padding=(size[0] // 2, size[1] // 2))
        self.register_buffer("kept", None)
        self.register_buffer("places", None, persistent=False)

    def forward(self, grid: Float[Tensor, "batch input row column"]) -> Float[Tensor, "batch channel row column"]:
        """Convolve; all channels are in the output, the dropped ones as zeros."""
        out: Tensor = self.conv(grid if self.projects else torch.relu(grid))
        if self.places is None:
            return out
        return torch.cat([out, torch.zeros_like(out[:, :1])], 1).index_select(1, self.places)

    @property
    def num_neurons(self) -> int:
        """Output channels."""
        return len(self.conv.weight)

    def neuron_parameters(self) -> list[tuple[str, int]]:
        """Kernel and bias of the channel."""
        return [("conv.weight", 0), ("conv.bias", 0)]

    def gate_parameters(self) -> list[tuple[str, int]]:
        """The output is linear in kernel and bias."""
        return [("conv.weight", 0), ("conv.bias", 0)]

    def keep(self, indices: Int[Tensor, " kept"]) -> None:
        """Cut all other output channels out."""
        indices = _checked(indices, self.num_neurons)
        bias = self.conv.bias
        assert bias is not None
        self.conv.weight = nn.Parameter(self.conv.weight.detach()[indices].clone())
        self.conv.bias = nn.Parameter(bias.detach()[indices].clone())
        self.conv.out_channels = len(indices)
        self._set_kept(indices if self.kept is None else self.kept[indices])

    def _set_kept(self, kept: Int[Tensor, " kept"]) -> None:
        self.kept = kept
        self.places = torch.full((self.channels,), len(kept), device=kept.device)
        self.places[kept] = torch.arange(len(kept), device=kept.device)

    def cut_as(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Cut to the channels named in the saved ``kept``; without it the saved layer is whole."""
        kept = state.get(f"{prefix}kept")
        if kept is None:
            return
        try:
            self.keep(kept)
        except ValueError as error:
            raise ValueError(f"{prefix}kept: {error}") from None


class MLP(Prunable):
    """Linear, GELU, Linear; with ``hidden`` 0 a single linear layer, which has no neurons to drop."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden) if hidden else None
        self.last = nn.Linear(hidden or inputs, outputs)

    def forward(self, x: Float[Tensor, "*batch input"]) -> Float[Tensor, "*batch output"]:
        """Apply the one or two layers along the last axis."""
        out: Tensor = self.last(x if self.first is None else gelu(self.first(x)))
        return out

    @property
    def num_neurons(self) -> int:
        """Hidden units."""
        return 0 if self.first is None else self.first.out_features

    def neuron_parameters(self) -> list[tuple[str, int]]:
        """Weights into the unit, its bias, and weights out of it."""
        return [] if self.first is None else [("first.weight", 0), ("first.bias", 0), ("last.weight", 1)]

    def gate_parameters(self) -> list[tuple[str, int]]:
        """The output is linear in the weights out of the unit."""
        return [] if self.first is None else [("last.weight", 1)]

    def keep(self, indices: Int[Tensor, " kept"]) -> None:
        """Cut all other hidden units out."""
        assert self.first is not None, "an MLP without a hidden layer has no neurons"
        indices = _checked(indices, self.num_neurons)
        self.first.weight = nn.Parameter(self.first.weight.detach()[indices].clone())
        self.first.bias = nn.Parameter(self.first.bias.detach()[indices].clone())
        self.last.weight = nn.Parameter(self.last.weight.detach()[:, indices].clone())
        self.first.out_features = self.last.in_features = len(indices)

    def cut_as(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Cut to as many hidden units as the saved bias has."""
        bias = state.get(f"{prefix}first.bias")
        if bias is None or bias.ndim != 1 or bias.shape[0] == self.num_neurons:
            return
        if not 1 <= len(bias) < self.num_neurons:
            raise ValueError(f"{prefix}first.bias: must have 1 to {self.num_neurons} units, got {len(bias)}")
        self.keep(torch.arange(len(bias)))


def _checked(indices: Int[Tensor, " kept"], num_neurons: int) -> Int[Tensor, " kept"]:
    if indices.ndim != 1 or len(indices) < 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError("neurons to keep must be a list of at least 1 index")
    if int(indices.min()) < 0 or int(indices.max()) >= num_neurons or len(set(indices.tolist())) != len(indices):
        raise ValueError(f"neurons to keep must be distinct and in 0..{num_neurons - 1}, got {indices.tolist()}")
    return indices.long()


def prunable_layers(header: nn.Module) -> dict[str, Prunable]:
    """The layers with neurons, by their dotted name in the header, in a fixed order."""
    return {name: m for name, m in header.named_modules() if isinstance(m, Prunable) and m.num_neurons > 0}


@torch.no_grad()
def apply_masks(header: nn.Module, kept: Mapping[str, Bool[Tensor, " neuron"]]) -> None:
    """Set all parameters of the neurons that are not kept to zero, in place; layers that are not named stay whole.

    Raises:
        ValueError: a name that is no layer with neurons, or a mask of a wrong length.
    """
    layers = _layers_of(header, kept)
    for name, mask in kept.items():
        for parameter_name, dim in layers[name].neuron_parameters():
            parameter = layers[name].get_parameter(parameter_name)
            shape = [1] * parameter.ndim
            shape[dim] = -1
            # masked_fill, not a product: a zero stays a zero even where a weight is not finite
            parameter.masked_fill_(~mask.to(parameter.device).reshape(shape), 0.0)


def extract(header: ModuleT, kept: Mapping[str, Bool[Tensor, " neuron"]]) -> ModuleT:
    """A new, physically smaller header with the outputs that ``apply_masks`` would give.

    Raises:
        ValueError: as in ``apply_masks``, or a layer would lose all its neurons.
    """
    _layers_of(header, kept)
    smaller = copy.deepcopy(header)
    layers = prunable_layers(smaller)
    for name, mask in kept.items():
        if not mask.any():
            raise ValueError(f"{name}: at least 1 neuron must be kept, got 0")
        if not mask.all():
            layers[name].keep(mask.nonzero().flatten())
    return smaller


def _layers_of(header: nn.Module, kept: Mapping[str, Bool[Tensor, " neuron"]]) -> dict[str, Prunable]:
    layers = prunable_layers(header)
    for name, mask in kept.items():
        if name not in layers:
            raise ValueError(f"kept: {name!r} is no layer with neurons; there are {', '.join(layers) or 'none'}")
        if tuple(mask.shape) != (layers[name].num_neurons,):
            raise ValueError(f"kept[{name!r}] must have shape ({layers[name].num_neurons},), got {tuple(mask.shape)}")
    return layers
