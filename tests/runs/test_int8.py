"""How many layers stay in float, with pretended models whose agreement is known; what few samples can say."""

from collections.abc import Collection, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from fleetfit.runs.int8 import Int8Check, Int8Model, compare, smallest_loss

LAYERS = tuple("abcdefgh")


def check(agreement: float, accuracy: float = 0.9, **how: object) -> Int8Check:
    return Int8Check.model_validate(
        {"agreement": agreement, "accuracy": accuracy, "accuracy_before": 0.9, "size_before_bytes": 100} | how
    )


class Pretended:
    """Each harmful layer that is int8 costs .2 of agreement; scales by channel mend some of them."""

    def __init__(self, harmful: Collection[str], by_channel: Collection[str] = (), size: int = 5) -> None:
        self.harmful, self.by_channel, self.size = harmful, by_channel, size
        self.made: list[tuple[tuple[str, ...], bool]] = []

    def make(self, float_layers: Sequence[str], per_channel: bool) -> Int8Model:
        self.made.append((tuple(float_layers), per_channel))
        left = set(self.harmful) - set(float_layers) - (set(self.by_channel) if per_channel else set())
        content = b"x" * (40 + self.size * len(float_layers))
        how = {"per_channel": per_channel, "float_layers": tuple(float_layers)}
        return Int8Model(content, check(max(0.0, 1 - 0.2 * len(left)), **how))

    def damage_of(self, float_layers: Sequence[str]) -> float:
        (alone,) = set(LAYERS) - set(float_layers)
        return 1.0 if alone in self.harmful else 0.01

    def result(self, min_agreement: float = 0.95) -> Int8Model:
        return smallest_loss(self.make, self.damage_of, LAYERS, min_agreement)


def test_nothing_is_tried_where_int8_is_good() -> None:
    pretended = Pretended(())
    assert pretended.result().check.float_layers == ()
    assert pretended.made == [((), False)]


def test_scales_by_channel_come_before_layers_in_float() -> None:
    pretended = Pretended("bd", by_channel="bd")
    assert pretended.result().check.per_channel
    assert pretended.made == [((), False), ((), True)]


@given(st.sets(st.sampled_from(LAYERS), min_size=1, max_size=7), st.sets(st.sampled_from(LAYERS)))
def test_just_the_harmful_layers_stay_in_float(harmful: set[str], by_channel: set[str]) -> None:
    pretended = Pretended(harmful, by_channel)
    found = pretended.result().check
    assert found.agreement == 1.0
    assert set(found.float_layers) <= harmful
    if harmful <= by_channel:
        assert found.float_layers == ()
    else:
        assert len(pretended.made) <= 2 + 3, "bisection over eight layers"


def test_where_all_layers_are_needed_the_best_there_is_is_given_and_it_does_not_keep_to_the_bounds() -> None:
    found = Pretended(LAYERS).result()
    assert not found.check.keeps_to(0.95)
    assert found.check.float_layers != ()
    assert found.check.agreement == pytest.approx(0.8)


def test_a_repair_that_makes_the_file_no_smaller_is_none() -> None:
    found = Pretended("abcdefg", size=10).result()  # 40 bytes and 70 against 100 in float
    assert not found.check.keeps_to(0.95)
    assert len(found.content) < 100


@pytest.mark.parametrize(
    ("agreement", "accuracy", "good"),
    [(0.95, 0.9, True), (0.9499, 0.9, False), (0.99, 0.87, True), (0.99, 0.869, False), (0.96, 0.95, True)],
)
def test_the_bounds(agreement: float, accuracy: float, good: bool) -> None:
    assert check(agreement, accuracy).keeps_to(0.95) is good


@given(st.integers(1, 60), st.data())
def test_the_interval_is_that_of_clopper_and_pearson(number: int, data: st.DataObject) -> None:
    """With its lower end as the true share, so many or more labels stay in 2.5 of 100 cases."""
    same = data.draw(st.integers(0, number))
    before = np.eye(2, dtype=np.float32)[np.zeros(number, int)]
    after = np.eye(2, dtype=np.float32)[(np.arange(number) >= same).astype(int)]
    found = compare(after, before, np.zeros(number, np.int64), 100)
    assert found.agreement == found.accuracy == pytest.approx(same / number)
    if same:
        assert binom.sf(same - 1, number, found.agreement_at_least) == pytest.approx(0.025, rel=1e-6)
    else:
        assert found.agreement_at_least == 0.0
