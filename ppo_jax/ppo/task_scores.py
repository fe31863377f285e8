"""Turn the scores that a task gives to responses into the scores that PPO optimizes."""

import jax.numpy as jnp
from jax import Array

from ppo_jax.errors import SettingError
from ppo_jax.ops.rewards import ScaleState, apply_missing_eos, running_scale
from ppo_jax.ops.scores import overlong_penalty
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.types import AxisName, Rollout


def sum_scores(
    config: PPOConfig, rollout: Rollout, task_scores: Array, token_scores: Array | None
) -> Array:
    """Add the scores of tokens to the scores of their responses.

    Args:
      config: the settings.
      rollout: `B` responses.
      task_scores: `[B]` float32.
      token_scores: `[B, R]` float32, or None.

    Returns:
      `[B]` float32.

    Raises:
      SettingError: if there are `token_scores` and the settings scale or clip scores.
    """
    if token_scores is None:
        return task_scores
    if config.scale_scores or config.score_clip is not None:
        raise SettingError(
            "scale_scores and score_clip are for scores of whole responses; leave them off where "
            "tokens are scored."
        )
    return task_scores + jnp.where(rollout.response_mask, token_scores, 0).sum(axis=1)


def scores_by_rules(config: PPOConfig, rollout: Rollout, task_scores: Array) -> Array:
    """Apply the rules for a missing EOS and for length to the task's scores.

    Args:
      config: the settings, which include those of the two rules.
      rollout: `B` responses. One without a token to learn from has no score.
      task_scores: `[B]` float32.

    Returns:
      `[B]` float32, NaN for a response without a score.
    """
    final = apply_missing_eos(
        task_scores, rollout.ended, rule=config.missing_eos, penalty=config.missing_eos_penalty
    )
    if config.overlong_buffer is not None:
        final = final + overlong_penalty(
            rollout.response_mask,
            max_length=config.max_new_tokens,
            buffer=config.overlong_buffer,
            weight=config.overlong_penalty,
        )
    return jnp.where(rollout.response_mask.any(axis=1), final, jnp.nan)


def clip_scores(config: PPOConfig, scores: Array) -> Array:
    """Clip scores to `±score_clip`, if this is set."""
    limit = config.score_clip
    return scores if limit is None else jnp.clip(scores, -limit, limit)


def final_scores(
    config: PPOConfig,
    state: ScaleState,
    rollout: Rollout,
    task_scores: Array,
    *,
    axis_name: AxisName | None = None,
) -> tuple[ScaleState, Array]:
    """Apply `scores_by_rules`, scaling and clipping to the task's scores.

    Args:
      config: the settings, which include those of the rules, the scaling and the clipping.
      state: the running moments of the scores.
      rollout: `B` responses.
      task_scores: `[B]` float32.
      axis_name: mapped axis over which the rows are split.

    Returns:
      The new moments, which take in the scores even if they are not scaled, and the scores, `[B]`
      float32, NaN for a response without a score.
    """
    final = scores_by_rules(config, rollout, task_scores)
    state, scaled = running_scale().update(state, final, axis_name=axis_name)
    return state, clip_scores(config, scaled if config.scale_scores else final)
