"""Advantages relative to the whole batch, and a critic that is used only where it helps."""

import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.advantages import discounted_returns, generalized_advantage_estimation
from ppo_jax.ops.axes import share
from ppo_jax.ops.group_advantages import dr_grpo_advantages
from ppo_jax.ops.masked import masked_whiten
from ppo_jax.ops.metrics import explained_variance
from ppo_jax.types import AxisName


def reinforce_plus_plus_advantages(
    rewards: Array,
    mask: Array,
    groups: Array | None = None,
    *,
    gamma: float = 1.0,
    unbiased: bool = True,
    eps: float = 1e-8,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array]:
    """Whiten the returns of all tokens of the batch.

        A_t = (G_t - mean(G)) / √(var(G) + eps)

    With `groups`, the returns are those of "REINFORCE++ with baseline": the score of the response
    minus the mean score of its group, the same at each token, whatever γ is.

    Args:
      rewards: `[B, R]` float32, received at each step, with the KL penalty.
      mask: `[B, R]` bool, true for real steps.
      groups: `[B]` int32, the number of the prompt of each row. `None` for no baseline.
      gamma: γ, the discount per token, in 0 .. 1.
      unbiased: divide by `n - 1` instead of `n` in the variance.
      eps: added to the variance; not negative.
      axis_name: the mapped axis over which mean and variance are taken as well.

    Returns:
      Advantages and returns, `[B, R]` float32; 0 outside the mask.

    Raises:
      AssertionError: if the shapes are not those above, or `mask` is not bool.
      ValueError: if γ is not in 0 .. 1, or `eps` is negative.

    Source:
      Hu et al. 2025 (https://arxiv.org/abs/2501.03262). Checked against verl.

    Example:
      >>> rewards, mask = jnp.array([[0.0, 3.0], [1.0, 0.0]]), jnp.ones((2, 2), bool)
      >>> reinforce_plus_plus_advantages(rewards, mask)[0].round(2)
      Array([[ 0.83,  0.83],
             [-0.5 , -1.17]], dtype=float32)
    """
    returns = discounted_returns(rewards, mask, gamma=gamma)
    raw = returns
    if groups is not None:
        raw = dr_grpo_advantages(rewards, mask, groups, axis_name=axis_name)[0]
    return masked_whiten(raw, mask, unbiased=unbiased, eps=eps, axis_name=axis_name), returns


def batch_mean_advantages(
    rewards: Array, mask: Array, *, axis_name: AxisName | None = None
) -> tuple[Array, Array]:
    """Compare the score of each response with the mean score of the batch.

        A_i = score_i - mean(score)

    Args:
      rewards: `[B, R]` float32, received at each step.
      mask: `[B, R]` bool, true for real steps.
      axis_name: the mapped axis over which the rows are split.

    Returns:
      Advantages and undiscounted returns, `[B, R]` float32; 0 outside the mask.

    Raises:
      AssertionError: if the shapes differ, or `mask` is not bool.

    Source:
      Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist
      Reinforcement Learning", with the mean of the batch as baseline. Checked against verl's
      Dr. GRPO with one group.

    Example:
      >>> rewards, mask = jnp.array([[0.0, 3.0], [1.0, 0.0]]), jnp.ones((2, 2), bool)
      >>> batch_mean_advantages(rewards, mask)[0]
      Array([[ 1.,  1.],
             [-1., -1.]], dtype=float32)
    """
    groups = jnp.zeros(mask.shape[:1], jnp.int32)
    return dr_grpo_advantages(rewards, mask, groups, axis_name=axis_name)


def evpo_advantages(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    gamma: float,
    lam: float,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array]:
    """Use the critic only if its values explain some of the variance of the returns.

        EV = 1 - Var[G - V] / Var[G]
        A  = GAE(γ, λ) if EV > 0, else score - mean(score) over the batch

    A critic with an explained variance of 0 or less adds more noise to the advantages than it
    removes.

    Args:
      rewards: `[B, R]` float32, received at each step.
      values: `[B, R]` float32, V, in units of reward.
      mask: `[B, R]` bool, true for real steps.
      gamma: γ, the discount per token, in 0 .. 1.
      lam: λ of the advantages and returns, in 0 .. 1.
      axis_name: the mapped axis over which the variances and the mean are taken as well.

    Returns:
      Advantages and returns, `[B, R]` float32; 0 outside the mask. The returns are those of
      generalized advantage estimation in both cases, so that the critic goes on learning.

    Raises:
      AssertionError: if the shapes differ, or `mask` is not bool.
      ValueError: if γ or λ is not in 0 .. 1.

    Source:
      Pan et al. 2026, EVPO (https://arxiv.org/abs/2604.19485): the criterion and the two estimators
      are those of its abstract. The variances are taken here over all real steps of the batch, with
      G the discounted rewards from each step on. No released implementation was found.

    Example:
      >>> rewards, mask = jnp.array([[0.0, 3.0], [1.0, 0.0]]), jnp.ones((2, 2), bool)
      >>> useless = jnp.array([[0.0, 0.0], [1.0, 9.0]])
      >>> evpo_advantages(rewards, useless, mask, gamma=1.0, lam=0.95)[0]
      Array([[ 1.,  1.],
             [-1., -1.]], dtype=float32)
    """
    with_critic, returns = generalized_advantage_estimation(
        rewards, values, mask, gamma=gamma, lam=lam
    )
    without, _ = batch_mean_advantages(rewards, mask, axis_name=axis_name)
    monte_carlo = discounted_returns(rewards, mask, gamma=gamma)
    explained = explained_variance(values, monte_carlo, mask, axis_name=axis_name)
    advantages = jnp.where(share(explained, axis_name) > 0, with_critic, without)
    return jnp.where(mask, advantages, 0), jnp.where(mask, returns, 0)
