"""From logits to a token and its log-prob.

A sample takes two uniform numbers a row and inverts the cumulative distribution; the usual Gumbel trick needs one random number
for each word of the vocabulary, which costs more than the model in a small decode step.
"""

import chex
import jax
import jax.numpy as jnp

_BLOCK = 256  # words drawn as one before the word itself is drawn: two sums of about √V numbers instead of one of V


def filter_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Keeps the `k` largest logits of each row (and any that tie with the last of them); the others become `-inf`.

    Args:
      logits: `[..., V]` float.
      k: at least 1; a `k` over `V` keeps all.

    Returns:
      `[..., V]`, the type of `logits`.

    Example:
      >>> filter_top_k(jnp.array([1.0, 3.0, 2.0]), 2)
      Array([-inf,   3.,   2.], dtype=float32)
    """
    if k < 1:
        raise ValueError(f"top_k must be at least 1, not {k}.")
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def filter_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keeps the fewest words whose probability reaches `p` (the nucleus); the others become `-inf`.

    Args:
      logits: `[..., V]` float.
      p: in (0, 1]; 1 keeps all.

    Returns:
      `[..., V]`, the type of `logits`.

    Source:
      Holtzman et al. 2019 (https://arxiv.org/abs/1904.09751), section 3.1.

    Example:
      >>> filter_top_p(jnp.array([2.0, 1.0, 0.0]), 0.7)
      Array([  2.,   1., -inf], dtype=float32)
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], not {p}.")
    if p == 1:
        return logits
    largest_first = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(largest_first.astype(jnp.float32))
    before = (
        jnp.cumsum(probs, axis=-1) - probs
    )  # mass of the likelier words; a word stays if they fall short of p
    least = jnp.min(jnp.where(before < p, largest_first, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def process_logits(
    logits: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Temperature, then top-k, then top-p, in the order of `transformers`.

    Args:
      logits: `[..., V]` float.
      temperature: positive divisor.
      top_k, top_p: see `filter_top_k` and `filter_top_p`; `None` for none.

    Returns:
      `[..., V]` float32 logits of the distribution to sample from.

    Example:
      >>> process_logits(jnp.array([1.0, 3.0, 2.0]), temperature=0.5, top_k=2)
      Array([-inf,   6.,   4.], dtype=float32)
    """
    logits = logits.astype(jnp.float32) / temperature
    logits = logits if top_k is None else filter_top_k(logits, top_k)
    return logits if top_p is None else filter_top_p(logits, top_p)


def sample_token(key: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws a token from `softmax(logits)`.

    Args:
      key: `[]` typed key, consumed.
      logits: `[V]` float32; a token at `-inf` is never drawn. `jax.vmap` it over rows, a key for each.

    Returns:
      The token, `[]` int32, and its log-prob under `softmax(logits)`, `[]` float32.

    Example:
      >>> token, logprob = sample_token(jax.random.key(0), jnp.log(jnp.array([0.0, 0.0, 1.0])))
      >>> int(token), float(logprob)
      (2, 0.0)
    """
    chex.assert_rank(logits, 1)
    weights = jnp.exp(logits - jnp.max(logits))
    blocks = jnp.pad(weights, (0, -weights.size % _BLOCK)).reshape(-1, _BLOCK)
    mass = blocks.sum(axis=1)
    u, v = jax.random.uniform(key, (2,))  # one float32 is too coarse for words below 1e-7
    block = _first_beyond(mass, u * mass.sum())
    within = _first_beyond(blocks[block], v * mass[block])
    # Only weights of NaN leave the search past the end.
    token = jnp.minimum(block * _BLOCK + within, logits.size - 1).astype(jnp.int32)
    return token, logits[token] - jax.nn.logsumexp(logits)


def greedy_token(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest token (the first of several) and its log-prob under `softmax(logits)`; shapes as in `sample_token`.

    Example:
      >>> token, logprob = greedy_token(jnp.array([0.0, 0.0]))
      >>> int(token), round(float(logprob), 4)
      (0, -0.6931)
    """
    chex.assert_rank(logits, 1)
    token = jnp.argmax(logits).astype(jnp.int32)
    return token, logits[token] - jax.nn.logsumexp(logits)


def _first_beyond(weights: jax.Array, target: jax.Array) -> jax.Array:
    """First index at which the running sum of `weights` exceeds `target`; never one of weight 0.

    Where rounding leaves the whole sum at or below the target, the last index of positive weight.
    """
    beyond = (jnp.cumsum(weights) > target) & (weights > 0)
    last = weights.size - 1 - jnp.argmax(jnp.flip(weights > 0))
    return jnp.where(beyond.any(), jnp.argmax(beyond), last)
