"""The key/value cache `[B, G, N, F]`, where each of `G` groups holds one or more key heads.

A group holds the keys of its heads side by side, so that `G F = K C`. With one head in each group,
this is `[B, K, N, C]`.

A TPU keeps arrays in tiles of 8 rows and 128 lanes. A head of 64 features fills half of the lanes,
and the compiler then puts the positions into the lanes instead: to add one position, it reads and
writes 128 of them. There, heads are therefore grouped until they fill the lanes. Each head of
a group gets its own row of queries, with zeros in the features of the other heads. The products
with these zeros cost nothing, because the matrix unit multiplies 8 rows in any case.
"""

import jax.numpy as jnp
from jax import Array

from ppo_jax.models.config import TransformerConfig
from ppo_jax.sharding import BATCH, constrain, free_size, platform
from ppo_jax.types import KVCache

_LANES = 128


def cache_groups(config: TransformerConfig, platform: str, tensor: int = 1) -> int:
    """Return `G`, the number of groups of key heads in the cache.

    Args:
      config: the configuration of the model, with `K` key heads.
      platform: what the program runs on, such as `tpu` or `cpu`.
      tensor: number of devices that the key heads are sharded over.

    Returns:
      On a TPU, the number of groups that wastes the fewest lanes; on a tie, the largest. It is a
      multiple of `tensor` if `K` is. On other platforms, `K`.

    Example:
      >>> from ppo_jax.models.sizes import SIZES
      >>> gpt2, llama3 = SIZES["gpt2"]("gpt2"), SIZES["llama3-8b"]("llama3-8b")
      >>> cache_groups(gpt2, "cpu"), cache_groups(gpt2, "tpu"), cache_groups(llama3, "tpu")
      (12, 6, 8)
    """
    K, C = config.key_heads, config.head_width
    if platform != "tpu":
        return K
    groups = [G for G in range(K, 0, -1) if K % G == 0 and (K % tensor or G % tensor == 0)]
    features = lambda G: K // G * C
    return min(groups, key=lambda G: -features(G) % _LANES / features(G))


def empty_cache(
    config: TransformerConfig, batch_size: int, slots: int, groups: int | None = None
) -> KVCache:
    """Return a cache without entries.

    Args:
      config: the configuration of the model.
      batch_size: `B`.
      slots: `N`.
      groups: `G`, by default that of `cache_groups` for the platform of the program.
    """
    groups = groups or cache_groups(config, platform(), free_size("tensor"))
    features = config.key_heads * config.head_width // groups
    layer = lambda: jnp.zeros((batch_size, groups, slots, features), config.dtype)
    layers = lambda: tuple(constrain(layer(), BATCH, "tensor") for _ in range(config.layers))
    mask = jnp.zeros((batch_size, slots), bool)
    return KVCache(keys=layers(), values=layers(), mask=mask, length=jnp.int32(0))


def group_heads(x_BKSC: Array, groups: int) -> Array:
    """Put the heads of each group side by side: from `[B, K, S, C]` to `[B, G, S, F]`."""
    B, K, S, C = x_BKSC.shape
    x = x_BKSC.reshape(B, groups, K // groups, S, C).swapaxes(2, 3)
    return x.reshape(B, groups, S, K // groups * C)


def separate_heads(x_BGSF: Array, heads: int) -> Array:
    """Undo `group_heads`: from `[B, G, S, F]` to `[B, K, S, C]`, where `K` is `heads`."""
    B, G, S, F = x_BGSF.shape
    x = x_BGSF.reshape(B, G, S, heads // G, F * G // heads).swapaxes(2, 3)
    return x.reshape(B, heads, S, F * G // heads)


def block_diagonal(q_BKQC: Array, groups: int, rows: int) -> tuple[Array, Array]:
    """Give each head of a group a row of queries that is 0 in the features of the other heads.

    Args:
      q_BKQC: queries.
      groups: `G`, the number of groups of key heads.
      rows: least number of rows of a group; rows of zeros are added if there are fewer.

    Returns:
      The queries `[B, G, I Q, F]`, and which features belong to each of the `I` heads,
      `[1, 1, I, 1, F]` bool. Features of a row that was added belong to no head.
    """
    B, K, Q, C = q_BKQC.shape
    count = max(K // groups, -(-rows // Q))
    head_F = jnp.arange(K // groups * C) // C
    own_IF = jnp.arange(count)[:, None] == head_F[None, :]
    own = own_IF[None, None, :, None, :]
    q = jnp.where(own, group_heads(q_BKQC, groups)[:, :, None], 0)
    return q.reshape(B, groups, count * Q, -1), own


def own_features(out: Array, own: Array, heads: int) -> Array:
    """Select from `[B, G, I Q, F]` the features of each head, `[B, K, Q, C]`."""
    B, G, _, F = out.shape
    # All terms but one of each sum are 0, so it is exact.
    out = jnp.sum(jnp.where(own, out.reshape(B, G, own.shape[2], -1, F), 0), axis=2)
    return separate_heads(out, heads)
