"""The weight of the entropy bonus, if it adapts to a target."""

from jax import Array

from ppo_jax.ops.entropy_control import EntropyState
from ppo_jax.ppo.controllers import entropy_controller
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.types import Metrics


def next_entropy(
    config: PPOConfig, state: EntropyState | None, entropy: Array
) -> tuple[EntropyState | None, Metrics]:
    """Adapt the weight of the entropy.

    Args:
      config: the settings.
      state: the state of the controller, or None if the weight is constant.
      entropy: `[]` float32, in nats per token, before the update.

    Returns:
      The next state, and the metric `objective/entropy_coef` if the weight adapts.
    """
    controller = entropy_controller(config)
    if state is None or controller is None:
        return None, {}
    return controller.update(state, entropy), {"objective/entropy_coef": state.weight}
