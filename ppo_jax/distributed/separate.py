"""Sample on devices of their own, while the other devices learn."""

from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from ppo_jax.distributed.compilation import Steps, jit_steps
from ppo_jax.distributed.placement import place
from ppo_jax.ppo.state import Agent, PPOState
from ppo_jax.sharding import rows_sharding
from ppo_jax.types import Params, Rollout


def sample_on(mesh: Mesh, agent: Agent, steps: Steps, frozen: Params | None) -> Steps:
    """Run `sample` on a different mesh from the other steps.

    Each call copies the policy's parameters to that mesh, so that `learn` may donate its state and
    run at the same time. The rollouts that `sample` returns are on that mesh.

    Args:
      mesh: the mesh of the devices that sample, in the same process.
      agent: the functions of policy and critic, and the settings.
      steps: the steps on their own devices.
      frozen: the parameters that are not trained, or None; their policy is copied once.

    Returns:
      The steps. `sample` ignores its argument `frozen`.

    Example:
      >>> from ppo_jax.distributed.meshes import make_mesh
      >>> mesh = make_mesh({"data": 1}, jax.devices()[:1])
      >>> steps = Steps(sample=lambda *args: "rollout", score=lambda *args: "scores", learn=None)
      >>> sample_on(mesh, Agent(None, None, None, (0,), 0), steps, None).score()
      'scores'
    """
    elsewhere = jit_steps(agent, mesh).sample
    kept = None if frozen is None else place({"policy": frozen["policy"]}, mesh)

    def sample(state: PPOState, prompts: Array, prompt_mask: Array, frozen: Any = None) -> Rollout:
        train = state.train.replace(params={"policy": state.policy}, opt_state=())
        policy = place(PPOState(train, state.kl, state.scale, state.key, state.update), mesh)
        rows = jax.device_put((prompts, prompt_mask), rows_sharding(mesh))
        return elsewhere(policy, *rows, frozen=kept)

    return steps._replace(sample=sample)
