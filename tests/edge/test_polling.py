"""Who must reply for a step to go on, who is asked again and when, and what is said about the others."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from fleetfit.cloud.run import ask_edges
from fleetfit.config.sections import LinksConfig, RefineConfig
from fleetfit.core.encoding import Message, Request
from fleetfit.core.link import Refused
from fleetfit.core.records import DeviceAttributes, EnergyModel, HeaderSpec, ValidationScores
from fleetfit.device.messages import (
    AttributesReply,
    AttributesRequest,
    CoarseModel,
    CoarseReply,
    Propose,
    ProposeReply,
)
from fleetfit.edge.checks import Expected
from fleetfit.edge.messages import ClusterStats, StatsRequest
from fleetfit.edge.polling import ATTEMPTS, NO_REPLY, Answers, Cluster

SCORES = ValidationScores(num_samples=1, loss_sum=0.5, num_correct=1)
SKETCH_CHANNELS = 4
EXPECTED = Expected(
    refine=RefineConfig(similarity="wasserstein", class_prior=False, learning_rate=1.0), channels=SKETCH_CHANNELS
)
COARSE = CoarseModel(
    step=1,
    family="vit",
    config={},
    labels=("a", "b"),
    header=HeaderSpec(),
    refine=RefineConfig(),
    seed=0,
    class_shares=(),
)
LOST = Refused(reason="declined: it has no coarse model", needs_model=True)
BROKEN = Refused(reason="it is corrupt")
GONE = None


def sketched() -> CoarseReply:
    return CoarseReply(step=1, scores=SCORES, tensors={"sketch.all": torch.zeros(2, SKETCH_CHANNELS)})


def proposed(step: int = 4) -> ProposeReply:
    return ProposeReply(step=step, num_samples=1, tensors={"losses": torch.full((6,), 0.5)})


class Script:
    """Members that answer by a script: for each, what comes at its first message, its second, ..."""

    def __init__(self, **answers: list[Any]) -> None:
        self.answers = answers
        self.asked: list[dict[str, str]] = []

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self.answers)

    def ask(self, messages: Mapping[str, Request], bounds: object = None) -> dict[str, Message | Refused]:
        self.asked.append({member: message.kind for member, message in messages.items()})
        came = {}
        for member in reversed(list(messages)):  # in whichever order
            answer = self.answers[member].pop(0)
            if answer is not GONE:
                came[member] = answer
        return came | {"somebody": proposed()}  # nobody asked it


def propose(link: Script, members: str, quorum: float = 0.5) -> Answers[ProposeReply]:
    cluster = Cluster("far", link, LinksConfig(quorum=quorum), EXPECTED, COARSE)
    return cluster.ask("proposal", ProposeReply, lambda _: Propose(step=4), members.split())


def told(answers: Answers[Any]) -> list[tuple[str, str, int, bool]]:
    return [(f.device_id, f.reason, f.times, f.recovered) for f in answers.faults]


def test_all_reply_at_once_and_come_in_the_links_order() -> None:
    link = Script(b=[proposed()], a=[proposed()])
    answers = propose(link, "a b")
    assert list(answers.replies) == ["b", "a"]
    assert (answers.joined, answers.faults) == ({}, ())
    assert link.asked == [{"b": "propose", "a": "propose"}]


@pytest.mark.parametrize(
    ("quorum", "number", "needed"),
    [(0.5, 4, 2), (0.5, 5, 3), (0.6, 5, 3), (0.55, 20, 11), (1.0, 3, 3), (0.01, 3, 1), (0.1, 10, 1), (0.5, 1, 1)],
)
def test_how_many_are_a_quorum(quorum: float, number: int, needed: int) -> None:
    names = [f"d{i}" for i in range(number)]

    def script(replying: int) -> Script:
        return Script(**{n: [proposed()] if i < replying else [GONE] * ATTEMPTS for i, n in enumerate(names)})

    enough = script(needed)
    assert list(propose(enough, " ".join(names), quorum).replies) == names[:needed]
    assert len(enough.asked) == 1
    if needed > 1:
        few = script(needed - 1)
        with pytest.raises(ValueError, match=f"{needed - 1} of {number} devices replied validly, {needed} must"):
            propose(few, " ".join(names), quorum)
        assert [len(asked) for asked in few.asked] == [number] + [number - needed + 1] * (ATTEMPTS - 1)


def test_without_a_quorum_only_those_are_asked_again_that_have_not_replied() -> None:
    link = Script(a=[proposed()], b=[GONE, BROKEN, proposed()], c=[GONE] * 3, d=[BROKEN, BROKEN, GONE])
    answers = propose(link, "a b c d")
    assert list(answers.replies) == ["a", "b"]
    assert [list(asked) for asked in link.asked] == [["a", "b", "c", "d"], ["b", "c", "d"], ["b", "c", "d"]]
    assert sorted(told(answers)) == [
        ("b", "it is corrupt", 1, True),
        ("b", NO_REPLY, 1, True),
        ("c", NO_REPLY, 3, False),
        ("d", "it is corrupt", 2, False),
        ("d", NO_REPLY, 1, False),
    ]
    assert {f.step for f in answers.faults} == {"proposal"}


def test_a_reply_that_is_not_valid_counts_as_none() -> None:
    link = Script(a=[proposed(step=3)] * ATTEMPTS, b=[proposed()])
    answers = propose(link, "a b")
    assert list(answers.replies) == ["b"]
    assert told(answers) == [("a", "it answers step 3, expected 4", 1, False)]
    assert len(link.asked) == 1


def test_who_has_no_coarse_model_gets_it_and_is_asked_at_once() -> None:
    link = Script(a=[proposed()], b=[sketched(), proposed()], c=[GONE])
    answers = propose(link, "a", quorum=0.3)
    assert (list(answers.replies), list(answers.joined)) == (["a", "b"], ["b"])
    assert link.asked == [{"a": "propose", "b": "coarse_model", "c": "coarse_model"}, {"b": "propose"}]
    assert told(answers) == [("c", NO_REPLY, 1, False)]


def test_who_has_just_joined_counts_for_the_quorum() -> None:
    """Those that have the model are gone, others have come: they can go on."""
    link = Script(a=[GONE] * 2, b=[sketched(), proposed()])
    answers = propose(link, "a")
    assert (list(answers.replies), list(answers.joined)) == (["b"], ["b"])


def test_who_has_lost_the_model_gets_it_again() -> None:
    link = Script(a=[proposed()], b=[LOST, sketched(), proposed()])
    answers = propose(link, "a b")
    assert list(answers.replies) == ["a", "b"]
    assert [asked.get("b") for asked in link.asked] == ["propose", "coarse_model", "propose"]
    assert told(answers) == [("b", LOST.reason, 1, True)]


def test_one_that_always_lacks_the_model_is_let_go() -> None:
    link = Script(a=[proposed()], b=[LOST, sketched(), LOST])
    answers = propose(link, "a b")
    assert list(answers.replies) == ["a"]
    assert told(answers) == [("b", LOST.reason, 2, False)]
    assert len(link.asked) == ATTEMPTS


def test_one_that_gets_the_model_at_the_last_attempt_has_joined_but_not_replied() -> None:
    link = Script(a=[GONE, GONE, proposed()], b=[GONE, GONE, sketched()])
    answers = propose(link, "a")
    assert (list(answers.replies), list(answers.joined)) == (["a"], ["b"])
    assert told(answers) == [("a", NO_REPLY, 2, True), ("b", NO_REPLY, 2, False)]


def test_who_has_the_model_is_not_asked_to_show_its_sketch_again() -> None:
    link = Script(a=[proposed()], b=[sketched(), sketched()])
    answers = propose(link, "a")
    assert told(answers) == [("b", "it is a 'coarse_reply', expected a 'propose_reply'", 1, False)]
    assert len(link.asked) == 2


def test_the_error_names_everybody_who_is_missing_and_why() -> None:
    link = Script(a=[GONE] * 3, b=[BROKEN] * 3, c=[proposed()], d=[sketched(), GONE, GONE])
    with pytest.raises(ValueError, match="far, proposal") as error:
        propose(link, "a b c", quorum=0.75)
    assert "Missing: a (no reply); b (it is corrupt); d (no reply)" in str(error.value)
    link = Script(a=[GONE] * 3, b=[GONE, GONE, sketched()])
    with pytest.raises(ValueError, match=r"a \(no reply\); b \(no reply\)"):
        propose(link, "a", quorum=1.0)


def test_questions_that_need_no_model_go_to_all() -> None:
    attributes = [
        DeviceAttributes(device_id=d, storage_limit_bytes=5, energy=EnergyModel(), num_samples=3) for d in ("a", "b")
    ]
    link = Script(
        a=[AttributesReply(step=0, attributes=attributes[1])], b=[AttributesReply(step=0, attributes=attributes[1])]
    )
    cluster = Cluster("far", link, LinksConfig())
    answers = cluster.ask("attributes", AttributesReply, lambda _: AttributesRequest(step=0), link.members)
    assert list(answers.replies) == ["b"]
    assert told(answers) == [("a", "device_id must be 'a', got 'b'", 1, False)]
    assert link.asked == [{"a": "attributes_request", "b": "attributes_request"}]


# -- edges ------------------------------------------------------------------------------------------------------------


def test_an_edge_that_is_missing_is_asked_again_the_others_are_not() -> None:
    stats = ClusterStats(devices=())
    link = Script(near=[GONE, BROKEN, stats], far=[stats])
    replies = ask_edges(link, dict.fromkeys(("near", "far"), StatsRequest()), ClusterStats)
    assert list(replies) == ["near", "far"]
    assert [list(asked) for asked in link.asked] == [["near", "far"], ["near"], ["near"]]


def test_without_an_edge_the_cloud_stops_and_says_so() -> None:
    link = Script(near=[GONE] * ATTEMPTS, far=[ClusterStats(devices=())], there=[BROKEN] * ATTEMPTS)
    with pytest.raises(ValueError, match=r"edges are missing: near \(no reply\); there \(it is corrupt\)\. Run again"):
        ask_edges(link, dict.fromkeys(("near", "far", "there"), StatsRequest()), ClusterStats)
    assert len(link.asked) == ATTEMPTS
