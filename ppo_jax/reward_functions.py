"""The three kinds of reward that the train loop takes, behind one call, and the checks on what a user's function returns."""

import copy
import inspect
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ppo_jax import chat, data
from ppo_jax.faults import RewardError
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
        return self.response if self.tokens is None else self.response + np.where(mask, self.tokens, 0).sum(axis=1)


class RewardFn(Protocol):
    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> TaskScores:
        """Scores of responses, given as arrays and as texts."""


class Tokenizer(Protocol):
    def __call__(self, texts: list[str], **options: Any) -> Any: ...


class TextReward(NamedTuple):
    """`function(prompts, responses)` on lists of texts, or `function(prompts, responses, rows)` with the prompts' columns."""

    function: Callable[..., Sequence[float]]

    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> TaskScores:
        takes_rows = _takes_rows(self.function)
        try:
            rows = [copy.deepcopy(prompts.rows)] if takes_rows else []  # its own, which it may change
            scores = self.function(prompts.texts, list(responses), *rows)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # `exit()` and a cancelled task are not of the kind Exception
            raise _raised(error) from error
        return TaskScores(check_scores(scores, (len(responses),)))


class TokenReward(NamedTuple):
    """A jittable `function(tokens [B, T], mask [B, T], response_mask [B, R])`: scores `[B]`, or scores of tokens `[B, R]`, or
    both as a pair."""

    function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array | tuple[jax.Array, jax.Array]]

    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> TaskScores:
        try:
            scores = jax.jit(self.function)(rollout.tokens, rollout.mask, rollout.response_mask)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise _raised(error) from error
        rows, columns = rollout.response_mask.shape
        if isinstance(scores, tuple):
            if len(scores) != 2:
                raise RewardError(f"The reward function returned {len(scores)} arrays, not one or two.")
            return TaskScores(check_scores(scores[0], (rows,)), check_scores(scores[1], (rows, columns)))
        if np.ndim(scores) == 2:
            return TaskScores(np.zeros(rows, np.float32), check_scores(scores, (rows, columns)))
        return TaskScores(check_scores(scores, (rows,)))


class ModelReward(NamedTuple):
    """A reward model with its own tokenizer: prompt and response are scored as one text, or as much of it as `length` holds.

    Prompts that came as messages go, with the response as their answer, through its tokenizer's own chat template, if it has one.
    """

    score: Callable[[Any, jax.Array, jax.Array], jax.Array]  # jitted `models.heads.reward_model`
    params: Any
    tokenizer: Any
    length: int  # tokens that a text is cut to, on the tokenizer's `truncation_side`
    pad_id: int
    vocab_size: int = 2**31  # a text with a greater id is a fault

    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> TaskScores:
        chats = prompts.chats if getattr(self.tokenizer, "chat_template", None) else [None] * len(responses)
        try:
            told = [
                chat.conversation(messages, response, self.tokenizer) for messages, response in zip(chats, responses, strict=True)
            ]
        except ValueError as error:
            raise RewardError(f"The reward model's own chat template fails: {error}") from error
        texts = [prompt + response for prompt, response in zip(prompts.texts, responses, strict=True)]
        return TaskScores(self.score_texts(texts, told))

    def score_texts(self, texts: list[str], told: Sequence[str | None] | None = None) -> np.ndarray:
        """`[n]` float32; a text of `told`, which a chat template made, stands for the one at its place."""
        cut = {"closed": True, "truncation": True, "max_length": self.length}
        told = [None] * len(texts) if told is None else told
        encode = lambda text, own: data.encode_text(self.tokenizer, own or text, add_special_tokens=own is None, **cut)
        ids = [encode(text, own) or [self.pad_id] for text, own in zip(texts, told, strict=True)]
        length = 1 << (max(map(len, ids)) - 1).bit_length()  # few lengths, so few programs
        tokens, mask = data.pad(ids, length=min(max(length, 16), self.length), pad_id=self.pad_id, left=False)
        try:
            data.check_ids(tokens, self.vocab_size)
        except ValueError as error:
            raise RewardError(f"The reward model cannot read it all: {error}") from error
        return check_scores(self.score(self.params, tokens, mask), (len(texts),))


def _takes_rows(function: Callable) -> bool:
    """Whether it has a third parameter that must be given, or one called `rows`."""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        given = [p for p in inspect.signature(function).parameters.values() if p.kind in places]
    except ValueError:  # some functions written in C do not say what they take
        return False
    return len(given) > 2 and (given[2].default is inspect.Parameter.empty or given[2].name == "rows")


def _raised(error: BaseException) -> RewardError:
    """Says what a reward function raised, and where in its own file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    at = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if len(frames) > 1 else ""
    try:
        said = str(error)
    except Exception:  # it may have a faulty __str__
        said = "it does not say why"
    return RewardError(f"The reward function raised {type(error).__name__}{at}: {said}")


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
        if array.dtype.kind not in "biuf" and not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            raise TypeError(f"{array.dtype} is no number")
        array = array.astype(np.float32)
    except Exception as error:  # whatever its object raises when it is read
        raise RewardError(f"The reward function must return {shape[0]} numbers: {error}.") from error
    if array.shape != shape:
        raise RewardError(f"The reward function returned scores of shape {array.shape}, not {shape}, for {shape[0]} responses.")
    if not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))
        raise RewardError(
            f"The reward function returned {array[tuple(bad[0])]} for response {bad[0][0]} ({len(bad)} such of {array.size}).",
            tuple(sorted({int(row[0]) for row in bad})),
        )
    return array
