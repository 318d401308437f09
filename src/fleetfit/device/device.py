"""The device: the only code that sees private data. ``handle(state, message) -> (state, reply)``.

It freezes the backbone and computes its features once, trains the header on private data, scores the header's neurons
(Eqs. 16-18), drops those that the personal importance set says matter least (Algorithm 2), and builds what it ships.
"""

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from fleetfit.config.sections import RefineConfig
from fleetfit.core.bounds import MAX_LOSS, MAX_VALUE, FewLines, check_values
from fleetfit.core.encoding import Declined, Message, put, take
from fleetfit.core.hardware import CPU, moved
from fleetfit.core.randomness import named_generator
from fleetfit.core.records import (
    NO_SCORES,
    ONE_CLASS_NOTE,
    BackboneShape,
    DeviceAttributes,
    DeviceReport,
    HeaderKept,
    HeaderSpec,
    JsonDict,
    ValidationScores,
    Way,
)
from fleetfit.data.partition import Split
from fleetfit.data.samples import Samples
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
from fleetfit.device.ways import ways_to_ship
from fleetfit.method.class_prior import (
    ShiftPrior,
    class_prior,
    floored,
    harmless_shifts,
    label_shift,
    support_prior,
)
from fleetfit.method.similarity import random_projections, sketch_quantiles
from fleetfit.method.size import safetensors_size_bytes
from fleetfit.models.classifier import Classifier, num_parameters
from fleetfit.models.elastic import Backbone, backbone_from_state, check_state
from fleetfit.models.features import Features, FeatureShape, concatenated
from fleetfit.models.header import Header, header_from_state
from fleetfit.models.pruning import apply_masks, extract, prunable_layers
from fleetfit.models.training import predict, score

M = TypeVar("M", bound=Message)
log = logging.getLogger(__name__)
log.addFilter(FewLines())
TRAINING_PRIOR_STRENGTH = 3.0
FEWEST_TO_TRUST = 20  # validation samples; with fewer, training samples say too whether new shares can be trusted
SHIFT_STEPS = 20  # of estimating class shares on inputs: more change nothing that shows
BETWEEN = {"quarter": 0.25, "half": 0.5}  # how far from the coarse to the refined header


class DeviceMemory(Message):
    """What a device keeps between messages, savable as it is.

    Tensors: ``backbone.*``, ``features.<split>.*`` (computed once), ``coarse.*`` (the header as sent), ``header.*``
    (after its last training), ``refined.*`` (what the edge made for it, last), ``local.*`` (never met another's),
    ``kept.<layer>`` (neurons not dropped), ``shipped.*`` (the header at the end).
    """

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
        reply = state.privacy.protected(message, reply, take(memory.tensors, "coarse"))
    if isinstance(reply, RoundReply) and memory.refine.bits == 8 and memory.refine.exchange == "weights":
        reply = packed(reply, take(memory.tensors, "coarse"))
    return replace(own, memory=memory), reply


def shipped_model(memory: DeviceMemory) -> Classifier:
    """The model a finished device runs.

    Raises:
        ValueError: the device has not finished.
    """
    tensors = take(memory.tensors, "shipped")
    if not tensors:
        raise ValueError("this device has not finished: it has no model yet")
    return Classifier(_backbone(memory), _header(memory, tensors))


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
    backbone, coarse = take(message.tensors, "backbone"), take(message.tensors, "header")
    shape = check_state(message.family, message.config, backbone)
    header_from_state(message.header, shape, len(message.labels), coarse)
    if len(message.class_shares) != len(message.labels):
        rule = f"must be {len(message.labels)} shares, one a label"
        raise ValueError(f"class_shares {rule}, got {len(message.class_shares)}")
    held = {n: (tuple(t.shape), t.dtype) for n, t in (put("backbone.model", backbone) | put("header", coarse)).items()}
    size_bytes, limit_bytes = safetensors_size_bytes(held, {"format": "pt"}), state.attributes.storage_limit_bytes
    if size_bytes > limit_bytes:
        return Declined(reason=f"the model has {size_bytes} bytes, the device's limit is {limit_bytes}")
    return None


