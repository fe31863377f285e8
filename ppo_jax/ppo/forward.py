"""The forward pass over responses that scoring and the loss share, unpacked and packed."""

from functools import partial
from typing import NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.logprobs import chunked_logprobs_and_entropy
from ppo_jax.ops.masked import check_mask
from ppo_jax.ppo.batching import map_chosen
from ppo_jax.ppo.packing import Bins, pack_rows
from ppo_jax.types import CriticFn, LanguageModel, Params


class Forward(NamedTuple):
    """What one forward pass gives for each response token.

    Attributes:
      logprobs: `[B, R]` float32, log-probs of the tokens, in nats.
      values: `[B, R]` float32, values of the states before the tokens.
      entropies: `[B, R]` float32, entropies of the next-token distributions, in nats.
      hidden: `[B, R, D]` hidden states before the tokens.

    Example:
      >>> x = jnp.zeros((1, 2))
      >>> Forward(logprobs=x - 1, values=x, entropies=x, hidden=x[..., None]).logprobs.sum(axis=1)
      Array([-2.], dtype=float32)
    """

    logprobs: Array
    values: Array
    entropies: Array
    hidden: Array


class ForwardFn(Protocol):
    """Computes a `Forward`; `forward_responses` and `forward_packed` with bins are two."""

    def __call__(
        self,
        model: LanguageModel,
        critic: CriticFn,
        params: Params,
        tokens: Array,
        mask: Array,
        prompt_length: int,
        *,
        temperature: float,
        chunk: int | None = None,
    ) -> Forward:
        """Return what the pass gives for each response token."""


def forward_responses(
    model: LanguageModel,
    critic: CriticFn,
    params: Params,
    tokens: Array,
    mask: Array,
    prompt_length: int,
    *,
    temperature: float,
    chunk: int | None = None,
) -> Forward:
    """Compute log-probs, values and entropies of responses in one forward pass.

    Scoring and the loss both call this function, and with the same micro-batch shape, so that the
    probability ratio of an unchanged policy is 1.

    Args:
      model: functions of the policy.
      critic: function of the critic.
      params: `{"policy": ..., "critic": ...}`.
      tokens: `[B, T]` int32, `[prompt | response]`.
      mask: `[B, T]` bool, real tokens.
      prompt_length: `P`.
      temperature: sampling temperature; positive.
      chunk: number of response positions whose logits are in memory at a time; `None` for all.

    Returns:
      A `Forward`.

    Raises:
      AssertionError: if the critic does not return values of shape `[B, R]`, or `mask` is not bool.

    Example:
      >>> import jax
      >>> from ppo_jax import *
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> policy = init_params(config, jax.random.key(0))
      >>> params = {"policy": policy, "critic": {"head": zero_head(4)}}
      >>> tokens = jnp.array([[3, 1, 4, 1, 5]])
      >>> forward_responses(language_model(config), shared_critic(), params, tokens, tokens > 0, 2,
      ...     temperature=1.0).logprobs.shape
      (1, 3)
    """
    check_mask(mask, tokens)
    tokens = jnp.where(mask, tokens, 0)  # The model never sees which id fills the padding.
    inputs, input_mask = tokens[:, :-1], mask[:, :-1]
    # The states before the response's tokens are the last R of the T - 1 inputs.
    hidden, _ = model.hidden(
        params["policy"], inputs, input_mask, last=tokens.shape[1] - prompt_length
    )
    values = critic(params["critic"], hidden, inputs, input_mask)
    chex.assert_shape(values, hidden.shape[:2])
    logprobs, entropies = chunked_logprobs_and_entropy(
        lambda h: model.logits(params["policy"], h),
        hidden,
        tokens[:, prompt_length:],
        temperature=temperature,
        chunk=chunk,
    )
    return Forward(logprobs, values, entropies, hidden)


def forward_packed(
    model: LanguageModel,
    critic: CriticFn,
    params: Params,
    tokens: Array,
    mask: Array,
    prompt_length: int,
    *,
    bins: Bins,
    temperature: float,
    chunk: int | None = None,
) -> Forward:
    """Compute what `forward_responses` does, with the rows packed into bins.

    Only the slots of the bins are computed, and logits only of states before a real token of a
    response. The rows must fit in the bins; `sum_bins` chooses such rows of a larger batch.

    Args:
      model: functions of the policy; `hidden` must take `segments`.
      critic: function of the critic, which must take `segments`.
      params: `{"policy": ..., "critic": ...}`.
      tokens: `[B, T]` int32, `[prompt | response]`.
      mask: `[B, T]` bool, real tokens. A row without any is left out, and what is returned for it
        is arbitrary.
      prompt_length: `P`.
      bins: the shape of the bins.
      temperature: sampling temperature; positive.
      chunk: number of tokens whose logits are in memory at a time on each device that rows are
        sharded over; `None` for a quarter of the slots.

    Returns:
      A `Forward`. Log-probs and entropies of tokens outside the mask are 0. The value and the
      hidden state after the last real token are there, and are repeated for all later steps. All
      numbers of a row that does not fit in the bins are NaN.

    Raises:
      AssertionError: if the critic does not return one value per slot, or `mask` is not bool.
      ValueError: if a bin cannot hold `T - 1` tokens.

    Example:
      >>> from ppo_jax import *
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> policy = init_params(config, jax.random.key(0))
      >>> params = {"policy": policy, "critic": {"head": zero_head(4)}}
      >>> tokens = jnp.array([[0, 3, 1, 4, 0], [5, 2, 6, 4, 1]])
      >>> forward_packed(language_model(config), shared_critic(), params, tokens, tokens > 0, 2,
      ...     bins=Bins(length=128), temperature=1.0).logprobs.shape
      (2, 3)
    """
    check_mask(mask, tokens)
    packing = pack_rows(mask[:, :-1], bins)
    inputs, input_mask = packing.pack(tokens[:, :-1]), packing.pack(mask[:, :-1])
    inputs, segments = jnp.where(input_mask, inputs, 0), packing.segments
    hidden, _ = model.hidden(params["policy"], inputs, input_mask, segments=segments)
    values = critic(params["critic"], hidden, inputs, input_mask, segments=segments)
    chex.assert_shape(values, inputs.shape)
    acts = mask[:, 1:] & (jnp.arange(tokens.shape[1] - 1) >= prompt_length - 1)[None]

    def reduce_logits(hidden: Array, tokens: Array) -> tuple[Array, Array]:
        unembed = lambda h: model.logits(params["policy"], h)
        out = chunked_logprobs_and_entropy(
            unembed, hidden[None], tokens[None], temperature=temperature
        )
        return out[0][0], out[1][0]

    flat = lambda x: x.reshape(-1, *x.shape[2:])
    logprobs, entropies = map_chosen(
        reduce_logits if chunk is None else jax.checkpoint(reduce_logits, prevent_cse=False),
        flat(packing.pack(acts)),
        flat(hidden),
        flat(packing.pack(tokens[:, 1:])),
        size=chunk or bins.number * bins.length // 4,
    )
    logprobs, entropies = (x.reshape(inputs.shape) for x in (logprobs, entropies))
    last = lambda x: packing.unpack(x)[:, prompt_length - 1 :]
    acting = acts[:, prompt_length - 1 :]
    return Forward(
        jnp.where(acting, last(logprobs), 0),
        last(values),
        jnp.where(acting, last(entropies), 0),
        last(hidden),
    )


def forward_fn(bins: Bins | None) -> ForwardFn:
    """Return `forward_responses`, or `forward_packed` if there are bins."""
    return forward_responses if bins is None else partial(forward_packed, bins=bins)
