"""The decode loop: one token for every slot in each step, over a cache that grows with its use.

A slot is a row of the key/value cache. Each slot serves one row of the batch at a time; with as
many slots as rows, slot `i` serves row `i` throughout. `ppo.slots` shares fewer slots among them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.types import KVCache, LanguageModel, Params

# A cache of up to this many positions is allocated and read as a whole.
_SMALLEST = 128
# A larger cache grows in at most this many stages, each of which is compiled on its own.
_STAGES = 4
_STAGES_ON_TPU = 5
_ALIGNED = 64
# The compiler for TPUs fuses softmax with the product before it if the positions fill the lanes.
_LANES = 128


class Drawn(NamedTuple):
    """A token of each of `n` rows.

    Attributes:
      token: `[n]` int32.
      logprob: `[n]` float32, in nats.
      ends: `[n]` bool, whether the token is the last one of its response.
    """

    token: Array
    logprob: Array
    ends: Array


DrawFn = Callable[[Array, Array, Array], Drawn]
"""Draws the next token of `n` rows from the hidden states `[n, D]` before it, the numbers `[n]` of
the rows in the global batch, and the numbers `[n]` of their earlier response tokens."""


class Decoding(NamedTuple):
    """The state of the decode loop.

    Rows are numbered within their group: the rows and slots of a batch are divided into `G` groups,
    one for each device that shares them (see `ppo.slots`).

    Attributes:
      row: `[S]` int32, the row that each slot serves.
      row_id: `[S]` int32, the number of that row in the global batch.
      t: `[S]` int32, the number of tokens that the response has so far. It counts on after the end,
        so that no two draws share a key.
      token: `[S]` int32, the newest of them.
      done: `[S]` bool, whether the response has ended.
      cache: keys and values of everything before the newest tokens, or None.
      started: `[G]` int32, the number of rows that have been given a slot.
      tokens: `[B, R]` int32, the responses.
      mask: `[B, R]` bool, which of these tokens are real.
      logprobs: `[B, R]` float32, in nats.
    """

    row: Array
    row_id: Array
    t: Array
    token: Array
    done: Array
    cache: KVCache | None
    started: Array
    tokens: Array
    mask: Array
    logprobs: Array


def start(
    first: Drawn, row_ids: Array, cache: KVCache | None, *, length: int, pad_id: int, groups: int
) -> Decoding:
    """Return the state after the first token of each row, with a slot for every row.

    Args:
      first: the first tokens, of `B` rows.
      row_ids: `[B]` int32, numbers of the rows in the global batch.
      cache: the cache after the prompts, or None.
      length: `R`.
      pad_id: id that fills the positions after the end of a response.
      groups: `G`.
    """
    B = len(row_ids)
    empty = lambda fill, dtype: jnp.full((B, length), fill, dtype)
    return Decoding(
        row=jnp.tile(jnp.arange(B // groups), groups),
        row_id=row_ids,
        t=jnp.ones(B, jnp.int32),
        token=first.token,
        done=first.ends,
        cache=cache,
        started=jnp.full(groups, B // groups),
        tokens=empty(pad_id, jnp.int32).at[:, 0].set(first.token),
        mask=empty(False, bool).at[:, 0].set(True),
        logprobs=empty(0, jnp.float32).at[:, 0].set(first.logprob),
    )


def stages(prompt_length: int, positions: int, platform: str, most: int | None = None) -> list[int]:
    """Return the sizes of the cache in turn, in positions.

    Args:
      prompt_length: number of positions that are filled at first.
      positions: largest number of positions that are filled.
      platform: what the program runs on, such as `tpu` or `cpu`. On a TPU, sizes above 128 are
        multiples of 128, so the last one may be larger than `positions`, but not than `most`.
      most: the largest number of positions that the model can read; None for no limit.

    Example:
      >>> stages(64, 575, "cpu"), stages(256, 575, "cpu"), stages(16, 63, "cpu")
      ([192, 384, 575], [384, 575], [63])
      >>> stages(64, 575, "tpu"), stages(16, 63, "tpu"), stages(100, 199, "tpu", most=200)
      ([128, 256, 384, 512, 640], [63], [128, 200])
    """
    if platform == "tpu":
        count, aligned, last = _STAGES_ON_TPU, _LANES, _multiple(positions, _LANES)
        last = last if most is None else min(last, most)
    else:
        count, aligned, last = _STAGES, _ALIGNED, positions
    if positions <= _SMALLEST:
        return [positions]
    size = max(_SMALLEST, _multiple(-(-positions // count), aligned))
    return [*(x for x in range(size, last - size // 2, size) if x > prompt_length), last]


def _multiple(n: int, of: int) -> int:
    """Return the smallest multiple of `of` that is at least `n`."""
    return -(-n // of) * of


def decode(
    state: Decoding,
    step: Callable[[Decoding], Decoding],
    prompt_length: int,
    positions: int,
    sizes: Sequence[int],
    waves: int = 1,
) -> Decoding:
    """Take steps until all responses have ended.

    A step multiplies all positions of the cache, so the cache is enlarged only when the longest
    unfinished response fills it.

    Args:
      state: the state, whose cache has `sizes[0]` positions.
      step: adds a token to the response of each slot.
      prompt_length: `P`.
      positions: largest number of positions that are filled.
      sizes: from `stages`.
      waves: how often each slot is used if all responses have the greatest length.

    Returns:
      The state at the end.
    """
    filled, steps = prompt_length, (waves - 1) * (positions - prompt_length)
    for size in sizes:
        state = state._replace(cache=_enlarged(state.cache, size))
        trips = min(size, positions) - filled + (steps if size == sizes[-1] else 0)
        fits = partial(_fits, prompt_length=prompt_length, size=size)
        # The plan reads from this name how many steps to count.
        with jax.named_scope(f"trips={trips}"):
            state = jax.lax.while_loop(fits, step, state)
        filled = size
    return state


def longest(state: Decoding, prompt_length: int) -> Array:
    """Return how many positions the longest unfinished row has in the cache.

    The newest token of each row is not in the cache yet.

    Args:
      state: the state.
      prompt_length: `P`.

    Returns:
      `[]` int32, -1 if all rows have ended.
    """
    return jnp.max(jnp.where(state.done, -1, prompt_length + state.t - 1))


def _fits(state: Decoding, *, prompt_length: int, size: int) -> Array:
    """Return whether there is an unfinished row, and room for the newest token of each."""
    filled = longest(state, prompt_length)
    return (filled >= 0) & (filled < size)


def _enlarged(cache: KVCache | None, size: int) -> KVCache | None:
    """Return the cache with empty positions added at its end, `size` in all."""
    if cache is None or size == cache.mask.shape[1]:
        return cache
    more = size - cache.mask.shape[1]
    wide: Any = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)))
    return cache.replace(
        keys=tuple(map(wide, cache.keys)),
        values=tuple(map(wide, cache.values)),
        mask=jnp.pad(cache.mask, ((0, 0), (0, more))),
    )


def read_newest(
    model: LanguageModel, params: Params, prompts: Array, prompt_mask: Array, state: Decoding
) -> tuple[Array, KVCache | None]:
    """Compute the hidden states of the newest tokens.

    Args:
      model: functions of the policy.
      params: its parameters.
      prompts: `[B, P]` int32; read only without a cache, which needs `S` to be `B`.
      prompt_mask: `[B, P]` bool, their real tokens.
      state: the state, with `S` slots.

    Returns:
      The hidden states, `[S, D]`, and the cache with the newest tokens added, or None.
    """
    if state.cache is not None:
        token = jnp.where(state.done, 0, state.token)
        hidden, cache = model.hidden(params, token[:, None], ~state.done[:, None], state.cache)
        return hidden[:, 0], cache
    tokens = jnp.concatenate([prompts, jnp.where(state.mask, state.tokens, 0)], axis=1)
    mask = jnp.concatenate([prompt_mask, state.mask], axis=1)
    hidden, _ = model.hidden(params, tokens[:, :-1], mask[:, :-1])
    newest = jnp.minimum(prompts.shape[1] + state.t - 1, hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, newest[:, None, None], axis=1)[:, 0], None


def append(state: Decoding, drawn: Drawn) -> Decoding:
    """Add a token to the responses that have not ended.

    Args:
      state: the state, with `S` slots.
      drawn: the tokens, `[S]`.
    """
    R = state.tokens.shape[1]
    here = jnp.where(state.done, R, state.t)  # A write beyond the last token has no effect.

    def put(out: Array, x: Array) -> Array:
        by_group = lambda x: x.reshape(len(state.started), -1, *x.shape[1:])
        write = lambda out, row, t, x: out.at[row, t].set(x, mode="drop")
        written = jax.vmap(write)(*map(by_group, (out, state.row, here, x)))
        return written.reshape(out.shape)

    return state._replace(
        t=state.t + 1,
        token=drawn.token,
        done=state.done | drawn.ends,
        tokens=put(state.tokens, drawn.token),
        mask=put(state.mask, ~state.done),
        logprobs=put(state.logprobs, drawn.logprob),
    )
