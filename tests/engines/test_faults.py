"""A cluster of real devices behind a link that loses, delays, repeats and damages: it goes on, and nobody is harmed."""

import json
import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from tiny_job import tiny_fields
from torch import Tensor

from fleetfit.cloud.reference import classifier_of, train_reference
from fleetfit.config.job import Job, make_job
from fleetfit.core.checkpoints import Ledger
from fleetfit.core.encoding import Declined, Message, decode, encode
from fleetfit.core.progress import silent
from fleetfit.core.records import DeviceAttributes, EnergyModel, Way
from fleetfit.data.partition import FleetData, share_out
from fleetfit.data.sources import load_samples
from fleetfit.device import handler
from fleetfit.device.device import DeviceState, handle
from fleetfit.device.handler import device_handler
from fleetfit.device.memory import DeviceMemory
from fleetfit.device.messages import AttributesReply, Finish, FinishReply, ProposeReply, RefineRound, RoundReply
from fleetfit.edge import header as edge
from fleetfit.edge import rounds
from fleetfit.edge.header import HeaderResult
from fleetfit.edge.messages import BackboneAssignment, ClusterReport, ClusterStats, StatsRequest, decode_any
from fleetfit.edge.polling import ATTEMPTS, NO_REPLY
from fleetfit.edge.rounds import EdgeState
from fleetfit.edge.run import gather_stats, refine_cluster
from fleetfit.engines import local
from fleetfit.engines.local import LocalLink
from fleetfit.runs.report import build_report

torch.set_num_threads(1)

M = TypeVar("M", bound=Message)
DEVICES = ("far-1", "far-2", "far-3", "far-4")
ROUNDS = 3
STEPS = ("attributes", "coarse model", "round 1", "round 2", "round 3", "proposal", "finish")
FILES = ("attributes/far", *(f"refine/far/{i}" for i in range(ROUNDS + 1)), "propose/far", "finish/far")
MAX_BYTES = 60_000
TIMES = int(os.environ.get("FLEETFIT_TIMES", "1"))  # of the fuzzing, each with other damage


def make(**links: Any) -> Job:
    return make_job(
        tiny_fields(
            devices={"far": 4},
            header={"keep_distilled": False},
            refine={
                "rounds": ROUNDS,
                "prune_share": 0.5,
                "guard": True,
                "class_prior": False,
                "similarity": "calibrated",
                "settle": False,
                "later_epochs": 0,
                "bits": 32,
            },
            links=links,
        )
    )


@pytest.fixture(scope="module")
def data() -> FleetData:
    return share_out(load_samples(make()), make().data, {"far": DEVICES}, 0)


@pytest.fixture(scope="module")
def assignment(data: FleetData) -> BackboneAssignment:
    reference = train_reference(make(), data.public, lambda *_: None)
    return BackboneAssignment(
        cluster="far",
        family="vit",
        config=reference.config,
        labels=data.public.train.label_names,
        header=classifier_of(make(), reference, 10).header.spec,
        tensors=reference.tensors,
    )


@pytest.fixture(scope="module")
def found(data: FleetData, assignment: BackboneAssignment) -> HeaderResult:
    return edge.find_header(make(), assignment, data.edges["far"], 10**6, lambda *_: None)


def step_of(message: Message) -> str:
    """A message's step as people call it."""
    if isinstance(message, RefineRound):
        return f"round {message.round}"
    return {"attributes_request": "attributes", "coarse_model": "coarse model", "propose": "proposal"}.get(
        message.kind, message.kind
    )


Rule = Callable[[str, str, int], Any]


class FaultyLink(LocalLink):
    """What the rule says happens to a device's message in a step, at an attempt.

    None: all is well. "drop": it never arrives. "lose": the reply does not, or too late. A function: what becomes of
    the reply's bytes.
    """

    def __init__(self, handlers: Mapping[str, Any], rule: Rule, job: Job, now: Callable[[], str]) -> None:
        super().__init__(handlers, Ledger(), "down", "up", job.links)
        self.rule, self.now = rule, now
        self.asked: list[tuple[str, Message]] = []
        self.attempts: Counter[tuple[str, str]] = Counter()

    def deliver(self, member: str, sent: bytes) -> list[bytes]:
        message = decode_any(sent)
        self.asked.append((member, message))
        step = self.now()  # not the message's: the coarse model is sent in any of them
        self.attempts[member, step] += 1
        what = self.rule(member, step, self.attempts[member, step])
        if what == "drop":
            return []
        replies = super().deliver(member, sent)
        return [] if what == "lose" else what(replies[0]) if what else replies

    def kinds_sent_to(self, device: str) -> list[str]:
        return [step_of(m) for d, m in self.asked if d == device]


