"""From logits to the log-prob of a token and the entropy, in float32 whatever the compute type.

`response_view` says which positions belong to which actions; `scoring.forward_responses` has a model make no others.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

_LEAST = -128.0  # the exponential of this and less is 0 in float32


def response_view(x: jax.Array, prompt_length: int) -> jax.Array:
    """What belongs to the states before each response token, of an array over the positions of `[prompt | response]`.

    Action `t` is the token at position `P + t`; its state ends at position `P + t - 1`, and there its logits and its value are.

    Args:
      x: `[B, T - 1, ...]` one entry a position, of all but the last, after which nothing comes; `T = P + R`.
      prompt_length: `P`, at least 1.

    Returns:
      `[B, R, ...]`.

    Example:
      >>> tokens = jnp.array([[10, 11, 12, 20, 21]])  # P = 3, R = 2
      >>> response_view(tokens[:, :-1], 3)  # the last token of each state
      Array([[12, 20]], dtype=int32)
    """
    if not 1 <= prompt_length <= x.shape[1]:
        raise ValueError(
            f"prompt_length={prompt_length} must lie in 1 .. {x.shape[1]}, the positions of the array."
        )
    return x[:, prompt_length - 1 :]


def token_logprobs(logits: jax.Array, tokens: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """Log-prob of each token: `ℓ_a - logsumexp(ℓ)` with `ℓ = logits / temperature`.

    Args:
      logits: `[..., V]` float, any type; computed in float32.
      tokens: `[...]` int32, `0 <= token < V`.
      temperature: the one that the tokens were sampled with; positive.

    Returns:
      `[...]` float32, nats.

    Example:
      >>> token_logprobs(jnp.array([[0.0, 0.0, 0.0]]), jnp.array([2])).round(4)
      Array([-1.0986], dtype=float32)
    """
    chex.assert_equal_shape([logits[..., 0], tokens])
    logits = logits.astype(jnp.float32) / temperature
    # Relative to the largest logit, so that large logits cost no precision; log Σ alone then decides the last bits.
    logits = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jnp.log(jnp.sum(jnp.exp(logits), axis=-1))


def entropy(logits: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """Entropy `-Σᵥ π(v) log π(v)` of each position.

    Args:
      logits: `[..., V]` float; `-inf` marks a token that cannot be said and adds nothing.
      temperature: divides the logits.

    Returns:
      `[...]` float32, nats.

    Example:
      >>> entropy(jnp.zeros((1, 4))).round(4)
      Array([1.3863], dtype=float32)
    """
    logits = logits.astype(jnp.float32) / temperature
    logits = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits)
    total = jnp.sum(weights, axis=-1)
    # log Σ eᶻ - Σ eᶻ z / Σ eᶻ with z <= 0; where eᶻ is 0, 0 · log 0 is 0, in the gradient too.
    return jnp.log(total) - jnp.sum(weights * jnp.maximum(logits, _LEAST), axis=-1) / total


def chunked_logprobs_and_entropy(
    unembed: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    tokens: jax.Array,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies from hidden states, a chunk of positions at a time, so that `[B, R, V]` never exists.

    Each chunk's logits are made, used and dropped, and made again for the gradient.

    Args:
      unembed: `[B, S, D] -> [B, S, V]`, the logits of hidden states.
      hidden: `[B, R, D]` float, the states before each token.
      tokens: `[B, R]` int32.
      temperature: divides the logits.
      chunk: positions at a time, any number; `None` takes all at once.

    Returns:
      `logprobs` and `entropies`, `[B, R]` float32.

    Example:
      >>> hidden, tokens = jnp.ones((1, 3, 2)), jnp.array([[0, 1, 2]])
      >>> logprobs, entropies = chunked_logprobs_and_entropy(lambda h: h @ jnp.ones((2, 4)), hidden, tokens, chunk=2)
      >>> logprobs.round(4)
      Array([[-1.3863, -1.3863, -1.3863]], dtype=float32)
    """
    chex.assert_equal_shape_prefix([hidden, tokens], 2)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}.")

    def of(hidden, tokens):
        # The barrier makes the logits an array of their own: fused into the matmul or not, they round alike (see the
        # top of `models.layers`), so the ratio of a policy with itself is 1.
        logits = jax.lax.optimization_barrier(unembed(hidden))
        # A second one keeps the entropy's sums apart: log-probs are then the same bits where no entropy is asked for.
        apart = jax.lax.optimization_barrier(logits)
        return token_logprobs(logits, tokens, temperature=temperature), entropy(
            apart, temperature=temperature
        )

    length = tokens.shape[1]
    if chunk is None or chunk >= length:
        return of(hidden, tokens)
    of = jax.checkpoint(of, prevent_cse=False)
    whole = length // chunk * chunk
    chunks = jax.tree.map(
        lambda x: jnp.moveaxis(x[:, :whole].reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0),
        (hidden, tokens),
    )
    _, parts = jax.lax.scan(lambda _, xs: (None, of(*xs)), None, chunks)
    parts = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], whole), parts)
    if whole == length:
        return parts
    rest = of(hidden[:, whole:], tokens[:, whole:])
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), parts, rest)
