"""What a group ships: preferred unless clearly worse, never worse than as sent or alone, whoever lies."""

import math

import pytest
import torch

from fleetfit.config.sections import RefineConfig
from fleetfit.core.records import Way
from fleetfit.device.messages import ProposeReply
from fleetfit.device.ways import ways_to_ship
from fleetfit.edge.shipping import decide

REFINE = RefineConfig()
WAYS = ways_to_ship(REFINE, 4)


def replies(losses: dict[Way, list[float]], number: int = 10, otherwise: float = 5.0) -> dict[str, ProposeReply]:
    """Mean losses of each device by way; those not named have another."""
    devices = len(next(iter(losses.values())))
    return {
        f"d{i}": ProposeReply(
            step=3,
            num_samples=number,
            tensors={"losses": torch.tensor([number * losses.get(w, [otherwise] * devices)[i] for w in WAYS])},
        )
        for i in range(devices)
    }


SENT, ALONE, OWN = Way(header="coarse"), Way(header="local"), Way(header="own")
REFINED = next(w for w in WAYS if w.header == "refined" and w.prior_strength)
ROUGH = [0.0, 0.2, -0.1, 0.1, -0.2, 0.0]


def near(value: float, spread: float = 1.0) -> list[float]:
    return [value + spread * r for r in ROUGH]


def test_ways_are_all_different_and_the_first_is_as_sent() -> None:
    assert len(set(WAYS)) == len(WAYS)
    assert WAYS[0] == SENT
    assert {w.header for w in ways_to_ship(REFINE, 4, private=True)} == {"coarse", "refined"}
    assert len(ways_to_ship(RefineConfig(class_prior=False, guard=False), 4)) == 2
    assert not any(w.header in ("quarter", "half") for w in ways_to_ship(RefineConfig(prune_share=0.1), 4))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({SENT: near(1.0), ALONE: near(1.0), REFINED: near(0.5)}, REFINED),
        ({SENT: near(0.5), ALONE: near(1.0), REFINED: near(0.9)}, SENT),
        ({SENT: near(1.0), ALONE: near(0.5), REFINED: near(0.9)}, ALONE),
        # Better by less than the error of the comparison: what was made together is preferred ...
        ({SENT: near(1.0), ALONE: near(1.0), OWN: near(0.5), REFINED: near(0.51, -1.0)}, REFINED),
        # ... but not where it is worse than as sent or alone,
        ({SENT: near(0.5), ALONE: near(1.0), OWN: near(0.49), REFINED: near(0.51, -1.0)}, OWN),
        # and not where another is clearly better.
        ({SENT: near(1.0), ALONE: near(1.0), OWN: near(0.5), REFINED: near(0.6)}, OWN),
    ],
)
@pytest.mark.parametrize("robust", [False, True])
def test_what_ships(losses: dict[Way, list[float]], expected: Way, robust: bool) -> None:
    assert decide(REFINE, replies(losses), {}, 4, robust=robust).way == expected


def test_it_is_never_above_as_sent_or_alone_on_the_pooled_validation() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        table = torch.rand(6, len(WAYS), generator=generator) * 0.2 + 1
        sent = {
            f"d{i}": ProposeReply(step=3, num_samples=7, tensors={"losses": 7 * row}) for i, row in enumerate(table)
        }
        way = decide(REFINE, sent, {}, 4, robust=False).way
        mean = dict(zip(WAYS, table.mean(0).tolist(), strict=True))
        assert mean[way] <= min(mean[SENT], mean[ALONE]) + 1e-6


def test_without_a_guard_refined_headers_ship() -> None:
    config = RefineConfig(guard=False, class_prior=False)
    losses = {"losses": torch.tensor([1.0, 9.0])}
    sent = {"a": ProposeReply(step=3, num_samples=1, tensors=losses)}
    assert decide(config, sent, {}, 4, robust=False).way == Way(header="refined")


@pytest.mark.parametrize(("guard", "header"), [(True, "coarse"), (False, "refined")])
def test_without_validation_samples_nothing_speaks_for_a_change(guard: bool, header: str) -> None:
    config = RefineConfig(guard=guard)
    ways = ways_to_ship(config, 4)
    sent = {d: ProposeReply(step=3, num_samples=0, tensors={"losses": torch.zeros(len(ways))}) for d in "ab"}
    decision = decide(config, sent, {}, 4, robust=True)
    assert decision.way == Way(header=header)
    assert decision.loss_by_way == {}


def test_a_group_with_samples_enough_chooses_for_itself() -> None:
    both = {SENT: near(1.0) + near(0.2), ALONE: near(1.0) * 2, REFINED: near(0.5) + near(0.9)}
    groups = {f"d{i}": int(i >= 6) for i in range(12)}
    decision = decide(REFINE, replies(both), groups, 4, robust=True)
    assert [decision.way_of(d) for d in ("d0", "d6", "another")] == [REFINED, SENT, decision.way]
    few = decide(REFINE, replies(both, number=5), groups, 4, robust=True)
    assert few.groups == ()


def test_losses_that_are_not_finite_ship_nowhere() -> None:
    losses = {SENT: [1.0] * 6, ALONE: [2.0] * 6, REFINED: [math.nan] * 6}
    assert decide(REFINE, replies(losses), {}, 4, robust=False).way == SENT
    with pytest.raises(ValueError, match="no way to ship has a finite validation loss"):
        decide(REFINE, replies({SENT: [math.nan] * 6}, otherwise=math.nan), {}, 4, robust=False)


@pytest.mark.parametrize("lie", [0.0, 1e4])
def test_one_liar_of_ten_does_not_decide(lie: float) -> None:
    honest = {SENT: near(1.0)[:5] * 2, ALONE: near(1.0)[:5] * 2, REFINED: near(0.5)[:5] * 2}
    sent = replies(honest)
    told = sent["d9"].tensors["losses"].clone()
    told[WAYS.index(REFINED)] = lie if lie else 50.0
    told[0] = 0.0
    lied = sent | {"d9": sent["d9"].model_copy(update={"tensors": {"losses": told}})}
    assert decide(REFINE, lied, {}, 4, robust=True).way == REFINED
