"""Likeness to a sentence as a reward."""

from typing import NamedTuple

import numpy as np

from ppo_jax.models.io.encoder import Encoder


class LikenessReward(NamedTuple):
    """Cosine of the angle between a response's embedding and that of a target sentence; a reward on texts (`TextReward`)."""

    encoder: Encoder
    target: str

    def __call__(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        return (
            self.encoder(
                [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
            )
            @ (self.encoder([self.target])[0])
        )
