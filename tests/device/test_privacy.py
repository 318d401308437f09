"""[privacy]: nothing that depends on a device's data goes up without noise, and no more than was counted.

One device's whole life by a script of messages. The strongest check takes the noised parts out and sees that what is
left is the same whatever the data.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fleetfit.config.job import Job, make_job
from fleetfit.config.sections import PrivacyConfig, RefineConfig
from fleetfit.core.encoding import Message, encode, put, take
from fleetfit.core.files import read_json
from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import NO_SCORES, DeviceAttributes, EnergyModel, HeaderSpec, Way
from fleetfit.data.partition import Split
from fleetfit.data.samples import Inputs, Samples
from fleetfit.device import handler
from fleetfit.device import privacy as module
from fleetfit.device.device import DeviceState, handle
from fleetfit.device.memory import DeviceMemory
from fleetfit.device.messages import (
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
from fleetfit.device.privacy import NOTE, DevicePrivacy, personal_without_noise, promise, releases
from fleetfit.device.privacy_ledger import LifetimeLedger, PrivacyLedger
from fleetfit.device.ways import ways_to_ship
from fleetfit.edge import rounds
from fleetfit.edge.messages import ClusterStats, decode_any
from fleetfit.edge.rounds import EdgeState
from fleetfit.edge.shipping import decide
from fleetfit.engines import local
from fleetfit.method.aggregation import unit_sum
from fleetfit.method.noise import clipped, epsilon_of, flat, secret_noise
from fleetfit.models.elastic import Backbone
from fleetfit.models.header import build_header
from fleetfit.runs.report import build_report

torch.set_num_threads(1)

CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "initializer_range": 0.3,
}
LABELS = ("a", "b", "c", "d")
KEY = bytes(range(32))
CLIPS: dict[str, Any] = {"clip_header": 0.01, "clip_sketch": 0.1, "clip_loss": 0.02}  # so that all is clipped
ROUNDS = 2
REFINE: dict[str, Any] = {
    "rounds": ROUNDS,
    "epochs": 1,
    "sketch": "sliced",
    "prune_share": 0.3,
    "similarity": "calibrated",
    "bits": 32,
}
WAYS: dict[str, dict[str, Any]] = {
    "all": {},
    "without pruning": {"prune_share": 0.0},
    "without weights": {"exchange": "importance"},
    "without sketch": {"similarity": "average"},
    "without guard": {"guard": False},
    "without choice": {"guard": False, "class_prior": False},
    "with parameters": {"importance": "parameter"},
}


# -- a device's life --------------------------------------------------------------------------------------------------


def make_samples(num: int, name: str, kind: int) -> Samples:
    generator = named_generator(kind, "samples", name)
    labels = torch.tensor([(i * (kind + 1)) % len(LABELS) for i in range(num)], dtype=torch.long)
    return Samples(Inputs.of(torch.randn(num, 1, 8, 8, generator=generator) + kind), labels, LABELS, 64)


def make_data(kind: int = 0) -> Split:
    """Kind 1 differs in everything: values, labels, numbers, and it has no validation samples."""
    train, validation, test = ((20, 8, 8), (7, 0, 3))[kind]
    return Split(
        make_samples(train, "train", kind),
        make_samples(validation, "validation", kind),
        make_samples(test, "test", kind),
    )


def make_private(noise_multiplier: float = 1.0, key: bytes = KEY, **refine: Any) -> DevicePrivacy:
    config = PrivacyConfig(noise_multiplier=noise_multiplier, **CLIPS)
    return DevicePrivacy(config, RefineConfig(**{**REFINE, **refine}), key)


def make_state(kind: int = 0, private: DevicePrivacy | None = None, name: str = "phones-1") -> DeviceState:
    attributes = DeviceAttributes(
        device_id=name, storage_limit_bytes=10**6, energy=EnergyModel(), num_samples=28 - kind
    )
    return DeviceState(attributes, make_data(kind), DeviceMemory(), privacy=private)


def coarse_header() -> dict[str, Tensor]:
    with seeded_init(0, "coarse"):
        backbone = Backbone("vit", CONFIG)
        header = build_header(HeaderSpec(kind="cnn_add", channels=4), backbone.feature_shape, len(LABELS))
    return dict(header.state_dict())


def script(**refine: Any) -> list[DeviceMessage]:
    """What an edge asks, whatever the replies; its personal tensors come out of the air."""
    config = RefineConfig(**{**REFINE, **refine})
    with seeded_init(0, "coarse"):
        backbone = Backbone("vit", CONFIG)
        header = build_header(HeaderSpec(kind="cnn_add", channels=4), backbone.feature_shape, len(LABELS))
    coarse = CoarseModel(
        step=1,
        family="vit",
        config=backbone.config,
        labels=LABELS,
        header=header.spec,
        refine=config,
        seed=5,
        class_shares=(0.1, 0.2, 0.3, 0.4),
        tensors=put("backbone", dict(backbone.model.state_dict())) | put("header", coarse_header()),
    )
    importance = take(life([AttributesRequest(step=0), coarse, RefineRound(step=2, round=1)])[2].tensors, "importance")
    personal = put("importance", {n: torch.rand(t.shape) for n, t in sorted(importance.items())})
    if config.exchange == "weights":
        personal |= put("header", {n: t + 0.05 for n, t in coarse_header().items()})
        personal["noise.header"] = torch.tensor(0.01, dtype=torch.float64)
    rounds = [RefineRound(step=1 + n, round=n, tensors=personal if n > 1 else {}) for n in range(1, ROUNDS + 1)]
    last = 2 + ROUNDS
    ends = [Propose(step=last, tensors=personal), Finish(step=last + 1, way=Way(header="refined"))]
    return [AttributesRequest(step=0), coarse, *rounds, *ends]


def life(messages: list[DeviceMessage], state: DeviceState | None = None) -> list[Any]:
    """The replies of one device to a script."""
    state, replies = state or make_state(), []
    for message in messages:
        state, reply = handle(state, message)
        replies.append(reply)
    return replies


@pytest.fixture(scope="module", params=list(WAYS))
def refine(request: pytest.FixtureRequest) -> dict[str, Any]:
    return WAYS[request.param]


def content(reply: Message) -> tuple[str, dict[str, Any]]:
    return reply.model_dump_json(), {name: t.tolist() for name, t in reply.tensors.items()}


# -- all that goes up is noised or says nothing -----------------------------------------------------------------------


def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise so loud that nothing else is heard: the same in its place, whatever the data."""
    released = DevicePrivacy._released

    def loud(self: DevicePrivacy, vector: Tensor, *rest: Any) -> dict[str, Tensor]:
        return released(self, torch.zeros_like(vector), *rest)

    monkeypatch.setattr(DevicePrivacy, "_released", loud)


