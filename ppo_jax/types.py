"""The types that the stages of PPO share: pytrees of arrays, and Protocols for what users supply.

Axes. Array names (`x_BTD`) and docstrings name the axes of an array by these letters:

    B  sequences             T  positions, P + R         H  query heads
    P  prompt positions      V  vocabulary               K  key/value heads
    R  response positions    D  model width              C  width of one head
    S  positions per call    L  layers                   N  slots of the key/value cache

Time. Token `t` of the response, with `0 <= t < R`, is the action `a_t`. Its state `s_t` is the
prompt followed by `response[:t]`. `logprobs[t]` is log π(a_t|s_t), `values[t]` is V(s_t), and
`response_mask[t]` is true up to and including the token that ends the response.

Padding. Prompts are padded on the left and responses on the right, so the first response token is
at position `P` in every row. A mask goes with every array of tokens; no token id means padding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from flax.struct import PyTreeNode
from jax import Array

Params = Any  # A pytree of parameter arrays.
Metrics = dict[str, Array]  # Metrics by name, `[]` float32 each.
AxisName = str | tuple[str, ...]  # A mapped axis, or several that the rows are split over.
Segments = Array | None  # Numbers of the sequences that share a row, `[B, S]` int32; see HiddenFn.

KLEstimatorFn = Callable[[Array, Array], Array]
"""Estimates the KL of the policy from the reference, `[B, R]` float32 in nats per token, from the
log-probs `[B, R]` of the sampled tokens under both (or their logits; see `ops.kl.of_logits`)."""

Aggregate = Callable[[Array, Array], Array]
"""Reduces the per-token terms `[B, R]` of a loss, given their mask `[B, R]`, to `[]` float32."""


class KVCache(PyTreeNode):
    """The attention keys and values of the positions that a model has read so far.

    Attributes:
      keys, values: one `[B, G, N, F]` array per layer. The `K` key heads are divided into `G`
        groups, each of which has the `F = K / G C` features of its heads side by side.
      mask: `[B, N]` bool, true for slots that hold a real token.
      length: `[]` int32, the number of filled slots, padding included; the same for all rows.

    Example:
      >>> import jax.numpy as jnp
      >>> keys = (jnp.zeros((2, 1, 8, 4)),)  # One layer and one head of width 4, for 8 positions.
      >>> KVCache(keys, keys, mask=jnp.zeros((2, 8), bool), length=jnp.int32(0)).length
      Array(0, dtype=int32)
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    mask: Array
    length: Array


class HiddenFn(Protocol):
    """Computes the hidden states of `tokens [B, S]` int32, given those already in `cache`.

    `mask [B, S]` bool is true for real tokens. The result is the hidden states `[B, S, D]`, or with
    `last` those of the last positions, and the cache with these tokens added (None without one). A
    token attends to its own segment, where its position is the number of real tokens before it.
    """

    def __call__(
        self,
        params: Params,
        tokens: Array,
        mask: Array,
        cache: KVCache | None = None,
        last: int | None = None,
        segments: Segments = None,
    ) -> tuple[Array, KVCache | None]:
        """Return the hidden states and the cache."""


LogitsFn = Callable[[Params, Array], Array]
"""Computes next-token logits `[..., V]` float32 from parameters and hidden states `[..., D]`."""

CacheFn = Callable[[int, int], KVCache | None]
"""Makes an empty key/value cache for so many rows and slots, or None to decode without a cache."""


class LanguageModel(NamedTuple):
    """A policy as pure functions of its parameters, made by `language_model` or by the user.

    Attributes:
      hidden: computes hidden states from tokens. No state may depend on a later token.
      logits: computes next-token logits from hidden states.
      init_cache: makes an empty key/value cache.
      rounded: returns the parameters in the precision of decoding, which calls it before its loop.
      about: text that identifies the functions. A run can only be resumed with the same text.
      positions: the largest number of positions that the model can read, or None for no limit.

    Example:
      >>> import jax.numpy as jnp
      >>> bigram = LanguageModel(
      ...     hidden=lambda params, tokens, mask, cache=None, last=None: (params[tokens], cache),
      ...     logits=lambda params, hidden: hidden @ params.T,
      ...     init_cache=lambda batch_size, slots: None)
      >>> tokens, embedding = jnp.array([[1]]), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> bigram.logits(embedding, bigram.hidden(embedding, tokens, tokens > 0)[0])
      Array([[[11., 25.]]], dtype=float32)
    """

    hidden: HiddenFn
    logits: LogitsFn
    init_cache: CacheFn
    rounded: Callable[[Params], Params] = lambda params: params
    about: str = ""
    positions: int | None = None


class CriticFn(Protocol):
    """Computes the values `[B, R]` float32 of the states at the last `R` of `S` positions.

    A critic on the policy's trunk reads its hidden states there, `hidden [B, R, D]`. One with its
    own trunk reads `tokens [B, S]` int32 and `mask [B, S]` bool. Values are in units of reward.

    Example:
      >>> import jax.numpy as jnp
      >>> linear_critic = lambda params, hidden, tokens, mask: hidden @ params["weights"]
      >>> linear_critic({"weights": jnp.ones(4)}, jnp.ones((1, 2, 4)), None, None)
      Array([[4., 4.]], dtype=float32)
    """

    def __call__(
        self, params: Params, hidden: Array, tokens: Array, mask: Array, segments: Segments = None
    ) -> Array:
        """Return the values."""