def _receive(
    state: DeviceState, message: CoarseModel, run: Callable[[Backbone, Samples], Features] | None = None
) -> tuple[DeviceMemory, CoarseReply]:
    """Store the coarse model, compute all features once, and sketch them."""
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
    coarse = take(message.tensors, "header")
    backbone, header = _backbone(memory), _header(memory, coarse)
    tensors = dict(memory.tensors)
    for name in ("train", "validation", "test"):
        features = (run or _run)(backbone, getattr(state.data, name))
        tensors |= put(f"features.{name}", {"output": features.output, "penultimate": features.penultimate})
        if features.mask is not None:
            tensors[f"features.{name}.mask"] = features.mask
    if state.data.unlabelled is not None and message.refine.unlabelled and len(state.data.unlabelled):
        features = (run or _run)(backbone, state.data.unlabelled)
        tensors |= put("features.unlabelled", {"output": features.output, "penultimate": features.penultimate})
        if features.mask is not None:
            tensors["features.unlabelled.mask"] = features.mask
    tensors |= put("coarse", coarse) | put("header", coarse) | put("refined", coarse)
    masks = {n: torch.ones(layer.num_neurons, dtype=torch.bool) for n, layer in prunable_layers(header).items()}
    memory = memory.model_copy(update={"tensors": tensors | put("kept", masks)})
    scores = _validation(memory, header, state.data)
    return memory, CoarseReply(step=message.step, tensors=_sketch(memory, state), scores=scores)


def _unchanged(state: DeviceState, message: DeviceMessage) -> tuple[DeviceMemory, Message]:
    """What is answered, in the form of every answer, by a device that learned nothing from its data."""
    if isinstance(message, CoarseModel):
        return _receive(state, message, _blank)
    memory, nothing = state.memory, ValidationScores(num_samples=0, loss_sum=0.0, num_correct=0)
    coarse = take(memory.tensors, "coarse")
    if isinstance(message, RefineRound):
        shapes = importance_shapes(_header(memory, coarse), memory.refine)
        tensors = put("importance", {name: torch.zeros(shape) for name, shape in shapes.items()})
        if memory.refine.exchange == "weights":
            tensors |= put("header", coarse)
        return memory, RoundReply(step=message.step, tensors=tensors, scores=nothing)
    if isinstance(message, Propose):
        losses = torch.zeros(len(ways_to_ship(memory.refine, len(memory.labels), private=True)))
        return memory, ProposeReply(step=message.step, num_samples=0, tensors={"losses": losses})
    return _reported(state, _header(memory, coarse), None, message.step, ())


