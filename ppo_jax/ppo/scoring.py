"""Scoring of a rollout, and the experience that an update learns from."""

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.kl import kl_k1, reads_logits
from ppo_jax.ops.masked import masked_whiten
from ppo_jax.ops.rewards import ScoreAt, token_rewards
from ppo_jax.ppo.batching import map_chosen, map_rows
from ppo_jax.ppo.critic import no_critic
from ppo_jax.ppo.forward import Forward, forward_fn
from ppo_jax.ppo.packing import Bins, sum_bins
from ppo_jax.sharding import map_over_data
from ppo_jax.types import (
    AdvantageFn,
    AxisName,
    CriticFn,
    Experience,
    KLEstimatorFn,
    LanguageModel,
    Params,
    Rollout,
    Scores,
)


def score_rollout(
    model: LanguageModel,
    critic: CriticFn,
    params: Params,
    ref_params: Params,
    rollout: Rollout,
    *,
    temperature: float,
    kl_estimator: KLEstimatorFn = kl_k1,
    micro_batch: int | None = None,
    chunk: int | None = None,
    ref_model: LanguageModel | None = None,
    bins: Bins | None = None,
) -> Scores:
    """Compute log-probs under policy and reference, values, entropies and KL of a rollout.

    Args:
      model: functions of the policy.
      critic: function of the critic.
      params: `{"policy": ..., "critic": ...}`.
      ref_params: parameters of the reference policy.
      rollout: `B` sampled responses.
      temperature: sampling temperature, applied to policy and reference; positive.
      kl_estimator: per-token estimate of the KL from the reference, such as those of
        `ppo_jax.ops.kl`. It gets the log-probs `[b, R]` of both models, or, if `kl.reads_logits`
        says so, their logits `[b, R, V]` and the keyword `temperature`; and it returns `[b, R]`.
      micro_batch: number of rows at a time; it must divide `B`. Use that of the update, or
        log-probs round differently. `None` for all.
      chunk: number of response positions whose logits are in memory at a time; `None` for all. An
        estimator that reads logits gets those of all positions nevertheless.
      ref_model: functions of the reference policy, if they are not those of the policy.
      bins: the shape of the bins that rows are packed into, the same as in the update; `None` for
        no packing. `micro_batch` has then no effect, and an estimator that reads logits gets
        `[1, n, V]`, those of `n` response tokens of any rows.

    Returns:
      The scores, `[B, R]` float32 each; all but the values are 0 outside the response mask.

    Raises:
      AssertionError: if `critic` or `kl_estimator` returns an array of a wrong shape.

    Example:
      >>> import jax
      >>> from ppo_jax import *
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> policy = init_params(config, jax.random.key(0))
      >>> params = {"policy": policy, "critic": {"head": zero_head(4)}}
      >>> prompts, model = jnp.array([[3, 1], [2, 5]]), language_model(config)
      >>> rollout = generate(model, policy, jax.random.key(1), prompts, prompts > 0,
      ...     max_new_tokens=3)
      >>> scores = score_rollout(model, shared_critic(), params, policy, rollout,
      ...     temperature=1.0, kl_estimator=kl_k3)
      >>> scores.kl  # a policy does not differ from itself
      Array([[0., 0., 0.],
             [0., 0., 0.]], dtype=float32)
    """
    ref_model = model if ref_model is None else ref_model

    def estimate_kl(out: Forward, ref: Forward, real: Array) -> Array:
        if not reads_logits(kl_estimator):
            return kl_estimator(out.logprobs, ref.logprobs)

        def of_hidden(hidden: Array, ref_hidden: Array) -> Array:
            logits = model.logits(params["policy"], hidden)
            ref_logits = ref_model.logits(ref_params, ref_hidden)
            return kl_estimator(logits, ref_logits, temperature=temperature)

        if bins is None:
            return of_hidden(out.hidden, ref.hidden)
        flat = (x.reshape(-1, x.shape[-1]) for x in (out.hidden, ref.hidden))
        one_row = lambda h, r: of_hidden(h[None], r[None])[0]
        size = bins.number * bins.length // 4
        return map_chosen(one_row, real.reshape(-1), *flat, size=size).reshape(real.shape)

    def score(rows: tuple[Array, Array, Array]) -> Scores:
        tokens, mask, real = rows
        forward = partial(
            forward_fn(bins),
            tokens=tokens,
            mask=mask,
            prompt_length=rollout.prompt_length,
            temperature=temperature,
            chunk=chunk,
        )
        out = forward(model, critic, params)
        ref = forward(ref_model, no_critic, {"policy": ref_params, "critic": None})
        kl = estimate_kl(out, ref, real)
        chex.assert_shape(kl, real.shape)
        logprobs, ref_logprobs, kl, entropies = (
            jnp.where(real, x, 0) for x in (out.logprobs, ref.logprobs, kl, out.entropies)
        )
        return Scores(logprobs, ref_logprobs, kl, entropies, out.values)

    rows = rollout.tokens, rollout.mask, rollout.response_mask
    if bins is None:
        return map_rows(score, rows, micro_batch)
    packed = partial(_score_bins, score, bins)
    return map_over_data(packed, None, rows, parts=None, split_result=True)


