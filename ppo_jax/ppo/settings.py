"""Settings of a PPO run, and the presets. Only the stateful edge reads these; the numerics take plain keywords."""

import dataclasses
import enum
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ppo_jax.errors import SettingError, check_numbers
from ppo_jax.ops import kl
from ppo_jax.ops.masked import BY_SEQUENCE, BY_TOKEN, Aggregation
from ppo_jax.ops.rewards import MissingEOS, ScoreAt


class KLEstimator(enum.Enum):
    """Which per-token estimate of the KL is the penalty (see `ppo_jax.ops.kl`)."""

    K1 = "k1"
    K2 = "k2"
    K3 = "k3"
    ABS = "abs"
    FULL = "full"

    @property
    def function(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return {
            KLEstimator.K1: kl.kl_k1,
            KLEstimator.K2: kl.kl_k2,
            KLEstimator.K3: kl.kl_k3,
            KLEstimator.ABS: kl.kl_abs,
            KLEstimator.FULL: kl.kl_full,
        }[self]


class Weighting(enum.Enum):
    """Whether each token or each response weighs alike in the loss."""

    TOKEN = "token"
    SEQUENCE = "sequence"

    @property
    def aggregation(self) -> Aggregation:
        return BY_TOKEN if self is Weighting.TOKEN else BY_SEQUENCE


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Everything that shapes a PPO iteration."""

    batch_size: int = 64
    """Responses sampled an update."""
    epochs: int = 4
    """Passes over them."""
    minibatches: int = 4
    """Optimizer steps a pass."""
    micro_batch: int | None = None
    """Rows whose activations exist at a time; none: a whole minibatch."""
    rollout_rows: int | None = None
    """Rows sampled at a time, which bounds the cache; none: the whole batch."""
    logit_chunk: int | None = None
    """Response positions whose logits exist at a time; none: all."""
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    min_new_tokens: int = 0
    """A response cannot end before this many tokens."""
    stop_at_end: bool = True
    """Stop a row at its end token; if false, sample on and let the score alone see the cut text."""
    truncate_after: int = 0
    """End tokens among this many first ones are words like others (min_new_tokens forbids them instead)."""
    temperature: float = 1.0
    """Of sampling and of every log-prob. Filters (top_k, top_p, min_new_tokens) shape the samples alone: the update's log-probs are
    of the whole distribution, and the metric sampler/logprob_gap_mean shows the distance."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Sample within this probability mass."""
    clip_low: float = 0.2
    """How far below 1 the probability ratio still pays."""
    clip_high: float = 0.2
    """How far above 1 it does."""
    dual_clip: float | None = None
    """Bound on the loss of bad tokens, over 1."""
    value_clip: float | None = 0.2
    """Clip of the values around the old ones."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    weighting: Weighting = Weighting.TOKEN
    """What weighs alike in the loss."""
    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """Lambda of generalized advantage estimation."""
    whiten_rewards: bool = False
    """Scale token rewards to variance 1."""
    whiten_advantages: bool = True
    """Scale and shift advantages to variance 1 and mean 0."""
    unbiased_whitening: bool = False
    """Divide variances by n - 1."""
    kl_coef: float = 0.05
    """Weight of the KL penalty (the first one, if it adapts)."""
    kl_target: float | None = None
    """Adapt the weight to hold this KL, in nats a response; none: a fixed weight."""
    kl_horizon: float = 10000.0
    """Responses over which an adapting weight moves by 20 %."""
    kl_estimator: KLEstimator = KLEstimator.K1
    """Per-token estimate of the KL in the penalty."""
    score_at: ScoreAt = ScoreAt.LAST_TOKEN
    """Which step receives the score."""
    missing_eos: MissingEOS = MissingEOS.KEEP
    """What becomes of the score of a response that did not end."""
    missing_eos_penalty: float = 1.0
    """How much, for that."""
    score_clip: float | None = None
    """Clip scores to this magnitude."""
    scale_scores: bool = False
    """Divide scores by their running standard deviation."""
    target_kl: float | None = None
    """Stop an update once a minibatch moved the policy this far, in nats a token."""
    skip_nonfinite: bool = True
    """Leave out a step whose gradient is not finite."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    decay_learning_rate: bool = False
    """Decay it linearly to 0 over the run, by a step an update, whether or not all of its steps are taken."""
    warmup_steps: int = 0
    """Optimizer steps over which it rises from 0."""
    adam_b1: float = 0.9
    """First moment's decay."""
    adam_b2: float = 0.999
    """Second moment's decay."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient's global norm."""

    def __post_init__(self):
        check_numbers(self)
        for name in (
            "batch_size",
            "epochs",
            "minibatches",
            "max_new_tokens",
            "temperature",
            "learning_rate",
            "kl_horizon",
        ):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} must be positive, not {getattr(self, name)}.")
        for name in ("adam_b1", "adam_b2"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(
                    f"{name} must lie in 0 .. 1, and below 1, not {getattr(self, name)}."
                )
        for name in ("adam_eps", "entropy_coef"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name} must not be negative, but is {getattr(self, name)}.")
        if self.top_p == 0:
            raise SettingError("top_p must be above 0.")
        for name in (
            "micro_batch",
            "rollout_rows",
            "logit_chunk",
            "top_k",
            "kl_target",
            "score_clip",
            "target_kl",
            "value_clip",
            "max_grad_norm",
        ):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise SettingError(f"{name} must be positive, or none, not {getattr(self, name)}.")
        for name in (
            "kl_coef",
            "vf_coef",
            "missing_eos_penalty",
            "clip_high",
            "truncate_after",
            "warmup_steps",
            "weight_decay",
        ):
            if not getattr(self, name) >= 0:
                raise SettingError(f"{name} must not be negative, but is {getattr(self, name)}.")
        for name in ("gamma", "lam", "top_p", "clip_low"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"{name} must lie in 0 .. 1, not {getattr(self, name)}.")
        if self.batch_size % self.minibatches:
            raise SettingError(
                f"minibatches={self.minibatches} must divide batch_size={self.batch_size}."
            )
        if self.minibatch_size % (self.micro_batch or self.minibatch_size):
            raise SettingError(
                f"micro_batch={self.micro_batch} must divide a minibatch of {self.minibatch_size} rows."
            )
        if self.batch_size % (self.rollout_rows or self.batch_size):
            raise SettingError(
                f"rollout_rows={self.rollout_rows} must divide batch_size={self.batch_size}."
            )
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise SettingError(
                f"min_new_tokens={self.min_new_tokens} must lie in 0 .. max_new_tokens={self.max_new_tokens}."
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise SettingError(f"dual_clip must be over 1, or none, not {self.dual_clip}.")

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.minibatches

    @property
    def rows_at_a_time(self) -> int:
        return self.micro_batch or self.minibatch_size

    @property
    def micro_batches(self) -> int:
        return self.minibatch_size // self.rows_at_a_time

    def controller(self) -> kl.KLController:
        if self.kl_target is None:
            return kl.fixed_kl(self.kl_coef)
        return kl.adaptive_kl(self.kl_coef, target=self.kl_target, horizon=self.kl_horizon)

    def optimizer(self, updates: int) -> optax.GradientTransformation:
        """AdamW with warm-up, decay and clipping, for a run of `updates` updates; the same object for the same settings."""
        return _optimizer(self, updates)


@functools.lru_cache(
    maxsize=16
)  # states of two optimizers are of two types, and what was compiled for one does not take the other
def _optimizer(c: PPOConfig, updates: int) -> optax.GradientTransformation:
    def rate(step: jax.Array) -> jax.Array:
        warm = jnp.minimum((step + 1) / c.warmup_steps, 1.0) if c.warmup_steps else 1.0
        left = 1 - (step // (c.epochs * c.minibatches)) / updates if c.decay_learning_rate else 1.0
        return c.learning_rate * warm * left

    adam = optax.adamw(
        rate, b1=c.adam_b1, b2=c.adam_b2, eps=c.adam_eps, weight_decay=c.weight_decay
    )
    return (
        adam
        if c.max_grad_norm is None
        else optax.chain(optax.clip_by_global_norm(c.max_grad_norm), adam)
    )
