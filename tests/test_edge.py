"""The edge: who is weighed how, Eq. 21 by hand, what ships, and headers that keep to the limit."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fleetfit import edge
from fleetfit.config import HeaderConfig, Job, RefineConfig, make_job
from fleetfit.data.augmentation import Augmentation
from fleetfit.data.partition import Split
from fleetfit.data.samples import Inputs, Samples
from fleetfit.edge import EdgeState, HeaderResult
from fleetfit.header_search import METHODS
from fleetfit.messages import BackboneAssignment, CoarseReply, ProposeReply, RoundReply, put, take
from fleetfit.method.similarity import random_projections, sketch_quantiles
from fleetfit.method.size import safetensors_size_bytes
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone
from fleetfit.models.header import build_header, header_from_state
from fleetfit.models.pruning import extract, prunable_layers
from fleetfit.randomness import named_generator, seeded_init
from fleetfit.records import HeaderSpec, ValidationScores

torch.set_num_threads(1)

CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "initializer_range": 0.3,
}
LABELS = ("a", "b", "c")
SIMILARITIES = ("alone", "average", "js", "wasserstein", "calibrated")
NOTHING = ValidationScores(num_samples=0, loss_sum=0.0, num_correct=0)


def scores(num: int, loss: float, right: int = 0) -> ValidationScores:
    return ValidationScores(num_samples=num, loss_sum=num * loss, num_correct=right)


# -- weights ----------------------------------------------------------------------------------------------------------


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
    return edge.weigh_devices(refine, [sketch_of(features_of(g, i), sketch) for i, g in enumerate(groups)])


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
    weights = edge.weigh_devices(refine, sketches)[1]
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    assert bool((weights > 0).all())
    # None of them can show its own noise: nothing is known, all count alike.
    alike = edge.weigh_devices(refine, [sketches[1]] * 3)[1]
    torch.testing.assert_close(alike, torch.full((3, 3), 1 / 3, dtype=torch.float64))


def test_the_first_state_pools_scores_and_keeps_the_order_of_devices() -> None:
    replies = {
        f"d{i}": CoarseReply(step=1, scores=scores(2 + i, 0.5, i), tensors=put("sketch", {"all": features_of(g, i)}))
        for i, g in enumerate((0, 1, 0))
    }
    state = edge.first_state(RefineConfig(), replies)
    assert state.scores.model_dump() == {"num_samples": 9, "loss_sum": 4.5, "num_correct": 3}
    assert (state.round, state.devices) == (0, ("d0", "d1", "d2"))
    assert all(edge.personal(state, d) == {} for d in state.devices), "a sketch is nobody else's business"
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
    state = edge.next_state(EdgeState(devices=("one", "two"), weights=WEIGHTS, scores=NOTHING, round=3), replies)
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
    assert {n: t.tolist() for n, t in edge.personal(state, "two").items()} == {
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
    state = edge.next_state(before, replies)
    header = {d: float(edge.personal(state, d)["header.w"]) for d in before.devices}
    assert header == pytest.approx({"one": 2.0, "two": 5.0, "three": 7.0})
    assert edge.personal(state, "three") == {
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
    assert edge.weights_among(state, {"a": 1, "b": 2, "c": 3}).tolist() == [list(row) for row in weights]
    some = edge.weights_among(state, ["a", "c", "never"])
    torch.testing.assert_close(
        some, torch.tensor([[0.125, 0.875, 0], [3 / 7, 4 / 7, 0], [0, 0, 1]], dtype=torch.float64)
    )
    assert edge.distance_among(state, ["a", "c", "never"]) == ((0, 2, 0), (2, 0, 0), (0, 0, 0))


def test_who_joins_is_weighed_with_all_in_the_links_order() -> None:
    """As if it had been there from the beginning; what the others have got stays theirs."""
    order = ("d0", "d1", "d2")
    replies = {
        d: CoarseReply(step=1, scores=scores(2, 0.5), tensors=put("sketch", {"all": features_of(g, i)}))
        for i, (d, g) in enumerate(zip(order, (0, 1, 0), strict=True))
    }
    together = edge.first_state(RefineConfig(), replies)
    early = edge.first_state(RefineConfig(), {d: replies[d] for d in ("d0", "d2")})
    early = early.model_copy(update={"tensors": early.tensors | {"d0/header.w": torch.ones(1)}})
    late = edge.with_joined(RefineConfig(), early, {"d1": replies["d1"]}, order)
    assert late.devices == order
    assert (late.weights, late.distance) == (together.weights, together.distance)
    assert edge.personal(late, "d0") == {"header.w": torch.ones(1)}
    assert edge.with_joined(RefineConfig(), early, {}, order) is early


def test_a_device_whose_name_begins_like_anothers_gets_only_its_own() -> None:
    tensors = {f"{d}/importance.a": torch.tensor([float(i)]) for i, d in enumerate(("d-1", "d-10", "d-1/x"))}
    state = EdgeState(scores=NOTHING, tensors=tensors)
    assert edge.personal(state, "d-10") == {"importance.a": torch.tensor([1.0])}


@pytest.mark.parametrize("importance", [{}, {"importance.a": torch.zeros(2)}])
def test_headers_without_neurons_and_importance_of_zero(importance: dict[str, Tensor]) -> None:
    replies = {d: RoundReply(step=2, scores=NOTHING, tensors=importance) for d in ("one", "two")}
    state = edge.next_state(EdgeState(devices=("one", "two"), weights=WEIGHTS, scores=NOTHING), replies)
    assert {n: t.tolist() for n, t in edge.personal(state, "one").items()} == {n: [0.0, 0.0] for n in importance}


# -- what to ship -----------------------------------------------------------------------------------------------------

WAYS = ("coarse", "coarse/1", "coarse/10", "refined", "refined/1", "refined/10")


def replies_with(seed: int, most: int) -> dict[str, ProposeReply]:
    generator = named_generator(seed, "ways")
    return {
        f"d{i}": ProposeReply(
            step=3,
            scores={
                way: ValidationScores(
                    num_samples=n, loss_sum=n * float(torch.rand((), generator=generator)), num_correct=0
                )
                for way in WAYS
            },
        )
        for i, n in enumerate((5, 0, most))
    }


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("robust", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_the_lowest_pooled_loss_decides(seed: int, robust: bool, guard: bool) -> None:
    """Over all samples; of a device with very many more than others, not all of them count."""
    replies = replies_with(seed, 20 if robust else 50)
    best, least = "", float("inf")
    losses = {}
    for way in WAYS:
        total = sum(r.scores[way].loss_sum for r in replies.values())
        losses[way] = total / sum(r.scores[way].num_samples for r in replies.values())
        if (guard or "refined" in way) and losses[way] < least:
            best, least = way, losses[way]
    decision = edge.decide(RefineConfig(guard=guard), replies, 1000 if robust else None)
    assert decision.loss_by_way == pytest.approx(losses)
    name = decision.header + ("" if decision.prior_strength is None else f"/{decision.prior_strength:g}")
    assert name == best


def propose(**loss_by_way: float) -> dict[str, ProposeReply]:
    return {
        "d": ProposeReply(step=3, scores={way.replace("_", "/"): scores(4, loss) for way, loss in loss_by_way.items()})
    }


@pytest.mark.parametrize(
    ("losses", "guarded", "unguarded"),
    [
        ({"coarse": 0.5, "refined": 0.6}, ("coarse", None), ("refined", None)),
        ({"coarse": 0.5, "refined": 0.4}, ("refined", None), ("refined", None)),
        ({"coarse": 0.5, "refined": 0.5}, ("refined", None), ("refined", None)),
        ({"coarse": 0.5, "coarse_3": 0.3, "refined": 0.4, "refined_3": 0.6}, ("coarse", 3.0), ("refined", None)),
        ({"coarse": 0.5, "coarse_3": 0.3, "refined": 0.4, "refined_3": 0.2}, ("refined", 3.0), ("refined", 3.0)),
    ],
)
def test_the_guard(losses: dict[str, float], guarded: Any, unguarded: Any) -> None:
    for guard, expected in ((True, guarded), (False, unguarded)):
        decision = edge.decide(RefineConfig(guard=guard), propose(**losses))
        assert (decision.header, decision.prior_strength) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("losses", "guarded", "unguarded"),
    [
        ({"coarse": 0.5, "refined": None}, ("coarse", None), ("coarse", None)),
        ({"coarse": None, "refined": 0.6}, ("refined", None), ("refined", None)),
        ({"coarse": None, "coarse_3": 0.3, "refined": 0.4, "refined_3": None}, ("coarse", 3.0), ("refined", None)),
        ({"coarse": 0.5, "coarse_3": 0.3, "refined": None, "refined_3": None}, ("coarse", 3.0), ("coarse", 3.0)),
        ({"coarse": 0.5, "coarse_3": None, "refined": None, "refined_3": 0.9}, ("coarse", None), ("refined", 3.0)),
    ],
)
def test_a_way_without_a_finite_loss_ships_nowhere(
    losses: dict[str, float | None], guarded: Any, unguarded: Any, bad: float
) -> None:
    """One device's NaN is enough, since the sum over the cluster is one too."""
    good = propose(**{way: 1.0 if loss is None else loss for way, loss in losses.items()})
    spoilt = {"e": propose(**{way: bad if loss is None else loss for way, loss in losses.items()})["d"]}
    for replies in (good | spoilt, spoilt | good, spoilt):
        for guard, expected in ((True, guarded), (False, unguarded)):
            decision = edge.decide(RefineConfig(guard=guard), replies)
            assert (decision.header, decision.prior_strength) == expected
            assert sorted(decision.loss_by_way) == sorted(
                way.replace("_", "/") for way, loss in losses.items() if loss is not None
            )