def _refine(state: DeviceState, message: RefineRound) -> tuple[DeviceMemory, RoundReply]:
    """Take the personal tensors and score them, train the header on private data, score its neurons."""
    memory = _take_personal(state.memory, message.tensors, message.round - 1)
    header = _header(memory, take(memory.tensors, "refined"))
    prior = _training_prior(memory, state.data)
    came = _validation(memory, header, state.data, prior)
    average = NO_SCORES
    if whole := take(message.tensors, "average"):
        average = _validation(memory, _header(memory, whole), state.data, prior)
    during = _train_round(header, memory, state, message.round, together=True)
    features, labels = _features(memory, "train"), state.data.train.labels
    tensors: dict[str, Tensor] = {}
    if memory.refine.scores_importance:
        tensors = put("importance", importance_set(header, features, labels, memory.refine, during))
    own = _detached(header)
    if memory.refine.exchange == "weights":
        kept, coarse = take(memory.tensors, "kept"), take(memory.tensors, "coarse")
        tensors |= put("header", with_dropped_as_shipped(header, own, kept, coarse))
    memory = memory.model_copy(update={"tensors": memory.tensors | put("header", own) | put("refined", own)})
    scores = _validation(memory, header, state.data)
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
        logits_of: dict[str, Tensor] = {}
        priors: dict[tuple[float | None, float | None], Tensor] = {
            (way.prior_strength, way.prior_classes): _left_out_priors(memory, state.data, way)
            for way in ways
            if way.prior_strength is not None and way.shift_concentration is None
        }
        left_out, of_left_out = torch.unique(labels, return_inverse=True)
        looking = {w: priors[w.prior_strength, w.prior_classes][left_out] for w in ways if w.shift_concentration}
        moved_by = _moved_by(memory, state.data, looking)
        for i, way in enumerate(ways):
            if way.header not in logits_of:
                logits_of[way.header] = _logits(memory, _header_of(memory, way), state.data.validation, "validation")
            logits = logits_of[way.header] / way.temperature
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
    if not take(memory.tensors, "local"):
        memory = _with_local(memory, state)
    coarse = _header(memory, take(memory.tensors, "coarse"))
    header = _header_of(memory, way)
    if way.header in ("refined", "own"):
        header = extract(header, take(memory.tensors, "kept"))
    prior = torch.zeros(len(memory.labels), device=data.train.labels.device)
    if way.prior_strength is not None:
        prior = _prior(memory, _all_counts(memory, data), way)
        prior = prior + _moved_by(memory, data, {way: prior}).get(way, 0.0)
    with torch.no_grad():
        last = header.last_linear
        last.weight.div_(way.temperature)
        last.bias.div_(way.temperature).add_(prior)
    expected = _expected_shares(memory, data, way, prior)
    notes: tuple[str, ...] = ()
    features, labels = _features(memory, "validation"), data.validation.labels
    if told := worse_than_sent(coarse, header, features, labels):
        log.warning("device %s ships the model as it was sent: %s", state.attributes.device_id, told)
        header, notes = coarse, (f"shipped as it was sent: {told}",)
        expected = _expected_shares(memory, data, Way(header="coarse"), torch.zeros_like(prior))
    local = _header(memory, take(memory.tensors, "local"))
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
    data, coarse = state.data, _header(state.memory, take(state.memory.tensors, "coarse"))
    memory = state.memory.model_copy(update={"tensors": state.memory.tensors | put("shipped", _detached(header))})
    model = shipped_model(memory)
    report = DeviceReport(
        device_id=state.attributes.device_id,
        accuracy_coarse=_test_accuracy(memory, coarse, data),
        accuracy_local=None if local is None else _test_accuracy(memory, local, data),
        accuracy=_test_accuracy(memory, header, data),
        num_train=len(data.train),
        num_test=len(data.test),
        parameters=num_parameters(model),
        size_bytes=_size_bytes(model),
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
        update |= {"expected_shares": expected, "shifts": _shifts(memory, header, data, expected)}
    memory = memory.model_copy(update=update)
    return memory, FinishReply(step=step, report=report)


# -- parts ------------------------------------------------------------------------------------------------------------


def _on(message: M, torch_device: torch.device) -> M:
    """The same with its tensors on this hardware."""
    return message.model_copy(update={"tensors": {n: moved(t, torch_device) for n, t in message.tensors.items()}})


def _backbone(memory: DeviceMemory) -> Backbone:
    tensors = take(memory.tensors, "backbone")
    backbone = backbone_from_state(memory.family, memory.config, tensors)
    return backbone.to(next(iter(tensors.values())).device).eval()


def _feature_shape(memory: DeviceMemory) -> FeatureShape:
    return _feature_shape_of(memory.family, json.dumps(memory.config, sort_keys=True))


@functools.lru_cache(maxsize=16)
def _feature_shape_of(family: str, config: str) -> FeatureShape:
    """Asked for several times in each step, and each time a model would be built for it."""
    with torch.device("meta"):
        return Backbone(family, json.loads(config)).feature_shape


def _header(memory: DeviceMemory, tensors: Mapping[str, Tensor]) -> Header:
    header = header_from_state(memory.header, _feature_shape(memory), len(memory.labels), tensors)
    return header.to(next(iter(tensors.values())).device)


def _detached(header: Header) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in header.state_dict().items()}


def _run(backbone: Backbone, samples: Samples) -> Features:
    with torch.no_grad():
        return concatenated([backbone(inputs) for inputs in samples.inputs.batches()])


def _blank(backbone: Backbone, samples: Samples) -> Features:
    """Features that say nothing, of as many samples."""
    shape = backbone.feature_shape
    zeros = torch.zeros(len(samples), shape.num_tokens, shape.channels, device=samples.labels.device)
    return Features(zeros, zeros.clone())


def _size_bytes(model: Classifier) -> int:
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    return safetensors_size_bytes(shapes, {"format": "pt"})


def _features(memory: DeviceMemory, split: str) -> Features:
    return Features(**take(memory.tensors, f"features.{split}"))


def _counts(samples: Samples, num_classes: int) -> Tensor:
    return torch.bincount(samples.labels, minlength=num_classes).float()


def _take_personal(memory: DeviceMemory, tensors: Mapping[str, Tensor], times: int) -> DeviceMemory:
    """Load the personal header, if one came, and drop neurons by the personal importance set for the n-th time."""
    if not tensors:
        return memory
    tensors = personal_without_noise(tensors, take(memory.tensors, "coarse"))
    header = _header(memory, take(tensors, "header") or take(memory.tensors, "refined"))
    kept = take(memory.tensors, "kept")
    if importance := take(tensors, "importance"):
        kept = drop_least_important(header, importance, kept, memory.refine, times)
        apply_masks(header, kept)
    return memory.model_copy(update={"tensors": memory.tensors | put("refined", _detached(header)) | put("kept", kept)})


