"""Short hashes of arrays and of host data, to tell accidents apart."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def digest(tree: Any) -> str:
    """16 hexadecimal digits that tell two trees of arrays apart, down to a bit.

    Each array counts as two sums, modulo 2³², of its words mixed with their positions. Integer sums have no order, so the digest is
    the same on any number of devices, and no array comes to the host. No cryptography: it finds accidents, not forgers.

    Args:
      tree: a pytree of arrays of up to 4 bytes an element, typed keys among them.

    Example:
      >>> digest({"a": jnp.arange(3.0)}) == digest({"a": jnp.arange(3.0)}) != digest({"a": jnp.arange(3.0).at[2].set(2.0000002)})
      True
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # One at a time: virtual CPU devices that run several programs with sums at once wait for each other.
    sums = [jax.device_get(_fingerprint(_plain(x))) for _, x in leaves]
    whole = hashlib.sha256()
    for (path, x), pair in zip(leaves, sums, strict=True):
        whole.update(
            f"{jax.tree_util.keystr(path)} {np.shape(x)} {jnp.result_type(x)} {pair[0]:08x}{pair[1]:08x}\n".encode()
        )
    return whole.hexdigest()[:16]


def _plain(x: Any) -> jax.Array:
    return (
        jax.random.key_data(x)
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
        else jnp.asarray(x)
    )


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    """`[2]` uint32. No reshape, so a sharded array stays where it is."""
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(
        jnp.uint32
    )
    at, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        at += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.stack(
        [
            jnp.sum(_mix(words ^ _mix(at + jnp.uint32(salt))), dtype=jnp.uint32)
            for salt in (0x9E3779B9, 0x7F4A7C15)
        ]
    )


def _mix(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: a bijection of 32-bit words, so no change of one word is lost."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def text_hash(*parts: Any) -> str:
    """16 hexadecimal digits of host data: numpy arrays, and whatever else by its `repr`."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(
            np.ascontiguousarray(part).tobytes()
            if isinstance(part, np.ndarray)
            else repr(part).encode()
        )
    return whole.hexdigest()[:16]
