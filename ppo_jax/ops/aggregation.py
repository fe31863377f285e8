"""How a loss weighs its tokens: more choices beside the means of `ops.masked`.

Each is a sum over tokens with its own divisor, so the parts of all micro-batches and devices add up
to the loss of the minibatch.
"""

import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.masked import Aggregation, check_mask, masked_mean, sequence_count
from ppo_jax.types import AxisName


def _one(mask: Array, *, axis_name: AxisName | None = None) -> Array:
    """The divisor 1 of a sum."""
    check_mask(mask)
    return jnp.float32(1)


TOKEN_SUM = Aggregation(masked_mean, _one)
"""The sum over all tokens of the minibatch. Use it with `masked_mean(x, mask, count=1)`."""

SEQUENCE_SUM = Aggregation(masked_mean, sequence_count)
"""The mean over responses of the sum over the tokens of each, so that long ones count more."""


def constant_length(length: float | None = None) -> Aggregation:
    """Divide the sum over the tokens of each response by a constant instead of its length.

        mean(x) = Σ_tokens x / (responses · length)

    The length of a response then does not change the weight of its tokens (Dr. GRPO).

    Args:
      length: the constant in tokens; positive. `None` for the number of response positions R, which
        is `max_new_tokens`.

    Returns:
      The aggregation, for `ppo_loss_fn` and `ppo_update`.

    Raises:
      ValueError: if `length` is not positive.

    Source:
      Liu et al. 2025 (https://arxiv.org/abs/2503.20783), section 3.2. Checked against
      `seq-mean-token-sum-norm` of verl.

    Example:
      >>> x, mask = jnp.array([[1.0, 3.0], [8.0, 0.0]]), jnp.array([[True, True], [True, False]])
      >>> by_constant = constant_length(4)
      >>> by_constant.mean(x, mask, count=by_constant.count(mask))
      Array(1.5, dtype=float32)
    """
    if length is not None and not length > 0:
        raise ValueError(f"length must be positive, or None for all positions, but is {length}.")

    def count(mask: Array, *, axis_name: AxisName | None = None) -> Array:
        constant = mask.shape[1] if length is None else length
        return sequence_count(mask, axis_name=axis_name) * constant

    return Aggregation(masked_mean, count)
