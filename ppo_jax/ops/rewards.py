"""From a response's score to the reward of each token: missing EOS, clipping, scaling, where the score goes, the KL penalty."""

import enum
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ppo_jax.ops.masked import masked_mean, masked_sum


class ScoreAt(enum.Enum):
    """The step whose reward holds the score of a response."""

    LAST_TOKEN = "last_token"  # the last real token
    AFTER_LAST_TOKEN = (
        "after_last_token"  # the index after it, or the last one where the response fills R
    )
    LAST_INDEX = "last_index"  # R - 1, padding or not


class MissingEOS(enum.Enum):
    """What becomes of the score of a response that was cut off before an end."""

    KEEP = "keep"
    PENALIZE = "penalize"  # score - penalty
    REPLACE = "replace"  # -penalty


def score_index(mask: jax.Array, score_at: ScoreAt) -> jax.Array:
    """The index `t` of the step that receives the score: `[B]` int32.

    Args:
      mask: `[B, R]` bool, real tokens.
      score_at: the rule.

    Example:
      >>> mask = jnp.array([[True, True, False, False]])
      >>> [int(score_index(mask, at)[0]) for at in ScoreAt]
      [1, 2, 3]
    """
    chex.assert_rank(mask, 2)
    length = mask.shape[1]
    after = jnp.where(mask.any(axis=1), length - jnp.argmax(mask[:, ::-1], axis=1), 0)
    match score_at:
        case ScoreAt.LAST_TOKEN:
            return jnp.maximum(after - 1, 0)
        case ScoreAt.AFTER_LAST_TOKEN:
            return jnp.minimum(after, length - 1)
        case ScoreAt.LAST_INDEX:
            return jnp.full_like(after, length - 1)


def apply_missing_eos(
    scores: jax.Array, ended: jax.Array, *, rule: MissingEOS, penalty: float = 1.0
) -> jax.Array:
    """Changes the scores of responses that never ended.

    Args:
      scores: `[B]` float32.
      ended: `[B]` bool, whether the response holds a stop token.
      rule: keep, subtract `penalty`, or put `-penalty` in the score's place.
      penalty: at least 0, in units of score.

    Returns:
      `[B]` float32.

    Source:
      Ziegler et al. 2019 replace (https://arxiv.org/abs/1909.08593), as do the N+ details
      (https://arxiv.org/abs/2403.17031); TRL's `missing_eos_penalty` subtracts.

    Example:
      >>> apply_missing_eos(jnp.array([2.0, 2.0]), jnp.array([True, False]), rule=MissingEOS.PENALIZE)
      Array([2., 1.], dtype=float32)
    """
    chex.assert_equal_shape([scores, ended])
    match rule:
        case MissingEOS.KEEP:
            return scores
        case MissingEOS.PENALIZE:
            return jnp.where(ended, scores, scores - penalty)
        case MissingEOS.REPLACE:
            return jnp.where(ended, scores, -penalty)


class ScaleState(NamedTuple):
    """Running moments of all scores seen; part of every checkpoint."""

    count: jax.Array  # [] float32
    mean: jax.Array  # [] float32
    m2: jax.Array  # [] float32, sum of squared deviations


class RewardScaling(NamedTuple):
    """Division of the scores by their running standard deviation, as a pair of pure functions."""

    init: Callable[[], ScaleState]
    update: Callable[..., tuple[ScaleState, jax.Array]]


def running_scale(*, eps: float = 1e-8) -> RewardScaling:
    """Scales scores to a standard deviation near 1 without moving their sign.

    The moments are merged batch by batch (Chan et al. 1979); the first batch is already scaled by its own.

    Args:
      eps: added to the variance.

    Returns:
      A pair; `update(state, scores: [B], *, axis_name=None) -> (state, scaled: [B])`, whose moments are global over that axis.

    Example:
      >>> scaling = running_scale()
      >>> state, scaled = scaling.update(scaling.init(), jnp.array([-2.0, 2.0]))
      >>> scaled
      Array([-1.,  1.], dtype=float32)
    """

    def update(
        state: ScaleState, scores: jax.Array, *, axis_name: str | None = None
    ) -> tuple[ScaleState, jax.Array]:
        chex.assert_rank(scores, 1)
        real = jnp.isfinite(scores)
        n = masked_sum(jnp.ones_like(scores), real, axis_name=axis_name)
        mean = masked_mean(scores, real, axis_name=axis_name)
        m2 = masked_sum((scores - mean) ** 2, real, axis_name=axis_name)
        count = state.count + n
        shift = mean - state.mean
        share = n / jnp.maximum(count, 1)
        state = ScaleState(
            count, state.mean + shift * share, state.m2 + m2 + shift**2 * state.count * share
        )
        var = state.m2 / jnp.maximum(count, 1)
        # Scores that do not differ yet have no scale.
        return state, scores * jnp.where(var > eps, jax.lax.rsqrt(var + eps), 1)

    return RewardScaling(init=lambda: ScaleState(*(jnp.zeros(()) for _ in range(3))), update=update)


def token_rewards(
    scores: jax.Array,
    kl: jax.Array,
    mask: jax.Array,
    *,
    kl_coef: float | jax.Array,
    score_at: ScoreAt = ScoreAt.LAST_TOKEN,
    token_scores: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`r_t = -β kl_t + 1[t = t_score] · score + token_score_t`.

    Args:
      scores: `[B]` float, of each response.
      kl: `[B, R]` float32, a per-token estimate of the KL from the reference, nats (see `ppo_jax.ops.kl`).
      mask: `[B, R]` bool, real tokens; the penalty and `token_scores` count only there.
      kl_coef: β, at least 0; a number or `[]`.
      score_at: which step receives the score.
      token_scores: `[B, R]` float of each token, beside the score of the whole; `None` for none.

    Returns:
      `rewards`, `[B, R]` float32, and `reward_mask`, `[B, R]` bool: the real tokens and the step of the score, the steps
      over which advantages are estimated.

    Source:
      Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), eq. 2.

    Example:
      >>> rewards, steps = token_rewards(jnp.array([1.0]), jnp.full((1, 3), 0.5), jnp.array([[True, True, False]]),
      ...     kl_coef=0.1)
      >>> rewards
      Array([[-0.05,  0.95,  0.  ]], dtype=float32)
    """
    chex.assert_rank([scores, kl, mask], [1, 2, 2])
    chex.assert_equal_shape([kl, mask])
    rewards = jnp.where(mask, -kl_coef * kl, 0)
    if token_scores is not None:
        chex.assert_equal_shape([token_scores, mask])
        rewards = rewards + jnp.where(mask, token_scores, 0)
    here = jnp.arange(mask.shape[1])[None, :] == score_index(mask, score_at)[:, None]
    rewards = rewards + jnp.where(here, scores[:, None].astype(jnp.float32), 0)
    return rewards, mask | here
