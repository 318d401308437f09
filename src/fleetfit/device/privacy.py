"""What a device sends when ``[privacy]`` is on: every part that depends on its data is clipped, noised, or left out.

One device's samples, all of them together, are the unit: whatever they are replaced by, what the device sends over a
whole run changes by no more than (epsilon, delta) allows. So a person's whole device is hidden, not a sample among its
others, and nobody has to be trusted with more. Nothing depends on how a device trains. See docs/security.md.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fleetfit.config.job import Job
from fleetfit.config.sections import PrivacyConfig, RefineConfig
from fleetfit.core.encoding import Message, put, take
from fleetfit.core.progress import Progress
from fleetfit.core.records import NO_SCORES
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
)
from fleetfit.device.ways import ways_to_ship
from fleetfit.method.aggregation import unit_sum
from fleetfit.method.noise import SIMPLEX_SENSITIVITY, clipped, epsilon_of, flat, secret_noise, shaped, shrunk

logger = logging.getLogger(__name__)
NOTE = "privacy: accuracies and numbers of samples stay on the device"


def releases(refine: RefineConfig) -> tuple[str, ...]:
    """The noised parts of what one device sends over a whole run; everything else says nothing of its data."""
    in_a_round = ["header"] * (refine.exchange == "weights") + ["importance"] * (refine.prune_share > 0)
    return (
        *["sketch"] * (refine.shows_sketch or refine.similarity == "labels"),
        *in_a_round * refine.rounds,
        *["losses"] * (refine.guard or refine.class_prior),  # else there is one way to ship
    )


def promise(job: Job) -> dict[str, Any] | None:
    """What each device of a job is promised, for the log and the summary; None where nothing is.

    Raises:
        ImportError: the accountant is missing.
    """
    if not job.privacy.on:
        return None
    parts = releases(job.refine)
    return {
        "epsilon": epsilon_of(job.privacy.noise_multiplier, len(parts), job.privacy.delta),
        "delta": job.privacy.delta,
        "unit": "all samples of one device, replaced by any others",
        "mechanism": "Gaussian noise on clipped vectors; all that one device sends in one run, composed",
        "noise_multiplier": job.privacy.noise_multiplier,
        "releases": {part: parts.count(part) for part in dict.fromkeys(parts)},
    }


def tell_promise(job: Job, progress: Progress) -> None:
    """Say before anything is sent what is promised, on the progress line and in the log.

    Raises:
        ImportError: the accountant is missing.
    """
    if promised := promise(job):
        number = sum(promised["releases"].values())
        text = f"epsilon {promised['epsilon']:.3g} at delta {promised['delta']:g} for each device, {number} releases"
        logger.info("privacy: %s", text)
        progress("privacy", 1, 1, text)


def digest(message: Message) -> bytes:
    """What tells a message from any other. (Its encoding will not do: the order of the format's metadata is free.)"""
    found = hashlib.sha256(f"{message.kind}\n{message.model_dump_json()}".encode())
    for name, tensor in sorted(message.tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.digest()


@dataclass(frozen=True)
class DevicePrivacy:
    """A device's own setting, to which it keeps whatever its edge asks for.

    The key is the device's secret: noise is a function of it and of the message that is answered, so that a repeated
    message gets the same reply, and two different ones never the same noise. Whoever keeps the device must see to it
    that each step is answered once (``privacy_ledger``).
    """

    config: PrivacyConfig
    refine: RefineConfig
    key: bytes

    def check(self, message: DeviceMessage) -> None:
        """Refuse what was not counted: other steps, more rounds, another way to refine than this device agreed to.

        Raises:
            ValueError: with what was expected.
        """
        last = 2 + self.refine.rounds
        kinds: dict[int, type[DeviceMessage]] = {0: AttributesRequest, 1: CoarseModel, last: Propose, last + 1: Finish}
        if message.step > last + 1:
            raise ValueError(
                f"privacy: step must be <= {last + 1} with {self.refine.rounds} rounds, got {message.step}"
            )
        expected = kinds.get(message.step, RefineRound)
        if not isinstance(message, expected):
            raise ValueError(f"privacy: step {message.step} must be a {expected.kind!r}, got a {message.kind!r}")
        if isinstance(message, RefineRound) and message.round != message.step - 1:
            raise ValueError(f"privacy: step {message.step} is round {message.step - 1}, got round {message.round}")
        if isinstance(message, CoarseModel) and message.refine != self.refine:
            mine, theirs = self.refine.model_dump(), message.refine.model_dump()
            key = next(key for key in mine if mine[key] != theirs[key])
            raise ValueError(
                f"privacy: refine.{key} must be {mine[key]!r} as in this device's job, got {theirs[key]!r}"
            )

    def protected(self, message: DeviceMessage, reply: Message, coarse: Mapping[str, Tensor]) -> Message:
        """The reply as it may leave the device.

        Args:
            message: What is answered.
            reply: The answer without protection.
            coarse: The header as it was first sent to this device, which its edge knows.

        Raises:
            ValueError: a reply of a kind of which it is not known how to protect it.
        """
        if isinstance(reply, AttributesReply):
            attributes = reply.attributes.model_copy(update={"num_samples": 0})
            return reply.model_copy(update={"attributes": attributes})
        if isinstance(reply, CoarseReply):
            return reply.model_copy(update={"tensors": self._sketch(message, reply), "scores": NO_SCORES})
        if isinstance(reply, RoundReply):
            tensors = put("importance", self._importance(message, take(reply.tensors, "importance")))
            if header := take(reply.tensors, "header"):
                tensors |= put("header", self._header(message, header, coarse))
            noise = self.config.noise_of(self.config.clip_header) if header else 0.0
            said = dict.fromkeys(("scores", "came", "average"), NO_SCORES)
            return reply.model_copy(update={"tensors": tensors, **said, "noise": noise})
        if isinstance(reply, ProposeReply):
            return self._losses(message, reply)
        if isinstance(reply, FinishReply):
            unknown = {"accuracy_coarse": None, "accuracy_local": None, "accuracy": None, "num_train": 0, "num_test": 0}
            report = reply.report.model_copy(update={**unknown, "notes": (NOTE,)})
            return reply.model_copy(update={"report": report, "tensors": {}})
        raise ValueError(f"privacy: a {reply.kind!r} cannot be protected")

    def _released(
        self, vector: Tensor, noise: float, message: DeviceMessage, part: str, like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        label = digest(message) + part.encode()
        return shaped(vector + noise * secret_noise(self.key, label, len(vector)), like)

    def _sketch(self, message: DeviceMessage, reply: CoarseReply) -> dict[str, Tensor]:
        if not reply.tensors:
            return {}
        vector = flat(reply.tensors)
        norm = self.config.clip_sketch * len(vector) ** 0.5
        return self._released(clipped(vector, norm), self.config.noise_of(norm), message, "sketch", reply.tensors)

    def _importance(self, message: DeviceMessage, importance: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scaled to unit sum, as the edge does it anyway: no clipping is needed then. Negative ones become 0."""
        nothing = {name: torch.zeros_like(tensor) for name, tensor in importance.items()}
        if self.refine.prune_share == 0 or not importance:
            return nothing
        if not all(bool((t.isfinite() & (t >= 0)).all()) for t in importance.values()):
            importance = nothing  # a training went wrong
        noise = self.config.noise_multiplier * SIMPLEX_SENSITIVITY
        noised = self._released(flat(unit_sum(importance)), noise, message, "importance", importance)
        return {name: tensor.clamp(min=0) for name, tensor in noised.items()}

    def _header(
        self, message: DeviceMessage, header: Mapping[str, Tensor], coarse: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        known = flat(coarse)
        change = clipped(flat(header) - known, self.config.clip_header)
        return self._released(known + change, self.config.noise_of(self.config.clip_header), message, "header", header)

    def _losses(self, message: DeviceMessage, reply: ProposeReply) -> ProposeReply:
        """Of the ways that may ship, the mean validation loss less that of the first one; each device counts alike."""
        losses = reply.tensors["losses"]
        ways = ways_to_ship(self.refine, 0, private=True)
        allowed = [i for i, way in enumerate(ways) if self.refine.guard or way.header == "refined"]
        said = torch.zeros_like(losses)
        if len(allowed) < 2:
            return reply.model_copy(update={"tensors": {"losses": said}, "num_samples": 0})
        mean = losses.double() / max(reply.num_samples, 1)
        above = {"losses": mean[allowed[1:]] - mean[allowed[0]]}
        noise = self.config.noise_of(self.config.clip_loss)
        noised = self._released(clipped(flat(above), self.config.clip_loss), noise, message, "losses", above)
        said[torch.tensor(allowed[1:])] = noised["losses"].to(said.dtype)
        return reply.model_copy(update={"tensors": {"losses": said}, "num_samples": 1, "noise": noise})


def personal_without_noise(tensors: Mapping[str, Tensor], coarse: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a personal message, its header's difference to the coarse one freed from what noise explains.

    The edge says in ``noise.header`` how much noise is in it; without that it is taken as it is.
    """
    header = take(tensors, "header")
    if not header or "noise.header" not in tensors:
        return tensors
    known = flat(coarse)
    return {
        **tensors,
        **put("header", shaped(known + shrunk(flat(header) - known, float(tensors["noise.header"])), header)),
    }
