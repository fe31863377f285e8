"""What the training loop expects of a reward, and the checks of what a reward returns."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ppo_jax import data
from ppo_jax.errors import RewardError
from ppo_jax.ops.scores import weighted_score
from ppo_jax.reward_functions.worker import describe
from ppo_jax.types import Rollout


class TaskScores(NamedTuple):
    """Scores of `B` responses of up to `R` tokens.

    Attributes:
      response: `[B]` float32, the score of each response as a whole. A response whose score is NaN
        could not be scored; an update learns nothing from it.
      tokens: `[B, R]` float32, additional scores of single tokens, or None.
      parts: named parts of the scores, `[B]` float32 each, whose means are logged; or None.

    Example:
      >>> scores = TaskScores(np.array([1.0, 2.0]), np.array([[0.5, 9.0], [0.25, 0.25]]))
      >>> scores.total(np.array([[True, False], [True, True]]))
      array([1.5, 2.5])
    """

    response: np.ndarray
    tokens: np.ndarray | None = None
    parts: dict[str, np.ndarray] | None = None

    def total(self, mask: jax.Array | np.ndarray) -> np.ndarray:
        """Add the scores of the tokens within `mask` to the score of their response.

        Args:
          mask: `[B, R]` bool, the real tokens.

        Returns:
          `[B]`.
        """
        if self.tokens is None:
            return self.response
        return self.response + np.where(mask, self.tokens, 0).sum(axis=1)

    def part_means(self) -> dict[str, float]:
        """Return the mean of each part over the responses that it has a score for, as metrics."""
        return {
            f"reward/{name}": float(np.nanmean(x, dtype=np.float64))
            for name, x in (self.parts or {}).items()
            if not np.isnan(x).all()
        }


class RewardFn(Protocol):
    """A reward of the training loop: any callable with this signature.

    Example:
      >>> def brevity(rollout, prompts, responses):
      ...     return TaskScores(-np.asarray(rollout.response_mask).sum(axis=1).astype(np.float32))
      >>> reward: RewardFn = brevity
    """

    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> TaskScores:
        """Score `B` responses.

        Args:
          rollout: the responses as arrays of tokens, with their prompts.
          prompts: the `B` prompts as texts, with all columns of their rows.
          responses: the `B` responses as texts, up to the token that ends them.

        Returns:
          The scores.

        Raises:
          RewardError: if the responses cannot be scored.
        """


def check_scores(scores: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Convert what a reward function returned to float32 scores.

    Args:
      scores: numbers in any array or sequence, a PyTorch tensor among them. None in place of a
        number says that a response could not be scored.
      shape: the expected shape, `[B]` or `[B, R]`.

    Returns:
      The scores, `shape` float32, with NaN for None.

    Raises:
      RewardError: if these are not numbers, have another shape, or are not all finite.

    Example:
      >>> check_scores([0.5, 1], (2,))
      array([0.5, 1. ], dtype=float32)
    """
    if isinstance(scores, np.ma.MaskedArray):
        scores = scores.tolist()  # with None for what is masked
    if len(shape) == 1 and isinstance(scores, list | tuple):
        _check_entries(scores)
    try:
        array, unscored = _as_array(scores)
    except Exception as error:  # A user's object may raise anything when it is converted.
        raise RewardError(
            f"The reward function must return {shape[0]} numbers: {error}."
        ) from error
    if array.shape != shape:
        raise RewardError(
            f"The reward function returned scores of shape {array.shape} for {shape[0]} responses; "
            f"the shape must be {shape}."
        )
    bad = np.argwhere(~np.isfinite(array) & ~unscored)
    if len(bad):
        raise RewardError(
            f"The reward function returned {array[tuple(bad[0])]} for response {bad[0][0]} "
            f"({len(bad)} of {array.size} scores are not finite).",
            tuple(sorted({int(row[0]) for row in bad})),
        )
    return array


def _check_entries(scores: Sequence[Any]) -> None:
    """Raise RewardError, which names the responses, if an entry is neither a number nor None."""
    numeric = lambda x: isinstance(x, numbers.Number) or getattr(x, "ndim", None) == 0
    wrong = [i for i, x in enumerate(scores) if not (x is None or numeric(x))]
    if wrong:
        raise RewardError(
            f"The reward function returned {scores[wrong[0]]!r:.80} for response {wrong[0]}, which "
            f"is no number ({len(wrong)} of {len(scores)} scores).",
            tuple(wrong),
        )


def _as_array(scores: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return scores as float32 with NaN for None, and where they are None."""
    if hasattr(scores, "detach"):  # a PyTorch tensor
        scores = scores.detach().cpu().float()
    array = np.asarray(scores)
    unscored = np.reshape([x is None for x in array.flat], array.shape).astype(bool)
    if array.ndim == 0:
        raise TypeError(f"it returned {scores!r}")
    if array.dtype == object:
        array = np.where(unscored, np.nan, array).astype(float)
    # NumPy does not count bfloat16 as a floating type; JAX does.
    if array.dtype.kind not in "biuf" and not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
        raise TypeError(f"its dtype {array.dtype} is not numeric")
    return array.astype(np.float32), unscored


def as_task_scores(returned: Any, count: int) -> TaskScores:
    """Convert what a function of texts returned to scores.

    Args:
      returned: `count` numbers, or a dictionary of named parts with `count` numbers each, whose sum
        is the score. None in place of a number says that a response could not be scored.
      count: the number of responses.

    Returns:
      The scores, with their parts if they were named.

    Raises:
      RewardError: as `check_scores`.

    Example:
      >>> as_task_scores({"correct": [1, 0], "short": [0.5, None]}, 2).response
      array([1.5, 0. ], dtype=float32)
    """
    if not isinstance(returned, dict):
        return TaskScores(check_scores(returned, (count,)))
    if not returned:
        raise RewardError(f"The reward function must return {count} numbers, not an empty dict.")
    parts: dict[str, np.ndarray] = {}
    for name, scores in returned.items():
        try:
            parts[str(name)] = check_scores(scores, (count,))
        except RewardError as error:
            raise error.with_rows(error.rows, f"In the part {name!r}: {error}") from error
    return TaskScores(add_parts(parts, dict.fromkeys(parts, 1.0)), None, parts)


def add_parts(parts: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Add up the named parts of scores as `weighted_score` does, on the host."""
    arrays = {name: jax.numpy.asarray(part) for name, part in parts.items()}
    return np.asarray(weighted_score(arrays, weights))


def require_scores(scores: TaskScores) -> TaskScores:
    """Return scores as they are, unless no response has one.

    Args:
      scores: the scores of `B` responses.

    Returns:
      The same scores.

    Raises:
      RewardError: if `B` is positive and all scores of responses are NaN.
    """
    if len(scores.response) and np.isnan(scores.response).all():
        late = (scores.parts or {}).get("timeouts")
        why = "" if late is None else f"; {int(late.sum())} of them took longer than the time limit"
        raise RewardError(
            f"The reward gave no score for any of {len(scores.response)} responses{why}."
        )
    return scores


def as_reward_error(error: BaseException) -> RewardError:
    """Describe what a reward function raised, and the line of its file where it was raised."""
    return RewardError(describe(error))
