"""The edge's rounds: who is weighed how, Eq. 21 by hand, groups from changes, and when rounds end."""

import pytest
import torch
from torch import Tensor

from fleetfit.config.sections import RefineConfig
from fleetfit.core.encoding import put
from fleetfit.core.randomness import named_generator
from fleetfit.core.records import ValidationScores
from fleetfit.device.messages import CoarseReply, RoundReply
from fleetfit.edge import rounds
from fleetfit.edge.rounds import EdgeState
from fleetfit.method.similarity import random_projections, sketch_quantiles

torch.set_num_threads(1)

SIMILARITIES = ("alone", "average", "js", "wasserstein", "calibrated")
NOTHING = ValidationScores(num_samples=0, loss_sum=0.0, num_correct=0)


def scores(num: int, loss: float, right: int = 0) -> ValidationScores:
    return ValidationScores(num_samples=num, loss_sum=num * loss, num_correct=right)


# -- weights ----------------------------------------------------------------------------------------------------------


CALIBRATED = RefineConfig(similarity="calibrated", prune_share=0.1)


def after(state: EdgeState, replies: dict[str, RoundReply]) -> EdgeState:
    sent = {n.removeprefix("header."): torch.zeros_like(t) for n, t in next(iter(replies.values())).tensors.items()}
    return rounds.next_state(CALIBRATED, state, replies, sent, robust=False, num_classes=4)


def features_of(group: int, device: int, num: int = 20) -> Tensor:
    return torch.randn(num, 6, generator=named_generator(device, "features")) + 2.0 * group


def sketch_of(features: Tensor, sketch: str) -> dict[str, Tensor]:
    if sketch == "samples":
        return {"all": features}
    directions = random_projections(6, 16, named_generator(0, "directions"))
    half = len(features) // 2
    parts = {"all": features, "first": features[:half], "second": features[-half:]}
    return {name: sketch_quantiles(part, directions, 10) for name, part in parts.items()}


def weigh(similarity: str, sketch: str = "samples", groups: tuple[int, ...] = (0, 0, 0, 1, 1)) -> tuple[Tensor, Tensor]:
    refine = RefineConfig(similarity=similarity, sketch=sketch)  # type: ignore[arg-type]
    return rounds.weigh_devices(refine, [sketch_of(features_of(g, i), sketch) for i, g in enumerate(groups)])


def test_alone_is_the_identity_and_average_is_uniform() -> None:
    assert weigh("alone")[1].tolist() == torch.eye(5).tolist()
    assert weigh("average")[1].tolist() == [[0.2] * 5] * 5