def test_what_is_not_noised_does_not_depend_on_the_data(
    refine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, private = script(**refine), make_private(**refine)
    blank(monkeypatch)
    one, other = (life(messages, make_state(kind, private)) for kind in (0, 1))
    assert [content(reply) for reply in one] == [content(reply) for reply in other]


def test_the_check_sees_what_is_not_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = script()
    blank(monkeypatch)
    one, other = (life(messages, make_state(kind)) for kind in (0, 1))
    assert all(content(a) != content(b) for a, b in zip(one, other, strict=True))


def test_no_private_number_is_as_it_was(refine: dict[str, Any]) -> None:
    """Field by field against the same device without privacy."""
    messages = script(**refine)
    plain, private = life(messages), life(messages, make_state(private=make_private(**refine)))
    assert plain[0].attributes.num_samples == 28
    assert private[0].attributes.num_samples == 0
    for reply in private[1:-2]:
        assert reply.scores == NO_SCORES
    for before, after in zip(plain[1:-2], private[1:-2], strict=True):
        assert list(after.tensors) == list(before.tensors)
        for name, tensor in after.tensors.items():
            assert (tensor.shape, tensor.dtype) == (before.tensors[name].shape, before.tensors[name].dtype)
            same = (tensor == before.tensors[name]) & (tensor != 0)  # clamped importance may be 0 in both
            assert not bool(same.any()), name
    numbers = {*plain[-2].tensors["losses"].tolist()}
    said = [loss for loss in private[-2].tensors["losses"].tolist() if loss != 0]
    assert not set(said) & numbers
    assert private[-2].num_samples in (0, 1)
    report = private[-1].report
    assert plain[-1].report.accuracy is not None
    assert (report.accuracy, report.accuracy_coarse, report.accuracy_local) == (None, None, None)
    assert (report.num_train, report.num_test, report.notes) == (0, 0, (NOTE,))


def test_the_device_keeps_its_own_report() -> None:
    state, messages = make_state(private=make_private()), script()
    for message in messages:
        state, _ = handle(state, message)
    assert state.memory.report is not None
    assert state.memory.report.accuracy is not None
    assert state.memory.report.num_train == 20


def test_as_many_parts_are_noised_as_are_counted(refine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bytes] = []

    def counting(key: bytes, label: bytes, number: int) -> Tensor:
        drawn.append(label)
        return secret_noise(key, label, number)

    monkeypatch.setattr(module, "secret_noise", counting)
    life(script(**refine), make_state(private=make_private(**refine)))
    assert len(set(drawn)) == len(drawn)
    assert Counter(label[32:].decode() for label in drawn) == Counter(releases(RefineConfig(**{**REFINE, **refine})))


def test_releases_by_hand() -> None:
    both = ("header", "importance")
    shown = RefineConfig(rounds=2, prune_share=0.1, similarity="calibrated")
    assert releases(shown) == ("sketch", *both, *both, "losses")
    assert releases(RefineConfig(rounds=2, similarity="labels")) == ("sketch", "header", "header", "losses")
    assert releases(RefineConfig(rounds=3)) == ("header", "header", "header", "losses")
    alone = {"similarity": "alone", "exchange": "importance", "guard": False, "class_prior": False}
    assert releases(RefineConfig(**alone)) == ()
    assert releases(RefineConfig(**{**alone, "guard": True})) == releases(
        RefineConfig(**{**alone, "class_prior": True})
    )


# -- how much noise there is ------------------------------------------------------------------------------------------


def released(kind: type[Message], part: str, multiplier: float, **refine: Any) -> tuple[Tensor, Tensor]:
    """(what was sent, what it would have been without noise and clipping) of the first reply of a kind."""
    messages = script(**refine)
    plain, private = life(messages), life(messages, make_state(private=make_private(multiplier, **refine)))
    index = next(i for i, reply in enumerate(plain) if isinstance(reply, kind))
    of = (lambda r: r.tensors) if part == "" else (lambda r: take(r.tensors, part))
    return flat(of(private[index])), flat(of(plain[index]))


@pytest.mark.parametrize("multiplier", [1e-3, 4.0])  # with little noise, clipping is seen
def test_header_noise(multiplier: float) -> None:
    sent, was = released(RoundReply, "header", multiplier)
    coarse, limit = flat(coarse_header()), CLIPS["clip_header"]
    noise = sent - (coarse + clipped(was - coarse, limit))
    assert float(noise.std()) == pytest.approx(multiplier * 2 * limit, rel=3 / math.sqrt(2 * len(noise)))
    messages = script()
    assert life(messages, make_state(private=make_private(multiplier)))[2].noise == multiplier * 2 * limit
    assert life(messages)[2].noise == 0


@pytest.mark.parametrize("multiplier", [1e-3, 4.0])
def test_sketch_noise(multiplier: float) -> None:
    sent, was = released(CoarseReply, "sketch", multiplier)
    bound = CLIPS["clip_sketch"] * math.sqrt(len(was))
    noise = sent - clipped(was, bound)
    assert float(noise.std()) == pytest.approx(multiplier * 2 * bound, rel=3 / math.sqrt(2 * len(noise)))


def test_importance_noise_and_unit_sum() -> None:
    sent, was = released(RoundReply, "importance", 0.01, importance="parameter")
    clean = flat(unit_sum({"x": was}))
    noise = (sent - clean)[sent > 0]
    assert bool((sent >= 0).all())
    assert float(noise.abs().median()) == pytest.approx(0.01 * math.sqrt(2) * 0.6745, rel=0.2)


def test_losses_are_noised_differences_to_the_first_way() -> None:
    messages, limit = script(), CLIPS["clip_loss"]
    state = make_state()
    for message in messages[:-2]:
        state, _ = handle(state, message)

    def losses_of(private: DevicePrivacy | None) -> Tensor:
        _, reply = handle(replace(state, privacy=private), messages[-2])
        assert isinstance(reply, ProposeReply)
        return reply.tensors["losses"].double() / reply.num_samples

    plain = state.memory.refine.model_copy(update={"prior_estimate": "dirichlet"})
    state = replace(state, memory=state.memory.model_copy(update={"refine": plain}))
    names = [way.name for way in ways_to_ship(plain, len(LABELS))]
    few = [names.index(way.name) for way in ways_to_ship(state.memory.refine, len(LABELS), private=True)]
    was = losses_of(None)[few]
    difference = (was - was[0])[1:]
    draws = []
    for number in range(30):
        losses = losses_of(make_private(1e-3, key=bytes([number]) * 32))
        assert float(losses[0]) == 0
        draws.append(losses[1:].tolist())
    noise = torch.tensor(draws, dtype=torch.float64) - clipped(difference, limit)
    assert float(noise.std()) == pytest.approx(1e-3 * 2 * limit, rel=0.15)
    assert float(noise.mean(dim=0).abs().max()) < 4 * 1e-3 * 2 * limit / math.sqrt(30)


def test_without_a_guard_only_refined_ways_are_compared() -> None:
    losses = life(script(guard=False), make_state(private=make_private(guard=False)))[-2].tensors["losses"]
    ways = ways_to_ship(RefineConfig(**{**REFINE, "guard": False}), len(LABELS), private=True)
    said = {way for way, loss in zip(ways, losses.tolist(), strict=True) if loss != 0}
    assert said == {way for way in ways if way.header == "refined" and way.prior_strength}


# -- whose noise it is ------------------------------------------------------------------------------------------------


def test_a_repeated_message_gets_the_same_reply_and_another_one_other_noise() -> None:
    private, (first, coarse, *_) = make_private(), script()
    state, _ = handle(make_state(private=private), first)
    one, again = (handle(state, coarse)[1] for _ in range(2))
    assert content(one) == content(again)
    assert content(handle(state, decode_any(encode(coarse)))[1]) == content(one)  # also over a wire
    asked_otherwise = coarse.model_copy(update={"class_shares": (0.25,) * 4})  # the sketch does not depend on it
    other = handle(state, asked_otherwise)[1]
    difference = flat(other.tensors) - flat(one.tensors)
    noise = 2 * CLIPS["clip_sketch"] * math.sqrt(len(difference))
    assert float(difference.std()) == pytest.approx(math.sqrt(2) * noise, rel=0.1)


def test_two_devices_of_one_job_have_noise_of_their_own(tmp_path: Path) -> None:
    """The same data, job and messages: nothing that an edge knows gives the noise away."""
    job = make_job({"seed": 5, "refine": REFINE, "privacy": {"noise_multiplier": 1.0}})
    messages = script()
    ledgers = [PrivacyLedger(tmp_path / name, job) for name in ("a", "b")]
    assert ledgers[0].privacy.key != ledgers[1].privacy.key
    one, other = (flat(life(messages[:3], make_state(private=ledger.privacy))[2].tensors) for ledger in ledgers)
    assert float((one - other).std()) > 0.5


# -- no more than was counted -----------------------------------------------------------------------------------------


def test_what_an_edge_may_not_ask() -> None:
    messages, private = script(), make_private()
    state, _ = handle(make_state(private=private), messages[0])
    more = messages[1].model_copy(update={"refine": RefineConfig(**{**REFINE, "rounds": 50})})
    with pytest.raises(ValueError, match=r"privacy: refine.rounds must be 2 as in this device's job, got 50"):
        handle(state, more)
    with pytest.raises(ValueError, match=r"privacy: step 1 must be a 'coarse_model', got a 'refine_round'"):
        handle(state, RefineRound(step=1, round=1))
    state, _ = handle(state, messages[1])
    with pytest.raises(ValueError, match=r"privacy: step 2 must be a 'refine_round', got a 'coarse_model'"):
        handle(state, messages[1].model_copy(update={"step": 2}))
    with pytest.raises(ValueError, match=r"privacy: step 2 is round 1, got round 2"):
        handle(state, RefineRound(step=2, round=2))
    for message in messages[2:]:
        state, _ = handle(state, message)
    with pytest.raises(ValueError, match=r"privacy: step must be <= 5 with 2 rounds, got 6"):
        handle(state, RefineRound(step=6, round=5))


def test_a_reply_that_nobody_thought_of_does_not_leave() -> None:
    with pytest.raises(ValueError, match="privacy: a 'cluster_stats' cannot be protected"):
        make_private().protected(AttributesRequest(step=0), ClusterStats(devices=()), {})


def test_the_ledger_admits_one_message_a_step_also_after_a_restart(tmp_path: Path) -> None:
    job = make_job({"refine": REFINE, "privacy": {"noise_multiplier": 1.0}})
    one, other = RefineRound(step=2, round=1), RefineRound(step=2, round=1, tensors={"x": torch.zeros(1)})
    ledger = PrivacyLedger(tmp_path / "phones-1", job)
    ledger.admit(one)
    for again in (ledger, PrivacyLedger(tmp_path / "phones-1", job)):
        again.admit(one)
        with pytest.raises(ValueError, match="privacy: another message was answered at step 2"):
            again.admit(other)
        assert again.privacy == ledger.privacy
    ledger.admit(RefineRound(step=3, round=2))
    assert len(ledger.privacy.key) == 32
    assert (tmp_path / "phones-1").stat().st_mode & 0o077 == 0


# -- what the edge and the device make of noised values ---------------------------------------------------------------


def test_the_edge_says_how_much_noise_is_in_a_personal_header() -> None:
    weights = ((0.5, 0.5), (0.25, 0.75))
    state = EdgeState(devices=("a", "b"), weights=weights, distance=((0, 0), (0, 0)), scores=NO_SCORES)
    refine, sent = RefineConfig(similarity="calibrated"), {"w": torch.zeros(3)}

    def next_state(answers: dict[str, RoundReply]) -> EdgeState:
        return rounds.next_state(refine, state, answers, sent, robust=False, num_classes=2)

    tensors = {"importance.x": torch.ones(2), "header.w": torch.ones(3)}
    replies = {
        name: RoundReply(step=2, tensors=tensors, scores=NO_SCORES, noise=noise)
        for name, noise in (("a", 3.0), ("b", 4.0))
    }
    after = next_state(replies)
    assert float(rounds.personal(after, "a")["noise.header"]) == pytest.approx(2.5)
    assert float(rounds.personal(after, "b")["noise.header"]) == pytest.approx(math.hypot(0.75, 3))
    quiet = {name: reply.model_copy(update={"noise": 0.0}) for name, reply in replies.items()}
    assert "noise.header" not in rounds.personal(next_state(quiet), "a")


def test_a_personal_header_is_freed_from_noise() -> None:
    coarse = {"w": torch.ones(400), "b": torch.zeros(2)}
    header = {"w": torch.ones(400) + 3, "b": torch.zeros(2)}
    tensors = put("header", header) | {"importance.x": torch.ones(1)}
    assert personal_without_noise(tensors, coarse) is tensors
    with_noise = {**tensors, "noise.header": torch.tensor(1.0)}
    read = personal_without_noise(with_noise, coarse)
    factor = 1 - 402 * 1 / (400 * 9)
    torch.testing.assert_close(read["header.w"], torch.ones(400) + 3 * factor)
    assert read["header.b"].tolist() == [0, 0]
    assert read["importance.x"] is tensors["importance.x"]
    drowned = personal_without_noise({**tensors, "noise.header": torch.tensor(10.0)}, coarse)
    assert torch.equal(drowned["header.w"], coarse["w"])


@pytest.mark.parametrize(
    ("guard", "noise", "expected"),
    [
        (True, 0.0, ("refined", 10.0)),
        (True, 0.1, ("refined", 10.0)),
        (True, 2.0, ("coarse", None)),
        (False, 2.0, ("refined", None)),
    ],
)
def test_an_edge_ships_what_stands_out_of_the_noise(guard: bool, noise: float, expected: tuple[str, Any]) -> None:
    config = RefineConfig(guard=guard)
    ways = ways_to_ship(config, 4, private=True)
    said = {"coarse": 0.0, "refined": -0.2, "refined/k=10": -0.9}
    losses = torch.tensor([said.get(way.name, 0.0) for way in ways])
    replies = {
        name: ProposeReply(step=4, num_samples=1, tensors={"losses": losses}, noise=noise)
        for name in ("a", "b", "c", "d")
    }
    way = decide(config, replies, {}, 4, robust=False, private=True).way
    assert (way.header, way.prior_strength) == expected


# -- the job ----------------------------------------------------------------------------------------------------------


def test_it_is_off_by_default_and_then_nothing_is_promised() -> None:
    assert not Job().privacy.on
    assert promise(Job()) is None


def test_samples_are_no_sketch_with_privacy() -> None:
    with pytest.raises(ValueError, match=r'refine.sketch must be "sliced" with privacy.noise_multiplier > 0'):
        make_job({"refine": {"similarity": "calibrated"}, "privacy": {"noise_multiplier": 1.0}})
    with pytest.raises(ValueError, match=r"refine.sketch must be"):
        make_job({"method": "paper", "privacy": {"noise_multiplier": 1.0}})
    for fine in ({"sketch": "sliced"}, {"similarity": "average"}, {"similarity": "alone"}):
        assert make_job({"refine": fine, "privacy": {"noise_multiplier": 1.0}}).privacy.on


def test_models_do_not_go_up_with_privacy() -> None:
    fields = {"refine": {"sketch": "sliced"}, "privacy": {"noise_multiplier": 1.0}, "links": {"send_models": True}}
    with pytest.raises(ValueError, match=r"links.send_models must be false with privacy.noise_multiplier > 0"):
        make_job(fields)
    assert make_job({**fields, "privacy": {}}).links.send_models


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("noise_multiplier", -1, "must be >= 0, got -1"),
        ("delta", 0, "must be > 0, got 0"),
        ("delta", 1, "must be < 1, got 1"),
        ("clip_header", 0, "must be > 0, got 0"),
        ("epsilon", 1, "is an unknown key"),
    ],
)
def test_a_bad_setting_is_named(key: str, value: object, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"privacy\.{key} {rule}"):
        make_job({"privacy": {key: value}})