class Memories:
    """A device's memory as artifacts.MemoryFolder has it, but not in files."""

    def __init__(self) -> None:
        self.of: dict[int, DeviceMemory] = {}

    def before(self, step: int, _: object) -> DeviceMemory | None:
        assert step >= max(self.of, default=0), "the edge never goes back"
        return self.of.get(max((s for s in self.of if s < step), default=-1))

    def save(self, step: int, memory: DeviceMemory) -> None:
        self.of[step] = memory


class Steps:
    """Finished steps, not in files."""

    def __init__(self) -> None:
        self.done: dict[str, Any] = {}

    def step(self, name: str, result: type[M], compute: Callable[[], M], reads: object = None) -> M:
        if name not in self.done:
            self.done[name] = compute()
        value = self.done[name]
        assert isinstance(value, result)
        return value

    def bookmark(self, name: str) -> Any:
        raise AssertionError("nothing long is trained here")


@pytest.fixture(scope="module", autouse=True)
def _each_answer_is_computed_once() -> Iterator[None]:
    """Devices are deterministic, so that runs with the same beginning can share it."""
    answers: dict[Any, tuple[DeviceState, Message]] = {}
    keep_alive: list[DeviceMemory] = []

    def remembering(state: DeviceState, message: Message) -> tuple[DeviceState, Message]:
        tensors = {n: t.numpy().tobytes() for n, t in message.tensors.items()}
        memory = id(state.memory) if state.memory.step >= 0 else None
        key = (state.attributes.model_dump_json(), memory, message.model_dump_json(), str(sorted(tensors.items())))
        if key not in answers:
            after, reply = handle(state, message)
            keep_alive.append(state.memory)
            answers[key] = (after if after is not state else None, reply)  # type: ignore[assignment]
        after_, reply = answers[key]
        return after_ or state, reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handler, "handle", remembering)
        yield


class Lab:
    """One cluster's devices and its edge."""

    def __init__(self, data: FleetData, assignment: BackboneAssignment, found: HeaderResult, **links: Any) -> None:
        self.data, self.assignment, self.found = data, assignment, found
        self.job = make(**links)
        self.limits = dict.fromkeys(DEVICES, 10**6)
        self.memories = {device: Memories() for device in DEVICES}
        self.steps = Steps()

    def link(self, rule: Rule) -> FaultyLink:
        handlers = {}
        for device in DEVICES:
            own = self.data.devices[device]
            attributes = DeviceAttributes(
                device_id=device,
                storage_limit_bytes=self.limits[device],
                energy=EnergyModel(),
                num_samples=len(own.train) + len(own.validation),
            )
            handlers[device] = device_handler(attributes, own, self.memories[device])  # type: ignore[arg-type]
        return FaultyLink(handlers, rule, self.job, lambda: STEPS[sum(name in self.steps.done for name in FILES)])

    def run(self, link: LocalLink) -> ClusterReport:
        stats = gather_stats(self.job, "far", link, self.steps)
        shared = self.data.edges["far"]
        return refine_cluster(self.job, self.assignment, stats, self.found, shared, link, self.steps, silent)

    def state(self, number: int) -> EdgeState:
        state: EdgeState = self.steps.done[f"refine/far/{number}"]
        return state


@pytest.fixture
def lab(data: FleetData, assignment: BackboneAssignment, found: HeaderResult) -> Lab:
    return Lab(data, assignment, found)


@pytest.fixture(scope="module")
def whole(
    data: FleetData, assignment: BackboneAssignment, found: HeaderResult
) -> tuple[Lab, FaultyLink, ClusterReport]:
    """Nobody is missing."""
    lab = Lab(data, assignment, found)
    link = lab.link(lambda *_: None)
    return lab, link, lab.run(link)


