"""A change in a byte a value: off by at most half a level, exact for its largest value."""

import pytest
import torch

from fleetfit.method.quantisation import LEVELS, quantised, restored


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (4, 2, 3, 3), (0,), (0, 3)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_what_is_restored_is_off_by_half_a_level_at_most(shape: tuple[int, ...], scale: float) -> None:
    change = scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    numbers, level = quantised(change)
    assert numbers.dtype == torch.int8
    assert numbers.shape == change.shape
    back = restored(numbers, level)
    assert back.shape == change.shape
    if change.numel():
        rows = change.flatten(1) if change.ndim > 1 else change.reshape(1, -1)
        errors = (back - change).reshape(rows.shape).abs().amax(dim=1)
        assert bool((errors <= rows.abs().amax(dim=1) / LEVELS / 2 * 1.001).all())


def test_nothing_stays_nothing_and_rows_have_levels_of_their_own() -> None:
    change = torch.tensor([[0.0, 0.0], [1000.0, -500.0], [0.001, 0.0]])
    torch.testing.assert_close(restored(*quantised(change)), change, rtol=0.01, atol=0)
