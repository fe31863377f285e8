"""The commands `ppo-jax sft` and `ppo-jax reward`, the supervised stages before PPO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import tyro

from ppo_jax.data import examples
from ppo_jax.data.columns import COMMON_NAMES, ExampleColumns, Names
from ppo_jax.data.labels import label_order, number_labels
from ppo_jax.data.rows import Row, read_rows
from ppo_jax.data.text import check_ids
from ppo_jax.errors import SettingError, check_numbers
from ppo_jax.run.files import check_free, create_run_folder, write_json

if TYPE_CHECKING:
    from ppo_jax.ppo import sft
    from ppo_jax.types import Params


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of the training."""

    eval_data: str | None = None
    """Held-out rows, in the formats of the training rows."""
    eval_fraction: float = 0.1
    """Share of the training rows that is held out, chosen at random, without eval_data."""
    length: int = 128
    """Number of tokens that a row is cut to; at most the number of the model's positions. Responses
    to imitate are cut at their end, and texts to score at their beginning."""
    epochs: int = 3
    """Number of passes over the rows."""
    batch_size: int = 16
    """Number of rows in a training step."""
    learning_rate: float = 5e-5
    """Peak of the learning rate, which rises linearly and then decays with a cosine schedule."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW."""
    seed: int = 0
    """Seed of the split, of the shuffles and of new parameters."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("length", "epochs", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} must be positive, not {getattr(self, name)}.")
        if not 0 < self.eval_fraction < 1:
            raise SettingError(
                f"eval_fraction must lie between 0 and 1, but is {self.eval_fraction}; to hold out "
                "no row, pass other rows as --eval-data."
            )


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Fine-tune a model on responses to prompts, on conversations or on texts.

    Only the response is learned. Rows may leave out the prompt. Messages are rendered by the
    tokenizer's chat template, and a response then ends with the token that ends a turn.
    """

    example: ClassVar[str] = "ppo-jax sft --model gpt2 --data texts.jsonl --out models/sft"

    model: str
    """Initial model: a folder or a Hugging Face id in safetensors, or a .gguf file."""
    data: str
    """Training rows: a .jsonl, .json, .csv, .tsv or .parquet file, a folder that the library
    datasets saved, or a data set of the Hugging Face hub, such as openai/gsm8k:main:train."""
    out: Path
    """Folder to write the model to."""
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = TrainingOptions()
    columns: tyro.conf.OmitArgPrefixes[ExampleColumns] = field(default_factory=ExampleColumns)

    def run(self) -> None:
        """Train the model and write it to `out`."""
        from ppo_jax.models.io import pretrained
        from ppo_jax.models.transformer import language_model
        from ppo_jax.ppo import sft
        from ppo_jax.run.assembly import load_model

        check_free(self.out)
        rows = _read_rows(self, ("response",), self.columns.names())
        policy, tokenizer = load_model(self.model)
        config = policy.config
        length = min(self.training.length, config.positions)
        train, held_out = _encode_rows(
            self,
            rows,
            partial(examples.encode_demonstrations, tokenizer=tokenizer, length=length),
            f"their prompts leave no room for a response within {length} tokens",
        )
        loss_fn, weight = partial(sft.sft_loss, language_model(config)), sft.count_learned_tokens
        params = _fit(self, loss_fn, policy.params, train, held_out, config.vocab_size, weight)
        pretrained.save_policy(self.out, policy._replace(params=params), tokenizer)


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
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = TrainingOptions()
    columns: tyro.conf.OmitArgPrefixes[ExampleColumns] = field(default_factory=ExampleColumns)
    learn_from: examples.LearnFrom = "pairs"
    """pairs: the better and the worse of two answers, in the columns chosen and rejected, by the
    Bradley-Terry loss. scores: answers with numbers, by the squared error. classes: answers with
    labels that have an order, by the ordinal loss."""
    label_column: str = "auto"
    """Column of the scores or labels. auto: score or label."""
    labels: tuple[str, ...] = ()
    """The labels from the worst to the best. By default they are the numbers 0, 1, 2, ..., or words
    whose order is known, such as negative and positive."""

    def run(self) -> None:
        """Train the reward model and write it to `out`."""
        import jax

        from ppo_jax.models import heads
        from ppo_jax.models.io import pretrained, scorers
        from ppo_jax.ppo import reward_model

        check_free(self.out)
        rows = self._read()
        tokenizer = pretrained.load_tokenizer(self.model)
        seed = self.training.seed
        start = scorers.start_scorer(self.model, jax.random.key(seed), tokenizer)
        config = start.config
        pretrained.check_tokenizer(tokenizer, config)
        length = min(self.training.length, config.positions)
        train, held_out = _encode_rows(
            self,
            rows,
            partial(
                examples.encode_judgements,
                tokenizer=tokenizer,
                learn_from=self.learn_from,
                length=length,
            ),
            f"their two texts have the same last {length} tokens",
        )
        params = dict(start.params)
        if self.learn_from == "classes":
            classes = np.concatenate([train[-1], held_out[-1]])
            params["thresholds"] = reward_model.initial_thresholds(classes)
        loss_fn = reward_model.training_loss(heads.reward_model(config), self.learn_from)
        params = _fit(self, loss_fn, params, train, held_out, config.vocab_size)
        params.pop("thresholds", None)
        scorers.save_scorer(self.out, start._replace(params=params), tokenizer)

    def _read(self) -> tuple[list[Row], list[Row] | None]:
        """Read the rows, with numbers for labels that are words."""
        columns, names = examples.answer_columns(self.learn_from), self.columns.names()
        if self.learn_from == "pairs":
            return _read_rows(self, columns, names)
        label = {"auto": COMMON_NAMES["score"]}.get(self.label_column, (self.label_column,))
        rows, held_out = _read_rows(self, (*columns, "score"), {**names, "score": label})
        if self.learn_from == "classes" and (order := label_order(rows, self.labels)):
            print(f"The labels from the worst to the best: {', '.join(order)}.")
            rows = number_labels(rows, order)
            held_out = None if held_out is None else number_labels(held_out, order)
        return rows, held_out


