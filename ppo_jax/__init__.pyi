"""The public names of the package by topic, and the modules that define them."""

# ruff: noqa: I001  (the order is by topic)

# One PPO iteration and its parts.
from .ppo.iteration import (
    Agent as Agent,
    PPOState as PPOState,
    init_state as init_state,
    sample as sample,
    score as score,
    learn as learn,
    ppo_iteration as ppo_iteration,
)
from .ppo.settings import PPOConfig as PPOConfig
from .ppo.presets import PRESETS as PRESETS
from .ppo.rollout import generate as generate
from .ppo.forward import (
    Forward as Forward,
    forward_responses as forward_responses,
    forward_packed as forward_packed,
)
from .ppo.packing import (
    Bins as Bins,
    Packing as Packing,
    Placement as Placement,
    pack_rows as pack_rows,
    place_rows as place_rows,
    sum_bins as sum_bins,
)
from .ppo.scoring import score_rollout as score_rollout, make_experience as make_experience
from .ppo.update import ppo_update as ppo_update
from .ppo.reference import follow_reference as follow_reference
from .ppo.gradients import minibatch_gradient as minibatch_gradient
from .ppo.loss import ppo_loss_fn as ppo_loss_fn
from .ppo.critic_settings import CriticConfig as CriticConfig
from .ppo.critic import (
    no_critic as no_critic,
    value_loss_fn as value_loss_fn,
)
from .ppo.loss_terms import LossTerm as LossTerm, loss_terms as loss_terms

# Data that flows between the parts, and the functions that you can supply.
from .types import (
    Aggregate as Aggregate,
    CacheFn as CacheFn,
    HiddenFn as HiddenFn,
    LogitsFn as LogitsFn,
    AdvantageFn as AdvantageFn,
    AxisName as AxisName,
    Counts as Counts,
    CriticFn as CriticFn,
    Experience as Experience,
    KLEstimatorFn as KLEstimatorFn,
    KVCache as KVCache,
    LanguageModel as LanguageModel,
    LossFn as LossFn,
    LossMetrics as LossMetrics,
    Metrics as Metrics,
    Params as Params,
    Rollout as Rollout,
    Scores as Scores,
    Segments as Segments,
)

# Advantages: with a critic, relative to a group of responses, relative to the batch.
from .ops.advantages import (
    decoupled_gae as decoupled_gae,
    discounted_returns as discounted_returns,
    generalized_advantage_estimation as generalized_advantage_estimation,
    length_adaptive_lambda as length_adaptive_lambda,
)
from .ops.group_advantages import (
    dr_grpo_advantages as dr_grpo_advantages,
    grpo_advantages as grpo_advantages,
    maxrl_advantages as maxrl_advantages,
    rloo_advantages as rloo_advantages,
)
from .ops.baselines import (
    batch_mean_advantages as batch_mean_advantages,
    evpo_advantages as evpo_advantages,
    reinforce_plus_plus_advantages as reinforce_plus_plus_advantages,
)

# Losses of the policy by token and by response, of the values, and of both.
from .ops.ratios import policy_ratio as policy_ratio
from .ops.clips import Clip as Clip, ClipFn as ClipFn, ratio_clip as ratio_clip
from .ops.policy_losses import (
    cispo_clip as cispo_clip,
    cispo_loss as cispo_loss,
    dis_clip as dis_clip,
    dis_loss as dis_loss,
    sapo_loss as sapo_loss,
)
from .ops.dppo import (
    Divergence as Divergence,
    binary_kl as binary_kl,
    binary_tv as binary_tv,
    dppo_clip as dppo_clip,
    dppo_loss as dppo_loss,
)
from .ops.decoupled import (
    decoupled_policy_loss as decoupled_policy_loss,
    interpolated_logprobs as interpolated_logprobs,
)
from .ops.sequence_losses import (
    gmpo_clip as gmpo_clip,
    gmpo_loss as gmpo_loss,
    gspo_clip as gspo_clip,
    gspo_loss as gspo_loss,
    vespo_loss as vespo_loss,
)
from .ops.likelihood_losses import dro_loss as dro_loss, positive_nll_loss as positive_nll_loss
from .ops.selection import (
    clip_cov_mask as clip_cov_mask,
    covariances as covariances,
    kl_cov_loss as kl_cov_loss,
    m2po_mask as m2po_mask,
)
from .ops.kl_loss import kl_loss as kl_loss
from .ops.value_losses import (
    clipped_value_loss as clipped_value_loss,
    entropy_bonus as entropy_bonus,
    value_clipfrac as value_clipfrac,
)
from .ops.entropy_control import (
    EntropyController as EntropyController,
    EntropyState as EntropyState,
    adaptive_entropy as adaptive_entropy,
)
from .ops.losses import (
    PolicyLossFn as PolicyLossFn,
    ResponseLossFn as ResponseLossFn,
    actor_critic_loss as actor_critic_loss,
    clipped_policy_loss as clipped_policy_loss,
    ppo_loss as ppo_loss,
)