def test_the_promise_of_a_job() -> None:
    job = make_job({"refine": REFINE, "privacy": {"noise_multiplier": 2.0, "delta": 1e-6}})
    promised = promise(job)
    assert promised is not None
    assert promised["releases"] == {"sketch": 1, "header": 2, "importance": 2, "losses": 1}
    assert promised["epsilon"] == epsilon_of(2.0, 6, 1e-6)
    assert promised["delta"] == 1e-6


# -- a whole run ------------------------------------------------------------------------------------------------------


def tiny(folder: Path, **fields: Any) -> Job:
    return make_job(
        {
            "model": {"epochs": 1, "config": {**CONFIG, "hidden_size": 16, "intermediate_size": 32}},
            "fleet": {
                "devices": [
                    {"count": 2, "cluster": "small", "storage_limit": "100 KB"},
                    {"count": 1, "cluster": "large", "storage_limit": "1 MB"},
                ]
            },
            "data": {"public_share": 0.7},
            "backbone": {"widths": [1.0], "steps": 2, "specialise_steps": 0, "importance_samples": 32},
            "header": {"search": "distilled", "views": 1},
            "refine": REFINE,
            "run": {"cache": str(folder / "cache")},
            "privacy": {"noise_multiplier": 1.0},
            **fields,
        }
    )


