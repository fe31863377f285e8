"""Memory of a PPO step, by arithmetic."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ppo_jax.errors import SettingError
from ppo_jax.models import heads, lora, sizes
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io import pretrained, stored
from ppo_jax.models.transformer import init_params
from ppo_jax.ppo.settings import PPOConfig


def describe(model: str, dtype: str, remat: bool) -> tuple[str, TransformerConfig]:
    """Family and config of a model or of a published size."""
    if model in sizes.SIZES:
        size = sizes.SIZES[model]
        return size.__name__, dataclasses.replace(size(model), dtype=jnp.dtype(dtype), remat=remat)
    hf = stored.read_config(model)
    return hf["model_type"], pretrained.config_of(hf, dtype=jnp.dtype(dtype), remat=remat)


def check_prompt(prompt_tokens: int, ppo: PPOConfig, config: TransformerConfig) -> None:
    """Raises SettingError if no prompt of so many tokens, with a response, fits the model's positions."""
    room = config.positions - ppo.max_new_tokens
    if not 1 <= prompt_tokens <= room:
        raise SettingError(
            f"prompt_tokens={prompt_tokens} must lie in 1 .. {room}, the model's {config.positions} positions less "
            f"max_new_tokens={ppo.max_new_tokens}."
        )


def memory(
    config: TransformerConfig,
    ppo: PPOConfig,
    *,
    prompt_tokens: int,
    critic: str,
    adapters: lora.LoRA | None,
) -> dict[str, int]:
    """Bytes that a PPO step holds, by what for: an account of arrays, not a measurement.

    Activations count what a block keeps for its backward pass, per token: 10 vectors of the model's width, 3 of the MLP's, the
    attention's weights (once per head and position); with `remat`, the block's input alone and one block in full.
    """
    trunk = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    scorer = jax.eval_shape(lambda: heads.init_scorer(config, jax.random.key(0)))
    params = {
        "policy": trunk,
        "critic": scorer if critic == "separate" else {"head": scorer["head"]},
    }
    base = size_of(params) + size_of(trunk)  # and the reference
    if adapters is not None:
        params, _ = jax.eval_shape(lambda p: lora.adapt(p, jax.random.key(0), adapters), params)
        base = size_of(trunk) + size_of(params)  # one frozen trunk for policy, critic and reference
    each, tokens = jnp.dtype(config.dtype).itemsize, prompt_tokens + ppo.max_new_tokens
    rows, towers = ppo.rows_at_a_time, 2 if critic == "separate" else 1
    block = (
        rows * tokens * (10 * config.width + 3 * config.mlp_width + config.heads * tokens) * each
    )
    kept = (
        config.layers * rows * tokens * config.width * each + block
        if config.remat
        else config.layers * block
    )
    positions = ppo.logit_chunk or ppo.max_new_tokens
    return {
        "parameters and reference": base,
        "gradients": size_of(params),
        "AdamW's moments": 2 * size_of(params),
        "activations of a micro-batch": towers * kept,
        "logits of a micro-batch": 3 * rows * positions * config.vocab_size * 4,
        "key/value cache of the rollout": 2
        * config.layers
        * ppo.batch_size
        * tokens
        * config.key_heads
        * config.head_width
        * each,
    }


def size_of(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
