"""Heads that map hidden states to numbers: critics for the values of states, and reward models."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.transformer import init_params, language_model
from ppo_jax.types import CriticFn, Params

# The dense layer below the head of an encoder, and its activation: BERT's and DistilBERT's.
_POOLED = {"pooler": jnp.tanh, "pre_classifier": jax.nn.relu}


def pooled(head: Params) -> str | None:
    """Return the name of the dense layer below a head, or None if there is none."""
    return next((name for name in _POOLED if name in head), None)


def init_head(width: int, key: Array) -> Params:
    """Return a fresh linear map `[D] -> 1` without bias.

    Its kernel `[D, 1]` is normal with standard deviation `1 / sqrt(D + 1)`.

    Source: Stiennon et al. 2020 (https://arxiv.org/abs/2009.01325).
    """
    return {"kernel": jax.random.normal(key, (width, 1), jnp.float32) * (width + 1) ** -0.5}


def init_pooled_head(width: int, key: Array, layer: str = "pooler") -> Params:
    """Return a fresh head above a dense layer, with biases of 0.

    Args:
      width: width of the hidden states (D).
      key: `[]` typed key, consumed.
      layer: `pooler`, BERT's layer with tanh, or `pre_classifier`, DistilBERT's with ReLU. Its
        kernel is normal with standard deviation 0.02.
    """
    layer_key, key = jax.random.split(key)
    dense = {
        "kernel": 0.02 * jax.random.normal(layer_key, (width, width), jnp.float32),
        "bias": jnp.zeros(width, jnp.float32),
    }
    return {layer: dense, **init_head(width, key), "bias": jnp.zeros(1, jnp.float32)}


def zero_head(width: int) -> Params:
    """Return a head that is 0 for all hidden states, a common start for a value head.

    Source: Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593).

    Args:
      width: width of the hidden states (D).

    Returns:
      The parameters `{"kernel": [D, 1] float32}`.

    Example:
      >>> zero_head(2)["kernel"]
      Array([[0.],
             [0.]], dtype=float32)
    """
    return {"kernel": jnp.zeros((width, 1), jnp.float32)}


def apply_head(params: Params, hidden: Array) -> Array:
    """Map hidden states `[..., D]` to numbers `[...]` float32.

    Args:
      params: a `kernel [D, 1]`, and optionally a `bias [1]` and the dense layer below the head.
      hidden: the hidden states.

    Example:
      >>> apply_head({"kernel": jnp.ones((2, 1))}, jnp.array([[1.0, 2.0]]))
      Array([3.], dtype=float32)
    """
    over_last = (1,) * (hidden.ndim - 1) + (-1,)
    hidden = hidden.astype(jnp.float32)
    if layer := pooled(params):
        dense = params[layer]
        hidden = _POOLED[layer](hidden @ dense["kernel"] + dense["bias"].reshape(over_last))
    # An elementwise product and a sum, because XLA may reorder the sum of a matrix product.
    out = jnp.sum(hidden * params["kernel"][:, 0].reshape(over_last), axis=-1)
    return out + params["bias"][0] if "bias" in params else out


def shared_critic() -> CriticFn:
    """Return a critic that is a value head on the hidden states of the policy.

    Returns:
      A `ppo_jax.CriticFn` with parameters `{"head": ...}`, for example from `zero_head`.

    Example:
      >>> params, tokens = {"head": zero_head(4)}, jnp.zeros((2, 5), jnp.int32)
      >>> shared_critic()(params, jnp.ones((2, 3, 4)), tokens, tokens == 0).shape
      (2, 3)
    """
    return _shared_critic


def _shared_critic(
    params: Params, hidden: Array, tokens: Array, mask: Array, segments: Array | None = None
) -> Array:
    """Apply the head to the hidden states `[B, R, D]` of the policy."""
    return apply_head(params["head"], hidden)


def separate_critic(config: TransformerConfig) -> CriticFn:
    """Return a critic that is a decoder of its own with a value head.

    Args:
      config: the configuration of the decoder, which is called the trunk.

    Returns:
      A `ppo_jax.CriticFn` with parameters `{"trunk": ..., "head": ...}` as from `init_scorer`. A
      reward model has the same parameters, so that a critic can start from one.

    Raises:
      ValueError: if the trunk is an encoder.

    Example:
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> params, tokens = init_scorer(config, jax.random.key(0)), jnp.zeros((2, 5), jnp.int32)
      >>> separate_critic(config)(params, jnp.ones((2, 3, 4)), tokens, tokens == 0).shape
      (2, 3)
    """
    if not config.causal:
        raise ValueError(
            "A critic must not see later tokens, but config.causal=False is an encoder; use a"
            " decoder as the trunk."
        )
    return _separate_critic(config)


# Cached for the same reason as language models.
@functools.cache
def _separate_critic(config: TransformerConfig) -> CriticFn:
    model = language_model(config)

    def critic(
        params: Params, hidden: Array, tokens: Array, mask: Array, segments: Array | None = None
    ) -> Array:
        last = hidden.shape[1]
        states, _ = model.hidden(params["trunk"], tokens, mask, last=last, segments=segments)
        return apply_head(params["head"], states)

    return critic


def reward_model(config: TransformerConfig) -> Callable[[Params, Array, Array], Array]:
    """Return a model that scores token sequences.

    The head reads the first real token of an encoder, and the last real token of a decoder that is
    not `config.pad_id`, as the classifiers of `transformers` do. If the pad id is the end token,
    end tokens at the end of a text are skipped. A text of pad tokens only is read at its first
    token.

    Args:
      config: the configuration of the model below the head, which is called the trunk.

    Returns:
      A function `score(params, tokens [B, S], mask [B, S]) -> [B] float32`, for parameters
      `{"trunk": ..., "head": ...}` as from `init_scorer`.

    Example:
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> params, tokens = init_scorer(config, jax.random.key(0)), jnp.zeros((2, 3), jnp.int32)
      >>> reward_model(config)(params, tokens, tokens == 0).shape
      (2,)
    """
    model = language_model(config)

    def score(params: Params, tokens: Array, mask: Array) -> Array:
        hidden, _ = model.hidden(params["trunk"], tokens, mask)
        position = jnp.argmax(mask, axis=1)
        if config.causal:
            read = mask if config.pad_id is None else mask & (tokens != config.pad_id)
            last = mask.shape[1] - 1 - jnp.argmax(read[:, ::-1], axis=1)
            position = jnp.where(jnp.any(read, axis=1), last, position)
        state = jnp.take_along_axis(hidden, position[:, None, None], axis=1)[:, 0]
        return apply_head(params["head"], state)

    return score


def init_scorer(config: TransformerConfig, key: Array, trunk: Params | None = None) -> Params:
    """Return fresh parameters of a separate critic or a reward model.

    Args:
      config: the configuration of the trunk.
      key: `[]` typed key, consumed.
      trunk: parameters of the trunk, such as those of a policy. None draws fresh ones.

    Returns:
      The parameters `{"trunk": ..., "head": ...}`, float32.

    Example:
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> init_scorer(config, jax.random.key(0))["head"]["kernel"].shape
      (4, 1)
    """
    trunk_key, head_key = jax.random.split(key)
    return {
        "trunk": init_params(config, trunk_key) if trunk is None else trunk,
        "head": init_head(config.width, head_key),
    }
