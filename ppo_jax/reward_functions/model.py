"""A reward model as the reward."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax import Array

from ppo_jax import data
from ppo_jax.data import chat
from ppo_jax.errors import RewardError
from ppo_jax.reward_functions.protocol import TaskScores, check_scores
from ppo_jax.types import Rollout


class Tokenizer(Protocol):
    def __call__(self, texts: list[str], **options: Any) -> Any: ...


class ModelReward(NamedTuple):
    """A reward model with its own tokenizer: prompt and response are scored as one text, or as much of it as `length` holds.

    Prompts that came as messages go, with the response as their answer, through its tokenizer's own chat template, if it has one.
    """

    score: Callable[[Any, Array, Array], Array]  # jitted `models.heads.reward_model`
    params: Any
    tokenizer: Any
    length: int  # tokens that a text is cut to, on the tokenizer's `truncation_side`
    pad_id: int
    vocab_size: int = 2**31  # a text with a greater id is a fault

    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> TaskScores:
        chats = (
            prompts.chats
            if getattr(self.tokenizer, "chat_template", None)
            else [None] * len(responses)
        )
        try:
            told = [
                chat.conversation(messages, response, self.tokenizer)
                for messages, response in zip(chats, responses, strict=True)
            ]
        except ValueError as error:
            raise RewardError(f"The reward model's own chat template fails: {error}") from error
        texts = [
            prompt + response for prompt, response in zip(prompts.texts, responses, strict=True)
        ]
        return TaskScores(self.score_texts(texts, told))

    def score_texts(self, texts: list[str], told: Sequence[str | None] | None = None) -> np.ndarray:
        """`[n]` float32; a text of `told`, which a chat template made, stands for the one at its place."""
        cut = {"closed": True, "truncation": True, "max_length": self.length}
        told = [None] * len(texts) if told is None else told
        encode = lambda text, own: data.encode_text(
            self.tokenizer, own or text, add_special_tokens=own is None, **cut
        )
        ids = [encode(text, own) or [self.pad_id] for text, own in zip(texts, told, strict=True)]
        length = 1 << (max(map(len, ids)) - 1).bit_length()  # few lengths, so few programs
        tokens, mask = data.pad(
            ids, length=min(max(length, 16), self.length), pad_id=self.pad_id, left=False
        )
        try:
            data.check_ids(tokens, self.vocab_size)
        except ValueError as error:
            raise RewardError(f"The reward model cannot read it all: {error}") from error
        return check_scores(self.score(self.params, tokens, mask), (len(texts),))
