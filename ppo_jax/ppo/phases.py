"""The optimizer steps of an update: of policy and critic together, or of the critic first."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from ppo_jax.ops.metrics import explained_share, explained_variance
from ppo_jax.ppo.critic import no_critic, value_loss_fn
from ppo_jax.ppo.loss import agent_loss_fn
from ppo_jax.ppo.scoring import score_rollout
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import SHUFFLE, SHUFFLE_CRITIC, Agent, PPOState, overlay
from ppo_jax.ppo.update import ppo_update, schedule_at
from ppo_jax.types import AxisName, Experience, LossFn, Metrics, Params, Rollout


def take_steps(
    agent: Agent,
    state: PPOState,
    rollout: Rollout,
    experience: Experience,
    *,
    loss_fn: LossFn | None = None,
    frozen: Params | None = None,
    axis_name: AxisName | None = None,
) -> tuple[PPOState, Metrics]:
    """Take the optimizer steps of one update.

    A critic with its own optimizer learns first, while the policy stands still. After that the
    policy learns from the same advantages, unless the update is one of the critic's warm-up.

    Args:
      agent: model, critic and settings.
      state: the state before the update.
      rollout: the responses that the experience was made from.
      experience: what the update learns from.
      loss_fn: replaces the loss that the settings name; in the policy's own steps it gets the
        parameters of the critic, but those do not change.
      frozen: parameters that are not trained.
      axis_name: mapped axis over which the batch is split.

    Returns:
      The state with the new parameters and optimizer states, and the metrics of the steps. In an
      update of the critic's warm-up, those of the policy's steps are NaN, apart from the counts
      `optimizer/*`.
    """
    if state.critic is None:
        train, metrics = _train_policy(agent, state, experience, loss_fn, frozen, axis_name)
        return state.replace(train=train), metrics
    critic, of_critic = _train_critic(agent, state, rollout, experience, frozen, axis_name)
    policy_alone = agent._replace(critic=no_critic)
    frozen = overlay(frozen, critic.params)
    train, metrics = _after_warmup(
        agent.config.critic.warmup_updates,
        state,
        lambda: _train_policy(policy_alone, state, experience, loss_fn, frozen, axis_name),
    )
    return state.replace(train=train, critic=critic), _merge(metrics, of_critic)


def _train_policy(
    agent: Agent,
    state: PPOState,
    experience: Experience,
    loss_fn: LossFn | None,
    frozen: Params | None,
    axis_name: AxisName | None,
) -> tuple[TrainState, Metrics]:
    """Train the policy, and with it the critic if the critic has no optimizer of its own."""
    c = agent.config
    earlier_updates = jnp.maximum(state.update - c.critic.warmup_updates, 0)
    entropy_coef = None if state.entropy is None else state.entropy.weight
    train, metrics = ppo_update(
        schedule_at(state.train, earlier_updates * (c.epochs * c.minibatches)),
        experience,
        state.key_for(SHUFFLE),
        loss_fn=loss_fn or agent_loss_fn(agent, entropy_coef=entropy_coef),
        epochs=c.epochs,
        target_kl=c.target_kl,
        frozen=frozen,
        axis_name=axis_name,
        **_step_settings(c),
    )
    return train, _explained_in_last_epoch(metrics, experience, axis_name)


def _explained_in_last_epoch(
    metrics: Metrics, experience: Experience, axis_name: AxisName | None
) -> Metrics:
    """Replace the errors of the values by the share of the variance that the values explain."""
    errors = {"value/error", "value/squared_error"}
    if not errors <= metrics.keys():
        return metrics
    residual = metrics["value/squared_error"] - metrics["value/error"] ** 2
    explained = explained_share(
        residual, experience.returns, experience.value_mask, axis_name=axis_name
    )
    others = {name: x for name, x in metrics.items() if name not in errors}
    return {**others, "value/explained_variance_last_epoch": explained}


def _train_critic(
    agent: Agent,
    state: PPOState,
    rollout: Rollout,
    experience: Experience,
    frozen: Params | None,
    axis_name: AxisName | None,
) -> tuple[TrainState, Metrics]:
    """Train the critic on the value loss, and measure what it explains afterwards."""
    c, model = agent.config, agent.model
    assert state.critic is not None
    frozen = overlay(frozen, state.train.params)
    value_loss = value_loss_fn(
        model,
        agent.critic,
        value_clip=c.value_clip,
        aggregation=c.weighting.function,
        bins=c.bins,
    )
    critic, metrics = ppo_update(
        schedule_at(state.critic, state.update * (c.critic_epochs * c.minibatches)),
        experience,
        state.key_for(SHUFFLE_CRITIC),
        loss_fn=value_loss,
        epochs=c.critic_epochs,
        target_kl=None,
        frozen=frozen,
        axis_name=axis_name,
        **_step_settings(c),
    )
    params = overlay(frozen, critic.params)
    # Of the scores only the values are used; the compiler leaves the others out.
    values = score_rollout(
        model,
        agent.critic,
        params,
        params["policy"],
        rollout,
        temperature=c.temperature,
        micro_batch=c.rows_at_a_time,
        bins=c.bins,
    ).values
    metrics["value/explained_variance_after"] = explained_variance(
        values, experience.returns, experience.value_mask, axis_name=axis_name
    )
    return critic, metrics


def _step_settings(config: PPOConfig) -> dict[str, Any]:
    """Return the arguments of `ppo_update` that policy and critic have in common."""
    return {
        "minibatches": config.minibatches,
        "micro_batches": config.micro_batches,
        "aggregation": config.weighting.function,
        "skip_nonfinite": config.skip_nonfinite,
        "bins": config.bins,
    }


def _after_warmup(
    warmup: int, state: PPOState, train_policy: Callable[[], tuple[TrainState, Metrics]]
) -> tuple[TrainState, Metrics]:
    """Train the policy, or leave it as it is during the first `warmup` updates."""
    if not warmup:
        return train_policy()

    def wait() -> tuple[TrainState, Metrics]:
        shapes = jax.eval_shape(train_policy)[1]
        metrics = {name: jnp.full(x.shape, jnp.nan, x.dtype) for name, x in shapes.items()}
        none = dict.fromkeys(("steps", "skipped", "stopped"), 0.0) | {"finite": 1.0}
        return state.train, metrics | {f"optimizer/{x}": jnp.float32(n) for x, n in none.items()}

    return jax.lax.cond(state.update >= warmup, train_policy, wait)


def _merge(policy: Metrics, critic: Metrics) -> Metrics:
    """Join the metrics of the steps of the policy and of the critic."""
    own = {"optimizer/grad_norm": "critic/grad_norm", "optimizer/steps": "critic/steps"}
    return {
        **policy,
        **{name: x for name, x in critic.items() if not name.startswith("optimizer/")},
        **{new: critic[name] for name, new in own.items()},
        "optimizer/skipped": policy["optimizer/skipped"] + critic["optimizer/skipped"],
        "optimizer/finite": policy["optimizer/finite"] * critic["optimizer/finite"],
    }
