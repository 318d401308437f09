"""One liar's change and vote count no more than others', and honest ones as if there were no bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfit.method.robust import FACTOR, HEAVIEST, shortened, vote


def change(length: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([[0.6, 0.0]]) * length, "b": torch.tensor([0.8]) * length}


def test_a_long_change_is_shortened_and_keeps_its_direction() -> None:
    kept, norms, most = shortened([change(n) for n in (1.0, 2.0, 3.0, 1e6, 2.5)])
    assert norms == pytest.approx([1, 2, 3, 1e6, 2.5])
    assert most == pytest.approx(FACTOR * 2.5)
    assert [float(k["b"]) for k in kept[:3]] == [float(change(n)["b"]) for n in (1.0, 2.0, 3.0)]
    assert torch.cat([t.flatten() for t in kept[3].values()]).norm() == pytest.approx(most)
    assert float(kept[3]["b"] / kept[3]["w"][0, 0]) == pytest.approx(0.8 / 0.6)


def test_one_of_two_cannot_make_the_median_large() -> None:
    kept, _, most = shortened([change(1e6), change(1.0)])
    assert most == pytest.approx(FACTOR)
    assert float(kept[0]["b"]) == pytest.approx(0.8 * FACTOR)
    assert shortened([change(0.0), change(0.0)])[2] == 0.0


losses = st.lists(st.floats(0, 5), min_size=3, max_size=3)


@settings(max_examples=100, deadline=None)
@given(st.lists(losses, min_size=1, max_size=4), st.lists(st.integers(5, 20), min_size=4, max_size=4))
def test_of_few_like_devices_it_is_the_mean_over_samples(rows: list[list[float]], numbers: list[int]) -> None:
    table, weights = torch.tensor(rows, dtype=torch.float64), torch.tensor(numbers[: len(rows)]).double()
    torch.testing.assert_close(vote(table, weights), (weights / weights.sum()) @ table)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(losses, min_size=9, max_size=9),
    st.lists(st.floats(-1e6, 1e9), min_size=3, max_size=3),
    st.floats(1, 2**50),
)
def test_one_of_ten_moves_it_only_within_what_others_say(
    rows: list[list[float]], lie: list[float], claimed: float
) -> None:
    honest = torch.tensor(rows, dtype=torch.float64)
    found = vote(torch.cat([honest, torch.tensor([lie], dtype=torch.float64)]), torch.tensor([10.0] * 9 + [claimed]))
    above, said = found - found[0], honest - honest[:, :1]
    assert (above <= said.max(0).values + 1e-6 * max(1.0, float(found.abs().max()))).all()
    assert (above >= said.min(0).values - 1e-6 * max(1.0, float(found.abs().max()))).all()


def test_the_heaviest_counts_a_few_times_the_median() -> None:
    table = torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    found = vote(table, torch.tensor([2.0**40, 10.0, 10.0]))
    assert found.tolist() == pytest.approx([1.0, 2 * 2 / (HEAVIEST + 2)])


def test_no_voice_no_number_and_a_ceiling() -> None:
    table = torch.tensor([[1.0, 9.0], [100.0, 100.0]], dtype=torch.float64)
    assert vote(table, torch.tensor([1.0, 0.0])).tolist() == [1.0, 9.0]
    assert vote(table, torch.tensor([1.0, 0.0]), ceiling=4.0).tolist() == [1.0, 4.0]
    assert all(map(math.isnan, vote(table, torch.tensor([0.0, 0.0])).tolist()))
    spoilt = vote(torch.tensor([[math.nan, 1.0], [0.5, 2.0]], dtype=torch.float64), torch.ones(2))
    assert not math.isfinite(spoilt[0])
