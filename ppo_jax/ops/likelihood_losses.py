"""Losses of the policy without a clipped ratio: DRO, and the likelihood of good responses."""

from jax import Array

from ppo_jax.ops.masked import check_dtype, check_mask, masked_mean
from ppo_jax.ops.options import check_positive
from ppo_jax.ops.ratios import hide_masked
from ppo_jax.types import Aggregate


def dro_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    beta: float,
    aggregate: Aggregate = masked_mean,
) -> Array:
    """Replace the clip by a quadratic penalty of the log-ratio (DRO).

        L = -E[ A log π(a|s) - β/2 log(π(a|s) / π_old(a|s))² ]

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats. The gradient flows through them.
      old_logprobs: `[B, R]` float32, log π_old(a|s) of the policy that sampled the tokens, in nats.
      advantages: `[B, R]` float32.
      mask: `[B, R]` bool, true for the tokens that count.
      beta: β, positive.
      aggregate: reduces the terms to one number.

    Returns:
      `[]` float32.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if `beta` is not positive.

    Source:
      Richemond et al. 2024 (https://arxiv.org/abs/2405.19107), with one term per token as in verl,
      against which it was checked.

    Example:
      >>> import jax.numpy as jnp
      >>> x, mask = jnp.full((1, 1), -1.0), jnp.ones((1, 1), bool)
      >>> dro_loss(x, x - 1, x + 3, mask, beta=0.5)
      Array(2.25, dtype=float32)
    """
    check_positive(beta=beta)
    logprobs, old, advantages = hide_masked(mask, logprobs, old_logprobs, advantages)
    return -aggregate(advantages * logprobs - 0.5 * beta * (logprobs - old) ** 2, mask)


def positive_nll_loss(
    logprobs: Array, good: Array, mask: Array, *, aggregate: Aggregate = masked_mean
) -> Array:
    """Compute the negative log-likelihood of good responses, to be added to a policy loss (VAPO).

        L = -E[ log π(a|s) | the response is good ]

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats. The gradient flows through them.
      good: `[B]` bool, true for responses to imitate, such as those with a correct answer.
      mask: `[B, R]` bool, true for the tokens that count.
      aggregate: reduces the terms, given the mask of the tokens of good responses, to one number.
        For a micro-batch, divide by the number of those tokens in the whole minibatch.

    Returns:
      `[]` float32; 0 if no response is good. VAPO adds it with the weight 0.1.

    Raises:
      AssertionError: if the shapes are not those above, or a mask is not bool.

    Source:
      Yue et al. 2025, VAPO (https://arxiv.org/abs/2504.05118), positive example LM loss. Checked
      against NeMo RL.

    Example:
      >>> import jax.numpy as jnp
      >>> logprobs, mask = jnp.array([[-1.0, -3.0], [-5.0, -5.0]]), jnp.ones((2, 2), bool)
      >>> positive_nll_loss(logprobs, jnp.array([True, False]), mask)
      Array(2., dtype=float32)
    """
    check_dtype(bool, good=good)
    check_mask(mask, logprobs)
    kept = mask & good[:, None]
    (logprobs,) = hide_masked(kept, logprobs)
    return -aggregate(logprobs, kept)
