"""The three kinds of reward that the train loop takes, behind one call, and the checks on what a user's function returns."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ppo_jax import data
from ppo_jax.types import Rollout


class RewardError(ValueError):
    """A reward function failed or returned what is no score; the message says which."""


class RewardFn(Protocol):
    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> np.ndarray:
        """Scores `[B]` float32 of responses, given as arrays and as texts."""


class Tokenizer(Protocol):
    def __call__(self, texts: list[str], **options: Any) -> Any: ...


class TextReward(NamedTuple):
    """`function(prompts, responses)` on lists of texts, or `function(prompts, responses, rows)` with the prompts' columns."""

    function: Callable[..., Sequence[float]]

    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> np.ndarray:
        args = [prompts.texts, responses, prompts.rows][: max(2, len(inspect.signature(self.function).parameters))]
        try:
            scores = self.function(*args)
        except Exception as error:
            raise RewardError(f"The reward function raised {type(error).__name__}: {error}") from error
        return check_scores(scores, len(responses))


class TokenReward(NamedTuple):
    """A jittable `function(tokens [B, T], mask [B, T], response_mask [B, R]) -> [B]`."""

    function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> np.ndarray:
        scores = jax.jit(self.function)(rollout.tokens, rollout.mask, rollout.response_mask)
        return check_scores(scores, len(responses))


class ModelReward(NamedTuple):
    """A reward model with its own tokenizer: prompt and response are scored as one text."""

    score: Callable[[Any, jax.Array, jax.Array], jax.Array]  # jitted `models.heads.reward_model`
    params: Any
    tokenizer: Any
    length: int  # tokens that a text is cut or padded to
    pad_id: int

    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> np.ndarray:
        return self.score_texts([p + r for p, r in zip(prompts.texts, responses, strict=True)])

    def score_texts(self, texts: list[str]) -> np.ndarray:
        ids = [self.tokenizer(text).input_ids[: self.length] or [self.pad_id] for text in texts]
        tokens, mask = data.pad(ids, length=self.length, pad_id=self.pad_id, left=False)
        return check_scores(self.score(self.params, tokens, mask), len(texts))


def check_scores(scores: Any, rows: int) -> np.ndarray:
    """`[rows]` float32 scores of whatever a reward function returned.

    Raises:
      RewardError: for another number of them, text, or a value that is not finite.

    Example:
      >>> check_scores([0.5, 1], 2)
      array([0.5, 1. ], dtype=float32)
    """
    try:
        array = np.asarray(scores)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{array.dtype} is no number")
        array = array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise RewardError(f"The reward function must return {rows} numbers: {error}.") from error
    if array.shape != (rows,):
        raise RewardError(f"The reward function returned scores of shape {array.shape} for {rows} responses.")
    if not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array))
        raise RewardError(f"The reward function returned {array[bad[0]]} for response {bad[0]} ({bad.size} such of {rows}).")
    return array
