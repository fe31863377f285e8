"""Sampling of responses: prefill and cached decode in one compiled program."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ppo_jax.ops import sampling
from ppo_jax.sharding import BATCH, constrain
from ppo_jax.types import KVCache, LanguageModel, Params, Rollout


class _Decoding(NamedTuple):
    """The state of the decode loop, after `t` tokens of the response."""

    t: jax.Array  # [] int32
    token: jax.Array  # [B] int32, the newest
    done: jax.Array  # [B] bool, ended at or before the newest
    tokens: jax.Array  # [B, R] int32
    mask: jax.Array  # [B, R] bool
    logprobs: jax.Array  # [B, R] float32
    cache: KVCache


def generate(
    model: LanguageModel,
    params: Params,
    key: jax.Array,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    row_ids: jax.Array | None = None,
    stop_at_end: bool = True,
    truncate_after: int = 0,
) -> Rollout:
    """Samples a response to each prompt. The loop ends early once every row has ended.

    Row `i` draws token `t` with `fold_in(fold_in(key, row_ids[i]), t)`, so its sample does not depend on the other rows, on
    how a batch is split, or on the number of devices.

    Args:
      model: functions of the policy.
      params: its parameters.
      key: `[]` typed key, consumed.
      prompts: `[B, P]` int32, left-padded.
      prompt_mask: `[B, P]` bool; every row holds a real token, and its last position is one.
      max_new_tokens: `R`.
      stop_ids: token ids that end a response and belong to it (EOS, end of turn, ...).
      pad_id: fills what follows an end; any id, it is never read.
      min_new_tokens: no stop id is drawn before this many tokens.
      temperature, top_k, top_p: see `sampling.process_logits`.
      greedy: take the likeliest token instead; `temperature` and filters then only shape `logprobs`.
      row_ids: `[B]` int32 global numbers of the rows, by default `0 .. B-1`.
      stop_at_end: if false, rows go on to `R` tokens after a stop id, and all of them are real (Ziegler et al. 2019 sample so
        and cut the text afterwards); `ended` still tells.
      truncate_after: stop ids among the first so many tokens of a response are words like others.

    Returns:
      The rollout; `logprobs` are of the distribution drawn from, after temperature and filters.

    Raises:
      ValueError: if `max_new_tokens` is not positive, `temperature` not positive, or `min_new_tokens` over the maximum.

    Example:
      >>> from ppo_jax import TransformerConfig, init_params, language_model
      >>> config = TransformerConfig(vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> model, params = language_model(config), init_params(config, jax.random.key(0))
      >>> prompts = jnp.array([[0, 3], [2, 5]])
      >>> generate(model, params, jax.random.key(1), prompts, jnp.array([[False, True], [True, True]]),
      ...     max_new_tokens=4).responses.shape
      (2, 4)
    """
    chex.assert_rank([prompts, prompt_mask], 2)
    chex.assert_equal_shape([prompts, prompt_mask])
    chex.assert_type([prompts, prompt_mask], [int, bool])
    if max_new_tokens < 1 or not 0 <= min_new_tokens <= max_new_tokens or temperature <= 0:
        raise ValueError(
            "generate needs max_new_tokens >= 1, 0 <= min_new_tokens <= max_new_tokens and temperature > 0, not "
            f"max_new_tokens={max_new_tokens}, min_new_tokens={min_new_tokens}, temperature={temperature}."
        )
    B, P = prompts.shape
    row_ids = jnp.arange(B) if row_ids is None else row_ids
    params = model.rounded(params)
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_ids)
    process = functools.partial(
        sampling.process_logits, temperature=temperature, top_k=top_k, top_p=top_p
    )
    draw = functools.partial(
        _draw, process=process, stop_ids=stop_ids, min_new_tokens=min_new_tokens, greedy=greedy
    )

    def advance(state: _Decoding, hidden: jax.Array) -> _Decoding:
        """Draws token `t` from the hidden states `[B, D]` that precede it."""
        token, logprob = draw(row_keys, model.logits(params, hidden), state.t)
        real = ~state.done
        return state._replace(
            t=state.t + 1,
            token=jnp.where(real, token, pad_id),
            done=state.done
            | (_is_stop(token, stop_ids) & (state.t >= truncate_after) if stop_at_end else False),
            tokens=state.tokens.at[:, state.t].set(jnp.where(real, token, pad_id)),
            mask=state.mask.at[:, state.t].set(real),
            logprobs=state.logprobs.at[:, state.t].set(jnp.where(real, logprob, 0)),
        )

    def unfinished(state: _Decoding) -> jax.Array:
        return (state.t < max_new_tokens) & ~jnp.all(state.done)

    def step(state: _Decoding) -> _Decoding:
        hidden, cache = model.hidden(
            params, state.token[:, None], ~state.done[:, None], state.cache
        )
        return advance(state._replace(cache=cache), hidden[:, 0])

    # The last token is never read, so the cache needs no slot for it.
    hidden, cache = model.hidden(
        params, prompts, prompt_mask, model.init_cache(B, P + max_new_tokens - 1), last=1
    )
    empty = _Decoding(
        t=jnp.int32(0),
        token=prompts[:, -1],
        done=jnp.zeros(B, bool),
        tokens=jnp.full((B, max_new_tokens), pad_id, jnp.int32),
        mask=jnp.zeros((B, max_new_tokens), bool),
        logprobs=jnp.zeros((B, max_new_tokens), jnp.float32),
        cache=cache,
    )
    final = jax.lax.while_loop(unfinished, step, advance(empty, hidden[:, -1]))
    return Rollout(
        tokens=jnp.concatenate([prompts, final.tokens], axis=1),
        mask=jnp.concatenate([prompt_mask, final.mask], axis=1),
        response_mask=final.mask,
        logprobs=final.logprobs,
        ended=jnp.any((_is_stop(final.tokens, stop_ids) & final.mask)[:, truncate_after:], axis=1),
    )


def _draw(
    row_keys: jax.Array,
    logits: jax.Array,
    t: jax.Array,
    *,
    process: Callable[[jax.Array], jax.Array],
    stop_ids: tuple[int, ...],
    min_new_tokens: int,
    greedy: bool,
) -> tuple[jax.Array, jax.Array]:
    """Token `t` of each row, `[B]` int32, and its log-prob, `[B]`, from `[B, V]` logits."""
    if min_new_tokens and stop_ids:
        if len(set(stop_ids)) >= logits.shape[-1]:
            raise ValueError(
                f"min_new_tokens={min_new_tokens} leaves nothing to draw: all {logits.shape[-1]} words are stop ids."
            )
        too_early = t < min_new_tokens
        stops = jnp.asarray(stop_ids)
        logits = logits.at[:, stops].set(jnp.where(too_early, -jnp.inf, logits[:, stops]))
    logits = constrain(process(logits), BATCH)
    if greedy:
        return jax.vmap(sampling.greedy_token)(logits)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, t)
    return jax.vmap(sampling.sample_token)(keys, logits)


def _is_stop(tokens: jax.Array, stop_ids: tuple[int, ...]) -> jax.Array:
    return (
        jnp.isin(tokens, jnp.asarray(stop_ids, jnp.int32))
        if stop_ids
        else jnp.zeros(tokens.shape, bool)
    )
