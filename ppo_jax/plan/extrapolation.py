"""Figures for models that are too deep to compile here, from two shallower models."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from ppo_jax.errors import SettingError
from ppo_jax.models.config import TransformerConfig
from ppo_jax.plan.compile import Program, Programs, TooLarge
from ppo_jax.plan.hlo import Collective


def extrapolate(
    compile_model: Callable[[TransformerConfig], Programs],
    config: TransformerConfig,
    depths: tuple[int, int],
) -> Programs:
    """Compile a model with fewer layers twice, and extend every figure along a straight line.

    Where memory is short the compiler would schedule the whole model differently, so a peak is an
    estimate, usually too high.

    Args:
      compile_model: compiles an iteration with a model, such as `compile_iteration` with all other
        arguments given by `functools.partial`.
      config: the whole model.
      depths: the two numbers of layers to compile, the smaller first. Where layers differ in their
        attention windows, both must be multiples of the period of that pattern.

    Returns:
      The programs of the whole model. `compile_s` is the time of both compilations.

    Raises:
      SettingError: if the depths are not increasing, or exceed the model's layers.
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
    return {name: _extend(few[name], many[name], share) for name in few}


def _extend(few: Program | TooLarge, many: Program | TooLarge, share: float) -> Program | TooLarge:
    """Extend the figures of two programs; `share` is 0 at the first and 1 at the second."""
    if isinstance(few, TooLarge):
        return few
    if isinstance(many, TooLarge):
        return many

    def line(a: Any, b: Any) -> Any:
        return type(a)(a + share * (b - a)) if isinstance(a, int | float) else a

    none = dict.fromkeys(few.collectives | many.collectives, Collective(0, 0))
    few, many = (x._replace(collectives=none | x.collectives) for x in (few, many))
    return jax.tree.map(line, few, many)._replace(compile_s=few.compile_s + many.compile_s)