def away(*missed: tuple[str, str], what: Any = "drop") -> Rule:
    """Devices that are away in some steps."""
    return lambda device, step, _: what if (device, step) in missed else None


def from_on(device: str, first: str) -> list[tuple[str, str]]:
    return [(device, step) for step in STEPS[STEPS.index(first) :]]


def until(device: str, last: str) -> list[tuple[str, str]]:
    return [(device, step) for step in STEPS[: STEPS.index(last) + 1]]


def told(report: ClusterReport) -> list[tuple[str, str, str]]:
    return [(f.device_id, f.step, f.reason) for f in report.faults]


def finished(report: ClusterReport) -> list[str]:
    return [d.device_id for d in report.devices]


def assert_same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


# -- gone, late, back again -------------------------------------------------------------------------------------------


def test_with_all_there_nothing_is_told(whole: tuple[Lab, FaultyLink, ClusterReport]) -> None:
    lab, link, report = whole
    assert (report.faults, report.absent, finished(report)) == ((), (), list(DEVICES))
    for device in DEVICES:
        assert link.kinds_sent_to(device) == list(STEPS)
    state = lab.state(2)
    assert report.similarity == state.weights
    assert state.devices == DEVICES


@pytest.mark.parametrize("what", ["drop", "lose"])
@pytest.mark.parametrize("missed", STEPS[2:-1])
def test_a_device_that_misses_one_step_finishes_with_the_others(lab: Lab, missed: str, what: str) -> None:
    link = lab.link(away(("far-2", missed), what=what))
    report = lab.run(link)
    assert finished(report) == list(DEVICES)
    assert told(report) == [("far-2", missed, NO_REPLY)]
    assert report.faults[0].times == 1, "with a quorum nobody is asked twice"
    assert not report.faults[0].recovered
    assert link.kinds_sent_to("far-2") == list(STEPS)
    if missed.startswith("round"):
        number = int(missed[-1])
        before, after = lab.state(number - 1), lab.state(number)
        assert_same_tensors(rounds.personal(after, "far-2"), rounds.personal(before, "far-2"))
        # What it gets next is what the edge knew before: its last personal tensors, or nothing.
        sent = [m for d, m in link.asked if d == "far-2"][number + 2]
        assert_same_tensors(sent.tensors, rounds.personal(before, "far-2"))
        assert bool(sent.tensors) is (number > 1)
        samples = [r["num_samples"] for r in report.rounds]
        assert samples[number] == samples[0] - len(lab.data.devices["far-2"].validation)


@pytest.mark.parametrize("what", ["drop", "lose"])
def test_what_the_others_get_is_computed_as_if_the_device_were_not_there(lab: Lab, what: str) -> None:
    """Eq. 21 among three: the weights of the three, scaled to sum to 1."""
    link = lab.link(away(("far-2", "round 1"), what=what))
    replies: dict[str, RoundReply] = {}
    deliver = link.deliver

    def noting(member: str, sent: bytes) -> list[bytes]:
        blobs = deliver(member, sent)
        if link.now() == "round 1" and blobs:
            replies[member] = decode(blobs[0], RoundReply)
        return blobs

    link.deliver = noting  # type: ignore[method-assign]
    lab.run(link)
    three = ("far-1", "far-3", "far-4")
    assert tuple(replies) == three
    state, weights = lab.state(1), torch.tensor(lab.state(0).weights)
    for device in three:
        row = {d: float(weights[DEVICES.index(device), DEVICES.index(d)]) for d in three}
        for name, tensor in rounds.personal(state, device).items():
            if name.startswith("header."):
                mean = sum(row[d] * replies[d].tensors[name].double() for d in three) / sum(row.values())
                torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)


