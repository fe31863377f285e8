"""From the score that the task gives a response to the score that enters its rewards."""

import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.rewards import ScaleState, apply_missing_eos, running_scale
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.types import Rollout


def final_scores(
    config: PPOConfig,
    state: ScaleState,
    rollout: Rollout,
    task_scores: Array,
    *,
    axis_name: str | None = None,
) -> tuple[ScaleState, Array]:
    """Apply the rule for a missing EOS, scaling and clipping to the task's scores.

    Args:
      config: the settings of the three.
      state: the running moments of the scores.
      rollout: `B` responses. One without a token to learn from has no score.
      task_scores: `[B]` float32.
      axis_name: mapped axis over which the rows are split.

    Returns:
      The new moments, which take in the scores even if they are not scaled, and the scores, `[B]`
      float32, NaN for a response without a score.
    """
    final = apply_missing_eos(
        task_scores, rollout.ended, rule=config.missing_eos, penalty=config.missing_eos_penalty
    )
    final = jnp.where(rollout.response_mask.any(axis=1), final, jnp.nan)
    state, scaled = running_scale().update(state, final, axis_name=axis_name)
    final = scaled if config.scale_scores else final
    limit = config.score_clip
    return state, final if limit is None else jnp.clip(final, -limit, limit)
