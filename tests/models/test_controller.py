"""The policy: probabilities over the whole space, sampling, and learning from rewards."""

import itertools
import math

import torch

from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import Block
from fleetfit.method.search_space import num_headers, validate_blocks
from fleetfit.models.controller import TANH_CONSTANT, Controller

torch.set_num_threads(1)


def make_controller(num_blocks: int, operations) -> Controller:
    with seeded_init(0, "controller"):
        return Controller(num_blocks, operations)


def test_probabilities_of_all_cells_sum_to_one() -> None:
    operations = ("conv1", "identity")
    controller = make_controller(2, operations)
    sides = [[(i, o) for i in range(b + 2) for o in operations] for b in range(2)]
    options = [
        [Block(input_1=i, input_2=j, operation_1=o, operation_2=p) for (i, o), (j, p) in itertools.product(s, s)]
        for s in sides
    ]
    cells = list(itertools.product(*options))
    assert len(cells) == num_headers(2, 2)
    with torch.no_grad():
        chosen = [controller.score(c) for c in cells]
    log_probabilities = torch.stack([c.log_probability for c in chosen])
    assert abs(log_probabilities.exp().sum().item() - 1) < 1e-4
    # The steps' entropies, averaged over the policy, are the entropy of the whole (chain rule).
    mean = sum(c.entropy * c.log_probability.exp() for c in chosen)
    torch.testing.assert_close(mean, -(log_probabilities.exp() * log_probabilities).sum(), rtol=1e-4, atol=1e-4)


def test_sample_is_valid_reproducible_and_scored_alike() -> None:
    controller = make_controller(4, ("conv1", "conv3", "max_pool"))
    first = controller.sample(named_generator(1, "draw"))
    again = controller.sample(named_generator(1, "draw"))
    validate_blocks(first.blocks)
    assert first.blocks == again.blocks
    torch.testing.assert_close(controller.score(first.blocks).log_probability, first.log_probability)
    torch.testing.assert_close(controller.score(first.blocks).entropy, first.entropy)


def test_no_choice_is_ever_certain() -> None:
    controller = make_controller(1, ("conv1", "identity"))
    with torch.no_grad():
        for p in controller.parameters():
            p.mul_(100)
        least = math.log(1 / (1 + math.exp(2 * TANH_CONSTANT)))
        assert controller.sample(named_generator(0, "draw")).log_probability >= 4 * least - 1e-5


def test_learns_to_prefer_what_is_rewarded() -> None:
    operations = ("conv1", "identity", "max_pool")
    controller = make_controller(2, operations)
    generator = named_generator(0, "learn")
    optimizer = torch.optim.Adam(controller.parameters(), lr=3.5e-3)

    def share() -> float:
        with torch.no_grad():
            drawn = [controller.sample(named_generator(2, "share", i)).blocks for i in range(60)]
        return sum(b.operation_1 == "conv1" for blocks in drawn for b in blocks) / 120

    before = share()
    for _ in range(60):
        choice = controller.sample(generator)
        reward = sum(b.operation_1 == "conv1" for b in choice.blocks) / 2
        optimizer.zero_grad()
        (-(reward - 0.5) * choice.log_probability).backward()
        optimizer.step()
    assert share() > before + 0.2