# Weights and masks for a sampler whose log-probs differ from the trainer's.
from .ops.importance import (
    Level as Level,
    bounded_weights as bounded_weights,
    importance_mask as importance_mask,
    importance_weights as importance_weights,
    sequence_masked_weights as sequence_masked_weights,
    truncated_weights as truncated_weights,
)

# Supervised losses, methods by name, and KL.
from .ppo.sft import sft_loss as sft_loss
from .ppo.batch_parts import (
    LossAndAccuracy as LossAndAccuracy,
    SupervisedLoss as SupervisedLoss,
    Arrays as Arrays,
    Weight as Weight,
)
from .ppo.supervised import fit as fit
from .ppo.reward_model import (
    bradley_terry_loss as bradley_terry_loss,
    regression_loss as regression_loss,
    ordinal_loss as ordinal_loss,
)
from .ppo.choices import (
    Advantage as Advantage,
    Importance as Importance,
    KLLoss as KLLoss,
    OldLogprobs as OldLogprobs,
    KLEstimator as KLEstimator,
    Loss as Loss,
)
from .ppo.methods import (
    clipped_ppo as clipped_ppo,
    with_policy_loss as with_policy_loss,
)
from .ppo.estimators import (
    gae as gae,
    monte_carlo as monte_carlo,
    sao_gae as sao_gae,
    vapo_gae as vapo_gae,
)
from .ops.kl import (
    kl_abs as kl_abs,
    kl_full as kl_full,
    kl_k1 as kl_k1,
    kl_k2 as kl_k2,
    kl_k3 as kl_k3,
    of_logits as of_logits,
    reads_logits as reads_logits,
    KLController as KLController,
    KLState as KLState,
    adaptive_kl as adaptive_kl,
    fixed_kl as fixed_kl,
)

# Scores and rewards of tokens, averages, log-probs, sampling and metrics.
from .ops.score_rules import MissingEOS as MissingEOS, ScoreAt as ScoreAt
from .ops.rewards import (
    RewardScaling as RewardScaling,
    ScaleState as ScaleState,
    apply_missing_eos as apply_missing_eos,
    running_scale as running_scale,
    token_rewards as token_rewards,
)
from .ops.scores import (
    informative as informative,
    least_score as least_score,
    mean_score as mean_score,
    overlong_penalty as overlong_penalty,
    uncertainty_weighted_score as uncertainty_weighted_score,
    weighted_score as weighted_score,
)
from .ops.masked import (
    MeanFn as MeanFn,
    Aggregation as Aggregation,
    BY_SEQUENCE as BY_SEQUENCE,
    BY_TOKEN as BY_TOKEN,
    masked_mean as masked_mean,
    masked_sum as masked_sum,
    masked_var as masked_var,
    masked_whiten as masked_whiten,
    sequence_mean as sequence_mean,
)
from .ops.aggregation import (
    SEQUENCE_SUM as SEQUENCE_SUM,
    TOKEN_SUM as TOKEN_SUM,
    constant_length as constant_length,
)
from .ppo.choices import Weighting as Weighting
from .ops.logprobs import (
    chunked_logprobs_and_entropy as chunked_logprobs_and_entropy,
    entropy as entropy,
    response_view as response_view,
    token_logprobs as token_logprobs,
)
from .ops.sampling import (
    greedy_token as greedy_token,
    process_logits as process_logits,
    sample_token as sample_token,
)
from .ops.metrics import explained_variance as explained_variance, policy_metrics as policy_metrics

