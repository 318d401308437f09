"""The width- and depth-elastic backbone: reorder by importance, run at any (w, d), cut out a standalone smaller model.

One set of weights serves all shapes. After reordering, "keep the best" is "keep the first", so a sub-network's weights
are prefix views of the full ones. A sub-network runs as a structurally smaller model of the same Hugging Face class,
called on those views: its cost is its own, its gradients reach the full weights, and no forward pass is written twice.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from fleetfit.core.records import BackboneShape, JsonDict
from fleetfit.models.families import Family, family_of, own_config
from fleetfit.models.features import Features, FeatureShape
from fleetfit.models.weights import first_few

DepthOrder = Literal["spread", "first"]


@dataclass(frozen=True)
class BackboneOutput:
    """Tokens: ``hidden[0]`` after the embeddings, ``hidden[i]`` after layer i, ``output`` after the final norm.

    ``mask`` is true for tokens that are there; of a text, the others are zero. None means all are.
    """

    hidden: tuple[Float[Tensor, "batch token channel"], ...]
    output: Float[Tensor, "batch token channel"]
    mask: Bool[Tensor, "batch token"] | None = None

    @property
    def features(self) -> Features:
        """What headers see: the output and the penultimate layer's tokens."""
        return Features(self.output, self.hidden[-2], self.mask)

    def rows(self, rows: slice) -> "BackboneOutput":
        """The tokens of some samples."""
        mask = None if self.mask is None else self.mask[rows]
        return BackboneOutput(tuple(h[rows] for h in self.hidden), self.output[rows], mask)


def _run_images(model: Callable[..., Any], config: JsonDict, images: Tensor) -> BackboneOutput:
    result = model(images, output_hidden_states=True)
    return BackboneOutput(tuple(result.hidden_states), result.last_hidden_state)


def _run_texts(model: Callable[..., Any], config: JsonDict, tokens: Int[Tensor, "batch token"]) -> BackboneOutput:
    """Run token numbers, but no column that is padding in all rows: most texts are shorter than the longest possible.

    What comes out has all columns, zero where there is padding, so that a sample's tokens do not depend on its batch.
    """
    length = tokens.shape[1]
    # Padding is what follows the last other token: a text that spells it out has it between its words too. The first
    # token is always there: attention over no token at all is not defined.
    place = torch.arange(length, device=tokens.device)
    mask = place <= (place * (tokens != config["pad_token_id"])).amax(dim=1, keepdim=True)
    longest, waits = length, tokens.device.type != "cpu"
    # An exported model has one number of columns; a GPU would have to be waited for to know it.
    if not (torch.compiler.is_compiling() or waits):
        longest = int(mask.any(0).nonzero()[-1]) + 1
    here = mask[:, :longest]
    # Transformers looks whether a mask is needed, unless it has the shape of [batch, head, query, key].
    attention_mask = here[:, None, None, :] if waits else here
    result = model(tokens[:, :longest], attention_mask=attention_mask, output_hidden_states=True)
    lost = ~here.unsqueeze(-1)
    *hidden, output = (
        pad(h.masked_fill(lost, 0.0), (0, 0, 0, length - longest))
        for h in (*result.hidden_states, result.last_hidden_state)
    )
    return BackboneOutput(tuple(hidden), output, mask)


RUN = {"image": _run_images, "text": _run_texts}


def kept_heads(num_heads: int, width: float) -> int:
    """Attention heads at a width: whole heads, at least one."""
    return max(1, round(num_heads * width))


def kept_neurons(num_neurons: int, width: float) -> int:
    """MLP neurons at a width, at least one."""
    return max(1, round(num_neurons * width))


def kept_layers(num_layers: int, depth: int, order: DepthOrder) -> tuple[int, ...]:
    """Which layers a shallower model keeps.

    ``first``: the first ``depth``. ``spread``: evenly, first and last kept (a single layer: the first).
    """
    if not 1 <= depth <= num_layers:
        raise ValueError(f"depth must be in 1..{num_layers}, got {depth}")
    if order == "first" or depth == 1:
        return tuple(range(depth))
    return tuple(round(i * (num_layers - 1) / (depth - 1)) for i in range(depth))


