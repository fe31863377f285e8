"""Settings of published work, taken from the code that each work released.

docs/presets_and_metrics.md lists in what each preset differs from its work.
"""

from ppo_jax.ops.score_rules import MissingEOS, ScoreAt
from ppo_jax.ppo.choices import Advantage, Importance, KLLoss, Loss, OldLogprobs, Weighting
from ppo_jax.ppo.critic_settings import CriticConfig
from ppo_jax.ppo.settings import PPOConfig

# Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences" (arXiv:1909.08593):
# https://github.com/openai/lm-human-preferences, launch.py, the tasks sentiment and
# descriptiveness.
OAI2019 = PPOConfig(
    batch_size=512,
    epochs=4,
    minibatches=1,
    max_new_tokens=24,
    stop_at_end=False,
    truncate_after=16,
    temperature=0.7,
    whiten_rewards=True,
    kl_coef=0.15,
    kl_target=6.0,
    score_at=ScoreAt.LAST_INDEX,
    missing_eos=MissingEOS.REPLACE,
    learning_rate=1e-5,
    decay_learning_rate=True,
    adam_eps=1e-5,
    max_grad_norm=None,
)

# Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO" (arXiv:2403.17031):
# https://github.com/vwxyzjn/summarize_from_feedback_details, ppo.py.
NPLUS = PPOConfig(
    batch_size=512,
    epochs=4,
    minibatches=1,
    max_new_tokens=53,
    temperature=0.7 + 1e-7,
    kl_coef=0.05,
    score_at=ScoreAt.AFTER_LAST_TOKEN,
    missing_eos=MissingEOS.REPLACE,
    learning_rate=3e-6,
    decay_learning_rate=True,
    adam_eps=1e-5,
    weight_decay=0.01,
    max_grad_norm=None,
)

# TRL 1.10: https://github.com/huggingface/trl, trl.experimental.ppo, with stop_token="eos" and the
# batch size of its example on one device.
TRL = PPOConfig(
    batch_size=64,
    epochs=4,
    minibatches=1,
    max_new_tokens=53,
    temperature=0.7 + 1e-7,
    unbiased_whitening=True,
    kl_coef=0.05,
    score_at=ScoreAt.AFTER_LAST_TOKEN,
    missing_eos=MissingEOS.KEEP,
    learning_rate=3e-6,
    decay_learning_rate=True,
    max_grad_norm=None,
)

# GRPO (Shao et al. 2024, arXiv:2402.03300): https://github.com/verl-project/verl,
# examples/grpo_trainer/run_qwen3_8b_fsdp.sh.
GRPO = PPOConfig(
    batch_size=1024 * 5,
    group_size=5,
    epochs=1,
    minibatches=4,
    max_new_tokens=2048,
    advantage=Advantage.GRPO,
    dual_clip=3.0,
    vf_coef=0.0,
    whiten_advantages=False,
    kl_coef=0.0,
    kl_loss_coef=0.001,
    kl_loss=KLLoss.K3,
    learning_rate=1e-6,
    weight_decay=0.01,
)

# Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): https://github.com/NovaSky-AI/SkyRL,
# examples/train/algorithms/drgrpo/run_drgrpo_gsm8k.sh.
DR_GRPO = PPOConfig(
    batch_size=1024 * 5,
    group_size=5,
    epochs=1,
    minibatches=4,
    max_new_tokens=1024,
    advantage=Advantage.DR_GRPO,
    vf_coef=0.0,
    weighting=Weighting.CONSTANT_LENGTH,
    whiten_advantages=False,
    kl_coef=0.0,
    learning_rate=1e-6,
    weight_decay=0.01,
)

# DAPO (Yu et al. 2025, arXiv:2503.14476): https://github.com/NovaSky-AI/SkyRL,
# examples/train/algorithms/dapo/run_dapo_qwen2.5_32b_aime.sh.
DAPO = PPOConfig(
    batch_size=512 * 16,
    group_size=16,
    filter_groups=True,
    epochs=1,
    minibatches=16,
    max_new_tokens=20 * 1024,
    advantage=Advantage.GRPO,
    clip_high=0.28,
    dual_clip=10.0,
    vf_coef=0.0,
    whiten_advantages=False,
    kl_coef=0.0,
    overlong_buffer=4 * 1024,
    learning_rate=1e-6,
    warmup_steps=160,
    weight_decay=0.1,
)

# RLOO (Ahmadian et al. 2024, arXiv:2402.14740): https://github.com/huggingface/trl, RLOOConfig,
# with its batch size on one device.
RLOO = PPOConfig(
    batch_size=8,
    group_size=2,
    epochs=1,
    minibatches=1,
    max_new_tokens=512,
    advantage=Advantage.RLOO,
    vf_coef=0.0,
    weighting=Weighting.SEQUENCE_SUM,
    whiten_advantages=False,
    kl_coef=0.05,
    learning_rate=1e-6,
    decay_learning_rate=True,
)

# REINFORCE++ with the mean of the group as baseline (Hu et al. 2025, arXiv:2501.03262):
# https://github.com/OpenRLHF/OpenRLHF, examples/scripts/train_reinforce_baseline_hybrid_engine.sh.
REINFORCE_PP = PPOConfig(
    batch_size=128 * 8,
    group_size=8,
    filter_groups=True,
    epochs=1,
    minibatches=1,
    max_new_tokens=64000,
    advantage=Advantage.REINFORCE_PP_BASELINE,
    importance=Importance.ICEPOP,
    vf_coef=0.0,
    whiten_advantages=False,
    kl_coef=0.0,
    kl_loss_coef=1e-5,
    kl_loss=KLLoss.K2,
    learning_rate=5e-7,
    adam_b2=0.95,
)

# VAPO (Yue et al. 2025, arXiv:2504.05118): https://github.com/NVIDIA-NeMo/RL,
# examples/configs/ppo_math_1B.yaml with the values that its comments give for VAPO.
VAPO = PPOConfig(
    batch_size=32 * 16,
    group_size=16,
    epochs=4,
    minibatches=1,
    max_new_tokens=14336,
    advantage=Advantage.VAPO,
    clip_high=0.28,
    dual_clip=10.0,
    positive_nll_coef=0.1,
    kl_coef=0.0,
    overlong_buffer=2048,
    learning_rate=1e-6,
    weight_decay=0.01,
    critic=CriticConfig(learning_rate=1e-5, weight_decay=0.01),
)

# SAO (Hou et al. 2026, arXiv:2607.07508): https://github.com/agentenv/miles,
# miles/backends/training_utils/sao.py, the recipe for reasoning.
SAO = PPOConfig(
    epochs=1,
    minibatches=1,
    advantage=Advantage.SAO,
    loss=Loss.DIS,
    clip_low=0.3,
    clip_high=5.0,
    old_logprobs=OldLogprobs.SAMPLER,
    whiten_advantages=False,
    kl_coef=0.0,
    learning_rate=1e-6,
    critic=CriticConfig(learning_rate=5e-6, epochs=2, warmup_steps=10, freeze_attention=True),
)

PRESETS = {
    "default": PPOConfig(),
    "oai2019": OAI2019,
    "nplus": NPLUS,
    "trl": TRL,
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
    "dapo": DAPO,
    "rloo": RLOO,
    "reinforce_pp": REINFORCE_PP,
    "vapo": VAPO,
    "sao": SAO,
}
"""Settings by the name that the command's option `--preset` takes."""
