"""The pipeline over links and checkpoints in memory: who is asked what, in which order, and never twice."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pytest
import torch
from tiny_job import TINY_VIT, tiny_fields

from fleetfit.cloud import elastic as cloud_elastic
from fleetfit.cloud import run
from fleetfit.cloud.reference import classifier_of, train_reference
from fleetfit.cloud.run import reference_key, run_cloud
from fleetfit.config.job import Job, make_job
from fleetfit.config.sections import MembersConfig
from fleetfit.core.checkpoints import TrainingState
from fleetfit.core.encoding import Message, Request
from fleetfit.core.link import Refused
from fleetfit.core.progress import silent
from fleetfit.core.records import DeviceAttributes, EnergyModel, HeaderSpec
from fleetfit.data.partition import FleetData, share_out
from fleetfit.data.sources import load_samples
from fleetfit.device.device import DeviceState, handle
from fleetfit.device.memory import DeviceMemory
from fleetfit.device.messages import DeviceMessage, ProposeReply, RefineRound, RoundReply
from fleetfit.edge import header as edge
from fleetfit.edge import rounds
from fleetfit.edge.header import HeaderResult
from fleetfit.edge.messages import BackboneAssignment, ClusterReport, ClusterStats, StatsRequest
from fleetfit.edge.run import gather_stats, run_edge

torch.set_num_threads(1)

M = TypeVar("M", bound=Message)
DEVICES = ("far-2", "far-1", "far-3")
ROUNDS = 3


class FakeLink:
    """Members that answer at once; notes everything that crosses."""

    def __init__(self, handlers: Mapping[str, Callable[[Any], Message]]) -> None:
        self.handlers = handlers
        self.asked: list[tuple[str, Message]] = []

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self.handlers)

    def ask(self, messages: Mapping[str, Request], bounds: object = None) -> dict[str, Message | Refused]:
        replies: dict[str, Message | Refused] = {}
        for member, message in messages.items():
            self.asked.append((member, message))
            answered = self.handlers[member](message)
            assert isinstance(answered, message.reply)
            replies[member] = answered
        return replies


class NoBookmark:
    """A training that is not kept."""

    where = "nowhere"

    def load(self) -> TrainingState | None:
        return None

    def due(self) -> bool:
        return False

    def save(self, state: TrainingState) -> None:
        raise AssertionError("it is never due")


class FakeSteps:
    """Finished steps in a dict."""

    def __init__(self, done: dict[str, Message] | None = None) -> None:
        self.done = dict(done or {})
        self.asked: list[str] = []

    def step(self, name: str, result: type[M], compute: Callable[[], M], reads: object = None) -> M:
        self.asked.append(name)
        if name not in self.done:
            self.done[name] = compute()
        value = self.done[name]
        assert isinstance(value, result)
        return value

    def bookmark(self, name: str) -> NoBookmark:
        return NoBookmark()


@pytest.fixture(scope="module")
def job() -> Job:
    return make_job(
        tiny_fields(
            devices={"far": 3},
            model={"config": {name: size for name, size in TINY_VIT.items() if name != "patch_size"}},
            header={"keep_distilled": False},
            refine={"rounds": ROUNDS, "prune_share": 0.5, "guard": True, "settle": False},
        )
    )


@pytest.fixture(scope="module")
def data(job: Job) -> FleetData:
    return share_out(load_samples(job), job.data, {"near": ["near-1"], "far": DEVICES}, job.seed)


@pytest.fixture(scope="module")
def assignment(job: Job, data: FleetData) -> BackboneAssignment:
    """The untrained reference, as it is."""
    reference = train_reference(job, data.public, lambda *_: None)
    return BackboneAssignment(
        cluster="far",
        family="vit",
        config=reference.config,
        labels=data.public.train.label_names,
        header=classifier_of(job, reference, 10).header.spec,
        tensors=reference.tensors,
    )


def attributes_of(name: str, limit: int = 10**6) -> DeviceAttributes:
    return DeviceAttributes(device_id=name, storage_limit_bytes=limit, energy=EnergyModel(), num_samples=100)


class Devices(FakeLink):
    """Real devices in memory."""

    def __init__(self, data: FleetData) -> None:
        self.states = {d: DeviceState(attributes_of(d), data.devices[d], DeviceMemory()) for d in DEVICES}

        def answer(device: str) -> Callable[[Any], Message]:
            def handled(message: Message) -> Message:
                self.states[device], reply = handle(self.states[device], message)
                return reply

            return handled

        super().__init__({d: answer(d) for d in DEVICES})


EDGE_STEPS = [
    "attributes/far",
    "header_search/far",
    *(f"refine/far/{i}" for i in range(ROUNDS + 1)),
    "propose/far",
    "finish/far",
]


@dataclass
class EdgeRun:
    """What one edge did."""

    link: Devices
    steps: FakeSteps
    told: list[tuple[str, int, int]]
    report: ClusterReport


@pytest.fixture(scope="module")
def whole(job: Job, data: FleetData, assignment: BackboneAssignment) -> EdgeRun:
    """An edge's whole run, never to be changed."""
    link, steps, told = Devices(data), FakeSteps(), []

    def progress(phase: str, done: int, total: int, note: str = "") -> None:
        told.append((phase, done, total))

    return EdgeRun(link, steps, told, run_edge(job, assignment, data.edges["far"], link, steps, progress))