# Models, critics and adapters.
from .models.config import (
    Activation as Activation,
    NormAt as NormAt,
    NormKind as NormKind,
    Rotary as Rotary,
    TransformerConfig as TransformerConfig,
)
from .models.transformer import init_params as init_params, language_model as language_model
from .models.heads import (
    init_scorer as init_scorer,
    reward_model as reward_model,
    separate_critic as separate_critic,
    shared_critic as shared_critic,
    zero_head as zero_head,
)
from .models.lora_settings import LoRA as LoRA
from .models.lora import adapt as adapt, init_lora as init_lora, merge as merge

# Models as files.
from .models.io.family import HFConfig as HFConfig
from .models.io.pretrained import (
    Pretrained as Pretrained,
    load_policy as load_policy,
    load_tokenizer as load_tokenizer,
    save_policy as save_policy,
)
from .models.io.new_models import new_model as new_model
from .run.assembly import load_model as load_model
from .models.io.scorers import load_scorer as load_scorer, save_scorer as save_scorer
from .models.io.encoder import (
    EmbeddingFn as EmbeddingFn,
    Encoder as Encoder,
    load_encoder as load_encoder,
)
from .models.io.adapter_files import load_adapter as load_adapter, save_adapter as save_adapter

# Prompts and rewards.
from .data import (
    Prompts as Prompts,
    encode_prompts as encode_prompts,
    read_rows as read_rows,
    LongPrompts as LongPrompts,
    Message as Message,
    Row as Row,
)
from .reward_functions import (
    ModelReward as ModelReward,
    RewardFn as RewardFn,
    TaskScores as TaskScores,
    TextReward as TextReward,
    TokenReward as TokenReward,
    TimedReward as TimedReward,
    WeightedReward as WeightedReward,
    load_reward as load_reward,
    load_rewards as load_rewards,
)
from .reward_functions.likeness import LikenessReward as LikenessReward

# The train loop.
from .run.settings import (
    Faults as Faults,
    LoopConfig as LoopConfig,
    OnFault as OnFault,
)
from .run.assembly import Learner as Learner, assemble as assemble
from .run.opening import Resume as Resume
from .run.evaluation import Evaluation as Evaluation
from .run.trainer import Trainer as Trainer
from .run.forks import Fork as Fork
from .run.stored import Which as Which
from .run.remote import Mirror as Mirror
from .hashing import digest as digest

# The files of a run.
from .run.files import (
    create_run_folder as create_run_folder,
    lock_folder as lock_folder,
    write_json as write_json,
)
from .run.serialize import from_json as from_json, to_json as to_json

# Devices.
from .distributed.compilation import Steps as Steps, jit_steps as jit_steps
from .distributed.meshes import make_mesh as make_mesh, make_meshes as make_meshes
from .distributed.meshes import parse_mesh as parse_mesh
from .distributed.replicas import pmap_steps as pmap_steps

# What an iteration costs, before it runs.
from .models.sizes import SIZES as SIZES
from .plan.topology import CHIPS as CHIPS, Chip as Chip, make_topology as make_topology
from .plan.account import Collective as Collective
from .plan.decoding import DecodeStep as DecodeStep
from .plan.compile import (
    Program as Program,
    Programs as Programs,
    TooLarge as TooLarge,
    compile_iteration as compile_iteration,
)
from .plan.extrapolation import extrapolate as extrapolate
from .plan.flops import matmul_flops as matmul_flops
from .plan.memory import estimate_memory as estimate_memory
from .plan.report import advice as advice, plan_figures as plan_figures

# Errors.
from .errors import (
    CheckpointError as CheckpointError,
    Fault as Fault,
    GradientError as GradientError,
    NonFiniteError as NonFiniteError,
    NonFiniteParametersError as NonFiniteParametersError,
    RewardError as RewardError,
    SettingError as SettingError,
)

__version__: str
