"""Whether a found header replaces a given one: folds that hold out every sample once, the test, and both outcomes."""

import pytest
import torch
from live_source import LiveSource
from scipy import stats

from fleetfit.config.sections import HeaderConfig
from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import HeaderSpec
from fleetfit.edge.header_proof import Joined, Subset, clearly_better, make_folds
from fleetfit.edge.header_search import SearchResult, search_header
from fleetfit.edge.header_trials import CachedFeatures
from fleetfit.models.features import Features, FeatureShape
from fleetfit.models.header import Header, build_header

torch.set_num_threads(1)

SHAPE = FeatureShape(8, (4, 4))
CONFIG = HeaderConfig(budget_steps=120, batch_size=16, max_blocks=2, channels=8)
ALL_RIGHT = torch.ones(4, dtype=torch.bool)


def better(losses: list[float], given: list[float], **of: int) -> bool:
    return clearly_better(torch.tensor(losses), torch.tensor(given), ALL_RIGHT, ALL_RIGHT, **of).holds


def test_the_test_by_hand() -> None:
    """Gains 1, 1, 1, 3: mean 1.5, standard deviation 1, its error .5; t of 3 degrees at 2.5 % is 3.182: 1.59 needed."""
    given = [3.0, 3.0, 3.0, 4.0]
    proof = clearly_better(torch.tensor([2.0, 2.0, 2.0, 1.0]), torch.tensor(given), ALL_RIGHT, ALL_RIGHT)
    assert (proof.samples, proof.gain, proof.error, proof.holds) == (4, 1.5, 0.5, False)
    assert better([1.8, 1.8, 1.8, 0.8], given), "a gain of 1.7"
    assert not better([1.8, 1.8, 1.8, 0.8], given, num_folds=5), "1.5 times as much is needed of five folds: 2.39"
    assert better([1.0, 1.0, 1.0, 0.0], given, num_folds=5)
    assert not better([1.8, 1.8, 1.8, 0.8], given, looks=8), "one of eight: t at 2.5 % / 8 is 6.9"
    assert not better(given, given)


def test_fewer_right_answers_or_one_sample_prove_nothing() -> None:
    some = torch.tensor([True, True, True, False])
    losses, given = torch.tensor([0.1, 0.1, 0.1, 0.2]), torch.full((4,), 3.0)
    assert clearly_better(losses, given, ALL_RIGHT, ALL_RIGHT).holds
    assert not clearly_better(losses, given, some, ALL_RIGHT).holds
    one = clearly_better(losses[:1], given[:1], ALL_RIGHT[:1], ALL_RIGHT[:1])
    assert (one.holds, one.error) == (False, None)


def test_a_header_that_is_no_better_rarely_passes() -> None:
    generator = named_generator(0, "no better")
    passed = 0
    for _ in range(1000):
        losses, given = torch.randn(2, 40, generator=generator)
        right = torch.ones(40, dtype=torch.bool)
        passed += clearly_better(losses, given, right, right).holds
    assert passed <= stats.binom.ppf(1 - 1e-6, 1000, 0.025)


def numbered(labels: torch.Tensor, first: int) -> CachedFeatures:
    """Samples whose features say which they are."""
    numbers = torch.arange(first, first + len(labels), dtype=torch.float32)[:, None, None].expand(-1, 17, 8)
    return CachedFeatures(Features(numbers, numbers), labels)


@pytest.mark.parametrize("with_validation", [True, False])
def test_every_sample_is_held_out_once_and_no_view_of_it_is_trained_on(with_validation: bool) -> None:
    labels = torch.arange(15) % 3
    train = numbered(labels.repeat(2), 0)  # sample i, and its view i + 15
    validation = numbered(torch.arange(6) % 3, 100) if with_validation else None
    folds = make_folds(train, validation, 2, named_generator(0, "folds"))
    assert len(folds) == 5
    held, names = [], {*range(15), *(range(100, 106) if with_validation else ())}
    for fold in folds:
        inside, chooses, out = (
            set(s.features(torch.arange(len(s.labels))).output[:, 0, 0].int().tolist())
            for s in (fold.train, fold.validation, fold.held_out)
        )
        samples = {i - 15 if 15 <= i < 30 else i for i in inside}
        assert not samples & chooses
        assert not (samples | chooses) & out
        assert samples | chooses | out == names
        assert {i + 15 for i in samples if i < 15} <= inside, "with their views"
        assert max(chooses | out) < 15 or max(chooses | out) >= 100, "views choose and test nothing"
        assert set(fold.held_out.labels.tolist()) == {0, 1, 2}, "each class is in each fold"
        held += list(out)
    assert sorted(held) == sorted(names)


def test_too_few_samples_make_no_folds() -> None:
    assert make_folds(numbered(torch.arange(3), 0), None, 1, named_generator(0, "folds")) == ()
    assert len(make_folds(numbered(torch.arange(4), 0), None, 1, named_generator(0, "folds"))) == 2


