"""The optimizer steps of an update: of policy and critic together, or of the critic first."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState
from jax import Array

from ppo_jax.ops.metrics import explained_variance
from ppo_jax.ppo.critic import no_critic, value_loss_fn
from ppo_jax.ppo.entropy import entropy_weight
from ppo_jax.ppo.loss import agent_loss_fn
from ppo_jax.ppo.scoring import score_rollout
from ppo_jax.ppo.state import SHUFFLE, SHUFFLE_CRITIC, Agent, PPOState, overlay
from ppo_jax.ppo.update import ppo_update, schedule_at
from ppo_jax.types import Experience, LossFn, Metrics, Params, Rollout


def take_steps(
    agent: Agent,
    state: PPOState,
    rollout: Rollout,
    experience: Experience,
    *,
    loss_fn: LossFn | None = None,
    frozen: Params | None = None,
    axis_name: str | None = None,
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
      The state with the new parameters and optimizer states, and the metrics of the steps.
    """
    c = agent.config
    update = partial(_update, agent, experience=experience, axis_name=axis_name)
    policy = partial(
        update,
        earlier=jnp.maximum(state.update - c.critic.warmup_updates, 0),
        key=state.key_for(SHUFFLE),
        epochs=c.epochs,
        target_kl=c.target_kl,
    )
    loss_of = partial(agent_loss_fn, entropy_coef=entropy_weight(c, state.entropy, loss_fn))
    if state.critic is None:
        train, metrics = policy(state.train, loss_fn=loss_fn or loss_of(agent), frozen=frozen)
        return state.replace(train=train), metrics
    critic, of_critic = _train_critic(agent, state, rollout, update, experience, frozen, axis_name)
    alone = agent._replace(critic=no_critic, config=replace(c, vf_coef=0.0))
    loss_fn, frozen = loss_fn or loss_of(alone), overlay(frozen, critic.params)
    learn = partial(policy, loss_fn=loss_fn, frozen=frozen)
    train, metrics = _after_warmup(c.critic.warmup_updates, state, learn)
    return state.replace(train=train, critic=critic), _merge(metrics, of_critic)


def _update(
    agent: Agent,
    train: TrainState,
    *,
    earlier: Array,
    key: Array,
    experience: Experience,
    loss_fn: LossFn,
    epochs: int,
    target_kl: float | None,
    frozen: Params | None,
    axis_name: str | None,
) -> tuple[TrainState, Metrics]:
    """Run `ppo_update` with the settings, after so many `earlier` updates of these parameters."""
    c = agent.config
    return ppo_update(
        schedule_at(train, earlier * (epochs * c.minibatches)),
        experience,
        key,
        loss_fn=loss_fn,
        epochs=epochs,
        minibatches=c.minibatches,
        micro_batches=c.micro_batches,
        aggregation=c.weighting.function,
        target_kl=target_kl,
        skip_nonfinite=c.skip_nonfinite,
        axis_name=axis_name,
        frozen=frozen,
        bins=c.bins,
    )


def _train_critic(
    agent: Agent,
    state: PPOState,
    rollout: Rollout,
    update: partial,
    experience: Experience,
    frozen: Params | None,
    axis_name: str | None,
) -> tuple[TrainState, Metrics]:
    """Train the critic on the value loss, and measure what it explains afterwards."""
    c, model = agent.config, agent.model
    others = overlay(frozen, state.train.params)
    assert state.critic is not None
    critic, metrics = update(
        state.critic,
        earlier=state.update,
        key=state.key_for(SHUFFLE_CRITIC),
        loss_fn=value_loss_fn(
            model,
            agent.critic,
            value_clip=c.value_clip,
            aggregation=c.weighting.function,
            bins=c.bins,
        ),
        epochs=c.critic_epochs,
        target_kl=None,
        frozen=others,
    )
    params = overlay(others, critic.params)
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


def _after_warmup(warmup: int, state: PPOState, learn: partial) -> tuple[TrainState, Metrics]:
    """Train the policy, or leave it as it is during so many first updates."""
    if not warmup:
        return learn(state.train)

    def wait(train: TrainState) -> tuple[TrainState, Metrics]:
        shapes = jax.eval_shape(learn, train)[1]
        metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return train, metrics | {"optimizer/finite": jnp.float32(1)}

    return jax.lax.cond(state.update >= warmup, learn, wait, state.train)


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