class Caught(list[Message]):
    """Replies of devices in a run, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        real: Callable[[DeviceState, Message], tuple[DeviceState, Message]] = handler.handle

        def handling(state: DeviceState, message: Message) -> tuple[DeviceState, Message]:
            state, reply = real(state, message)
            self.append(reply)
            return state, reply

        patch.setattr(handler, "handle", handling)


def test_a_run_with_privacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caught, told = Caught(monkeypatch), []
    sent_when_told: list[int] = []

    def progress(phase: str, done: int, total: int, note: str = "") -> None:
        if phase == "privacy":
            told.append(note)
            sent_when_told.append(len(caught))

    job = tiny(tmp_path)
    summary = local.run(job, tmp_path / "run", progress)
    assert summary["privacy"] == promise(job) == read_json(tmp_path / "run" / "summary.json")["privacy"]
    (note,) = told
    assert note == f"epsilon {summary['privacy']['epsilon']:.3g} at delta 1e-05 for each device, 6 releases"
    assert sent_when_told == [0]
    assert all(d["accuracy"] is None for d in summary["devices"])
    assert len({d["id"] for d in summary["devices"]}) == 3
    for reply in caught:
        if isinstance(reply, RoundReply):
            assert reply.noise > 0
        if isinstance(reply, FinishReply):
            assert reply.report.accuracy is None
    page = build_report(tmp_path / "run").read_text()
    assert "With privacy on, devices keep their accuracies to themselves" in page
    assert "Privacy is on: losses are noised differences" in page
    for name in ("small-1", "small-2", "large-1"):  # the models are there, and each device knows how good its own is
        assert (tmp_path / "run" / "devices" / name / "model.safetensors").exists()
        kept = read_json(tmp_path / "run" / "memory" / name / "privacy.json")
        assert sorted(kept["answered"]) == [str(step) for step in range(6)]
        assert kept["key"] not in json.dumps(summary)


def test_a_run_without_privacy_promises_nothing_and_keeps_no_key(tmp_path: Path) -> None:
    summary = local.run(tiny(tmp_path, privacy={}), tmp_path / "run")
    assert summary["privacy"] is None
    assert not list((tmp_path / "run" / "memory").rglob("privacy.json"))


def test_a_run_that_was_stopped_asks_again_and_gets_the_same_replies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught = Caught(monkeypatch)
    real = rounds.next_state

    class Stopped(BaseException):
        pass

    def stopping(*_: Any, **__: Any) -> EdgeState:
        raise Stopped

    job = tiny(tmp_path)
    monkeypatch.setattr(rounds, "next_state", stopping)
    with pytest.raises(Stopped):
        local.run(job, tmp_path / "run")
    before = [content(r) for r in caught if isinstance(r, RoundReply)]
    caught.clear()
    monkeypatch.setattr(rounds, "next_state", real)
    local.run(job, tmp_path / "run")
    after = [content(r) for r in caught if isinstance(r, RoundReply)]
    assert len(before) == 2  # both devices of the first cluster had answered round 1
    assert after[:2] == before


def test_nothing_is_sent_where_the_accountant_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    caught = Caught(monkeypatch)
    with pytest.raises(ImportError, match="pip install dp-accounting"):
        local.run(tiny(tmp_path), tmp_path / "run")
    assert not caught
    assert not (tmp_path / "run").exists()


# -- an edge that cheats ----------------------------------------------------------------------------------------------


def with_only(labels: tuple[int, ...], kind: int = 0) -> DeviceState:
    """A private device whose training samples are of some classes."""
    state = make_state(kind, make_private())
    train = state.data.train
    numbers = torch.tensor([labels[i % len(labels)] for i in range(len(train))])
    return replace(state, data=replace(state.data, train=replace(train, labels=numbers)))


def poisoned(change: Callable[[dict[str, Tensor]], None], **refine: Any) -> list[DeviceMessage]:
    """The script with another coarse header."""
    messages = script(**refine)
    coarse = messages[1]
    assert isinstance(coarse, CoarseModel)
    header = {n: t.clone() for n, t in take(coarse.tensors, "header").items()}
    change(header)
    messages[1] = coarse.model_copy(update={"tensors": coarse.tensors | put("header", header)})
    return messages


def forms(messages: list[DeviceMessage], state: DeviceState) -> list[Any]:
    """What of each reply is no number: its kind, shapes, types, length; or what was refused, and how."""
    found: list[Any] = []
    for message in messages:
        try:
            state, reply = handle(state, message)
        except ValueError as error:
            found.append(str(error))
        else:
            found.append((reply.kind, [(n, t.shape, t.dtype) for n, t in reply.tensors.items()], len(encode(reply))))
    return found


def bias_of(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(header: dict[str, Tensor]) -> None:
        header["classifier.last.bias"][1] = value

    return change


def scaled_by(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(header: dict[str, Tensor]) -> None:
        for tensor in header.values():
            tensor *= value

    return change


ORACLES: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "-3e38": bias_of(-3e38),
    "nan": bias_of(math.nan),
    "a million": bias_of(-9e5),
    "weights 1e30": scaled_by(1e30),
    "large weights": scaled_by(1e5),
}


@pytest.mark.parametrize("oracle", ORACLES)
def test_what_fails_on_a_class_looks_as_if_it_had_not(oracle: str) -> None:
    messages = poisoned(ORACLES[oracle])
    assert forms(messages, with_only((0, 1, 2, 3))) == forms(messages, with_only((0, 2, 3)))
    assert forms(messages, with_only((1,))) == forms(messages, with_only((0,), kind=1))


@pytest.mark.parametrize("place", ["train_header", "importance_set", "sketch_quantiles", "logits_of"])
def test_any_failure_on_data_looks_like_a_success(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fleetfit.device import device, scoring

    messages = script()
    good = forms(messages, with_only((0, 1, 2, 3)))
    module = scoring if place == "logits_of" else device
    real = getattr(module, place)
    calls = 0

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1 or place == "train_header":
            raise RuntimeError("of class b")
        return real(*arguments, **named)

    monkeypatch.setattr(module, place, failing)
    assert forms(messages, with_only((0, 1, 2, 3))) == good
    assert calls


def test_without_a_sketch_the_number_of_samples_is_not_told() -> None:
    messages = script(similarity="average", sketch="samples")
    private = make_private(similarity="average", sketch="samples")
    one, other = (forms(messages[:2], make_state(kind, private)) for kind in (0, 1))
    assert one == other


def test_importance_that_is_no_number_is_none() -> None:
    private, message = make_private(), RefineRound(step=2, round=1)
    bad = {"a": torch.tensor([1.0, math.nan]), "b": torch.tensor([-1.0])}
    nothing = {name: torch.zeros_like(t) for name, t in bad.items()}
    assert all(
        torch.equal(t, private._importance(message, nothing)[n]) for n, t in private._importance(message, bad).items()
    )


# -- one promise for all runs -----------------------------------------------------------------------------------------


def private_job(**privacy: Any) -> Job:
    return make_job({"refine": {"sketch": "sliced"}, "privacy": {"noise_multiplier": 1.0, **privacy}})


def lifetime(folder: Path, limit: float | None = None, **privacy: Any) -> LifetimeLedger:
    return LifetimeLedger(folder / "privacy.json", private_job(**privacy), limit, folder / "runs")


COARSE, HELLO = script()[1], AttributesRequest(step=0)


def test_by_default_all_runs_together_promise_what_one_does(tmp_path: Path) -> None:
    ledger = lifetime(tmp_path)
    assert ledger.limit == pytest.approx(promise(private_job())["epsilon"])  # type: ignore[index]
    for message in (HELLO, COARSE):
        ledger.check("a" * 16, True, message)
        ledger.count("a" * 16, message)
    for again in (ledger, lifetime(tmp_path)):  # also after a restart
        again.check("a" * 16, True, COARSE)
        again.check("b" * 16, True, HELLO)  # tells nothing of the data
        with pytest.raises(ValueError, match=r"promised epsilon 1\d\.\d+, its privacy\.lifetime_epsilon is \d+\.\d+"):
            again.check("b" * 16, True, COARSE)
        assert "in 1 run" in again.words


def test_epsilons_of_runs_compose_as_gaussians_do(tmp_path: Path) -> None:
    number = len(releases(private_job().refine))
    ledger = lifetime(tmp_path, limit=epsilon_of(1.0, 3 * number, 1e-5))
    for run in ("a" * 16, "b" * 16, "c" * 16):
        ledger.check(run, True, COARSE)
        ledger.count(run, COARSE)
    with pytest.raises(ValueError, match="lifetime_epsilon"):
        ledger.check("d" * 16, True, COARSE)
    louder = lifetime(tmp_path, limit=epsilon_of((3 * number + number / 100) ** -0.5, 1, 1e-5), noise_multiplier=10.0)
    louder.check("d" * 16, True, COARSE)


def test_a_run_whose_answers_are_forgotten_is_over(tmp_path: Path) -> None:
    ledger = lifetime(tmp_path, limit=100.0)
    ledger.count("a" * 16, COARSE)
    for message in (HELLO, COARSE):  # a new secret would be made for either
        with pytest.raises(ValueError, match="this run is over"):
            ledger.check("a" * 16, False, message)


def test_a_ledger_that_is_lost_or_damaged_is_no_fresh_start(tmp_path: Path) -> None:
    lifetime(tmp_path).count("a" * 16, COARSE)
    (tmp_path / "privacy.json").write_text('{"a": NaN}')
    with pytest.raises(ValueError, match="is corrupt"):
        lifetime(tmp_path)
    (tmp_path / "privacy.json").unlink()
    kept = tmp_path / "runs" / ("a" * 16) / "memory"
    kept.mkdir(parents=True)
    (kept / "privacy.json").write_text("{}")
    with pytest.raises(ValueError, match="is missing, though there were runs"):
        lifetime(tmp_path)
