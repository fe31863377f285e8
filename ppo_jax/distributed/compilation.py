"""The compiled steps of an iteration."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppo_jax.distributed.placement import place
from ppo_jax.ppo import iteration
from ppo_jax.ppo.iteration import Agent, PPOState
from ppo_jax.sharding import rows_sharding, shardings
from ppo_jax.types import AdvantageFn, LossFn, Params


def start_state(
    agent: Agent, params: Params, key: jax.Array, *, updates: int, mesh: Mesh | None
) -> PPOState:
    """`iteration.init_state` from placed parameters; no array of it is one of theirs, since an update donates its state's."""
    copies = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    return place(iteration.init_state(agent, copies, key, updates=updates), mesh)


# What the model rounds, the compiler shall not keep in float32: on a GPU it would write and read arrays of twice the size.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


class Steps(NamedTuple):
    """`iteration.sample`, `score` and `learn`, compiled, without their `agent`."""

    sample: Callable
    score: Callable
    learn: Callable


def jit_steps(
    agent: Agent,
    mesh: Mesh | None = None,
    state: PPOState | None = None,
    *,
    advantage_fn: AdvantageFn | None = None,
    loss_fn: LossFn | None = None,
) -> Steps:
    """By `jit`; on a mesh, with the rows spread and `learn`'s new state lying as `state` does."""
    sample, score, learn = (
        functools.partial(f, agent) for f in (iteration.sample, iteration.score, iteration.learn)
    )
    learn = functools.partial(learn, advantage_fn=advantage_fn, loss_fn=loss_fn)
    jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    if mesh is None:
        return Steps(jit(sample), jit(score), jit(learn, donate_argnums=0))
    rows, whole = rows_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    return Steps(
        _on(mesh, jit(sample, out_shardings=rows)),
        _on(mesh, jit(score, out_shardings=rows)),
        _on(mesh, jit(learn, donate_argnums=0, out_shardings=(shardings(state, mesh), whole))),
    )


def _on(mesh: Mesh, function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args, **more):
        with jax.set_mesh(mesh):
            return function(*args, **more)

    return call