def test_an_edge_takes_its_devices_through_the_method_in_order(whole: EdgeRun) -> None:
    link, steps, told, report = whole.link, whole.steps, whole.told, whole.report
    assert steps.asked == EDGE_STEPS
    # Each device: attributes, coarse model, T rounds, proposal, finish; numbered 0, 1, 2, ...
    kinds = ["attributes_request", "coarse_model", *["refine_round"] * ROUNDS, "propose", "finish"]
    for device in DEVICES:
        mine = [message for member, message in link.asked if member == device]
        assert [m.kind for m in mine] == kinds
        assert [m.step for m in mine if isinstance(m, DeviceMessage)] == list(range(ROUNDS + 4))
        assert [m.round for m in mine if isinstance(m, RefineRound)] == [1, 2, 3]
    # One step after the other, devices in the link's order.
    assert [member for member, _ in link.asked] == list(DEVICES) * len(kinds)
    # Personal tensors from the second round on, of the sender's own state.
    for number, (member, message) in enumerate(link.asked[6:18]):
        state = steps.done[f"refine/far/{number // 3}"]
        assert isinstance(state, rounds.EdgeState)
        assert bool(message.tensors) == (number >= 3)
        torch.testing.assert_close(dict(message.tensors), rounds.personal(state, member), rtol=0, atol=0)
    assert [d.device_id for d in report.devices] == list(DEVICES)
    assert [r["round"] for r in report.rounds] == list(range(ROUNDS + 1))
    assert report.cluster == "far"
    assert [t for t in told if t[0] == "refine"] == [("refine", i, ROUNDS + 3) for i in (*range(5), 6)]
    assert told[-1] == ("refine", ROUNDS + 3, ROUNDS + 3)
    for phase in {p for p, _, _ in told}:
        done = [d / t for p, d, t in told if p == phase]
        assert done == sorted(done)
        assert all(0 <= share <= 1 for share in done)


@pytest.mark.parametrize("finished", range(1, len(EDGE_STEPS) + 1))
def test_what_is_finished_is_not_asked_again(
    job: Job, data: FleetData, assignment: BackboneAssignment, whole: EdgeRun, finished: int
) -> None:
    """Stopped after any step and gone on with: the rest is asked once, and the report is the same."""
    link, steps = whole.link, whole.steps
    # Devices that have come as far as the saved steps; a step of each is one message, the search is none.
    again = Devices(data)
    messages = finished - (finished > 1)
    for member, message in link.asked[: 3 * messages]:
        again.handlers[member](message)
    saved = FakeSteps({name: steps.done[name] for name in EDGE_STEPS[:finished]})
    report = run_edge(job, assignment, data.edges["far"], again, saved, silent)
    assert report.model_dump_json() == whole.report.model_dump_json()
    assert saved.asked == EDGE_STEPS
    assert [(d, m.model_dump_json()) for d, m in again.asked] == [
        (d, m.model_dump_json()) for d, m in link.asked[3 * messages :]
    ]


