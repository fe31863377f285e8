"""The optimizers of policy and critic: AdamW with warm-up, decay and gradient clipping."""

import functools
from typing import Any

import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map
from jax import Array

from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.types import Params


def policy_optimizer(config: PPOConfig, updates: int) -> optax.GradientTransformation:
    """Return the policy's optimizer for a run of `updates` updates.

    Equal settings return the same object.
    """
    updates_of_policy = max(1, updates - config.critic.warmup_updates)
    return _of_settings(config, config, config.epochs, updates_of_policy)


def critic_optimizer(config: PPOConfig, updates: int) -> optax.GradientTransformation:
    """Return the critic's own optimizer, which needs `critic.learning_rate`."""
    adam = _of_settings(config, config.critic, config.critic_epochs, updates)
    return without_attention(adam) if config.critic.freeze_attention else adam


@functools.lru_cache(maxsize=32)
def without_attention(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Make an optimizer that leaves the parameters of attention layers as they are.

    Their gradients do not count in the norm of gradient clipping, and no optimizer state is kept
    for them.
    """

    def labels(params: Params) -> Params:
        kind = lambda path, _: "frozen" if "attn" in path else "trained"
        return path_aware_map(kind, params)

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def _of_settings(
    config: PPOConfig, own: Any, epochs: int, updates: int
) -> optax.GradientTransformation:
    return adamw(
        own.learning_rate,
        warmup_steps=own.warmup_steps,
        decay_over=updates if own.decay_learning_rate else None,
        steps_per_update=epochs * config.minibatches,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=own.weight_decay,
        max_grad_norm=own.max_grad_norm,
    )


# Cached, because a new optimizer object would force a recompilation: it is a static field of the
# train state, and its functions compare by identity.
@functools.lru_cache(maxsize=32)
def adamw(
    learning_rate: float,
    *,
    warmup_steps: int,
    decay_over: int | None,
    steps_per_update: int,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float | None,
) -> optax.GradientTransformation:
    """Make AdamW with a schedule of the learning rate; equal arguments give the same object.

    Args:
      learning_rate: the rate after warm-up and before decay.
      warmup_steps: number of optimizer steps over which the rate rises linearly from 0.
      decay_over: number of updates over which the rate falls linearly to 0; None for no decay.
      steps_per_update: optimizer steps of an update, during which the decay is constant.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: epsilon, added to the square root of the second moment.
      weight_decay: decoupled weight decay.
      max_grad_norm: the largest global norm of a gradient; None for no limit.

    Returns:
      The optimizer.
    """

    def rate(step: Array) -> Array | float:
        warm = jnp.minimum((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
        left = 1 - (step // steps_per_update) / decay_over if decay_over is not None else 1.0
        return learning_rate * warm * left

    adam = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    if max_grad_norm is None:
        return adam
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), adam)
