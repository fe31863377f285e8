"""The reward that is the score of a reward model."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ppo_jax import data
from ppo_jax.data.chat import template_options
from ppo_jax.data.examples import encode_answer
from ppo_jax.errors import RewardError
from ppo_jax.models import heads
from ppo_jax.models.io import pretrained, scorers
from ppo_jax.reward_functions.protocol import TaskScores, check_scores
from ppo_jax.types import Params, Rollout


class ModelReward(NamedTuple):
    """A reward that scores prompt and response, read as one text, with a reward model.

    A prompt that was a list of messages is rendered, with the response as its answer, by the chat
    template of the reward model's own tokenizer, if that has one.

    Attributes:
      score: `score(params, tokens [B, S], mask [B, S]) -> [B]`, such as jitted
        `models.heads.reward_model`.
      params: parameters of the reward model.
      tokenizer: tokenizer of the reward model, which may differ from the policy's.
      length: number of tokens that a text is cut to, at its beginning.
      pad_id: the token id written at padding positions.
      vocab_size: number of tokens in the model's vocabulary; a text with another token is a fault.

    Example:
      >>> from tokenizers import Tokenizer, models, pre_tokenizers
      >>> from transformers import PreTrainedTokenizerFast
      >>> words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
      >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")
      >>> count_b = lambda params, tokens, mask: ((tokens == 2) & mask).sum(axis=1)
      >>> ModelReward(count_b, None, tokenizer, length=16, pad_id=0).score_texts(["a b", "b a b"])
      array([1., 2.], dtype=float32)
    """

    score: Callable[[Params, Any, Any], jax.Array]
    params: Params
    tokenizer: Any
    length: int
    pad_id: int
    vocab_size: int = 2**31

    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> TaskScores:
        """Score responses with the reward model; see `RewardFn`.

        Args:
          rollout: not read.
          prompts: the `B` prompts.
          responses: the `B` responses as texts.

        Returns:
          A score for each response.

        Raises:
          RewardError: if the chat template fails, a token is not in the vocabulary, or a score is
            not finite.
        """
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        rows = zip(prompts.rows, prompts.messages, responses, strict=True)
        return TaskScores(
            self._score(
                [
                    {**row, "prompt": messages, "response": answer}
                    if has_template and messages
                    else {"prompt": row["prompt"], "response": answer}
                    for row, messages, answer in rows
                ]
            )
        )

    def score_texts(self, texts: list[str]) -> np.ndarray:
        """Score texts.

        Args:
          texts: `n` texts.

        Returns:
          `[n]` float32 scores.

        Raises:
          RewardError: if a token is not in the vocabulary, or a score is not finite.
        """
        return self._score([{"response": text} for text in texts])

    def _score(self, rows: Sequence[data.Row]) -> np.ndarray:
        """Score the column `response` of rows, after their `prompt`, a text or messages."""
        try:
            ids = [
                encode_answer(
                    row.get("prompt"),
                    row["response"],
                    self.tokenizer,
                    length=self.length,
                    options=template_options(row),
                )
                or [self.pad_id]
                for row in rows
            ]
            # Lengths are rounded up to powers of two, so that few programs are compiled.
            length = 1 << (max(map(len, ids)) - 1).bit_length()
            tokens, mask = data.pad(
                ids, length=min(max(length, 16), self.length), pad_id=self.pad_id, left=False
            )
            data.check_ids(tokens, self.vocab_size)
        except ValueError as error:
            raise RewardError(f"The reward model cannot read every response: {error}") from error
        return check_scores(self.score(self.params, tokens, mask), (len(rows),))


def load_model_reward(model: str, label: str | None = None) -> ModelReward:
    """Load a reward model as a reward.

    A text longer than the model's positions is cut at its beginning, so that the response is kept.

    Args:
      model: a folder or a Hugging Face id of a sequence classifier.
      label: name or number of the label whose logit is the score, if the model has several.

    Returns:
      The reward.

    Raises:
      ValueError: if there is no such reward model, its tokenizer does not fit it, or it cannot
        score texts.
    """
    scorer, tokenizer = scorers.load_scorer(model, label=label), pretrained.load_tokenizer(model)
    config = scorer.config
    pretrained.check_tokenizer(tokenizer, config)
    if config.causal and heads.pooled(scorer.params["head"]):
        raise ValueError(
            f"{model} takes its score from the first token, but it is a decoder (is_decoder in its "
            "config.json), whose first token sees no other token."
        )
    return ModelReward(
        jax.jit(heads.reward_model(config)),
        scorer.params,
        tokenizer,
        config.positions,
        data.text.pad_id(tokenizer, config.vocab_size),
        config.vocab_size,
    )
