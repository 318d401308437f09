"""Groups from header changes: found where they are, none where there are none, whatever lengths changes have."""

import pytest
import torch
from torch import Tensor

from fleetfit.method.groups import cosine_of_changes, group_weights, groups_of


def changes(sizes: tuple[int, ...], signal: float = 1.0, seed: int = 0) -> tuple[Tensor, list[int]]:
    """Each group its own direction, all a common one, each device noise; in mixed order."""
    generator = torch.Generator().manual_seed(seed)
    truth = [g for g, size in enumerate(sizes) for _ in range(size)]
    order = torch.randperm(len(truth), generator=generator).tolist()
    truth = [truth[i] for i in order]
    ways = torch.randn(len(sizes), 200, generator=generator)
    common = 5 * torch.randn(200, generator=generator)
    noise = torch.randn(len(truth), 200, generator=generator)
    return common + signal * ways[torch.tensor(truth)] + noise, truth


def partition(labels: object) -> set[frozenset[int]]:
    labels = list(labels)  # type: ignore[call-overload]
    return {frozenset(i for i, v in enumerate(labels) if v == g) for g in set(labels)}


@pytest.mark.parametrize("sizes", [(10, 10), (14, 6), (7, 7, 6), (10, 6, 4), (5, 5, 5, 5), (4, 4, 3, 3, 3, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_groups_are_found_exactly(sizes: tuple[int, ...], seed: int) -> None:
    made, truth = changes(sizes, seed=seed)
    found = groups_of(cosine_of_changes(made))
    assert partition(found.of_device) == partition(truth)
    assert found.silhouettes[len(sizes)] == max(found.silhouettes.values())


def test_two_groups_that_are_like_each_other_are_two() -> None:
    """Of three; the highest silhouette merges them in most seeds."""
    right = 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        truth = torch.tensor([0] * 7 + [1] * 7 + [2] * 6)
        ways = torch.randn(3, 200, generator=generator)
        ways[1] = 0.6 * ways[0] + 0.8 * ways[1]
        made = 0.7 * ways[truth] + torch.randn(20, 200, generator=generator)
        right += partition(groups_of(cosine_of_changes(made)).of_device) == partition(truth.tolist())
    assert right >= 8


@pytest.mark.parametrize("sizes", [(4,) * 10, (3,) * 20, (9, 8, 7, 6, 5, 4, 4, 4, 4, 4, 3), (12,) * 32])
def test_many_groups_are_found_where_devices_are_many(sizes: tuple[int, ...]) -> None:
    made, truth = changes(sizes, signal=2.0)
    assert partition(groups_of(cosine_of_changes(made)).of_device) == partition(truth)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("number", [20, 120])
def test_there_is_one_group_where_there_are_none(seed: int, number: int) -> None:
    assert groups_of(cosine_of_changes(changes((number,), seed=seed)[0])).number == 1


def test_a_device_that_scales_flips_or_sends_nothing_does_not_move_the_others() -> None:
    made, truth = changes((6, 6, 6))
    others = [i for i in range(len(truth)) if i != 3]
    mean = made.mean(dim=0)
    for lie in (mean + 3 * (made[3] - mean), mean - (made[3] - mean), made[3] * 0, torch.full((200,), 3.0), made[8]):
        sent = made.clone()
        sent[3] = lie
        found = groups_of(cosine_of_changes(sent)).of_device
        assert partition(found[i] for i in others) == partition(truth[i] for i in others)


def test_lengths_and_common_changes_say_nothing() -> None:
    made, _ = changes((5, 5))
    torch.testing.assert_close(cosine_of_changes(made), cosine_of_changes(made * 7 + 100), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_few_devices_are_one_group(number: int) -> None:
    found = groups_of(cosine_of_changes(torch.randn(number, 5, generator=torch.Generator().manual_seed(0))))
    assert found.of_device == (0,) * number


def test_identical_devices_are_one_group() -> None:
    assert groups_of(cosine_of_changes(torch.ones(8, 5))).number == 1
    assert groups_of(cosine_of_changes(torch.zeros(8, 5))).number == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_changes_must_be_finite(value: float) -> None:
    with pytest.raises(ValueError, match="changes must be finite"):
        cosine_of_changes(torch.tensor([[1.0, value], [0.0, 1.0]]))


def test_weights_are_means_of_groups() -> None:
    assert group_weights((0, 1, 0)).tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]
