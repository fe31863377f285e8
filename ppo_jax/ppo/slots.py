"""Slots for sampling: when a response ends, the next prompt takes its place in the decode loop.

The prompts are read once, all together, and their keys and values stay in a cache of their own. A
slot is a row of a second cache, in which every step writes one position for all slots. A prompt
that gets a slot is copied to the positions just before that one, so that the positions of each
sequence stay contiguous. When the end of the cache is reached, everything moves to its beginning.

On a mesh, the slots of a device serve the rows of that device. Rows and slots are therefore divided
into groups, one for each device that rows are sharded over, and no group reads another.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ppo.decoding import Decoding, longest
from ppo_jax.types import KVCache, LanguageModel


class Queue(NamedTuple):
    """The rows that get a slot in turn.

    Attributes:
      cache: keys and values of the prompts, of `B` rows and `P` positions.
      row_ids: `[B]` int32, numbers of the rows in the global batch.
      token: `[B]` int32, the first token of each response.
      order: `[G, B / G]` int32, the rows of each group, those that need a slot first.
      count: `[G]` int32, the number of rows that need a slot.
    """

    cache: KVCache
    row_ids: Array
    token: Array
    order: Array
    count: Array


def share(
    state: Decoding, model: LanguageModel, slots: int, positions: int
) -> tuple[Decoding, Queue]:
    """Turn a state with a slot for each row into one with fewer slots, and a queue of rows.

    Args:
      state: the state after the first token of each row, whose cache has `P` positions.
      model: makes the cache of the slots.
      slots: `S`.
      positions: number of positions of that cache.

    Returns:
      The state, with the first rows in the slots, and the queue.
    """
    assert state.cache is not None
    groups, length = len(state.started), state.cache.mask.shape[1]
    done = state.done.reshape(groups, -1)
    queue = Queue(
        cache=state.cache,
        row_ids=state.row_id,
        token=state.token,
        order=jnp.argsort(done, axis=1, stable=True),
        count=jnp.sum(~done, axis=1),
    )
    cache = model.init_cache(slots, positions)
    assert cache is not None
    empty = state._replace(
        row=jnp.zeros(slots, jnp.int32),
        row_id=jnp.zeros(slots, jnp.int32),
        t=jnp.zeros(slots, jnp.int32),
        token=jnp.zeros(slots, jnp.int32),
        done=jnp.ones(slots, bool),
        cache=cache.replace(length=jnp.int32(length)),
        started=jnp.zeros(groups, jnp.int32),
    )
    return refill(empty, queue), queue


def refill(state: Decoding, queue: Queue) -> Decoding:
    """Give each free slot to the next row of its group, as long as there is one.

    The loop makes one iteration for each slot, and none in most steps. It changes the cache in
    place, where a conditional update of the whole cache would read and write all of it.
    """
    open_ = lambda state: _vacant(state, queue).any()
    return jax.lax.while_loop(open_, partial(_fill_one, queue), state)


def _vacant(state: Decoding, queue: Queue) -> Array:
    """Return which slots of each group are free while a row waits, `[G, S / G]` bool."""
    waits = state.started < queue.count
    return state.done.reshape(len(waits), -1) & waits[:, None]


def _fill_one(queue: Queue, state: Decoding) -> Decoding:
    """Give one slot of each group, the same one in all groups, to the next row of the group."""
    groups, cache = len(state.started), state.cache
    assert cache is not None
    vacant = _vacant(state, queue)
    slot = jnp.argmax(vacant.any(axis=0))
    taken = jax.lax.dynamic_index_in_dim(vacant, slot, axis=1, keepdims=False)
    of_group = jax.vmap(lambda x, i: x[i])
    row = of_group(queue.order, jnp.minimum(state.started, queue.order.shape[1] - 1))
    place = cache.length - queue.cache.mask.shape[1]  # The prompt ends where the next step writes.

    def put(old: Array, new: Array) -> Array:
        """Replace the slot in `[S, ...]` by `new [G, ...]` in the groups where it is free."""
        grouped = old.reshape(groups, -1, *old.shape[1:])
        kept = jax.lax.dynamic_index_in_dim(grouped, slot, axis=1, keepdims=False)
        new = jnp.where(taken.reshape(-1, *(1,) * (new.ndim - 1)), new, kept)
        return jax.lax.dynamic_update_index_in_dim(grouped, new, slot, axis=1).reshape(old.shape)

    def chosen(x: Array) -> Array:
        """Return the waiting row of each group from `[B, ...]`."""
        return of_group(x.reshape(groups, -1, *x.shape[1:]), row)

    def copy(old: Array, prompts: Array, axis: int) -> Array:
        """Copy a prompt into the slot, and clear what an earlier row has left there."""
        clear = jnp.zeros((groups, *old.shape[1:]), old.dtype)
        new = jax.lax.dynamic_update_slice_in_dim(clear, chosen(prompts), place, axis)
        return put(old, new)

    wide: Any = lambda old, prompts: tuple(
        copy(a, b, axis=2) for a, b in zip(old, prompts, strict=True)
    )
    return state._replace(
        row=put(state.row, row),
        row_id=put(state.row_id, chosen(queue.row_ids)),
        t=put(state.t, jnp.ones(groups, jnp.int32)),
        token=put(state.token, chosen(queue.token)),
        done=put(state.done, jnp.zeros(groups, bool)),
        cache=KVCache(
            keys=wide(cache.keys, queue.cache.keys),
            values=wide(cache.values, queue.cache.values),
            mask=copy(cache.mask, queue.cache.mask, axis=1),
            length=cache.length,
        ),
        started=state.started + taken,
    )


def make_room(state: Decoding, prompt_length: int) -> Decoding:
    """Move the cache to its beginning if it is full.

    The longest unfinished row then starts at position 0. It must be shorter than the cache.
    """
    assert state.cache is not None
    size, filled = state.cache.mask.shape[1], longest(state, prompt_length)

    def move(cache: KVCache) -> KVCache:
        """Move every position; what goes over the edge belongs to no unfinished row."""
        back = filled - cache.length
        moved = partial(jnp.roll, shift=back)
        return KVCache(
            keys=tuple(moved(x, axis=2) for x in cache.keys),
            values=tuple(moved(x, axis=2) for x in cache.values),
            mask=moved(cache.mask, axis=1),
            length=filled,
        )

    # A loop of at most one iteration, because a conditional would copy the cache in every step.
    full = lambda cache: cache.length == size
    return state._replace(cache=jax.lax.while_loop(full, move, state.cache))
