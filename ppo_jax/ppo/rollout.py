"""Sampling of responses: prefill and decoding with a key/value cache, in one compiled program."""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops import sampling
from ppo_jax.sharding import BATCH, constrain, constrain_params
from ppo_jax.sharding_rules import DECODING_RULES
from ppo_jax.types import KVCache, LanguageModel, Params, Rollout


class _Decoding(NamedTuple):
    """The state of the decode loop after `t` tokens of the response."""

    t: Array  # [] int32
    token: Array  # [B] int32, the newest token
    done: Array  # [B] bool, whether the response has ended
    tokens: Array  # [B, R] int32
    mask: Array  # [B, R] bool
    logprobs: Array  # [B, R] float32
    cache: KVCache | None


def generate(
    model: LanguageModel,
    params: Params,
    key: Array,
    prompts: Array,
    prompt_mask: Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    row_ids: Array | None = None,
    stop_at_end: bool = True,
    truncate_after: int = 0,
) -> Rollout:
    """Sample a response to each prompt.

    Row `i` draws token `t` with the key `fold_in(fold_in(key, row_ids[i]), t)`, so its sample does
    not depend on the other rows, on how a batch is split, or on the number of devices. The loop
    ends early once every row has ended.

    Args:
      model: functions of the policy.
      params: parameters of the policy.
      key: `[]` typed key, consumed.
      prompts: `[B, P]` int32, padded on the left.
      prompt_mask: `[B, P]` bool, real tokens; the last position of every row must be one.
      max_new_tokens: `R`, the largest length of a response.
      stop_ids: ids of the tokens that end a response and belong to it, such as EOS.
      pad_id: id that fills the positions after the end of a response. It may be any id.
      min_new_tokens: number of first tokens among which no stop id is sampled.
      temperature: divides the logits; positive.
      top_k: sample only among this many most likely tokens; `None` for all.
      top_p: sample only among the most likely tokens whose probabilities sum to this; `None` for
        all.
      greedy: take the most likely token instead of sampling. `temperature`, `top_k` and `top_p`
        then affect only `logprobs`.
      row_ids: `[B]` int32, numbers of the rows in the global batch; `0 .. B-1` by default.
      stop_at_end: if false, sampling goes on after a stop id to `R` tokens, all of them real.
        (Ziegler et al. 2019 sample so and truncate the text afterwards.)
      truncate_after: number of first tokens among which a stop id does not end the response.

    Returns:
      The rollout. Its `logprobs` are of the distribution that was sampled from, after temperature
      and filters.

    Raises:
      ValueError: if `max_new_tokens` or `temperature` is not positive, `min_new_tokens` is not in
        `0 .. max_new_tokens`, or `min_new_tokens` forbids the whole vocabulary.
      AssertionError: if `prompts` and `prompt_mask` differ in shape, or are not int and bool, or
        the model does not return hidden states `[B, 1, D]` for `last=1`.

    Example:
      >>> from ppo_jax import TransformerConfig, init_params, language_model
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> model, params = language_model(config), init_params(config, jax.random.key(0))
      >>> prompts = jnp.array([[0, 3], [2, 5]])
      >>> generate(model, params, jax.random.key(1), prompts, prompts > 0, max_new_tokens=4
      ...     ).responses.shape
      (2, 4)
    """
    chex.assert_rank([prompts, prompt_mask], 2)
    chex.assert_equal_shape([prompts, prompt_mask])
    chex.assert_type([prompts, prompt_mask], [int, bool])
    if max_new_tokens < 1 or not 0 <= min_new_tokens <= max_new_tokens or temperature <= 0:
        raise ValueError(
            "generate needs max_new_tokens >= 1, 0 <= min_new_tokens <= max_new_tokens and "
            f"temperature > 0, not max_new_tokens={max_new_tokens}, "
            f"min_new_tokens={min_new_tokens}, temperature={temperature}."
        )
    B, P = prompts.shape
    # The model never sees which id fills the padding.
    known = jnp.where(prompt_mask, prompts, 0)
    row_ids = jnp.arange(B) if row_ids is None else row_ids
    params = constrain_params(model.rounded(params), DECODING_RULES)
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_ids)
    process = partial(sampling.process_logits, temperature=temperature, top_k=top_k, top_p=top_p)

    def advance(state: _Decoding, hidden: Array) -> _Decoding:
        """Sample token `t` from the hidden states `[B, D]` before it."""
        logits = model.logits(params, hidden)
        logits = process(_forbid_stops(logits, stop_ids, state.t, min_new_tokens))
        token, logprob = _draw(row_keys, constrain(logits, BATCH), state.t, greedy)
        ends = _is_stop(token, stop_ids) & (state.t >= truncate_after) if stop_at_end else False
        return _append(state, token, logprob, ends, pad_id)

    def step(state: _Decoding) -> _Decoding:
        hidden, cache = _read_newest(model, params, known, prompt_mask, state)
        return advance(state._replace(cache=cache), hidden)

    # The last token is never read, so the cache needs no slot for it.
    empty = model.init_cache(B, P + max_new_tokens - 1)
    hidden, cache = model.hidden(params, known, prompt_mask, empty, last=1)
    chex.assert_shape(hidden, (B, 1, None))
    start = advance(_start(prompts, max_new_tokens, pad_id, cache), hidden[:, -1])
    unfinished = lambda state: (state.t < max_new_tokens) & ~jnp.all(state.done)
    final = jax.lax.while_loop(unfinished, step, start)
    return Rollout(
        tokens=jnp.concatenate([prompts, final.tokens], axis=1),
        mask=jnp.concatenate([prompt_mask, final.mask], axis=1),
        response_mask=final.mask,
        logprobs=final.logprobs,
        ended=jnp.any((_is_stop(final.tokens, stop_ids) & final.mask)[:, truncate_after:], axis=1),
    )


