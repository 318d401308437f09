"""What a device's reply must be like to be used, given what the device was asked. Here nobody trusts a device.

A link has already refused what is too long, is no message, or is of another kind. What passes here too has the names,
shapes and dtypes of the cluster's header, and numbers that are finite and of a size that real ones have. A device that
lies within these bounds keeps its weight in the averages and its voice in what ships.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fleetfit.config.sections import PrivacyConfig, RefineConfig
from fleetfit.core.bounds import FROM_DEVICE, MAX_LOSS, MAX_VALUE, Bounds, check_values
from fleetfit.core.encoding import Message, put, take
from fleetfit.core.records import (
    MAX_COUNT,
    MAX_WATTS_OR_SECONDS,
    DeviceAttributes,
    DeviceReport,
    ValidationScores,
    Way,
)
from fleetfit.device.messages import (
    AttributesReply,
    CoarseModel,
    CoarseReply,
    DeviceMessage,
    DeviceReply,
    Finish,
    FinishReply,
    Propose,
    ProposeReply,
    RefineRound,
    RoundReply,
)
from fleetfit.device.refinement import SKETCH_PROJECTIONS, importance_shapes
from fleetfit.device.ways import ways_to_ship
from fleetfit.method.quantisation import LEVELS
from fleetfit.models.header import Header

MAX_NOTES = 20
MAX_NOTE = 200  # characters
Like = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Expected:
    """What an edge can tell about valid replies: of its devices' attributes, and of the model that it sent them."""

    attributes: Mapping[str, DeviceAttributes] = field(default_factory=dict)
    refine: RefineConfig = field(default_factory=RefineConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    channels: int = 0
    num_classes: int = 0
    header: Mapping[str, Like] = field(default_factory=dict)
    importance: Mapping[str, Like] = field(default_factory=dict)
    rebuild: Callable[[Mapping[str, Tensor]], Header] | None = None


def expected_of(
    coarse: CoarseModel,
    attributes: Mapping[str, DeviceAttributes],
    privacy: PrivacyConfig | None = None,
    models: bool = False,
) -> Expected:
    """What follows from the coarse model, known attributes, the noise that was agreed, and whether models may come."""
    tensors = take(coarse.tensors, "header")
    importance = importance_shapes(coarse.header_of(tensors), coarse.refine)
    return Expected(
        attributes=attributes,
        refine=coarse.refine,
        channels=coarse.feature_shape.channels,
        num_classes=len(coarse.labels),
        header={name: (tuple(t.shape), t.dtype) for name, t in tensors.items()},
        privacy=privacy or PrivacyConfig(),
        importance={n: (s, torch.float32) for n, s in importance.items()},
        rebuild=coarse.header_of if models else None,
    )


def reply_bounds(request: DeviceMessage, expected: Expected) -> Bounds:
    """How much a reply to this request may hold: its tensors as they must be, and the fields beside them."""
    header, importance = (_num_bytes(likes) for likes in (expected.header, expected.importance))
    if isinstance(request, CoarseModel):
        most = (
            max(expected.refine.sketch_samples * max(expected.channels, 3 * SKETCH_PROJECTIONS), expected.num_classes)
            * 4
        )
    elif isinstance(request, RefineRound):
        most = header + importance
    elif isinstance(request, Finish):
        most = header + 8 * sum(math.prod(shape) for shape, _ in expected.importance.values())
    elif isinstance(request, Propose):
        most = 4 * len(_ways(expected))
    else:
        most = 0
    return FROM_DEVICE.within(8 + FROM_DEVICE.header_bytes + most, "the most that a reply to this may have")


def _num_bytes(likes: Mapping[str, Like]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in likes.values())


def check_reply(device: str, request: DeviceMessage, reply: Message, expected: Expected) -> None:
    """Whether a device's reply may be used.

    Raises:
        ValueError: it may not, and why.
    """
    if not isinstance(reply, request.reply) or not isinstance(reply, DeviceReply):
        raise ValueError(f"it is a {reply.kind!r}, expected a {request.reply.kind!r}")
    if reply.step != request.step:
        raise ValueError(f"it answers step {reply.step}, expected {request.step}")
    known = expected.attributes.get(device)
    if isinstance(reply, AttributesReply):
        _check_tensors(reply, {})
        check_attributes(reply.attributes, device)
    elif isinstance(reply, CoarseReply):
        _check_tensors(reply, _sketch(reply, expected))
        _check_scores(reply.scores, expected, known)
    elif isinstance(reply, RoundReply):
        header = _sent_header(expected)
        _check_tensors(reply, _put("importance", expected.importance) | header)
        for name, level in take(reply.tensors, "level").items():
            if bool((level < 0).any()) or float(level.max()) * LEVELS > MAX_VALUE:
                raise ValueError(f"tensor 'level.{name}' must be within 0 and {MAX_VALUE / LEVELS:g}")
        for name, tensor in take(reply.tensors, "importance").items():
            if bool((tensor < 0).any()):
                raise ValueError(f"importance of {name!r} must be >= 0, got {float(tensor.min()):g}")
        for scores in (reply.scores, reply.came, reply.average):
            _check_scores(scores, expected, known)
        _check_noise(reply.noise, expected.privacy.noise_of(expected.privacy.clip_header) if header else 0.0)
    elif isinstance(reply, ProposeReply):
        _check_tensors(reply, {"losses": ((len(_ways(expected)),), torch.float32)})
        _check_noise(reply.noise, expected.privacy.noise_of(expected.privacy.clip_loss))
        losses = reply.tensors["losses"]
        least, most = (float(losses.min()), float(losses.max()))
        _check_losses(reply.num_samples, least, most, expected, known)
    elif isinstance(reply, FinishReply):
        _check_model(reply, expected)
        check_report(reply.report, device)
        if known and reply.report.limit_bytes != known.storage_limit_bytes:
            raise ValueError(f"limit_bytes must be {known.storage_limit_bytes}, got {reply.report.limit_bytes}")


def check_attributes(attributes: DeviceAttributes, device: str) -> None:
    """Raises ValueError if they are another's, or no real device's."""
    if attributes.device_id != device:
        raise ValueError(f"device_id must be {device!r}, got {attributes.device_id!r}")
    _check_range("storage_limit_bytes", attributes.storage_limit_bytes, 1, MAX_COUNT)
    _check_range("num_samples", attributes.num_samples, 0, MAX_COUNT)
    for name, value in attributes.energy.model_dump().items():
        _check_range(name, value, 0, MAX_WATTS_OR_SECONDS)


def check_report(report: DeviceReport, device: str) -> None:
    """Raises ValueError if it is another's, or says what cannot be."""
    if report.device_id != device:
        raise ValueError(f"device_id must be {device!r}, got {report.device_id!r}")
    for name in ("accuracy_coarse", "accuracy_local", "accuracy"):
        if (accuracy := getattr(report, name)) is not None:
            _check_range(name, accuracy, 0, 1)
    for name in ("num_train", "num_test", "parameters", "neurons", "limit_bytes"):
        _check_range(name, getattr(report, name), 0, MAX_COUNT)
    _check_range("size_bytes", report.size_bytes, 1, report.limit_bytes)
    _check_range("kept_neurons", report.kept_neurons, 0, report.neurons)
    if len(report.notes) > MAX_NOTES or any(len(n) > MAX_NOTE or not n.isprintable() for n in report.notes):
        raise ValueError(f"notes must be at most {MAX_NOTES} lines of at most {MAX_NOTE} characters")


def _sketch(reply: CoarseReply, expected: Expected) -> dict[str, Like]:
    """The sketch as it must be; one of samples may have fewer rows, where the device has fewer."""
    most = expected.refine.sketch_samples
    if expected.refine.similarity == "labels":
        return {"sketch.counts": ((expected.num_classes,), torch.float32)}
    if not expected.refine.shows_sketch:
        return {}
    if expected.refine.sketch == "sliced":
        like = ((most, SKETCH_PROJECTIONS), torch.float32)
        return dict.fromkeys(("sketch.all", "sketch.first", "sketch.second"), like)
    sent = reply.tensors.get("sketch.all")
    rows = len(sent) if sent is not None and sent.ndim else 0
    return {"sketch.all": ((min(max(rows, 1), most), expected.channels), torch.float32)}


def _check_model(reply: FinishReply, expected: Expected) -> None:
    """The header as it is shipped, where models may come and one came: as it was sent, or with fewer neurons."""
    if expected.rebuild is None or not reply.tensors:
        _check_tensors(reply, {})
        return
    own = take(reply.tensors, "header")
    for name in reply.tensors.keys() - put("header", own).keys():
        raise ValueError(f"tensor {name!r} is unexpected")
    for name, tensor in own.items():
        like = expected.header.get(name)
        if like is None and (not name.endswith(".kept") or tensor.dtype != torch.int64 or tensor.ndim != 1):
            raise ValueError(f"tensor 'header.{name}' is unexpected")
        if like is not None and tensor.dtype != like[1]:
            raise ValueError(f"tensor 'header.{name}' must be {like[1]}, got {tensor.dtype}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"tensor 'header.{name}' must be finite")
    try:
        expected.rebuild(own)
    except (ValueError, RuntimeError, LookupError, TypeError) as error:  # whatever is built of what others say
        raise ValueError(f"its model cannot be built: {error}") from error


def _put(prefix: str, likes: Mapping[str, Like]) -> dict[str, Like]:
    return {f"{prefix}.{name}": like for name, like in likes.items()}


def _check_tensors(reply: Message, expected: Mapping[str, Like]) -> None:
    for name in (*expected, *reply.tensors):
        if name not in reply.tensors:
            raise ValueError(f"tensor {name!r} is missing")
        if name not in expected:
            raise ValueError(f"tensor {name!r} is unexpected")
    for name, (shape, dtype) in expected.items():
        tensor = reply.tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"tensor {name!r} must be {dtype} {shape}, got {got}")
    check_values(reply.tensors)


def _check_noise(noise: float, agreed: float) -> None:
    """A device that claims more would have everybody's average taken for noise."""
    if noise > agreed:
        raise ValueError(f"noise must be <= {agreed:g}, as [privacy] has it, got {noise:g}")


def _check_scores(scores: ValidationScores, expected: Expected, known: DeviceAttributes | None) -> None:
    _check_range("num_correct", scores.num_correct, 0, scores.num_samples)
    _check_losses(scores.num_samples, scores.loss_sum, scores.loss_sum, expected, known)


def _check_losses(
    num_samples: int, least: float, most: float, expected: Expected, known: DeviceAttributes | None
) -> None:
    there = max(known.num_samples, 1) if known else MAX_COUNT  # who is private says 0, and counts as 1
    _check_range("num_samples", num_samples, 0, there)
    bound = MAX_LOSS * max(num_samples, 1)
    for loss in (least, most):  # noise may be below 0
        _check_range("loss_sum", loss, -bound if expected.privacy.on else 0.0, bound * (1 + 1e-6))


def _sent_header(expected: Expected) -> dict[str, Like]:
    """The tensors in which a header comes after a round."""
    if expected.refine.exchange != "weights":
        return {}
    if expected.refine.bits == 32:
        return _put("header", expected.header)
    changes = {name: (shape, torch.int8) for name, (shape, _) in expected.header.items()}
    levels = {n: ((s[0] if len(s) > 1 else 1,), torch.float32) for n, (s, _) in expected.header.items()}
    return _put("change", changes) | _put("level", levels)


def _ways(expected: Expected) -> tuple[Way, ...]:
    return ways_to_ship(expected.refine, expected.num_classes, expected.privacy.on)


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # also what is not a number
        raise ValueError(f"{name} must be within {least:.16g} and {most:.16g}, got {value}")
