"""What the train loop asks of a reward, and the checks on what it returns."""

import traceback
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ppo_jax import data
from ppo_jax.errors import RewardError
from ppo_jax.types import Rollout


class TaskScores(NamedTuple):
    """What a reward says of `B` responses.

    Attributes:
      response: `[B]` float32, of each as a whole.
      tokens: `[B, R]` float32, of single tokens beside it, or `None`.
    """

    response: np.ndarray
    tokens: np.ndarray | None = None

    def total(self, mask: Any) -> np.ndarray:
        """`[B]`, the scores of a response and of its tokens within `mask [B, R]`."""
        return (
            self.response
            if self.tokens is None
            else self.response + np.where(mask, self.tokens, 0).sum(axis=1)
        )


class RewardFn(Protocol):
    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> TaskScores:
        """Scores of responses, given as arrays and as texts."""


def check_scores(scores: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 scores of whatever a reward function returned.

    Raises:
      RewardError: for another number of them, text, or a value that is not finite.

    Example:
      >>> check_scores([0.5, 1], (2,))
      array([0.5, 1. ], dtype=float32)
    """
    try:
        if hasattr(scores, "detach"):  # a PyTorch tensor
            scores = scores.detach().cpu().float()
        array = np.asarray(scores)
        if array.dtype.kind not in "biuf" and not jax.numpy.issubdtype(
            array.dtype, jax.numpy.floating
        ):
            raise TypeError(f"{array.dtype} is no number")
        array = array.astype(np.float32)
    except Exception as error:  # whatever its object raises when it is read
        raise RewardError(
            f"The reward function must return {shape[0]} numbers: {error}."
        ) from error
    if array.shape != shape:
        raise RewardError(
            f"The reward function returned scores of shape {array.shape}, not {shape}, for {shape[0]} responses."
        )
    if not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))
        raise RewardError(
            f"The reward function returned {array[tuple(bad[0])]} for response {bad[0][0]} ({len(bad)} such of {array.size}).",
            tuple(sorted({int(row[0]) for row in bad})),
        )
    return array


def _raised(error: BaseException) -> RewardError:
    """Says what a reward function raised, and where in its own file."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename
    ]
    at = (
        f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if len(frames) > 1 else ""
    )
    try:
        said = str(error)
    except Exception:  # it may have a faulty __str__
        said = "it does not say why"
    return RewardError(f"The reward function raised {type(error).__name__}{at}: {said}")
