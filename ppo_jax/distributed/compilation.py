"""The steps of a PPO iteration, compiled with `jax.jit` for one device or for a mesh."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped
from jax.tree_util import PyTreeDef

from ppo_jax.distributed.placement import place
from ppo_jax.ppo import iteration
from ppo_jax.ppo.state import Agent, PPOState
from ppo_jax.sharding import rows_sharding, shardings
from ppo_jax.types import AdvantageFn, LossFn, Metrics, Params, Rollout, Scores

# By default XLA may keep a value in float32 that the model rounds to bfloat16. On a GPU the program
# would then read and write arrays of twice the size.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


def start_state(
    agent: Agent, params: Params, key: Array, *, updates: int, mesh: Mesh | None
) -> PPOState:
    """Build the first `PPOState` on the mesh from a copy of the parameters.

    Args:
      agent: functions and settings of the run.
      params: `{"policy": ..., "critic": ...}`, already on the mesh.
      key: `[]` typed key, from which all keys of the run derive.
      updates: number of updates of the run, which the learning rate's schedule needs.
      mesh: the mesh, or None for one device.

    Returns:
      The state, sharded over the mesh.
    """
    return place(iteration.init_state(agent, params, key, updates=updates), mesh)


class Steps(NamedTuple):
    """The compiled steps of a PPO iteration; `jit_steps` and `pmap_steps` build them.

    They take the arguments of the functions `ppo_jax.sample`, `score` and `learn`, without `agent`.

    Attributes:
      sample: samples a response to each prompt. It is called as
        `sample(state, prompts, prompt_mask, frozen=None)`.
      score: computes log-probs of policy and reference, and values, of the sampled responses. It is
        called as `score(state, ref_params, rollout, frozen=None)`.
      learn: turns scores into advantages and updates the parameters. It is called as
        `learn(state, rollout, scores, task_scores, token_scores=None, frozen=None)`. Under
        `jit_steps` it donates its first argument, so the old state cannot be used afterwards.

    Example:
      Wrap a step to add to it; `jit_steps` shows how steps are called.

      >>> steps = Steps(sample=lambda *args: "rollout", score=lambda *args: "scores", learn=None)
      >>> steps._replace(score=lambda *args: "other " + steps.score(*args)).score()
      'other scores'
    """

    sample: Callable[..., Rollout]
    score: Callable[..., Scores]
    learn: Callable[..., tuple[PPOState, Metrics]]


def jit_steps(
    agent: Agent,
    mesh: Mesh | None = None,
    state: PPOState | None = None,
    *,
    loss_fn: LossFn | None = None,
    advantage_fn: AdvantageFn | None = None,
) -> Steps:
    """Compile the steps of a PPO iteration with `jax.jit`.

    On a mesh, the rows of rollouts and scores are sharded over the axes `data` and `fsdp`, and the
    state keeps the sharding that `ppo_jax.sharding_rules.RULES` gives it.

    Args:
      agent: the functions of policy and critic, and the settings.
      mesh: a mesh of `make_mesh`, or None for one device.
      state: on a mesh, a state (or a tree of `jax.ShapeDtypeStruct`) with the structure of the
        states that `learn` will get. Only its structure and shapes are used.
      loss_fn: replaces the loss that the settings name.
      advantage_fn: replaces the estimator that the settings name.

    Returns:
      The three steps. Each is compiled at its first call.

    Raises:
      ValueError: if no sharding rule matches a parameter of `state`.

    Example:
      >>> import jax.numpy as jnp
      >>> from ppo_jax import PPOConfig, TransformerConfig, init_params, language_model
      >>> from ppo_jax import shared_critic, zero_head
      >>> config = TransformerConfig(
      ...     vocab_size=8, positions=8, width=4, layers=1, heads=1, mlp_width=4)
      >>> ppo = PPOConfig(batch_size=2, minibatches=1, max_new_tokens=3)
      >>> agent = Agent(language_model(config), shared_critic(), ppo, stop_ids=(0,), pad_id=0)
      >>> policy = init_params(config, jax.random.key(0))
      >>> params = {"policy": policy, "critic": {"head": zero_head(config.width)}}
      >>> state = start_state(agent, params, jax.random.key(1), updates=1, mesh=None)
      >>> steps = jit_steps(agent)
      >>> prompts = jnp.ones((2, 4), int)
      >>> rollout = steps.sample(state, prompts, prompts > 0)
      >>> scores = steps.score(state, policy, rollout)
      >>> state, metrics = steps.learn(state, rollout, scores, jnp.array([1.0, 0.0]))
      >>> rollout.responses.shape, int(state.update)
      ((2, 3), 1)
    """
    steps = lowerable_steps(agent, mesh, state, loss_fn=loss_fn, advantage_fn=advantage_fn)
    return Steps(*steps if mesh is None else (_inside(mesh, step) for step in steps))


def lowerable_steps(
    agent: Agent,
    mesh: Mesh | None = None,
    state: Any = None,
    *,
    loss_fn: LossFn | None = None,
    advantage_fn: AdvantageFn | None = None,
) -> tuple[Wrapped, Wrapped, Wrapped]:
    """Return the jitted `sample`, `score` and `learn`, which can also be lowered.

    The arguments are those of `jit_steps`. On a mesh, call or lower the functions inside
    `jax.set_mesh(mesh)`; `jit_steps` wraps them so that a caller need not. Equal arguments give the
    same functions, so that a second run with the same settings compiles nothing.
    """
    leaves, tree = jax.tree.flatten(None if mesh is None else shardings(state, mesh))
    build = partial(_jitted, agent, mesh, tuple(leaves), tree, loss_fn, advantage_fn)
    try:
        hash(build.args)
    except TypeError:  # A function of the user's own need not be hashable.
        return build()
    return _jitted_once(*build.args)


def _jitted(
    agent: Agent,
    mesh: Mesh | None,
    leaves: tuple[NamedSharding, ...],
    tree: PyTreeDef,
    loss_fn: LossFn | None,
    advantage_fn: AdvantageFn | None,
) -> tuple[Wrapped, Wrapped, Wrapped]:
    """Jit the steps; `tree` and `leaves` are the sharding of the state."""
    sample = partial(iteration.sample, agent)
    score = partial(iteration.score, agent)
    learn = partial(iteration.learn, agent, loss_fn=loss_fn, advantage_fn=advantage_fn)
    jit = partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    if mesh is None:
        return jit(sample), jit(score), jit(learn, donate_argnums=0)
    rows, replicated = rows_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    learned = tree.unflatten(leaves), replicated
    return (
        jit(sample, out_shardings=rows),
        jit(score, out_shardings=rows),
        jit(learn, donate_argnums=0, out_shardings=learned),
    )


_jitted_once = functools.lru_cache(maxsize=16)(_jitted)


def _inside(mesh: Mesh, function: Wrapped) -> Callable[..., Any]:
    """Wrap a jitted function so that it is called inside `jax.set_mesh(mesh)`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args, **kwargs)

    return call
