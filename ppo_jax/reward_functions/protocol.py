"""What the training loop expects of a reward, and the checks of what a reward returns."""

import traceback
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ppo_jax import data
from ppo_jax.errors import RewardError
from ppo_jax.types import Rollout


class TaskScores(NamedTuple):
    """Scores of `B` responses of up to `R` tokens.

    Attributes:
      response: `[B]` float32, the score of each response as a whole. A response whose score is NaN
        could not be scored; an update learns nothing from it.
      tokens: `[B, R]` float32, additional scores of single tokens, or None.

    Example:
      >>> scores = TaskScores(np.array([1.0, 2.0]), np.array([[0.5, 9.0], [0.25, 0.25]]))
      >>> scores.total(np.array([[True, False], [True, True]]))
      array([1.5, 2.5])
    """

    response: np.ndarray
    tokens: np.ndarray | None = None

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
      RewardError: if these are not numbers, have another shape, are not all finite, or if all are
        None.

    Example:
      >>> check_scores([0.5, 1], (2,))
      array([0.5, 1. ], dtype=float32)
    """
    if isinstance(scores, dict):
        raise RewardError(
            f"The reward function returned a dict with the keys {list(scores)}; return the sum of "
            f"its scores as one list of {shape[0]} numbers."
        )
    try:
        if hasattr(scores, "detach"):  # a PyTorch tensor
            scores = scores.detach().cpu().float()
        array = np.asarray(scores)
        unscored = np.reshape([x is None for x in array.flat], array.shape).astype(bool)
        if array.size and unscored.all():
            raise ValueError("it returned None for every response")
        array = np.where(unscored, np.nan, array).astype(float) if unscored.any() else array
        # NumPy does not count bfloat16 as a floating type; JAX does.
        if array.dtype.kind not in "biuf" and not jax.numpy.issubdtype(
            array.dtype, jax.numpy.floating
        ):
            raise TypeError(f"its dtype {array.dtype} is not numeric")
        array = array.astype(np.float32)
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


def as_reward_error(error: BaseException) -> RewardError:
    """Describe what a reward function raised, and the line of its file where it was raised."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename
    ]
    # The first frame is the caller's; there are no more if the function is not written in Python.
    where = (
        f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if len(frames) > 1 else ""
    )
    try:
        message = str(error)
    except Exception:  # The exception's own __str__ may fail.
        message = "its message cannot be printed"
    return RewardError(f"The reward function raised {type(error).__name__}{where}: {message}")
