"""From several numbers about a response to the score that it is trained on."""

from collections.abc import Mapping

import chex
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.group_advantages import group_statistics
from ppo_jax.ops.masked import check_mask, widen
from ppo_jax.ops.options import check_not_negative
from ppo_jax.types import AxisName


def overlong_penalty(mask: Array, *, max_length: int, buffer: int, weight: float = 1.0) -> Array:
    """Penalize responses near the maximal length, instead of only those that are cut off.

        excess = length - (max_length - buffer)
        score  = 0 if excess ≤ 0,  else -weight · min(excess / buffer, 1)

    Args:
      mask: `[B, R]` bool, true for real tokens.
      max_length: the length in tokens from which on the penalty is the whole `weight`.
      buffer: how many tokens before `max_length` the penalty begins; positive.
      weight: the largest penalty, in units of score; not negative.

    Returns:
      `[B]` float32, 0 or negative, to be added to the scores.

    Raises:
      AssertionError: if `mask` is not `[B, R]` bool.
      ValueError: if `buffer` does not lie in 1 .. max_length, or `weight` is negative.

    Source:
      Yu et al. 2025, DAPO (https://arxiv.org/abs/2503.14476), eq. 13. Checked against AReaL and
      `get_soft_overlong_punishment` of TRL.

    Example:
      >>> mask = jnp.arange(8)[None, :] < jnp.array([[4], [6], [8]])
      >>> overlong_penalty(mask, max_length=8, buffer=4)
      Array([ 0. , -0.5, -1. ], dtype=float32)
    """
    check_not_negative(weight=weight)
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer={buffer} must lie in 1 .. max_length={max_length}.")
    chex.assert_rank(mask, 2)
    check_mask(mask)
    left = (max_length - buffer - mask.sum(axis=1)).astype(jnp.float32)
    return weight * jnp.clip(left / buffer, -1, 0)


def informative(
    scores: Array, groups: Array, mask: Array | None = None, *, axis_name: AxisName | None = None
) -> Array:
    """Tell which responses belong to a group whose scores are not all equal up to rounding.

    The other groups have advantages of 0. DAPO samples further prompts in their place; to leave
    them out of the denominator of a loss, use `mask & informative(...)[:, None]` as its mask.

    Args:
      scores: `[B]` float32.
      groups: `[B]` int32, the number of the prompt of each row.
      mask: `[B]` bool, true for rows that count. By default all do.
      axis_name: the mapped axis over which the rows are split.

    Returns:
      `[B]` bool.

    Raises:
      AssertionError: if the shapes differ.

    Source:
      Yu et al. 2025, DAPO (https://arxiv.org/abs/2503.14476), eq. 11 (dynamic sampling). Checked
      against `handle_filter_sampling` of SkyRL, which keeps the only response to a prompt.

    Example:
      >>> informative(jnp.array([1.0, 0.0, 1.0, 1.0]), jnp.array([0, 0, 1, 1]))
      Array([ True,  True, False, False], dtype=bool)
    """
    mask = jnp.ones(scores.shape, bool) if mask is None else mask
    return group_statistics(scores, mask, groups, axis_name).differ


def mean_score(scores: Array) -> Array:
    """Average the scores of an ensemble of reward models.

    Args:
      scores: `[M, B]` float32, the scores of `M` reward models.

    Returns:
      `[B]` float32.

    Raises:
      AssertionError: if `scores` is not `[M, B]`.

    Source:
      Coste et al. 2023 (https://arxiv.org/abs/2310.02743), mean optimization. Checked against the
      code of the paper.

    Example:
      >>> mean_score(jnp.array([[1.0, 0.0], [3.0, 0.0]]))
      Array([2., 0.], dtype=float32)
    """
    chex.assert_rank(scores, 2)
    return widen(scores).mean(axis=0)


def least_score(scores: Array) -> Array:
    """Take the least score of an ensemble of reward models.

    Args:
      scores: `[M, B]` float32, the scores of `M` reward models.

    Returns:
      `[B]` float32.

    Raises:
      AssertionError: if `scores` is not `[M, B]`.

    Source:
      Coste et al. 2023 (https://arxiv.org/abs/2310.02743), worst-case optimization. Checked against
      the code of the paper.

    Example:
      >>> least_score(jnp.array([[1.0, 0.0], [3.0, 0.0]]))
      Array([1., 0.], dtype=float32)
    """
    chex.assert_rank(scores, 2)
    return widen(scores).min(axis=0)


def uncertainty_weighted_score(scores: Array, *, coef: float) -> Array:
    """Subtract the disagreement of an ensemble of reward models from their mean.

        score = mean - coef · variance,  with the unbiased variance over the models

    Args:
      scores: `[M, B]` float32, the scores of `M` reward models; `M` is at least 2.
      coef: the weight of the variance.

    Returns:
      `[B]` float32.

    Raises:
      AssertionError: if `scores` is not `[M, B]`.
      ValueError: if there is a single model.

    Source:
      Coste et al. 2023 (https://arxiv.org/abs/2310.02743), uncertainty-weighted optimization.
      Checked against the code of the paper.

    Example:
      >>> uncertainty_weighted_score(jnp.array([[1.0, 0.0], [3.0, 0.0]]), coef=0.5)
      Array([1., 0.], dtype=float32)
    """
    chex.assert_rank(scores, 2)
    if len(scores) < 2:
        raise ValueError("scores must be of at least 2 reward models, because 1 has no variance.")
    return mean_score(scores) - coef * jnp.var(widen(scores), axis=0, ddof=1)


def weighted_score(parts: Mapping[str, Array], weights: Mapping[str, float]) -> Array:
    """Add up named parts of a score with their weights.

        score = Σ_name weight · part

    A part that is NaN says nothing about that response and adds nothing. A response of which all
    parts are NaN has no score, which is NaN.

    Args:
      parts: `[B]` float32 arrays by name.
      weights: a weight for each name.

    Returns:
      `[B]` float32.

    Raises:
      AssertionError: if the parts have different shapes.
      ValueError: if parts and weights have different names.

    Source:
      `reward_weights` of TRL, against whose sum it was checked.

    Example:
      >>> parts = {"correct": jnp.array([1.0, 0.0]), "format": jnp.array([1.0, 1.0])}
      >>> weighted_score(parts, {"correct": 1.0, "format": 0.5})
      Array([1.5, 0.5], dtype=float32)
    """
    if parts.keys() != weights.keys():
        raise ValueError(
            f"The names of parts, {sorted(parts)}, and of weights, {sorted(weights)}, must agree."
        )
    chex.assert_equal_shape(list(parts.values()))
    stacked = jnp.stack([weights[name] * widen(x) for name, x in parts.items()])
    missing = jnp.isnan(stacked).all(axis=0)
    return jnp.where(missing, jnp.nan, jnp.nansum(stacked, axis=0))
