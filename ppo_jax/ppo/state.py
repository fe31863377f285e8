"""The agent and the state of a PPO iteration. An update changes the state but not the agent."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax import Array

from ppo_jax.errors import SettingError
from ppo_jax.ops.entropy_control import EntropyState
from ppo_jax.ops.kl import KLState
from ppo_jax.ops.rewards import ScaleState, running_scale
from ppo_jax.ppo.controllers import entropy_controller, kl_controller
from ppo_jax.ppo.optimizers import critic_optimizer, policy_optimizer
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.types import CriticFn, LanguageModel, Params, Rollout

SAMPLE, SHUFFLE, SHUFFLE_CRITIC = 0, 1, 2  # the purposes of `PPOState.key_for`
_INIT = 2**32 - 1  # larger than the number of any update


def overlay(base: Params | None, top: Params) -> Params:
    """Merge two parameter trees; where both have a leaf, use the leaf of `top`.

    Frozen parameters are the `base`, and parameters that train are the `top`. No array is copied.

    Args:
      base: nested dictionaries of arrays, or `None` for no frozen parameters.
      top: nested dictionaries of arrays.

    Returns:
      Nested dictionaries with the keys of both trees.

    Example:
      >>> overlay({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": 4})
      {'a': {'x': 1, 'y': 3}, 'b': 4}
    """
    if not isinstance(base, Mapping) or not isinstance(top, Mapping):
        return top
    return {**base, **{name: overlay(base.get(name), part) for name, part in top.items()}}


class PPOState(flax.struct.PyTreeNode):
    """Everything that changes during a run. A checkpoint holds it.

    Attributes:
      train: parameters `{"policy": ..., "critic": ...}` and the optimizer's state; without
        `"critic"` if the critic has an optimizer of its own.
      kl: state of the controller of the KL penalty's weight.
      scale: running moments of the scores.
      key: `[]` typed key, the root of all keys of the run. Only keys that are derived from it are
        used for sampling.
      update: `[]` int32, number of updates done.
      critic: parameters `{"critic": ...}` and the state of the critic's own optimizer, or None.
      pending: rollouts that the next updates learn from, the oldest first. Only a run with a
        staleness has any; `sample`, `score` and `learn` neither read nor return them.
      entropy: state of the controller of the entropy's weight, or None if the weight is constant.
      reference: parameters of a reference policy that moves, in the structure of those of the
        policy that are trained; None if the reference is fixed. `score` reads them, and `learn`
        moves them at its end.

    Example:
      >>> train = TrainState(0, None, {"policy": {}, "critic": {}}, None, None)
      >>> state = PPOState(
      ...     train, KLState(0.05), running_scale().init(), jax.random.key(0), jnp.int32(0))
      >>> state.replace(update=state.update + 1).update
      Array(1, dtype=int32)
    """

    train: TrainState
    kl: KLState
    scale: ScaleState
    key: Array
    update: Array
    critic: TrainState | None = None
    pending: tuple[Rollout, ...] = ()
    entropy: EntropyState | None = None
    reference: Params | None = None

    @property
    def params(self) -> Params:
        """The parameters that are trained, `{"policy": ..., "critic": ...}`."""
        return {**self.train.params, **({} if self.critic is None else self.critic.params)}

    @property
    def policy(self) -> Params:
        """The parameters of the policy that are trained."""
        return self.train.params["policy"]

    def key_for(self, purpose: int) -> Array:
        """Return the `[]` typed key of this update for a purpose, such as `SAMPLE`."""
        return jax.random.fold_in(jax.random.fold_in(self.key, self.update), purpose)


class Agent(NamedTuple):
    """The functions and settings of a run, which do not change and are static under `jax.jit`.

    Attributes:
      model: functions of the policy.
      critic: function of the critic.
      config: the settings.
      stop_ids: ids of the tokens that end a response, such as EOS.
      pad_id: id that fills the positions after the end of a response.
      ref_model: functions of the reference policy, if they are not those of the policy.

    Example:
      >>> from ppo_jax import *
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> agent = Agent(language_model(config), shared_critic(), PPOConfig(), (0,), pad_id=0)
      >>> agent.config.batch_size
      64
    """

    model: LanguageModel
    critic: CriticFn
    config: PPOConfig
    stop_ids: tuple[int, ...]
    pad_id: int
    ref_model: LanguageModel | None = None


def init_key(seed: int, part: int) -> Array:
    """Make a key to initialize a part of the parameters, which differs from all keys of the run.

    Args:
      seed: seed of the run.
      part: number of the part.

    Returns:
      `[]` typed key.
    """
    # Keys from `split` would not do, because they are the same as keys from `fold_in`, which the
    # first updates of the run use.
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _INIT), part)


def init_state(agent: Agent, params: Params, key: Array, *, updates: int) -> PPOState:
    """Make the state before the first update.

    Args:
      agent: model, critic and settings.
      params: `{"policy": ..., "critic": ...}`, the parameters that are trained. The state
        holds copies, so a loop may donate its state and keep `params` as the reference.
      key: `[]` typed key, the root of all keys of the run.
      updates: number of updates of the run, over which the learning rate decays if the settings say
        so.

    Returns:
      The state. If the settings move the reference, it starts as the policy.

    Raises:
      SettingError: if the settings move the reference, and its functions are not the policy's.

    Example:
      >>> from ppo_jax import *
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> agent = Agent(language_model(config), shared_critic(), PPOConfig(), (0,), pad_id=0)
      >>> policy = init_params(config, jax.random.key(0))
      >>> params = {"policy": policy, "critic": {"head": zero_head(4)}}
      >>> init_state(agent, params, jax.random.key(1), updates=10).kl.coef
      Array(0.05, dtype=float32)
    """
    config = agent.config
    if config.moves_reference and agent.ref_model is not None:
        raise SettingError(
            f"reference_every={config.reference_every} and reference_decay="
            f"{config.reference_decay} need a reference with the policy's functions, but the agent "
            "has a ref_model; leave one of them out."
        )
    copied = partial(jax.tree.map, lambda x: jnp.array(x, copy=True))
    reference = copied(params["policy"]) if config.moves_reference else None
    params = copied(params)

    def start(params: Params, tx: optax.GradientTransformation) -> TrainState:
        state = TrainState.create(apply_fn=agent.model.hidden, params=params, tx=tx)
        return state.replace(step=jnp.int32(0))

    critic, entropy = None, entropy_controller(config)
    if config.critic.learning_rate is not None:
        critic = start({"critic": params["critic"]}, critic_optimizer(config, updates))
        params = {"policy": params["policy"]}
    return PPOState(
        start(params, policy_optimizer(config, updates)),
        kl_controller(config).init(),
        running_scale().init(),
        jnp.copy(key),
        jnp.int32(0),
        critic=critic,
        entropy=entropy and entropy.init(),
        reference=reference,
    )
