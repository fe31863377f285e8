"""Log-probs of tokens and entropies from logits, in float32 whatever the type of the logits."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.options import check_positive

_UNDERFLOW = -128.0  # exp(x) is 0 in float32 for every x up to this.


def response_view(x: Array, prompt_length: int) -> Array:
    """Select what belongs to the states before each response token.

    Action `t` is the token at position `P + t`. Its state ends at position `P + t - 1`, and the
    logits and the value for that action are computed there.

    Args:
      x: `[B, T - 1, ...]` of any dtype, one entry per position of `[prompt | response]` but the
        last, which precedes no token; `T = P + R`.
      prompt_length: `P`, at least 1.

    Returns:
      `[B, R, ...]`, the entries at positions `P - 1` to `T - 2`.

    Raises:
      ValueError: if `prompt_length` is not between 1 and `T - 1`.

    Example:
      >>> tokens = jnp.array([[10, 11, 12, 20, 21]])  # P = 3, R = 2
      >>> response_view(tokens[:, :-1], 3)  # The last token of each state.
      Array([[12, 20]], dtype=int32)
    """
    if not 1 <= prompt_length <= x.shape[1]:
        raise ValueError(
            f"prompt_length={prompt_length} must lie in 1 .. {x.shape[1]}, the positions of x."
        )
    return x[:, prompt_length - 1 :]


def _tempered(logits: Array, temperature: float, largest: Array | None = None) -> Array:
    """Divide by the temperature, in float32, and subtract the largest logit to keep precision."""
    check_positive(temperature=temperature)
    logits = logits.astype(jnp.float32) / temperature
    if largest is None:
        largest = jnp.max(logits, axis=-1, keepdims=True)
    return logits - jax.lax.stop_gradient(largest)


def token_logprobs(logits: Array, tokens: Array, *, temperature: float = 1.0) -> Array:
    """Compute the log-prob of each token.

        log π(a) = ℓ_a - log Σᵥ exp(ℓ_v),  with ℓ = logits / temperature

    Args:
      logits: `[..., V]` float of any precision.
      tokens: `[...]` int32, with `0 <= token < V`.
      temperature: the temperature that the tokens were sampled with; positive.

    Returns:
      `[...]` float32, in nats.

    Raises:
      AssertionError: if `tokens` does not have the leading shape of `logits`.
      ValueError: if `temperature` is not positive.

    Example:
      >>> token_logprobs(jnp.array([[0.0, 0.0, 0.0]]), jnp.array([2])).round(4)
      Array([-1.0986], dtype=float32)
    """
    chex.assert_equal_shape([logits[..., 0], tokens])
    return _logprobs(_tempered(logits, temperature), tokens)


def _logprobs(logits: Array, tokens: Array) -> Array:
    """Compute the log-prob of each token from logits that are at most 0."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jnp.log(jnp.sum(jnp.exp(logits), axis=-1))


def entropy(logits: Array, *, temperature: float = 1.0) -> Array:
    """Compute the entropy of the distribution at each position.

        H = -Σᵥ π(v) log π(v),  with π = softmax(logits / temperature)

    Args:
      logits: `[..., V]` float of any precision. A token with the logit `-inf` adds nothing.
      temperature: divides the logits; positive.

    Returns:
      `[...]` float32, in nats.

    Raises:
      ValueError: if `temperature` is not positive.

    Example:
      >>> entropy(jnp.zeros((1, 4))).round(4)
      Array([1.3863], dtype=float32)
    """
    return _entropy(_tempered(logits, temperature))


def _entropy(logits: Array) -> Array:
    """Compute the entropy from logits that are at most 0."""
    weights = jnp.exp(logits)
    total = jnp.sum(weights, axis=-1)
    # H = log Σ eᶻ - Σ eᶻ z / Σ eᶻ. The maximum makes 0 · log 0 count as 0, also in the gradient.
    return jnp.log(total) - jnp.sum(weights * jnp.maximum(logits, _UNDERFLOW), axis=-1) / total


def chunked_logprobs_and_entropy(
    unembed: Callable[[Array], Array],
    hidden: Array,
    tokens: Array,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """Compute log-probs and entropies from hidden states without storing all logits `[B, R, V]`.

    Each chunk of positions computes its logits, reduces them and drops them. The gradient
    recomputes them.

    Args:
      unembed: computes the logits `[B, S, V]` of hidden states `[B, S, D]`.
      hidden: `[B, R, D]` float, the states before each token.
      tokens: `[B, R]` int32, with `0 <= token < V`.
      temperature: the temperature that the tokens were sampled with; positive.
      chunk: the number of positions per chunk, which need not divide `R`. `None` takes all
        positions at once.

    Returns:
      Log-probs and entropies, `[B, R]` float32 each, in nats.

    Raises:
      AssertionError: if `tokens` is not `[B, R]`.
      ValueError: if `chunk` is less than 1, or `temperature` is not positive.

    Example:
      >>> hidden, tokens = jnp.ones((1, 3, 2)), jnp.array([[0, 1, 2]])
      >>> logprobs, entropies = chunked_logprobs_and_entropy(
      ...     lambda h: h @ jnp.ones((2, 4)), hidden, tokens, chunk=2
      ... )
      >>> logprobs.round(4)
      Array([[-1.3863, -1.3863, -1.3863]], dtype=float32)
    """
    chex.assert_equal_shape_prefix([hidden, tokens], 2)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}.")

    def compute(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, tokens = inputs
        shape, tokens = tokens.shape, tokens.reshape(-1)
        # The barrier keeps XLA from fusing the logits with their use, which would round them
        # differently in different programs. The ratio of a policy with itself is then exactly 1.
        logits = unembed(hidden)
        logits = jax.lax.optimization_barrier(logits.reshape(-1, logits.shape[-1]))
        with jax.named_scope("logprobs"):  # The benchmark of the TPU reads this name.
            # The second barrier keeps the sums of the entropy apart from those of the log-probs,
            # which then have the same bits in a program that does not compute the entropy.
            separate = jax.lax.optimization_barrier(logits)
            largest = jnp.max(logits.astype(jnp.float32) / temperature, axis=-1, keepdims=True)
            logprobs = _logprobs(_tempered(logits, temperature, largest), tokens)
            entropies = _entropy(_tempered(separate, temperature, largest))
        return logprobs.reshape(shape), entropies.reshape(shape)

    inputs, length = (hidden, tokens), tokens.shape[1]
    if chunk is None or chunk >= length:
        return compute(inputs)
    compute = jax.checkpoint(compute, prevent_cse=False)
    full = length // chunk * chunk  # The positions of full chunks; the rest is a shorter chunk.

    def split(x: Array) -> Array:
        """Reshape `[B, R, ...]` to `[chunks, B, chunk, ...]`."""
        return jnp.moveaxis(x[:, :full].reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    parts = jax.lax.map(compute, jax.tree.map(split, inputs))
    parts = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], full), parts)
    if full == length:
        return parts
    rest = compute(jax.tree.map(lambda x: x[:, full:], inputs))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), parts, rest)
