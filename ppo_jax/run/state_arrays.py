"""The arrays of a state as a checkpoint names them, and a state made from such arrays."""

from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.ppo.state import PPOState


def structure_of(arrays: Any) -> dict[str, str]:
    """Return the dtype and shape of each array as a text, by the path of the array."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{jnp.result_type(x)}{list(jnp.shape(x))}"
        )
        for path, x in jax.tree_util.tree_leaves_with_path(arrays)
    }


def arrays_of(state: PPOState) -> dict[str, Any]:
    """Return the arrays of a state, with the typed key as its data and without functions."""
    trained = {"train": state.train, "critic": state.critic}
    return {
        **{
            name: {"step": x.step, "params": x.params, "opt_state": x.opt_state}
            for name, x in trained.items()
            if x is not None
        },
        **({} if state.entropy is None else {"entropy": state.entropy}),
        "kl": state.kl,
        "scale": state.scale,
        "key": jax.random.key_data(state.key),
        "update": state.update,
    }


def with_arrays(like: PPOState, arrays: dict[str, Any]) -> PPOState:
    """Return the state whose arrays these are, with the functions of `like`."""
    state = {**arrays, "key": jax.random.wrap_key_data(arrays["key"])}
    state["train"] = like.train.replace(**arrays["train"])
    if like.critic is not None:
        state["critic"] = like.critic.replace(**arrays["critic"])
    return like.replace(**state)
