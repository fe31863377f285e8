"""The commands `ppo-jax info` and `ppo-jax convert`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax
import tyro

from ppo_jax.models.io import adapter_files, families, pretrained, stored
from ppo_jax.models.lora import NO_LORA, LoRA
from ppo_jax.models.transformer import init_params
from ppo_jax.plan.memory import choose_prompt_tokens, estimate_memory, load_config
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.run.assembly import load_model
from ppo_jax.run.files import check_links


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a language model in the Hugging Face format, as float32 safetensors.

    The model may be in any format that `ppo-jax train` reads.
    """

    model: str
    """The model to convert: a folder, a Hugging Face id or a .gguf file."""
    out: Path
    """Folder to write the model to. It must not exist."""
    adapter: Path | None = None
    """Folder of an adapter in peft's format, to merge into the model."""

    def run(self) -> None:
        """Read the model, merge the adapter, and write the result to `out`."""
        check_links(self.out)
        if self.out.exists():
            raise ValueError(f"{self.out} exists already; choose another folder.")
        if stored.file_format(self.out):
            raise ValueError(
                f"convert writes a folder in the Hugging Face format, no GGUF file; choose a name "
                f"without .gguf for out={self.out}."
            )
        _check_language_model(self.model)
        policy, tokenizer = load_model(self.model, causal=False)
        if self.adapter is not None:
            kind = policy.hf_config["model_type"]
            params = adapter_files.merge_adapter(policy.params, self.adapter, policy.config, kind)
            policy = policy._replace(params=params)
        pretrained.save_policy(self.out, policy, tokenizer)
        print(f"The model is in {self.out}, in the format that transformers loads.")


def _check_language_model(model: str) -> None:
    """Raise ValueError if the config is that of a classifier, or of an encoder without a head."""
    hf = stored.read_config(model)
    name = str((hf.get("architectures") or [""])[0])
    bare = (
        name.endswith("Model")
        and not name.endswith("HeadModel")
        and families.config_of(hf).lm_transform
    )
    if bare or name.endswith("ForSequenceClassification"):
        raise ValueError(
            f"convert takes language models; {model} is a {name}, which has no language-model "
            "head. Encoders and reward models in safetensors need no conversion."
        )


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show a model's family and sizes, and estimate the memory of a PPO step with it."""

    model: tyro.conf.Positional[str]
    """The policy: a folder, a Hugging Face id, a .gguf file, or a published size such as gpt2-xl.
    Its weights are not read."""
    prompt_tokens: int | None = None
    """Number of tokens of the longest prompt. By default 64, or fewer if the model has no more room
    before the response."""
    critic: Literal["shared", "separate"] = "separate"
    """shared: a value head on the policy's trunk. separate: a model of its own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type to compute in. Parameters are always float32."""
    remat: bool = False
    """Recompute activations in the backward pass to save memory."""
    lora: LoRA = NO_LORA
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def run(self) -> None:
        """Print the model's sizes and the estimate of the memory."""
        family, config = load_config(self.model, self.dtype, self.remat)
        prompt_tokens = choose_prompt_tokens(self.prompt_tokens, self.ppo, config)
        trunk = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        print(f"{self.model}: {family}, {pretrained.count_params(trunk):,} parameters")
        print(
            f"{config.layers} layers, width {config.width}, {config.heads} heads of "
            f"{config.head_width}, {config.key_heads} key/value heads, vocabulary "
            f"{config.vocab_size:,}, {config.positions:,} positions"
        )
        parts = estimate_memory(
            config,
            self.ppo,
            prompt_tokens=prompt_tokens,
            critic=self.critic,
            adapters=self.lora if self.lora.rank else None,
        )
        print(
            f"Memory of a PPO step with {prompt_tokens} prompt and {self.ppo.max_new_tokens} "
            "response tokens (estimate):"
        )
        for name, size in {**parts, "together": sum(parts.values())}.items():
            print(f"  {name:34}{size / 2**30:10.3f} GiB")
