"""Compute short hashes of arrays and other data, to tell whether two runs are the same."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def digest(tree: Any) -> str:
    """Hash a pytree of arrays by their names, shapes, types and all bits of their elements.

    Each array is reduced on its device to two sums, modulo 2³², of its elements as integers, mixed
    with their positions. The order of an integer sum does not matter, so the digest is the same on
    any number of devices, and no array is copied to the host. The hash detects accidental changes.
    It is not cryptographic.

    Args:
      tree: a pytree of arrays of at most 4 bytes per element, or of typed keys.

    Returns:
      16 hexadecimal digits.

    Example:
      >>> x = jnp.arange(3.0)
      >>> digest({"a": x}) == digest({"a": jnp.arange(3.0)})
      True
      >>> digest({"a": x}) == digest({"a": x.at[2].set(2.0000002)})
      False
    """
    sha = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        # One array at a time, because several programs with reductions can deadlock on virtual
        # CPU devices if they run at once.
        first, second = jax.device_get(_fingerprint(_as_array(x)))
        name, dtype = jax.tree_util.keystr(path), jnp.result_type(x)
        sha.update(f"{name} {np.shape(x)} {dtype} {first:08x}{second:08x}\n".encode())
    return sha.hexdigest()[:16]


def _as_array(x: Any) -> Array:
    """Convert typed keys to their data, and anything else to an array."""
    is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else jnp.asarray(x)


@jax.jit
def _fingerprint(x: Array) -> Array:
    """Reduce an array to two sums, `[2]` uint32, without a reshape, which would copy shards."""
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    words = words.astype(jnp.uint32)
    position, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position += index * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    sums = [
        jnp.sum(_mix(words ^ _mix(position + jnp.uint32(salt))), dtype=jnp.uint32)
        for salt in (0x9E3779B9, 0x7F4A7C15)
    ]
    return jnp.stack(sums)


def _mix(x: Array) -> Array:
    """Apply the finalizer of MurmurHash3, a bijection of 32-bit integers that mixes their bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def text_hash(*parts: Any) -> str:
    """Hash values on the host: numpy arrays by their bytes, and any other value by its `repr`.

    Args:
      *parts: the values to hash, in order.

    Returns:
      16 hexadecimal digits.

    Example:
      >>> text_hash("a", 1) == text_hash("a", 1), text_hash("a", 1) == text_hash("a", 2)
      (True, False)
    """
    sha = hashlib.sha256()
    for part in parts:
        is_array = isinstance(part, np.ndarray)
        sha.update(np.ascontiguousarray(part).tobytes() if is_array else repr(part).encode())
    return sha.hexdigest()[:16]
