"""Weights of int8 for an ONNX model: what they cost is measured, and layers that they harm stay in float.

Large numbers beside small ones are what 256 steps cannot say. Where the whole does not keep to its bounds, each channel
gets a scale of its own; then the layers that do the most damage, one by one measured, are left as they are.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from pydantic import Field
from scipy.stats import beta

from fleetfit.core.records import Record

log = logging.getLogger(__name__)

MOST_DROP = 0.03  # of accuracy
CONFIDENCE = 0.95
Logits = Float32[np.ndarray, "sample class"]
KINDS = ("MatMul", "Gemm", "Conv", "Gather")  # that ONNX Runtime can make int8 of, where one side is a weight


class Int8Check(Record):
    """What int8 costs, on public samples given one by one: activations are scaled by what else is in the batch."""

    agreement: float = Field(description="share of samples with the same label as before")
    agreement_at_least: float = Field(0.0, description="lower end of its 95 % confidence interval: of few samples, low")
    accuracy: float
    accuracy_before: float
    size_before_bytes: int
    per_channel: bool = Field(False, description="each output channel of a weight has its own scale")
    float_layers: tuple[str, ...] = Field((), description="left as they were, since int8 harms them")

    def keeps_to(self, min_agreement: float) -> bool:
        """Whether it is good enough: also in accuracy, where labels that stay may be the wrong ones."""
        return self.agreement >= min_agreement and self.accuracy >= self.accuracy_before - MOST_DROP - 1e-9


@dataclass(frozen=True)
class Int8Model:
    """A quantized model's file, and what it costs."""

    content: bytes
    check: Int8Check


def compare(
    logits: Logits, before: Logits, labels: Int64[np.ndarray, " sample"], size_before_bytes: int, **how: Any
) -> Int8Check:
    """What became of the labels of some samples."""
    guesses, guesses_before = logits.argmax(1), before.argmax(1)
    same, number = int((guesses == guesses_before).sum()), len(labels)
    return Int8Check(
        agreement=same / number,
        agreement_at_least=float(beta.ppf((1 - CONFIDENCE) / 2, same, number - same + 1)) if same else 0.0,
        accuracy=float((guesses == labels).mean()),
        accuracy_before=float((guesses_before == labels).mean()),
        size_before_bytes=size_before_bytes,
        **how,
    )


def quantizable(graph: Any) -> dict[str, list[str]]:
    """Layers that can become int8, and the names of their nodes, of a graph as PyTorch writes it."""
    layers: dict[str, list[str]] = {}
    for node in graph.all_nodes():
        if node.op_type in KINDS and any(value is not None and value.is_initializer() for value in node.inputs):
            scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
            path = scopes.strip("[]").replace("'", "").split(", ")[-2:-1]
            # ONNX Runtime calls what it makes of a Gemm by a longer name.
            layers.setdefault(path[0] if path and path[0] else node.name, []).extend((node.name, f"{node.name}_MatMul"))
    return layers


def quantized(file: Path, out: Path, float_nodes: Sequence[str] = (), per_channel: bool = False) -> None:
    """Write the same model with weights of int8, activations scaled as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        file, out, weight_type=QuantType.QInt8, per_channel=per_channel, nodes_to_exclude=list(float_nodes)
    )


def smallest_loss(
    make: Callable[[Sequence[str], bool], Int8Model],
    damage_of: Callable[[Sequence[str]], float],
    layers: Sequence[str],
    min_agreement: float,
) -> Int8Model:
    """A model that keeps to the bounds with few layers in float; else the best there is.

    How many is found by halving, as if more in float were never worse.

    Args:
        make: (layers in float, whether channels have scales of their own) -> a model.
        damage_of: Layers in float -> how far logits are off then.
        layers: All that can be int8.
        min_agreement: The least share of labels that stay.
    """
    tried = []
    for per_channel in (False, True):
        tried.append(make((), per_channel))
        if tried[-1].check.keeps_to(min_agreement):
            return tried[-1]
    per_channel = tried[1].check.agreement >= tried[0].check.agreement
    damage = {layer: damage_of([other for other in layers if other != layer]) for layer in layers}
    worst = sorted(layers, key=lambda layer: -damage[layer])
    log.info("int8: damage by layer: %s", ", ".join(f"{layer} {damage[layer]:.3g}" for layer in worst))
    few, many = 0, len(worst)  # so many in float are too few; with so many, nothing is int8 any more
    good = None
    while many - few > 1:
        number = (few + many) // 2
        made = make(worst[:number], per_channel)
        tried.append(made)
        if made.check.keeps_to(min_agreement):
            good, many = made, number
        else:
            few = number
    if good is not None and len(good.content) < good.check.size_before_bytes:
        return good
    # What is no smaller than the float model is of no use, however well it agrees with it.
    failed = [made for made in tried if not made.check.keeps_to(min_agreement)]
    smaller = [made for made in failed if len(made.content) < made.check.size_before_bytes]
    return max(smaller or failed, key=lambda made: (made.check.agreement, made.check.accuracy))
