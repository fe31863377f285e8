"""From logits to a sampled token and its log-prob.

`sample_token` draws two uniform numbers per row and inverts the cumulative distribution. The
Gumbel trick needs one random number per token of the vocabulary, and in a decode step of a small
model those would take longer than the model.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.masked import widen
from ppo_jax.ops.options import check_positive

# A token is drawn in two stages, first a block of this many tokens and then a token of the block.
# That takes two cumulative sums of about √V numbers instead of one of V.
_BLOCK = 256
# On a TPU, the sum of a block takes a while, because the block lies in the lanes of the registers.
# One of this many chunks of whole blocks is therefore drawn first.
_CHUNKS = 16


def filter_top_k(logits: Array, k: int) -> Array:
    """Keep the `k` largest logits of each row, and those equal to the last of them.

    Args:
      logits: `[..., V]` float.
      k: at least 1. If it is larger than `V`, all logits are kept.

    Returns:
      `[..., V]` of the type of `logits`; the other logits are `-inf`.

    Raises:
      ValueError: if `k` is less than 1.

    Source:
      Fan et al. 2018 (https://arxiv.org/abs/1805.04833), section 5.4.

    Example:
      >>> filter_top_k(jnp.array([1.0, 3.0, 2.0]), 2)
      Array([-inf,   3.,   2.], dtype=float32)
    """
    if k < 1:
        raise ValueError(f"top_k must be at least 1, not {k}.")
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def filter_top_p(logits: Array, p: float) -> Array:
    """Keep the fewest tokens whose probabilities add up to at least `p` (the nucleus).

    Tokens that are as likely as the last of them are kept too.

    Args:
      logits: `[..., V]` float.
      p: in (0, 1]. With 1, all logits are kept.

    Returns:
      `[..., V]` of the type of `logits`; the other logits are `-inf`.

    Raises:
      ValueError: if `p` is not in (0, 1].

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
    descending = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(descending.astype(jnp.float32))
    # A token is kept if the tokens more likely than it have a probability below p together.
    likelier = jnp.cumsum(probs, axis=-1) - probs
    least = jnp.min(jnp.where(likelier < p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def process_logits(
    logits: Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Array:
    """Apply the temperature, then top-k, then top-p, which is the order of `transformers`.

    Args:
      logits: `[..., V]` float.
      temperature: divides the logits; positive.
      top_k: see `filter_top_k`. `None` keeps all logits.
      top_p: see `filter_top_p`. `None` keeps all logits.

    Returns:
      `[..., V]` float32, the logits of the distribution to sample from.

    Raises:
      ValueError: if `temperature` is not positive, `top_k` is less than 1 or `top_p` is not in
        (0, 1].

    Example:
      >>> process_logits(jnp.array([1.0, 3.0, 2.0]), temperature=0.5, top_k=2)
      Array([-inf,   6.,   4.], dtype=float32)
    """
    check_positive(temperature=temperature)
    logits = logits.astype(jnp.float32) / temperature
    logits = logits if top_k is None else filter_top_k(logits, top_k)
    return logits if top_p is None else filter_top_p(logits, top_p)


def sample_token(key: Array, logits: Array) -> tuple[Array, Array]:
    """Draw one token from `softmax(logits)`. For a batch, `jax.vmap` it with a key per row.

    Args:
      key: `[]` typed key, consumed.
      logits: `[V]` float. A token with the logit `-inf` is never drawn.

    Returns:
      The token, `[]` int32, and its log-prob under `softmax(logits)`, `[]` float32 in nats.

    Raises:
      AssertionError: if `logits` is not `[V]`.

    Source:
      Devroye 1986, "Non-Uniform Random Variate Generation", chapter III.2 (inversion).

    Example:
      >>> logits = jnp.log(jnp.array([0.0, 0.0, 1.0]))
      >>> token, logprob = sample_token(jax.random.key(0), logits)
      >>> int(token), float(logprob)
      (2, 0.0)
    """
    chex.assert_rank(logits, 1)
    logits = widen(logits)
    # Two numbers, because one float32 is too coarse for tokens of a probability below 1e-7.
    numbers = jax.random.uniform(key, (2,), jnp.float32)
    return jax.lax.platform_dependent(logits, numbers, tpu=by_chunks, default=by_blocks)


def by_blocks(logits: Array, numbers: Array) -> tuple[Array, Array]:
    """Return what `sample_token` does, given two uniform numbers."""
    weights = jnp.exp(logits - jnp.max(logits))
    blocks = jnp.pad(weights, (0, -weights.size % _BLOCK)).reshape(-1, _BLOCK)
    mass = blocks.sum(axis=1)
    token = _in_blocks(blocks, mass, numbers[0] * mass.sum(), numbers[1])
    # The minimum matters only if the weights are NaN. It keeps the token in the vocabulary then.
    token = jnp.minimum(token, logits.size - 1)
    return token, logits[token] - jax.nn.logsumexp(logits)


def by_chunks(logits: Array, numbers: Array) -> tuple[Array, Array]:
    """Return what `by_blocks` does, up to rounding, by sums that suit a TPU."""
    size = -(-logits.size // (_CHUNKS * _BLOCK)) * _BLOCK
    fill = lambda x: jnp.pad(x, (0, size - x.size), constant_values=-jnp.inf)
    chunks = [fill(logits[begin : begin + size]) for begin in range(0, logits.size, size)]
    largest = jnp.max(logits)
    mass = jnp.stack([jnp.sum(jnp.exp(chunk - largest)) for chunk in chunks])
    target = numbers[0] * mass.sum()
    number = _first_beyond(mass, target)
    before = jnp.sum(jnp.where(jnp.arange(len(chunks)) < number, mass, 0))
    chosen = chunks[0]
    for i, chunk in enumerate(chunks[1:], start=1):  # A gather would copy all chunks first.
        chosen = jnp.where(number == i, chunk, chosen)
    blocks = jnp.exp(chosen - largest).reshape(-1, _BLOCK)
    token = number * size + _in_blocks(blocks, blocks.sum(axis=1), target - before, numbers[1])
    token = jnp.minimum(token, logits.size - 1).astype(jnp.int32)
    return token, logits[token] - (largest + jnp.log(mass.sum()))


def _in_blocks(blocks: Array, mass: Array, target: Array, number: Array) -> Array:
    """Draw a token of the weights `[n, 256]`: first a block, then a token of it.

    Args:
      blocks: the weights.
      mass: their sums `[n]`.
      target: a uniform number times the sum of all weights; it chooses the block.
      number: a uniform number, which chooses the token.
    """
    block = _first_beyond(mass, target)
    within = _first_beyond(blocks[block], number * mass[block])
    return (block * _BLOCK + within).astype(jnp.int32)


def greedy_token(logits: Array) -> tuple[Array, Array]:
    """Choose the most likely token, the first of several. For a batch, `jax.vmap` it.

    Args:
      logits: `[V]` float.

    Returns:
      The token, `[]` int32, and its log-prob under `softmax(logits)`, `[]` float32 in nats.

    Raises:
      AssertionError: if `logits` is not `[V]`.

    Example:
      >>> token, logprob = greedy_token(jnp.array([0.0, 0.0]))
      >>> int(token), round(float(logprob), 4)
      (0, -0.6931)
    """
    chex.assert_rank(logits, 1)
    logits = widen(logits)
    token = jnp.argmax(logits).astype(jnp.int32)
    return token, logits[token] - jax.nn.logsumexp(logits)


def _first_beyond(weights: Array, target: Array) -> Array:
    """Find the first index of positive weight at which the cumulative sum exceeds `target`.

    If rounding leaves the whole sum at or below the target, it is the last index of positive
    weight.
    """
    n, index = weights.size, jnp.arange(weights.size)
    positive = weights > 0
    beyond = positive & (jnp.cumsum(weights) > target)
    # Those beyond come first, in their order; then the other positive ones, the last one first.
    order = jnp.where(beyond, index, jnp.where(positive, 2 * n - 1 - index, 2 * n))
    first = jnp.min(order)
    return jnp.where(first < n, first, (2 * n - 1 - first) % n)