def test_where_no_way_has_a_finite_loss_nothing_ships() -> None:
    with pytest.raises(ValueError, match=r"no way to ship has a finite validation loss \(coarse, refined\)"):
        edge.decide(RefineConfig(), propose(coarse=math.nan, refined=math.inf))


def test_with_noise_too_a_way_without_a_finite_loss_ships_nowhere() -> None:
    noised = {"d": propose(coarse=math.nan, coarse_3=0.5, refined=0.4)["d"].model_copy(update={"noise": 1.0})}
    decision = edge.decide(RefineConfig(), noised)  # .1 is not clear where the noise is .25
    assert (decision.header, decision.prior_strength) == ("coarse", 3.0)


@pytest.mark.parametrize("guard", [True, False])
def test_without_validation_anywhere_nothing_speaks_for_a_change(guard: bool) -> None:
    replies = {d: ProposeReply(step=3, scores=dict.fromkeys(WAYS, NOTHING)) for d in ("one", "two")}
    decision = edge.decide(RefineConfig(guard=guard), replies)
    assert (decision.header, decision.prior_strength) == ("coarse" if guard else "refined", None)


def test_devices_without_validation_have_no_voice() -> None:
    replies = propose(coarse=0.5, refined=0.6) | {
        "e": ProposeReply(step=3, scores=dict.fromkeys(("coarse", "refined"), NOTHING))
    }
    assert edge.decide(RefineConfig(), replies).loss_by_way == {"coarse": 0.5, "refined": 0.6}
    assert edge.decide(RefineConfig(), dict(reversed(replies.items()))).header == "coarse"