@pytest.mark.parametrize("sketch", ["samples", "sliced"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_rows_of_weights_sum_to_one(similarity: str, sketch: str) -> None:
    for groups in ((0,), (0, 1), (0, 0, 0, 1, 1)):
        distance, weights = weigh(similarity, sketch, groups)
        number = len(groups)
        assert distance.shape == weights.shape == (number, number)
        torch.testing.assert_close(weights.sum(1), torch.ones(number, dtype=torch.float64))
        assert bool((weights >= 0).all())
        assert bool((distance.diagonal() == 0).all())
        torch.testing.assert_close(distance, distance.T)
        if number == 1:
            assert weights.tolist() == [[1.0]]


@pytest.mark.parametrize("sketch", ["samples", "sliced"])
@pytest.mark.parametrize("similarity", ["js", "wasserstein", "calibrated"])
def test_two_groups_of_devices_weigh_more_inside_than_across(similarity: str, sketch: str) -> None:
    groups = torch.tensor([0, 0, 0, 1, 1])
    distance, weights = weigh(similarity, sketch)
    inside = groups[:, None] == groups[None, :]
    assert distance[inside].max() < distance[~inside].min()
    for row, same in zip(weights, inside, strict=True):
        assert row[same].min() > row[~same].max()
    if similarity == "calibrated":  # the others differ from uniform by little
        assert weights[~inside].max() < 0.05
        assert weights[inside].min() > 0.15


def test_calibrated_treats_devices_of_one_distribution_alike() -> None:
    weights = weigh("calibrated", groups=(0, 0, 0, 0))[1]
    assert float((weights - 0.25).abs().max()) < 0.1


@pytest.mark.parametrize("sketch", ["samples", "sliced"])
def test_calibrated_with_devices_of_one_sample(sketch: str) -> None:
    refine = RefineConfig(similarity="calibrated", sketch=sketch)  # type: ignore[arg-type]
    sizes = (20, 1, 20)
    every = [features_of(0, i)[:n] for i, n in enumerate(sizes)]
    sketches = [sketch_of(f if len(f) > 1 else f.repeat(2, 1), sketch) for f in every]
    if sketch == "samples":
        sketches[1] = {"all": every[1]}
    weights = rounds.weigh_devices(refine, sketches)[1]
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    assert bool((weights > 0).all())
    # None of them can show its own noise: nothing is known, all count alike.
    alike = rounds.weigh_devices(refine, [sketches[1]] * 3)[1]
    torch.testing.assert_close(alike, torch.full((3, 3), 1 / 3, dtype=torch.float64))


def test_the_first_state_pools_scores_and_keeps_the_order_of_devices() -> None:
    replies = {
        f"d{i}": CoarseReply(step=1, scores=scores(2 + i, 0.5, i), tensors=put("sketch", {"all": features_of(g, i)}))
        for i, g in enumerate((0, 1, 0))
    }
    state = rounds.first_state(CALIBRATED, replies)
    assert state.scores.model_dump() == {"num_samples": 9, "loss_sum": 4.5, "num_correct": 3}
    assert (state.round, state.devices) == (0, ("d0", "d1", "d2"))
    assert all(rounds.personal(state, d) == {} for d in state.devices), "a sketch is nobody else's business"
    weights = torch.tensor(state.weights)
    assert weights[0, 2] > weights[0, 1]
    assert weights[2, 0] > weights[2, 1]


# -- Eq. 21 -----------------------------------------------------------------------------------------------------------

WEIGHTS = ((0.75, 0.25), (0.5, 0.5))


def test_the_next_state_is_eq_21_worked_by_hand() -> None:
    """Q_1 = (1, 3 | 4) has sum 8, Q_2 = (30, 10 | 0) has sum 40: scaled (.125, .375 | .5) and (.75, .25 | 0)."""
    replies = {
        "one": RoundReply(
            step=2,
            scores=scores(1, 1.0),
            tensors={
                "importance.a": torch.tensor([1.0, 3.0]),
                "importance.b": torch.tensor([4.0]),
                "header.w": torch.tensor([[4.0, 8.0]]),
            },
        ),
        "two": RoundReply(
            step=2,
            scores=scores(3, 2.0, 2),
            tensors={
                "importance.a": torch.tensor([30.0, 10.0]),
                "importance.b": torch.tensor([0.0]),
                "header.w": torch.tensor([[0.0, -8.0]]),
            },
        ),
    }
    state = after(EdgeState(devices=("one", "two"), weights=WEIGHTS, scores=NOTHING, round=3), replies)
    expected = {
        "one/importance.a": [0.28125, 0.34375],  # .75 * .125 + .25 * .75, .75 * .375 + .25 * .25
        "one/importance.b": [0.375],
        "one/header.w": [[3.0, 4.0]],
        "two/importance.a": [0.4375, 0.3125],
        "two/importance.b": [0.25],
        "two/header.w": [[2.0, 0.0]],
    }
    assert {name: tensor.tolist() for name, tensor in state.tensors.items()} == expected
    assert state.round == 4
    assert state.weights == WEIGHTS
    assert state.scores.model_dump() == {"num_samples": 4, "loss_sum": 7.0, "num_correct": 2}
    assert {n: t.tolist() for n, t in rounds.personal(state, "two").items()} == {
        name.removeprefix("two/"): value for name, value in expected.items() if name.startswith("two/")
    }


def test_who_missed_the_round_keeps_what_the_edge_knew_and_nobody_listens_to_it() -> None:
    """Two of three: weights (.6, .2) and (.3, .5) are scaled to (.75, .25) and (.375, .625)."""
    weights = ((0.6, 0.2, 0.2), (0.3, 0.5, 0.2), (0.1, 0.1, 0.8))
    tensors = {
        "two/header.w": torch.tensor([9.0]),
        "three/header.w": torch.tensor([7.0]),
        "three/importance.a": torch.tensor([0.5]),
        "three/sketch.all": torch.tensor([[1.0]]),
    }
    before = EdgeState(devices=("one", "two", "three"), weights=weights, scores=NOTHING, tensors=tensors)
    replies = {
        d: RoundReply(
            step=3, scores=scores(1, 1.0), tensors={"importance.a": torch.tensor([1.0]), "header.w": torch.tensor([w])}
        )
        for d, w in (("one", 0.0), ("two", 8.0))
    }
    state = after(before, replies)
    header = {d: float(rounds.personal(state, d)["header.w"]) for d in before.devices}
    assert header == pytest.approx({"one": 2.0, "two": 5.0, "three": 7.0})
    assert rounds.personal(state, "three") == {
        "header.w": torch.tensor([7.0]),
        "importance.a": torch.tensor([0.5]),
    }
    assert state.weights == weights
    assert state.scores.num_samples == 2


def test_weights_among_all_are_those_of_the_state_to_the_last_bit() -> None:
    weights = ((0.1, 0.2, 0.7), (1 / 3, 1 / 3, 1 / 3), (0.3, 0.3, 0.4))
    state = EdgeState(
        devices=("a", "b", "c"), weights=weights, distance=((0, 1, 2), (1, 0, 3), (2, 3, 0)), scores=NOTHING
    )
    assert rounds.weights_among(state, {"a": 1, "b": 2, "c": 3}).tolist() == [list(row) for row in weights]
    some = rounds.weights_among(state, ["a", "c", "never"])
    torch.testing.assert_close(
        some, torch.tensor([[0.125, 0.875, 0], [3 / 7, 4 / 7, 0], [0, 0, 1]], dtype=torch.float64)
    )
    assert rounds.distance_among(state, ["a", "c", "never"]) == ((0, 2, 0), (2, 0, 0), (0, 0, 0))


def test_who_joins_is_weighed_with_all_in_the_links_order() -> None:
    """As if it had been there from the beginning; what the others have got stays theirs."""
    order = ("d0", "d1", "d2")
    replies = {
        d: CoarseReply(step=1, scores=scores(2, 0.5), tensors=put("sketch", {"all": features_of(g, i)}))
        for i, (d, g) in enumerate(zip(order, (0, 1, 0), strict=True))
    }
    together = rounds.first_state(CALIBRATED, replies)
    early = rounds.first_state(CALIBRATED, {d: replies[d] for d in ("d0", "d2")})
    early = early.model_copy(update={"tensors": early.tensors | {"d0/header.w": torch.ones(1)}})
    late = rounds.with_joined(CALIBRATED, early, {"d1": replies["d1"]}, order)
    assert late.devices == order
    assert (late.weights, late.distance) == (together.weights, together.distance)
    assert rounds.personal(late, "d0") == {"header.w": torch.ones(1)}
    assert rounds.with_joined(CALIBRATED, early, {}, order) is early


def test_a_device_whose_name_begins_like_anothers_gets_only_its_own() -> None:
    tensors = {f"{d}/importance.a": torch.tensor([float(i)]) for i, d in enumerate(("d-1", "d-10", "d-1/x"))}
    state = EdgeState(scores=NOTHING, tensors=tensors)
    assert rounds.personal(state, "d-10") == {"importance.a": torch.tensor([1.0])}


@pytest.mark.parametrize("importance", [{}, {"importance.a": torch.zeros(2)}])
def test_headers_without_neurons_and_importance_of_zero(importance: dict[str, Tensor]) -> None:
    replies = {d: RoundReply(step=2, scores=NOTHING, tensors=importance) for d in ("one", "two")}
    state = after(EdgeState(devices=("one", "two"), weights=WEIGHTS, scores=NOTHING), replies)
    assert {n: t.tolist() for n, t in rounds.personal(state, "one").items()} == {n: [0.0, 0.0] for n in importance}


# -- groups from changes ----------------------------------------------------------------------------------------------

UPDATES = RefineConfig()


def round_of(headers: dict[str, list[float]], came: float = 1.0, average: float | None = None) -> dict[str, RoundReply]:
    return {
        d: RoundReply(
            step=2,
            scores=NOTHING,
            came=scores(10, came),
            average=scores(10, average) if average is not None else NOTHING,
            tensors={"header.w": torch.tensor(w)},
        )
        for d, w in headers.items()
    }


NAMES = tuple("abcdef")
TWO_GROUPS = {d: [1.0, 0.1 * i] if i % 2 else [-1.0, 0.1 * i] for i, d in enumerate(NAMES)}


def step(state: EdgeState, replies: dict[str, RoundReply]) -> EdgeState:
    sent = {"w": torch.zeros(2)}
    return rounds.next_state(UPDATES, state, replies, sent, robust=True, num_classes=4)


def fresh(devices: tuple[str, ...] = NAMES) -> EdgeState:
    return rounds.first_state(UPDATES, {d: CoarseReply(step=1, scores=NOTHING) for d in devices})


def test_groups_are_found_from_first_changes_and_averages_are_of_groups() -> None:
    state = step(fresh(), round_of(TWO_GROUPS))
    assert state.grouping == "found"
    assert {d: state.groups[d] for d in NAMES} == {d: i % 2 for i, d in enumerate(NAMES)}
    assert rounds.personal(state, "a")["header.w"].tolist() == pytest.approx([-1.0, 0.2])
    assert rounds.personal(state, "b")["header.w"].tolist() == pytest.approx([1.0, 0.3])
    assert rounds.personal(state, "a")["average.w"].tolist() == pytest.approx([0.0, 0.25])
    assert set(rounds.personal(state, "a")) == {"header.w", "average.w"}, "changes are nobody else's business"


@pytest.mark.parametrize(("came", "kept"), [(0.5, True), (1.0, False), (1.5, False)])
def test_groups_stay_only_if_held_out_samples_say_that_they_are_better(came: float, kept: bool) -> None:
    state = step(fresh(), round_of(TWO_GROUPS))
    state = step(state, round_of(TWO_GROUPS, came=came, average=1.0))
    assert state.grouping == ("kept" if kept else "dropped")
    assert (len(set(state.groups.values())) == 2) is kept
    expected = [-1.0, 0.2] if kept else [0.0, 0.25]
    assert rounds.personal(state, "a")["header.w"].tolist() == pytest.approx(expected)
    assert "average.w" not in rounds.personal(state, "a")


@pytest.mark.parametrize(("whole", "of_group", "kept"), [(1.0, 0.5, True), (1.0, 1.0, False), (0.5, 1.0, False)])
def test_groups_that_are_not_clear_are_on_trial(
    whole: float, of_group: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "CLEAR_SILHOUETTE", 1.0)
    state = step(fresh(), round_of(TWO_GROUPS))
    assert state.grouping == "found"
    assert rounds.personal(state, "a")["header.w"].tolist() == pytest.approx([0.0, 0.25])  # all go on from this
    assert rounds.personal(state, "a")["average.w"].tolist() == pytest.approx([-1.0, 0.2])
    state = step(state, round_of(TWO_GROUPS, came=whole, average=of_group))
    assert state.grouping == ("kept" if kept else "dropped")
    expected = [-1.0, 0.2] if kept else [0.0, 0.25]
    assert rounds.personal(state, "a")["header.w"].tolist() == pytest.approx(expected)
    assert "average.w" not in rounds.personal(state, "a")


@pytest.mark.parametrize(("clear", "grouping"), [(1.0, "dropped"), (0.15, "found")])
def test_where_nobody_can_look_only_clear_groups_stay(
    clear: float, grouping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "CLEAR_SILHOUETTE", clear)
    nobody = {d: reply.model_copy(update={"came": NOTHING}) for d, reply in round_of(TWO_GROUPS).items()}
    assert step(step(fresh(), round_of(TWO_GROUPS)), nobody).grouping == grouping


def test_noised_changes_make_clear_groups_only(monkeypatch: pytest.MonkeyPatch) -> None:
    noised = {d: reply.model_copy(update={"noise": 0.1}) for d, reply in round_of(TWO_GROUPS).items()}
    assert step(fresh(), noised).grouping == "found"
    monkeypatch.setattr(rounds, "CLEAR_SILHOUETTE", 1.0)
    assert step(fresh(), noised).grouping == "one"


def test_later_changes_do_not_regroup_and_who_comes_late_joins_the_nearest_group() -> None:
    state = step(fresh(), round_of({d: w for d, w in TWO_GROUPS.items() if d != "f"}))
    assert "f" not in state.groups
    assert rounds.weights_among(state, NAMES)[5].tolist() == pytest.approx([1 / 6] * 6)
    swapped = {d: [-w[0], w[1]] for d, w in TWO_GROUPS.items()} | {"f": [1.0, 0.5]}
    state = step(state, round_of(swapped, came=0.5, average=1.0))
    assert [state.groups[d] for d in NAMES] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("lie", [[300.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.2, -30.0]])
def test_a_liar_does_not_move_the_others_groups(lie: list[float]) -> None:
    names = tuple("abcdefghij")
    honest = {d: [1.0, 0.01 * i] if i % 2 else [-1.0, 0.01 * i] for i, d in enumerate(names)}
    state = step(fresh(names), round_of(honest | {"b": lie}))
    others = [d for d in names if d != "b"]
    assert len({state.groups[d] for d in others if int(names.index(d)) % 2}) == 1
    assert len({state.groups[d] for d in others if not int(names.index(d)) % 2}) == 1
    assert state.groups["a"] != state.groups["d"]


def test_like_changes_are_one_group() -> None:
    generator = torch.Generator().manual_seed(0)
    same = {d: (torch.ones(2) + 0.01 * torch.randn(2, generator=generator)).tolist() for d in NAMES[:3]}
    state = step(fresh(NAMES[:3]), round_of(same))
    assert (state.grouping, set(state.groups.values())) == ("one", {0})


@pytest.mark.parametrize(
    ("losses", "settled_after", "best"),
    [
        ((1.0, 0.8, 0.7, 0.699), 4, 3),  # the last gain is no gain
        ((1.0, 0.8, 0.9), 3, 1),  # worse: what was sent before ships
        ((1.0, 1.2, 1.3), 3, 1),  # the first average, not the header as it was sent
        ((1.0, 0.9, 0.8, 0.7, 0.6), None, 4),
    ],
)
def test_rounds_end_when_the_loss_has_settled(losses: tuple[float, ...], settled_after: int | None, best: int) -> None:
    tracker, settled = rounds.RoundTracker(), None
    for number, loss in enumerate(losses, start=1):
        before, now = (EdgeState(scores=NOTHING, round=n) for n in (number - 1, number))
        tracker.see(before, now.model_copy(update={"came": {"a": scores(10, loss), "b": scores(10, loss)}}))
        if tracker.settled and settled is None:
            settled = number
    assert settled == settled_after
    assert tracker.best is not None
    assert tracker.best.round == best


def test_rounds_are_compared_over_the_devices_that_scored_both() -> None:
    tracker = rounds.RoundTracker()
    for number, came in enumerate([{"a": 1.0, "b": 1.0}, {"a": 0.8, "b": 0.8}, {"a": 0.6}, {"a": 0.5, "b": 9.0}], 1):
        scored = {d: scores(10, loss) for d, loss in came.items()}
        before, now = (EdgeState(scores=NOTHING, round=n) for n in (number - 1, number))
        tracker.see(before, now.model_copy(update={"came": scored}))
    assert not tracker.settled, "b was not there before the last round"


def test_hidden_groups_and_labels_make_weights() -> None:
    oracle = rounds.weigh_devices(RefineConfig(similarity="oracle"), [{}] * 3, [0, 1, 0])[1]
    assert oracle.tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]
    counts = [{"counts": torch.tensor(c)} for c in ([4.0, 0.0], [2.0, 0.0], [0.0, 3.0])]
    labels = rounds.weigh_devices(RefineConfig(similarity="labels"), counts)[1]
    torch.testing.assert_close(labels, torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], dtype=torch.float64))
