"""The paper's header search (Section III-C): ENAS's shared weights (Eq. 15) and an LSTM policy, by REINFORCE."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import Block
from fleetfit.edge.header_trials import LABEL_SMOOTHING, Finalist, Search, cell_spec, draw_fitting, spec_name
from fleetfit.method.policy_gradient import policy_loss, shared_weight_loss, update_baseline
from fleetfit.models.controller import Controller
from fleetfit.models.header_supernet import HeaderSupernet

CONTROLLER_CLIP = 5.0  # largest norm of its gradient
FINAL_CHILDREN = 10  # children ranked by shared weights at the end


def search_enas(search: Search) -> list[Finalist]:
    """The paper's search: shared weights (Eq. 15) and an LSTM policy (REINFORCE) in turn; the best child trains alone.

    Where the training source has trainable parameters, the backbone is trained with the shared weights, at a rate of
    its own. A step of one child is one step of the budget; the last ``final_share`` of it trains the best child, which
    inherits its weights.

    Reading: AdamW for the shared weights, as for every header here, so that searches differ in their search only.
    """
    config = search.config
    space = cell_spec(search)
    generator = named_generator(search.seed, "header_search", search.method, "children")
    with seeded_init(search.seed, "header_search", search.method, "init"):
        shared = HeaderSupernet(space, config.operations, search.shape, search.num_classes)
        controller = Controller(config.max_blocks, config.operations)  # stays on the CPU: it chooses one by one
    shared.to(search.torch_device)
    optimizer = torch.optim.Adam(controller.parameters(), lr=config.controller_learning_rate)
    final_steps = max(1, round(config.budget_steps * config.final_share))
    steps = max(1, (config.budget_steps - final_steps) // config.children)
    baseline: float | None = None
    done = 0

    def draw() -> tuple[Block, ...]:
        with torch.no_grad():
            return draw_fitting(search, space, lambda: controller.sample(generator).blocks).blocks

    def controller_step() -> None:
        nonlocal baseline
        choices = [controller.score(draw()) for _ in range(config.children)]
        rewards = [search.scores(partial(shared, blocks=c.blocks)).accuracy for c in choices]
        reward = sum(rewards) / len(rewards)
        loss = policy_loss(
            torch.stack([c.log_probability for c in choices]),
            torch.tensor(rewards),
            reward if baseline is None else baseline,
            torch.stack([c.entropy for c in choices]),
            config.controller_entropy,
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(controller.parameters(), CONTROLLER_CLIP)
        optimizer.step()
        baseline = update_baseline(baseline, reward, config.controller_baseline_decay)
        search.history.append({"step": search.steps_used, "name": "controller", "reward": reward, "baseline": baseline})

    def loss_of(rows: Tensor) -> Tensor:
        nonlocal done
        if done and done % config.controller_interval == 0:
            controller_step()
        done += 1
        features, labels = search.train.features(rows), search.train.labels[rows]
        losses = [
            cross_entropy(shared(features, draw()), labels, label_smoothing=LABEL_SMOOTHING)
            for _ in range(config.children)
        ]
        return shared_weight_loss(torch.stack(losses))

    backbone = search.train.parameters()
    search.fit(loss_of, list(shared.parameters()), steps, "shared weights", cost=config.children, backbone=backbone)
    ranked = []
    for _ in range(FINAL_CHILDREN):
        blocks = draw()
        scores = search.scores(partial(shared, blocks=blocks))
        ranked.append((-scores.accuracy, scores.loss, blocks))
    child = shared.child(min(ranked, key=lambda r: r[:2])[2]).to(search.torch_device)
    search.train_alone(child, final_steps, "best child")
    return [search.finalist(spec_name(child.spec), child)]