def test_the_header_is_searched_for_the_smallest_device(
    job: Job, data: FleetData, assignment: BackboneAssignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    real = edge.find_header

    def find(job: Job, assignment: BackboneAssignment, data: Any, limit: int, progress: Any) -> HeaderResult:
        limits.append(limit)
        return real(job, assignment, data, limit, progress)

    monkeypatch.setattr(edge, "find_header", find)
    link = Devices(data)
    for device, limit in zip(DEVICES, (700_000, 500_000, 600_000), strict=True):
        old = link.states[device]
        link.states[device] = DeviceState(attributes_of(device, limit), old.data, old.memory)
    run_edge(job, assignment, data.edges["far"], link, FakeSteps(), silent)
    assert limits == [500_000]


def test_gathering_asks_for_nothing_but_attributes(job: Job, data: FleetData) -> None:
    link, steps = Devices(data), FakeSteps()
    stats = gather_stats(job, "far", link, steps)
    assert stats.devices == tuple(attributes_of(d) for d in DEVICES)
    assert [m.kind for _, m in link.asked] == ["attributes_request"] * 3
    assert gather_stats(job, "far", link, steps) == stats
    assert len(link.asked) == 3


def test_a_device_that_nothing_fits_is_left_out_and_the_others_go_on(
    job: Job, data: FleetData, assignment: BackboneAssignment
) -> None:
    link = Devices(data)
    old = link.states[DEVICES[1]]
    link.states[DEVICES[1]] = DeviceState(attributes_of(DEVICES[1], 1), old.data, old.memory)
    report = run_edge(job, assignment, data.edges["far"], link, FakeSteps(), silent)
    assert [d.device_id for d in report.devices] == [DEVICES[0], DEVICES[2]]
    assert [(a.device_id, a.since) for a in report.absent] == [(DEVICES[1], "coarse model")]
    (fault,) = report.faults
    assert fault.reason.startswith("left out: nothing fits its limit of 1 bytes, this has ")
    assert {m.kind for d, m in link.asked if d == DEVICES[1]} == {"attributes_request"}


def test_what_a_kit_knows_counts_whatever_a_device_says(job: Job, data: FleetData) -> None:
    link = Devices(data)
    old = link.states[DEVICES[1]]
    link.states[DEVICES[1]] = DeviceState(attributes_of(DEVICES[1], 1), old.data, old.memory)
    stats = gather_stats(job, "far", link, FakeSteps(), {d: attributes_of(d) for d in DEVICES})
    assert stats.devices == tuple(attributes_of(d) for d in DEVICES)
    (fault,) = stats.faults
    assert (fault.device_id, fault.recovered) == (DEVICES[1], True)
    assert "it says another storage_limit_bytes than its edge's kit has" in fault.reason


class Lying(Devices):
    """One device's weights are a million, and its vote is for them."""

    def ask(self, messages: Mapping[str, Request], bounds: object = None) -> dict[str, Message | Refused]:
        replies = super().ask(messages)
        reply = replies.get(DEVICES[0])
        if isinstance(reply, RoundReply):
            header = {n: torch.full_like(t, 1.0) for n, t in reply.tensors.items() if n.startswith("level.")}
            replies[DEVICES[0]] = reply.model_copy(update={"tensors": reply.tensors | header})
        if isinstance(reply, ProposeReply):
            losses = torch.zeros_like(reply.tensors["losses"])
            losses[0] = 1e5
            replies[DEVICES[0]] = reply.model_copy(update={"num_samples": 100, "tensors": {"losses": losses}})
        return replies


def test_a_lying_device_is_named_and_costs_others_nothing(
    job: Job, data: FleetData, assignment: BackboneAssignment, whole: EdgeRun
) -> None:
    honest = {d.device_id: d for d in whole.report.devices}
    for robust in (True, False):
        now = job.model_copy(update={"members": MembersConfig(robust=robust)})
        report = run_edge(now, assignment, data.edges["far"], Lying(data), FakeSteps(), silent)
        named = {f.device_id for f in report.faults if "its header changed by" in f.reason}
        assert named == ({DEVICES[0]} if robust else set())
        others = [d for d in report.devices if d.device_id != DEVICES[0]]
        assert len(others) == 2, "nobody honest is refused"
        if robust:
            for device in others:
                before = honest[device.device_id]
                assert device.accuracy is not None
                assert before.accuracy is not None
                assert device.accuracy >= before.accuracy - 0.15  # of some twenty test samples


# -- the cloud --------------------------------------------------------------------------------------------------------


class Edges(FakeLink):
    """Edges that know their attributes and report nothing of interest."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        def answer(cluster: str) -> Callable[[Any], Message]:
            def handled(message: Message) -> Message:
                if isinstance(message, StatsRequest):
                    return ClusterStats(devices=(attributes_of(f"{cluster}-1", limits[cluster]),))
                assert isinstance(message, BackboneAssignment)
                assert message.cluster == cluster
                report: dict[str, Any] = dict.fromkeys(("trials", "similarity", "distance", "rounds", "devices"), ())
                return ClusterReport(cluster=cluster, header=HeaderSpec(), decision={}, **report)

            return handled

        super().__init__({cluster: answer(cluster) for cluster in limits})


CLOUD_STEPS = ["reference/cloud", "elastic/cloud", "candidates/cloud", "specialise/near", "specialise/far"]


def test_the_cloud_trains_once_and_gives_each_edge_its_own(job: Job, data: FleetData) -> None:
    edges, steps, cache = Edges({"near": 30_000, "far": 10**6}), FakeSteps(), FakeSteps()
    result = run_cloud(job, data.public, edges, steps, cache, silent)
    assert steps.asked == CLOUD_STEPS
    assert [(member, m.kind) for member, m in edges.asked] == [
        ("near", "stats_request"),
        ("far", "stats_request"),
        ("near", "backbone_assignment"),
        ("far", "backbone_assignment"),
    ]
    assert list(result.reports) == list(result.choices) == ["near", "far"]
    for cluster, limit in (("near", 30_000), ("far", 10**6)):
        choice = result.choices[cluster]
        assert choice.limit_bytes == limit
        assert result.candidates.candidates[choice.chosen].size_bytes <= limit
    sent = {member: m for member, m in edges.asked if isinstance(m, BackboneAssignment)}
    for cluster, message in sent.items():
        shape = result.candidates.candidates[result.choices[cluster].chosen].shape
        assert message.config["num_hidden_layers"] == shape.depth
        assert message.config["intermediate_size"] == 32 * shape.width

    # The same run again, and another run with the cache only.
    again = Edges({"near": 30_000, "far": 10**6})
    run_cloud(job, data.public, again, FakeSteps(steps.done), FakeSteps(), silent)
    assert [m.model_dump_json() for _, m in again.asked] == [m.model_dump_json() for _, m in edges.asked]
    used = FakeSteps(cache.done)
    run_cloud(job, data.public, Edges({"near": 30_000, "far": 10**6}), FakeSteps(), used, silent)
    assert used.asked == list(cache.done)


def test_clusters_of_one_shape_share_one_specialisation(
    job: Job, data: FleetData, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    whole = cloud_elastic.cut_and_specialise

    def noting(*arguments: Any) -> BackboneAssignment:
        made.append(arguments[4])
        return whole(*arguments)

    monkeypatch.setattr(cloud_elastic, "cut_and_specialise", noting)
    steps = FakeSteps()
    run_cloud(job, data.public, Edges({"near": 10**6, "far": 10**6}), steps, FakeSteps(), silent)
    assert made == ["near"]
    far = steps.done["specialise/far"]
    assert isinstance(far, BackboneAssignment)
    reference, elastic = steps.done["reference/cloud"], steps.done["elastic/cloud"]
    alone = whole(job, reference, elastic, data.public, "far", far.shape, silent)  # type: ignore[arg-type]
    assert far.model_dump(exclude={"tensors"}) == alone.model_dump(exclude={"tensors"})
    assert far.tensors.keys() == alone.tensors.keys()
    assert all(torch.equal(tensor, alone.tensors[name]) for name, tensor in far.tensors.items())


class Liars(Edges):
    """Edges whose devices have the names of files elsewhere, or of each other's devices."""

    def __init__(self, stats: Mapping[str, str], reports: Mapping[str, str]) -> None:
        super().__init__(dict.fromkeys(stats, 10**6))
        for cluster, honest in dict(self.handlers).items():
            self.handlers[cluster] = self.lying(cluster, honest, stats, reports)  # type: ignore[index]

    def lying(self, cluster: str, honest: Any, stats: Mapping[str, str], reports: Mapping[str, str]) -> Any:
        def handled(message: Message) -> Message:
            reply = honest(message)
            if isinstance(reply, ClusterStats):
                return ClusterStats(devices=(attributes_of(stats[cluster]),))
            return reply.model_copy(update={"cluster": reports[cluster]})

        return handled


@pytest.mark.parametrize(
    ("stats", "reports", "says"),
    [
        (("../near-1", "far-1"), ("near", "far"), "near: a device's name must be"),
        (("near-1", "near-1"), ("near", "far"), "far: device 'near-1' is there twice, also in near"),
        (("near-1", "far-1"), ("far", "far"), "near: its report is of 'far'"),
    ],
)
def test_what_an_edge_says_is_checked_before_it_is_used(
    job: Job, data: FleetData, stats: tuple[str, str], reports: tuple[str, str], says: str
) -> None:
    names = ("near", "far")
    edges = Liars(dict(zip(names, stats, strict=True)), dict(zip(names, reports, strict=True)))
    with pytest.raises(ValueError, match=says):
        run_cloud(job, data.public, edges, FakeSteps(), FakeSteps(), silent)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"refine": {"rounds": 9}}, True),
        ({"backbone": {"steps": 3}}, True),
        ({"data": {"split": "iid", "device_test_share": 0.5}}, True),
        ({"run": {"threads": 2}}, True),
        ({"seed": 1}, False),
        ({"model": {"epochs": 2}}, False),
        ({"data": {"public_share": 0.3}}, False),
        ({"data": {"validation_share": 0.3}}, False),
    ],
)
def test_a_cached_reference_is_used_only_where_nothing_that_made_it_differs(
    job: Job, data: FleetData, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], same: bool
) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object) -> Message:
        raise Stop

    monkeypatch.setattr(run, "train_reference", stop)

    def key(job: Job) -> str:
        cache = FakeSteps()
        with pytest.raises(Stop):
            run_cloud(job, data.public, Edges({"far": 10**6}), FakeSteps(), cache, silent)
        (name,) = cache.asked
        return name

    fields = job.model_dump(exclude_none=True)
    for section, values in change.items():
        fields[section] = fields[section] | values if isinstance(values, dict) else values
    assert (key(make_job(fields)) == key(job)) is same


