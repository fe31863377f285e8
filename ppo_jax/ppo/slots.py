"""Slots for sampling: when a response ends, the next prompt takes its place in the decode loop.

The prompts are read once, all together, and their keys and values stay in a cache of their own. A
slot is a row of a second cache, in which every step writes one position for all slots. A prompt
that gets a slot is copied to the positions just before that one, so that the positions of each
sequence stay contiguous. When the end of the cache is reached, everything moves to its beginning.

On a mesh, the slots of a device serve the rows of that device. Rows and slots are therefore divided
into groups, one for each device that rows are sharded over, and no group reads another.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ppo.decoding import Decoding, longest
from ppo_jax.types import KVCache


class Queue(NamedTuple):
    """The rows that get a slot in turn.

    Attributes:
      cache: keys and values of the prompts, of `B` rows and `P` positions.
      row_ids: `[B]` int32, numbers of the rows in the global batch.
      token: `[B]` int32, the first token of each response.
      order: `[G, B / G]` int32, the rows of each group, those that need a slot first.
      needed: `[G]` int32, the number of rows that need a slot.
    """

    cache: KVCache
    row_ids: Array
    token: Array
    order: Array
    needed: Array


def share(state: Decoding, slots: int) -> tuple[Decoding, Queue]:
    """Turn a state with a slot for each row into one with fewer slots, and a queue of rows.

    Args:
      state: the state after the first token of each row, whose cache has `P` positions.
      slots: `S`.

    Returns:
      The state, with the first rows in the slots, and the queue.
    """
    assert state.cache is not None
    groups, cache = len(state.started), state.cache
    done = _grouped(state.done, groups)
    order = jnp.argsort(done, axis=1, stable=True)
    rows = order[:, : slots // groups]
    chosen = lambda x: _chosen(x, rows).reshape(slots, *x.shape[1:])
    first = state._replace(
        row=rows.reshape(slots),
        row_id=chosen(state.row_id),
        t=chosen(state.t),
        token=chosen(state.token),
        done=chosen(state.done),
        cache=KVCache(
            keys=tuple(map(chosen, cache.keys)),
            values=tuple(map(chosen, cache.values)),
            mask=chosen(cache.mask),
            length=cache.length,
        ),
        started=jnp.full(groups, slots // groups),
    )
    return first, Queue(cache, state.row_id, state.token, order, jnp.sum(~done, axis=1))


def _grouped(x: Array, groups: int) -> Array:
    """Divide the rows of `[B, ...]` into groups, `[G, B / G, ...]`."""
    return x.reshape(groups, -1, *x.shape[1:])


def _chosen(x: Array, rows: Array) -> Array:
    """Return from `[B, ...]` the rows `[G, ...]` of each group."""
    return jax.vmap(lambda x, i: x[i])(_grouped(x, len(rows)), rows)


def refill(state: Decoding, queue: Queue) -> Decoding:
    """Give each free slot to the next row of its group, as long as there is one.

    The loop makes one iteration for each slot, and none in most steps. It changes the cache in
    place, where a conditional update of the whole cache would read and write all of it.

    Args:
      state: the state, with `S` slots in `G` groups.
      queue: the rows, in the same groups.

    Returns:
      The state, whose free slots hold prompts and the first tokens of their responses.
    """
    free = lambda state: _vacant(state, queue).any()
    with jax.named_scope("trips=0"):  # The plan counts the steps without this, which is rare.
        return jax.lax.while_loop(free, partial(_fill_one, queue), state)


def _vacant(state: Decoding, queue: Queue) -> Array:
    """Return which slots of each group are free while a row waits, `[G, S / G]` bool."""
    waits = state.started < queue.needed
    return _grouped(state.done, len(waits)) & waits[:, None]


def _fill_one(queue: Queue, state: Decoding) -> Decoding:
    """Give one slot of each group, the same one in all groups, to the next row of the group."""
    groups, cache = len(state.started), state.cache
    assert cache is not None
    vacant = _vacant(state, queue)
    slot = jnp.argmax(vacant.any(axis=0))
    taken = jax.lax.dynamic_index_in_dim(vacant, slot, axis=1, keepdims=False)
    # A group whose queue is empty reads its last row, which `put` then leaves out.
    last = queue.order.shape[1] - 1
    row = _chosen(queue.order.reshape(-1), jnp.minimum(state.started, last))
    place = cache.length - queue.cache.mask.shape[1]  # The prompt ends where the next step writes.

    def put(old: Array, new: Array) -> Array:
        """Replace the slot in `[S, ...]` by `new [G, ...]` in the groups where it is free."""
        grouped = _grouped(old, groups)
        kept = jax.lax.dynamic_index_in_dim(grouped, slot, axis=1, keepdims=False)
        new = jnp.where(taken.reshape(-1, *(1,) * (new.ndim - 1)), new, kept)
        return jax.lax.dynamic_update_index_in_dim(grouped, new, slot, axis=1).reshape(old.shape)

    def copy(old: Array, prompts: Array, axis: int) -> Array:
        """Copy a prompt into the slot, and clear what an earlier row has left there."""
        clear = jnp.zeros((groups, *old.shape[1:]), old.dtype)
        prompt = _chosen(prompts, row)
        return put(old, jax.lax.dynamic_update_slice_in_dim(clear, prompt, place, axis))

    copy_all = lambda old, prompts: tuple(map(partial(copy, axis=2), old, prompts))
    return state._replace(
        row=put(state.row, row),
        row_id=put(state.row_id, _chosen(queue.row_ids, row)),
        t=put(state.t, jnp.ones(groups, jnp.int32)),
        token=put(state.token, _chosen(queue.token, row)),
        done=put(state.done, jnp.zeros(groups, bool)),
        cache=KVCache(
            keys=copy_all(cache.keys, queue.cache.keys),
            values=copy_all(cache.values, queue.cache.values),
            mask=copy(cache.mask, queue.cache.mask, axis=1),
            length=cache.length,
        ),
        started=state.started + taken,
    )


def make_room(state: Decoding, prompt_length: int) -> Decoding:
    """Move the cache to its beginning if it is full.

    The longest unfinished row then starts at position 0. It must be shorter than the cache.

    Args:
      state: the state, whose cache has `N` positions, `[S, G, N, F]` in each layer.
      prompt_length: `P`.
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
    with jax.named_scope("trips=0"):  # As in `refill`.
        return state._replace(cache=jax.lax.while_loop(full, move, state.cache))
