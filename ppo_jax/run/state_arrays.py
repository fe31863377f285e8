"""The arrays of a state as a checkpoint names them, and a state made from such arrays."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

from ppo_jax.ppo.state import PPOState
from ppo_jax.ppo.supervised import SupervisedState
from ppo_jax.types import Rollout

State = TypeVar("State", PPOState, SupervisedState)


def structure_of(arrays: Any) -> dict[str, str]:
    """Return the dtype and shape of each array as a text, by the path of the array."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{jnp.result_type(x)}{list(jnp.shape(x))}"
        )
        for path, x in jax.tree_util.tree_leaves_with_path(arrays)
    }


def pending_of(state: State) -> tuple[Rollout, ...]:
    """Return the pending rollouts of a state; a supervised run has none."""
    return state.pending if isinstance(state, PPOState) else ()


def arrays_of(state: State) -> dict[str, Any]:
    """Return the arrays of a state, with the typed key as its data and without functions.

    The pending rollouts are left out.
    """
    named = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    named.pop("pending", None)
    return {name: _arrays(x) for name, x in named.items() if x is not None}


def _arrays(x: Any) -> Any:
    """Return the arrays of an attribute of a state."""
    if isinstance(x, TrainState):
        return {"step": x.step, "params": x.params, "opt_state": x.opt_state}
    return jax.random.key_data(x) if _is_key(x) else x


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def with_arrays(like: State, arrays: dict[str, Any], pending: tuple[Rollout, ...] = ()) -> State:
    """Return the state of some arrays and pending rollouts, with the functions of `like`."""
    state = dict(arrays)
    for name in arrays:
        own = getattr(like, name)
        if isinstance(own, TrainState):
            state[name] = own.replace(**arrays[name])
        elif _is_key(own):
            state[name] = jax.random.wrap_key_data(arrays[name])
    if isinstance(like, PPOState):
        state["pending"] = pending
    return like.replace(**state)
