"""Advantage estimators with their options bound, as `learn` and the settings take them."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from jax import Array

from ppo_jax.errors import SettingError
from ppo_jax.ops.advantages import (
    decoupled_gae,
    discounted_returns,
    generalized_advantage_estimation,
    length_adaptive_lambda,
)
from ppo_jax.ops.baselines import (
    batch_mean_advantages,
    evpo_advantages,
    reinforce_plus_plus_advantages,
)
from ppo_jax.types import AdvantageFn, AxisName, Rollout, Scores

if TYPE_CHECKING:
    from ppo_jax.ppo.settings import PPOConfig


def gae(*, gamma: float, lam: float) -> AdvantageFn:
    """Make an `AdvantageFn` of generalized advantage estimation.

    Args:
      gamma: discount per token.
      lam: λ, which trades bias (0) for variance (1).

    Returns:
      The estimator; it needs neither the rollout nor the scores.

    Source:
      Schulman et al. 2015 (https://arxiv.org/abs/1506.02438), equations 11-16.

    Example:
      >>> import jax.numpy as jnp
      >>> rewards, mask = jnp.array([[0.0, 1.0]]), jnp.ones((1, 2), bool)
      >>> advantage_fn = gae(gamma=1.0, lam=0.5)
      >>> advantages, returns = advantage_fn(
      ...     rewards, 0 * rewards, mask, rollout=None, scores=None)
      >>> advantages
      Array([[0.5, 1. ]], dtype=float32)
    """
    estimate = partial(generalized_advantage_estimation, gamma=gamma, lam=lam)
    return lambda rewards, values, mask, *, rollout, scores: estimate(rewards, values, mask)


def vapo_gae(*, gamma: float, alpha: float = 0.05) -> AdvantageFn:
    """Make an `AdvantageFn` whose λ grows with the response, and whose returns have λ = 1.

    Args:
      gamma: discount per token.
      alpha: see `length_adaptive_lambda`. The default is that of VAPO.

    Returns:
      The estimator; it needs neither the rollout nor the scores.

    Source:
      Yue et al. 2025, VAPO (https://arxiv.org/abs/2504.05118).

    Example:
      >>> import jax.numpy as jnp
      >>> rewards, mask = jnp.array([[0.0, 1.0]]), jnp.ones((1, 2), bool)
      >>> advantage_fn = vapo_gae(gamma=1.0, alpha=1.0)
      >>> advantages, returns = advantage_fn(
      ...     rewards, 0 * rewards, mask, rollout=None, scores=None)
      >>> advantages, returns
      (Array([[0.5, 1. ]], dtype=float32), Array([[1., 1.]], dtype=float32))
    """

    def estimate(
        rewards: Array, values: Array, mask: Array, *, rollout: Rollout, scores: Scores
    ) -> tuple[Array, Array]:
        lam = length_adaptive_lambda(mask, alpha=alpha)
        return decoupled_gae(rewards, values, mask, gamma=gamma, lam_policy=lam)

    return estimate


def sao_gae(*, gamma: float) -> AdvantageFn:
    """Make the `AdvantageFn` of SAO: `vapo_gae` with the alpha that its code has.

    Args:
      gamma: discount per token.

    Returns:
      The estimator; it needs neither the rollout nor the scores.

    Source:
      Hou et al. 2026, SAO (https://arxiv.org/abs/2607.07508), as agentenv/miles has it.

    Example:
      >>> import jax.numpy as jnp
      >>> rewards, mask = jnp.zeros((1, 10)).at[0, 9].set(1), jnp.ones((1, 10), bool)
      >>> sao_gae(gamma=1.0)(rewards, 0 * rewards, mask, rollout=None, scores=None)[0][0, 0]
      Array(0.53744125, dtype=float32)
    """
    return vapo_gae(gamma=gamma, alpha=1.5)


def monte_carlo(*, gamma: float) -> AdvantageFn:
    """Make an `AdvantageFn` that uses the sum of later rewards, without a critic.

    Whitened over the batch, as `whiten_advantages` does, these are the advantages of REINFORCE++.

    Args:
      gamma: discount per token.

    Returns:
      The estimator; it needs neither the values, the rollout nor the scores.

    Source:
      Hu et al. 2025 (https://arxiv.org/abs/2501.03262).

    Example:
      >>> import jax.numpy as jnp
      >>> rewards, mask = jnp.array([[0.0, 1.0]]), jnp.ones((1, 2), bool)
      >>> monte_carlo(gamma=0.5)(rewards, rewards, mask, rollout=None, scores=None)[0]
      Array([[0.5, 1. ]], dtype=float32)
    """

    def estimate(
        rewards: Array, values: Array, mask: Array, *, rollout: Rollout, scores: Scores
    ) -> tuple[Array, Array]:
        returns = discounted_returns(rewards, mask, gamma=gamma)
        return returns, returns

    return estimate


def of_groups(
    estimate: Callable[[Array, Array, Array], tuple[Array, Array]],
) -> Callable[..., AdvantageFn]:
    """Turn an estimator that compares responses to the same prompt into a method.

    Args:
      estimate: called with the rewards `[B, R]`, their mask and the groups `[B]`, such as
        `grpo_advantages`.

    Returns:
      A function of the settings that returns the `AdvantageFn`.
    """

    def make(config: "PPOConfig", axis_name: AxisName | None = None) -> AdvantageFn:
        # A group never spans two devices, so nothing has to be gathered over `axis_name`.
        def advantages(
            rewards: Array, values: Array, mask: Array, *, rollout: Rollout, scores: Scores
        ) -> tuple[Array, Array]:
            return estimate(rewards, mask, groups_of(rollout))

        return advantages

    return make


def evpo(config: "PPOConfig", axis_name: AxisName | None = None) -> AdvantageFn:
    """Make the `AdvantageFn` that uses the critic only while it explains variance."""

    def advantages(
        rewards: Array, values: Array, mask: Array, *, rollout: Rollout, scores: Scores
    ) -> tuple[Array, Array]:
        return evpo_advantages(
            rewards, values, mask, gamma=config.gamma, lam=config.lam, axis_name=axis_name
        )

    return advantages


def batch_mean(config: "PPOConfig", axis_name: AxisName | None = None) -> AdvantageFn:
    """Make the `AdvantageFn` that compares each score with the mean score of the batch."""

    def advantages(
        rewards: Array, values: Array, mask: Array, *, rollout: Rollout, scores: Scores
    ) -> tuple[Array, Array]:
        return batch_mean_advantages(rewards, mask, axis_name=axis_name)

    return advantages


def reinforce_pp(*, baseline: bool) -> Callable[..., AdvantageFn]:
    """Make the method REINFORCE++, whose returns are whitened over the tokens of the batch.

    Args:
      baseline: subtract the mean score of the responses to the same prompt first.

    Returns:
      A function of the settings that returns the `AdvantageFn`.
    """

    def make(config: "PPOConfig", axis_name: AxisName | None = None) -> AdvantageFn:
        def advantages(
            rewards: Array, values: Array, mask: Array, *, rollout: Rollout, scores: Scores
        ) -> tuple[Array, Array]:
            groups = groups_of(rollout) if baseline else None
            return reinforce_plus_plus_advantages(
                rewards, mask, groups, gamma=config.gamma, axis_name=axis_name
            )

        return advantages

    return make


def groups_of(rollout: Rollout) -> Array:
    """Return the groups of a rollout, `[B]` int32, or raise SettingError if it has none."""
    if rollout.groups is None:
        raise SettingError(
            "rollout.groups is None, but the advantage estimator compares responses to the same "
            "prompt; set it to the number of the prompt of each row, as sample does."
        )
    return rollout.groups
