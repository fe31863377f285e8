"""Collect a batch on the devices and on the host: responses, log-probs, texts and task scores."""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from ppo_jax import data
from ppo_jax.data.text import without_stops
from ppo_jax.distributed import compilation, placement, processes, replicas, separate
from ppo_jax.distributed.compilation import Steps
from ppo_jax.errors import Fault
from ppo_jax.ops.rewards import ScaleState
from ppo_jax.ppo.state import Agent, PPOState
from ppo_jax.reward_functions import RewardFn, TaskScores, require_scores
from ppo_jax.run import faults
from ppo_jax.run.assembly import Learner
from ppo_jax.run.settings import Faults
from ppo_jax.types import AdvantageFn, LossFn, Params, Rollout, Scores


class Collection(NamedTuple):
    """A batch of `B` responses.

    Attributes:
      prompts: the prompts.
      rollout: the responses on the devices.
      scores: their log-probs, KL and values on the devices, which may still be being computed.
      host_rollout: the responses on the host.
      texts: the responses as texts, each cut after its first end token.
      sampled_at: when the responses were on the host, as `time.perf_counter()` gives it.
    """

    prompts: data.Prompts
    rollout: Rollout
    scores: Scores
    host_rollout: Rollout
    texts: list[str]
    sampled_at: float

    def rows(self, count: int | None = None) -> list[dict[str, Any]]:
        """Prompt, response and response tokens of the first `count` responses, as in the files."""
        rollout = self.host_rollout
        columns = (self.prompts.texts, self.texts, rollout.responses, rollout.response_mask)
        return [
            {"prompt": prompt, "response": text, "tokens": tokens[real].tolist()}
            for prompt, text, tokens, real in zip(*(x[:count] for x in columns), strict=True)
        ]

    def scored_rows(self, scores: TaskScores, count: int) -> list[dict[str, Any]]:
        """Add the score to each of the first `count` rows; None for a response without a score."""
        totals = scores.total(self.host_rollout.response_mask)[:count]
        return [
            {**row, "score": None if np.isnan(x) else float(x)}
            for row, x in zip(self.rows(count), totals, strict=True)
        ]


class Collector(NamedTuple):
    """What collecting a batch needs besides the state.

    Attributes:
      learner: the agent, the tokenizer and the devices.
      steps: the compiled steps.
      ref_params: the reference policy's parameters; None if the state holds those of a reference
        that moves.
      frozen: the parameters that are not trained, or None.
      reward: the reward.
      limits: the number of retries and the time limit of a call of the reward.
    """

    learner: Learner
    steps: Steps
    ref_params: Params | None
    frozen: Params | None
    reward: RewardFn
    limits: Faults

    def sample(self, state: PPOState, prompts: data.Prompts) -> Rollout:
        """Start to sample a response to each prompt on the devices."""
        mesh = self.learner.sampling or self.learner.mesh
        arrays = placement.to_mesh((prompts.tokens, prompts.mask), mesh)
        return self.steps.sample(state, *arrays, frozen=self.frozen)

    def collect(
        self, state: PPOState, prompts: data.Prompts, rollout: Rollout | None = None
    ) -> Collection:
        """Wait for the responses to some prompts, and start to compute log-probs and values.

        Args:
          state: its policy and critic score the responses.
          prompts: `B` prompts.
          rollout: the responses. By default, the policy of `state` samples them.

        Returns:
          The batch of `B` responses.
        """
        rollout = self.sample(state, prompts) if rollout is None else rollout
        host_rollout = placement.to_host(rollout)
        sampled_at = time.perf_counter()
        if self.learner.sampling is not None:  # Other devices have sampled them.
            rollout = placement.to_mesh(host_rollout, self.learner.mesh)
        scores = self.steps.score(state, self.ref_params, rollout, frozen=self.frozen)
        texts = response_texts(self.learner.agent, self.learner.tokenizer, host_rollout)
        return Collection(prompts, rollout, scores, host_rollout, texts, sampled_at)

    def task_scores(self, batch: Collection, scale: ScaleState | None = None) -> TaskScores:
        """Ask the reward for the scores of a batch, and check all numbers.

        Each process asks for the rows on its own devices, and all processes receive the
        scores of the whole batch. A fault in one process is raised in all of them.

        Args:
          batch: `B` responses.
          scale: the running moments that the scores will be scaled by, or None.

        Returns:
          The scores of the `B` responses.

        Raises:
          Fault: if the reward fails or returns values that are not scores, or if a log-prob or
            value is not finite; its `dump` holds the offending rows.
        """
        try:
            scores = self._ask(batch)
            if scale is not None:
                faults.check_scale(scale, scores.response)
            faults.check_finite(batch.host_rollout, placement.to_host(batch.scores))
        except Fault as fault:
            rows = batch.rows()
            offending = [rows[i] for i in fault.rows] or rows
            raise fault.with_rows(fault.rows, dump=offending) from fault
        return scores

    def _ask(self, batch: Collection) -> TaskScores:
        mesh, total = self.learner.mesh, len(batch.texts)
        own = placement.local_rows(mesh, total)
        rollout = jax.tree.map(lambda x: x[own], batch.host_rollout)
        prompts, texts = batch.prompts.take(own), [batch.texts[i] for i in own]
        fault, scores = None, None
        try:
            scores = faults.persist(
                lambda: require_scores(self.reward(rollout, prompts, texts)),
                retries=self.limits.reward_retries,
                timeout_s=self.limits.reward_timeout_s,
            )
        except Fault as error:
            fault = error.with_rows([int(own[i]) for i in error.rows])
        processes.raise_everywhere(fault)
        return placement.gather_rows(scores, mesh, total)


def compiled_steps(
    learner: Learner,
    state: PPOState,
    frozen: Params | None,
    *,
    advantage_fn: AdvantageFn | None = None,
    loss_fn: LossFn | None = None,
) -> Steps:
    """Compile the steps of a PPO iteration for the devices of a learner.

    Args:
      learner: the agent and the devices.
      state: a state of the run, of which only the structure and the shapes are used.
      frozen: the parameters that are not trained, or None.
      advantage_fn: replaces the estimator that the settings name.
      loss_fn: replaces the loss that the settings name.

    Returns:
      The steps.
    """
    jitted = partial(compilation.jit_steps, mesh=learner.mesh, state=state)
    compiled = replicas.pmap_steps if learner.pmap else jitted
    steps = compiled(learner.agent, advantage_fn=advantage_fn, loss_fn=loss_fn)
    if learner.sampling is None:
        return steps
    return separate.sample_on(learner.sampling, learner.agent, steps, frozen)


def response_texts(agent: Agent, tokenizer: Any, rollout: Rollout) -> list[str]:
    """Decode responses, each cut after its first end token, as it reads behind its prompt.

    Args:
      agent: its stop tokens and `truncate_after` say where a text ends.
      tokenizer: decodes the tokens.
      rollout: `B` responses on the host.

    Returns:
      `B` texts.
    """
    tokens, mask = np.asarray(rollout.responses), np.asarray(rollout.response_mask)
    prompt_length = rollout.prompt_length
    may_end = np.arange(tokens.shape[1]) >= agent.config.truncate_after
    ends = np.isin(tokens, agent.stop_ids) & mask & may_end[None, :]
    before_end = mask & (np.cumsum(ends, axis=1) - ends == 0)
    before_end = without_stops(tokenizer, tokens, before_end, agent.stop_ids)
    kept = np.concatenate([np.asarray(rollout.mask)[:, :prompt_length], before_end], axis=1)
    return data.decode(tokenizer, np.asarray(rollout.tokens), kept, start=prompt_length)
