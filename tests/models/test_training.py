"""The only fit and evaluate loops: they reach known optima, see every row, and say when a loss is not finite."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fleetfit.core.checkpoints import TrainingState
from fleetfit.core.encoding import decode, encode
from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.models import training
from fleetfit.models.training import (
    ParameterAverage,
    TrainingDiverged,
    batches,
    evaluate,
    fit,
    predict,
    score,
    steps_per_epoch,
)

torch.set_num_threads(1)


def generator(name: str = "order") -> torch.Generator:
    return named_generator(0, name)


@pytest.mark.parametrize("clip", [1.0, 1e9])
def test_least_squares_reaches_the_normal_equations(clip: float) -> None:
    x = torch.randn(60, 4, generator=generator("x"), dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 3.0]).double() + 0.1 * torch.randn(60, generator=generator("y")).double()
    weight = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def loss_of(rows: Tensor) -> Tensor:
        return ((x[rows] @ weight - y[rows]) ** 2).mean()

    fitted = fit(
        loss_of,
        [weight],
        60,
        steps=1500,
        batch_size=60,
        learning_rate=0.05,
        gradient_clip=clip,
        generator=generator(),
    )
    optimum = torch.linalg.lstsq(x, y).solution
    assert torch.allclose(weight, optimum, atol=1e-4)
    assert fitted.last == pytest.approx(float(((x @ optimum - y) ** 2).mean()), rel=1e-3)


def test_softmax_regression_reaches_scikit_learns_optimum() -> None:
    x = torch.randn(90, 3, generator=generator("x"))
    labels = (x @ torch.randn(3, 3, generator=generator("w")) + torch.randn(90, 3, generator=generator("n"))).argmax(1)
    model = nn.Linear(3, 3)
    fit(
        lambda rows: cross_entropy(model(x[rows]), labels[rows]),
        model.parameters(),
        90,
        steps=1200,
        batch_size=90,
        learning_rate=0.1,
        generator=generator(),
    )
    other = LogisticRegression(C=np.inf, max_iter=2000).fit(x.numpy(), labels.numpy())
    optimum = log_loss(labels.numpy(), other.predict_proba(x.numpy()))
    assert evaluate(lambda rows: model(x[rows]), labels).loss == pytest.approx(optimum, abs=1e-4)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 20), st.integers(0, 3))
def test_an_epoch_has_every_row_once_and_no_single_row_at_its_end(num: int, batch_size: int, seed: int) -> None:
    rows = list(batches(num, batch_size, named_generator(seed, "batches")))
    assert sorted(torch.cat(rows).tolist()) == list(range(num))
    assert len(rows) == steps_per_epoch(num, batch_size)
    assert all(len(r) == batch_size for r in rows[:-1])
    assert len(rows[-1]) <= batch_size + (batch_size > 1)
    if num > 1 and batch_size > 1:
        assert min(len(r) for r in rows) >= 2


def test_epochs_differ_and_repeat_with_the_seed() -> None:
    stream = generator("epochs")
    first, second = torch.cat([*batches(50, 8, stream)]), torch.cat([*batches(50, 8, stream)])
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(50))
    assert torch.equal(first, torch.cat([*batches(50, 8, generator("epochs"))]))


@pytest.mark.parametrize(("num_samples", "batch_size"), [(21, 5), (10, 3), (8, 4), (7, 1), (3, 100)])
def test_fit_sees_every_row_in_every_epoch(num_samples: int, batch_size: int) -> None:
    weight, seen = torch.zeros(1, requires_grad=True), []

    def loss_of(rows: Tensor) -> Tensor:
        seen.append(rows)
        return (weight**2).sum()

    per_epoch = steps_per_epoch(num_samples, batch_size)
    fit(
        loss_of,
        [weight],
        num_samples,
        steps=3 * per_epoch,
        batch_size=batch_size,
        learning_rate=0.1,
        generator=generator(),
    )
    assert len(seen) == 3 * per_epoch
    for epoch in range(3):
        rows = torch.cat(seen[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(rows.tolist()) == list(range(num_samples))


def test_progress_is_told_each_step_and_the_tail_is_returned() -> None:
    weight, told = torch.tensor([4.0], requires_grad=True), []
    fitted = fit(
        lambda rows: weight.abs().sum(),
        [weight],
        4,
        steps=30,
        batch_size=2,
        learning_rate=0.1,
        generator=generator(),
        after_step=lambda step, steps, loss: told.append((step, steps, loss)),
    )
    assert [t[:2] for t in told] == [(i, 30) for i in range(1, 31)]
    assert fitted.losses == tuple(t[2] for t in told)
    assert fitted.last == pytest.approx(sum(t[2] for t in told[27:]) / 3)
    assert told[-1][2] < told[0][2]


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    """Adam's step is the rate where the gradient never changes."""
    weight, at = torch.zeros(1, requires_grad=True), [0.0]
    fit(
        lambda rows: weight.sum(),
        [weight],
        1,
        steps=100,
        batch_size=1,
        learning_rate=0.01,
        generator=generator(),
        after_step=lambda step, steps, loss: at.append(float(weight.detach())),
    )
    rates = -np.diff(at)
    assert rates[:10] == pytest.approx(0.01 * np.arange(1, 11) / 10, rel=1e-3)
    assert rates[10:] == pytest.approx(0.005 * (1 + np.cos(np.pi * np.arange(90) / 90)), rel=1e-3, abs=1e-6)


