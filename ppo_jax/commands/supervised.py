"""The commands `ppo-jax sft` and `ppo-jax reward`, the supervised stages before PPO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
import tyro

from ppo_jax.data import examples
from ppo_jax.data.rows import read_rows
from ppo_jax.data.text import check_ids
from ppo_jax.errors import SettingError, check_numbers
from ppo_jax.models import heads
from ppo_jax.models.io import pretrained, scorers
from ppo_jax.models.transformer import language_model
from ppo_jax.ppo import reward_model, sft
from ppo_jax.run.assembly import load_model
from ppo_jax.run.files import check_free, create_run_folder, write_json
from ppo_jax.run.serialize import to_json
from ppo_jax.types import Params


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of the training."""

    eval_data: Path | None = None
    """Held-out rows. By default a tenth of the training rows is held out."""
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


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Fine-tune a model on responses, from rows {"prompt": ..., "response": ...}.

    Only the response is learned. Rows may leave out the prompt. A prompt that is a list of messages
    is rendered by the tokenizer's chat template, and its response ends with the token that ends a
    turn.
    """

    model: str
    """Initial model: a folder or a Hugging Face id in safetensors, or a .gguf file."""
    data: Path
    """Training rows: a .jsonl file with one JSON object a line, or a .csv file."""
    out: Path
    """Folder to write the model to."""
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = TrainingOptions()

    def run(self) -> None:
        """Train the model and write it to `out`."""
        check_free(self.out)
        policy, tokenizer = load_model(self.model)
        config = policy.config
        length = min(self.training.length, config.positions)
        train, held_out = _read_examples(
            self,
            ("response",),
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

    model: str
    """Initial model: a folder or a Hugging Face id in safetensors, or a .gguf file."""
    data: Path
    """Training rows: a .jsonl file with one JSON object a line, or a .csv file."""
    out: Path
    """Folder to write the reward model to."""
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = TrainingOptions()
    learn_from: examples.LearnFrom = "pairs"
    """pairs: rows {"chosen": ..., "rejected": ...}, Bradley-Terry loss; scores: rows
    {"response": ..., "score": number}, squared error; classes: rows
    {"response": ..., "score": 0, 1, 2, ...} in ascending order, ordinal loss."""

    def run(self) -> None:
        """Train the reward model and write it to `out`."""
        check_free(self.out)
        tokenizer = pretrained.load_tokenizer(self.model)
        seed = self.training.seed
        start = scorers.start_scorer(self.model, jax.random.key(seed), tokenizer)
        config = start.config
        pretrained.check_tokenizer(tokenizer, config)
        length = min(self.training.length, config.positions)
        train, held_out = _read_examples(
            self,
            examples.answer_columns(self.learn_from),
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


def _read_examples(
    command: SFT | Reward, columns: Sequence[str], encode: Callable[..., sft.Arrays], reason: str
) -> tuple[sft.Arrays, sft.Arrays]:
    """Read and encode the rows to learn from and those that are held out.

    Args:
      command: names the files.
      columns: the columns that every row must have.
      encode: makes arrays of rows, without the rows that teach nothing.
      reason: why rows teach nothing.
    """

    def read(path: Path) -> sft.Arrays:
        rows = read_rows(path, columns=columns, optional=("prompt",))
        arrays = encode(rows)
        left_out = len(rows) - len(arrays[0])
        if left_out == len(rows):
            raise ValueError(f"No row of {path} teaches anything, because {reason}.")
        if left_out:
            print(f"{left_out} of {len(rows)} rows of {path} are left out, because {reason}.")
        return arrays

    options = command.training
    arrays = read(command.data)
    if options.eval_data is not None:
        return arrays, read(options.eval_data)
    if len(arrays[0]) < 2:
        raise ValueError(
            f"{command.data} holds one row; one more is needed to be held out, or pass --eval-data."
        )
    return examples.split(arrays, seed=options.seed)


def _fit(
    command: SFT | Reward,
    loss_fn: sft.SupervisedLoss,
    params: Params,
    train: sft.Arrays,
    held_out: sft.Arrays,
    vocab_size: int,
    weight: Callable[..., float] | None = None,
) -> Params:
    """Train, print the held-out loss after every epoch, and write `summary.json` and `run.json`."""
    for tokens in (x for x in (*train, *held_out) if x.ndim == 2 and x.dtype == np.int32):
        check_ids(tokens, vocab_size)
    options = command.training
    summary: dict[str, float] = {}

    def report(epoch: int, loss: float, params: Params) -> None:
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
