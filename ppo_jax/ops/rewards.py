"""From the score of a response to the reward of each token.

The steps are, in order: the rule for responses without an end token, the scaling of the scores, the
token that receives the score, and the KL penalty on every token.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax.struct import PyTreeNode
from jax import Array

from ppo_jax.ops.axes import share
from ppo_jax.ops.masked import check_mask, masked_mean, masked_sum, widen
from ppo_jax.ops.options import check_not_negative, choose
from ppo_jax.ops.score_rules import MissingEOS, ScoreAt
from ppo_jax.types import AxisName


def score_index(mask: Array, score_at: ScoreAt | str) -> Array:
    """Find the step that receives the score of each response.

    Args:
      mask: `[B, R]` bool, true for real tokens.
      score_at: which step to choose, or its name.

    Returns:
      `[B]` int32; 0 for a response without a real token, except with `LAST_INDEX`.

    Raises:
      AssertionError: if `mask` is not `[B, R]` bool.
      ValueError: if there is no such step.

    Example:
      >>> mask = jnp.array([[True, True, False, False]])
      >>> [int(score_index(mask, score_at)[0]) for score_at in ScoreAt]
      [1, 2, 3]
    """
    chex.assert_rank(mask, 2)
    check_mask(mask)
    length = mask.shape[1]
    after = jnp.where(mask.any(axis=1), length - jnp.argmax(mask[:, ::-1], axis=1), 0)
    match choose(ScoreAt, score_at, "score_at"):
        case ScoreAt.LAST_TOKEN:
            return jnp.maximum(after - 1, 0)
        case ScoreAt.AFTER_LAST_TOKEN:
            return jnp.minimum(after, length - 1)
        case ScoreAt.LAST_INDEX:
            return jnp.full_like(after, length - 1)


def apply_missing_eos(
    scores: Array, ended: Array, *, rule: MissingEOS | str, penalty: float = 1.0
) -> Array:
    """Change the scores of the responses that have no end token.

    Args:
      scores: `[B]` float32.
      ended: `[B]` bool, true if the response holds a stop token.
      rule: whether to keep, lower or replace the scores of the other responses, or its name.
      penalty: at least 0, in units of score.

    Returns:
      `[B]` float32.

    Raises:
      AssertionError: if the shapes differ, or `ended` is not bool.
      ValueError: if there is no such rule, or `penalty` is negative.

    Source:
      Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593) and Huang et al. 2024
      (https://arxiv.org/abs/2403.17031) replace the score. `missing_eos_penalty` of TRL lowers it.

    Example:
      >>> scores, ended = jnp.array([2.0, 2.0]), jnp.array([True, False])
      >>> apply_missing_eos(scores, ended, rule=MissingEOS.PENALIZE)
      Array([2., 1.], dtype=float32)
    """
    check_not_negative(penalty=penalty)
    check_mask(ended, scores, name="ended")
    scores = widen(scores)
    match choose(MissingEOS, rule, "rule"):
        case MissingEOS.KEEP:
            return scores
        case MissingEOS.PENALIZE:
            return jnp.where(ended, scores, scores - penalty)
        case MissingEOS.REPLACE:
            return jnp.where(ended, scores, -penalty)


class ScaleState(PyTreeNode):
    """The running moments of all scores so far, which every checkpoint holds.

    Attributes:
      count: `[]` float32, the number of scores.
      mean: `[]` float32, their mean.
      m2: `[]` float32, the sum of their squared deviations from the mean.

    Example:
      >>> scaling = running_scale()
      >>> state, _ = scaling.update(scaling.init(), jnp.array([1.0, 3.0]))
      >>> state.count, state.mean, state.m2
      (Array(2., dtype=float32), Array(2., dtype=float32), Array(2., dtype=float32))
    """

    count: Array
    mean: Array
    m2: Array


class RewardScaling(NamedTuple):
    """A division of scores by their running standard deviation, as a pair of pure functions.

    Attributes:
      init: returns the first state.
      update: `(state, scores, *, axis_name=None) -> (state, scaled)`. The scores are `[B]` float32,
        and the moments are taken over the mapped axis as well.

    Example:
      >>> scaling = running_scale()
      >>> scaling.update(scaling.init(), jnp.array([-2.0, 2.0]))[1]
      Array([-1.,  1.], dtype=float32)
    """

    init: Callable[[], ScaleState]
    update: Callable[..., tuple[ScaleState, Array]]


def running_scale(*, eps: float = 1e-8) -> RewardScaling:
    """Divide scores by their running standard deviation, without shifting their mean.

        scaled = score / √(var + eps),  or 0 if all scores so far are equal up to rounding

    Each batch is added to the moments before it is scaled. Scores that are infinite or NaN are not
    added, nor is a batch whose scores are so large that the moments would overflow.

    Args:
      eps: added to the variance; not negative.

    Returns:
      A pair of functions. `update` takes scores `[B]` float32 and returns the new state and the
      scaled scores, `[B]` float32. It raises AssertionError for scores of another rank.

    Raises:
      ValueError: if `eps` is negative.

    Source:
      Chan et al. 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".

    Example:
      >>> scaling = running_scale()
      >>> state, scaled = scaling.update(scaling.init(), jnp.array([-2.0, 2.0]))
      >>> scaled
      Array([-1.,  1.], dtype=float32)
    """
    check_not_negative(eps=eps)

    def update(
        state: ScaleState, scores: Array, *, axis_name: AxisName | None = None
    ) -> tuple[ScaleState, Array]:
        chex.assert_rank(scores, 1)
        scores = widen(scores)
        finite = jnp.isfinite(scores)
        n = masked_sum(jnp.ones_like(scores), finite, axis_name=axis_name)
        mean = masked_mean(scores, finite, axis_name=axis_name)
        m2 = masked_sum((scores - share(mean, axis_name)) ** 2, finite, axis_name=axis_name)
        count = state.count + n
        shift = mean - state.mean
        part = n / jnp.maximum(count, 1)
        new = ScaleState(
            count, state.mean + shift * part, state.m2 + m2 + shift**2 * state.count * part
        )
        fits = jnp.isfinite(new.m2)
        new = jax.tree.map(lambda new, old: jnp.where(fits, new, old), new, state)
        var = new.m2 / jnp.maximum(new.count, 1)
        # Equal scores have no scale. Below this variance there is only the rounding of the mean.
        scale = jnp.where(var > 1e-10 * new.mean**2, jax.lax.rsqrt(var + eps), 0)
        return new, scores * share(scale, axis_name)

    return RewardScaling(lambda: ScaleState(*(jnp.float32(0) for _ in range(3))), update)


def token_rewards(
    scores: Array,
    kl: Array,
    mask: Array,
    *,
    kl_coef: float | Array,
    score_at: ScoreAt | str = ScoreAt.LAST_TOKEN,
    token_scores: Array | None = None,
) -> tuple[Array, Array]:
    """Compute the reward of each token from the score of the response and the KL penalty.

        r_t = -β kl_t + 1[t = t_score] · score + token_score_t

    Args:
      scores: `[B]` float, the score of each response.
      kl: `[B, R]` float32, a per-token estimate of the KL from the reference, in nats (see
        `ppo_jax.ops.kl`).
      mask: `[B, R]` bool, true for real tokens. The KL penalty and `token_scores` are ignored
        elsewhere.
      kl_coef: β, at least 0, a number or `[]` float32.
      score_at: which step `t_score` receives the score, or its name.
      token_scores: `[B, R]` float, a score of each token in addition to that of the response.

    Returns:
      The rewards, `[B, R]` float32 in units of score, and the steps over which advantages are
      estimated, `[B, R]` bool: the real tokens and the step of the score. A response without a real
      token has neither a reward nor a step.

    Raises:
      AssertionError: if the shapes are not those above, or `mask` is not bool.
      ValueError: if `kl_coef` is a negative number, or there is no such step.

    Source:
      Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), eq. 2.

    Example:
      >>> mask = jnp.array([[True, True, False]])
      >>> rewards, steps = token_rewards(
      ...     jnp.array([1.0]), jnp.full((1, 3), 0.5), mask, kl_coef=0.1
      ... )
      >>> rewards
      Array([[-0.05,  0.95,  0.  ]], dtype=float32)
    """
    check_not_negative(kl_coef=kl_coef)
    chex.assert_rank([scores, kl, mask], [1, 2, 2])
    check_mask(mask, kl)
    rewards = jnp.where(mask, -kl_coef * widen(kl), 0)
    if token_scores is not None:
        chex.assert_equal_shape([token_scores, mask])
        rewards = rewards + jnp.where(mask, widen(token_scores), 0)
    at_score = jnp.arange(mask.shape[1])[None, :] == score_index(mask, score_at)[:, None]
    scored = at_score & mask.any(axis=1, keepdims=True)
    rewards = rewards + jnp.where(scored, widen(scores)[:, None], 0)
    return rewards, mask | scored
