"""Which slots positions attend to, without a matrix whose size is quadratic in their number."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.struct import PyTreeNode, field
from jax import Array

PADDING = np.iinfo(np.int32).min
"""The segment of slots without a real token."""

_BLOCK = 256


def in_reach(ago: Array, window: int | None, causal: bool) -> Array:
    """Return which slots are within reach, given by how many slots each precedes a position."""
    reach = ago >= 0 if causal else jnp.ones(ago.shape, bool)
    return reach if window is None else reach & (jnp.abs(ago) < window)


class Visible(PyTreeNode):
    """Which slots positions attend to.

    A position attends to the slots of its segment within reach: not to later ones if `causal`, and
    only to those at a distance of less than `window`, if there is one.

    Attributes:
      queries: `[B, S]` int32, the segments of the positions.
      keys: `[B, N]` int32, the segments of the slots, `PADDING` without a real token.
      start: `[]` int32, a number of slots before the first position, or None for 0.
      offset: a further number of slots before it.
      window: the window, or None.
      causal: whether later slots are out of reach.

    Example:
      >>> segments = jnp.array([[PADDING, 0, 0]])
      >>> Visible(queries=segments, keys=segments, window=2).matrix().astype(int)
      Array([[[0, 0, 0],
              [0, 1, 0],
              [0, 1, 1]]], dtype=int32)
    """

    queries: Array
    keys: Array
    start: Array | None = None
    offset: int = field(pytree_node=False, default=0)
    window: int | None = field(pytree_node=False, default=None)
    causal: bool = field(pytree_node=False, default=True)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(B, S, N)`."""
        (rows, positions), slots = self.queries.shape, self.keys.shape[1]
        return rows, positions, slots

    @property
    def slots(self) -> Array:
        """The slots of the positions, `[S]` int32."""
        first = self.offset if self.start is None else self.start + self.offset
        return first + jnp.arange(self.queries.shape[1])

    def matrix(self) -> Array:
        """Return which slots each position attends to, `[B, S, N]` bool."""
        ago = self.slots[:, None] - jnp.arange(self.keys.shape[1])[None, :]
        same = self.queries[:, :, None] == self.keys[:, None]
        real = self.keys != PADDING
        return same & real[:, None] & in_reach(ago, self.window, self.causal)[None]

    def count_earlier(self) -> Array:
        """Return how many real tokens of its segment precede each position, `[B, S]` int32."""
        B, S, N = self.shape
        pad = ((0, 0), (0, -S % _BLOCK))
        queries = jnp.pad(self.queries, pad).reshape(B, -1, _BLOCK)
        slots = jnp.pad(self.slots, pad[1]).reshape(-1, _BLOCK)

        def count(block: tuple[Array, Array]) -> Array:
            queries, slots = block
            earlier = slots[:, None] > jnp.arange(N)[None]
            same = queries[:, :, None] == self.keys[:, None]
            return jnp.sum(earlier[None] & same, axis=-1, dtype=jnp.int32)

        counts = jax.lax.map(count, (jnp.moveaxis(queries, 1, 0), slots))
        return jnp.moveaxis(counts, 0, 1).reshape(B, -1)[:, :S]


def since(allowed: Array | Visible, begin: int) -> Array | Visible:
    """Return which slots the positions from `begin` on attend to.

    Args:
      allowed: which slots all positions attend to, `[B, S, N]` bool or a `Visible`.
      begin: the first position to keep.
    """
    if isinstance(allowed, Visible):
        offset, queries = allowed.offset + begin, allowed.queries[:, begin:]
        return allowed.replace(queries=queries, offset=offset)
    return allowed[:, begin:]