def _score_bins(
    score: Callable[[tuple[Array, Array, Array]], Scores],
    bins: Bins,
    _: None,
    rows: tuple[Array, Array, Array],
    axis_name: AxisName | None,
) -> Scores:
    """Score the rows of some bins at a time."""
    tokens, mask, real = rows

    def score_chosen(chosen: Array) -> Scores:
        chosen = chosen[:, None]
        scores = score((tokens, mask & chosen, real & chosen))
        return jax.tree.map(lambda x: jnp.where(chosen, x, 0), scores)

    return sum_bins(score_chosen, mask[:, :-1], bins, axis_name=axis_name)


def make_experience(
    rollout: Rollout,
    scores: Scores,
    task_scores: Array,
    *,
    kl_coef: float | Array,
    advantage_fn: AdvantageFn,
    score_at: ScoreAt | str = ScoreAt.LAST_TOKEN,
    token_scores: Array | None = None,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    unbiased: bool = False,
    weights: Array | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Experience, Array]:
    """Compute rewards, advantages and return of a scored rollout.

    Args:
      rollout: `B` sampled responses.
      scores: their log-probs, values and KL, from `score_rollout`.
      task_scores: `[B]` float32, the task's score of each response.
      kl_coef: weight of the KL penalty; a number or `[]` float32.
      advantage_fn: estimator, such as `estimators.gae(gamma=1.0, lam=0.95)`. Its mask holds
        the response tokens and the step of the score.
      score_at: the step whose reward includes the score, or its name.
      token_scores: `[B, R]` float32, scores of single tokens, added to the rewards; `None` for
        none.
      whiten_rewards: scale the rewards to variance 1 and keep their mean.
      whiten_advantages: scale and shift the advantages, but not the returns, to variance 1 and mean
        0.
      unbiased: divide by `n - 1` instead of `n` in the variances.
      weights: `[B, R]` float32, importance weights (see `ppo_jax.ops.importance`) that multiply the
        advantages at last; `None` for none.
      axis_name: mapped axis over which the rows are split; the moments of whitening are then
        global.

    Returns:
      The experience, and the rewards `[B, R]` float32.

    Raises:
      AssertionError: if shapes disagree, those that `advantage_fn` returns included.
      ValueError: if `kl_coef` is a negative number, or there is no such step.

    Example:
      >>> from ppo_jax.ppo.estimators import gae
      >>> tokens, x = jnp.array([[3, 1, 4]]), jnp.zeros((1, 2))
      >>> rollout = Rollout(tokens, tokens > 0, tokens[:, 1:] > 0, x, jnp.array([True]))
      >>> experience, rewards = make_experience(rollout, Scores(x, x, x, x, x), jnp.array([2.0]),
      ...     kl_coef=0.1, advantage_fn=gae(gamma=1.0, lam=0.5), whiten_advantages=False)
      >>> experience.advantages
      Array([[1., 2.]], dtype=float32)
    """
    mask = rollout.response_mask
    rewards, steps = token_rewards(
        task_scores, scores.kl, mask, kl_coef=kl_coef, score_at=score_at, token_scores=token_scores
    )
    if whiten_rewards:
        rewards = masked_whiten(
            rewards, steps, shift_mean=False, unbiased=unbiased, axis_name=axis_name
        )
    values = jnp.where(steps, scores.values, 0)
    advantages, returns = advantage_fn(rewards, values, steps, rollout=rollout, scores=scores)
    chex.assert_equal_shape([advantages, returns, mask])
    if whiten_advantages:
        advantages = masked_whiten(advantages, mask, unbiased=unbiased, axis_name=axis_name)
    if weights is not None:
        advantages = advantages * weights
    experience = Experience(
        tokens=rollout.tokens,
        mask=rollout.mask,
        response_mask=mask,
        value_mask=steps,
        logprobs=scores.logprobs,
        values=values,
        advantages=jnp.where(mask, advantages, 0),
        returns=jnp.where(steps, returns, 0),
        ref_logprobs=scores.ref_logprobs,
        sampler_logprobs=rollout.logprobs,
        groups=rollout.groups,
        scores=task_scores,
    )
    return experience, rewards
