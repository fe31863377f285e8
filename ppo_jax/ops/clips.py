"""What the clip of a loss does to each token: whether it is out of range, and keeps its gradient.

Each loss of the policy that clips has such a function next to it, with the same keywords, and
`ops.metrics.policy_metrics` turns its result into shares of tokens.
"""

from typing import NamedTuple, Protocol

from jax import Array

from ppo_jax.ops.options import check_not_negative, check_over_one, check_unit
from ppo_jax.ops.ratios import policy_ratio


class Clip(NamedTuple):
    """The tokens that the clip of a loss concerns, `[B, R]` bool each.

    Attributes:
      low: tokens below the range of the loss.
      high: tokens above the range of the loss.
      positive: tokens that lose their gradient if their advantage is above 0; None for a loss that
        bounds weights but drops no token.
      negative: tokens that lose their gradient if their advantage is below 0, apart from `dual`;
        None for a loss that drops no token.
      dual: tokens that lose their gradient to the dual clip if their advantage is below 0; None
        without a dual clip.

    Example:
      >>> import jax.numpy as jnp
      >>> ratio = jnp.array([[0.5, 1.0]])
      >>> Clip(ratio < 0.8, ratio > 1.2).low
      Array([[ True, False]], dtype=bool)
    """

    low: Array
    high: Array
    positive: Array | None = None
    negative: Array | None = None
    dual: Array | None = None


class ClipFn(Protocol):
    """Says what the clip of a loss does to tokens; `functools.partial(ratio_clip, ...)` is one."""

    def __call__(self, logprobs: Array, old_logprobs: Array, mask: Array) -> Clip:
        """Return the tokens that the clip concerns; those outside the mask do not matter."""


def ratio_clip(
    logprobs: Array,
    old_logprobs: Array,
    mask: Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Clip:
    """Say what the clip of PPO does to each token, for `clipped_policy_loss`.

    A token with a positive advantage loses its gradient above the range, and one with a negative
    advantage below it.

    Args:
      logprobs: `[B, R]` float32, of the policy that trains, in nats.
      old_logprobs: `[B, R]` float32, of the policy that sampled the tokens, in nats.
      mask: `[B, R]` bool, true for the tokens in the policy loss.
      clip_low: a token whose ratio is below `1 - clip_low` is below the range.
      clip_high: a token whose ratio is above `1 + clip_high` is above the range.
      dual_clip: a token whose ratio is above this and whose advantage is negative loses its
        gradient to the dual clip. `None` for no dual clip.

    Returns:
      The tokens that the clip concerns. Ratios beyond e^±20, which have no gradient either, count
      by these rules too.

    Raises:
      AssertionError: if the shapes differ, or the mask is not bool.
      ValueError: if a bound is out of its range.

    Source:
      Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), eq. 7.

    Example:
      >>> import jax.numpy as jnp
      >>> x, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
      >>> ratio_clip(x.at[0, 0].set(0.5), x, mask, clip_low=0.2, clip_high=0.2).high
      Array([[ True, False]], dtype=bool)
    """
    check_unit(clip_low=clip_low)
    check_not_negative(clip_high=clip_high)
    check_over_one(dual_clip=dual_clip)
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
    return Clip(low, high, high, low, None if dual_clip is None else ratio > dual_clip)
