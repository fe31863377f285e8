"""`ppo-jax info` and `ppo-jax convert`."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import tyro

from ppo_jax.commands.train import Adapters
from ppo_jax.models import lora
from ppo_jax.models.io import adapter_files, gguf_format, pretrained, stored
from ppo_jax.models.transformer import init_params
from ppo_jax.plan.memory import check_prompt, describe, memory
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.run.assembly import load_model
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
            raise ValueError(
                f"convert writes a folder in the Hugging Face format, no GGUF file; {self.out} names a .gguf."
            )
        _check_language_model(self.model)
        policy, tokenizer = load_model(self.model, causal=False)
        if self.adapter is not None:
            adapters, scale = adapter_files.load_adapter(
                self.adapter, policy.config, policy.hf_config["model_type"]
            )
            policy = policy._replace(params=lora.merge(overlay(policy.params, adapters), scale))
        pretrained.save_policy(self.out, policy, tokenizer)
        print(f"{self.out} holds the model as transformers loads it.")


def _check_language_model(model: str) -> None:
    """Raises ValueError for a model whose config says that it scores a text, or is an encoder alone."""
    hf = stored.read_config(model)
    name = str((hf.get("architectures") or [""])[0])
    bare = (
        name.endswith("Model")
        and not name.endswith("HeadModel")
        and pretrained.config_of(hf).lm_transform
    )
    if bare or name.endswith("ForSequenceClassification"):
        raise ValueError(
            f"convert takes language models; {model} is a {name}, without an output over words. Encoders and reward "
            "models in safetensors are read as they are."
        )


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
        print(
            f"{config.layers} layers, width {config.width}, {config.heads} heads of {config.head_width}, "
            f"{config.key_heads} key/value heads, vocabulary {config.vocab_size:,}, {config.positions:,} positions"
        )
        parts = memory(
            config,
            self.ppo,
            prompt_tokens=self.prompt_tokens,
            critic=self.critic,
            adapters=self.lora.settings(),
        )
        print("Memory of a PPO step (estimate):")
        for name, size in {**parts, "together": sum(parts.values())}.items():
            print(f"  {name:34}{size / 2**30:10.3f} GiB")