def _settled(state: DeviceState, tensors: Mapping[str, Tensor]) -> DeviceMemory:
    """The memory after the last personal tensors, the last fine-tuning if there is one, and training alone."""
    memory = _take_personal(state.memory, tensors, state.memory.refine.rounds)
    if memory.refine.fine_tune:
        header = _header(memory, take(memory.tensors, "refined"))
        _train_round(header, memory, state, memory.refine.rounds + 1, together=True)
        memory = memory.model_copy(update={"tensors": memory.tensors | put("refined", _detached(header))})
    return _with_local(memory, state)


def _with_local(memory: DeviceMemory, state: DeviceState) -> DeviceMemory:
    """The memory with a header that was fine-tuned here alone: as in the first round, or as in all where all are done.

    Neither prior, anchor nor others' weights: plain fine-tuning, on the batches of the rounds.
    """
    refine = memory.refine
    header = _header(memory, take(memory.tensors, "coarse"))
    for number in range(1, 2 if refine.settle else refine.rounds + refine.fine_tune + 1):
        _train_round(header, memory, state, number, together=False)
    return memory.model_copy(update={"tensors": memory.tensors | put("local", _detached(header))})


def _train_round(
    header: Header, memory: DeviceMemory, state: DeviceState, number: int, together: bool
) -> dict[str, Tensor]:
    """One round on private data; alone (not together) it is plain fine-tuning on the same batches."""
    refine = memory.refine
    device_id = state.attributes.device_id
    balanced = together and refine.balanced_training
    return train_header(
        header,
        _features(memory, "train"),
        state.data.train.labels,
        refine,
        named_generator(memory.seed, "device", device_id, "round", number),
        f"device {device_id}, round {number} (refine.learning_rate)",
        epochs=refine.epochs_of(number),
        anchor=take(memory.tensors, "coarse") if together else None,
        kept=take(memory.tensors, "kept") if together else None,
        offset=_training_prior(memory, state.data) if balanced else None,
    )


def _header_of(memory: DeviceMemory, way: Way) -> Header:
    """The header of a way to ship, without its temperature and prior."""
    if way.header in BETWEEN:
        coarse, refined = take(memory.tensors, "coarse"), take(memory.tensors, "refined")
        share = BETWEEN[way.header]
        between = {n: t.lerp(refined[n], share) if t.is_floating_point() else t for n, t in coarse.items()}
        return _header(memory, between)
    return _header(memory, take(memory.tensors, "header" if way.header == "own" else way.header))


def _shares(memory: DeviceMemory, like: Tensor) -> Tensor:
    return moved(torch.tensor(memory.class_shares, dtype=like.dtype), like.device)


def _all_counts(memory: DeviceMemory, data: Split) -> Tensor:
    return _counts(data.train, len(memory.labels)) + _counts(data.validation, len(memory.labels))


def _prior(memory: DeviceMemory, counts: Tensor, way: Way) -> Tensor:
    """log p - log q of a way, for one or many rows of counts."""
    assert way.prior_strength is not None, "only ways with a prior have one"
    if way.prior_classes is None:
        return class_prior(counts, _shares(memory, counts), way.prior_strength)
    return support_prior(counts, _shares(memory, counts), way.prior_strength, way.prior_classes)


def _training_prior(memory: DeviceMemory, data: Split) -> Tensor | None:
    """What is added to logits in training and while rounds are scored, before anything was chosen."""
    if not memory.refine.class_prior:
        return None
    counts = _counts(data.train, len(memory.labels))
    return class_prior(counts, _shares(memory, counts), TRAINING_PRIOR_STRENGTH)


def _expected_shares(memory: DeviceMemory, data: Split, way: Way, prior: Tensor) -> tuple[float, ...]:
    """The class shares that a header with this prior (log p - log q) takes for granted.

    A header that was trained here without the prior in its logits has learned the device's own shares.
    """
    log_shares = floored(_shares(memory, prior)).log()
    if way.header == "local" or (way.header != "coarse" and not memory.refine.balanced_training):
        log_shares = log_shares + class_prior(
            _counts(data.train, len(prior)), log_shares.exp(), TRAINING_PRIOR_STRENGTH
        )
    return tuple((log_shares + prior).softmax(-1).tolist())


