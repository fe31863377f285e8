"""Which policy samples the responses of an update: that before it, or one some updates older.

Without staleness, each update learns from responses of the policy before it. With a staleness of
`k`, update `u` learns from responses of the policy after `max(u - k, 0)` updates. It therefore
samples the responses of update `u + k` and learns from the oldest of those that are pending; the
first update samples those of all updates up to `k`. Prompts and keys are those of the update that
learns, so that the staleness changes only the policy that samples.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax import data
from ppo_jax.distributed import placement
from ppo_jax.ppo import iteration
from ppo_jax.ppo.state import PPOState
from ppo_jax.run.assembly import Learner
from ppo_jax.run.collection import Collector
from ppo_jax.sharding import put, rows_sharding
from ppo_jax.types import Params, Rollout


class Schedule(NamedTuple):
    """The schedule by which the responses of a run are sampled.

    Attributes:
      collector: samples a batch.
      prompts: the prompts to train on.
      seed: seed of the run, which gives each update its prompts.
      staleness: the number of updates by which the policy that samples is behind.
    """

    collector: Collector
    prompts: data.Prompts
    seed: int
    staleness: int

    def prompts_of(self, update: int) -> data.Prompts:
        """Return the prompts of an update."""
        config = self.collector.learner.agent.config
        options = {"seed": self.seed, "group_size": config.group_size}
        rows = data.batch_rows(len(self.prompts), config.batch_size, update, **options)
        return self.prompts.take(rows)

    def sample(self, state: PPOState) -> tuple[Rollout, ...]:
        """Start to sample what is missing for this update and for the `staleness` next ones.

        The devices may still be sampling when this function returns. The last updates of a run also
        sample for updates that come after its end, so that it can be continued.

        Args:
          state: the state before an update, with all its pending rollouts unless it is the first.

        Returns:
          The rollouts of this update and of the `staleness` next ones.
        """
        update = int(state.update)
        pending = state.pending if update else ()
        policy = state.replace(pending=())
        updates = range(update + len(pending), update + self.staleness + 1)
        return (*pending, *(self._sample_for(policy, u) for u in updates))

    def _sample_for(self, state: PPOState, update: int) -> Rollout:
        """Start to sample the responses of an update with the policy of `state`."""
        number = placement.place(jnp.int32(update), self.collector.learner.mesh)
        return self.collector.sample(state.replace(update=number), self.prompts_of(update))

    def age(self, update: int) -> dict[str, float]:
        """Return the metric `rollout/age` of an update, or no metric without a staleness."""
        return {"rollout/age": float(min(update, self.staleness))} if self.staleness else {}


def with_pending(
    state: PPOState, learner: Learner, prompts: data.Prompts, frozen: Params | None, count: int
) -> PPOState:
    """Add empty rollouts to a state, in the places of those that a checkpoint holds.

    Args:
      state: the state before the first update, which samples the real ones.
      learner: what is trained.
      prompts: the prompts to train on.
      frozen: the parameters that are not trained, or None.
      count: the number of pending rollouts.

    Returns:
      The state with `count` rollouts, whose entries are 0.
    """
    if not count:
        return state
    batch = prompts.take(np.arange(learner.agent.config.batch_size) % len(prompts))
    sample = partial(iteration.sample, learner.agent)
    shapes = jax.eval_shape(sample, state, batch.tokens, batch.mask, frozen=frozen)
    mesh = learner.sampling or learner.mesh
    sharding = None if mesh is None else rows_sharding(mesh)
    empty = lambda x: put(np.zeros(x.shape, x.dtype), sharding)
    return state.replace(pending=tuple(jax.tree.map(empty, shapes) for _ in range(count)))
