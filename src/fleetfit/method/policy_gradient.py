"""The two losses of the header search: shared weights (Eq. 15), and the policy by REINFORCE with a baseline."""

import math

from jaxtyping import Float
from torch import Tensor


def shared_weight_loss(losses: Float[Tensor, " child"]) -> Float[Tensor, ""]:
    """Expected loss of the policy's children, whose gradient trains the shared weights (Eq. 15).

    The Monte Carlo estimate: the mean over the sampled children.

    Raises:
        ValueError: no child.
    """
    if len(losses) == 0:
        raise ValueError("losses must have at least 1 child, got 0")
    return losses.mean()


def policy_loss(
    log_probability: Float[Tensor, " sample"],
    reward: Float[Tensor, " sample"],
    baseline: float,
    entropy: Float[Tensor, " sample"],
    entropy_weight: float,
) -> Float[Tensor, ""]:
    """A loss whose gradient is minus REINFORCE's: -mean((R - b) * log pi) - weight * mean(entropy).

    In expectation the gradient is that of -E[R], for any baseline that does not depend on the samples at hand; so
    update the baseline after this.

    Args:
        log_probability: log pi of each sampled header, the sum over its 4B steps, nats.
        reward: R, accuracy of each on the validation split; taken as a constant.
        baseline: b, moving average of earlier rewards.
        entropy: Sum of the entropies of each sample's steps, nats.
        entropy_weight: How much exploring is worth, in reward per nat.

    Raises:
        ValueError: no sample.
    """
    if len(log_probability) == 0:
        raise ValueError("log_probability must have at least 1 sample, got 0")
    advantage = reward.detach() - baseline
    return -(advantage * log_probability).mean() - entropy_weight * entropy.mean()


def update_baseline(baseline: float | None, reward: float, decay: float) -> float:
    """Moving average of rewards, decay * b + (1 - decay) * R; the first reward where there is none yet.

    Raises:
        ValueError: decay is not in 0 <= decay < 1, or a reward that is not finite: no later one would mend it.
    """
    if not math.isfinite(reward):
        raise ValueError(f"reward must be finite, got {reward}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be >= 0 and < 1, got {decay}")
    return reward if baseline is None else decay * baseline + (1 - decay) * reward
