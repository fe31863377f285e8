"""The PPO iteration on one screen: sample responses, score them, and learn from the scores.

`ppo_iteration` is the whole of it, and `sample`, `score` and `learn` are its stages. All are pure
functions of a `PPOState`. `run.trainer.Trainer.step` calls the stages one by one, because a reward
function runs on the host between them. What a method computes is a function handed to a stage or
named by a setting, so a new estimator or loss needs no change here: see `ppo.choices`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ppo.batching import map_rows
from ppo_jax.ppo.controllers import kl_controller
from ppo_jax.ppo.entropy import next_entropy
from ppo_jax.ppo.experience import prepare
from ppo_jax.ppo.packing import check_packing
from ppo_jax.ppo.phases import take_steps
from ppo_jax.ppo.reference import next_reference, reference_params
from ppo_jax.ppo.rollout import generate
from ppo_jax.ppo.scoring import score_rollout
from ppo_jax.ppo.state import SAMPLE, Agent, PPOState, overlay
from ppo_jax.ppo.state import init_state as init_state
from ppo_jax.ppo.unread import check_loss_fn
from ppo_jax.types import AdvantageFn, AxisName, LossFn, Metrics, Params, Rollout, Scores


@partial(jax.jit, static_argnames=("agent", "reward"))
def ppo_iteration(
    agent: Agent,
    state: PPOState,
    ref_params: Params | None,
    prompts: Array,
    prompt_mask: Array,
    reward: Callable[[Array, Array, Array], Array],
) -> tuple[PPOState, Rollout, Metrics]:
    """Run a whole iteration as one compiled program, for a reward function that JAX can trace.

    Args:
      agent: model, critic and settings; static.
      state: the state before the iteration.
      ref_params: parameters of the reference policy, as in `score`.
      prompts: `[B, P]` int32, padded on the left.
      prompt_mask: `[B, P]` bool, real tokens.
      reward: `reward(tokens [B, T], mask [B, T], response_mask [B, R])` returns scores `[B]`;
        static.

    Returns:
      The new state, the rollout and the metrics.

    Raises:
      ValueError: as `sample`, `score` and `learn`.

    Example:
      >>> from ppo_jax import *
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=26, width=4, layers=1, heads=2, mlp_width=16)
      >>> agent = Agent(language_model(config), shared_critic(), PPOConfig(), (0,), pad_id=0)
      >>> policy = init_params(config, jax.random.key(0))
      >>> params = {"policy": policy, "critic": {"head": zero_head(4)}}
      >>> state = init_state(agent, params, jax.random.key(1), updates=1)
      >>> prompts = jnp.array([[1, 2]] * 64)
      >>> length = lambda tokens, mask, response_mask: response_mask.sum(1).astype(jnp.float32)
      >>> state, *_ = ppo_iteration(agent, state, policy, prompts, prompts > 0, length)
      >>> int(state.update)
      1
    """
    rollout = sample(agent, state, prompts, prompt_mask)
    scores = score(agent, state, ref_params, rollout)
    task_scores = reward(rollout.tokens, rollout.mask, rollout.response_mask)
    state, metrics = learn(agent, state, rollout, scores, task_scores)
    return state, rollout, metrics


def sample(
    agent: Agent,
    state: PPOState,
    prompts: Array,
    prompt_mask: Array,
    *,
    row_ids: Array | None = None,
    frozen: Params | None = None,
) -> Rollout:
    """Sample a response to each prompt.

    At most `rollout_slots` responses are decoded at a time; fewer rows have a slot each.

    Args:
      agent: model, critic and settings.
      state: the state before the update; its policy samples.
      prompts: `[B, P]` int32, padded on the left. Each prompt is repeated in `group_size`
        neighbouring rows.
      prompt_mask: `[B, P]` bool, real tokens; the last position of every row must be one.
      row_ids: `[B]` int32, numbers of the rows in the global batch; `0 .. B-1` by default.
      frozen: parameters `{"policy": ...}` that are not trained, such as the weights under LoRA
        adapters; those of the state take precedence (see `ppo.state.overlay`).

    Returns:
      The rollout.

    Raises:
      ValueError: if the settings forbid the whole vocabulary.
      AssertionError: if `prompts` and `prompt_mask` differ in shape, or are not int and bool.

    Example:
      >>> from ppo_jax import *
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=26, width=4, layers=1, heads=2, mlp_width=16)
      >>> agent = Agent(language_model(config), shared_critic(), PPOConfig(), (0,), pad_id=0)
      >>> policy = init_params(config, jax.random.key(0))
      >>> params = {"policy": policy, "critic": {"head": zero_head(4)}}
      >>> state = init_state(agent, params, jax.random.key(1), updates=1)
      >>> sample(agent, state, jnp.array([[1, 2]]), jnp.array([[True, True]])).responses.shape
      (1, 24)
    """
    c, key = agent.config, state.key_for(SAMPLE)
    params = overlay(frozen, state.params)["policy"]

    def sample_rows(rows: tuple[Array, Array, Array]) -> Rollout:
        prompts, prompt_mask, row_ids = rows
        slots = c.rollout_slots and min(c.rollout_slots, len(prompts))
        return sampler(agent)(params, key, prompts, prompt_mask, row_ids=row_ids, slots=slots)

    row_ids = jnp.arange(len(prompts)) if row_ids is None else row_ids
    rollout = map_rows(sample_rows, (prompts, prompt_mask, row_ids), c.rollout_rows)
    return rollout.replace(groups=(row_ids // c.group_size).astype(jnp.int32))


def sampler(agent: Agent) -> Callable[..., Rollout]:
    """Return `generate` with the model and the settings of an agent bound."""
    c = agent.config
    return partial(
        generate,
        agent.model,
        max_new_tokens=c.max_new_tokens,
        min_new_tokens=c.min_new_tokens,
        stop_ids=agent.stop_ids,
        pad_id=agent.pad_id,
        temperature=c.temperature,
        top_k=c.top_k,
        top_p=c.top_p,
        stop_at_end=c.stop_at_end,
        truncate_after=c.truncate_after,
    )


def score(
    agent: Agent,
    state: PPOState,
    ref_params: Params | None,
    rollout: Rollout,
    *,
    frozen: Params | None = None,
) -> Scores:
    """Compute log-probs, values, entropies and KL of a rollout.

    It does not need the task's scores, so it can run on the device while the host computes them.

    Args:
      agent: model, critic and settings.
      state: the state before the update, which sampled the rollout.
      ref_params: parameters of the reference policy. They are not read, and may be None, if the
        state has a `reference` that moves; that of the time of scoring is then used.
      rollout: `B` sampled responses.
      frozen: parameters that are not trained, as in `sample`.

    Returns:
      The scores under policy, reference and critic.

    Raises:
      ValueError: if there is no reference.
      SettingError: if the settings say to pack, but bins, model or critic do not allow it.
      AssertionError: if the critic does not return values of shape `[B, R]`.

    Example:
      >>> from ppo_jax import *
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=26, width=4, layers=1, heads=2, mlp_width=16)
      >>> agent = Agent(language_model(config), shared_critic(), PPOConfig(), (0,), pad_id=0)
      >>> policy = init_params(config, jax.random.key(0))
      >>> params = {"policy": policy, "critic": {"head": zero_head(4)}}
      >>> state = init_state(agent, params, jax.random.key(1), updates=1)
      >>> rollout = sample(agent, state, jnp.array([[1, 2]]), jnp.array([[True, True]]))
      >>> score(agent, state, policy, rollout).kl.max()  # the policy is still the reference
      Array(0., dtype=float32)
    """
    c, reference = agent.config, reference_params(state, ref_params, frozen)
    check_packing(agent.model, agent.critic, c.bins, rollout.tokens.shape[1])
    return score_rollout(
        agent.model,
        agent.critic,
        overlay(frozen, state.params),
        reference,
        rollout,
        temperature=c.temperature,
        kl_estimator=c.kl_estimator.function,
        micro_batch=c.rows_at_a_time,
        chunk=c.logit_chunk,
        bins=c.bins,
        ref_model=agent.ref_model,
    )


def learn(
    agent: Agent,
    state: PPOState,
    rollout: Rollout,
    scores: Scores,
    task_scores: Array,
    token_scores: Array | None = None,
    *,
    advantage_fn: AdvantageFn | None = None,
    loss_fn: LossFn | None = None,
    frozen: Params | None = None,
    axis_name: AxisName | None = None,
) -> tuple[PPOState, Metrics]:
    """Turn the scores of a rollout into advantages and take the optimizer steps of one update.

    Args:
      agent: model, critic and settings.
      state: the state before the update, which sampled the rollout.
      rollout: `B` sampled responses.
      scores: their log-probs, values and KL, from `score`.
      task_scores: `[B]` float32, the task's score of each response. A response whose score is NaN
        could not be scored: nothing is learned from it, and it is in no mean.
      token_scores: `[B, R]` float32, the task's scores of single tokens, added to `task_scores`.
      advantage_fn: advantage estimator to use instead of the one that the settings name.
      loss_fn: loss to use instead of the one that the settings name.
      frozen: parameters that are not trained, as in `sample`.
      axis_name: mapped axis over which the batch is split; all means are over the whole batch.

    Returns:
      The new state and the metrics.

    Raises:
      SettingError: if there are `token_scores` and the settings scale or clip scores, if a group of
        responses is not intact, or if a setting has no effect because `loss_fn` does not read it.
      ValueError: if the minibatches and micro-batches do not divide the number of rows.
      AssertionError: if shapes disagree, those that `advantage_fn` returns included.

    Example:
      >>> from ppo_jax import *
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=26, width=4, layers=1, heads=2, mlp_width=16)
      >>> agent = Agent(language_model(config), shared_critic(), PPOConfig(), (0,), pad_id=0)
      >>> policy = init_params(config, jax.random.key(0))
      >>> params = {"policy": policy, "critic": {"head": zero_head(4)}}
      >>> state = init_state(agent, params, jax.random.key(1), updates=1)
      >>> prompts = jnp.array([[1, 2]] * 64)
      >>> rollout = sample(agent, state, prompts, prompts > 0)
      >>> scores = score(agent, state, policy, rollout)
      >>> task_scores = (rollout.responses == 5).sum(1).astype(jnp.float32)
      >>> state, metrics = learn(agent, state, rollout, scores, task_scores)
      >>> metrics["optimizer/steps"]
      Array(16., dtype=float32)
    """
    c = agent.config
    check_loss_fn(c, loss_fn)
    scale, rollout, experience, before = prepare(
        c,
        state,
        rollout,
        scores,
        task_scores,
        token_scores,
        advantage_fn=advantage_fn or c.advantage.function(c, axis_name),
        axis_name=axis_name,
    )
    trained, learned = take_steps(
        agent, state, rollout, experience, loss_fn=loss_fn, frozen=frozen, axis_name=axis_name
    )
    episodes = len(task_scores) * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    kl_state = kl_controller(c).update(state.kl, before["objective/kl"], episodes)
    metrics = {**before, **learned, "objective/kl_coef": state.kl.coef}
    entropy, more = next_entropy(c, state.entropy, before["objective/entropy"])
    update = state.update + 1
    reference = next_reference(c, trained, update)
    state = trained.replace(
        kl=kl_state, scale=scale, update=update, entropy=entropy, reference=reference
    )
    return state, metrics | more
