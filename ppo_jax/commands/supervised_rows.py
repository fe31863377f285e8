"""The rows that `ppo-jax sft` and `ppo-jax reward` learn from, and the options of the training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ppo_jax.data import examples
from ppo_jax.data.columns import Names
from ppo_jax.data.rows import Row, read_rows
from ppo_jax.errors import SettingError, check_numbers

if TYPE_CHECKING:
    from ppo_jax.ppo.batch_parts import Arrays

Rows = tuple[list[Row], list[Row] | None]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of the training."""

    eval_data: str | None = None
    """Held-out rows, in the formats of the training rows."""
    eval_fraction: float = 0.1
    """Share of the training rows that is held out, chosen at random, without eval_data; 0 holds out
    none."""
    eval_seed: int | None = None
    """Seed of that choice, so that runs with other seeds hold out the same rows. By default 0, or
    that of the run that is resumed."""
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
    """Seed of the shuffles and of new parameters."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("length", "epochs", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} must be positive, not {getattr(self, name)}.")
        if not 0 <= self.eval_fraction < 1:
            raise SettingError(
                f"eval_fraction must be at least 0 and less than 1, not {self.eval_fraction}."
            )


def read_examples(
    source: str, options: TrainingOptions, columns: Sequence[str], names: Names
) -> Rows:
    """Read the rows to learn from, and those that are held out if they have data of their own.

    Args:
      source: the data.
      options: the options of the training.
      columns: the columns that every row must have.
      names: the names that each column may have in the data.
    """

    def read(source: str) -> list[Row]:
        return read_rows(source, columns=columns, optional=("prompt",), names=names)

    other = options.eval_data
    rows, held_out = read(source), None if other is None else read(other)
    if other is None and options.eval_fraction and len(rows) < 2:
        raise ValueError(
            f"{source} holds one row; one more is needed to be held out, or pass --eval-data."
        )
    return rows, held_out


def encode_examples(
    source: str,
    options: TrainingOptions,
    rows: Rows,
    encode: "Callable[[list[Row]], Arrays]",
    reason: str,
) -> "tuple[Arrays, Arrays | None]":
    """Encode the rows to learn from and those that are held out, if there are any.

    Args:
      source: the data.
      options: the options of the training.
      rows: what `read_examples` returned.
      encode: makes arrays of rows, without the rows that teach nothing.
      reason: why rows teach nothing.
    """

    def encoded(rows: list[Row], source: str) -> "Arrays":
        arrays = encode(rows)
        left_out = len(rows) - len(arrays[0])
        if left_out == len(rows):
            raise ValueError(f"No row of {source} teaches anything, because {reason}.")
        if left_out:
            print(f"{left_out} of {len(rows)} rows of {source} are left out, because {reason}.")
        return arrays

    arrays = encoded(rows[0], source)
    if rows[1] is not None and options.eval_data is not None:
        return arrays, encoded(rows[1], options.eval_data)
    if not options.eval_fraction:
        return arrays, None
    if len(arrays[0]) < 2:
        raise ValueError(
            f"Only one row of {source} teaches anything; one more is needed to be held out, "
            "or pass --eval-data."
        )
    return examples.split(arrays, seed=options.eval_seed or 0, fraction=options.eval_fraction)