def test_weight_decay_is_for_matrices_only() -> None:
    matrix, vector = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    frozen = torch.ones(2, 2)
    fit(
        lambda rows: 0 * (matrix.sum() + vector.sum()),
        [matrix, vector, frozen],
        4,
        steps=20,
        batch_size=4,
        learning_rate=0.1,
        weight_decay=0.5,
        generator=generator(),
    )
    assert (matrix < 0.9).all()
    assert torch.equal(vector.detach(), torch.ones(2))
    assert torch.equal(frozen, torch.ones(2, 2))


def test_a_loss_that_ran_backward_itself_trains_the_same() -> None:
    def train(own_backward: bool) -> Tensor:
        weight = torch.tensor([1.0, -2.0], requires_grad=True)

        def loss_of(rows: Tensor) -> Tensor:
            loss = ((weight - rows.float().mean()) ** 2).sum()
            if own_backward:
                loss.backward()
                return loss.detach()
            return loss

        fit(loss_of, [weight], 9, steps=20, batch_size=3, learning_rate=0.1, generator=generator())
        return weight.detach()

    assert torch.equal(train(True), train(False))


def test_the_gradient_is_clipped() -> None:
    """Adam alone does not see scale: a single huge gradient among small ones does harm only where it is not clipped."""

    def train(clip: float) -> float:
        weight, calls = torch.zeros(1, requires_grad=True), [0]

        def loss_of(rows: Tensor) -> Tensor:
            calls[0] += 1
            return (1e6 if calls[0] == 10 else 1.0) * weight.sum()

        fit(loss_of, [weight], 1, steps=40, batch_size=1, learning_rate=0.01, gradient_clip=clip, generator=generator())
        return float(weight.detach())

    assert train(1.0) == pytest.approx(-0.01 * 21, rel=1e-3)  # every step as long as the rate
    assert train(1e9) > 0.8 * train(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_the_training_and_the_step(value: float) -> None:
    weight, calls = torch.ones(1, requires_grad=True), [0]

    def loss_of(rows: Tensor) -> Tensor:
        calls[0] += 1
        return (weight * (value if calls[0] == 3 else 1.0)).sum()

    after: list[int] = []
    with pytest.raises(TrainingDiverged, match=rf"^the header: the loss became {value} at step 3 of 9; lower the"):
        fit(
            loss_of,
            [weight],
            8,
            steps=9,
            batch_size=4,
            learning_rate=0.1,
            generator=generator(),
            after_step=lambda step, steps, loss: after.append(step),
            name="the header",
        )
    assert issubclass(TrainingDiverged, ValueError)
    assert after == [1, 2]
    assert torch.isfinite(weight).all()


def test_a_loss_that_was_never_finite_is_not_blamed_on_the_learning_rate() -> None:
    weight = torch.tensor([math.nan], requires_grad=True)
    with pytest.raises(
        TrainingDiverged, match=r"nan at step 1 of 2; its inputs or the weights that it began with are at fault; if"
    ):
        fit(lambda rows: weight.sum(), [weight], 8, steps=2, batch_size=4, learning_rate=0.1, generator=generator())


def test_no_samples() -> None:
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="tiny: needs at least 1 sample, got 0"):
        fit(
            lambda rows: weight.sum(),
            [weight],
            0,
            steps=1,
            batch_size=1,
            learning_rate=0.1,
            generator=generator(),
            name="tiny",
        )