def test_two_of_four_killed_in_a_round_and_never_back(lab: Lab) -> None:
    report = lab.run(lab.link(away(*from_on("far-1", "round 2"), *from_on("far-4", "round 2"))))
    assert finished(report) == ["far-2", "far-3"]
    assert {a.device_id: a.since for a in report.absent} == {"far-1": "round 2", "far-4": "round 2"}
    assert told(report) == [(d, s, NO_REPLY) for s in STEPS[3:] for d in ("far-1", "far-4")]
    # The page's matrix is of those that are in its table.
    assert [len(row) for row in report.similarity] == [2, 2]
    assert all(sum(row) == pytest.approx(1) for row in report.similarity)
    assert len(report.distance) == 2


@pytest.mark.parametrize("last", STEPS[:-1])
def test_a_device_that_comes_late_gets_the_coarse_model_first_and_joins_at_once(lab: Lab, last: str) -> None:
    link = lab.link(away(*until("far-3", last)))
    report = lab.run(link)
    assert finished(report) == list(DEVICES)
    assert told(report) == [("far-3", step, NO_REPLY) for step in STEPS[: STEPS.index(last) + 1]]
    back = STEPS[STEPS.index(last) + 1 :]
    sent = link.kinds_sent_to("far-3")
    if last == "attributes":
        assert sent == list(STEPS)
    else:
        missed = STEPS.index(last)
        assert sent == ["attributes", *["coarse model"] * (missed + 1), *back]
        assert [m.step for d, m in link.asked if d == "far-3"][-len(back) :] == list(range(missed + 1, len(STEPS)))  # type: ignore[attr-defined]
    assert len(report.similarity) == 4
    assert all(sum(row) == pytest.approx(1) for row in report.similarity)
    if last in ("coarse model", "round 1", "round 2"):
        assert lab.state(3).devices == DEVICES, "in the link's order"


def test_one_that_never_comes_is_absent_since_the_beginning(lab: Lab) -> None:
    report = lab.run(lab.link(lambda device, *_: "drop" if device == "far-4" else None))
    assert finished(report) == ["far-1", "far-2", "far-3"]
    assert [(a.device_id, a.since) for a in report.absent] == [("far-4", "attributes")]
    assert told(report) == [("far-4", step, NO_REPLY) for step in STEPS]


def test_away_back_and_away_again_is_absent_since_the_second_time(lab: Lab) -> None:
    missed = [("far-1", "round 1"), *from_on("far-1", "proposal")]
    report = lab.run(lab.link(away(*missed)))
    assert [(a.device_id, a.since) for a in report.absent] == [("far-1", "proposal")]


def test_a_device_that_lost_its_memory_gets_the_model_again(lab: Lab) -> None:
    def forget(device: str, step: str, attempt: int) -> Any:
        if (device, step, attempt) == ("far-2", "round 2", 1):
            lab.memories[device].of.clear()
        return None

    link = lab.link(forget)
    report = lab.run(link)
    assert finished(report) == list(DEVICES)
    assert told(report) == [("far-2", "round 2", "declined: it has no coarse model")]
    assert report.faults[0].recovered
    assert link.kinds_sent_to("far-2")[3:7] == ["round 2", "coarse model", "round 2", "round 3"]


def test_a_smaller_device_that_was_silent_never_gets_a_model_over_its_limit(lab: Lab) -> None:
    lab.limits["far-4"] = 2_000
    report = lab.run(lab.link(away(("far-4", "attributes"))))
    assert finished(report) == ["far-1", "far-2", "far-3"]
    assert lab.memories["far-4"].of == {}
    (fault,) = {f.reason for f in report.faults if f.step == "round 1"}
    assert fault.startswith("declined: the model has ")
    assert fault.endswith("the device's limit is 2000")
    assert [(a.device_id, a.since) for a in report.absent] == [("far-4", "attributes")]


# -- quorum, and going on ---------------------------------------------------------------------------------------------


