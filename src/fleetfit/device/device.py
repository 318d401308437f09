"""The device: the only code that sees private data. ``handle(state, message) -> (state, reply)``.

It freezes the backbone and computes its features once, trains the header on private data, scores the header's neurons
(Eqs. 16-18), drops those that the personal importance set says matter least (Algorithm 2), and builds what it ships.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fleetfit.core.bounds import MAX_LOSS, MAX_VALUE, FewLines, check_values
from fleetfit.core.encoding import Declined, Message, put, take
from fleetfit.core.hardware import CPU, moved
from fleetfit.core.randomness import named_generator
from fleetfit.core.records import (
    NO_SCORES,
    ONE_CLASS_NOTE,
    DeviceAttributes,
    DeviceReport,
    Way,
)
from fleetfit.data.partition import Split
from fleetfit.data.samples import Samples
from fleetfit.device.memory import DeviceMemory, memory_of, shipped_model, split_of, weights_of
from fleetfit.device.messages import (
    AttributesReply,
    AttributesRequest,
    CoarseModel,
    CoarseReply,
    DeviceMessage,
    Finish,
    FinishReply,
    Propose,
    ProposeReply,
    RefineRound,
    RoundReply,
    packed,
)
from fleetfit.device.priors import (
    all_counts,
    expected_shares,
    header_of_way,
    left_out_priors,
    moved_by_inputs,
    prior_of,
    training_prior,
    trusted_shifts,
)
from fleetfit.device.privacy import DevicePrivacy, personal_without_noise
from fleetfit.device.refinement import (
    SKETCH_PROJECTIONS,
    drop_least_important,
    importance_set,
    importance_shapes,
    nothing_to_drop,
    train_header,
    with_dropped_as_shipped,
    worse_than_sent,
)
from fleetfit.device.scoring import accuracy_of, class_counts, logits_of, scores_of
from fleetfit.device.ways import ways_to_ship
from fleetfit.method.similarity import random_projections, sketch_quantiles
from fleetfit.models.classifier import num_parameters
from fleetfit.models.elastic import Backbone
from fleetfit.models.features import Features, concatenated
from fleetfit.models.header import Header
from fleetfit.models.packed import stored_size_bytes
from fleetfit.models.pruning import apply_masks, extract, prunable_layers

M = TypeVar("M", bound=Message)
log = logging.getLogger(__name__)
log.addFilter(FewLines())


@dataclass(frozen=True)
class DeviceState:
    """A device: its hardware, its private data (never saved or sent from here), and its memory.

    Data and memory rest on the CPU; what a message asks for is computed on ``torch_device``.
    """

    attributes: DeviceAttributes
    data: Split
    memory: DeviceMemory
    torch_device: torch.device = CPU
    privacy: DevicePrivacy | None = None


def handle(state: DeviceState, message: Message) -> tuple[DeviceState, Message]:
    """Answer one message of the edge; the same state and message always give the same answer.

    The attributes need no memory and leave it as it is; the coarse model begins it anew. Every other message needs the
    coarse model, and a memory from before its step: steps in between may have been missed.

    Raises:
        ValueError: a message of a step that is over, or of a kind that devices do not answer.
    """
    if not isinstance(message, DeviceMessage):
        raise ValueError(f"device {state.attributes.device_id}: cannot answer a {message.kind!r}")
    if state.privacy:
        state.privacy.check(message)
    if isinstance(message, AttributesRequest):
        attributes = AttributesReply(step=message.step, attributes=state.attributes)
        return state, state.privacy.protected(message, attributes, {}) if state.privacy else attributes
    if not isinstance(message, CoarseModel):
        if state.memory.step < 0:
            return state, Declined(reason="it has no coarse model", needs_model=True)
        if message.step <= state.memory.step:
            raise ValueError(
                f"device {state.attributes.device_id}: step {message.step} is over, it has come to {state.memory.step}"
            )
    check_values(message.tensors)
    own, message = state, _on(message, state.torch_device)
    state = replace(own, data=own.data.to(own.torch_device), memory=_on(own.memory, own.torch_device))
    if isinstance(message, CoarseModel) and (declined := _declined(state, message)):
        return own, declined
    try:
        memory, reply = _answered(state, message)
    except Exception:
        if not state.privacy:
            raise
        # That it went wrong may tell of the data. A success has the same form, and what it says is drowned in noise.
        log.exception("a %s is answered as if nothing had changed", message.kind)
        memory, reply = _unchanged(state, message)
    memory, reply = _on(memory, CPU).model_copy(update={"step": message.step}), _on(reply, CPU)
    if state.privacy:
        reply = state.privacy.protected(message, reply, memory.coarse)
    if isinstance(reply, RoundReply) and memory.refine.bits == 8 and memory.refine.exchange == "weights":
        reply = packed(reply, memory.coarse)
    return replace(own, memory=memory), reply


def _answered(state: DeviceState, message: DeviceMessage) -> tuple[DeviceMemory, Message]:
    if isinstance(message, CoarseModel):
        return _receive(state, message)
    if isinstance(message, RefineRound):
        return _refine(state, message)
    if isinstance(message, Propose):
        return _propose(state, message)
    if isinstance(message, Finish):
        return _finish(state, message)
    raise ValueError(f"device {state.attributes.device_id}: cannot answer a {message.kind!r}")


# -- steps ------------------------------------------------------------------------------------------------------------


def _declined(state: DeviceState, message: CoarseModel) -> Declined | None:
    """Why the device cannot have this model, if it cannot; only the message and the hardware have a say in it.

    The model fits the smallest device whose attributes were known when it was made; one that was silent then may be
    smaller still, and declines.

    Raises:
        ValueError: the tensors are not those of the configuration and the header; nothing was built for them.
    """
    message.check(message.tensors)
    if len(message.class_shares) != len(message.labels):
        rule = f"must be {len(message.labels)} shares, one a label"
        raise ValueError(f"class_shares {rule}, got {len(message.class_shares)}")
    size_bytes = stored_size_bytes(take(message.tensors, "backbone"), take(message.tensors, "header"))
    limit_bytes = state.attributes.storage_limit_bytes
    if size_bytes > limit_bytes:
        return Declined(reason=f"the model has {size_bytes} bytes, the device's limit is {limit_bytes}")
    return None


def _receive(
    state: DeviceState, message: CoarseModel, run: Callable[[Backbone, Samples], Features] | None = None
) -> tuple[DeviceMemory, CoarseReply]:
    """Store the coarse model, compute all features once, and sketch them."""
    memory, splits = memory_of(message), ["train", "validation", "test"]
    backbone = memory.backbone()
    if state.data.unlabelled is not None and message.refine.unlabelled and len(state.data.unlabelled):
        splits.append("unlabelled")
    for name in splits:
        memory = memory.with_features(name, (run or _run)(backbone, split_of(state.data, name)))
    header = memory.header_of(memory.coarse)
    scores = scores_of(memory, header, state.data, "validation")
    return memory, CoarseReply(step=message.step, tensors=_sketch(memory, state), scores=scores)


def _unchanged(state: DeviceState, message: DeviceMessage) -> tuple[DeviceMemory, Message]:
    """What is answered, in the form of every answer, by a device that learned nothing from its data."""
    if isinstance(message, CoarseModel):
        return _receive(state, message, _blank)
    memory, coarse = state.memory, state.memory.coarse
    if isinstance(message, RefineRound):
        shapes = importance_shapes(memory.header_of(coarse), memory.refine)
        tensors = put("importance", {name: torch.zeros(shape) for name, shape in shapes.items()})
        if memory.refine.exchange == "weights":
            tensors |= put("header", coarse)
        return memory, RoundReply(step=message.step, tensors=tensors, scores=NO_SCORES)
    if isinstance(message, Propose):
        losses = torch.zeros(len(ways_to_ship(memory.refine, len(memory.labels), private=True)))
        return memory, ProposeReply(step=message.step, num_samples=0, tensors={"losses": losses})
    return _reported(state, memory.header_of(coarse), None, message.step, ())


def _refine(state: DeviceState, message: RefineRound) -> tuple[DeviceMemory, RoundReply]:
    """Take the personal tensors and score them, train the header on private data, score its neurons."""
    memory = _take_personal(state.memory, message.tensors, message.round - 1)
    header = memory.header_of(memory.refined)
    prior = training_prior(memory, state.data)
    came = scores_of(memory, header, state.data, "validation", prior)
    average = NO_SCORES
    if whole := take(message.tensors, "average"):
        average = scores_of(memory, memory.header_of(whole), state.data, "validation", prior)
    during = _train_round(header, memory, state, message.round, together=True)
    features, labels = memory.features("train"), state.data.train.labels
    tensors: dict[str, Tensor] = {}
    if memory.refine.scores_importance:
        tensors = put("importance", importance_set(header, features, labels, memory.refine, during))
    own = weights_of(header)
    if memory.refine.exchange == "weights":
        tensors |= put("header", with_dropped_as_shipped(header, own, memory.kept, memory.coarse))
    memory = memory.with_weights(own=own, refined=own)
    scores = scores_of(memory, header, state.data, "validation")
    return memory, RoundReply(step=message.step, tensors=tensors, scores=scores, came=came, average=average)


def _propose(state: DeviceState, message: Propose) -> tuple[DeviceMemory, ProposeReply]:
    """Take the last personal tensors; score every way to ship on the validation split.

    Logits are computed once a header; a way's prior counts all of the device's samples but the one that is scored, as
    what ships counts all.
    """
    memory = _settled(state, message.tensors)
    ways = ways_to_ship(memory.refine, len(memory.labels), state.privacy is not None)
    labels = state.data.validation.labels
    losses = torch.zeros(len(ways))
    if len(labels):
        logits_of_header: dict[str, Tensor] = {}
        priors: dict[tuple[float | None, float | None], Tensor] = {
            (way.prior_strength, way.prior_classes): left_out_priors(memory, state.data, way)
            for way in ways
            if way.prior_strength is not None and way.shift_concentration is None
        }
        left_out, of_left_out = torch.unique(labels, return_inverse=True)
        looking = {w: priors[w.prior_strength, w.prior_classes][left_out] for w in ways if w.shift_concentration}
        moved_by = moved_by_inputs(memory, state.data, looking)
        for i, way in enumerate(ways):
            if way.header not in logits_of_header:
                header = header_of_way(memory, way)
                logits_of_header[way.header] = logits_of(memory, header, state.data, "validation")
            logits = logits_of_header[way.header] / way.temperature
            if way.prior_strength is not None:
                logits = logits + priors[way.prior_strength, way.prior_classes][labels]
                if way in moved_by:
                    logits = logits + moved_by[way][of_left_out]
            loss = float(cross_entropy(logits, labels))
            # What others' weights do to a header here is no reason to be refused.
            most = min(MAX_LOSS, 0.9 * MAX_VALUE / len(labels))
            losses[i] = len(labels) * (min(loss, most) if not math.isnan(loss) else most)
    return memory, ProposeReply(step=message.step, num_samples=len(labels), tensors={"losses": losses})


def _finish(state: DeviceState, message: Finish) -> tuple[DeviceMemory, FinishReply]:
    """Build what is shipped, compare it with the coarse model and with local fine-tuning, and report.

    What is clearly worse than the coarse model on the device's own validation samples is not shipped, whatever the
    cluster decided: others may lie, or have quite other data.
    """
    memory, data, way = state.memory, state.data, message.way
    if memory.step < message.step - 1:  # it missed the proposal
        memory = _settled(state, message.tensors)
    if not memory.local:
        memory = _with_local(memory, state)
    coarse = memory.header_of(memory.coarse)
    header = header_of_way(memory, way)
    if way.header in ("refined", "own"):
        header = extract(header, memory.kept)
    prior = torch.zeros(len(memory.labels), device=data.train.labels.device)
    if way.prior_strength is not None:
        prior = prior_of(memory, all_counts(memory, data), way)
        prior = prior + moved_by_inputs(memory, data, {way: prior}).get(way, 0.0)
    with torch.no_grad():
        last = header.last_linear
        last.weight.div_(way.temperature)
        last.bias.div_(way.temperature).add_(prior)
    expected = expected_shares(memory, data, way, prior)
    notes: tuple[str, ...] = ()
    features, labels = memory.features("validation"), data.validation.labels
    if told := worse_than_sent(coarse, header, features, labels):
        log.warning("device %s ships the model as it was sent: %s", state.attributes.device_id, told)
        header, notes = coarse, (f"shipped as it was sent: {told}",)
        expected = expected_shares(memory, data, Way(header="coarse"), torch.zeros_like(prior))
    local = memory.header_of(memory.local)
    return _reported(replace(state, memory=memory), header, local, message.step, notes, expected)


def _reported(
    state: DeviceState,
    header: Header,
    local: Header | None,
    step: int,
    notes: tuple[str, ...],
    expected: tuple[float, ...] = (),
) -> tuple[DeviceMemory, FinishReply]:
    """What is shipped, and the report on it; ``local`` is None where fine-tuning alone came to nothing."""
    data, coarse = state.data, state.memory.header_of(state.memory.coarse)
    memory = state.memory.with_weights(shipped=weights_of(header))
    model = shipped_model(memory)
    report = DeviceReport(
        device_id=state.attributes.device_id,
        accuracy_coarse=accuracy_of(memory, coarse, data),
        accuracy_local=None if local is None else accuracy_of(memory, local, data),
        accuracy=accuracy_of(memory, header, data),
        num_train=len(data.train),
        num_test=len(data.test),
        parameters=num_parameters(model),
        size_bytes=stored_size_bytes(memory.backbone_weights, memory.shipped),
        limit_bytes=state.attributes.storage_limit_bytes,
        kept_neurons=sum(layer.num_neurons for layer in prunable_layers(header).values()),
        neurons=sum(layer.num_neurons for layer in prunable_layers(coarse).values()),
        notes=(*notes, *_notes(data, len(memory.labels), nothing_to_drop(coarse, memory.refine))),
    )
    if report.size_bytes > report.limit_bytes:
        raise ValueError(
            f"device {report.device_id}: its model has {report.size_bytes} bytes, its limit is {report.limit_bytes}"
        )
    seen = set() if state.privacy else set(data.train.labels.tolist())
    trained_on = tuple(name for i, name in enumerate(memory.labels) if i in seen)
    update = {"report": report, "trained_on": trained_on}
    if expected and not state.privacy:
        update |= {"expected_shares": expected, "shifts": trusted_shifts(memory, header, data, expected)}
    memory = memory.model_copy(update=update)
    return memory, FinishReply(step=step, report=report)


# -- parts ------------------------------------------------------------------------------------------------------------


def _on(message: M, torch_device: torch.device) -> M:
    """The same with its tensors on this hardware."""
    return message.model_copy(update={"tensors": {n: moved(t, torch_device) for n, t in message.tensors.items()}})


def _run(backbone: Backbone, samples: Samples) -> Features:
    with torch.no_grad():
        return concatenated([backbone(inputs) for inputs in samples.inputs.batches()])


def _blank(backbone: Backbone, samples: Samples) -> Features:
    """Features that say nothing, of as many samples."""
    shape = backbone.feature_shape
    zeros = torch.zeros(len(samples), shape.num_tokens, shape.channels, device=samples.labels.device)
    return Features(zeros, zeros.clone())


def _take_personal(memory: DeviceMemory, tensors: Mapping[str, Tensor], times: int) -> DeviceMemory:
    """Load the personal header, if one came, and drop neurons by the personal importance set for the n-th time."""
    if not tensors:
        return memory
    tensors = personal_without_noise(tensors, memory.coarse)
    header = memory.header_of(take(tensors, "header") or memory.refined)
    kept = memory.kept
    if importance := take(tensors, "importance"):
        kept = drop_least_important(header, importance, kept, memory.refine, times)
        apply_masks(header, kept)
    return memory.with_weights(refined=weights_of(header), kept=kept)


def _settled(state: DeviceState, tensors: Mapping[str, Tensor]) -> DeviceMemory:
    """The memory after the last personal tensors, the last fine-tuning if there is one, and training alone."""
    memory = _take_personal(state.memory, tensors, state.memory.refine.rounds)
    if memory.refine.fine_tune:
        header = memory.header_of(memory.refined)
        _train_round(header, memory, state, memory.refine.rounds + 1, together=True)
        memory = memory.with_weights(refined=weights_of(header))
    return _with_local(memory, state)


def _with_local(memory: DeviceMemory, state: DeviceState) -> DeviceMemory:
    """The memory with a header that was fine-tuned here alone: as in the first round, or as in all where all are done.

    Neither prior, anchor nor others' weights: plain fine-tuning, on the batches of the rounds.
    """
    refine = memory.refine
    header = memory.header_of(memory.coarse)
    for number in range(1, 2 if refine.settle else refine.rounds + refine.fine_tune + 1):
        _train_round(header, memory, state, number, together=False)
    return memory.with_weights(local=weights_of(header))


def _train_round(
    header: Header, memory: DeviceMemory, state: DeviceState, number: int, together: bool
) -> dict[str, Tensor]:
    """One round on private data; alone (not together) it is plain fine-tuning on the same batches."""
    refine = memory.refine
    device_id = state.attributes.device_id
    balanced = together and refine.balanced_training
    return train_header(
        header,
        memory.features("train"),
        state.data.train.labels,
        refine,
        named_generator(memory.seed, "device", device_id, "round", number),
        f"device {device_id}, round {number} (refine.learning_rate)",
        epochs=refine.epochs_of(number),
        anchor=memory.coarse if together else None,
        kept=memory.kept if together else None,
        offset=training_prior(memory, state.data) if balanced else None,
    )


def _sketch(memory: DeviceMemory, state: DeviceState) -> dict[str, Tensor]:
    """What the edge compares devices by: some [CLS] features, or quantiles of all of them on shared directions."""
    refine = memory.refine
    if refine.similarity == "labels":
        return {"sketch.counts": class_counts(state.data.train, len(memory.labels)).cpu()}
    if not refine.shows_sketch:
        return {}
    features = memory.features("train").output[:, 0].cpu()  # like the edge, which compares them
    order = torch.randperm(len(features), generator=named_generator(memory.seed, "sketch", state.attributes.device_id))
    features = features[order]
    if refine.sketch == "samples":
        return {"sketch.all": features[: refine.sketch_samples]}
    directions = random_projections(features.shape[1], SKETCH_PROJECTIONS, named_generator(memory.seed, "projections"))
    halves = features[: len(features) // 2], features[-(len(features) // 2) :]
    first, second = halves if len(features) > 1 else (features, features)
    return {
        f"sketch.{name}": sketch_quantiles(part, directions, refine.sketch_samples)
        for name, part in (("all", features), ("first", first), ("second", second))
    }


def _notes(data: Split, num_classes: int, of_pruning: str | None) -> tuple[str, ...]:
    """What a reader of the report should know about this device's data, in counts only, and about its header."""
    notes = [of_pruning] if of_pruning else []
    present = int((class_counts(data.train, num_classes) > 0).sum())
    if len(data.train) == 1:
        notes.append("one training sample")
    if present == 1:
        notes.append(ONE_CLASS_NOTE)
    if len(data.test) == 0:
        notes.append("no test samples: accuracies are not known")
    if len(data.validation) == 0:
        notes.append("no validation samples: no voice in what the cluster ships")
    return tuple(notes)
