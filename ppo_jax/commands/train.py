"""`ppo-jax train`."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax

from ppo_jax import iteration
from ppo_jax.commands.loading import check_top_k, load_model, load_prompts, load_reward, pad_id, stop_ids
from ppo_jax.config import PPOConfig
from ppo_jax.logging import check_free, write_json
from ppo_jax.models import heads, pretrained
from ppo_jax.models.transformer import language_model
from ppo_jax.train import LoopConfig, Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """PPO: sample responses to prompts, score them with a reward, improve the policy, repeat."""

    model: str
    """The policy: a folder or a Hugging Face id in safetensors, or a .gguf file."""
    prompts: Path
    """A text file (one prompt a line) or .jsonl (one object a line, with a column "prompt")."""
    reward: str
    """my_file.py:function; or a reward model, as a folder or a Hugging Face id."""
    reward_given: Literal["text", "tokens"] = "text"
    """What the function is called with: (prompts, responses), lists of texts, and the prompts' rows if it takes a third; or
    (tokens, mask, response_mask), jax arrays, under jit."""
    out: Path
    """Folder for metrics, samples, checkpoints and the final model."""
    eval_prompts: Path | None = None
    """Held-out prompts for evaluation, in the same formats."""
    critic: str = "separate"
    """shared: a value head on the policy's trunk; separate: a critic of its own that starts from the policy; or the reward model
    (a folder or a Hugging Face id) that a critic of its own starts from."""
    chat: bool = False
    """Put each prompt as a user's message through the tokenizer's chat template; prompts that are lists of messages always are."""
    stop_tokens: tuple[str, ...] = ()
    """Further tokens that end a response, each one token of the tokenizer; its own end token always does."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters are float32 always."""
    remat: bool = False
    """Recompute activations in the backward pass to save memory."""
    preset: Literal["default", "oai2019", "nplus", "trl"] = "default"
    """Settings to start from; options given beside it win."""
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)

    def run(self) -> None:
        check_free(self.out, resume=self.loop.resume)
        policy, tokenizer = load_model(self.model, self.dtype, self.remat)
        check_top_k(self.ppo.top_k, policy.config)
        reward = load_reward(self.reward, self.reward_given)
        prompts, held_out = (
            None if path is None else load_prompts(path, tokenizer, policy, self.ppo.max_new_tokens, self.chat)
            for path in (self.prompts, self.eval_prompts)
        )
        critic, critic_params = self.make_critic(policy)
        stops = stop_ids(tokenizer, policy, self.stop_tokens)
        agent = iteration.Agent(language_model(policy.config), critic, self.ppo, stops, pad_id(tokenizer))
        params = {"policy": policy.params, "critic": critic_params}
        trainer = Trainer(
            agent, params, tokenizer, prompts, reward, out=self.out, loop=self.loop, eval_prompts=held_out, settings=self
        )
        metrics: dict[str, float] = {}
        state = trainer.run(on_update=metrics.update)
        pretrained.save_policy(self.out / "model", policy._replace(params=state.policy), tokenizer)
        write_json(self.out / "summary.json", {"updates": int(state.update), **metrics})
        print(f"The fine-tuned model is in {self.out / 'model'}; every update's metrics are in {self.out / 'metrics.jsonl'}.")

    def make_critic(self, policy: pretrained.Pretrained):
        """The critic's function and its first parameters."""
        if self.critic == "shared":
            return heads.shared_critic(), {"head": heads.zero_head(policy.config.width)}
        if self.critic == "separate":
            key = jax.random.key(self.loop.seed)
            return heads.separate_critic(policy.config), heads.init_scorer(policy.config, key, trunk=policy.params)
        scorer = pretrained.load_scorer(self.critic, dtype=policy.config.dtype, remat=self.remat)
        if scorer.config.vocab_size != policy.config.vocab_size:
            raise ValueError(
                f"The critic {self.critic} has vocab_size={scorer.config.vocab_size}, the policy {policy.config.vocab_size}: it "
                "must read the policy's tokens."
            )
        return heads.separate_critic(scorer.config), scorer.params
