"""Estimate the cost of a model that is too deep to compile, from two models with fewer layers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from ppo_jax.errors import SettingError
from ppo_jax.models.config import TransformerConfig
from ppo_jax.plan.account import Collective
from ppo_jax.plan.compile import Program, Programs, TooLarge


def extrapolate(
    compile_model: Callable[[TransformerConfig], Programs],
    config: TransformerConfig,
    depths: tuple[int, int],
) -> Programs:
    """Compile a model with two smaller numbers of layers, and extrapolate linearly to all layers.

    If the whole model nearly fills the memory, the compiler would schedule it differently to save
    memory. The extrapolated peak is therefore an estimate, which is usually too high.

    Args:
      compile_model: compiles an iteration with a model, such as `compile_iteration` with all other
        arguments given by `functools.partial`.
      config: the whole model.
      depths: the two numbers of layers to compile, the smaller first. If the layers have attention
        windows in a periodic pattern, both numbers must be multiples of its period.

    Returns:
      The programs of the whole model. `compile_s` is the sum of the times of both compilations.

    Raises:
      SettingError: if the depths are not increasing, or exceed the model's layers.

    Example::

      compile_model = functools.partial(
          compile_iteration, ppo=PPOConfig(), mesh=mesh, chip=CHIPS["v5e"], prompt_tokens=512
      )
      programs = extrapolate(compile_model, config, depths=(2, 4))
    """
    low, high = depths
    if not 0 < low < high <= config.layers:
        raise SettingError(
            "depths must be two numbers of layers, the smaller first, within the model's "
            f"{config.layers} layers, not {low} {high}."
        )
    few, many = (
        compile_model(
            replace(config, layers=layers, windows=config.windows and config.windows[:layers])
        )
        for layers in depths
    )
    share = (config.layers - low) / (high - low)
    found = {name: _extend(few[name], many[name], share) for name in few}
    if isinstance(rollout := found.get("rollout"), Program):
        note = (
            f"The seconds of decoding say little about {config.layers} layers, because a model of "
            f"{low} or {high} layers may keep its parameters in the memory of the core while it "
            "decodes; plan without --depths for them."
        )
        found["rollout"] = rollout._replace(notes=(*rollout.notes, note))
    return found


def _extend(few: Program | TooLarge, many: Program | TooLarge, share: float) -> Program | TooLarge:
    """Extend the figures of two programs; `share` is 0 at the first and 1 at the second."""
    if isinstance(few, TooLarge):
        return few
    if isinstance(many, TooLarge):
        return many

    def line(a: Any, b: Any) -> Any:
        return type(a)(a + share * (b - a)) if isinstance(a, int | float) else a

    none = dict.fromkeys(few.collectives | many.collectives, Collective(0, 0))
    few, many = (
        x._replace(collectives=none | x.collectives, notes=many.notes) for x in (few, many)
    )
    return jax.tree.map(line, few, many)._replace(compile_s=few.compile_s + many.compile_s)