def test_without_a_quorum_it_stops_says_who_is_missing_and_goes_on_later(lab: Lab) -> None:
    gone = [*from_on("far-1", "round 2"), *from_on("far-2", "round 2"), *from_on("far-4", "round 2")]
    link = lab.link(away(*gone))
    with pytest.raises(ValueError, match="round 2") as error:
        lab.run(link)
    assert str(error.value).startswith(
        "far, round 2: 1 of 4 devices replied validly, 2 must (links.quorum 0.5; asked 3 times, for "
        "links.deadline_seconds 600 each). Missing: far-1 (no reply); far-2 (no reply); far-4 (no reply)."
    )
    asked = Counter(d for d, m in link.asked if step_of(m) == "round 2")
    assert asked == {"far-1": ATTEMPTS, "far-2": ATTEMPTS, "far-3": 1, "far-4": ATTEMPTS}
    again = lab.link(lambda *_: None)
    report = lab.run(again)
    assert (finished(report), report.absent, report.faults) == (list(DEVICES), (), ())
    assert [step_of(m) for _, m in again.asked] == [s for s in STEPS[3:] for _ in DEVICES]


def test_asked_again_some_come_in_time(lab: Lab) -> None:
    def rule(device: str, step: str, attempt: int) -> Any:
        return "drop" if step == "round 1" and device != "far-1" and attempt < (9 if device == "far-4" else 2) else None

    report = lab.run(lab.link(rule))
    assert finished(report) == list(DEVICES)
    assert [(f.device_id, f.times, f.recovered) for f in report.faults] == [
        ("far-2", 1, True),
        ("far-3", 1, True),
        ("far-4", 2, False),  # the second time there was a quorum
    ]


def test_a_quorum_of_all_waits_for_all(lab: Lab) -> None:
    lab.job = make(quorum=1.0)
    report = lab.run(lab.link(lambda device, step, attempt: "lose" if attempt == 1 and device == "far-2" else None))
    assert finished(report) == list(DEVICES)
    assert all(f.recovered for f in report.faults)
    assert len(report.faults) == len(STEPS)


class Killed(BaseException):
    """Nothing in the program may catch this."""


MISSING: list[tuple[str, str]] = [*until("far-1", "round 1"), ("far-2", "round 2"), *from_on("far-4", "round 3")]


@pytest.fixture(scope="module")
def with_missing(data: FleetData, assignment: BackboneAssignment, found: HeaderResult) -> tuple[ClusterReport, int]:
    """What a run with missing devices ends with, and how many messages it takes."""
    lab = Lab(data, assignment, found)
    link = lab.link(away(*MISSING))
    return lab.run(link), len(link.asked)


@pytest.mark.parametrize("place", range(7))
def test_an_edge_that_is_killed_goes_on_with_the_same_missing(
    lab: Lab, with_missing: tuple[ClusterReport, int], place: int
) -> None:
    """Killed before its n-th message has gone out, in every step once; devices have answered some of the others."""
    expected, number = with_missing
    link = lab.link(away(*MISSING))
    deliver, last = link.deliver, 2 + place * (number - 3) // 6

    def dies(member: str, sent: bytes) -> list[bytes]:
        if len(link.asked) == last:
            raise Killed
        return deliver(member, sent)

    link.deliver = dies  # type: ignore[method-assign]
    with pytest.raises(Killed):
        lab.run(link)
    report = lab.run(lab.link(away(*MISSING)))
    assert report.model_dump_json() == expected.model_dump_json()


# -- damaged replies --------------------------------------------------------------------------------------------------


class Replay(LocalLink):
    """Devices as they once answered; one of them as somebody else wants."""

    def __init__(self, kept: Mapping[tuple[str, str], bytes], step: str, instead: Mapping[str, list[bytes]]) -> None:
        super().__init__(
            dict.fromkeys(DEVICES, lambda m: m), Ledger(), "down", "up", make(max_message_bytes=MAX_BYTES).links
        )
        self.kept, self.step, self.instead = kept, step, instead

    def deliver(self, member: str, sent: bytes) -> list[bytes]:
        return self.instead.get(member, [self.kept[member, self.step]])


class Done(Exception):
    """The step that was looked for is finished."""

    def __init__(self, result: Message) -> None:
        super().__init__()
        self.result = result


class OneStep(Steps):
    """All steps but one are finished."""

    def __init__(self, done: Mapping[str, Any], name: str) -> None:
        super().__init__()
        self.done, self.name = dict(done), name

    def step(self, name: str, result: type[M], compute: Callable[[], M], reads: object = None) -> M:
        if name == self.name:
            raise Done(compute())
        return super().step(name, result, compute)


