"""Pack sequences of different lengths into bins, so that padding is not computed.

A bin is a row of `length` slots that holds several sequences `[prompt | response]` one after the
other. Each sequence begins at a multiple of `BLOCK` slots. Sums over the slots of a bin then add
the numbers of a sequence in the same order wherever it lies, so that its log-probs do not depend on
its neighbours. The number of bins that a batch needs is data and not a shape: `sum_bins` is a loop
whose number of iterations is computed, so one compiled program serves every batch.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.errors import SettingError
from ppo_jax.ops.axes import separate
from ppo_jax.sharding import row_shards
from ppo_jax.types import AxisName, CriticFn, LanguageModel

Tree = TypeVar("Tree")

BLOCK = 64
"""Every sequence begins at a multiple of so many slots; the length of a bin is one too."""

LONG, LONG_BLOCK = 1024, 128
"""In bins of `LONG` slots and more, every sequence begins at a multiple of `LONG_BLOCK`, because
their attention is summed over blocks of so many slots."""


class Bins(NamedTuple):
    """The shape of the bins that are computed at a time.

    Attributes:
      length: number of slots of a bin, a multiple of `BLOCK`.
      number: number of bins at a time on each device that the rows of a batch are sharded over.

    Example:
      >>> Bins(length=128, number=2).total
      2
    """

    length: int
    number: int = 1

    @property
    def total(self) -> int:
        """Number of bins at a time on all devices, at this point of a program."""
        return self.number * row_shards()


class Placement(NamedTuple):
    """Where the sequences of a batch lie.

    Attributes:
      bins: `[B]` int32, the bin of each sequence; 0 for an empty one.
      starts: `[B]` int32, the slot at which it begins.
      fits: `[B]` bool, false if there was no bin with room for it.
      used: `[]` int32, the number of bins that hold a sequence.

    Example:
      >>> place_rows(jnp.array([10, 100]), length=128, count=2).used
      Array(2, dtype=int32)
    """

    bins: Array
    starts: Array
    fits: Array
    used: Array


def place_rows(lengths: Array, *, length: int, count: int) -> Placement:
    """Assign sequences to bins: each, from the longest on, to the first bin that has room.

    The placement of the sequences of some bins is the same if it is computed from them alone, up to
    the numbers of the bins.

    Args:
      lengths: `[B]` int32, the number of slots that each sequence needs; 0 for none.
      length: number of slots of a bin.
      count: number of bins. With `B` bins every sequence of at most `length` finds one.

    Returns:
      The placement.

    Source:
      First-fit decreasing; Johnson 1973, "Near-optimal bin packing algorithms".

    Example:
      >>> place = place_rows(jnp.array([60, 100, 40, 0]), length=192, count=4)
      >>> place.bins, place.starts
      (Array([0, 0, 1, 0], dtype=int32), Array([128,   0,   0,   0], dtype=int32))
    """
    block = BLOCK if length < LONG else LONG_BLOCK
    sizes = jnp.maximum(jnp.minimum(-(-lengths // block) * block, length), lengths)
    order = jnp.argsort(-sizes, stable=True)
    # Computed from `lengths`, so that a `shard_map` takes the carry to differ between the shards.
    zero = 0 * jnp.sum(lengths)
    nothing = jnp.zeros_like(lengths) + zero

    def place(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        filled, bins, starts, fits = carry
        row = order[i]
        room = filled + sizes[row] <= length
        first = jnp.argmax(room).astype(jnp.int32)
        return (
            filled.at[first].add(jnp.where(room[first], sizes[row], 0)),
            bins.at[row].set(first),
            starts.at[row].set(filled[first]),
            fits.at[row].set(room[first]),
        )

    start = jnp.zeros(count, jnp.int32) + zero, nothing, nothing, nothing == 0
    some = jnp.sum(sizes > 0)  # The empty sequences are the last ones of the order.
    filled, bins, starts, fits = jax.lax.fori_loop(0, some, place, start)
    return Placement(bins, starts, fits, jnp.sum(filled > 0, dtype=jnp.int32))


class Packing(NamedTuple):
    """Maps arrays of rows `[B, S, ...]` to bins `[n, length, ...]` and back; see `pack_rows`.

    Attributes:
      rows: `[n, length]` int32, the row of the sequence in each slot; `B` for a free slot.
      columns: `[n, length]` int32, its position in that row.
      slots: `[B, S]` int32, the slot of each position, counted through all bins.
      fits: `[B]` bool, whether there was room for the row.

    Example:
      >>> mask = jnp.array([[False, True, True], [True, True, True]])
      >>> packing = pack_rows(mask, Bins(length=128))
      >>> x = jnp.array([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
      >>> packing.pack(x)[0, [0, 1, 64, 65, 66]]
      Array([1., 2., 3., 4., 5.], dtype=float32)
      >>> packing.unpack(packing.pack(x))
      Array([[1., 1., 2.],
             [3., 4., 5.]], dtype=float32)
    """

    rows: Array
    columns: Array
    slots: Array
    fits: Array

    @property
    def segments(self) -> Array:
        """The number of the sequence in each slot, `[n, length]` int32, as a model takes it."""
        return self.rows

    def pack(self, x: Array) -> Array:
        """Return `[B, S, ...]` in bins; free slots hold 0 or False."""
        return x.at[self.rows, self.columns].get(mode="fill", fill_value=0)

    def unpack(self, x: Array) -> Array:
        """Return `[n, length, ...]` floats as rows.

        Positions before and after the tokens of a row get the number of its first and of its last
        one. A row that did not fit gets NaN, and an empty one the number of any slot.
        """
        out = x.reshape(-1, *x.shape[2:])[self.slots]
        return jnp.where(self.fits.reshape(-1, *(1,) * (out.ndim - 1)), out, jnp.nan)


def pack_rows(mask: Array, bins: Bins) -> Packing:
    """Place the tokens of every row, from its first real one to its last, in bins.

    Args:
      mask: `[B, S]` bool, real tokens. A row without any takes no room.
      bins: the shape of the bins, which must have room for all rows.

    Returns:
      The packing.

    Raises:
      ValueError: if a bin is shorter than `S`, or its length is not a multiple of `BLOCK`.

    Example:
      >>> packing = pack_rows(jnp.ones((2, 3), bool), Bins(length=64, number=2))
      >>> packing.rows[:, :4]
      Array([[0, 0, 0, 2],
             [1, 1, 1, 2]], dtype=int32)
    """
    (count, width), slots = mask.shape, bins.total * bins.length
    first, last, lengths = _spans(mask, bins)
    place = place_rows(lengths, length=bins.length, count=bins.total)
    columns = jnp.arange(width, dtype=jnp.int32)[None]
    starts = place.bins * bins.length + place.starts - first
    placed = (lengths > 0) & place.fits
    kept = placed[:, None] & (first[:, None] <= columns) & (columns <= last[:, None])
    to = jnp.where(kept, starts[:, None] + columns, slots)
    source = jnp.full(slots, count * width, jnp.int32)
    numbers = jnp.arange(count * width, dtype=jnp.int32).reshape(to.shape)
    source = source.at[to].set(numbers, mode="drop").reshape(bins.total, bins.length)
    at = starts[:, None] + jnp.clip(columns, first[:, None], last[:, None])
    at = jnp.where(placed[:, None], at, 0)
    return Packing(source // width, source % width, at, place.fits)


def _spans(mask: Array, bins: Bins) -> tuple[Array, Array, Array]:
    """Return the first and the last real token of each row, and how many positions they span.

    Raises:
      ValueError: if a bin cannot hold a row whose tokens are all real, or has no possible length.
    """
    if bins.length % BLOCK or bins.length < mask.shape[1]:
        raise ValueError(
            f"A bin of length={bins.length} must be a multiple of {BLOCK} and hold {mask.shape[1]} "
            "tokens."
        )
    first = jnp.argmax(mask, axis=1).astype(jnp.int32)
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1).astype(jnp.int32)
    return first, last, jnp.where(mask.any(axis=1), last + 1 - first, 0)


def sum_bins(
    function: Callable[[Array], Tree],
    mask: Array,
    bins: Bins,
    *,
    add: Callable[[Tree, Tree], Tree] = lambda a, b: jax.tree.map(jnp.add, a, b),
    axis_name: AxisName | None = None,
) -> Tree:
    """Call a function for the rows of `bins.total` bins after the other, and add up its results.

    Args:
      function: `function(chosen)` returns a pytree of arrays, computed from the rows where
        `chosen [B]` bool is true, which fit `bins`.
      mask: `[B, S]` bool, real tokens. A `function` that calls `forward_packed` needs it without
        the last of the `T` columns, because that places the `T - 1` tokens that are computed.
      bins: the shape of the bins.
      add: adds two results. It starts with zeros.
      axis_name: mapped axis over which the rows are split. Each device packs its own rows, and all
        take as many steps as the one with the most bins.

    Returns:
      The sum.

    Raises:
      ValueError: if a bin is shorter than `S`, or its length is not a multiple of `BLOCK`.

    Example:
      >>> mask = jnp.arange(100)[None] < jnp.array([[100], [20], [90]])
      >>> lengths = mask.sum(axis=1)
      >>> longest = lambda chosen: jnp.max(jnp.where(chosen, lengths, 0))
      >>> sum_bins(longest, mask, Bins(length=192))
      Array(190, dtype=int32)
    """
    _, _, lengths = _spans(mask, bins)
    place = place_rows(lengths, length=bins.length, count=len(mask))
    steps = -(-place.used // bins.total)
    if axis_name is not None:
        steps = jax.lax.pmax(steps, axis_name)

    def step(i: Array, total: Tree) -> Tree:
        return add(total, function((lengths > 0) & (place.bins // bins.total == i)))

    shapes = jax.eval_shape(function, lengths > 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, steps, step, separate(zeros, axis_name))


def check_packing(model: LanguageModel, critic: CriticFn, bins: Bins | None, tokens: int) -> None:
    """Check that sequences can be packed, before anything is compiled.

    Args:
      model: functions of the policy.
      critic: function of the critic.
      bins: the shape of the bins; None if sequences are not packed.
      tokens: the length of the longest prompt and response together.

    Raises:
      SettingError: if a bin is too short, or the model or the critic does not take `segments`.
    """
    if bins is None:
        return
    least = -(-(tokens - 1) // BLOCK) * BLOCK
    if bins.length < least:
        raise SettingError(
            f"pack={bins.length} must be at least {least} to hold a prompt and a response of "
            f"{tokens} tokens together."
        )
    for name, function in (("model.hidden", model.hidden), ("critic", critic)):
        parameters = inspect.signature(function).parameters.values()
        if not any(x.name == "segments" or x.kind is x.VAR_KEYWORD for x in parameters):
            raise SettingError(
                f"pack={bins.length} needs a {name} function that takes segments; add the argument "
                "or leave pack out."
            )
