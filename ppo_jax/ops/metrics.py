"""The metrics of an update, as dictionaries of `[]` float32.

docs/presets_and_metrics.md says what each name means.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.clips import Clip, ClipFn
from ppo_jax.ops.kl import kl_k1
from ppo_jax.ops.masked import masked_count, masked_mean, masked_sum, masked_var, widen
from ppo_jax.ops.ratios import hide_masked, log_ratio, policy_ratio
from ppo_jax.types import AxisName, Experience, LossMetrics, Metrics, Rollout, Scores


def add_parts(a: LossMetrics, b: LossMetrics) -> LossMetrics:
    """Combine the metrics of two micro-batches of one minibatch.

    Example:
      >>> part = LossMetrics({"loss/total": jnp.float32(1)}, {"policy/ratio_max": jnp.float32(2)})
      >>> add_parts(part, part).mean
      {'loss/total': Array(2., dtype=float32)}
    """
    return LossMetrics(
        jax.tree.map(jnp.add, a.mean, b.mean), jax.tree.map(jnp.maximum, a.max, b.max)
    )


def policy_metrics(
    logprobs: Array,
    old_logprobs: Array,
    mask: Array,
    *,
    clip: ClipFn | None = None,
    advantages: Array | None = None,
    count: Array | None = None,
) -> LossMetrics:
    """Measure how far the policy has moved from the one that sampled the tokens.

    The tokens were sampled from π_old, so the estimates are of KL(π_old ‖ π). With the ratio ρ of
    `policy_ratio` they are:

        k1 = -log ρ
        k3 = ρ - 1 - log ρ

    Args:
      logprobs: `[B, R]` float32, of the policy that trains, in nats.
      old_logprobs: `[B, R]` float32, of the policy that sampled the tokens, in nats.
      mask: `[B, R]` bool, true for the tokens in the policy loss.
      clip: says what the clip of the loss does to tokens, such as `functools.partial(ratio_clip,
        clip_low=0.2, clip_high=0.2)`. `None` for a loss that clips nothing.
      advantages: `[B, R]` float32, for the shares of tokens that the clip takes the gradient from.
      count: `[]` float32, the number of tokens in the whole minibatch if this is a micro-batch.

    Returns:
      The means `policy/approx_kl` (k3), `policy/approx_kl_k1` and `policy/ratio`, and the maxima
      `policy/ratio_max` and `policy/ratio_error_max` (of `|ρ - 1|`), `[]` float32 each. With `clip`
      also the means `policy/clipfrac`, `policy/clipfrac_low` and `policy/clipfrac_high`, the shares
      of tokens outside, below and above the range of the loss. With `advantages` as well, for a
      loss that drops tokens, the means `policy/clipfrac_positive` and `policy/clipfrac_negative`,
      the shares of tokens that lose their gradient, by the sign of their advantage, and with a dual
      clip the mean `policy/clipfrac_dual`.

    Raises:
      AssertionError: if the shapes differ.

    Source:
      Schulman 2020 (http://joschu.net/blog/kl-approx.html), k1 and k3.

    Example:
      >>> x, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
      >>> from ppo_jax import ratio_clip
      >>> clip = partial(ratio_clip, clip_low=0.2, clip_high=0.2)
      >>> metrics = policy_metrics(x + 0.5, x, mask, clip=clip)
      >>> metrics.mean["policy/clipfrac"]
      Array(1., dtype=float32)
    """
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    moved = log_ratio(logprobs, old_logprobs, mask)
    means = {
        "policy/approx_kl": jnp.expm1(moved) - moved,
        "policy/approx_kl_k1": -moved,
        "policy/ratio": ratio,
    }
    if clip is not None:
        means |= _clipped(clip(logprobs, old_logprobs, mask), advantages, mask)
    return LossMetrics(
        {name: masked_mean(x, mask, count=count) for name, x in means.items()},
        {
            "policy/ratio_max": jnp.max(ratio),
            "policy/ratio_error_max": jnp.max(jnp.abs(ratio - 1)),
        },
    )


def _clipped(clip: Clip, advantages: Array | None, mask: Array) -> Metrics:
    """Return which tokens are out of range and lose their gradient, `[B, R]` float32 by name."""
    found: dict[str, Array | None] = {
        "": clip.low | clip.high,
        "_low": clip.low,
        "_high": clip.high,
    }
    if advantages is not None:
        (advantages,) = hide_masked(mask, advantages)
        signs = (advantages > 0, advantages < 0, advantages < 0)
        dropped = (clip.positive, clip.negative, clip.dual)
        for name, sign, x in zip(("_positive", "_negative", "_dual"), signs, dropped, strict=True):
            found[name] = None if x is None else sign & x
    return {
        f"policy/clipfrac{name}": x.astype(jnp.float32)
        for name, x in found.items()
        if x is not None
    }


def importance_metrics(
    weights: Array, mask: Array, *, axis_name: AxisName | None = None
) -> Metrics:
    """Describe the weights of tokens that another policy has sampled.

        effective sample size = (Σ w)² / (n Σ w²)

    Args:
      weights: `[B, R]` float32, as they multiply the advantages.
      mask: `[B, R]` bool, true for the tokens that count; `n` is their number.
      axis_name: the mapped axis over which means and maxima are taken as well.

    Returns:
      The metrics `importance/mean`, `importance/max` and `importance/effective_sample_size` (a
      share of the tokens; 0 if all weights are 0), `[]` float32 each.

    Raises:
      AssertionError: if the shapes differ, or `mask` is not bool.

    Example:
      >>> metrics = importance_metrics(jnp.array([[2.0, 0.0]]), jnp.ones((1, 2), bool))
      >>> metrics["importance/effective_sample_size"]
      Array(0.5, dtype=float32)
    """
    mean = masked_mean(weights, mask, axis_name=axis_name)
    square = masked_mean(weights**2, mask, axis_name=axis_name)
    largest = jnp.max(jnp.where(mask, weights, 0))
    return {
        "importance/mean": mean,
        "importance/max": largest if axis_name is None else jax.lax.pmax(largest, axis_name),
        "importance/effective_sample_size": mean**2 / jnp.where(square > 0, square, 1),
    }


def explained_variance(
    values: Array, returns: Array, mask: Array, *, axis_name: AxisName | None = None
) -> Array:
    """Compute the share of the variance of the returns that the values explain.

        1 - Var[G - V] / Var[G]

    It is 1 if the critic predicts the returns up to a constant, and 0 if it predicts a constant.

    Args:
      values: `[B, R]` float32, V, in units of reward.
      returns: `[B, R]` float32, G, in units of reward.
      mask: `[B, R]` bool, true for the steps that count.
      axis_name: the mapped axis over which the variances are taken as well.

    Returns:
      `[]` float32; 0 if the returns do not vary.

    Raises:
      AssertionError: if the shapes differ.

    Source:
      `explained_variance` of OpenAI Baselines.

    Example:
      >>> returns, mask = jnp.array([[1.0, 3.0]]), jnp.ones((1, 2), bool)
      >>> explained_variance(returns - 5, returns, mask)
      Array(1., dtype=float32)
    """
    residual = masked_var(widen(returns) - widen(values), mask, axis_name=axis_name)
    return explained_share(residual, returns, mask, axis_name=axis_name)


def explained_share(
    residual: Array, returns: Array, mask: Array, *, axis_name: AxisName | None = None
) -> Array:
    """Compute `explained_variance` from the variance `[]` that is left, `Var[G - V]`."""
    returns = widen(returns)
    var = masked_var(returns, mask, axis_name=axis_name)
    # A variance below the rounding error counts as 0.
    varies = var > 1e-10 * masked_mean(returns * returns, mask, axis_name=axis_name)
    return jnp.where(varies, 1 - residual / jnp.where(varies, var, 1), 0)


def value_errors(values: Array, returns: Array, mask: Array, *, count: Array | None) -> Metrics:
    """Return the mean and the mean square of `G - V`, from which its variance follows."""
    returns, values = hide_masked(mask, returns, values)
    error = returns - values
    return {
        "value/error": masked_mean(error, mask, count=count),
        "value/squared_error": masked_mean(error**2, mask, count=count),
    }


def experience_metrics(
    rollout: Rollout,
    scores: Scores,
    experience: Experience,
    rewards: Array,
    task_scores: Array,
    *,
    axis_name: AxisName | None = None,
) -> Metrics:
    """Describe a batch of responses before the update that learns from it.

    Args:
      rollout: the `B` responses.
      scores: what policy, reference and critic compute for them.
      experience: what the update learns from.
      rewards: `[B, R]` float32, the reward of each step.
      task_scores: `[B]` float32, the scores of the task before clipping and scaling.
      axis_name: the mapped axis over which means and maxima are taken as well.

    Returns:
      The metrics `objective/*`, `response/*`, `value/*` and `sampler/*`, `[]` float32 each.
    """
    mask, value_mask = rollout.response_mask, experience.value_mask
    every_row = mask.any(axis=1)  # A row without a token to learn from is in no mean.
    mean = partial(masked_mean, axis_name=axis_name)

    def mean_of_sums(x: Array) -> Array:
        """Average over responses the sum over the tokens of each response."""
        return mean(jnp.sum(jnp.where(mask, x, 0), axis=1), every_row)

    kl = kl_k1(scores.logprobs, scores.ref_logprobs)
    gap = jnp.abs(kl_k1(scores.logprobs, rollout.logprobs))
    largest_gap = jax.lax.stop_gradient(jnp.max(jnp.where(mask, gap, 0)))
    score_var = masked_var(task_scores, every_row, axis_name=axis_name)
    total_reward = masked_sum(rewards, value_mask, axis_name=axis_name)
    return {
        "objective/scores": mean(task_scores, every_row),
        "objective/scores_std": jnp.sqrt(score_var),
        "objective/kl": mean_of_sums(kl),
        "objective/kl_per_token": mean(kl, mask),
        "objective/penalty": mean_of_sums(scores.kl),
        "objective/entropy": mean(scores.entropies, mask),
        "objective/rlhf_reward": total_reward / masked_count(every_row, axis_name=axis_name),
        "response/length_mean": mean(mask.sum(axis=1).astype(jnp.float32), every_row),
        "response/scored": mean(every_row.astype(jnp.float32), jnp.ones_like(every_row)),
        "response/ended": mean(rollout.ended.astype(jnp.float32), every_row),
        "value/mean": mean(experience.values, value_mask),
        "value/returns": mean(experience.returns, value_mask),
        "value/explained_variance": explained_variance(
            experience.values, experience.returns, value_mask, axis_name=axis_name
        ),
        "sampler/logprob_gap_mean": mean(gap, mask),
        "sampler/logprob_gap_max": largest_gap
        if axis_name is None
        else jax.lax.pmax(largest_gap, axis_name),
    }
