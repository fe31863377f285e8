"""The PPO iteration, on one screen: sample, score, turn scores into experience, learn.

Everything that changes is in `PPOState`; `sample`, `score` and `learn` are pure, and `Trainer` (in `train`) compiles them once.
"""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from ppo_jax.errors import SettingError
from ppo_jax.ops.kl import KLState
from ppo_jax.ops.metrics import experience_metrics
from ppo_jax.ops.rewards import ScaleState, apply_missing_eos, running_scale
from ppo_jax.ppo import update
from ppo_jax.ppo.loss import ppo_loss_fn
from ppo_jax.ppo.rollout import generate
from ppo_jax.ppo.scoring import join_rows, make_experience, score_rollout, split_rows
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.types import (
    AdvantageFn,
    CriticFn,
    LanguageModel,
    LossFn,
    Metrics,
    Params,
    Rollout,
    Scores,
    overlay,
)

_SAMPLE, _SHUFFLE = 0, 1  # one key a purpose
_INIT = 2**32 - 1  # no update has this number


@flax.struct.dataclass
class PPOState:
    """All that changes in a run, and all that a checkpoint holds beside the data's position.

    Attributes:
      train: parameters `{"policy": ..., "critic": ...}` and optimizer state.
      kl: the KL controller's.
      scale: running moments of the scores.
      key: `[]` typed key, the root; never drawn from itself.
      update: `[]` int32, updates done.
    """

    train: TrainState
    kl: KLState
    scale: ScaleState
    key: jax.Array
    update: jax.Array

    @property
    def policy(self) -> Params:
        return self.train.params["policy"]

    def key_for(self, purpose: int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(self.key, self.update), purpose)


class Agent(NamedTuple):
    """What is fixed while compiled: the functions of the policy and critic, and the settings."""

    model: LanguageModel
    critic: CriticFn
    config: PPOConfig
    stop_ids: tuple[int, ...]
    pad_id: int