def _start(prompts: Array, max_new_tokens: int, pad_id: int, cache: KVCache | None) -> _Decoding:
    """Return the state after the prompts were read and before any token was sampled."""
    B, R = len(prompts), max_new_tokens
    return _Decoding(
        t=jnp.int32(0),
        token=prompts[:, -1],
        done=jnp.zeros(B, bool),
        tokens=jnp.full((B, R), pad_id, jnp.int32),
        mask=jnp.zeros((B, R), bool),
        logprobs=jnp.zeros((B, R), jnp.float32),
        cache=cache,
    )


def _read_newest(
    model: LanguageModel, params: Params, prompts: Array, prompt_mask: Array, state: _Decoding
) -> tuple[Array, KVCache | None]:
    """Compute the hidden states `[B, D]` of the newest tokens, and the cache with these added."""
    if state.cache is not None:
        token = jnp.where(state.done, 0, state.token)
        hidden, cache = model.hidden(params, token[:, None], ~state.done[:, None], state.cache)
        return hidden[:, 0], cache
    tokens = jnp.concatenate([prompts, jnp.where(state.mask, state.tokens, 0)], axis=1)
    mask = jnp.concatenate([prompt_mask, state.mask], axis=1)
    hidden, _ = model.hidden(params, tokens[:, :-1], mask[:, :-1])
    newest = prompts.shape[1] + state.t - 1
    return jax.lax.dynamic_index_in_dim(hidden, newest, axis=1, keepdims=False), None


def _append(
    state: _Decoding, token: Array, logprob: Array, ends: Array | bool, pad_id: int
) -> _Decoding:
    """Add a sampled token to the rows that have not ended, and padding to the others."""
    real = ~state.done
    token = jnp.where(real, token, pad_id)
    return state._replace(
        t=state.t + 1,
        token=token,
        done=state.done | ends,
        tokens=state.tokens.at[:, state.t].set(token),
        mask=state.mask.at[:, state.t].set(real),
        logprobs=state.logprobs.at[:, state.t].set(jnp.where(real, logprob, 0)),
    )


def _forbid_stops(logits: Array, stop_ids: tuple[int, ...], t: Array, min_new_tokens: int) -> Array:
    """Set the logits of stop ids to `-inf` while `t < min_new_tokens`."""
    if not min_new_tokens or not stop_ids:
        return logits
    if len(set(stop_ids)) >= logits.shape[-1]:
        raise ValueError(
            f"min_new_tokens={min_new_tokens} leaves nothing to draw, because all "
            f"{logits.shape[-1]} tokens of the vocabulary are stop ids."
        )
    stops = jnp.asarray(stop_ids)
    return logits.at[:, stops].set(jnp.where(t < min_new_tokens, -jnp.inf, logits[:, stops]))


def _draw(row_keys: Array, logits: Array, t: Array, greedy: bool) -> tuple[Array, Array]:
    """Draw token `t` of each row, `[B]` int32, and its log-prob, `[B]`, from `[B, V]` logits."""
    if greedy:
        return jax.vmap(sampling.greedy_token)(logits)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, t)
    return jax.vmap(sampling.sample_token)(keys, logits)


def _is_stop(tokens: Array, stop_ids: tuple[int, ...]) -> Array:
    if not stop_ids:
        return jnp.zeros(tokens.shape, bool)
    return jnp.isin(tokens, jnp.asarray(stop_ids, jnp.int32))
