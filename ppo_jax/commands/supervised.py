"""The options of `ppo-jax sft` and `ppo-jax reward`, the supervised stages before PPO."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import tyro

from ppo_jax.commands.supervised_rows import TrainingOptions
from ppo_jax.data.columns import ExampleColumns
from ppo_jax.data.examples import LearnFrom
from ppo_jax.errors import SettingError, check_numbers
from ppo_jax.models.gpt2_sizes import check_new_size
from ppo_jax.run.settings import Resume, SelectBy


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of the run and its files."""

    resume: Resume = "no"
    """yes: resume from the newest good checkpoint in out, with the same settings. auto: the same if
    there is one, otherwise start a new run. no: start a new run."""
    select_by: SelectBy = "loss"
    """Model that is written: the one with the least held-out loss, the greatest held-out accuracy,
    or the last one."""
    eval_every: int = 0
    """Number of steps between evaluations on the held-out rows; 0 evaluates after each epoch."""
    save_every: int = 100
    """Number of steps between checkpoints; 0 saves at the end, and after the best evaluations."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb_project: str | None = None
    """Weights & Biases project to log to as well."""
    progress: bool = True
    """Show a progress bar on standard error if it is a terminal."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("eval_every", "save_every"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name} must not be negative, but is {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Fine-tune a model on responses to prompts, on conversations or on texts.

    Only the response is learned. Rows may leave out the prompt. Messages are rendered by the
    tokenizer's chat template, and a response then ends with the token that ends a turn.
    """

    example: ClassVar[str] = "ppo-jax sft --model gpt2 --data texts.jsonl --out models/sft"

    model: str | None = None
    """Initial model: a folder or a Hugging Face id in safetensors, or a .gguf file."""
    from_scratch: str | None = None
    """Size of a new model instead: tiny (0.8 million parameters and a vocabulary of 4,096), small
    (10.6 million and 8,192), gpt2, gpt2-medium, gpt2-large or gpt2-xl. Its tokenizer is trained on
    the rows, and the learning rate should be about 1e-3."""
    data: str
    """Training rows: a .jsonl, .json, .csv, .tsv or .parquet file, a folder that the library
    datasets saved, or a data set of the Hugging Face hub, such as openai/gsm8k:main:train."""
    out: Path
    """Folder to write the model to."""
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = field(default_factory=TrainingOptions)
    columns: tyro.conf.OmitArgPrefixes[ExampleColumns] = field(default_factory=ExampleColumns)
    run_options: tyro.conf.OmitArgPrefixes[RunOptions] = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if (self.model is None) == (self.from_scratch is None):
            raise SettingError(
                f"Give either model or from_scratch, but model={self.model} and "
                f"from_scratch={self.from_scratch}."
            )
        if self.from_scratch is not None:
            check_new_size(self.from_scratch)

    def run(self) -> None:
        """Train the model and write it to `out`."""
        from ppo_jax.commands.fitting import fine_tune

        fine_tune(self)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Train a reward model from pairs, scores or ordered classes of answers.

    Rows may have a "prompt", which is read before the answer. Prompts and answers that are lists of
    messages are rendered by the tokenizer's chat template.
    """

    example: ClassVar[str] = "ppo-jax reward --model gpt2 --data pairs.jsonl --out models/reward"

    model: str
    """Initial model: a folder or a Hugging Face id in safetensors, or a .gguf file."""
    data: str
    """Training rows: a .jsonl, .json, .csv, .tsv or .parquet file, a folder that the library
    datasets saved, or a data set of the Hugging Face hub, such as openai/gsm8k:main:train."""
    out: Path
    """Folder to write the reward model to."""
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = field(default_factory=TrainingOptions)
    columns: tyro.conf.OmitArgPrefixes[ExampleColumns] = field(default_factory=ExampleColumns)
    learn_from: LearnFrom = "pairs"
    """pairs: the better and the worse of two answers, in the columns chosen and rejected, by the
    Bradley-Terry loss. scores: answers with numbers, by the squared error. classes: answers with
    labels that have an order, by the ordinal loss."""
    label_column: str = "auto"
    """Column of the scores or labels. auto: score or label."""
    labels: tuple[str, ...] = ()
    """The labels from the worst to the best. By default they are the numbers 0, 1, 2, ..., or words
    whose order is known, such as negative and positive."""
    run_options: tyro.conf.OmitArgPrefixes[RunOptions] = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if self.label_column == "none" and self.learn_from != "pairs":
            raise SettingError(
                f"learn_from={self.learn_from} needs a column of labels, so label_column cannot be "
                "none; name the column, or leave out label_column."
            )

    def run(self) -> None:
        """Train the reward model and write it to `out`."""
        from ppo_jax.commands.fitting import train_reward_model

        train_reward_model(self)
