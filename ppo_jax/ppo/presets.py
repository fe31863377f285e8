"""Settings of published work."""

from ppo_jax.ops.rewards import MissingEOS, ScoreAt
from ppo_jax.ppo.settings import PPOConfig

# The settings of the released code of each work, checked against it; what no setting can say stands in the README.
OAI2019 = PPOConfig(  # openai/lm-human-preferences, sentiment and descriptiveness
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


NPLUS = PPOConfig(  # vwxyzjn/summarize_from_feedback_details, ppo.py
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


TRL = PPOConfig(  # trl.experimental.ppo 1.10, with stop_token="eos" and the batch of its example for one device
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
