"""Helpers that build the methods listed in `ppo_jax.ppo.choices`."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from jax import Array

from ppo_jax.ops import kl, losses
from ppo_jax.ops.clips import ClipFn, ratio_clip
from ppo_jax.ops.importance import Level, bounded_weights, truncated_weights
from ppo_jax.ops.metrics import policy_metrics
from ppo_jax.ops.ratios import hide_masked
from ppo_jax.types import AdvantageFn, Aggregate, LossMetrics

if TYPE_CHECKING:
    from ppo_jax.ppo.settings import PPOConfig


def with_policy_loss(
    config: "PPOConfig", policy_loss: losses.PolicyLossFn, clip: ClipFn | None = None
) -> tuple[losses.ResponseLossFn, Callable[..., LossMetrics]]:
    """Combine a loss of the policy with the value loss, entropy and metrics of the settings.

    Args:
      config: the settings.
      policy_loss: the loss of the policy with its hyper-parameters bound.
      clip: says what the clip of that loss does to tokens, such as `functools.partial(dis_clip,
        clip_low=0.3, clip_high=5.0)`. By default no share of clipped tokens is reported.

    Returns:
      The loss of `[B, R]` arrays and its metrics, as `ppo_loss_fn` takes them.

    Example:
      >>> from ppo_jax import PPOConfig, sapo_loss
      >>> loss, metrics = with_policy_loss(PPOConfig(vf_coef=0.5), sapo_loss)
      >>> loss.keywords["vf_coef"]
      0.5
    """
    loss = partial(
        losses.actor_critic_loss,
        policy_loss=policy_loss,
        value_clip=config.value_clip,
        vf_coef=config.vf_coef,
        entropy_coef=config.entropy_coef,
    )
    return loss, partial(policy_metrics, clip=clip)


def clipped(
    policy_loss: Callable[..., Array], clip: Callable[..., Any], **options: Any
) -> Callable[["PPOConfig"], Any]:
    """Make a loss from a loss of the policy and its clip, with the bounds of the settings."""

    def make(config: "PPOConfig") -> Any:
        bounds: dict[str, Any] = {
            "clip_low": config.clip_low,
            "clip_high": config.clip_high,
            **options,
        }
        return with_policy_loss(config, partial(policy_loss, **bounds), partial(clip, **bounds))

    return make


def unclipped(policy_loss: losses.PolicyLossFn) -> Callable[["PPOConfig"], Any]:
    """Make a loss from a loss of the policy that reads no setting and clips nothing."""
    return lambda config: with_policy_loss(config, policy_loss)


def with_settings(make: Callable[..., AdvantageFn]) -> Callable[..., AdvantageFn]:
    """Make a function of the settings from a maker of estimators that takes some of them.

    Those are the parameters of the maker that have no default.
    """
    parameters = inspect.signature(make).parameters.items()
    names = [name for name, parameter in parameters if parameter.default is parameter.empty]
    return lambda config, axis_name=None: make(**{name: getattr(config, name) for name in names})


def clipped_ppo(config: "PPOConfig") -> tuple[losses.ResponseLossFn, Callable[..., LossMetrics]]:
    """Make the clipped PPO loss and its metrics with the hyper-parameters of the settings.

    Args:
      config: the settings.

    Returns:
      The loss of `[B, R]` arrays and its metrics, as `ppo_loss_fn` takes them.

    Example:
      >>> from ppo_jax import PPOConfig
      >>> loss, metrics = clipped_ppo(PPOConfig(clip_high=0.28))
      >>> loss.keywords["clip_high"], metrics.keywords["clip"].keywords["clip_high"]
      (0.28, 0.28)
    """
    low, high, dual = config.clip_low, config.clip_high, config.dual_clip
    loss = partial(
        losses.ppo_loss,
        clip_low=low,
        clip_high=high,
        value_clip=config.value_clip,
        vf_coef=config.vf_coef,
        entropy_coef=config.entropy_coef,
        dual_clip=dual,
    )
    clip = partial(ratio_clip, clip_low=low, clip_high=high, dual_clip=dual)
    return loss, partial(policy_metrics, clip=clip)


def plain_k3(
    logprobs: Array, ref_logprobs: Array, mask: Array, *, old_logprobs: Array, aggregate: Aggregate
) -> Array:
    """Return the estimate k3 itself as a loss, whose gradient is biased."""
    return aggregate(kl.kl_k3(*hide_masked(mask, logprobs, ref_logprobs)), mask)


def truncated(low: float, high: float, *, by_response: bool = False) -> Callable[..., Array]:
    """Make weights that are cut off at two bounds, of tokens or of whole responses."""
    level = Level.SEQUENCE if by_response else Level.TOKEN
    return partial(truncated_weights, low=low, high=high, level=level)


def bounded(low: float, high: float, *, by_response: bool = False) -> Callable[..., Array]:
    """Make weights that are 0 outside two bounds, of tokens or of whole responses."""
    level = Level.SEQUENCE if by_response else Level.TOKEN
    return partial(bounded_weights, low=low, high=high, level=level)
