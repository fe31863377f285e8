"""Losses that train a reward model from pairs, scores or ordered classes.

They take the scores that `models.heads.reward_model` computes. `reward_functions.ModelReward` uses
the trained model as a reward of the PPO loop.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ppo_jax.data.examples import LearnFrom
from ppo_jax.ops.masked import widen
from ppo_jax.ppo.batch_parts import LossAndAccuracy, SupervisedLoss
from ppo_jax.types import Params


def bradley_terry_loss(chosen: Array, rejected: Array, *, margin: float = 0.0) -> LossAndAccuracy:
    """Compute the Bradley-Terry loss of pairs, and the share of pairs in the right order.

        L = - mean log σ(r_chosen - r_rejected - margin)

    Args:
      chosen: `[B]` float32, the score of the preferred answer of each pair.
      rejected: `[B]` float32, the score of the other answer.
      margin: the difference that the scores should exceed.

    Returns:
      The loss in nats and the accuracy, `[]` float32 each.

    Raises:
      AssertionError: if the arrays differ in shape.

    Source:
      Bradley & Terry 1952; Stiennon et al. 2020 (https://arxiv.org/abs/2009.01325), section 3.4.

    Example:
      >>> loss, accuracy = bradley_terry_loss(jnp.array([1.0]), jnp.array([1.0]))
      >>> round(float(loss), 4), float(accuracy)
      (0.6931, 0.0)
    """
    chex.assert_equal_shape([chosen, rejected])
    chosen, rejected = widen(chosen), widen(rejected)
    loss = -jnp.mean(jax.nn.log_sigmoid(chosen - rejected - margin))
    return loss, jnp.mean((chosen > rejected).astype(jnp.float32))


def regression_loss(scores: Array, targets: Array) -> LossAndAccuracy:
    """Compute the mean squared error, and the share of scores with the sign of their target.

        L = mean (r - target)²

    Args:
      scores: `[B]` float32, the scores of the model.
      targets: `[B]` float32, the scores to learn.

    Returns:
      The loss and the accuracy, `[]` float32 each.

    Raises:
      AssertionError: if the arrays differ in shape.

    Source:
      Wang et al. 2024 (https://arxiv.org/abs/2406.08673) train reward models with it.

    Example:
      >>> [float(x) for x in regression_loss(jnp.array([1.0, -1.0]), jnp.array([2.0, 1.0]))]
      [2.5, 0.5]
    """
    chex.assert_equal_shape([scores, targets])
    scores, targets = widen(scores), widen(targets)
    agree = (scores > 0) == (targets > 0)
    return jnp.mean((scores - targets) ** 2), jnp.mean(agree.astype(jnp.float32))


def ordinal_loss(scores: Array, classes: Array, thresholds: Array) -> LossAndAccuracy:
    """Compute the cumulative-link loss, with which one score orders all classes.

        P(class > k) = σ(r - θ_k)

    Args:
      scores: `[B]` float32, the scores of the model.
      classes: `[B]` int32, the classes to learn, from 0 to `K`.
      thresholds: `[K]` float32, θ, ascending.

    Returns:
      The mean over rows of their summed binary cross-entropies in nats, and the share of classes
      predicted exactly; `[]` float32 each.

    Raises:
      AssertionError: if an array does not have exactly one axis.

    Source:
      McCullagh 1980, "Regression Models for Ordinal Data"; in this form Cao et al. 2019
      (https://arxiv.org/abs/1901.07884).

    Example:
      >>> loss, accuracy = ordinal_loss(jnp.array([9.0]), jnp.array([1]), jnp.array([0.0]))
      >>> round(float(loss), 4), float(accuracy)
      (0.0001, 1.0)
    """
    chex.assert_rank([scores, classes, thresholds], 1)
    scores, thresholds = widen(scores), widen(thresholds)
    above = classes[:, None] > jnp.arange(thresholds.size)[None, :]
    logits = scores[:, None] - thresholds[None, :]
    loss = -jnp.sum(
        jnp.where(above, jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)), axis=1
    )
    return jnp.mean(loss), jnp.mean((jnp.sum(logits > 0, axis=1) == classes).astype(jnp.float32))


def training_loss(
    score: Callable[[Params, Any, Any], Array], learn_from: LearnFrom
) -> SupervisedLoss:
    """Make the loss of a batch of arrays as `data.examples.encode_judgements` returns them.

    Args:
      score: `score(params, tokens [B, S], mask [B, S]) -> [B]`, from `models.heads.reward_model`.
      learn_from: what the rows hold; with "classes" the parameters need an entry `thresholds`.

    Returns:
      `loss_fn(params, *batch) -> (loss, accuracy)`.
    """

    def loss_fn(params: Params, *batch: Array) -> LossAndAccuracy:
        scores = score(params, *batch[:2])
        match learn_from:
            case "pairs":
                return bradley_terry_loss(scores, score(params, *batch[2:]))
            case "scores":
                return regression_loss(scores, batch[2])
            case "classes":
                return ordinal_loss(scores, batch[2], params["thresholds"])

    return loss_fn


def initial_thresholds(classes: np.ndarray) -> Array:
    """Estimate the thresholds of `ordinal_loss` from the shares of the classes.

    Args:
      classes: `[n]` int32, from 0 to `K`.

    Returns:
      `[K]` float32, the logits of `P(class <= k)`.

    Raises:
      ValueError: if there is only one class.

    Example:
      >>> initial_thresholds(np.array([0, 1, 1, 0]))
      Array([0.], dtype=float32)
    """
    counts = np.bincount(classes)
    if len(counts) < 2:
        raise ValueError("The scores hold a single class; an ordinal loss needs two.")
    share = np.clip(np.cumsum(counts)[:-1] / counts.sum(), 0.01, 0.99)
    return jnp.asarray(np.log(share / (1 - share)), jnp.float32)
