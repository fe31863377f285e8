"""Sampling of responses: prefill and decoding with a key/value cache, in one compiled program."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops import sampling
from ppo_jax.ops.masked import check_dtype
from ppo_jax.ppo.decoding import (
    Decoding,
    DrawFn,
    Drawn,
    append,
    decode,
    read_newest,
    stages,
    start,
)
from ppo_jax.ppo.slots import make_room, refill, share
from ppo_jax.sharding import BATCH, constrain, constrain_params, platform, row_shards
from ppo_jax.sharding_rules import DECODING_RULES
from ppo_jax.types import LanguageModel, Params, Rollout


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
    slots: int | None = None,
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
      slots: number of responses that are decoded at the same time; `B` by default. When one ends,
        the next prompt takes its place. In float32, the samples do not depend on it.

    Returns:
      The rollout. Its `logprobs` are of the distribution that was sampled from, after temperature
      and filters.

    Raises:
      ValueError: if `max_new_tokens` or `temperature` is not positive, `min_new_tokens` is not in
        `0 .. max_new_tokens`, `min_new_tokens` forbids the whole vocabulary, `P + R - 1` is more
        than the model's positions, `slots` is not in `1 .. B`, or there are fewer slots than
        prompts and the model has no cache.
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
    _check(model, prompts, prompt_mask, max_new_tokens, min_new_tokens, temperature, slots)
    slots = len(prompts) if slots is None else slots
    row_ids = jnp.arange(len(prompts)) if row_ids is None else row_ids
    params = constrain_params(model.rounded(params), DECODING_RULES)
    process = partial(sampling.process_logits, temperature=temperature, top_k=top_k, top_p=top_p)

    def draw(hidden: Array, row_ids: Array, t: Array) -> Drawn:
        logits = model.logits(params, hidden)
        logits = process(_forbid_stops(logits, stop_ids, t, min_new_tokens))
        token, logprob = _draw(key, row_ids, constrain(logits, BATCH), t, greedy)
        ends = _is_stop(token, stop_ids) & (t >= truncate_after) if stop_at_end else False
        return Drawn(token, logprob, ends | (t == max_new_tokens - 1))

    # The model never sees which id fills the padding.
    rows = jnp.where(prompt_mask, prompts, 0), prompt_mask, row_ids
    final = _decode(model, params, draw, *rows, length=max_new_tokens, pad_id=pad_id, slots=slots)
    return Rollout(
        tokens=jnp.concatenate([prompts, final.tokens], axis=1),
        mask=jnp.concatenate([prompt_mask, final.mask], axis=1),
        response_mask=final.mask,
        logprobs=final.logprobs,
        ended=jnp.any((_is_stop(final.tokens, stop_ids) & final.mask)[:, truncate_after:], axis=1),
    )


def _check(
    model: LanguageModel,
    prompts: Array,
    prompt_mask: Array,
    max_new_tokens: int,
    min_new_tokens: int,
    temperature: float,
    slots: int | None,
) -> None:
    """Check the arguments of `generate` that have the same names."""
    chex.assert_rank([prompts, prompt_mask], 2)
    chex.assert_equal_shape([prompts, prompt_mask])
    check_dtype(int, prompts=prompts)
    check_dtype(bool, prompt_mask=prompt_mask)
    if max_new_tokens < 1 or not 0 <= min_new_tokens <= max_new_tokens or temperature <= 0:
        raise ValueError(
            "generate needs max_new_tokens >= 1, 0 <= min_new_tokens <= max_new_tokens and "
            f"temperature > 0, not max_new_tokens={max_new_tokens}, "
            f"min_new_tokens={min_new_tokens}, temperature={temperature}."
        )
    B, P = prompts.shape
    if slots is not None and not 1 <= slots <= B:
        raise ValueError(f"slots={slots} must lie in 1 .. {B}, the number of prompts.")
    # The last token of a response is never read.
    if model.positions is not None and P + max_new_tokens - 1 > model.positions:
        raise ValueError(
            f"Prompts of {P} tokens and max_new_tokens={max_new_tokens} need "
            f"{P + max_new_tokens - 1} positions, because the last token needs none, but the model "
            f"has {model.positions}."
        )


def _decode(
    model: LanguageModel,
    params: Params,
    draw: DrawFn,
    prompts: Array,
    prompt_mask: Array,
    row_ids: Array,
    *,
    length: int,
    pad_id: int,
    slots: int,
) -> Decoding:
    """Read the prompts and sample a response to each; the result is the state at the end."""
    B, P = prompts.shape
    # The last token is never read, so the cache needs no position for it.
    positions = P + length - 1
    sizes = stages(P, positions, platform(), model.positions)
    empty = model.init_cache(B, sizes[0] if slots == B else P)
    hidden, cache = model.hidden(params, prompts, prompt_mask, empty, last=1)
    chex.assert_shape(hidden, (B, 1, None))
    if cache is not None and cache is empty:
        raise ValueError(
            "The model's hidden returned the cache that it was given; it must return a new one, to "
            "which the keys and values of the tokens are added."
        )
    first = draw(hidden[:, -1], row_ids, jnp.zeros(B, jnp.int32))
    groups = row_shards(B, slots)
    state = start(first, row_ids, cache, length=length, pad_id=pad_id, groups=groups)

    def step(state: Decoding) -> Decoding:
        hidden, cache = read_newest(model, params, prompts, prompt_mask, state)
        drawn = draw(hidden, state.row_id, state.t)
        return append(state._replace(cache=cache), drawn)

    if slots == B:
        return decode(state, step, P, positions, sizes if cache is not None else sizes[-1:])
    if cache is None:
        raise ValueError(
            f"slots={slots} must be {B}, the number of prompts, because the model's init_cache "
            "returns None."
        )
    state, queue = share(state, slots)
    refilled = lambda state: refill(step(make_room(state, P)), queue)
    return decode(state, refilled, P, positions, sizes, waves=-(-B // slots))


def _forbid_stops(logits: Array, stop_ids: tuple[int, ...], t: Array, min_new_tokens: int) -> Array:
    """Set the logits of stop ids to `-inf` in rows with `t < min_new_tokens`."""
    if not min_new_tokens or not stop_ids:
        return logits
    if len(set(stop_ids)) >= logits.shape[-1]:
        raise ValueError(
            f"min_new_tokens={min_new_tokens} leaves nothing to draw, because all "
            f"{logits.shape[-1]} tokens of the vocabulary are stop ids."
        )
    stops = jnp.asarray(stop_ids)
    return logits.at[:, stops].set(
        jnp.where(t[:, None] < min_new_tokens, -jnp.inf, logits[:, stops])
    )


def _draw(key: Array, row_ids: Array, logits: Array, t: Array, greedy: bool) -> tuple[Array, Array]:
    """Draw token `t[i]` of row `row_ids[i]` from `logits[i]`: tokens and log-probs, `[n]` each."""
    if greedy:
        return jax.vmap(sampling.greedy_token)(logits)
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_ids)
    return jax.vmap(sampling.sample_token)(jax.vmap(jax.random.fold_in)(row_keys, t), logits)


def _is_stop(tokens: Array, stop_ids: tuple[int, ...]) -> Array:
    if not stop_ids:
        return jnp.zeros(tokens.shape, bool)
    return jnp.isin(tokens, jnp.asarray(stop_ids, jnp.int32))