def _shifts(memory: DeviceMemory, header: Header, data: Split, expected: tuple[float, ...]) -> tuple[ShiftPrior, ...]:
    """With which class shares may be estimated anew later, as the device's own labelled samples tell."""
    splits = ("validation",) if len(data.validation) >= FEWEST_TO_TRUST else ("train", "validation")
    logits, labels = [], []
    for name in splits:
        samples: Samples = getattr(data, name)
        if len(samples):
            logits.append(_logits(memory, header, samples, name).double())
            labels.append(samples.labels)
    shares = moved(torch.tensor(expected, dtype=torch.float64), data.train.labels.device)
    return harmless_shifts(torch.cat(logits), torch.cat(labels), shares)


def _left_out_priors(memory: DeviceMemory, data: Split, way: Way) -> Tensor:
    """Row c: the prior from all samples of the device but one of class c. [class class]"""
    counts = _all_counts(memory, data)
    left_out = (counts - torch.eye(len(counts), device=counts.device)).clamp(min=0)
    return _prior(memory, left_out, way)


def _moved_by(memory: DeviceMemory, data: Split, priors: Mapping[Way, Tensor]) -> dict[Way, Tensor]:
    """By how much the device's inputs without labels move the priors of ways that look at them, if there are any.

    Rows of priors are re-estimated each for itself; a prior is worth the labelled samples that it was made of. A header
    whose logits are not finite, by what others' weights do to it here, moves nothing.
    """
    features = take(memory.tensors, "features.unlabelled")
    worth = float(max(1, len(data.train) + len(data.validation)))
    logits_of: dict[HeaderKept, Tensor] = {}
    moved_by: dict[Way, Tensor] = {}
    for way, before in priors.items() if features else ():
        if way.shift_concentration is None:
            continue
        if way.header not in logits_of:
            with torch.no_grad():
                logits_of[way.header] = _header_of(memory, way)(Features(**features))
        logits = logits_of[way.header] / way.temperature
        if bool(logits.isfinite().all()):
            shares = _shares(memory, logits)
            moved_by[way] = label_shift(logits, before, shares, worth, way.shift_concentration, SHIFT_STEPS) - before
    return moved_by


def _sketch(memory: DeviceMemory, state: DeviceState) -> dict[str, Tensor]:
    """What the edge compares devices by: some [CLS] features, or quantiles of all of them on shared directions."""
    refine = memory.refine
    if refine.similarity == "labels":
        return {"sketch.counts": _counts(state.data.train, len(memory.labels)).cpu()}
    if not refine.shows_sketch:
        return {}
    features = _features(memory, "train").output[:, 0].cpu()  # like the edge, which compares them
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


def _validation(memory: DeviceMemory, header: Header, data: Split, prior: Tensor | None = None) -> ValidationScores:
    return _sums(memory, header, data.validation, "validation", prior)


def _sums(
    memory: DeviceMemory, header: Header, samples: Samples, split: str, prior: Tensor | None = None
) -> ValidationScores:
    if len(samples) == 0:
        return ValidationScores(num_samples=0, loss_sum=0.0, num_correct=0)
    logits = _logits(memory, header, samples, split)
    logits = logits if prior is None else logits + prior
    result = score(logits, samples.labels)
    # What others' weights do to a header here is no reason to be refused.
    loss = min(result.loss, MAX_LOSS) if not math.isnan(result.loss) else MAX_LOSS
    return ValidationScores(
        num_samples=len(samples),
        loss_sum=loss * len(samples),
        num_correct=round(result.accuracy * len(samples)),
    )


def _logits(memory: DeviceMemory, header: Header, samples: Samples, split: str) -> Tensor:
    features = _features(memory, split)
    return predict(lambda rows: header(features.rows(rows)), len(samples), torch_device=samples.labels.device)


def _test_accuracy(memory: DeviceMemory, header: Header, data: Split) -> float | None:
    if len(data.test) == 0:
        return None
    result = _sums(memory, header, data.test, "test")
    return result.num_correct / result.num_samples


def _notes(data: Split, num_classes: int, of_pruning: str | None) -> tuple[str, ...]:
    """What a reader of the report should know about this device's data, in counts only, and about its header."""
    notes = [of_pruning] if of_pruning else []
    present = int((_counts(data.train, num_classes) > 0).sum())
    if len(data.train) == 1:
        notes.append("one training sample")
    if present == 1:
        notes.append(ONE_CLASS_NOTE)
    if len(data.test) == 0:
        notes.append("no test samples: accuracies are not known")
    if len(data.validation) == 0:
        notes.append("no validation samples: no voice in what the cluster ships")
    return tuple(notes)