# -- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_scores_are_scikit_learns(batch_size: int) -> None:
    logits = 3 * torch.randn(41, 5, generator=generator("logits"))
    labels = torch.randint(5, (41,), generator=generator("labels"))
    asked: list[list[int]] = []

    def logits_of(rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return logits[rows]

    scores = evaluate(logits_of, labels, batch_size)
    assert [row for rows in asked for row in rows] == list(range(41))
    assert max(map(len, asked)) <= batch_size
    assert scores.loss == pytest.approx(log_loss(labels, logits.double().softmax(1), labels=range(5)), rel=1e-5)
    assert scores.accuracy == pytest.approx(accuracy_score(labels, logits.argmax(1)))
    assert scores.num_samples == 41


def test_scores_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    scores = score(logits, torch.tensor([0, 1]))
    assert scores.loss == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert scores.accuracy == 0.5


def test_scores_of_nothing_are_not_numbers() -> None:
    scores = evaluate(lambda rows: torch.zeros(len(rows), 3), torch.zeros(0, dtype=torch.long))
    assert scores.num_samples == 0
    assert math.isnan(scores.loss)
    assert math.isnan(scores.accuracy)


def test_predicting_keeps_no_graph() -> None:
    weight = torch.ones(3, requires_grad=True)
    logits = predict(lambda rows: rows[:, None] * weight, 5, batch_size=2)
    assert not logits.requires_grad
    assert torch.equal(logits, torch.arange(5.0)[:, None].expand(5, 3))


# -- averages ---------------------------------------------------------------------------------------------------------


def test_an_average_is_the_recursion_by_hand() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    frozen = torch.ones(3)
    average, expected = ParameterAverage([weight, frozen], 0.3), np.array([1.0, 2.0])
    for step in range(1, 9):
        with torch.no_grad():
            weight.mul_(1.5)
        average.update()
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach().numpy()
    (value,) = average.values
    assert value.numpy() == pytest.approx(expected, rel=1e-5)
    own = weight.detach().clone()
    with average.in_place():
        assert torch.equal(weight.detach(), value)
    assert torch.equal(weight.detach(), own)
    average.keep()
    assert torch.equal(weight.detach(), value)


def test_an_average_is_less_noisy_than_the_last_step() -> None:
    """A rate that stays high on a noisy loss: the weight jumps around its optimum, the average does not."""

    def train(decay: float) -> float:
        noise, weight = generator("noise"), torch.zeros(50, requires_grad=True)
        average = ParameterAverage([weight], decay)
        fit(
            lambda rows: ((weight - 1 - torch.randn(50, generator=noise)) ** 2).sum(),
            [weight],
            1,
            steps=400,
            batch_size=1,
            learning_rate=0.05,
            warmup_share=0.999,
            generator=generator(),
            average=average,
        )
        average.keep()
        return float(((weight - 1) ** 2).mean().detach())

    assert train(0.95) < 0.7 * train(0.0)


# -- looking at losses ------------------------------------------------------------------------------------------------


def test_away_from_the_cpu_losses_are_fetched_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told, and what is trained, is the same."""

    def train(look_every: int) -> tuple[list[Any], Tensor]:
        monkeypatch.setattr(training, "_look_every", lambda torch_device: look_every)
        weight, told = torch.ones(3, requires_grad=True), []
        fit(
            lambda rows: ((weight - rows.float().mean()) ** 2).sum(),
            [weight],
            9,
            steps=50,
            batch_size=4,
            learning_rate=0.1,
            generator=generator(),
            after_step=lambda *step: told.append(step),
        )
        return told, weight.detach()

    (told, weight), (told_late, weight_late) = train(1), train(20)
    assert told_late == told
    assert [step for step, _, _ in told] == list(range(1, 51))
    assert torch.equal(weight, weight_late)


def test_nothing_else_is_fetched_from_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the device "meta" have no values: fetching one is an error, wherever it happens."""
    looks: list[int] = []

    def look(self: Any) -> None:
        looks.append(len(self.unseen))
        self.values += [0.0] * len(self.unseen)
        self.unseen = []

    monkeypatch.setattr(training._Losses, "look", look)
    meta = torch.device("meta")
    x, labels, model = torch.ones(40, 3, device=meta), torch.ones(40, dtype=torch.long, device=meta), nn.Linear(3, 2)
    model = model.to(meta)

    def loss_of(rows: Tensor) -> Tensor:
        assert rows.device == meta
        return cross_entropy(model(x[rows]), labels[rows])

    fit(
        loss_of,
        model.parameters(),
        40,
        steps=50,
        batch_size=16,
        learning_rate=0.01,
        generator=generator(),
        average=ParameterAverage(model.parameters(), 0.9),
        after_step=lambda step, steps, loss: None,
    )
    assert looks == [20, 20, 10]
    with pytest.raises(RuntimeError, match="meta"):
        float(model.weight.detach().sum())


def test_the_accelerator_is_looked_at_seldom() -> None:
    assert training._look_every(torch.device("cpu")) == 1
    assert training._look_every(torch.device("cuda", 0)) == training.LOOK_EVERY == 20


def test_a_divergence_between_looks_names_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_look_every", lambda torch_device: 20)
    weight, calls = torch.ones(1, requires_grad=True), [0]

    def loss_of(rows: Tensor) -> Tensor:
        calls[0] += 1
        return (weight * (math.nan if calls[0] == 7 else 1.0)).sum()

    with pytest.raises(TrainingDiverged, match="the loss became nan at step 7 of 30"):
        fit(loss_of, [weight], 4, steps=30, batch_size=4, learning_rate=0.1, generator=generator())
    assert calls[0] == 20


# -- going on ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing in the program may catch this."""


class Kept:
    """A bookmark that is due every so many epochs, and ends the training after some of them."""

    where = "here"

    def __init__(self, every: int = 1, killed_at: int = 0) -> None:
        self.every = every
        self.killed_at = killed_at
        self.epochs = 0
        self.blob: bytes | None = None

    def load(self) -> TrainingState | None:
        return None if self.blob is None else decode(self.blob, TrainingState)

    def due(self) -> bool:
        self.epochs += 1
        if self.epochs == self.killed_at:
            raise Killed
        return self.epochs % self.every == 0

    def save(self, state: TrainingState) -> None:
        self.blob = encode(state)


def train_kept(kept: Kept | None, ema: bool = True, size: int = 3, steps: int = 25) -> tuple[list[Tensor], list[float]]:
    """Dropout, chance in the loss, and a batch that is cut off at the end: all that a training can draw."""
    with seeded_init(0, "model"):
        model = nn.Sequential(nn.Linear(size, 8), nn.Dropout(0.3), nn.Linear(8, 2), nn.LayerNorm(2))
    x, noise = torch.randn(30, size, generator=generator("x")), generator("noise")
    average = ParameterAverage(model.parameters(), 0.9) if ema else None
    fitted = fit(
        lambda rows: cross_entropy(
            model(x[rows] + torch.randn(len(rows), size, generator=noise)), (x[rows, 0] > 0).long()
        ),
        model.parameters(),
        30,
        steps=steps,
        batch_size=7,
        learning_rate=0.01,
        weight_decay=0.1,
        generator=generator(),
        average=average,
        bookmark=kept,
        also_drawn_from=(noise,),
        name="the reference",
    )
    tensors = [p.detach() for p in model.parameters()] + (average.values if average else [])
    return tensors, list(fitted.losses)


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize(("every", "killed_at"), [(1, 1), (1, 2), (1, 4), (2, 4), (3, 2)])
def test_a_training_that_was_killed_and_gone_on_with_is_bit_equal(ema: bool, every: int, killed_at: int) -> None:
    whole = train_kept(None, ema)
    kept = Kept(every, killed_at)
    with pytest.raises(Killed):
        train_kept(kept, ema)
    torch.manual_seed(77)  # the global generator is nobody's business
    tensors, losses = train_kept(kept, ema)
    assert losses == whole[1]
    assert all(torch.equal(a, b) for a, b in zip(tensors, whole[0], strict=True))


def test_keeping_changes_nothing() -> None:
    kept = Kept()
    tensors, losses = train_kept(kept)
    whole = train_kept(None)
    assert losses == whole[1]
    assert all(torch.equal(a, b) for a, b in zip(tensors, whole[0], strict=True))
    state = kept.load()
    assert state is not None
    assert state.step == 20  # of 25, in epochs of 5: the end of the training is not kept


@pytest.mark.parametrize("other", [{"size": 4}, {"ema": False}, {"steps": 3}])
def test_a_bookmark_of_another_training_is_an_error(other: dict[str, Any]) -> None:
    kept = Kept()
    train_kept(kept)
    if other == {"ema": False}:
        blob, kept = kept.blob, Kept()
        train_kept(kept, ema=False)
        other = {}
        assert blob != kept.blob
    with pytest.raises(ValueError, match=r"^the reference: here is of another training \(.+\); delete it$"):
        train_kept(kept, **other)


# -- rows of like length ----------------------------------------------------------------------------------------------


def test_with_lengths_an_epoch_still_has_every_row_once_in_batches_of_like_length() -> None:
    lengths = torch.randint(3, 60, (1000,), generator=torch.Generator().manual_seed(0))

    def epoch(seed: int, of: torch.Tensor | None) -> list[torch.Tensor]:
        return list(batches(1000, 32, torch.Generator().manual_seed(seed), lengths=of))

    rows = epoch(1, lengths)
    assert torch.cat(rows).sort().values.tolist() == list(range(1000))
    assert {len(r) for r in rows} == {len(r) for r in epoch(1, None)}

    def waste(rows: list[torch.Tensor]) -> float:
        return float(sum(lengths[r].max() * len(r) for r in rows) / lengths.sum())

    assert waste(rows) < 1.2 < 1.7 < waste(epoch(1, None))
    firsts = [float(lengths[r].float().mean()) for r in rows]
    assert firsts != sorted(firsts)  # long and short ones take turns
    assert not torch.equal(torch.cat(rows), torch.cat(epoch(2, lengths)))


def test_predictions_with_lengths_are_those_without() -> None:
    lengths = torch.tensor([5, 1, 4, 1, 3, 9, 2])
    asked: list[torch.Tensor] = []

    def logits(rows: torch.Tensor) -> torch.Tensor:
        asked.append(rows)
        return rows[:, None] * torch.tensor([1.0, 10.0])

    assert torch.equal(predict(logits, 7, 3, lengths=lengths), logits(torch.arange(7)))
    assert [lengths[rows].tolist() for rows in asked[:3]] == [[1, 1, 2], [3, 4, 5], [9]]
