"""Eq. 15 and REINFORCE, against exact expectations by enumeration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fleetfit.method.policy_gradient import policy_loss, shared_weight_loss, update_baseline

# Probabilities in eighths, so that eight samples in exact proportion are the exact expectation.
PROBABILITY = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
SAMPLES = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
REWARD = torch.tensor([0.2, 0.9, 0.4, 0.7], dtype=torch.float64)


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


@pytest.mark.parametrize("baseline", [0.0, 0.5, -3.0])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_gradient_is_exactly_that_of_minus_the_expected_reward(baseline, entropy_weight):
    logits = PROBABILITY.log().requires_grad_()
    policy = torch.distributions.Categorical(logits=logits)
    entropy = policy.entropy().expand(len(SAMPLES))
    estimate = policy_loss(policy.log_prob(SAMPLES), REWARD[SAMPLES], baseline, entropy, entropy_weight)
    exact = -(policy.probs * REWARD).sum() - entropy_weight * policy.entropy()
    torch.testing.assert_close(gradient(estimate, logits), gradient(exact, logits))


def test_by_hand():
    log_probability = torch.tensor([-1.0, -2.0])
    loss = policy_loss(log_probability, torch.tensor([0.9, 0.5]), 0.4, torch.tensor([1.0, 3.0]), 0.1)
    # -((0.5 * -1) + (0.1 * -2)) / 2 - 0.1 * 2
    assert float(loss) == pytest.approx(0.35 - 0.2)


def test_ascent_finds_the_best_action():
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    baseline = None
    for _ in range(200):
        policy = torch.distributions.Categorical(logits=logits)
        actions = torch.multinomial(policy.probs.detach(), 4, replacement=True, generator=generator)
        reward = REWARD[actions].float()
        center = float(reward.mean()) if baseline is None else baseline
        loss = policy_loss(policy.log_prob(actions), reward, center, policy.entropy().expand(4), 1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        baseline = update_baseline(baseline, float(reward.mean()), 0.9)
    assert logits.argmax() == REWARD.argmax()


def test_the_baseline_lowers_the_variance():
    def spread(baseline):
        logits = PROBABILITY.log().requires_grad_()
        gradients = []
        for action in SAMPLES:
            log_probability = logits.log_softmax(0)[action][None]
            none = torch.zeros(1, dtype=torch.float64)
            gradients.append(gradient(policy_loss(log_probability, REWARD[action][None], baseline, none, 0.0), logits))
        return torch.stack(gradients).var(0).sum()

    assert spread(float((PROBABILITY * REWARD).sum())) < spread(0.0)


def test_no_gradient_through_the_reward():
    reward = torch.ones(2, requires_grad=True)
    log_probability = torch.zeros(2, requires_grad=True)
    policy_loss(log_probability, reward, 0.0, torch.zeros(2), 0.0).backward()
    assert reward.grad is None


def test_shared_weight_loss_is_the_mean_and_its_gradient_the_mean_of_gradients():
    weight = torch.tensor(2.0, requires_grad=True)
    loss = shared_weight_loss(torch.stack([weight, weight**2, 3 * weight]))
    assert loss.item() == pytest.approx((2 + 4 + 6) / 3)
    assert float(torch.autograd.grad(loss, weight)[0]) == pytest.approx((1 + 4 + 3) / 3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 0.999))
def test_baseline_is_the_closed_form_of_the_moving_average(rewards, decay):
    baseline = None
    for reward in rewards:
        baseline = update_baseline(baseline, reward, decay)
    last = len(rewards) - 1
    weights = [decay**last] + [(1 - decay) * decay ** (last - i) for i in range(1, last + 1)]
    assert sum(weights) == pytest.approx(1)
    assert baseline == pytest.approx(sum(w * r for w, r in zip(weights, rewards, strict=True)))


def test_a_baseline_of_zero_is_a_baseline():
    assert update_baseline(0.0, 1.0, 0.9) == pytest.approx(0.1)


def test_bad_arguments_name_rule_and_value():
    with pytest.raises(ValueError, match="decay must be >= 0 and < 1, got 1"):
        update_baseline(0.5, 0.5, 1.0)
    with pytest.raises(ValueError, match="losses must have at least 1 child"):
        shared_weight_loss(torch.zeros(0))
    with pytest.raises(ValueError, match="at least 1 sample, got 0"):
        policy_loss(torch.zeros(0), torch.zeros(0), 0.0, torch.zeros(0), 0.0)
