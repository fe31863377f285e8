"""`ppo-jax generate` and `ppo-jax evaluate`."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from ppo_jax import data
from ppo_jax.data.chat import as_chat
from ppo_jax.data.text import pad_id
from ppo_jax.errors import SettingError, check_numbers
from ppo_jax.models.transformer import language_model
from ppo_jax.ppo import rollout
from ppo_jax.reward_functions.loading import load_reward
from ppo_jax.run.assembly import check_top_k, encode_for, load_model, stop_ids
from ppo_jax.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn."""

    model: str
    """A folder or a Hugging Face id in safetensors, or a .gguf file."""
    max_new_tokens: int = 32
    """Longest response."""
    temperature: float = 1.0
    """Of sampling."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Sample within this probability mass."""
    greedy: bool = False
    """Take the likeliest token."""
    seed: int = 0
    """Of sampling."""
    chat: bool = False
    """Put each prompt as a user's message through the tokenizer's chat template."""
    stop_tokens: tuple[str, ...] = ()
    """Further tokens that end a response."""
    batch_size: int = 64
    """Responses at a time; the samples do not depend on it."""

    def __post_init__(self):
        check_numbers(self)
        if self.batch_size < 1:
            raise SettingError(f"batch_size must be at least 1, not {self.batch_size}.")

    def sample(
        self, rows: list[dict[str, Any]]
    ) -> Iterator[tuple[Rollout, data.Prompts, list[str]]]:
        """Responses to prompts, a batch at a time."""
        policy, tokenizer = load_model(self.model)
        check_top_k(self.top_k, policy.config)
        prompts = encode_for(
            as_chat(rows) if self.chat else rows, tokenizer, policy.config, self.max_new_tokens
        )
        generate = functools.partial(
            rollout.generate,
            language_model(policy.config),
            max_new_tokens=self.max_new_tokens,
            stop_ids=stop_ids(tokenizer, policy, self.stop_tokens),
            pad_id=pad_id(tokenizer),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            greedy=self.greedy,
        )
        generate = jax.jit(generate)
        size = min(self.batch_size, len(prompts))
        for first in range(0, len(prompts), size):
            ids = np.arange(
                first, first + size
            )  # past the end the first prompts come again, so one shape is compiled
            batch = prompts.take(ids % len(prompts))
            out = generate(
                policy.params, jax.random.key(self.seed), batch.tokens, batch.mask, row_ids=ids
            )
            keep = min(size, len(prompts) - first)
            out, batch = (
                jax.tree.map(lambda x, keep=keep: x[:keep], out),
                batch.take(np.arange(keep)),
            )
            mask = np.concatenate([batch.mask, out.response_mask], axis=1)
            yield out, batch, data.decode(tokenizer, out.tokens, mask, start=out.prompt_length)


@dataclass(frozen=True, kw_only=True)
class Generate(Sampling):
    """Continue prompts with a model."""

    prompts: list[str]
    """One or more texts."""

    def run(self) -> None:
        for _, batch, responses in self.sample(data.read_rows(self.prompts)):
            for prompt, response in zip(batch.texts, responses, strict=True):
                print(f"{prompt}|{response}")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Sampling):
    """Mean reward of a model's responses to held-out prompts."""

    prompts: Path
    """A text file or .jsonl, as for train."""
    reward: str
    """As for train."""
    reward_given: Literal["text", "tokens"] = "text"
    """As for train."""
    reward_label: str | None = None
    """As for train."""

    def run(self) -> None:
        rows, reward = (
            data.read_rows(self.prompts),
            load_reward(self.reward, self.reward_given, self.reward_label),
        )
        scores = np.concatenate(
            [
                reward(out, batch, responses).total(out.response_mask)
                for out, batch, responses in self.sample(rows)
            ]
        )
        print(
            f"mean score {scores.mean():.4f}, standard error {scores.std() / len(scores) ** 0.5:.4f}, {len(scores)} responses"
        )
