"""Controllers of the weight of the entropy bonus."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class EntropyState(NamedTuple):
    """The state of an entropy controller, which every checkpoint must hold.

    Attributes:
      coef: `[]` float32, the coefficient that adapts.
      weight: `[]` float32, the weight of the entropy in the next loss: `coef`, or 0 if the entropy
        is above its target.

    Example:
      >>> adaptive_entropy(0.001, target=0.2).init()
      EntropyState(coef=Array(0.001, dtype=float32), weight=Array(0.001, dtype=float32))
    """

    coef: Array
    weight: Array


class EntropyController(NamedTuple):
    """A rule for the weight of the entropy bonus, as a pair of pure functions.

    Attributes:
      init: returns the first state.
      update: returns the next state from the state and the mean entropy of the batch, `[]` float32
        in nats per token.

    Example:
      >>> controller = adaptive_entropy(0.001, target=0.2)
      >>> controller.update(controller.init(), jnp.float32(0.3)).weight
      Array(0., dtype=float32)
    """

    init: Callable[[], EntropyState]
    update: Callable[[EntropyState, Array], EntropyState]


def adaptive_entropy(
    init_coef: float,
    *,
    target: float,
    step: float = 1e-4,
    least: float = 0.0,
    most: float = 5e-3,
) -> EntropyController:
    """Adapt the weight of the entropy bonus so that the entropy does not fall below a target.

        c ← clip(c + step, least, most)  if the entropy is below the target, else
        c ← clip(c - step, least, most)
        weight = c if the entropy is below the target, else 0

    An entropy that is not finite leaves the state unchanged.

    Args:
      init_coef: c at the start.
      target: the entropy to keep, in nats per token.
      step: how far c moves in an update. This default and the next are those of the authors' runs,
        with the target 0.2.
      least: the least c.
      most: the largest c.

    Returns:
      A controller. The `weight` of its state is the `entropy_coef` of `ppo_loss`.

    Raises:
      ValueError: if `step` is not positive, or `init_coef` is not in `least` .. `most`.

    Source:
      He et al. 2025, Skywork-OR1 (https://arxiv.org/abs/2505.22312), adaptive entropy control.
      Checked against its code.

    Example:
      >>> controller = adaptive_entropy(0.0, target=0.2, step=0.25, most=1.0)
      >>> controller.update(controller.init(), jnp.float32(0.1)).weight
      Array(0.25, dtype=float32)
    """
    if not (step > 0 and least <= init_coef <= most):
        raise ValueError(
            "adaptive_entropy needs a positive step and least <= init_coef <= most, not "
            f"step={step}, init_coef={init_coef}, least={least} and most={most}."
        )

    def update(state: EntropyState, entropy: Array) -> EntropyState:
        below = entropy < target
        coef = jnp.clip(state.coef + jnp.where(below, step, -step), least, most)
        finite = jnp.isfinite(entropy)
        return EntropyState(
            jnp.where(finite, coef, state.coef),
            jnp.where(finite, jnp.where(below, coef, 0), state.weight),
        )

    return EntropyController(
        lambda: EntropyState(jnp.float32(init_coef), jnp.float32(init_coef)), update
    )
