"""The KL penalty as a part of the loss, with the gradient of the KL divergence."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.kl import kl_k2
from ppo_jax.ops.masked import masked_mean
from ppo_jax.ops.ratios import hide_masked, policy_ratio
from ppo_jax.types import Aggregate, KLEstimatorFn


def kl_loss(
    logprobs: Array,
    ref_logprobs: Array,
    mask: Array,
    *,
    estimator: KLEstimatorFn = kl_k2,
    old_logprobs: Array | None = None,
    aggregate: Aggregate = masked_mean,
) -> Array:
    """Estimate KL(π ‖ π_ref) by a loss whose gradient is that of k2, whatever its value.

        d = log π(a|s) - log π_ref(a|s),  w = sg(π(a|s) / π_old(a|s))
        value of a token = w · estimator
        gradient         = w · d · ∇ log π(a|s)

    With tokens sampled from π, this is the gradient of the KL of each next-token distribution, and
    the same as that of a policy gradient with k1 as a negative reward. Putting another estimator
    into a loss, as in `aggregate(kl_k3(logprobs, ref_logprobs), mask)`, gives a different gradient:
    for k1 it is 0 on average, and for k3 it is `(1 - π_ref/π) ∇ log π`, which is biased. `w` makes
    up for tokens that were sampled from an older policy.

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats. The gradient flows through them.
      ref_logprobs: `[B, R]` float32, log π_ref(a|s), in nats. They are constants.
      mask: `[B, R]` bool, true for the tokens that count.
      estimator: gives the value, such as `kl_k1`, `kl_k2` or `kl_k3`; not one that reads logits.
      old_logprobs: `[B, R]` float32, log π_old(a|s) of the policy that sampled the tokens, in nats.
        `None` if that policy was π.
      aggregate: reduces the terms to one number.

    Returns:
      `[]` float32, in nats, to be added to a loss with the weight β.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.

    Source:
      Liu et al. 2025 (https://arxiv.org/abs/2510.01555); Shah et al. 2025
      (https://arxiv.org/abs/2512.21852). Checked against `k3+` of verl, and with `old_logprobs`
      against slime, where w is not constant: in its `w · k3` the gradients add up to the same.

    Example:
      >>> from ppo_jax.ops.kl import kl_k3
      >>> x, mask = jnp.array([[-1.0]]), jnp.array([[True]])
      >>> value, slope = jax.value_and_grad(kl_loss)(x, x - 0.5, mask, estimator=kl_k3)
      >>> value.round(4), slope
      (Array(0.1065, dtype=float32), Array([[0.5]], dtype=float32))
    """
    weights = jnp.ones_like(mask, dtype=jnp.float32)
    if old_logprobs is not None:
        weights = jax.lax.stop_gradient(policy_ratio(logprobs, old_logprobs, mask))
    logprobs, ref_logprobs = hide_masked(mask, logprobs, ref_logprobs)
    ref_logprobs = jax.lax.stop_gradient(ref_logprobs)
    k2 = kl_k2(logprobs, ref_logprobs)
    value = jax.lax.stop_gradient(estimator(logprobs, ref_logprobs))
    chex.assert_equal_shape([value, mask])
    return aggregate(weights * (value + (k2 - jax.lax.stop_gradient(k2))), mask)
