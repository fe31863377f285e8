"""The work of the commands `ppo-jax sft` and `ppo-jax reward`."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from ppo_jax import hashing
from ppo_jax.commands.stored import split_seed
from ppo_jax.commands.supervised import SFT, Reward, RunOptions
from ppo_jax.commands.supervised_rows import Rows, encode_examples, read_examples
from ppo_jax.data import examples
from ppo_jax.data.columns import COMMON_NAMES
from ppo_jax.data.labels import label_order, number_labels
from ppo_jax.data.rows import Row
from ppo_jax.data.text import check_ids
from ppo_jax.models import heads
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io import pretrained, scorers
from ppo_jax.models.io.new_models import new_model
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.models.sizes import new_gpt
from ppo_jax.models.transformer import language_model
from ppo_jax.ppo import reward_model, sft
from ppo_jax.ppo.batch_parts import Arrays, SupervisedLoss, Weight, epoch_rows
from ppo_jax.run.assembly import load_model
from ppo_jax.run.files import SUPERVISED, check_free, lock_folder
from ppo_jax.run.settings import LoopConfig
from ppo_jax.run.summary import print_before_and_after, write_summary
from ppo_jax.run.supervised import SupervisedTrainer, Task, supervised_config
from ppo_jax.types import Params

Command = TypeVar("Command", bound=SFT | Reward)


def fine_tune(command: SFT) -> None:
    """Train the model and write it to `out`."""
    check_free(command.out, resume=command.run_options.resume != "no")
    command = with_split_seed(command)
    rows = read_examples(command.data, command.training, ("response",), command.columns.names())
    policy, tokenizer = start_model(command, rows[0])
    config = policy.config
    length = min(command.training.length, config.positions)
    arrays = encode_examples(
        command.data,
        command.training,
        rows,
        partial(examples.encode_demonstrations, tokenizer=tokenizer, length=length),
        f"their prompts leave no room for a response within {length} tokens",
    )
    loss_fn, weight = partial(sft.sft_loss, language_model(config)), sft.count_learned_tokens
    task = _task(command, loss_fn, arrays, config.vocab_size, weight)
    trainer = _open(command, task, policy.params, config, tokenizer, rows)
    finish_run(
        trainer,
        lambda params: pretrained.save_policy(
            command.out, policy._replace(params=params), tokenizer
        ),
    )


def with_split_seed(command: Command) -> Command:
    """Return a command whose seed of the split is known: that of the run that goes on, or 0."""
    options = command.training
    if not options.eval_fraction or options.eval_seed is not None:
        return command
    resumed = command.run_options.resume != "no"
    seed = split_seed(command.out, SUPERVISED) if resumed else 0
    return replace(command, training=replace(options, eval_seed=seed))


def start_model(command: SFT, rows: Sequence[Row]) -> tuple[Pretrained, Any]:
    """Read the initial model with its tokenizer, or make new ones for the rows."""
    if command.model is not None:
        return load_model(command.model)
    assert command.from_scratch is not None, "__post_init__ has checked that one is given"
    for i, row in enumerate(rows):
        if not isinstance(row["response"], str) or not isinstance(row.get("prompt") or "", str):
            raise ValueError(
                f"Row {i} of {command.data} holds messages, but a new tokenizer has no chat "
                "template; for from_scratch use texts."
            )
    texts = [(row.get("prompt") or "") + row["response"] for row in rows]
    key = jax.random.key(command.training.seed)
    return new_model(texts, new_gpt(command.from_scratch), key)


def train_reward_model(command: Reward) -> None:
    """Train the reward model and write it to `out`."""
    check_free(command.out, resume=command.run_options.resume != "no")
    command = with_split_seed(command)
    rows = read_answers(command)
    tokenizer = pretrained.load_tokenizer(command.model)
    seed = command.training.seed
    start = scorers.start_scorer(command.model, jax.random.key(seed), tokenizer)
    config = start.config
    pretrained.check_tokenizer(tokenizer, config)
    length = min(command.training.length, config.positions)
    arrays = encode_examples(
        command.data,
        command.training,
        rows,
        partial(
            examples.encode_judgements,
            tokenizer=tokenizer,
            learn_from=command.learn_from,
            length=length,
        ),
        f"their two texts have the same last {length} tokens",
    )
    params = {**start.params, **class_thresholds(command, arrays)}
    loss_fn = reward_model.training_loss(heads.reward_model(config), command.learn_from)
    task = _task(command, loss_fn, arrays, config.vocab_size)
    trainer = _open(command, task, params, config, tokenizer, rows)

    def save(params: Params) -> None:
        scorer = {name: x for name, x in params.items() if name != "thresholds"}
        scorers.save_scorer(command.out, start._replace(params=scorer), tokenizer)

    finish_run(trainer, save)


def class_thresholds(command: Reward, arrays: tuple[Arrays, Arrays | None]) -> Params:
    """Return the thresholds that are learned with classes, and nothing for other rows."""
    if command.learn_from != "classes":
        return {}
    classes = np.concatenate([x[-1] for x in arrays if x is not None])
    return {"thresholds": reward_model.initial_thresholds(classes)}


def read_answers(command: Reward) -> Rows:
    """Read the rows, with numbers for labels that are words."""
    columns, names = examples.answer_columns(command.learn_from), command.columns.names()
    if command.learn_from == "pairs":
        return read_examples(command.data, command.training, columns, names)
    label = {"auto": COMMON_NAMES["score"]}.get(command.label_column, (command.label_column,))
    rows, held_out = read_examples(
        command.data, command.training, (*columns, "score"), {**names, "score": label}
    )
    if command.learn_from == "classes" and (order := label_order(rows, command.labels)):
        print(f"The labels from the worst to the best: {', '.join(order)}.")
        rows = number_labels(rows, order)
        held_out = None if held_out is None else number_labels(held_out, order)
    return rows, held_out


def _task(
    command: SFT | Reward,
    loss_fn: SupervisedLoss,
    arrays: tuple[Arrays, Arrays | None],
    vocab_size: int,
    weight: Weight | None = None,
) -> Task:
    """Return what the command minimizes, once it is checked that the model has all tokens."""
    check_tokens(arrays, vocab_size)
    train, held_out = arrays
    options = command.training
    return Task(
        loss_fn=loss_fn,
        train=train,
        held_out=held_out,
        weight=weight,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        select_by=command.run_options.select_by,
    )


def check_tokens(arrays: tuple[Arrays, Arrays | None], vocab_size: int) -> None:
    """Raise ValueError if the rows to learn from, or those that are held out, have other tokens."""
    for tokens in (x for part in arrays for x in part or ()):
        if tokens.ndim == 2 and tokens.dtype == np.int32:
            check_ids(tokens, vocab_size)


def _open(
    command: SFT | Reward,
    task: Task,
    params: Params,
    config: TransformerConfig,
    tokenizer: Any,
    rows: Rows,
) -> SupervisedTrainer:
    """Open the run's folder."""
    return start_run(
        task,
        params,
        out=command.out,
        seed=command.training.seed,
        options=command.run_options,
        training=asdict(command.training),
        command=command,
        model=config,
        tokenizer=tokenizer,
        rows=rows,
    )


