"""A reference policy that moves: the policy replaces it every few updates, or it is an average."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.state import PPOState, overlay
from ppo_jax.types import Params


def follow_reference(
    reference: Params, policy: Params, update: Array | int, *, every: int = 1, decay: float = 0.0
) -> Params:
    """Move the parameters of the reference policy towards those of the policy.

    After every N-th update, with the decay d:

        θ_ref ← d θ_ref + (1 − d) θ

    With the default decay of 0, the policy replaces the reference. With the default of `every`, the
    reference is the moving average of the policies after each update.

    Args:
      reference: parameters of the reference.
      policy: parameters of the policy after the update, of the same structure and shapes.
      update: `[]` int32, number of updates done.
      every: N; the reference moves if this divides `update`.
      decay: d, from 0 to 1. The average is computed in float32 at least and rounded to the dtype
        of the reference, so a bfloat16 reference does not follow with a decay close to 1.

    Returns:
      The new parameters of the reference, with its dtypes and shardings.

    Raises:
      ValueError: if `every` is not positive.
      AssertionError: if the parameters differ in structure or shapes.

    Source:
      Gorbatovski et al. 2024, TR-DPO (https://arxiv.org/abs/2404.09656), where the weight of
      the policy is α = 1 − d and the period is τ = N. No released implementation has such a
      function of arrays; TRL's `sync_ref_model` does the same to two modules in place.

    Example:
      >>> reference, policy = {"w": jnp.float32(1)}, {"w": jnp.float32(2)}
      >>> follow_reference(reference, policy, 6, every=3)["w"]
      Array(2., dtype=float32)
      >>> follow_reference(reference, policy, 6, decay=0.75)["w"]
      Array(1.25, dtype=float32)
    """
    if every < 1:
        raise ValueError(f"every={every} must be positive, a number of updates.")
    chex.assert_trees_all_equal_shapes(reference, policy)
    moves = jnp.asarray(update) % every == 0

    def follow(old: Array, new: Array) -> Array:
        wide = jnp.promote_types(old.dtype, jnp.float32)
        old_wide, new_wide = old.astype(wide), new.astype(wide)
        # In this form a reference that equals the policy stays equal to it.
        average = new_wide + decay * (old_wide - new_wide)
        return jnp.where(moves, average.astype(old.dtype), old)

    return jax.tree.map(follow, reference, policy)


def reference_params(state: PPOState, fixed: Params | None, frozen: Params | None) -> Params:
    """Return the parameters of the reference: those of the state if it moves, or the fixed ones.

    Args:
      state: the state.
      fixed: parameters of a reference that does not move, or None.
      frozen: parameters `{"policy": ...}` that are not trained, or None.

    Returns:
      All parameters of the reference.

    Raises:
      ValueError: if there are neither.
    """
    if state.reference is not None:
        return overlay((frozen or {}).get("policy"), state.reference)
    if fixed is None:
        raise ValueError("ref_params must be given, because the state has no moving reference.")
    return fixed


def next_reference(config: PPOConfig, state: PPOState, update: Array) -> Params | None:
    """Return the trained parameters of the reference after an update, or None if it is fixed.

    Args:
      config: the settings.
      state: the state with the new policy and the earlier reference.
      update: `[]` int32, number of updates done, this one included.
    """
    if state.reference is None:
        return None
    every, decay = config.reference_every or 1, config.reference_decay or 0.0
    return follow_reference(state.reference, state.policy, update, every=every, decay=decay)