def _read_rows(
    command: SFT | Reward, columns: Sequence[str], names: Names
) -> tuple[list[Row], list[Row] | None]:
    """Read the rows to learn from, and those that are held out if they have data of their own.

    Args:
      command: names the data.
      columns: the columns that every row must have.
      names: the names that each column may have in the data.
    """

    def read(source: str) -> list[Row]:
        return read_rows(source, columns=columns, optional=("prompt",), names=names)

    other = command.training.eval_data
    rows, held_out = read(command.data), None if other is None else read(other)
    if other is None and len(rows) < 2:
        raise ValueError(
            f"{command.data} holds one row; one more is needed to be held out, or pass --eval-data."
        )
    return rows, held_out


def _encode_rows(
    command: SFT | Reward,
    rows: tuple[list[Row], list[Row] | None],
    encode: "Callable[[list[Row]], sft.Arrays]",
    reason: str,
) -> "tuple[sft.Arrays, sft.Arrays]":
    """Encode the rows to learn from and those that are held out.

    Args:
      command: names the data.
      rows: what `_read_rows` returned.
      encode: makes arrays of rows, without the rows that teach nothing.
      reason: why rows teach nothing.
    """

    def encoded(rows: list[Row], source: str) -> "sft.Arrays":
        arrays = encode(rows)
        left_out = len(rows) - len(arrays[0])
        if left_out == len(rows):
            raise ValueError(f"No row of {source} teaches anything, because {reason}.")
        if left_out:
            print(f"{left_out} of {len(rows)} rows of {source} are left out, because {reason}.")
        return arrays

    options = command.training
    arrays = encoded(rows[0], command.data)
    if rows[1] is not None and options.eval_data is not None:
        return arrays, encoded(rows[1], options.eval_data)
    if len(arrays[0]) < 2:
        raise ValueError(
            f"Only one row of {command.data} teaches anything; one more is needed to be held out, "
            "or pass --eval-data."
        )
    return examples.split(arrays, seed=options.seed, fraction=options.eval_fraction)


def _fit(
    command: SFT | Reward,
    loss_fn: "sft.SupervisedLoss",
    params: "Params",
    train: "sft.Arrays",
    held_out: "sft.Arrays",
    vocab_size: int,
    weight: Callable[..., float] | None = None,
) -> "Params":
    """Train, print the held-out loss after every epoch, and write `summary.json` and `run.json`."""
    from ppo_jax.ppo import sft
    from ppo_jax.run.serialize import to_json

    for tokens in (x for x in (*train, *held_out) if x.ndim == 2 and x.dtype == np.int32):
        check_ids(tokens, vocab_size)
    options = command.training
    summary: dict[str, float] = {}

    def report(epoch: int, loss: float, params: "Params") -> None:
        held_out_loss, accuracy = sft.evaluate_loss(
            loss_fn, params, held_out, batch_size=options.batch_size, weight=weight
        )
        summary.update({"eval/loss": held_out_loss, "eval/accuracy": accuracy})
        print(
            f"epoch {epoch + 1}: loss {loss:.4f}, held out: loss {held_out_loss:.4f}, "
            f"accuracy {accuracy:.3f}",
            flush=True,
        )

    params = sft.fit(
        loss_fn,
        params,
        train,
        seed=options.seed,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        on_epoch=report,
    )
    create_run_folder(command.out)
    write_json(command.out / "summary.json", summary)
    settings = to_json(command)
    write_json(command.out / "run.json", settings | settings.pop("training"))
    return params
