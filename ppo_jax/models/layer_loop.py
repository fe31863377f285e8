"""A loop over the layers of a decoder, of which a compiler sees one instead of all.

A program then compiles in a time that hardly depends on the number of layers. In return, each call
copies the parameters of the layers into one array per parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.rounding import round_to
from ppo_jax.models.visible import Visible
from ppo_jax.sharding import platform
from ppo_jax.types import KVCache, Params

# Fewer layers compile soon enough without a loop.
_MANY = 16

BlockFn = Callable[..., tuple[Array, Array, Array]]
"""`block(j, params, x, allowed, angles, cache)` computes layer `j` of each period."""


def layers_in_loop(config: TransformerConfig, positions: int) -> int:
    """Return how many of the first layers are computed in a loop.

    The last layer is never one of them, because it computes fewer positions than the others.

    Args:
      config: the configuration of the model.
      positions: number of new positions.

    Returns:
      A multiple of `period(config)`; 0 if a loop does not pay. By default there is a loop in
      programs for TPUs that read several tokens at once with many layers. While decoding, it would
      copy the cache.

    Example:
      >>> from ppo_jax.models.sizes import SIZES
      >>> layers_in_loop(SIZES["llama3-8b"]("llama3-8b"), positions=64)  # this is not a TPU
      0
    """
    if config.scale_attention_by_layer or positions == 1:
        return 0
    by_default = platform() == "tpu" and config.layers > _MANY
    if not (by_default if config.loop_layers is None else config.loop_layers):
        return 0
    return (config.layers - 1) // period(config) * period(config)


def period(config: TransformerConfig) -> int:
    """Return the smallest number of layers after which their windows repeat.

    Example:
      >>> from dataclasses import replace
      >>> from ppo_jax.models.sizes import SIZES
      >>> gpt2 = SIZES["gpt2"]("gpt2")
      >>> period(gpt2), period(replace(gpt2, windows=(8, 8, None) * 4))
      (1, 3)
    """
    windows = config.layer_windows
    repeats = lambda n: all(x == windows[i % n] for i, x in enumerate(windows))
    return next(n for n in range(1, len(windows) + 1) if repeats(n))


def loop_over_layers(
    block: BlockFn,
    layers: Sequence[Params],
    x_BSD: Array,
    allowed: Mapping[int | None, Array | Visible],
    angles: Mapping[int | None, Array | None],
    cache: KVCache | None,
    config: TransformerConfig,
) -> tuple[Array, list[Array], list[Array]]:
    """Compute layers one after the other, in a loop.

    Args:
      block: computes one layer.
      layers: the parameters of each layer, as many as `layers_in_loop` returns.
      x_BSD: hidden states.
      allowed: the slots that each position attends to, by the window of a layer.
      angles: rotary angles, by the window of a layer.
      cache: keys and values of earlier positions, or None if there are none.
      config: the configuration of the model.

    Returns:
      The hidden states, and the keys and values of each layer.
    """
    n = period(config)
    # Rounded as in every product, so that the copies are small.
    rounded = lambda x: round_to(x, config.dtype) if x.ndim > 1 else x
    by_period = lambda of_layers: [of_layers[i : i + n] for i in range(0, len(layers), n)]
    stack = lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *by_period(trees))
    params = stack([jax.tree.map(rounded, layer) for layer in layers])
    entries = None if cache is None else (stack(cache.keys), stack(cache.values))

    def compute_period(x_BSD: Array, inputs: tuple[Any, Any]) -> tuple[Array, tuple[Any, Any]]:
        params, entries = inputs
        of_period = cache if cache is None else cache.replace(keys=entries[0], values=entries[1])
        keys, values = [], []
        for j, window in enumerate(config.layer_windows[:n]):
            x_BSD, k, v = block(j, params[j], x_BSD, allowed[window], angles[window], of_period)
            keys.append(k)
            values.append(v)
        return x_BSD, ((keys, values) if cache is not None else ([], []))

    body = jax.checkpoint(compute_period, prevent_cse=False) if config.remat else compute_period
    x_BSD, (keys, values) = jax.lax.scan(body, x_BSD, (params, entries))
    unstack = lambda xs: [x[i] for i in range(len(layers) // n) for x in xs]
    return x_BSD, unstack(keys), unstack(values)
