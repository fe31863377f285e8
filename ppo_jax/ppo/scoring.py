"""Teacher-forced log-probs, entropies and values of responses; and the experience that one update learns from."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ppo_jax.ops import kl as kl_
from ppo_jax.ops.advantages import generalized_advantage_estimation
from ppo_jax.ops.logprobs import chunked_logprobs_and_entropy
from ppo_jax.ops.masked import masked_whiten
from ppo_jax.ops.rewards import ScoreAt, token_rewards
from ppo_jax.types import CriticFn, Experience, LanguageModel, Params, Rollout, Scores


class Forward(NamedTuple):
    """`logprobs`, `values` and `entropies` of each response token, `[B, R]` float32; the states' `hidden`, `[B, R, D]`."""

    logprobs: jax.Array
    values: jax.Array
    entropies: jax.Array
    hidden: jax.Array


def forward_responses(
    model: LanguageModel,
    critic: CriticFn,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    prompt_length: int,
    *,
    temperature: float,
    chunk: int | None = None,
) -> Forward:
    """One forward pass over `[prompt | response]`: what the policy and the critic say of each response token.

    Both the acting and the learning side call this function, at the same micro-batch shape, so a policy's ratio to itself is 1.

    Args:
      model, critic: functions of the policy and of the critic.
      params: `{"policy": ..., "critic": ...}`.
      tokens: `[B, T]` int32.
      mask: `[B, T]` bool.
      prompt_length: `P`.
      temperature: that of sampling.
      chunk: positions whose logits exist at a time (see `logprobs.chunked_logprobs_and_entropy`).

    Returns:
      A `Forward`.
    """
    inputs, input_mask = tokens[:, :-1], mask[:, :-1]
    # The states before the response's tokens: the last of all positions but the very last (see `logprobs.response_view`).
    hidden, _ = model.hidden(
        params["policy"], inputs, input_mask, last=tokens.shape[1] - prompt_length
    )
    values = critic(params["critic"], hidden, inputs, input_mask)
    chex.assert_shape(values, hidden.shape[:2])
    logprobs, entropies = chunked_logprobs_and_entropy(
        lambda h: model.logits(params["policy"], h),
        hidden,
        tokens[:, prompt_length:],
        temperature=temperature,
        chunk=chunk,
    )
    return Forward(logprobs, values, entropies, hidden)


def split_rows(tree, parts: int):
    """`[B, ...]` arrays to `[parts, B / parts, ...]`; part `i` takes rows `i, i + parts, ...`.

    The stride keeps each part spread over the devices that hold the batch in contiguous blocks.
    """
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), tree
    )


def join_rows(tree):
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def score_rollout(
    model: LanguageModel,
    critic: CriticFn,
    params: Params,
    ref_params: Params,
    rollout: Rollout,
    *,
    temperature: float,
    kl_estimator: Callable[[jax.Array, jax.Array], jax.Array] = kl_.kl_k1,
    micro_batch: int | None = None,
    chunk: int | None = None,
    ref_model: LanguageModel | None = None,
) -> Scores:
    """Log-probs under policy and reference, values, entropies and KL of a rollout, a micro-batch at a time.

    Args:
      model, critic: functions of the policy and of the critic.
      params: `{"policy": ..., "critic": ...}`.
      ref_params: the reference policy's, of the shape of `params["policy"]` (or what `ref_model` takes).
      rollout: `B` sampled responses.
      temperature: that of sampling, for policy and reference alike.
      kl_estimator: one of `ppo_jax.ops.kl`; `kl_full` reads the logits of both.
      micro_batch: rows at a time, dividing `B`; that of the update, or log-probs round differently. `None` takes all.
      chunk: positions whose logits exist at a time; ignored by `kl_full`.
      ref_model: functions of the reference, if they are not the policy's.

    Returns:
      The scores.
    """
    B, P = rollout.tokens.shape[0], rollout.prompt_length
    ref_model = model if ref_model is None else ref_model
    no_critic: CriticFn = lambda params, hidden, tokens, mask: jnp.zeros(
        hidden.shape[:2], jnp.float32
    )

    def score(rows) -> Scores:
        tokens, mask, real = rows
        out = forward_responses(
            model, critic, params, tokens, mask, P, temperature=temperature, chunk=chunk
        )
        ref = forward_responses(
            ref_model,
            no_critic,
            {"policy": ref_params, "critic": None},
            tokens,
            mask,
            P,
            temperature=temperature,
            chunk=chunk,
        )
        if kl_estimator is kl_.kl_full:
            logits, ref_logits = (
                model.logits(params["policy"], out.hidden),
                ref_model.logits(ref_params, ref.hidden),
            )
            kl = kl_.kl_full(logits, ref_logits, temperature=temperature)
        else:
            kl = kl_estimator(out.logprobs, ref.logprobs)
        logprobs, ref_logprobs, kl, entropies = (
            jnp.where(real, x, 0) for x in (out.logprobs, ref.logprobs, kl, out.entropies)
        )
        return Scores(logprobs, ref_logprobs, kl, entropies, out.values)

    rows = (rollout.tokens, rollout.mask, rollout.response_mask)
    if micro_batch is None or micro_batch >= B:  # a device's share of the rows may be smaller
        return score(rows)
    return join_rows(jax.lax.map(score, split_rows(rows, B // micro_batch)))


def make_experience(
    rollout: Rollout,
    scores: Scores,
    task_scores: jax.Array,
    *,
    kl_coef: float | jax.Array,
    gamma: float,
    lam: float,
    score_at: ScoreAt = ScoreAt.LAST_TOKEN,
    token_scores: jax.Array | None = None,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    unbiased: bool = False,
    axis_name: str | None = None,
) -> tuple[Experience, jax.Array]:
    """Rewards, advantages and returns of a scored rollout.

    Args:
      rollout: `B` sampled responses.
      scores: what the models say of them.
      task_scores: `[B]` float32, the task's score of each response.
      kl_coef, score_at, token_scores: see `rewards.token_rewards`.
      gamma, lam: see `advantages.generalized_advantage_estimation`.
      whiten_rewards: scale the token rewards to variance 1, keeping their mean.
      whiten_advantages: scale and shift the advantages to variance 1, mean 0; the returns are made before.
      unbiased: which variance whitens.
      axis_name: mapped axis over which the rows are spread; the moments are global.

    Returns:
      The experience, and the token rewards, `[B, R]` float32.
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
    advantages, returns = generalized_advantage_estimation(
        rewards, values, steps, gamma=gamma, lam=lam
    )
    if whiten_advantages:
        advantages = masked_whiten(advantages, mask, unbiased=unbiased, axis_name=axis_name)
    experience = Experience(
        tokens=rollout.tokens,
        mask=rollout.mask,
        response_mask=mask,
        value_mask=steps,
        logprobs=scores.logprobs,
        values=values,
        advantages=jnp.where(mask, advantages, 0),
        returns=jnp.where(steps, returns, 0),
    )
    return experience, rewards