# -- header search ----------------------------------------------------------------------------------------------------


def make_split() -> Split:
    def samples(num: int, name: str) -> Samples:
        generator = named_generator(0, "edge", name)
        return Samples(Inputs.of(torch.randn(num, 1, 8, 8, generator=generator)), torch.arange(num) % 3, LABELS, 64)

    return Split(samples(24, "train"), samples(6, "validation"), samples(0, "test"))


def make_assignment() -> BackboneAssignment:
    with seeded_init(0, "assignment"):
        backbone = Backbone("vit", CONFIG)
        header = build_header(HeaderSpec(), backbone.feature_shape, len(LABELS))
    return BackboneAssignment(
        cluster="phones",
        family="vit",
        config=backbone.config,
        labels=LABELS,
        header=HeaderSpec(),
        tensors=put("backbone", dict(backbone.model.state_dict())) | put("header", dict(header.state_dict())),
    )


def make_tiny_job(**header: Any) -> Job:
    return make_job({"seed": 3, "header": {"budget_steps": 24, "views": 1, "channels": 8} | header})


def find(job: Job, limit: int) -> HeaderResult:
    return edge.find_header(job, make_assignment(), make_split(), limit, lambda done, total, note: None)


def model_of(found: HeaderResult) -> Classifier:
    backbone = Backbone("vit", make_assignment().config)
    backbone.model.load_state_dict(take(found.tensors, "backbone"))
    header = header_from_state(found.header, backbone.feature_shape, len(LABELS), take(found.tensors, "header"))
    return Classifier(backbone, header).eval()