def test_other_data_is_another_reference(job: Job, data: FleetData) -> None:
    def key(fingerprint: str) -> str:
        train = replace(data.public.train, fingerprint=fingerprint)
        return reference_key(job, replace(data.public, train=train))

    assert data.public.train.fingerprint == "digits"
    assert key("digits") == reference_key(job, data.public) != key("digits 900 0")


def test_a_cluster_that_nothing_fits_is_left_out_and_one_device_ends_no_run(job: Job, data: FleetData) -> None:
    edges, told = Edges({"near": 1, "far": 10**6}), []

    def progress(phase: str, done: int, total: int, note: str = "") -> None:
        told.append(f"{phase}: {note}")

    result = run_cloud(job, data.public, edges, FakeSteps(), FakeSteps(), progress)
    assert list(result.reports) == list(result.choices) == ["far"]
    (left,) = result.left_out
    assert (left.device_id, left.cluster, left.limit_bytes) == ("near-1", "near", 1)
    assert f"left out: near-1: {left.reason}" in told
    assert "its storage limit of 1 bytes (1 without the room for a header, header.room = 0.1)" in left.reason
    assert ("near", "backbone_assignment") not in [(member, m.kind) for member, m in edges.asked]
    with pytest.raises(ValueError, match=r"nothing fits any device .cluster 'near': storage limit of 1 bytes;"):
        run_cloud(job, data.public, Edges({"near": 1, "far": 2}), FakeSteps(), FakeSteps(), silent)
