"""Losses that train a reward model: on pairs, on scores, on ordered classes."""

import chex
import jax
import jax.numpy as jnp
from jax import Array


def bradley_terry_loss(
    chosen: Array, rejected: Array, *, margin: float = 0.0
) -> tuple[Array, Array]:
    """`-E[log σ(r_chosen - r_rejected - margin)]`, and the share of pairs in the right order.

    Args:
      chosen, rejected: `[B]` float32 scores of each pair.
      margin: how far apart they must be.

    Returns:
      Loss (nats) and accuracy, `[]` float32 each.

    Source:
      Bradley & Terry 1952; Stiennon et al. 2020 (https://arxiv.org/abs/2009.01325), section 3.4.

    Example:
      >>> loss, accuracy = bradley_terry_loss(jnp.array([1.0]), jnp.array([1.0]))
      >>> round(float(loss), 4), float(accuracy)
      (0.6931, 0.0)
    """
    chex.assert_equal_shape([chosen, rejected])
    return -jnp.mean(jax.nn.log_sigmoid(chosen - rejected - margin)), jnp.mean(
        (chosen > rejected).astype(jnp.float32)
    )


def regression_loss(scores: Array, targets: Array) -> tuple[Array, Array]:
    """Mean squared error, and the share of signs that agree.

    Args:
      scores, targets: `[B]` float32.

    Example:
      >>> [float(x) for x in regression_loss(jnp.array([1.0, -1.0]), jnp.array([2.0, 1.0]))]
      [2.5, 0.5]
    """
    chex.assert_equal_shape([scores, targets])
    agree = (scores > 0) == (targets > 0)
    return jnp.mean((scores - targets) ** 2), jnp.mean(agree.astype(jnp.float32))


def ordinal_loss(scores: Array, classes: Array, thresholds: Array) -> tuple[Array, Array]:
    """Cumulative-link loss: `P(class > k) = σ(score - θ_k)`, so that one score orders all classes.

    Args:
      scores: `[B]` float32.
      classes: `[B]` int32 in `0 .. K`.
      thresholds: `[K]` float32, rising.

    Returns:
      Mean over rows of the summed binary cross-entropies (nats), and the share of classes predicted exactly.

    Source:
      McCullagh 1980, "Regression Models for Ordinal Data"; in this form Cao et al. 2019 (https://arxiv.org/abs/1901.07884).

    Example:
      >>> loss, accuracy = ordinal_loss(jnp.array([9.0]), jnp.array([1]), jnp.array([0.0]))
      >>> round(float(loss), 4), float(accuracy)
      (0.0001, 1.0)
    """
    chex.assert_rank([scores, classes, thresholds], 1)
    above = classes[:, None] > jnp.arange(thresholds.size)[None, :]
    logits = scores[:, None] - thresholds[None, :]
    loss = -jnp.sum(
        jnp.where(above, jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)), axis=1
    )
    return jnp.mean(loss), jnp.mean((jnp.sum(logits > 0, axis=1) == classes).astype(jnp.float32))