class Fuzz:
    """What honest devices answered, and what a step makes of it when one is not honest."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.kept: dict[tuple[str, str], bytes] = {}
        link = lab.link(lambda device, step, _: lambda blob: [self.kept.setdefault((device, step), blob)])
        lab.run(link)
        assert len(self.kept) == len(DEVICES) * len(STEPS)
        self.without = {(d, s): self.result(s, {d: []}) for d in DEVICES for s in STEPS}
        self.honest = {s: self.result(s, {}) for s in STEPS}

    def result(self, step: str, instead: Mapping[str, list[bytes]]) -> Any:
        lab, link = self.lab, Replay(self.kept, step, instead)
        steps = OneStep(lab.steps.done, FILES[STEPS.index(step)])
        try:
            stats = gather_stats(lab.job, "far", link, steps)
            refine_cluster(lab.job, lab.assignment, stats, lab.found, lab.data.edges["far"], link, steps, silent)
        except Done as done:
            return done.result
        raise AssertionError("the step was not asked for")


@pytest.fixture(scope="module")
def fuzz(data: FleetData, assignment: BackboneAssignment, found: HeaderResult) -> Fuzz:
    return Fuzz(Lab(data, assignment, found, max_message_bytes=MAX_BYTES))


def with_fields(message: Message, change: Callable[[Any], None]) -> bytes:
    """A message whose JSON says what its type does not allow."""
    blob = encode(message)
    length = struct.unpack("<Q", blob[:8])[0]
    header = json.loads(blob[8 : 8 + length])
    fields = json.loads(header["__metadata__"]["fields"])
    change(fields)
    header["__metadata__"]["fields"] = json.dumps(fields)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + blob[8 + length :]


def numbers_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Where numbers stand in some JSON: (container, key)."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(inner, (int, float)) and not isinstance(inner, bool):
            yield value, key
        yield from numbers_in(inner)


def bad_number(message: Message, chance: random.Random) -> bytes:
    def change(fields: Any) -> None:
        container, key = chance.choice(list(numbers_in(fields)))
        container[key] = chance.choice(["NaN", "Infinity", "-Infinity", -1, 10**30, 1e300, 10**400, "x", None, []])

    return with_fields(message, change)


def with_tensor(change: Callable[[Tensor, random.Random], Tensor]) -> Callable[[Message, random.Random], bytes]:
    """One of the tensors changed; where there is none, one too many."""

    def changed(message: Message, chance: random.Random) -> bytes:
        full = sorted(n for n, t in message.tensors.items() if t.numel())
        name = chance.choice(full) if full else "header.x"
        tensor = message.tensors[name].clone() if full else torch.zeros(2, 3)
        return encode(message.model_copy(update={"tensors": {**message.tensors, name: change(tensor, chance)}}))

    return changed


def poked(value: float) -> Callable[[Message, random.Random], bytes]:
    def change(tensor: Tensor, chance: random.Random) -> Tensor:
        tensor.view(-1)[chance.randrange(tensor.numel())] = value
        return tensor

    return with_tensor(change)


def flipped(blob: bytes, chance: random.Random, places: range) -> bytes:
    damaged = bytearray(blob)
    for _ in range(chance.choice((1, 1, 1, 8))):
        damaged[chance.choice(places)] ^= 1 << chance.randrange(8)
    return bytes(damaged)


SHAPES: list[Callable[[Tensor], Tensor]] = [
    lambda t: t[None],
    lambda t: t.flatten()[:-1],
    lambda t: t.flatten().repeat(2),
    lambda t: t[:0],
    lambda t: t.sum(),
    lambda t: torch.cat([t, t]),
    lambda t: t.unsqueeze(-1),
]
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e5m2)
FOREIGN = (
    StatsRequest(),
    ClusterStats(devices=()),
    Declined(reason="\x1b[31mno\n", needs_model=False),
    Finish(step=6, way=Way(header="coarse")),
)


def mutations() -> dict[str, Callable[[Message, bytes, random.Random], list[bytes]]]:
    """Everything that may become of a reply: (the message, its bytes) -> what arrives."""
    by_message: dict[str, Callable[[Message, random.Random], bytes]] = {
        "NaN": poked(float("nan")),
        "infinite": poked(float("inf")),
        "minus infinite": poked(float("-inf")),
        "huge": poked(3e38),
        "negative": poked(-1e20),
        "wrong shape": with_tensor(lambda t, c: c.choice(SHAPES)(t)),
        "wrong dtype": with_tensor(lambda t, c: t.to(c.choice(DTYPES))),
        "bad number": bad_number,
        "another step": lambda m, c: encode(
            m.model_copy(update={"step": m.step + c.choice((-1, 1, 7))}) if m.step else m.model_copy(update={"step": 3})
        ),  # type: ignore[attr-defined]
        "one tensor too many": lambda m, c: encode(
            m.model_copy(update={"tensors": {**m.tensors, c.choice(("header.x", "../x", "")): torch.zeros(2)}})
        ),
        "one tensor too few": lambda m, c: encode(
            m.model_copy(update={"tensors": dict(sorted(m.tensors.items())[1:]) if m.tensors else {"x": torch.ones(1)}})
        ),
        "foreign kind": lambda m, c: encode(c.choice(FOREIGN)),
        "an unknown field": lambda m, c: with_fields(m, lambda f: f.update(path="/etc/passwd")),
    }
    by_bytes: dict[str, Callable[[bytes, random.Random], bytes]] = {
        "bits of the header": lambda b, c: flipped(b, c, range(8 + struct.unpack("<Q", b[:8])[0])),
        "bits anywhere": lambda b, c: flipped(b, c, range(len(b))),
        "cut short": lambda b, c: b[: c.randrange(len(b))],
        "something behind": lambda b, c: b + c.randbytes(c.randrange(1, 100)),
        "oversize": lambda b, c: b + bytes(MAX_BYTES),
        "noise": lambda b, c: c.randbytes(c.randrange(300)),
        "another version": lambda b, c: b.replace(b'"version":"1"', b'"version":"9"'),
    }
    every: dict[str, Callable[[Message, bytes, random.Random], list[bytes]]] = {
        **{n: (lambda m, b, c, f=f: [f(m, c)]) for n, f in by_message.items()},
        **{n: (lambda m, b, c, f=f: [f(b, c)]) for n, f in by_bytes.items()},
    }
    return every | {
        "twice": lambda m, b, c: [b, encode(m)],
        "twice, differing": lambda m, b, c: [b, poked(0.125)(m, c)] if m.tensors else [b, bad_number(m, c)],
    }


MUTATIONS = mutations()
FUZZED = 14  # replies for each mutation
MAY_PASS = {"twice", "bits of the header", "bits anywhere"}  # there is no checksum: a changed number may be a number


def assert_same(one: Message, other: Message) -> None:
    """Equal but for why somebody was missing."""
    assert one.model_dump(exclude={"faults"}) == other.model_dump(exclude={"faults"})
    assert_same_tensors(one.tensors, other.tensors)


@pytest.mark.parametrize("repetition", range(TIMES))
def test_whatever_a_device_sends_it_harms_no_other(
    fuzz: Fuzz, repetition: int, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(repetition)
    refused: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    for mutation in list(MUTATIONS) * FUZZED:
        step, device, seed = chance.choice(STEPS), chance.choice(DEVICES), chance.randrange(2**32)
        one = f"{mutation}, {step}, {device}, seed {seed}"
        blob = fuzz.kept[device, step]
        blobs = MUTATIONS[mutation](decode_any(blob), blob, random.Random(seed))
        result = fuzz.result(step, {device: blobs})
        if result.faults:
            (fault,) = result.faults
            assert (fault.device_id, fault.step, fault.recovered) == (device, step, False), one
            assert fault.reason != NO_REPLY, one
            assert fault.reason.isprintable(), one
            assert_same(result, fuzz.without[device, step])
            refused[mutation] += 1
        else:
            assert mutation in MAY_PASS, one
            assert all(bool(t.isfinite().all()) for t in result.tensors.values()), one
            if mutation == "twice":
                assert_same(result, fuzz.honest[step])
            passed[mutation] += 1
    record_property("replies", sum(refused.values()) + sum(passed.values()))
    record_property("refused", sum(refused.values()))
    assert sum(refused.values()) >= 200
    assert set(refused) == set(MUTATIONS) - {"twice"}
    assert passed["twice"] > 0


def test_others_personal_tensors_do_not_hold_the_refused_ones(fuzz: Fuzz) -> None:
    """Otherwise the comparison above would compare nothing: the reply matters when it is good."""
    for device in DEVICES:
        assert fuzz.honest["round 2"].faults == ()
        for other in set(DEVICES) - {device}:
            one = rounds.personal(fuzz.honest["round 2"], other)["header.classifier.last.weight"]
            two = rounds.personal(fuzz.without[device, "round 2"], other)["header.classifier.last.weight"]
            assert not torch.equal(one, two)


@pytest.mark.parametrize("name", ["far-1", "../../far-1", "/etc/passwd", "", "far-1\0", "CON"])
def test_a_name_in_a_reply_is_nothing_but_checked(fuzz: Fuzz, name: str) -> None:
    """Only far-2 may say that it is far-2, and no file is named by what a device says."""
    attributes = decode(fuzz.kept["far-2", "attributes"], AttributesReply)
    lying = attributes.model_copy(update={"attributes": attributes.attributes.model_copy(update={"device_id": name})})
    report = decode(fuzz.kept["far-2", "finish"], FinishReply)
    wrong = report.model_copy(update={"report": report.report.model_copy(update={"device_id": name})})
    for step, message in (("attributes", lying), ("finish", wrong)):
        (fault,) = fuzz.result(step, {"far-2": [encode(message)]}).faults
        assert fault.reason.startswith("device_id must be 'far-2', got ")


def test_lying_about_scores_is_refused_where_it_can_be_seen(fuzz: Fuzz) -> None:
    reply = decode(fuzz.kept["far-2", "proposal"], ProposeReply)
    losses = reply.tensors["losses"]
    for update in (
        {"num_samples": 10**6},
        {"tensors": {"losses": losses[1:]}},
        {"tensors": {"losses": torch.cat([losses, losses])}},
        {"tensors": {"losses": -losses - 1}},
        {"tensors": {}},
    ):
        blob = encode(reply.model_copy(update=update))
        result = fuzz.result("proposal", {"far-2": [blob]})
        assert [f.device_id for f in result.faults] == ["far-2"]
        assert_same(result, fuzz.without["far-2", "proposal"])


# -- a whole run ------------------------------------------------------------------------------------------------------


def test_summary_and_report_name_who_is_absent_and_what_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lossy(LocalLink):
        def deliver(self, member: str, sent: bytes) -> list[bytes]:
            if member == "near-2":
                return []
            answers = super().deliver(member, sent)
            return [answers[0][:-1]] if (member, decode_any(sent).kind) == ("far-1", "propose") else answers

    monkeypatch.setattr(local, "LocalLink", Lossy)
    devices = [
        {"count": 2, "cluster": "near", "storage_limit": "200 KB"},
        {"count": 2, "cluster": "far", "storage_limit": "1 MB"},
    ]
    job = make().model_dump(exclude_none=True) | {
        "fleet": {"devices": devices},
        "backbone": {"widths": [1.0], "steps": 2, "specialise_steps": 0, "importance_samples": 32},
        "run": {"cache": str(tmp_path / "cache")},
    }
    summary = local.run(make_job(job), tmp_path / "run")
    assert [d["id"] for d in summary["devices"]] == ["near-1", "far-1", "far-2"]
    assert summary["absent"] == [{"id": "near-2", "cluster": "near", "since": "attributes"}]
    assert [(f["id"], f["cluster"], f["step"]) for f in summary["faults"]] == [
        *(("near-2", "near", step) for step in STEPS),
        ("far-1", "far", "proposal"),
    ]
    assert summary["faults"][-1]["reason"].startswith(("it is truncated", "it is corrupt"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert {p.name for p in (tmp_path / "run" / "devices").iterdir()} == {"near-1", "far-1", "far-2"}
    page = build_report(tmp_path / "run").read_text()
    assert "Did not finish, and got no model: near-2 (since attributes)." in page
    assert "Replies that were missing or refused" in page
