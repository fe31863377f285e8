"""Training of one variant of a study: one compiled program for all its seeds."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations.task import Task, end_answers, prompts, share_of_rule
from ppo_jax import (
    AdvantageFn,
    Agent,
    CriticFn,
    LanguageModel,
    LossFn,
    Metrics,
    Params,
    PPOConfig,
    PPOState,
    Rollout,
    init_params,
    init_scorer,
    init_state,
    language_model,
    learn,
    no_critic,
    sample,
    score,
    separate_critic,
)

LONG = 300  # An answer with at least this many tokens counts as long.
LENGTHS = 2**16  # The purpose of the key of their lengths; see `PPOState.key_for`.
MEASURED = ("objective/kl", "objective/entropy", "value/explained_variance", "policy/clipfrac")


class LossMaker(NamedTuple):
    """What a loss is made from, besides the settings."""

    model: LanguageModel
    critic: CriticFn
    reference: Params
    task_scores: jax.Array  # [B] float32, of the answers of the update


class Variant(NamedTuple):
    """A method to compare.

    Attributes:
      config: the settings.
      advantage_fn: the advantage estimator, if it is not the one that the settings name.
      loss_fn: makes the loss, if it is not the one that the settings name.
      has_critic: whether there is a critic.
      from_sampler: whether probability ratios divide by the probabilities of the policy that
        sampled the answers, instead of those of the policy before the update.
      ages: how many updates older than the policy the answers are that it learns from; each age is
        trained by itself.
    """

    config: PPOConfig
    advantage_fn: AdvantageFn | None = None
    loss_fn: Callable[[LossMaker], LossFn] | None = None
    has_critic: bool = True
    from_sampler: bool = False
    ages: tuple[int, ...] = (0,)


def train(key: jax.Array, age: jax.Array, *, task: Task, variant: Variant, updates: int) -> Metrics:
    """Train a new model and return the history of its updates, `[updates]` each.

    Pending answers are in a ring of places. An update puts its own answers in the next place and
    learns from those that were put there `age` updates ago. Before the first update, answers of the
    new model fill the ring.
    """
    init_key, head_key, fill_key, run_key = jax.random.split(key, 4)
    config = task.model_config()
    critic = separate_critic(config) if variant.has_critic else no_critic
    agent = Agent(language_model(config), critic, variant.config, stop_ids=(), pad_id=0)
    reference = init_params(config, init_key)
    head = init_scorer(config, head_key, trunk=reference) if variant.has_critic else {}
    state = init_state(agent, {"policy": reference, "critic": head}, run_key, updates=updates)
    questions, places = prompts(variant.config.batch_size), max(variant.ages) + 1

    def answer(state: PPOState) -> Rollout:
        rollout = sample(agent, state, questions, jnp.ones_like(questions, bool))
        return end_answers(state.key_for(LENGTHS), rollout, task)

    def update(
        carry: tuple[PPOState, Rollout | None], _: None
    ) -> tuple[tuple[PPOState, Rollout | None], Metrics]:
        state, ring = carry
        fresh = rollout = answer(state)
        if ring is not None:
            ring = jax.tree.map(lambda x, new: x.at[state.update % places].set(new), ring, fresh)
            rollout = jax.tree.map(lambda x: x[(state.update - age) % places], ring)
        state, metrics = learn_from(agent, state, variant, reference, rollout)
        return (state, ring), metrics | scores_of(fresh)

    ring = None
    if places > 1:
        fill = lambda i: answer(state.replace(key=jax.random.fold_in(fill_key, i)))
        ring = jax.lax.map(fill, jnp.arange(places))
    return jax.lax.scan(update, (state, ring), length=updates)[1]


def learn_from(
    agent: Agent, state: PPOState, variant: Variant, reference: Params, rollout: Rollout
) -> tuple[PPOState, Metrics]:
    """Learn from answers, which may be older than the policy."""
    task_scores = share_of_rule(rollout)
    scores = score(agent, state, reference, rollout)
    if variant.from_sampler:
        scores = scores.replace(logprobs=rollout.logprobs)
    # A critic with its own optimizer has no part in the loss of the policy.
    critic = agent.critic if state.critic is None else no_critic
    maker = LossMaker(agent.model, critic, reference, task_scores)
    state, metrics = learn(
        agent,
        state,
        rollout,
        scores,
        task_scores,
        advantage_fn=variant.advantage_fn,
        loss_fn=variant.loss_fn and variant.loss_fn(maker),
    )
    measured = {name.split("/")[1]: metrics[name] for name in MEASURED}
    return state, measured | {"learned_score": task_scores.mean()}


def scores_of(rollout: Rollout) -> Metrics:
    """Return the mean score of all answers and that of the long ones, NaN if there are none."""
    scores, long = share_of_rule(rollout), rollout.response_mask.sum(axis=1) >= LONG
    return {"score": scores.mean(), "long": jnp.where(long, scores, 0).sum() / long.sum()}


def run(
    keys: jax.Array, *, task: Task, variant: Variant, updates: int
) -> tuple[dict[str, np.ndarray], float]:
    """Train all seeds and ages at once.

    Args:
      keys: one typed key for each seed.
      task: the task.
      variant: the method.
      updates: the number of updates.

    Returns:
      The history, `[ages, seeds, updates]` for each figure, and the seconds without compilation.
    """
    one = partial(train, task=task, variant=variant, updates=updates)
    seeds = jax.vmap(one, in_axes=(0, None))
    both = jax.jit(jax.vmap(seeds, in_axes=(None, 0)))
    ages = jnp.array(variant.ages)
    compiled = both.lower(keys, ages).compile()
    start = time.perf_counter()
    history = jax.device_get(compiled(keys, ages))
    return history, time.perf_counter() - start
