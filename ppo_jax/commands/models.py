"""The command `ppo-jax info`."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import tyro

from ppo_jax.models.lora_settings import NO_LORA, LoRA
from ppo_jax.ppo.critic_settings import choose_critic
from ppo_jax.ppo.settings import PPOConfig


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show a model's family and sizes, and estimate the memory of a PPO step with it."""

    example: ClassVar[str] = """ppo-jax info gpt2 --batch-size 32 --max-new-tokens 48"""

    model: tyro.conf.Positional[str]
    """The policy: a folder, a Hugging Face id, a .gguf file, or a published size such as gpt2-xl.
    Its weights are not read. It may also be given as --model."""
    max_prompt_tokens: int | None = None
    """Number of tokens of the longest prompt. By default 64, or fewer if the model has no more room
    before the response."""
    critic: Literal["auto", "none", "shared", "separate"] = "auto"
    """auto: none if the advantage estimator reads no values, otherwise separate. none: no critic.
    shared: a value head on the policy's trunk. separate: a model of its own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type to compute in. Parameters are always float32."""
    remat: bool = False
    """Recompute activations in the backward pass to save memory."""
    lora: LoRA = NO_LORA
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def run(self) -> None:
        """Print the model's sizes and the estimate of the memory."""
        import jax

        from ppo_jax.models.io import pretrained
        from ppo_jax.models.transformer import init_params
        from ppo_jax.plan.memory import choose_prompt_tokens, estimate_memory, load_config

        family, config = load_config(self.model, self.dtype, self.remat)
        prompt_tokens = choose_prompt_tokens(self.max_prompt_tokens, self.ppo, config)
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
            critic=str(choose_critic(self.critic, self.ppo)),
            adapters=self.lora if self.lora.rank else None,
        )
        print(
            f"Memory of a PPO step with {prompt_tokens} prompt and {self.ppo.max_new_tokens} "
            "response tokens (estimate):"
        )
        for name, size in {**parts, "together": sum(parts.values())}.items():
            print(f"  {name:34}{size / 2**30:10.3f} GiB")
