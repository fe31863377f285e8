"""A reward for texts whose meaning is similar to that of a given sentence."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class LikenessReward(NamedTuple):
    """Cosine similarity of a text's embedding and a target's; pass it to `TextReward`.

    A prompt and its response are embedded as one text.

    Attributes:
      encoder: maps `n` texts to embeddings of length 1, `[n, D]`; for example a
        `models.io.encoder.Encoder`.
      target: the sentence to resemble.

    Source:
      Sentence embeddings and their cosine similarity: Reimers & Gurevych 2019
      (https://arxiv.org/abs/1908.10084).

    Example:
      >>> def encoder(texts):
      ...     return np.array([[1.0, 0.0] if "good" in text else [0.6, 0.8] for text in texts])
      >>> LikenessReward(encoder, "a good film")(["It was", "It was"], [" good", " long"])
      array([1. , 0.6])
    """

    encoder: Callable[[list[str]], np.ndarray]
    target: str

    def __call__(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        """Score responses.

        Args:
          prompts: `B` texts.
          responses: `B` texts.

        Returns:
          `[B]` similarities between -1 and 1.
        """
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return self.encoder(texts) @ self.encoder([self.target])[0]
