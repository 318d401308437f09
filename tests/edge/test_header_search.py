"""Header search: every method keeps its budget, repeats itself, respects the size limit, and finds what is there."""

import pytest
import torch
from live_source import LiveSource

from fleetfit.config.job import make_job
from fleetfit.config.sections import HeaderConfig
from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import HeaderSpec
from fleetfit.edge.header_proof import make_folds
from fleetfit.edge.header_search import METHODS, SearchResult, search_header
from fleetfit.edge.header_trials import CachedFeatures, header_bytes
from fleetfit.models.features import Features, FeatureShape
from fleetfit.models.header import Header, build_header
from fleetfit.models.pruning import prunable_layers

torch.set_num_threads(1)

SHAPE = FeatureShape(8, (4, 4))
CONFIG = HeaderConfig(budget_steps=40, batch_size=16, max_blocks=2, channels=8)
SEARCHES = [m for m in METHODS if m != "distilled"]


def make_source(name: str, num_samples: int = 40, in_cls: bool = False) -> CachedFeatures:
    """Four classes; the class is which quarter of the grid is lit (or a direction of [CLS])."""
    generator = named_generator(0, "source", name)
    labels = torch.arange(num_samples) % 4
    output = 0.5 * torch.randn(num_samples, SHAPE.num_tokens, 8, generator=generator)
    grid = output[:, 1:].reshape(num_samples, 4, 4, 8)
    for i, c in enumerate(labels.tolist()):
        if in_cls:
            output[i, 0, c] += 3.0
        else:
            row, column = 2 * (c // 2), 2 * (c % 2)
            grid[i, row : row + 2, column : column + 2, 0] += 2.0
    return CachedFeatures(Features(output, torch.randn(output.shape, generator=generator)), labels)


def make_linear(in_cls_scale: float) -> Header:
    with seeded_init(0, "given"):
        header = build_header(HeaderSpec(kind="linear"), SHAPE, 4)
    header.last_linear.weight.data = in_cls_scale * torch.eye(4, 8)
    header.last_linear.bias.data.zero_()
    return header


def search(method: str, config: HeaderConfig = CONFIG, max_bytes: int = 10**6, seed: int = 0, given=(), in_cls=False):
    return search_header(
        method,
        make_source("train", in_cls=in_cls),
        make_source("validation", 12, in_cls),
        config,
        SHAPE,
        4,
        max_bytes,
        seed,
        given,
    )


@pytest.mark.parametrize("method", SEARCHES)
def test_runs_within_the_budget_and_repeats_itself(method: str) -> None:
    steps: list[int] = []
    train, validation = make_source("train"), make_source("validation", 12)
    results = [
        search_header(
            method,
            train,
            validation,
            CONFIG,
            SHAPE,
            4,
            10**6,
            3,
            on_progress=lambda done, total, note: steps.append(done),
        )
        for _ in range(2)
    ]
    first, second = results
    assert 0 < first.steps_used <= CONFIG.budget_steps
    assert steps[-1] == max(steps) == CONFIG.budget_steps, "progress must end at its end"
    assert first.trials == second.trials
    assert first.history == second.history
    for a, b in zip(first.header.state_dict().values(), second.header.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [t.loss for t in first.trials] == sorted(t.loss for t in first.trials)
    assert any(t.spec == first.header.spec for t in first.trials)


def test_halving_finds_the_grid_where_cls_says_nothing() -> None:
    config = CONFIG.model_copy(update={"budget_steps": 400})
    test = make_source("test", 100)
    accuracies = {}
    for method in ("halving", "linear"):
        header = search(method, config).header
        accuracies[method] = (header(test.cached).argmax(1) == test.labels).double().mean().item()
    assert accuracies["halving"] > 0.9
    assert accuracies["linear"] < 0.5


def quick(given: Header, in_cls: bool, quick_test: bool = True, num_samples: int = 80) -> SearchResult:
    """Halving beside a given header, with folds of all that is there."""
    config = CONFIG.model_copy(update={"budget_steps": 400, "quick_test": quick_test})
    train, validation = make_source("train", num_samples, in_cls), make_source("validation", num_samples // 4, in_cls)
    folds = make_folds(train, validation, 1, named_generator(0, "folds"))
    return search_header("halving", train, validation, config, SHAPE, 4, 10**6, 0, [given], folds)


def test_it_is_not_searched_where_a_quick_test_promises_nothing() -> None:
    good = make_linear(4.0)  # the classes are in [CLS], and it knows them
    result = quick(good, in_cls=True)
    assert result.steps_used == 0
    assert [t.name for t in result.trials] == ["given linear"]
    assert result.trials[0].chosen
    told = next(point for point in result.history if point["name"] == "quick test")
    assert not told["promising"]
    assert told["gain"] <= told["error"]
    assert len(quick(good, in_cls=True, quick_test=False).trials) > 1


def test_it_is_searched_where_a_quick_test_promises_something() -> None:
    blind = make_linear(0.0)  # the classes are in the grid, and it looks at [CLS]
    result, whole = quick(blind, in_cls=False), quick(blind, in_cls=False, quick_test=False)
    told = next(point for point in result.history if point["name"] == "quick test")
    assert told["promising"]
    assert told["gain"] > told["error"]
    assert result.trials == whole.trials, "the search itself is the same"
    assert result.header.spec.kind == "blocks"


def test_without_anything_held_out_nothing_is_searched_as_nothing_could_replace_the_given_header() -> None:
    config, source = CONFIG, make_source("train", 3)
    result = search_header("halving", source, source, config, SHAPE, 4, 10**6, 0, [make_linear(0.0)], folds=())
    assert [t.name for t in result.trials] == ["given linear"]


@pytest.mark.parametrize("method", ["halving", "random", "enas"])
def test_no_larger_header_than_allowed(method: str) -> None:
    limit = 3000
    result = search(method, max_bytes=limit)
    assert all(header_bytes(t.spec, SHAPE, 4) <= limit for t in result.trials)


@pytest.mark.parametrize("method", SEARCHES)
def test_nothing_fits(method: str) -> None:
    with pytest.raises(ValueError, match=r"no header of search .* fits: max_bytes must be larger, got 10"):
        search(method, max_bytes=10)


def test_a_good_given_header_wins_and_a_bad_one_does_not() -> None:
    good, bad = make_linear(5.0), make_linear(-5.0)
    won = search("linear", given=[good, bad], in_cls=True)
    assert torch.equal(won.header.last_linear.weight, good.last_linear.weight)
    assert won.trials[0].name == "given linear"
    lost = search("linear", given=[bad], in_cls=True)
    assert not torch.equal(lost.header.last_linear.weight, bad.last_linear.weight)
    assert len(lost.trials) == 2


def test_distilled_is_the_given_one_as_it_is() -> None:
    given = make_linear(5.0)
    result = search("distilled", given=[given])
    assert result.steps_used == 0
    assert torch.equal(result.header.last_linear.weight, given.last_linear.weight)
    with pytest.raises(ValueError, match="needs given headers"):
        search("distilled")


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"header\.search must be one of halving, .* got 'magic'"):
        search("magic")
    with pytest.raises(ValueError, match="validation must have at least 1 sample"):
        search_header("linear", make_source("train"), make_source("validation", 0), CONFIG, SHAPE, 4, 10**6, 0)


@pytest.mark.parametrize(("method", "trained"), [("enas", True), ("linear", False), ("halving", False)])
def test_enas_trains_the_backbone_and_the_others_do_not(method: str, trained: bool) -> None:
    scale = torch.nn.Parameter(torch.ones(8))
    train, validation = (LiveSource(make_source(n), scale) for n in ("train", "validation"))
    search_header(method, train, validation, CONFIG, SHAPE, 4, 10**6, 0)
    assert (scale.detach() != 1).any().item() is trained


def test_the_papers_header_has_an_inner_mlp_that_can_be_pruned() -> None:
    hidden = make_job({"method": "paper"}).header.hidden
    config = CONFIG.model_copy(update={"hidden": hidden, "operations": ("identity", "avg_pool")})
    for method in ("enas", "random"):
        header = search(method, config).header
        assert header.spec.hidden == hidden > 0
        assert {name: layer.num_neurons for name, layer in prunable_layers(header).items()} == {"classifier": hidden}


def test_where_no_mlp_fits_there_is_none() -> None:
    config = CONFIG.model_copy(update={"hidden": 5000, "operations": ("identity",)})
    assert search("random", config, max_bytes=10_000).header.spec.hidden == 0


@pytest.mark.parametrize(("children", "interval"), [(1, 4), (4, 4), (2, 3)])
def test_children_and_the_controllers_interval_are_those_of_the_job(children: int, interval: int) -> None:
    """40 steps, half of them for the winner: 20 / M of the shared weights, and of the policy one in so many of them."""
    config = CONFIG.model_copy(update={"children": children, "controller_interval": interval, "pooling": 4})
    result = search("enas", config)
    steps = 20 // children
    assert sum(point["name"] == "controller" for point in result.history) == (steps - 1) // interval
    assert result.steps_used == steps * children + 20
    assert result.header.spec.pooling == 4


def test_the_backbone_trains_at_its_own_rate() -> None:
    """Adam's first steps are as long as its rate, whatever the gradient: after few steps the way is about their sum."""
    moved = {}
    for rate in (1e-5, 1e-3):
        scale = torch.nn.Parameter(torch.ones(8))
        train, validation = (LiveSource(make_source(n), scale) for n in ("train", "validation"))
        config = CONFIG.model_copy(update={"backbone_learning_rate": rate})
        search_header("enas", train, validation, config, SHAPE, 4, 10**6, 0)
        moved[rate] = float((scale.detach() - 1).abs().max())
    assert 0 < moved[1e-5] < 10 * 1e-5
    assert 50 < moved[1e-3] / moved[1e-5] < 200