def init_key(seed: int, part: int) -> jax.Array:
    """`[]` typed key for `part` of the new parameters, apart from all keys of a run with that seed.

    Children of `jax.random.key(seed)` itself would be the keys of the first updates: `split` and `fold_in` give the same ones.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _INIT), part)


def init_state(agent: Agent, params: Params, key: jax.Array, *, updates: int) -> PPOState:
    """The state before the first of `updates` updates, from `{"policy": ..., "critic": ...}`."""
    train = TrainState.create(
        apply_fn=agent.model.hidden, params=params, tx=agent.config.optimizer(updates)
    )
    train = train.replace(step=jnp.int32(0))
    return PPOState(
        train, agent.config.controller().init(), running_scale().init(), key, jnp.int32(0)
    )


def sample(
    agent: Agent,
    state: PPOState,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    *,
    row_ids: jax.Array | None = None,
    frozen: Params | None = None,
) -> Rollout:
    """A response to each of `B` left-padded prompts `[B, P]`; `row_ids [B]` number them in the global batch.

    Here and below, `frozen` holds parameters that do not train: the state's lie over them (see `types.overlay`, `models.lora`).
    """
    c, params, key = (
        agent.config,
        overlay(frozen, state.train.params)["policy"],
        state.key_for(_SAMPLE),
    )

    def some(rows: tuple[jax.Array, jax.Array, jax.Array]) -> Rollout:
        return generate(
            agent.model,
            params,
            key,
            rows[0],
            rows[1],
            max_new_tokens=c.max_new_tokens,
            min_new_tokens=c.min_new_tokens,
            stop_ids=agent.stop_ids,
            pad_id=agent.pad_id,
            temperature=c.temperature,
            top_k=c.top_k,
            top_p=c.top_p,
            stop_at_end=c.stop_at_end,
            truncate_after=c.truncate_after,
            row_ids=rows[2],
        )

    B = len(prompts)
    rows = (prompts, prompt_mask, jnp.arange(B) if row_ids is None else row_ids)
    if c.rollout_rows is None or c.rollout_rows >= B:
        return some(rows)
    return join_rows(jax.lax.map(some, split_rows(rows, B // c.rollout_rows)))


def score(
    agent: Agent,
    state: PPOState,
    ref_params: Params,
    rollout: Rollout,
    *,
    frozen: Params | None = None,
) -> Scores:
    """What policy, reference and critic say of the responses; it needs no task score, so it runs while that is made."""
    c = agent.config
    return score_rollout(
        agent.model,
        agent.critic,
        overlay(frozen, state.train.params),
        ref_params,
        rollout,
        temperature=c.temperature,
        kl_estimator=c.kl_estimator.function,
        micro_batch=c.rows_at_a_time,
        chunk=c.logit_chunk,
    )


def learn(
    agent: Agent,
    state: PPOState,
    rollout: Rollout,
    scores: Scores,
    task_scores: jax.Array,
    token_scores: jax.Array | None = None,
    *,
    frozen: Params | None = None,
    advantage_fn: AdvantageFn | None = None,
    loss_fn: LossFn | None = None,
    advantage_fn: AdvantageFn | None = None,
    axis_name: str | None = None,
) -> tuple[PPOState, Metrics]:
    """Task scores `[B]` (and `[B, R]` of tokens) to rewards, advantages and `epochs x minibatches` steps.

    `loss_fn` stands in for PPO's loss. Under a mapped `axis_name` the rows are this device's share of the batch, and all averages
    are global.
    """
    c = agent.config
    final = apply_missing_eos(
        task_scores, rollout.ended, rule=c.missing_eos, penalty=c.missing_eos_penalty
    )
    if token_scores is not None and (c.scale_scores or c.score_clip is not None):
        raise SettingError(
            "scale_scores and score_clip are of scores of whole responses; leave them off where tokens are scored."
        )
    scale, scaled = running_scale().update(state.scale, final, axis_name=axis_name)
    final = scaled if c.scale_scores else final
    final = final if c.score_clip is None else jnp.clip(final, -c.score_clip, c.score_clip)
    experience, rewards = make_experience(
        rollout,
        scores,
        final,
        kl_coef=state.kl.coef,
        gamma=c.gamma,
        lam=c.lam,
        score_at=c.score_at,
        token_scores=token_scores,
        whiten_rewards=c.whiten_rewards,
        whiten_advantages=c.whiten_advantages,
        unbiased=c.unbiased_whitening,
        axis_name=axis_name,
    )
    loss_fn = loss_fn or ppo_loss_fn(
        agent.model,
        agent.critic,
        temperature=c.temperature,
        clip_low=c.clip_low,
        clip_high=c.clip_high,
        value_clip=c.value_clip,
        vf_coef=c.vf_coef,
        entropy_coef=c.entropy_coef,
        dual_clip=c.dual_clip,
        aggregation=c.weighting.aggregation,
        chunk=c.logit_chunk,
    )
    due = update.schedule_at(state.train, state.update * (c.epochs * c.minibatches))
    train, learned = update.ppo_update(
        due,
        experience,
        state.key_for(_SHUFFLE),
        epochs=c.epochs,
        minibatches=c.minibatches,
        micro_batches=c.micro_batches,
        aggregation=c.weighting.aggregation,
        target_kl=c.target_kl,
        skip_nonfinite=c.skip_nonfinite,
        axis_name=axis_name,
        loss_fn=loss_fn,
        frozen=frozen,
    )
    total = (
        task_scores
        if token_scores is None
        else task_scores + jnp.where(rollout.response_mask, token_scores, 0).sum(axis=1)
    )
    seen = experience_metrics(rollout, scores, experience, rewards, total, axis_name=axis_name)
    kl_state = c.controller().update(state.kl, seen["objective/kl"], c.batch_size)
    metrics = {**seen, **learned, "objective/kl_coef": state.kl.coef}
    return PPOState(train, kl_state, scale, state.key, state.update + 1), metrics


@functools.partial(jax.jit, static_argnames=("agent", "reward"))
def ppo_iteration(
    agent: Agent,
    state: PPOState,
    ref_params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    reward,
):
    """The whole iteration as one program, for a jittable `reward(tokens, mask, response_mask) -> [B]`.

    Returns:
      The new state, the rollout and the metrics.
    """
    rollout = sample(agent, state, prompts, prompt_mask)
    scores = score(agent, state, ref_params, rollout)
    task_scores = reward(rollout.tokens, rollout.mask, rollout.response_mask)
    state, metrics = learn(agent, state, rollout, scores, task_scores)
    return state, rollout, metrics
