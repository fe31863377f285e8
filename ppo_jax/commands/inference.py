"""The command `ppo-jax generate`, which samples responses to prompts."""

from dataclasses import dataclass
from typing import ClassVar

import tyro

from ppo_jax.commands.prompts import PromptOptions
from ppo_jax.errors import SettingError, check_numbers

PROMPT_OPTIONS = PromptOptions()


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How responses are sampled."""

    max_new_tokens: int = 32
    """Greatest number of tokens of a response."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_k: int | None = None
    """Sample only among the k most probable tokens."""
    top_p: float | None = None
    """Sample only among the most probable tokens whose total probability reaches p."""
    greedy: bool = False
    """Take the most probable token instead of sampling."""
    seed: int = 0
    """Seed of the samples."""
    chat: bool = False
    """Put each prompt as a user's message through the tokenizer's chat template."""
    stop_tokens: tuple[str, ...] = ()
    """Further tokens that end a response."""
    batch_size: int = 64
    """Number of responses sampled at once. The samples do not depend on it."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.batch_size < 1:
            raise SettingError(f"batch_size must be at least 1, not {self.batch_size}.")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue prompts with a model, and print prompt|response for each."""

    example: ClassVar[str] = (
        """ppo-jax generate --model runs/a/model --prompts "The film is" prompts.txt"""
    )

    model: str
    """A folder or a Hugging Face id in safetensors, or a .gguf file."""
    prompts: list[str]
    """One or more texts, or names of files or data sets of prompts, as in ppo-jax train."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = SamplingOptions()
    data_options: tyro.conf.OmitArgPrefixes[PromptOptions] = PROMPT_OPTIONS

    def run(self) -> None:
        """Sample and print the responses."""
        from ppo_jax.commands.sampling import generate

        generate(self)
