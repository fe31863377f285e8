"""Advantages of responses relative to the other responses to the same prompt.

The score of a response is the sum of its rewards, and all its tokens get the same advantage. Rows
with the same number in `groups` answer the same prompt; they need not be neighbours. A row without
a real token belongs to no group. The only row of a group has the advantage 0, because nothing can
be said about it. With `axis_name`, a group may be split over the shards of that axis.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.advantages import discounted_returns
from ppo_jax.ops.masked import check_dtype, check_mask, nearly_equal, widen
from ppo_jax.ops.options import check_not_negative
from ppo_jax.types import AxisName


class _Groups(NamedTuple):
    """For each row, its own score and the statistics of the scores of its group, `[B]` each."""

    scores: Array
    size: Array
    mean: Array
    std: Array  # the unbiased standard deviation
    differ: Array  # bool, whether the scores of the group are not all equal up to rounding


def group_statistics(
    scores: Array, members: Array, groups: Array, axis_name: AxisName | None = None
) -> _Groups:
    """Compute size, mean and standard deviation of the scores of the group of each row.

    Args:
      scores: `[B]` float.
      members: `[B]` bool, true for rows that count.
      groups: `[B]` int32.
      axis_name: the mapped axis over which the rows are split.

    Returns:
      The statistics, `[B]` each.
    """
    chex.assert_rank([scores, members, groups], 1)
    check_mask(members, scores, groups)
    check_dtype(int, groups=groups)
    scores = widen(jnp.where(members, scores, 0))
    everywhere = (scores, members, groups)
    if axis_name is not None:
        everywhere = jax.lax.all_gather(everywhere, axis_name, tiled=True)
    all_scores, all_members, all_groups = everywhere
    same = (groups[:, None] == all_groups[None, :]) & all_members[None, :]
    count = jnp.maximum(same.sum(axis=1), 1).astype(scores.dtype)
    mean = jnp.where(same, all_scores[None, :], 0).sum(axis=1) / count
    squares = jnp.where(same, (all_scores[None, :] - mean[:, None]) ** 2, 0).sum(axis=1)
    largest, least = (
        jax.lax.stop_gradient(extreme(all_scores[None, :], axis=1, where=same, initial=initial))
        for extreme, initial in ((jnp.max, -jnp.inf), (jnp.min, jnp.inf))
    )
    differ = ~nearly_equal(largest, least) & members
    # The square root of 0 has no gradient.
    variance = jnp.where(differ, squares / jnp.maximum(count - 1, 1), 1)
    return _Groups(scores, count, mean, jnp.where(differ, jnp.sqrt(variance), 0), differ)


def _statistics(rewards: Array, mask: Array, groups: Array, axis_name: AxisName | None) -> _Groups:
    chex.assert_rank([rewards, mask, groups], [2, 2, 1])
    check_mask(mask, rewards)
    scores = widen(jnp.where(mask, rewards, 0)).sum(axis=1)
    return group_statistics(scores, mask.any(axis=1), groups, axis_name)


def _spread(advantages: Array, rewards: Array, mask: Array) -> tuple[Array, Array]:
    """Give each real token the advantage of its response, and the sum of the rewards from it on."""
    spread = jnp.where(mask, advantages[:, None], 0)
    return spread, discounted_returns(rewards, mask, gamma=1.0)


def grpo_advantages(
    rewards: Array,
    mask: Array,
    groups: Array,
    *,
    eps: float = 1e-6,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array]:
    """Compare each score with the mean of its group, in units of the group's standard deviation.

        A_i = (score_i - mean) / (std + eps)

    Args:
      rewards: `[B, R]` float32, received at each step.
      mask: `[B, R]` bool, true for real steps.
      groups: `[B]` int32, the number of the prompt of each row.
      eps: added to the standard deviation, which is the unbiased one; not negative.
      axis_name: the mapped axis over which the rows are split.

    Returns:
      Advantages and undiscounted returns, `[B, R]` float32; 0 outside the mask, and in groups whose
      scores are equal up to rounding.

    Raises:
      AssertionError: if the shapes are not those above, or `mask` is not bool.
      ValueError: if `eps` is negative.

    Source:
      Shao et al. 2024 (https://arxiv.org/abs/2402.03300), section 4.1. Checked against verl.

    Example:
      >>> rewards, mask = jnp.array([[0.0, 3.0], [1.0, 0.0]]), jnp.ones((2, 2), bool)
      >>> grpo_advantages(rewards, mask, jnp.array([7, 7]))[0].round(3)
      Array([[ 0.707,  0.707],
             [-0.707, -0.707]], dtype=float32)
    """
    check_not_negative(eps=eps)
    of = _statistics(rewards, mask, groups, axis_name)
    return _spread(jnp.where(of.differ, (of.scores - of.mean) / (of.std + eps), 0), rewards, mask)


def dr_grpo_advantages(
    rewards: Array, mask: Array, groups: Array, *, axis_name: AxisName | None = None
) -> tuple[Array, Array]:
    """Compare each score with the mean of its group.

        A_i = score_i - mean

    Unlike GRPO this does not weigh prompts by how much their scores vary. Dr. GRPO also divides
    the loss by a constant instead of the length of a response; see `constant_length`.

    Args:
      rewards: `[B, R]` float32, received at each step.
      mask: `[B, R]` bool, true for real steps.
      groups: `[B]` int32, the number of the prompt of each row.
      axis_name: the mapped axis over which the rows are split.

    Returns:
      Advantages and undiscounted returns, `[B, R]` float32; 0 outside the mask.

    Raises:
      AssertionError: if the shapes are not those above, or `mask` is not bool.

    Source:
      Liu et al. 2025 (https://arxiv.org/abs/2503.20783), section 3.2. Checked against verl.

    Example:
      >>> rewards, mask = jnp.array([[0.0, 3.0], [1.0, 0.0]]), jnp.ones((2, 2), bool)
      >>> dr_grpo_advantages(rewards, mask, jnp.array([7, 7]))[0]
      Array([[ 1.,  1.],
             [-1., -1.]], dtype=float32)
    """
    of = _statistics(rewards, mask, groups, axis_name)
    return _spread(jnp.where(of.differ, of.scores - of.mean, 0), rewards, mask)


def rloo_advantages(
    rewards: Array, mask: Array, groups: Array, *, axis_name: AxisName | None = None
) -> tuple[Array, Array]:
    """Compare each score with the mean of the other scores of its group (leave one out).

        A_i = score_i - Σ_{j≠i} score_j / (n - 1)

    Args:
      rewards: `[B, R]` float32, received at each step.
      mask: `[B, R]` bool, true for real steps.
      groups: `[B]` int32, the number of the prompt of each row.
      axis_name: the mapped axis over which the rows are split.

    Returns:
      Advantages and undiscounted returns, `[B, R]` float32; 0 outside the mask.

    Raises:
      AssertionError: if the shapes are not those above, or `mask` is not bool.

    Source:
      Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024
      (https://arxiv.org/abs/2402.14740), section 3. Checked against verl.

    Example:
      >>> rewards, mask = jnp.array([[0.0, 3.0], [1.0, 0.0]]), jnp.ones((2, 2), bool)
      >>> rloo_advantages(rewards, mask, jnp.array([7, 7]))[0]
      Array([[ 2.,  2.],
             [-2., -2.]], dtype=float32)
    """
    of = _statistics(rewards, mask, groups, axis_name)
    scale = of.size / jnp.maximum(of.size - 1, 1)
    return _spread(jnp.where(of.differ, scale * (of.scores - of.mean), 0), rewards, mask)


def maxrl_advantages(
    rewards: Array, mask: Array, groups: Array, *, axis_name: AxisName | None = None
) -> tuple[Array, Array]:
    """Compare each score with the mean of its group, in units of that mean.

        A_i = (score_i - mean) / mean,  or 0 if mean ≤ 0

    For scores of 0 and 1 this weighs a prompt by the inverse of its success rate, which makes the
    gradient an estimate of that of the log-likelihood of success. Scores must not be negative.

    Args:
      rewards: `[B, R]` float32, received at each step.
      mask: `[B, R]` bool, true for real steps.
      groups: `[B]` int32, the number of the prompt of each row.
      axis_name: the mapped axis over which the rows are split.

    Returns:
      Advantages and undiscounted returns, `[B, R]` float32; 0 outside the mask.

    Raises:
      AssertionError: if the shapes are not those above, or `mask` is not bool.

    Source:
      Maximum likelihood reinforcement learning (https://arxiv.org/abs/2602.02710). Checked against
      prime-rl and SkyRL, which adds 1e-6 to the mean.

    Example:
      >>> rewards, mask = jnp.array([[0.0, 3.0], [1.0, 0.0]]), jnp.ones((2, 2), bool)
      >>> maxrl_advantages(rewards, mask, jnp.array([7, 7]))[0]
      Array([[ 0.5,  0.5],
             [-0.5, -0.5]], dtype=float32)
    """
    of = _statistics(rewards, mask, groups, axis_name)
    informative = of.differ & (of.mean > 0)
    mean = jnp.where(informative, of.mean, 1)
    return _spread(jnp.where(informative, (of.scores - mean) / mean, 0), rewards, mask)
