"""`ppo-jax info` and `ppo-jax convert`."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

from ppo_jax.commands.loading import load_model
from ppo_jax.commands.train import Adapters
from ppo_jax.config import PPOConfig, SettingError
from ppo_jax.models import gguf_format, heads, lora, pretrained, sizes, stored
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.transformer import init_params
from ppo_jax.types import overlay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Read a language model in any format that is known and write it in the Hugging Face format, float32 safetensors."""

    model: str
    """A folder, a Hugging Face id or a .gguf file."""
    out: Path
    """Folder to write."""
    adapter: Path | None = None
    """An adapter in peft's format to merge into it."""

    def run(self) -> None:
        if self.out.exists():
            raise ValueError(f"{self.out} exists already; choose another folder.")
        if gguf_format.is_gguf(self.out):
            raise ValueError(f"convert writes a folder in the Hugging Face format, no GGUF file; {self.out} names a .gguf.")
        _check_language_model(self.model)
        policy, tokenizer = load_model(self.model, causal=False)
        if self.adapter is not None:
            adapters, scale = lora.load_adapter(self.adapter, policy.config, policy.hf_config["model_type"])
            policy = policy._replace(params=lora.merge(overlay(policy.params, adapters), scale))
        pretrained.save_policy(self.out, policy, tokenizer)
        print(f"{self.out} holds the model as transformers loads it.")


def _check_language_model(model: str) -> None:
    """Raises ValueError for a model whose config says that it scores a text, or is an encoder alone."""
    hf = stored.read_config(model)
    name = str((hf.get("architectures") or [""])[0])
    bare = name.endswith("Model") and not name.endswith("HeadModel") and pretrained.config_of(hf).lm_transform
    if bare or name.endswith("ForSequenceClassification"):
        raise ValueError(f"convert takes language models; {model} is a {name}, without an output over words. Encoders and reward "
                         "models in safetensors are read as they are.")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """A model's family, parameters, and what a PPO step with it needs in memory; weights are not read."""

    model: tyro.conf.Positional[str]
    """A folder, a Hugging Face id, a .gguf file, or a published size, such as gpt2-xl, llama3-8b or gpt3-1.3b."""
    prompt_tokens: int = 64
    """Longest prompt."""
    critic: Literal["shared", "separate"] = "separate"
    """A value head on the policy's trunk, or a critic of its own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type."""
    remat: bool = False
    """Recompute activations in the backward pass."""
    lora: Adapters = dataclasses.field(default_factory=Adapters)
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)

    def run(self) -> None:
        kind, config = describe(self.model, self.dtype, self.remat)
        check_prompt(self.prompt_tokens, self.ppo, config)
        trunk = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        print(f"{self.model}: {kind}, {pretrained.count_params(trunk):,} parameters")
        print(f"{config.layers} layers, width {config.width}, {config.heads} heads of {config.head_width}, "
              f"{config.key_heads} key/value heads, vocabulary {config.vocab_size:,}, {config.positions:,} positions")  # fmt: skip
        parts = memory(config, self.ppo, prompt_tokens=self.prompt_tokens, critic=self.critic, adapters=self.lora.settings())
        print("Memory of a PPO step (estimate):")
        for name, size in {**parts, "together": sum(parts.values())}.items():
            print(f"  {name:34}{size / 2**30:10.3f} GiB")


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
        raise SettingError(f"prompt_tokens={prompt_tokens} must lie in 1 .. {room}, the model's {config.positions} positions less "
                           f"max_new_tokens={ppo.max_new_tokens}.")  # fmt: skip


def memory(
    config: TransformerConfig, ppo: PPOConfig, *, prompt_tokens: int, critic: str, adapters: lora.LoRA | None
) -> dict[str, int]:
    """Bytes that a PPO step holds, by what for: an account of arrays, not a measurement.

    Activations count what a block keeps for its backward pass, per token: 10 vectors of the model's width, 3 of the MLP's, the
    attention's weights (once per head and position); with `remat`, the block's input alone and one block in full.
    """
    trunk = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    scorer = jax.eval_shape(lambda: heads.init_scorer(config, jax.random.key(0)))
    params = {"policy": trunk, "critic": scorer if critic == "separate" else {"head": scorer["head"]}}
    base = size_of(params) + size_of(trunk)  # and the reference
    if adapters is not None:
        params, _ = jax.eval_shape(lambda p: lora.adapt(p, jax.random.key(0), adapters), params)
        base = size_of(trunk) + size_of(params)  # one frozen trunk for policy, critic and reference
    each, tokens = jnp.dtype(config.dtype).itemsize, prompt_tokens + ppo.max_new_tokens
    rows, towers = ppo.rows_at_a_time, 2 if critic == "separate" else 1
    block = rows * tokens * (10 * config.width + 3 * config.mlp_width + config.heads * tokens) * each
    kept = config.layers * rows * tokens * config.width * each + block if config.remat else config.layers * block
    positions = ppo.logit_chunk or ppo.max_new_tokens
    return {
        "parameters and reference": base,
        "gradients": size_of(params),
        "AdamW's moments": 2 * size_of(params),
        "activations of a micro-batch": towers * kept,
        "logits of a micro-batch": 3 * rows * positions * config.vocab_size * 4,
        "key/value cache of the rollout": 2 * config.layers * ppo.batch_size * tokens * config.key_heads * config.head_width * each,
    }


def size_of(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