class Backbone(nn.Module):
    """A standalone Hugging Face base model (cut or whole) that maps inputs to features."""

    def __init__(self, family: str, config: JsonDict) -> None:
        super().__init__()
        self.family = family
        self.model = family_of(family).build(config)
        self.config = own_config(self.model.config)

    @property
    def feature_shape(self) -> FeatureShape:
        """Shape of the tokens this backbone yields."""
        return family_of(self.family).feature_shape(self.model.config)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: channels, rows, columns of an image; the number of tokens of a text."""
        return family_of(self.family).input_shape(self.model.config)

    @property
    def num_layers(self) -> int:
        """Layers of this model."""
        return int(self.config[family_of(self.family).num_layers])

    def run(self, inputs: Tensor) -> BackboneOutput:
        """All hidden states; of no sample at all too, which the attention of Transformers does not take."""
        if inputs.shape[0] == 0:  # len() would fix the batch size of an exported model
            return self.run(inputs.new_zeros(1, *inputs.shape[1:])).rows(slice(0))
        return RUN[family_of(self.family).kind](self.model, self.config, inputs)

    def forward(self, inputs: Tensor) -> Features:
        """Features for a header."""
        return self.run(inputs).features


def backbone_from_state(family: str, config: JsonDict, state: Mapping[str, Tensor]) -> Backbone:
    """A backbone of somebody's configuration and tensors; none is given room before the two agree.

    Args:
        family: Name of the family.
        config: Its configuration's keys.
        state: All tensors, by their names in the Hugging Face class.

    Raises:
        ValueError: the configuration is not one of the family, or has sizes that no model has; a tensor is missing,
            unexpected or of another shape, or not of real numbers.
    """
    check_state(family, config, state)
    backbone = Backbone(family, config)
    backbone.model.load_state_dict(dict(state), strict=True)
    return backbone


def check_state(family: str, config: JsonDict, state: Mapping[str, Tensor]) -> FeatureShape:
    """Whether these tensors are those of this configuration, and what features such a backbone yields.

    Raises:
        ValueError: as ``backbone_from_state``.
    """
    layers = family_of(family).num_layers
    if isinstance(number := config.get(layers), int) and number > len(state):
        raise ValueError(f"model.config.{layers} must be <= the number of tensors, {len(state)}, got {number}")
    with torch.device("meta"):
        backbone = Backbone(family, config)
    own = backbone.model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in own]
    problems += [
        f"{name} must be real numbers of shape {tuple(own[name].shape)}, got {t.dtype} {tuple(t.shape)}"
        for name, t in state.items()
        if name in own and (own[name].shape != t.shape or own[name].is_floating_point() != t.is_floating_point())
    ]
    if problems:
        raise ValueError(f"the {family} backbone does not fit its tensors: {first_few(problems)}")
    return backbone.feature_shape


class ElasticBackbone:
    """A reference backbone that runs at every (width, depth).

    Args:
        backbone: The trained reference; it is copied.
        depth_order: Which layers a shallower sub-network keeps.
    """

    def __init__(self, backbone: Backbone, depth_order: DepthOrder = "first") -> None:
        self.backbone = copy.deepcopy(backbone)
        self.depth_order: DepthOrder = depth_order
        self.family: Family = family_of(backbone.family)
        config = self.backbone.config
        self.num_layers = int(config[self.family.num_layers])
        self.num_heads = int(config[self.family.num_heads])
        self.num_neurons = int(config[self.family.num_neurons])
        query = self._module(0, self.family.query_key_value[0])
        self.head_dim = query.out_features // self.num_heads
        self.hidden_size = query.in_features
        self._shells: dict[BackboneShape, nn.Module] = {}

    @property
    def full(self) -> BackboneShape:
        """The largest shape: the reference itself."""
        return BackboneShape(width=1.0, depth=self.num_layers)

    def _module(self, layer: int, path: str) -> nn.Linear:
        module = self.backbone.model.get_submodule(f"{self.family.layers}.{layer}.{path}")
        assert isinstance(module, nn.Linear)
        return module

    def layers_of(self, shape: BackboneShape) -> tuple[int, ...]:
        """Full-model layer numbers that a sub-network keeps."""
        return kept_layers(self.num_layers, shape.depth, self.depth_order)

    # -- reorder ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reorder(
        self, head_order: Sequence[Int[Tensor, " head"]], neuron_order: Sequence[Int[Tensor, " neuron"]]
    ) -> None:
        """Sort each layer's heads and neurons, most important first; the function computed stays the same.

        Args:
            head_order: For each layer a permutation of its heads.
            neuron_order: For each layer a permutation of its MLP neurons.
        """
        for layer in range(self.num_layers):
            channels = (head_order[layer][:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()
            for path in self.family.query_key_value:
                self._permute_rows(self._module(layer, path), channels)
            output = self._module(layer, self.family.attention_output)
            output.weight.copy_(output.weight[:, channels].clone())
            self._permute_rows(self._module(layer, self.family.mlp_in), neuron_order[layer])
            mlp_out = self._module(layer, self.family.mlp_out)
            mlp_out.weight.copy_(mlp_out.weight[:, neuron_order[layer]].clone())

    @staticmethod
    def _permute_rows(linear: nn.Linear, order: Tensor) -> None:
        linear.weight.copy_(linear.weight[order].clone())
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[order].clone())

    # -- run and cut --------------------------------------------------------------------------------------------------

    def sliced_state(self, shape: BackboneShape) -> dict[str, Tensor]:
        """A sub-network's parameters and buffers under its own names, as views of the full ones."""
        channels = kept_heads(self.num_heads, shape.width) * self.head_dim
        neurons = kept_neurons(self.num_neurons, shape.width)
        rows = {f"{path}.{p}": channels for path in self.family.query_key_value for p in ("weight", "bias")}
        rows |= {f"{self.family.mlp_in}.{p}": neurons for p in ("weight", "bias")}
        columns = {f"{self.family.attention_output}.weight": channels, f"{self.family.mlp_out}.weight": neurons}
        place = {full: cut for cut, full in enumerate(self.layers_of(shape))}
        start = self.family.layers + "."
        state: dict[str, Tensor] = {}
        for name, tensor in [*self.backbone.model.named_parameters(), *self.backbone.model.named_buffers()]:
            if not name.startswith(start):
                state[name] = tensor
                continue
            layer, _, inside = name[len(start) :].partition(".")
            if int(layer) not in place:
                continue
            view = tensor[: rows[inside]] if inside in rows else tensor
            view = view[:, : columns[inside]] if inside in columns else view
            state[f"{start}{place[int(layer)]}.{inside}"] = view
        return state

    def cut_config(self, shape: BackboneShape) -> JsonDict:
        """The Hugging Face configuration of a sub-network."""
        return {
            **self.backbone.config,
            self.family.num_layers: shape.depth,
            self.family.num_heads: kept_heads(self.num_heads, shape.width),
            self.family.num_neurons: kept_neurons(self.num_neurons, shape.width),
            "head_dim": self.head_dim,
        }

    def run(self, inputs: Tensor, shape: BackboneShape) -> BackboneOutput:
        """Run a sub-network; gradients reach the full weights."""
        if len(inputs) == 0:
            return self.run(inputs.new_zeros(1, *inputs.shape[1:]), shape).rows(slice(0))
        if shape not in self._shells:
            with torch.device("meta"):
                self._shells[shape] = self.family.build(self.cut_config(shape))
        shell, state = self._shells[shape].train(self.backbone.training), self.sliced_state(shape)

        def model(*args: Tensor, **options: Any) -> Any:
            return torch.func.functional_call(shell, state, args, options)

        return RUN[self.family.kind](model, self.backbone.config, inputs)

    def extract(self, shape: BackboneShape) -> Backbone:
        """A standalone, physically smaller copy of a sub-network."""
        cut = Backbone(self.backbone.family, self.cut_config(shape))
        saved = cut.model.state_dict()  # some buffers are not
        state = {k: v.detach().clone() for k, v in self.sliced_state(shape).items() if k in saved}
        cut.model.load_state_dict(state, strict=True)
        return cut

    # -- gates: for importance and as the oracle of slicing -----------------------------------------------------------

    @contextmanager
    def gated(
        self, head_gates: Mapping[int, Float[Tensor, " head"]], neuron_gates: Mapping[int, Float[Tensor, " neuron"]]
    ) -> Iterator[Backbone]:
        """The full backbone with heads and neurons of some layers multiplied by gates (0 removes one)."""
        handles = []
        for layer, gate in head_gates.items():
            scale = gate.repeat_interleave(self.head_dim)
            handles.append(
                self._module(layer, self.family.attention_output).register_forward_pre_hook(
                    lambda _, args, scale=scale: (args[0] * scale,)
                )
            )
        for layer, gate in neuron_gates.items():
            handles.append(
                self._module(layer, self.family.mlp_out).register_forward_pre_hook(
                    lambda _, args, gate=gate: (args[0] * gate,)
                )
            )
        try:
            yield self.backbone
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def recorded(self) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
        """Record every layer's head outputs O_h and neuron activations while the full backbone runs, with gradients.

        Yields:
            (heads, neurons): by layer, [batch, token, head x channel] and [batch, token, neuron]; ``.grad`` is kept.
        """
        heads: dict[int, Tensor] = {}
        neurons: dict[int, Tensor] = {}

        def keep(into: dict[int, Tensor], layer: int) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                args[0].retain_grad()
                into[layer] = args[0]

            return hook

        handles = []
        for layer in range(self.num_layers):
            for path, into in ((self.family.attention_output, heads), (self.family.mlp_out, neurons)):
                handles.append(self._module(layer, path).register_forward_pre_hook(keep(into, layer)))
        try:
            yield heads, neurons
        finally:
            for handle in handles:
                handle.remove()
