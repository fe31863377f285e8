"""What is measured: pure functions from arrays to dictionaries of `[]` float32. The README's table says what each name means."""

import jax
import jax.numpy as jnp

from ppo_jax.ops.losses import policy_ratio
from ppo_jax.ops.masked import masked_count, masked_mean, masked_sum, masked_var
from ppo_jax.types import Experience, LossMetrics, Metrics, Rollout, Scores


def add_parts(a: LossMetrics, b: LossMetrics) -> LossMetrics:
    """Joins the metrics of two micro-batches of one minibatch."""
    return LossMetrics(
        jax.tree.map(jnp.add, a.mean, b.mean), jax.tree.map(jnp.maximum, a.max, b.max)
    )


def policy_metrics(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    count: jax.Array | None = None,
) -> LossMetrics:
    """How far the policy has moved in this update.

    Args:
      logprobs, old_logprobs: `[B, R]` float32, of the policy now and of the one that acted.
      mask: `[B, R]` bool.
      clip_low, clip_high: the bounds of the loss; a token beyond either counts as clipped.
      count: `[]` tokens of the whole minibatch, if this is a part of it.

    Returns:
      Means `policy/clipfrac`, `policy/clipfrac_low`, `policy/clipfrac_high`, `policy/approx_kl` (k3), `policy/approx_kl_k1`,
      `policy/ratio`; maxima `policy/ratio_max`, `policy/ratio_error_max` (`|ρ - 1|`).

    Example:
      >>> x, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
      >>> policy_metrics(x + 0.5, x, mask, clip_low=0.2, clip_high=0.2).mean["policy/clipfrac"]
      Array(1., dtype=float32)
    """
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    moved = jnp.where(mask, logprobs - old_logprobs, 0)
    low, high = (
        (ratio < 1 - clip_low).astype(jnp.float32),
        (ratio > 1 + clip_high).astype(jnp.float32),
    )
    means = {
        "policy/clipfrac": low + high,
        "policy/clipfrac_low": low,
        "policy/clipfrac_high": high,
        "policy/approx_kl": jnp.expm1(moved) - moved,
        "policy/approx_kl_k1": -moved,
        "policy/ratio": ratio,
    }
    return LossMetrics(
        mean={name: masked_mean(x, mask, count=count) for name, x in means.items()},
        max={
            "policy/ratio_max": jnp.max(ratio),
            "policy/ratio_error_max": jnp.max(jnp.abs(ratio - 1)),
        },
    )


def explained_variance(
    values: jax.Array, returns: jax.Array, mask: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
    """`1 - Var[G - V] / Var[G]`: 1 where the critic knows the returns, 0 where it knows their mean only.

    Args:
      values, returns: `[B, R]` float32.
      mask: `[B, R]` bool.
      axis_name: mapped axis whose moments are global.

    Returns:
      `[]` float32; 0 where the returns do not vary.

    Example:
      >>> returns, mask = jnp.array([[1.0, 3.0]]), jnp.ones((1, 2), bool)
      >>> explained_variance(returns - 5, returns, mask)
      Array(1., dtype=float32)
    """
    var = masked_var(returns, mask, axis_name=axis_name)
    left = masked_var(returns - values, mask, axis_name=axis_name)
    varies = var > 1e-10 * masked_mean(
        returns * returns, mask, axis_name=axis_name
    )  # more than rounding does
    return jnp.where(varies, 1 - left / jnp.where(varies, var, 1), 0)


def experience_metrics(
    rollout: Rollout,
    scores: Scores,
    experience: Experience,
    rewards: jax.Array,
    task_scores: jax.Array,
    *,
    axis_name: str | None = None,
) -> Metrics:
    """What the batch is like, before anything is learned from it.

    Args:
      rollout, scores, experience: `B` responses.
      rewards: `[B, R]` float32, per token.
      task_scores: `[B]` float32, as the task gave them.
      axis_name: mapped axis over which everything is global.

    Returns:
      `objective/*`, `response/*`, `value/*` and `sampler/*`.
    """
    mask = rollout.response_mask

    def per_sequence(x):
        return masked_mean(jnp.sum(jnp.where(mask, x, 0), axis=1), every_row, axis_name=axis_name)

    def per_token(x):
        return masked_mean(x, mask, axis_name=axis_name)

    every_row = jnp.ones(mask.shape[0], bool)
    lengths = mask.sum(axis=1).astype(jnp.float32)
    rows = masked_count(every_row, axis_name=axis_name)
    sampler_gap = scores.logprobs - rollout.logprobs
    largest_gap = jnp.max(jnp.where(mask, jnp.abs(sampler_gap), 0))
    score_mean = masked_mean(task_scores, every_row, axis_name=axis_name)
    return {
        "objective/scores": score_mean,
        "objective/scores_std": jnp.sqrt(masked_var(task_scores, every_row, axis_name=axis_name)),
        "objective/kl": per_sequence(scores.logprobs - scores.ref_logprobs),
        "objective/kl_per_token": per_token(scores.logprobs - scores.ref_logprobs),
        "objective/penalty": per_sequence(scores.kl),
        "objective/entropy": per_token(scores.entropies),
        "objective/rlhf_reward": masked_sum(rewards, experience.value_mask, axis_name=axis_name)
        / rows,
        "response/length_mean": masked_mean(lengths, every_row, axis_name=axis_name),
        "response/ended": masked_mean(
            rollout.ended.astype(jnp.float32), every_row, axis_name=axis_name
        ),
        "value/mean": masked_mean(experience.values, experience.value_mask, axis_name=axis_name),
        "value/returns": masked_mean(
            experience.returns, experience.value_mask, axis_name=axis_name
        ),
        "value/explained_variance": explained_variance(
            experience.values, experience.returns, experience.value_mask, axis_name=axis_name
        ),
        "sampler/logprob_gap_mean": per_token(jnp.abs(sampler_gap)),
        "sampler/logprob_gap_max": largest_gap
        if axis_name is None
        else jax.lax.pmax(largest_gap, axis_name),
    }
