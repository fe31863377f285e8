"""The settings of a PPO iteration.

Only `ppo.iteration` and the code around it read the settings. The numeric functions in
`ppo_jax.ops` take keyword arguments instead. This module does not import JAX, so that the
command line can list the settings quickly; `optimizers` and `controllers` build what they describe.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ppo_jax.ops.score_rules import MissingEOS, ScoreAt
from ppo_jax.ppo.choices import (
    Advantage,
    Importance,
    KLEstimator,
    KLLoss,
    Loss,
    OldLogprobs,
    Weighting,
)
from ppo_jax.ppo.critic_settings import CriticConfig
from ppo_jax.ppo.setting_checks import check_settings

if TYPE_CHECKING:
    from ppo_jax.ppo.packing import Bins


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """The settings of a PPO iteration.

    Raises:
      SettingError: if a setting is out of range, one that must divide another does not, or there is
        no method of a name that is given in place of a member, as in `PPOConfig(loss="gspo")`.

    Example:
      >>> config = PPOConfig(batch_size=32, minibatches=2, micro_batch=4)
      >>> config.minibatch_size, config.micro_batches
      (16, 4)
    """

    # The string below each field is its help on the command line, which keeps line breaks: strings
    # of several lines are wrapped at 70 columns to fit a terminal of 80.
    batch_size: int = 64
    """Each update samples this many responses."""
    group_size: int = 1
    """Each prompt gets this many responses, so an update has batch_size /
    group_size prompts. The advantages grpo, dr_grpo, rloo, maxrl and
    reinforce_pp_baseline compare the responses to one prompt."""
    filter_groups: bool = False
    """Leave responses out of the policy loss if all responses to their prompt
    have the same score (DAPO, arXiv:2503.14476)."""
    epochs: int = 4
    """Each update makes this many passes over its responses."""
    minibatches: int = 4
    """Each epoch is divided into this many minibatches, with one optimizer step each."""
    micro_batch: int | None = None
    """Gradients are accumulated over micro-batches of this many responses,
    which bounds the memory of activations. None: a whole minibatch at
    once. With pack, this counts bins instead of responses."""
    rollout_rows: int | None = None
    """Responses are sampled this many at a time, which bounds the memory of
    the key/value cache. None: the whole batch at once."""
    rollout_slots: int | None = None
    """Responses are decoded this many at a time. When one ends, the next
    prompt takes its place, which is faster where lengths differ much.
    None: one slot for each response."""
    pack: int | None = None
    """Scoring and update compute bins of this many tokens (a multiple of 64)
    that hold several prompts and responses each, instead of padding them.
    Each device computes micro_batch bins at once, 1 by default. None: no
    packing."""
    logit_chunk: int | None = None
    """Logits are computed for this many response positions at a time, which
    bounds their memory. None: all positions at once."""
    max_new_tokens: int = 24
    """A response is at most this many tokens long."""
    min_new_tokens: int = 0
    """End tokens are not sampled among this many first tokens of a response."""
    stop_at_end: bool = True
    """Stop sampling a response at its end token. If false, sampling goes on
    to max_new_tokens and all of these tokens are trained on, but the
    reward still reads the text only up to the end token."""
    truncate_after: int = 0
    """An end token does not end the response if it is among this many first
    tokens, where it is an ordinary token. (The option min_new_tokens
    keeps end tokens from being sampled there.)"""
    temperature: float = 1.0
    """Sampling temperature, applied to the log-probabilities of the policy
    and the reference too. In contrast, top_k, top_p and min_new_tokens
    only restrict sampling: log-probabilities are of the unrestricted
    distribution, and the metric sampler/logprob_gap_mean shows the
    difference."""
    top_k: int | None = None
    """Sample only among this many most likely tokens. None: no limit."""
    top_p: float | None = None
    """Sample only among the most likely tokens whose probabilities sum to
    this (nucleus sampling). None: no limit."""
    advantage: Advantage = Advantage.GAE
    """Advantage estimator: gae is generalized advantage estimation; vapo is
    the same with a lambda that grows with the length of the response and
    returns without bootstrapping (arXiv:2504.05118), and sao has another rate
    of growth (arXiv:2607.07508); evpo uses the critic
    only while it explains variance (arXiv:2604.19485). The others need no
    critic. monte_carlo is the sum of the later rewards, reinforce_pp whitens
    it (arXiv:2501.03262), and batch_mean subtracts the mean score of the
    batch. grpo (arXiv:2402.03300), dr_grpo (arXiv:2503.20783), rloo
    (arXiv:2402.14740), maxrl (arXiv:2602.02710) and reinforce_pp_baseline
    compare the responses to one prompt, and need a group_size over 1 and, to
    be as published, no whiten_advantages."""
    loss: Loss = Loss.PPO
    """Loss of the policy, to which value loss and entropy bonus are added: ppo
    is the clipped surrogate objective. All but sapo and vespo read clip_low
    and clip_high, as the bounds of a ratio (cispo, dis), of a divergence
    (dppo_tv, dppo_kl), of the mean ratio of a response (gspo, for example
    0.0003 and 0.0004) or of a log-ratio (gmpo, for example 0.4 and 0.4). gspo
    and gmpo go with weighting=sequence."""
    old_logprobs: OldLogprobs = OldLogprobs.SCORED
    """Log-probabilities that the probability ratio divides by: those that the
    policy gives to the responses before the update (scored), or those of the
    sampler, which may be of an older policy."""
    importance: Importance = Importance.NONE
    """Weight each token by scored over sampled probability, for a sampler that
    differs from the policy: truncate the weight (tis) or set it to 0 outside
    a range (icepop), do so with that of the whole response (sequence_tis,
    sequence_mask), or drop responses whose mean weight lies outside a range
    (geometric_mask)."""
    importance_range: tuple[float, float] | None = None
    """Lower and upper bound of these weights. None: those of released code,
    which are 0 2 for tis and sequence_tis, 0 3 for sequence_mask, and
    0.5 5 for icepop and geometric_mask."""
    clip_low: float = 0.2
    """Lower clip: the probability ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """Upper clip: the probability ratio is clipped at 1 + clip_high."""
    dual_clip: float | None = None
    """Dual clip: a token of advantage A < 0 adds at most dual_clip * |A| to
    the policy loss (arXiv:1912.09729). It must be over 1. None: no bound."""
    value_clip: float | None = 0.2
    """The value loss clips values to at most this distance from the values
    of the rollout. None: no clip."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, which is subtracted from the loss."""
    entropy_target: float | None = None
    """Adapt the weight of the entropy bonus, from entropy_coef on and up to
    0.005, so that objective/entropy does not fall below this, in nats per
    token (arXiv:2505.22312). None: the weight is constant."""
    positive_nll_coef: float = 0.0
    """Weight of the negative log-likelihood of responses with a score above 0,
    which is added to the loss (VAPO, arXiv:2504.05118)."""
    weighting: Weighting = Weighting.TOKEN
    """The loss is a mean in which each token has the same weight (token) or
    each response (sequence). sequence_sum is the mean over responses of the
    sum over their tokens, constant_length divides that by max_new_tokens
    (Dr. GRPO), and token_sum is the sum over the minibatch."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalized advantage estimation (arXiv:1506.02438): 0 has
    the least variance, 1 the least bias."""
    whiten_rewards: bool = False
    """Scale token rewards to variance 1 and keep their mean."""
    whiten_advantages: bool = True
    """Scale and shift advantages to variance 1 and mean 0."""
    unbiased_whitening: bool = False
    """Divide by n - 1 instead of n in the variances that rewards and
    advantages are whitened with."""
    kl_coef: float = 0.05
    """Weight of the KL penalty, or its initial value if kl_target is set
    (metric objective/kl_coef)."""
    kl_target: float | None = None
    """Adapt the weight of the KL penalty so that objective/kl stays near
    this, in nats per response (arXiv:1909.08593). None: the weight is
    constant."""
    kl_horizon: float = 10000.0
    """An adaptive weight of the KL penalty changes by at most about 20 %
    over this many responses."""
    kl_estimator: KLEstimator = KLEstimator.K1
    """Estimator of each token's KL in the penalty
    (joschu.net/blog/kl-approx.html). The docstring of its function, such as
    ppo_jax.kl_k1, describes it."""
    kl_loss_coef: float = 0.0
    """Weight of the KL in the loss. It is not scaled by advantages, unlike the
    KL penalty, which is a part of the rewards."""
    kl_loss: KLLoss = KLLoss.K2
    """Estimate of the KL in the loss. k2, k1+ and k3+ have the gradient of the
    KL, and the values of the estimators. k3 is as in the released code of
    GRPO, where the gradient is biased (arXiv:2510.01555)."""
    reference_every: int | None = None
    """The policy replaces the reference of the KL after every so many updates
    (TR-DPO, arXiv:2404.09656). None: after each update if reference_decay
    is set, and never otherwise."""
    reference_decay: float | None = None
    """Instead of being replaced, the reference is a moving average of the
    policy's parameters: it becomes reference_decay times itself plus
    1 - reference_decay times the policy. None: it is replaced."""
    score_at: ScoreAt = ScoreAt.LAST_TOKEN
    """The step whose reward includes the score: the last token of the
    response, the index after it, or the last index, max_new_tokens - 1."""
    missing_eos: MissingEOS = MissingEOS.KEEP
    """A response without an end token keeps its score (keep), has
    missing_eos_penalty subtracted from it (penalize), or gets
    -missing_eos_penalty instead (replace)."""
    missing_eos_penalty: float = 1.0
    """Penalty for a response without an end token, if missing_eos is penalize or replace."""
    overlong_buffer: int | None = None
    """Subtract from the score of a response up to overlong_penalty, in
    proportion to how many of this many last tokens before max_new_tokens it
    uses (DAPO, arXiv:2503.14476). None: never."""
    overlong_penalty: float = 1.0
    """Largest penalty for the length of a response, if overlong_buffer is set."""
    score_clip: float | None = None
    """Scores are clipped to at most this absolute value, after any scaling. None: no clip."""
    scale_scores: bool = False
    """Divide scores by their running standard deviation."""
    target_kl: float | None = None
    """Stop an update early: a minibatch whose policy/approx_kl exceeds this,
    in nats per token, and all later ones of the update take no step.
    None: never."""
    skip_nonfinite: bool = True
    """Take no step on a minibatch whose gradient is not finite (metric optimizer/skipped)."""
    learning_rate: float = 1e-5
    """Learning rate after warm-up and before decay."""
    decay_learning_rate: bool = False
    """Decay the learning rate linearly to 0 over the updates of the run. It
    counts the steps of early stopped updates too."""
    warmup_steps: int = 0
    """The learning rate rises linearly from 0 over this many optimizer steps."""
    adam_b1: float = 0.9
    """Decay rate of AdamW's first moment."""
    adam_b2: float = 0.999
    """Decay rate of AdamW's second moment."""
    adam_eps: float = 1e-8
    """Epsilon of AdamW, added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to at most this global norm (metric
    optimizer/grad_norm). None: never."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """How the critic is trained, if it has an optimizer of its own."""

    def __post_init__(self) -> None:
        """Check every setting, and look up the methods that are given by name."""
        check_settings(self)

    @property
    def minibatch_size(self) -> int:
        """The number of responses per optimizer step."""
        return self.batch_size // self.minibatches

    @property
    def rows_at_a_time(self) -> int:
        """The number of responses per forward and backward pass, if they are not packed."""
        return self.minibatch_size if self.pack else self.micro_batch or self.minibatch_size

    @property
    def micro_batches(self) -> int:
        """The number of forward and backward passes per optimizer step."""
        return self.minibatch_size // self.rows_at_a_time

    @property
    def critic_epochs(self) -> int:
        """The number of passes that a critic with its own optimizer makes over the responses."""
        return self.critic.epochs or self.epochs

    @property
    def moves_reference(self) -> bool:
        """Whether the reference follows the policy instead of being fixed."""
        return self.reference_every is not None or self.reference_decay is not None

    @property
    def bins(self) -> "Bins | None":
        """The shape of the bins that rows are packed into, or None if they are not packed."""
        from ppo_jax.ppo.packing import Bins

        return None if self.pack is None else Bins(self.pack, self.micro_batch or 1)
