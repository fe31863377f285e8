"""The words of this code base: axes, the pytrees that flow from stage to stage, and the functions that a user may supply.

Axes, in array names (`x_BTD`) and docstrings:

    B  sequences             T  positions, P + R          H  query heads
    P  prompt positions      V  vocabulary                K  key/value heads
    R  response positions    D  model width               C  width of one head
    S  positions fed at once L  layers                    N  slots of the key/value cache

Time. Token `t` of the response, `0 <= t < R`, is the action `a_t`; its state is the prompt and `response[:t]`. `logprobs[t]` is
log π(a_t|s_t), `values[t]` is V(s_t), and `response_mask[t]` is true up to and including the token that ends the response.

Padding. Prompts are padded on the left and responses on the right, so that the boundary is at `P` for every row. A mask travels
with every array of tokens; nothing is inferred from the id of a token.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax

Params = Any  # a pytree of arrays


@flax.struct.dataclass
class KVCache:
    """Keys and values of the positions read so far.

    Attributes:
      keys, values: one `[B, K, N, C]` array a layer.
      mask: `[B, N]` bool, slots that hold a real token.
      length: `[]` int32, slots filled, padding included; the same for every row.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array
    length: jax.Array


def overlay(base: Params | None, top: Params) -> Params:
    """The tree of both, where `top` wins; no array is copied. Frozen parameters lie below, those that train on top.

    Example:
      >>> overlay({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": 4})
      {'a': {'x': 1, 'y': 3}, 'b': 4}
    """
    if not isinstance(base, Mapping) or not isinstance(top, Mapping):
        return top
    return {**base, **{name: overlay(base.get(name), part) for name, part in top.items()}}


class HiddenFn(Protocol):
    def __call__(
        self,
        params: Params,
        tokens: jax.Array,
        mask: jax.Array,
        cache: KVCache | None = None,
        last: int | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Reads `tokens [B, S]` with their `mask [B, S]`, after what the cache holds; gives `[B, S, D]` and the cache.

        With `last`, only the states of so many last positions, `[B, last, D]`.
        """


class LogitsFn(Protocol):
    def __call__(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Next-token logits `[..., V]` float32 of hidden states `[..., D]`."""


class CacheFn(Protocol):
    def __call__(self, batch_size: int, slots: int) -> KVCache:
        """An empty cache."""


class LanguageModel(NamedTuple):
    """A policy as pure functions. `models.transformer.language_model` makes one; yours may be anything causal.

    `rounded` gives parameters that say the same in fewer bits, which decoding makes once and reads at every step.
    """

    hidden: HiddenFn
    logits: LogitsFn
    init_cache: CacheFn
    rounded: Callable[[Params], Params] = lambda params: params
    about: str = (
        ""  # what fixes these functions beside their parameters; a run goes on only with the same
    )


class CriticFn(Protocol):
    def __call__(
        self, params: Params, hidden: jax.Array, tokens: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Values `[B, R]` float32 of the states at the last R of S positions: from the policy's `hidden [B, R, D]` there if the
        trunk is shared, else from `tokens [B, S]` and `mask [B, S]`."""


@flax.struct.dataclass
class Rollout:
    """Sampled responses, before anything is learned from them.

    Attributes:
      tokens: `[B, T]` int32, `[prompt | response]`.
      mask: `[B, T]` bool, what attention may see.
      response_mask: `[B, R]` bool, the actions to learn from.
      logprobs: `[B, R]` float32, of the sampler, under the distribution it drew from; 0 outside the mask.
      ended: `[B]` bool, whether the response holds a stop token.
    """

    tokens: jax.Array
    mask: jax.Array
    response_mask: jax.Array
    logprobs: jax.Array
    ended: jax.Array

    @property
    def prompt_length(self) -> int:
        return self.tokens.shape[1] - self.response_mask.shape[1]

    @property
    def responses(self) -> jax.Array:
        return self.tokens[:, self.prompt_length :]


@flax.struct.dataclass
class Scores:
    """What the models say of a rollout. `logprobs`, `ref_logprobs`, `kl`, `entropies`, `values`: `[B, R]` float32.

    `kl` is the per-token estimate of the KL from the reference. Everything is 0 outside the response mask, but `values`,
    which stand at every step.
    """

    logprobs: jax.Array
    ref_logprobs: jax.Array
    kl: jax.Array
    entropies: jax.Array
    values: jax.Array


@flax.struct.dataclass
class Experience:
    """What one PPO update learns from; fixed while it runs.

    Attributes:
      tokens, mask: `[B, T]`, as in `Rollout`.
      response_mask: `[B, R]` bool, the tokens of the policy's loss.
      value_mask: `[B, R]` bool, the steps of the value's loss: the same and the step of the score, if it is another.
      logprobs, values: `[B, R]` float32, of the policy and critic that acted.
      advantages, returns: `[B, R]` float32.
    """

    tokens: jax.Array
    mask: jax.Array
    response_mask: jax.Array
    value_mask: jax.Array
    logprobs: jax.Array
    values: jax.Array
    advantages: jax.Array
    returns: jax.Array


Metrics = dict[str, jax.Array]


class LossMetrics(NamedTuple):
    """Metrics of a micro-batch: shares of the whole minibatch's means, and maxima."""

    mean: Metrics
    max: Metrics


class Counts(NamedTuple):
    """What the means of a minibatch divide by, over all its micro-batches and devices; `[]` float32 each."""

    tokens: jax.Array  # of the response mask
    policy: jax.Array  # of the response mask, as the aggregation counts
    value: jax.Array  # of the value mask, as the aggregation counts


class LossFn(Protocol):
    def __call__(
        self, params: Params, batch: Experience, counts: Counts
    ) -> tuple[jax.Array, LossMetrics]:
        """The part that `batch`, a micro-batch, has in its minibatch's loss and metrics.

        On a mesh it may run once for each place on `data`, and the parts are added up: it divides by `counts`, not by its own rows.
        Where it says itself how an array lies, it does so by `models.sharding.constrain`, which knows that.
        """


class KLEstimatorFn(Protocol):
    """A per-token estimate of the KL divergence from the reference."""

    def __call__(self, policy: jax.Array, reference: jax.Array, /) -> jax.Array:
        """Returns `[B, R]` float32 from the log-probs `[B, R]`, or from the logits `[B, R, V]`, of policy and reference."""


class AdvantageFn(Protocol):
    """An advantage estimator."""

    def __call__(
        self,
        rewards: jax.Array,
        values: jax.Array,
        mask: jax.Array,
        *,
        rollout: Rollout,
        scores: Scores,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns advantages and returns, `[B, R]` float32 each, of `[B, R]` rewards, values and their mask."""


class ResponseLossFn(Protocol):
    """A loss of `[B, R]` arrays."""

    def __call__(
        self,
        logprobs: jax.Array,
        values: jax.Array,
        entropies: jax.Array,
        *,
        old_logprobs: jax.Array,
        old_values: jax.Array,
        advantages: jax.Array,
        returns: jax.Array,
        mask: jax.Array,
        value_mask: jax.Array,
        aggregate: Callable[[jax.Array, jax.Array], jax.Array],
        value_aggregate: Callable[[jax.Array, jax.Array], jax.Array],
    ) -> tuple[jax.Array, Metrics]:
        """Returns the loss, `[]` float32, and its terms by name."""
