"""Estimate the memory of a PPO step from the sizes of its arrays, without compiling it."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.errors import SettingError
from ppo_jax.models import heads, lora, sizes
from ppo_jax.models.attention import is_long
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io import families, stored
from ppo_jax.models.transformer import init_params
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.types import Params


def load_config(model: str, dtype: str, remat: bool) -> tuple[str, TransformerConfig]:
    """Return the family and the config of a model, without reading its weights.

    Args:
      model: a folder, a Hugging Face id, a .gguf file, or a published size such as `gpt2-xl`.
      dtype: the type to compute in.
      remat: whether to recompute activations in the backward pass.

    Raises:
      ValueError: if the model's config cannot be read.
    """
    if model in sizes.SIZES:
        size = sizes.SIZES[model]
        return size.__name__, replace(size(model), dtype=jnp.dtype(dtype), remat=remat)
    hf = stored.read_config(model)
    return hf["model_type"], families.config_of(hf, dtype=jnp.dtype(dtype), remat=remat)


def choose_prompt_tokens(
    prompt_tokens: int | None, ppo: PPOConfig, config: TransformerConfig
) -> int:
    """Return the length of a prompt that leaves room for its response within the positions.

    Args:
      prompt_tokens: the length, or None for 64 or as many as there is room for.
      ppo: settings of the iteration, which give the greatest length of a response.
      config: the model.

    Raises:
      SettingError: if there is no room for the prompt and its response.
    """
    room = config.positions - ppo.max_new_tokens
    if room < 1:
        raise SettingError(
            f"max_new_tokens={ppo.max_new_tokens} leaves no room for a prompt in the model's "
            f"{config.positions} positions."
        )
    chosen = min(64, room) if prompt_tokens is None else prompt_tokens
    if not 1 <= chosen <= room:
        raise SettingError(
            f"max_prompt_tokens={chosen} must lie in 1 .. {room}, the model's {config.positions} "
            f"positions less max_new_tokens={ppo.max_new_tokens}."
        )
    return chosen


def estimate_memory(
    config: TransformerConfig,
    ppo: PPOConfig,
    *,
    prompt_tokens: int,
    critic: str,
    adapters: lora.LoRA | None,
) -> dict[str, int]:
    """Estimate the memory that a PPO step needs on one device, by what it is used for.

    The activations that a block keeps for its backward pass are, for each token, 10 vectors of the
    model's width, 3 of the MLP's width, and the attention weights of each head, unless the sequence
    is so long that attention keeps none. With `remat`, a block keeps only its input, and one block
    at a time keeps the rest.

    Args:
      config: the model of policy, reference and critic.
      ppo: settings of the iteration.
      prompt_tokens: `P`, the length of every prompt.
      critic: `shared` for a value head on the policy's trunk, `separate` for a model of its own,
        `none` for no critic.
      adapters: low-rank adapters to train instead of all parameters.

    Returns:
      The number of bytes of each use.

    Example:
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=96, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> uses = estimate_memory(
      ...     config, PPOConfig(), prompt_tokens=8, critic="shared", adapters=None
      ... )
      >>> uses["AdamW's moments"] == 2 * uses["gradients"]
      True
    """
    start = partial(start_params, config, critic=critic, adapters=adapters)
    # With adapters, the policy and the critic share the frozen trunk of the reference.
    params, _, reference = jax.eval_shape(start)
    trained, fixed = size_of(params), size_of(reference)
    # Without adapters, the reference that moves takes the place of the fixed one.
    moving = size_of(params["policy"]) if ppo.moves_reference and adapters is not None else 0
    itemsize, tokens = jnp.dtype(config.dtype).itemsize, prompt_tokens + ppo.max_new_tokens
    at_once, length = (ppo.rows_at_a_time, tokens) if ppo.bins is None else ppo.bins[::-1]
    micro_tokens = at_once * length
    weights = 0 if is_long(length - 1) else config.heads * length
    token = 10 * config.width + 3 * config.mlp_width + weights
    block = micro_tokens * token * itemsize
    models = 2 if critic == "separate" else 1
    kept = config.layers * (micro_tokens * config.width * itemsize if config.remat else block)
    logit_tokens = ppo.max_new_tokens if ppo.bins is None else length
    logits = at_once * (ppo.logit_chunk or logit_tokens) * config.vocab_size
    rows = ppo.rollout_rows or ppo.batch_size
    slots = ppo.rollout_slots or rows
    cached = slots * tokens + (prompt_tokens * rows if slots < rows else 0)
    cache = config.layers * cached * config.key_heads * config.head_width
    return {
        "parameters and reference": trained + fixed + moving,
        "gradients": trained,
        "AdamW's moments": 2 * trained,
        "activations of a micro-batch": models * (kept + config.remat * block),
        "logits of a micro-batch": 3 * logits * 4,
        "key/value cache of the rollout": 2 * cache * itemsize,
    }


def start_params(
    config: TransformerConfig, *, critic: str, adapters: lora.LoRA | None
) -> tuple[Params, Params | None, Params]:
    """Return parameters that train, parameters that are frozen, and those of the reference.

    The arguments are those of `estimate_memory`.
    """
    key = jax.random.key(0)
    value: Params = heads.init_scorer(config, key) if critic == "separate" else {}
    if critic == "shared":
        value = {"head": heads.zero_head(config.width)}
    params = {"policy": init_params(config, key), "critic": value}
    if adapters is None:
        return params, None, params["policy"]
    params, frozen = lora.adapt(params, key, adapters)
    return params, frozen, frozen["policy"]


def size_of(tree: Any) -> int:
    """Return the number of bytes on each device of the arrays, or shapes, of a tree."""

    def shape(x: Any) -> tuple[int, ...]:
        return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)

    return sum(math.prod(shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
