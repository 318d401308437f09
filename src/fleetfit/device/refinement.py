"""One device's header: local training, its importance set (Eqs. 16-18), dropping neurons (Algorithm 2)."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from scipy.special import stdtrit
from torch import Tensor
from torch.nn.functional import cross_entropy

from fleetfit.config.sections import RefineConfig
from fleetfit.core.records import counted
from fleetfit.method.importance import drop_neurons, gate_importance, neuron_importance, parameter_importance
from fleetfit.models.features import Features
from fleetfit.models.header import Header
from fleetfit.models.pruning import apply_masks, prunable_layers
from fleetfit.models.training import fit, steps_per_epoch

WEIGHT_DECAY = 0.01
LEAST_LOSS = 0.05  # of a guess's: what is worse by less may ship
SKETCH_PROJECTIONS = 32


def train_header(
    header: Header,
    features: Features,
    labels: Int[Tensor, " sample"],
    refine: RefineConfig,
    generator: torch.Generator,
    name: str,
    *,
    epochs: int | None = None,
    anchor: Mapping[str, Tensor] | None = None,
    kept: Mapping[str, Bool[Tensor, " neuron"]] | None = None,
    offset: Float[Tensor, " class"] | None = None,
) -> dict[str, Tensor]:
    """One round of local training, in place; returns Eq. 18's importance of each parameter, averaged over its batches.

    With the defaults of the last three it is plain fine-tuning, on the same batches in the same order.

    Args:
        header: Trained in place.
        features: Of the private training split; the backbone is frozen.
        labels: Class numbers.
        refine: Epochs, rates, what importance is.
        generator: Decides the order of the samples.
        name: For error messages.
        epochs: Default: ``refine.epochs``.
        anchor: The shipped header's tensors; weights are pulled to them with ``refine.anchor`` (Beyond).
        kept: Layer -> neurons that are there; the others stay at zero.
        offset: Added to the logits while training (Beyond: the class prior, so that weights need not learn it).

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    parameters = dict(sorted(header.named_parameters()))
    sums = {n: torch.zeros_like(p) for n, p in parameters.items()}
    steps = (epochs or refine.epochs) * steps_per_epoch(len(labels), refine.batch_size)
    masked = {n: m for n, m in (kept or {}).items() if not bool(m.all())}

    def loss_of(rows: Tensor) -> Tensor:
        logits = header(features.rows(rows))
        loss = cross_entropy(logits if offset is None else logits + offset, labels[rows])
        if refine.importance != "gate":
            gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
            for (n, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                if gradient is not None:
                    sums[n] += parameter_importance(gradient, parameter.detach()) / steps
        if anchor is not None and refine.anchor:
            loss = loss + refine.anchor * sum(((p - anchor[n]) ** 2).sum() for n, p in parameters.items())
        return loss

    def remask() -> None:
        if masked:
            apply_masks(header, masked)

    fit(
        loss_of,
        parameters.values(),
        len(labels),
        steps=steps,
        batch_size=refine.batch_size,
        learning_rate=refine.learning_rate,
        weight_decay=WEIGHT_DECAY,
        generator=generator,
        each_step=remask,
        name=name,
    )
    return sums


def importance_set(
    header: Header,
    features: Features,
    labels: Int[Tensor, " sample"],
    refine: RefineConfig,
    during: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """What a device sends: importance per parameter as printed, or one number per neuron (Beyond).

    Args:
        header: After local training.
        features: Of the private training split.
        labels: Class numbers.
        refine: ``importance`` says which: parameter, neuron (sums of the former), or gate (taken now, after training).
        during: Importance per parameter, from ``train_header``.
    """
    layers = prunable_layers(header)
    if refine.importance == "parameter":
        return dict(during)
    if refine.importance == "neuron":
        return _per_neuron(header, during)
    there = labels.device
    sums = {name: torch.zeros(layer.num_neurons, device=there) for name, layer in layers.items()}
    for rows in torch.split(torch.arange(len(labels), device=there), refine.batch_size):
        header.zero_grad(set_to_none=True)
        cross_entropy(header(features.rows(rows)), labels[rows]).backward()  # type: ignore[no-untyped-call]
        for name, layer in layers.items():
            triples = []
            for parameter_name, dim in layer.gate_parameters():
                parameter = layer.get_parameter(parameter_name)
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                triples.append((gradient, parameter.detach(), dim))
            sums[name] += gate_importance(triples)
    header.zero_grad(set_to_none=True)
    return sums


def importance_shapes(header: Header, refine: RefineConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an importance set; none where nothing is done with one."""
    if not refine.scores_importance:
        return {}
    if refine.importance == "parameter":
        return {name: tuple(p.shape) for name, p in header.named_parameters()}
    return {name: (layer.num_neurons,) for name, layer in prunable_layers(header).items()}


def drop_least_important(
    header: Header, importance: Mapping[str, Tensor], kept: Mapping[str, Tensor], refine: RefineConfig, times: int
) -> dict[str, Tensor]:
    """Drop neurons by a personal importance set, for the ``times``-th time of ``refine.rounds``.

    After each time ``times / rounds`` of ``prune_share`` are gone, rounded once, so that the rounds add up to it.
    """
    total = sum(len(mask) for mask in kept.values())
    dropped = total - sum(int(mask.sum()) for mask in kept.values())
    number = round(total * refine.prune_share * times / refine.rounds) - dropped
    if number <= 0:
        return dict(kept)
    by_layer = _per_neuron(header, importance) if refine.importance == "parameter" else dict(importance)
    # Neurons are compared one by one: on the CPU.
    left = drop_neurons({n: i.cpu() for n, i in by_layer.items()}, {n: m.cpu() for n, m in kept.items()}, number)
    return {name: mask.to(kept[name].device) for name, mask in left.items()}


def nothing_to_drop(header: Header, refine: RefineConfig) -> str | None:
    """Why Algorithm 2 drops no neuron of this header though ``refine.prune_share`` asks for it; None if it does.

    A linear classifier has no neurons, nor have blocks without convolutions; the last neuron of a layer stays.
    """
    if not refine.prune_share:
        return None
    neurons = [layer.num_neurons for layer in prunable_layers(header).values()]
    asked = f"refine.prune_share {refine.prune_share:g} drops nothing"
    if sum(neurons) == len(neurons):
        return f"{asked}: the {header.spec.name} header has no {'neurons' if not neurons else 'neuron to spare'}"
    if round(sum(neurons) * refine.prune_share) == 0:
        return f"{asked}: the {header.spec.name} header has {sum(neurons)} neurons, and that is less than half of one"
    return None


def with_dropped_as_shipped(
    header: Header, own: Mapping[str, Tensor], kept: Mapping[str, Tensor], coarse: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights for the edge's average, in which a neuron dropped here counts as it was shipped, not as zeros."""
    sent = dict(own)
    for name, layer in prunable_layers(header).items():
        for parameter_name, dim in layer.neuron_parameters():
            full = f"{name}.{parameter_name}"
            shape = [1] * own[full].ndim
            shape[dim] = -1
            sent[full] = torch.where(kept[name].view(shape), own[full], coarse[full])
    return sent


def worse_than_sent(sent: Header, ships: Header, features: Features, labels: Int[Tensor, " sample"]) -> str | None:
    """Why a device should not ship a header, if it should not: it is clearly worse than the one that it was sent.

    Each sample's loss is cut at twice that of a guess, so that one sample alone is no proof; what is compared are the
    pairs. Clearly: by Student's t, with an error of 1 % (of two samples or more), and by a twentieth of a guess's loss
    at least; one sample must lose a whole one.

    Args:
        sent: The coarse header.
        ships: Its replacement.
        features: Of the device's validation split.
        labels: Class numbers.
    """
    if len(labels) == 0:
        return None
    guess = math.log(max(sent.num_classes, 2))
    with torch.no_grad():
        losses = [cross_entropy(h(features), labels, reduction="none").double() for h in (sent, ships)]
    before, after = (loss.nan_to_num(nan=math.inf).clamp(max=2 * guess) for loss in losses)
    worse, number = after - before, len(labels)
    mean = float(worse.mean())
    error = float(worse.std()) / math.sqrt(number) if number > 1 else 0.0
    needed = guess if number == 1 else error * float(stdtrit(number - 1, 0.99))
    if mean <= max(needed, LEAST_LOSS * guess):
        return None
    told = f"{float(before.mean()):.2f} nats as sent, {float(after.mean()):.2f} as the cluster chose"
    return f"{told}, on {counted(number, 'own validation samples')}"


def _per_neuron(header: Header, of_parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: neuron_importance([(of_parameters[f"{name}.{p}"], dim) for p, dim in layer.neuron_parameters()])
        for name, layer in prunable_layers(header).items()
    }