class Rollout(PyTreeNode):
    """Sampled responses to a batch of prompts.

    Attributes:
      tokens: `[B, T]` int32, prompt and response.
      mask: `[B, T]` bool, true for real tokens, which attention may read.
      response_mask: `[B, R]` bool, true for the tokens to learn from.
      logprobs: `[B, R]` float32, in nats, under the distribution that the sampler drew from; 0
        outside the response mask.
      ended: `[B]` bool, true if the response holds a stop token.
      groups: `[B]` int32, the number of the prompt in the batch, or None if `sample` did not make
        the rollout. Responses to the same prompt have the same number.

    Example:
      >>> import jax.numpy as jnp
      >>> tokens, real = jnp.array([[7, 8, 9]]), jnp.ones((1, 3), bool)
      >>> rollout = Rollout(tokens, real, real[:, 2:], jnp.zeros((1, 1)), real[:, 0])
      >>> rollout.prompt_length, rollout.responses
      (2, Array([[9]], dtype=int32))
    """

    tokens: Array
    mask: Array
    response_mask: Array
    logprobs: Array
    ended: Array
    groups: Array | None = None

    @property
    def prompt_length(self) -> int:
        """The number of prompt positions, `P`."""
        return self.tokens.shape[1] - self.response_mask.shape[1]

    @property
    def responses(self) -> Array:
        """The tokens of the responses, `[B, R]` int32."""
        return self.tokens[:, self.prompt_length :]


class Scores(PyTreeNode):
    """What policy, reference and critic compute for each token of a rollout, `[B, R]` float32 each.

    Attributes:
      logprobs, ref_logprobs: of the policy and the reference, in nats; 0 outside the response mask.
      kl: the per-token estimate of the KL, in nats; 0 outside the response mask.
      entropies: of the policy, in nats; 0 outside the response mask.
      values: of the critic, in units of reward, at every step.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((2, 3))
      >>> Scores(logprobs=x, ref_logprobs=x - 1, kl=x + 1, entropies=x, values=x).kl.mean()
      Array(1., dtype=float32)
    """

    logprobs: Array
    ref_logprobs: Array
    kl: Array
    entropies: Array
    values: Array


class Experience(PyTreeNode):
    """The data that one PPO update learns from, fixed during the update.

    Attributes:
      tokens, mask: `[B, T]` int32 and `[B, T]` bool, as in `Rollout`.
      response_mask: `[B, R]` bool, the tokens in the policy loss.
      value_mask: `[B, R]` bool, the steps in the value loss: those tokens and the score's step.
      logprobs: `[B, R]` float32, in nats, of the policy that probability ratios divide by.
      values: `[B, R]` float32, in units of reward, of the critic before the update.
      advantages: `[B, R]` float32, the weight of each token in the policy loss.
      returns: `[B, R]` float32, in units of reward, the targets of the value loss.
      ref_logprobs: `[B, R]` float32, in nats, of the reference policy, or None.
      sampler_logprobs: `[B, R]` float32, in nats, as the sampler computed them, or None.
      groups: `[B]` int32, the number of the prompt in the batch, or None.
      scores: `[B]` float32, the task's score of the response or NaN, or None.

    Example:
      >>> import jax
      >>> x, tokens = jax.numpy.ones((4, 2)), jax.numpy.ones((4, 5), int)
      >>> experience = Experience(tokens, tokens > 0, x > 0, x > 0, x, x, x, x)
      >>> jax.tree.map(lambda array: array[:2], experience).tokens.shape
      (2, 5)
    """

    tokens: Array
    mask: Array
    response_mask: Array
    value_mask: Array
    logprobs: Array
    values: Array
    advantages: Array
    returns: Array
    ref_logprobs: Array | None = None
    sampler_logprobs: Array | None = None
    groups: Array | None = None
    scores: Array | None = None


class LossMetrics(NamedTuple):
    """The metrics of a micro-batch, by name and `[]` float32 each.

    Attributes:
      mean: the shares of the micro-batch in the means of the minibatch, which are added up.
      max: the maxima of the micro-batch; the metric of the minibatch is the largest of them.

    Example:
      >>> LossMetrics(mean={"loss/total": 0.5}, max={"policy/ratio_max": 1.0}).max
      {'policy/ratio_max': 1.0}
    """

    mean: Metrics
    max: Metrics


class Counts(NamedTuple):
    """The denominators of a minibatch, over all its micro-batches and devices.

    Attributes:
      tokens: `[]` float32, the number of tokens in the response mask.
      policy: `[]` float32, the denominator of the policy loss.
      value: `[]` float32, the denominator of the value loss.
      good: `[]` float32, the number of tokens of responses with a score above 0, or None.
      steps: `[]` float32, the number of steps in the value mask, or None.

    Example:
      >>> Counts(tokens=30.0, policy=4.0, value=4.0).policy  # The loss averages over 4 responses.
      4.0
    """

    tokens: Array
    policy: Array
    value: Array
    good: Array | None = None
    steps: Array | None = None


class LossFn(Protocol):
    """Computes the contribution of a micro-batch to the loss, `[]` float32, and metrics.

    Contributions are added over the micro-batches of a minibatch and, on a mesh, over shards of the
    `data` axis, so the loss must divide by `counts` and not by the number of its own rows. To shard
    an array inside the loss, use `ppo_jax.sharding.constrain`, which also works within a shard.
    """

    def __call__(
        self, params: Params, batch: Experience, counts: Counts
    ) -> tuple[Array, LossMetrics]:
        """Return the loss and the metrics."""


class AdvantageFn(Protocol):
    """Computes the advantages and the returns of the steps, `[B, R]` float32 each.

    `rewards` and `values` are `[B, R]` float32, in units of reward. `mask [B, R]` bool is true for
    the steps that count. `rollout` and `scores` are for estimators that group responses by prompt
    or read log-probs. Under pmap it sees whole groups of rows on one device, on a mesh all rows.
    """

    def __call__(
        self, rewards: Array, values: Array, mask: Array, *, rollout: Rollout, scores: Scores
    ) -> tuple[Array, Array]:
        """Return the advantages and the returns."""
