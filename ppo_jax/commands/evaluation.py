"""The command `ppo-jax evaluate`, which compares models and runs on held-out prompts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from ppo_jax.commands.prompts import PromptOptions
from ppo_jax.commands.rewards import Several, check_rewards
from ppo_jax.errors import SettingError, check_numbers


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate models on held-out prompts: score, KL, length and distinct-2.

    The score is the one that training optimizes. If a model is the folder of a run, options that
    are not given are those of the run. A model that is no run uses those of the first run.
    """

    example: ClassVar[str] = """
    ppo-jax evaluate --model gpt2 --model runs/a --prompts held_out.txt \\
        --reward my_reward.py:score"""

    model: Several
    """A folder, a Hugging Face id, a .gguf file, or the folder of a run. Give the option several
    times to compare models."""
    prompts: str | None = None
    """Prompts, in the formats of ppo-jax train. By default the held-out prompts of the run."""
    reward: Several = ()
    """The reward, as in ppo-jax train. Several rewards are added up. By default that of the run."""
    reward_given: Literal["text", "tokens"] = "text"
    """Whether the function is called with texts or with arrays of tokens, as in ppo-jax train."""
    reward_label: str | None = None
    """Label whose logit is the score, for a reward model with several labels: name or number."""
    reward_timeout: float | None = None
    """Time limit in seconds of a reward function for one response, as in ppo-jax train."""
    reference: str | None = None
    """The model that the KL is measured from. By default the one that the run started from."""
    responses: int = 1
    """Number of responses to each prompt."""
    greedy: bool = False
    """Take the most probable token instead of sampling."""
    max_new_tokens: int | None = None
    """Greatest number of tokens of a response. By default that of the run, or 32."""
    temperature: float | None = None
    """Sampling temperature. By default that of the run, or 1."""
    top_k: int | None = None
    """Sample only among the k most probable tokens. By default as in the run."""
    top_p: float | None = None
    """Sample only among the most probable tokens whose total probability reaches p. By default as
    in the run."""
    chat: bool = False
    """Put each prompt as a user's message through the tokenizer's chat template, as a run may."""
    stop_tokens: tuple[str, ...] = ()
    """Further tokens that end a response. By default those of the run."""
    seed: int = 0
    """Seed of the samples."""
    batch_size: int = 64
    """Number of responses sampled at once. The samples do not depend on it."""
    out: Path | None = None
    """Folder for evaluation.json, with the figures, and responses.jsonl, with the texts."""
    data_options: tyro.conf.OmitArgPrefixes[PromptOptions] = field(default_factory=PromptOptions)

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.reward:
            check_rewards(self.reward, self.reward_timeout)
        for name in ("batch_size", "responses"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.greedy and self.responses > 1:
            raise SettingError(
                f"greedy gives the same response each time; use responses=1, not {self.responses}."
            )

    def run(self) -> None:
        """Evaluate the models, print a table of their figures, and write the files."""
        from ppo_jax.commands.evaluating import evaluate_models

        evaluate_models(self)
