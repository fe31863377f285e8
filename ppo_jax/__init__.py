"""PPO fine-tuning of GPT-style language models in JAX and Flax, as functions to import."""

from ppo_jax.models.config import TransformerConfig as TransformerConfig
from ppo_jax.models.heads import separate_critic as separate_critic
from ppo_jax.models.heads import shared_critic as shared_critic
from ppo_jax.models.heads import zero_head as zero_head
from ppo_jax.models.transformer import init_params as init_params
from ppo_jax.models.transformer import language_model as language_model
from ppo_jax.ops.advantages import (
    generalized_advantage_estimation as generalized_advantage_estimation,
)
from ppo_jax.ops.kl import KLController as KLController
from ppo_jax.ops.kl import adaptive_kl as adaptive_kl
from ppo_jax.ops.kl import fixed_kl as fixed_kl
from ppo_jax.ops.kl import kl_abs as kl_abs
from ppo_jax.ops.kl import kl_full as kl_full
from ppo_jax.ops.kl import kl_k1 as kl_k1
from ppo_jax.ops.kl import kl_k2 as kl_k2
from ppo_jax.ops.kl import kl_k3 as kl_k3
from ppo_jax.ops.logprobs import chunked_logprobs_and_entropy as chunked_logprobs_and_entropy
from ppo_jax.ops.logprobs import entropy as entropy
from ppo_jax.ops.logprobs import response_view as response_view
from ppo_jax.ops.logprobs import token_logprobs as token_logprobs
from ppo_jax.ops.losses import clipped_policy_loss as clipped_policy_loss
from ppo_jax.ops.losses import clipped_value_loss as clipped_value_loss
from ppo_jax.ops.losses import entropy_bonus as entropy_bonus
from ppo_jax.ops.losses import policy_ratio as policy_ratio
from ppo_jax.ops.losses import ppo_loss as ppo_loss
from ppo_jax.ops.masked import masked_mean as masked_mean
from ppo_jax.ops.masked import masked_sum as masked_sum
from ppo_jax.ops.masked import masked_var as masked_var
from ppo_jax.ops.masked import masked_whiten as masked_whiten
from ppo_jax.ops.masked import sequence_mean as sequence_mean
from ppo_jax.ops.metrics import explained_variance as explained_variance
from ppo_jax.ops.metrics import policy_metrics as policy_metrics
from ppo_jax.ops.rewards import MissingEOS as MissingEOS
from ppo_jax.ops.rewards import ScoreAt as ScoreAt
from ppo_jax.ops.rewards import apply_missing_eos as apply_missing_eos
from ppo_jax.ops.rewards import running_scale as running_scale
from ppo_jax.ops.rewards import token_rewards as token_rewards
from ppo_jax.ops.sampling import greedy_token as greedy_token
from ppo_jax.ops.sampling import process_logits as process_logits
from ppo_jax.ops.sampling import sample_token as sample_token
from ppo_jax.ppo.iteration import Agent as Agent
from ppo_jax.ppo.iteration import PPOState as PPOState
from ppo_jax.ppo.iteration import init_state as init_state
from ppo_jax.ppo.iteration import learn as learn
from ppo_jax.ppo.iteration import ppo_iteration as ppo_iteration
from ppo_jax.ppo.iteration import sample as sample
from ppo_jax.ppo.iteration import score as score
from ppo_jax.ppo.loss import ppo_loss_fn as ppo_loss_fn
from ppo_jax.ppo.presets import PRESETS as PRESETS
from ppo_jax.ppo.rollout import generate as generate
from ppo_jax.ppo.scoring import forward_responses as forward_responses
from ppo_jax.ppo.scoring import make_experience as make_experience
from ppo_jax.ppo.scoring import score_rollout as score_rollout
from ppo_jax.ppo.settings import PPOConfig as PPOConfig
from ppo_jax.ppo.update import ppo_update as ppo_update
from ppo_jax.types import CriticFn as CriticFn
from ppo_jax.types import Experience as Experience
from ppo_jax.types import LanguageModel as LanguageModel
from ppo_jax.types import Rollout as Rollout

__version__ = "0.1.0"