def test_joined_and_subset_keep_the_order_that_is_asked_for() -> None:
    joined = Joined((numbered(torch.tensor([0, 1, 2]), 0), numbered(torch.tensor([3, 4]), 100)))
    some = Subset(joined, torch.tensor([4, 0, 3, 2]))
    assert some.labels.tolist() == [4, 0, 3, 2]
    assert some.features(torch.tensor([1, 0, 3, 2])).output[:, 0, 0].tolist() == [0.0, 101.0, 2.0, 100.0]


# -- the search -------------------------------------------------------------------------------------------------------


def cls_source(name: str | int, num_samples: int, signal: float) -> CachedFeatures:
    """Four classes, each a direction of [CLS], in unit noise."""
    generator = named_generator(0, "lucky", name)
    labels = torch.arange(num_samples) % 4
    output = torch.randn(num_samples, SHAPE.num_tokens, 8, generator=generator)
    output[torch.arange(num_samples), 0, labels] += signal
    return CachedFeatures(Features(output, torch.randn(output.shape, generator=generator)), labels)


def linear(scale: float) -> Header:
    with seeded_init(0, "given"):
        header = build_header(HeaderSpec(kind="linear"), SHAPE, 4)
    header.last_linear.weight.data = scale * torch.eye(4, 8)
    header.last_linear.bias.data.zero_()
    return header


def accuracy(header: Header, test: CachedFeatures) -> float:
    return float((header.eval()(test.cached).argmax(1) == test.labels).double().mean())


def searched(method: str, number: int, given: Header, signal: float) -> SearchResult:
    train, validation = cls_source(f"train {number}", 20, signal), cls_source(f"validation {number}", 6, signal)
    folds = make_folds(train, validation, 1, named_generator(number, "folds"))
    return search_header(method, train, validation, CONFIG, SHAPE, 4, 10**6, 0, [given], folds)


def test_a_lucky_header_does_not_replace_a_better_one() -> None:
    """Trained on from the given one, with a lower loss on six validation samples, and worse on all others."""
    given = linear(1.5)  # what Bayes' rule says
    result = searched("halving", 8, given, 1.5)
    lucky = [t for t in result.trials if not t.name.startswith("given")]
    of_given = next(t for t in result.trials if t.name.startswith("given"))
    assert min(t.loss for t in lucky) < of_given.loss
    assert torch.equal(result.header.last_linear.weight, given.last_linear.weight)
    assert [t for t in result.trials if t.chosen] == [of_given]
    held_out = next(point for point in result.history if point["name"] == "held out")
    assert (held_out["samples"], held_out["holds"]) == (26, False)


def test_a_clearly_better_header_replaces_the_given_one() -> None:
    """The class is which quarter of the grid is lit; the given header reads [CLS], which says nothing."""

    def source(name: str, num_samples: int) -> CachedFeatures:
        plain = cls_source(name, num_samples, 0.0)
        grid = plain.cached.output[:, 1:].reshape(num_samples, 4, 4, 8)
        for i, c in enumerate(plain.labels.tolist()):
            grid[i, 2 * (c // 2) : 2 * (c // 2) + 2, 2 * (c % 2) : 2 * (c % 2) + 2, 0] += 3.0
        return plain

    train, validation, test = source("train", 40), source("validation", 12), source("test", 400)
    folds = make_folds(train, validation, 1, named_generator(0, "folds"))
    given = linear(0.3)
    result = search_header("cnn_ignore", train, validation, CONFIG, SHAPE, 4, 10**6, 0, [given], folds)
    assert accuracy(given, test) < 0.4
    assert accuracy(result.header, test) > 0.7
    assert [t.spec for t in result.trials if t.chosen] == [result.header.spec]
    assert next(point for point in result.history if point["name"] == "held out")["holds"]
    assert result.steps_used <= CONFIG.budget_steps


def test_too_few_samples_replace_nothing() -> None:
    """Three samples that are trained on and chosen on say nothing, however well a header knows them."""
    source, given = cls_source("few", 3, 3.0), linear(-1.0)
    folds = make_folds(source, None, 1, named_generator(0, "folds"))
    result = search_header("linear", source, source, CONFIG, SHAPE, 4, 10**6, 0, [given], folds)
    assert min(t.loss for t in result.trials if not t.name.startswith("given")) < 0.5
    assert torch.equal(result.header.last_linear.weight, given.last_linear.weight)


@pytest.mark.parametrize("better", [True, False])
def test_a_backbone_that_trained_is_left_as_the_chosen_header_needs_it(better: bool) -> None:
    scale = torch.nn.Parameter(torch.ones(8))
    train, validation = (LiveSource(cls_source(n, k, 3.0), scale) for n, k in (("train", 40), ("validation", 12)))
    folds = make_folds(train, validation, 1, named_generator(0, "folds"))
    given = linear(-1.0 if better else 3.0)
    result = search_header("enas", train, validation, CONFIG, SHAPE, 4, 10**6, 0, [given], folds)
    taken = next(t for t in result.trials if t.chosen)
    assert taken.name.startswith("given") is not better
    assert bool((scale == 1).all()) is not better
