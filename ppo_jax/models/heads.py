"""Numbers from hidden states: the value of a state, the score of a text."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.transformer import init_params, language_model
from ppo_jax.types import CriticFn, Params


def init_head(width: int, key: jax.Array) -> Params:
    """A linear map `[D] -> 1` without bias: `{"kernel": [D, 1]}`, drawn at `1 / √(D + 1)` as in Stiennon et al. 2020."""
    return {"kernel": jax.random.normal(key, (width, 1)) * (width + 1) ** -0.5}


_POOLED = {
    "pooler": jnp.tanh,
    "pre_classifier": jax.nn.relu,
}  # the layer below an encoder's head: BERT's, DistilBERT's


def pooled(head: Params) -> str | None:
    """The name of the layer below a head, if it has one."""
    return next((name for name in _POOLED if name in head), None)


def init_pooled_head(width: int, key: jax.Array, layer: str = "pooler") -> Params:
    """BERT's: a layer with tanh, drawn at its 0.02, below a map as in `init_head`; with biases, which begin at 0.

    DistilBERT's `layer` is its `pre_classifier`, with ReLU.
    """
    layer_key, key = jax.random.split(key)
    below = {
        "kernel": 0.02 * jax.random.normal(layer_key, (width, width)),
        "bias": jnp.zeros(width),
    }
    return {layer: below, **init_head(width, key), "bias": jnp.zeros(1)}


def zero_head(width: int) -> Params:
    """A head that says 0 of everything, as the value heads of Ziegler et al. 2019 begin."""
    return {"kernel": jnp.zeros((width, 1))}


def apply_head(params: Params, hidden: jax.Array) -> jax.Array:
    """`[..., D]` hidden states to `[...]` float32: the product with `kernel`, and `bias` and the layer below it where
    there are any.

    Example:
      >>> apply_head({"kernel": jnp.ones((2, 1))}, jnp.array([[1.0, 2.0]]))
      Array([3.], dtype=float32)
    """
    # A sum of products, not a matrix product: its order of summation is then the same in every program that computes it.
    over = (1,) * (hidden.ndim - 1) + (-1,)
    hidden = hidden.astype(jnp.float32)
    if layer := pooled(params):
        hidden = _POOLED[layer](
            hidden @ params[layer]["kernel"] + params[layer]["bias"].reshape(over)
        )
    out = jnp.sum(hidden * params["kernel"][:, 0].reshape(over), axis=-1)
    return out + params["bias"][0] if "bias" in params else out


def shared_critic() -> CriticFn:
    """A value head on the policy's own trunk; parameters `{"head": ...}`."""

    def critic(params: Params, hidden: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        del tokens, mask
        return apply_head(params["head"], hidden)

    return critic


def separate_critic(config: TransformerConfig) -> CriticFn:
    """A decoder of its own with a value head; parameters `{"trunk": ..., "head": ...}`, as a reward model's.

    Raises:
      ValueError: if the trunk is an encoder, whose states know the words to come.
    """
    if not config.causal:
        raise ValueError(
            "A critic must not see the words to come; this trunk is an encoder, not a decoder."
        )
    model = language_model(config)

    def critic(params: Params, hidden: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return apply_head(
            params["head"], model.hidden(params["trunk"], tokens, mask, last=hidden.shape[1])[0]
        )

    return critic


def reward_model(config: TransformerConfig) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """A model whose head scores a text: a decoder at its last real token, an encoder at its first.

    Returns:
      `score(params, tokens [B, S], mask [B, S]) -> [B] float32`; parameters `{"trunk": ..., "head": ...}`.

    Example:
      >>> config = TransformerConfig(vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> params = init_scorer(config, jax.random.key(0))
      >>> reward_model(config)(params, jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool)).shape
      (2,)
    """
    model = language_model(config)

    def score(params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        hidden, _ = model.hidden(params["trunk"], tokens, mask)
        at = (
            mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
            if config.causal
            else jnp.argmax(mask, axis=1)
        )
        return apply_head(
            params["head"], jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
        )

    return score


def init_scorer(config: TransformerConfig, key: jax.Array, trunk: Params | None = None) -> Params:
    """Parameters of a separate critic or a reward model, with a given trunk or a fresh one."""
    trunk_key, head_key = jax.random.split(key)
    return {
        "trunk": init_params(config, trunk_key) if trunk is None else trunk,
        "head": init_head(config.width, head_key),
    }
