"""From the scores of a rollout to the experience that an update learns from, by the settings."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.masked import masked_mean
from ppo_jax.ops.metrics import experience_metrics, importance_metrics
from ppo_jax.ops.rewards import ScaleState
from ppo_jax.ops.scores import informative
from ppo_jax.ppo.choices import OldLogprobs
from ppo_jax.ppo.estimators import groups_of
from ppo_jax.ppo.groups import check_groups
from ppo_jax.ppo.scoring import make_experience
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import PPOState
from ppo_jax.ppo.task_scores import final_scores, sum_scores
from ppo_jax.types import AdvantageFn, AxisName, Experience, Metrics, Rollout, Scores


class Prepared(NamedTuple):
    """A batch that is ready to learn from.

    Attributes:
      scale: the running moments of the scores, with those of the batch.
      rollout: the responses; no token of a response without a score is in its response mask.
      experience: what the update learns from.
      metrics: what describes the batch.
    """

    scale: ScaleState
    rollout: Rollout
    experience: Experience
    metrics: Metrics


def prepare(
    config: PPOConfig,
    state: PPOState,
    rollout: Rollout,
    scores: Scores,
    task_scores: Array,
    token_scores: Array | None,
    *,
    advantage_fn: AdvantageFn,
    axis_name: AxisName | None,
) -> Prepared:
    """Compute rewards, advantages and metrics of a scored rollout; see `learn` for the arguments.

    Raises:
      SettingError: if there are `token_scores` and the settings scale or clip scores, or if a group
        of responses is not intact.
    """
    check_groups(config, len(task_scores))
    scored = ~jnp.isnan(task_scores)
    rollout = rollout.replace(response_mask=rollout.response_mask & scored[:, None])
    scale, final = final_scores(config, state.scale, rollout, task_scores, axis_name=axis_name)
    total_scores = sum_scores(config, rollout, task_scores, token_scores)
    weights = token_weights(config, rollout, scores)
    experience, rewards = make_experience(
        rollout,
        scores,
        final,
        kl_coef=state.kl.coef,
        advantage_fn=advantage_fn,
        score_at=config.score_at,
        token_scores=token_scores,
        whiten_rewards=config.whiten_rewards,
        whiten_advantages=config.whiten_advantages,
        unbiased=config.unbiased_whitening,
        weights=weights,
        axis_name=axis_name,
    )
    experience, selected = finish_experience(
        config, experience, rollout, total_scores, weights, axis_name=axis_name
    )
    metrics = experience_metrics(
        rollout, scores, experience, rewards, total_scores, axis_name=axis_name
    )
    return Prepared(scale, rollout, experience, metrics | selected)


def token_weights(config: PPOConfig, rollout: Rollout, scores: Scores) -> Array | None:
    """Compute the importance weights of the tokens.

    Args:
      config: the settings.
      rollout: `B` responses with the log-probs of the sampler.
      scores: their log-probs by the trainer.

    Returns:
      `[B, R]` float32, or None if the settings ask for no weights.
    """
    compute, bounds = config.importance.function, config.importance_range
    if compute is None:
        return None
    options = {} if bounds is None else {"low": bounds[0], "high": bounds[1]}
    return compute(scores.logprobs, rollout.logprobs, rollout.response_mask, **options)


def finish_experience(
    config: PPOConfig,
    experience: Experience,
    rollout: Rollout,
    scores: Array,
    weights: Array | None,
    *,
    axis_name: AxisName | None = None,
) -> tuple[Experience, Metrics]:
    """Put the scores into an experience, and what the settings say of old log-probs and groups.

    Args:
      config: the settings.
      experience: as `make_experience` returns it.
      rollout: the `B` responses; groups must be intact.
      scores: `[B]` float32, the task's scores, NaN for a response without a score.
      weights: `[B, R]` float32, the importance weights in its advantages, or None.
      axis_name: mapped axis over which the rows are split.

    Returns:
      The experience, and the metrics `importance/*` and `groups/*` where they apply.
    """
    metrics: Metrics = {}
    mask = experience.response_mask
    experience = experience.replace(scores=scores)
    if weights is not None:
        metrics |= importance_metrics(weights, mask, axis_name=axis_name)
    if config.old_logprobs is OldLogprobs.SAMPLER:
        experience = experience.replace(logprobs=rollout.logprobs)
    if config.group_size > 1:
        scored = mask.any(axis=1)
        differ = informative(scores, groups_of(rollout), scored)
        alike = (~differ).astype(jnp.float32)
        metrics["groups/uninformative"] = masked_mean(alike, scored, axis_name=axis_name)
        if config.filter_groups:
            experience = experience.replace(response_mask=mask & differ[:, None])
    return experience, metrics