def start_run(
    task: Task,
    params: Params,
    *,
    out: Path,
    seed: int,
    options: RunOptions,
    training: dict[str, Any],
    command: Any,
    model: TransformerConfig,
    tokenizer: Any,
    rows: tuple[Any, Any],
) -> SupervisedTrainer:
    """Open the folder of a supervised run.

    Args:
      task: what is minimized.
      params: the initial parameters.
      out: the folder.
      seed: seed of the shuffles.
      options: the options of the run.
      training: the options of the training, for `run.json`.
      command: all options of the command, for `run.json`.
      model: the configuration of the model.
      tokenizer: its tokenizer.
      rows: the rows of the data, and held-out rows that have data of their own, or None.

    Returns:
      The trainer.

    Raises:
      SettingError: if the run has made more steps than it has now.
      ValueError: if there are fewer rows than a batch has, the folder cannot be used, or the run in
        it cannot be resumed.
    """
    epoch = epoch_rows(len(task.train[0]), batch_size=task.batch_size, seed=seed, epoch=0)
    loop = LoopConfig(
        updates=task.epochs * len(epoch),
        seed=seed,
        eval_every=options.eval_every or len(epoch),
        save_every=options.save_every,
        tensorboard=options.tensorboard,
        wandb_project=options.wandb_project,
        progress=options.progress,
    )
    both = {**training, **{name: asdict(options)[name] for name in ("select_by", "eval_every")}}
    config = supervised_config(
        loop=loop,
        training={name: x for name, x in both.items() if name != "seed"},
        command=command,
        params=params,
        model=model,
        tokenizer=tokenizer,
        rows=rows[0],
        eval_rows=rows[1],
    )
    return SupervisedTrainer(task, params, out=out, loop=loop, config=config, resume=options.resume)


def finish_run(trainer: SupervisedTrainer, save: Callable[[Params], None]) -> None:
    """Train, and write the model and the summary.

    Args:
      trainer: the trainer.
      save: writes parameters as a model to the run's folder.
    """
    out = trainer.out
    done = int(trainer.state.update)
    print(
        f"The run in {out} continues after {done} of {trainer.loop.updates} steps."
        if done
        else f"A run of {trainer.loop.updates} steps starts in {out}; the first ones take longer, "
        "as they are compiled."
    )
    with contextlib.ExitStack() as stack:
        # The trainer releases its own lock before the model is written.
        stack.callback(lock_folder(out).release)
        params, kept = trainer.run()
        digest = hashing.digest(params)
        save(params)
        summary = write_summary(out, trainer.loop.updates, digest, kept=kept)
    print_before_and_after(summary)
    print(
        f"The model after {kept} steps is in {out}; every step's metrics are in "
        f"{out / 'metrics.jsonl'}.\nDigest of its parameters: {digest}"
    )
