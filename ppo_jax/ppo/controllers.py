"""The controllers of the weights that adapt during a run."""

from ppo_jax.ops import kl
from ppo_jax.ops.entropy_control import EntropyController, adaptive_entropy
from ppo_jax.ppo.settings import PPOConfig


def kl_controller(config: PPOConfig) -> kl.KLController:
    """Return the controller of the KL penalty's weight."""
    if config.kl_target is None:
        return kl.fixed_kl(config.kl_coef)
    return kl.adaptive_kl(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)


def entropy_controller(config: PPOConfig) -> EntropyController | None:
    """Return the controller of the entropy's weight, or None if the weight is constant."""
    if config.entropy_target is None:
        return None
    return adaptive_entropy(config.entropy_coef, target=config.entropy_target)