def file_bytes(model: Classifier) -> int:
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    return safetensors_size_bytes(shapes, {"format": "pt"})


def least_bytes() -> int:
    """The smallest model there is: the backbone and a linear header."""
    assignment = make_assignment()
    return file_bytes(model_of(HeaderResult(header=HeaderSpec(), trials=(), tensors=assignment.tensors)))


@pytest.mark.parametrize("search", list(METHODS))
def test_every_search_ships_a_header_within_the_limit(search: str) -> None:
    job = make_tiny_job(search=search, keep_distilled=False, warm_start=False)
    found = find(job, 10**6)
    assert found.trials
    assert found.trials == tuple(sorted(found.trials, key=lambda t: t.loss))
    assert model_of(found)(make_split().train.inputs[:]).shape == (24, 3)
    free = file_bytes(model_of(found))
    assert free <= 10**6
    room = free - least_bytes()
    if search in ("halving", "random", "enas"):
        # A limit that what was found free does not fit: something smaller is found.
        assert room > 0
        assert file_bytes(model_of(find(job, least_bytes() + room * 3 // 4))) <= least_bytes() + room * 3 // 4
    elif search != "distilled":
        with pytest.raises(ValueError, match="fits"):
            find(job, least_bytes() - 200 + room // 2)


@pytest.mark.parametrize(("search", "apart"), [("halving", 500), ("random", 1000)])
def test_a_header_fits_to_the_byte_whole_and_pruned(search: str, apart: int) -> None:
    """The limit is a promise: what is found for a limit close to a header's size keeps to it, and so does any cut."""
    narrow: dict[str, Any] = {"operations": ["conv1"], "channels": 4, "max_blocks": 3, "repeats": 3, "budget_steps": 8}
    job = make_tiny_job(search=search, keep_distilled=False, warm_start=False, **narrow)
    size = file_bytes(model_of(find(job, 10**6)))
    found = 0
    for limit in range(size - 100, size + 3000, apart):
        try:
            model = model_of(find(job, limit))
        except ValueError:  # a promise that cannot be kept is not made
            continue
        found += 1
        masks = {n: torch.ones(layer.num_neurons) > 0 for n, layer in prunable_layers(model.header).items()}
        for mask in masks.values():
            mask[0] = False
        pruned = Classifier(model.backbone, extract(model.header, masks))
        assert max(file_bytes(model), file_bytes(pruned)) <= limit
    assert found


def test_no_room_for_any_header_is_an_error() -> None:
    with pytest.raises(ValueError, match="fits"):
        find(make_tiny_job(search="random", keep_distilled=False), least_bytes())


def test_the_distilled_header_is_a_candidate_when_the_job_says_so() -> None:
    names = {t.name for t in find(make_tiny_job(search="linear"), 10**6).trials}
    assert names == {"linear", "given linear"}
    assert {t.name for t in find(make_tiny_job(search="linear", keep_distilled=False), 10**6).trials} == {"linear"}
    kept = find(make_tiny_job(search="distilled"), 10**6)
    torch.testing.assert_close(dict(kept.tensors), dict(make_assignment().tensors), rtol=0, atol=0)


def test_the_backbone_is_trained_only_when_the_job_does_not_freeze_it() -> None:
    sent = take(make_assignment().tensors, "backbone")
    for freeze in (True, False):
        job = make_tiny_job(search="enas", freeze_backbone=freeze, keep_distilled=False)
        found = take(find(job, 10**6).tensors, "backbone")
        assert list(found) == list(sent)
        assert all(torch.equal(found[n], sent[n]) for n in sent) is freeze


def test_the_search_repeats_itself_and_depends_on_the_seed() -> None:
    job = make_tiny_job()
    one, two, other = find(job, 10**6), find(job, 10**6), find(job.model_copy(update={"seed": 4}), 10**6)
    assert one.model_dump_json() == two.model_dump_json()
    torch.testing.assert_close(dict(one.tensors), dict(two.tensors), rtol=0, atol=0)
    assert other.model_dump_json() != one.model_dump_json()


def test_with_views_the_images_come_first_and_labels_follow_them() -> None:
    samples = make_split().train
    more = edge.with_views(samples, 3, Augmentation(shift_pixels=1), named_generator(0, "views"))
    assert len(more) == 72
    torch.testing.assert_close(more.inputs[:24], samples.inputs[:])
    assert more.labels.tolist() == samples.labels.tolist() * 3
    assert not torch.equal(more.inputs[24:48], samples.inputs[:])


def test_of_texts_there_is_one_view() -> None:
    tokens = Samples(Inputs.of(torch.ones(3, 5, dtype=torch.long)), torch.tensor([0, 1, 2]), LABELS, 4)
    assert edge.with_views(tokens, 3, Augmentation(), named_generator(0, "views")) is tokens


# -- the coarse model -------------------------------------------------------------------------------------------------


def test_the_coarse_model_is_what_was_found_and_what_the_job_says() -> None:
    job = make_job({"seed": 3, "header": {"search": "linear"}, "refine": {"rounds": 7, "anchor": 0.25}})
    assignment, split = make_assignment(), make_split()
    found = HeaderResult(header=HeaderSpec(), trials=(), tensors=assignment.tensors)
    message = edge.coarse_model(job, assignment, found, split, step=1)
    assert (message.step, message.family, message.labels, message.seed) == (1, "vit", LABELS, 3)
    assert (message.header, message.refine) == (found.header, job.refine)
    assert message.config == assignment.config
    torch.testing.assert_close(dict(message.tensors), dict(found.tensors), rtol=0, atol=0)
    assert {name.partition(".")[0] for name in message.tensors} == {"backbone", "header"}


def test_class_shares_are_the_shared_sets_and_never_zero() -> None:
    assignment, split = make_assignment(), make_split()
    found = HeaderResult(header=HeaderSpec(), trials=(), tensors=assignment.tensors)
    some = split.train.rows(torch.tensor([0, 3, 6, 1]))  # classes 0, 0, 0, 1
    shares = edge.coarse_model(Job(), assignment, found, Split(some, split.test, split.test), step=1).class_shares
    assert shares == pytest.approx((4 / 7, 2 / 7, 1 / 7))  # one added to each count
    alike = make_job({"refine": {"prior_shares": "uniform"}})
    told = edge.coarse_model(alike, assignment, found, Split(some, split.test, split.test), step=1).class_shares
    assert told == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_a_header_of_which_nothing_can_be_dropped_is_noted() -> None:
    assignment = make_assignment()
    pooled = HeaderSpec(kind="blocks", channels=8, pooling=2)
    for share, spec, told in ((0.2, HeaderSpec(), True), (0.0, HeaderSpec(), False), (0.2, pooled, False)):
        found = HeaderResult(header=spec, trials=(), tensors={})
        note = edge.pruning_note(make_job({"refine": {"prune_share": share}}), assignment, found)
        assert (note is not None) is told
        assert not told or "the linear header has no neurons" in str(note)


def test_defaults_name_searches_that_exist() -> None:
    fields = HeaderConfig.model_fields["search"].annotation
    assert set(METHODS) == set(itertools.chain(*(getattr(a, "__args__", ()) for a in fields.__args__)))  # type: ignore[union-attr]
