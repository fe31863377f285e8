"""Settings of published work, taken from the code that each work released.

docs/presets_and_metrics.md lists in what each preset differs from its work.
"""

from ppo_jax.ops.rewards import MissingEOS, ScoreAt
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

PRESETS = {"default": PPOConfig(), "oai2019": OAI2019, "nplus": NPLUS, "trl": TRL}
"""Settings by the name that the command's option `--preset` takes."""
