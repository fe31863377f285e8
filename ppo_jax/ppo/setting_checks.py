"""Checks of the settings of a PPO iteration, before anything is compiled."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ppo_jax.errors import SettingError, check_choices, check_numbers
from ppo_jax.ops.score_rules import ScoreAt
from ppo_jax.ppo.choices import Importance, Loss, OldLogprobs
from ppo_jax.ppo.unread import check_read

_BLOCK = 64  # A sequence begins at a multiple of so many slots of a bin, as in `ppo.packing`.

if TYPE_CHECKING:
    from ppo_jax.ppo.settings import PPOConfig

# The ranges of the settings. Each entry has the range in words for the error message, a function
# that tests whether a value lies in it, and the names of the settings that it applies to. A setting
# that is None is not tested.
_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "be positive",
        lambda x: x > 0,
        "batch_size group_size epochs minibatches max_new_tokens temperature kl_horizon "
        "learning_rate",
    ),
    (
        "be positive, or none",
        lambda x: x > 0,
        "micro_batch rollout_rows rollout_slots pack logit_chunk top_k value_clip "
        "kl_target score_clip target_kl max_grad_norm overlong_buffer reference_every",
    ),
    (
        "not be negative",
        lambda x: x >= 0,
        "truncate_after clip_low clip_high vf_coef entropy_coef kl_coef missing_eos_penalty "
        "warmup_steps adam_eps weight_decay kl_loss_coef positive_nll_coef overlong_penalty",
    ),
    ("lie in 0 .. 1", lambda x: 0 <= x <= 1, "gamma lam"),
    ("lie in 0 .. 1 and be above 0", lambda x: 0 < x <= 1, "top_p"),
    ("lie in 0 .. 1 and be below 1", lambda x: 0 <= x < 1, "adam_b1 adam_b2 reference_decay"),
    ("be over 1, or none", lambda x: x > 1, "dual_clip"),
)


def check_settings(config: "PPOConfig") -> None:
    """Check every setting, and the settings that go together.

    Raises:
      SettingError: if a setting is out of range, or one that must divide another does not.
    """
    check_choices(config)
    check_numbers(config)
    for rule, holds, names in _RANGES:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise SettingError(f"{name} must {rule}, but is {value}.")
    packed = config.pack is not None  # micro_batch is then a number of bins.
    for name, of, rows in (
        ("group_size", "batch_size", config.batch_size),
        ("minibatches", "batch_size", config.batch_size),
        ("micro_batch", "batch_size / minibatches", config.minibatch_size),
        ("rollout_rows", "batch_size", config.batch_size),
    ):
        value = getattr(config, name)
        if value is not None and rows % value and not (packed and name == "micro_batch"):
            raise SettingError(f"{name}={value} must divide {of}={rows}.")
    rows = config.rollout_rows or config.batch_size
    if config.rollout_slots is not None and config.rollout_slots > rows:
        raise SettingError(
            f"rollout_slots={config.rollout_slots} must be at most {rows}, the number of "
            "responses that are sampled at a time."
        )
    _check_length(config.pack, config.score_at)
    check_read(config)
    _check_methods(config)
    _check_importance(config)
    if not 0 <= config.min_new_tokens <= config.max_new_tokens:
        raise SettingError(
            f"min_new_tokens={config.min_new_tokens} must lie in 0 .. "
            f"max_new_tokens={config.max_new_tokens}."
        )


def _check_methods(config: "PPOConfig") -> None:
    """Check that the methods fit each other and their numbers."""
    advantage = config.advantage
    if config.kl_target is not None and not config.kl_coef:
        raise SettingError(
            f"kl_coef must be positive with kl_target={config.kl_target}, because a weight of 0 "
            "cannot adapt."
        )
    if config.moves_reference and not config.kl_coef and not config.kl_loss_coef:
        raise SettingError(
            f"reference_every={config.reference_every} and reference_decay="
            f"{config.reference_decay} move a reference that nothing learns from, because kl_coef "
            "and kl_loss_coef are both 0; set one of the two weights."
        )
    if config.clip_low > 1 and not config.loss.any_clip_low:
        raise SettingError(
            f"clip_low must lie in 0 .. 1 with loss={config.loss.value}, but is {config.clip_low}."
        )
    if advantage.reads_groups and config.group_size == 1:
        raise SettingError(
            f"advantage={advantage.value} compares the responses to one prompt, so group_size must "
            "be at least 2, but is 1."
        )
    if config.filter_groups and config.group_size == 1:
        raise SettingError(
            "filter_groups compares the responses to one prompt, so group_size must be at least 2, "
            "but is 1."
        )
    if config.overlong_buffer is not None and config.overlong_buffer > config.max_new_tokens:
        raise SettingError(
            f"overlong_buffer={config.overlong_buffer} must be at most "
            f"max_new_tokens={config.max_new_tokens}."
        )
    if config.entropy_target is not None and config.entropy_coef > 0.005:
        raise SettingError(
            f"entropy_coef={config.entropy_coef} must be at most 0.005 with entropy_target, where "
            "the weight begins with it and stays below that."
        )


def _check_importance(config: "PPOConfig") -> None:
    """Check the weights for a sampler that differs from the policy."""
    importance, bounds = config.importance, config.importance_range
    if importance is not Importance.NONE and config.old_logprobs is OldLogprobs.SAMPLER:
        raise SettingError(
            f"importance={importance.value} needs old_logprobs=scored, because the ratio to the "
            "sampler's log-probs holds the same weight already."
        )
    if bounds is not None and not 0 <= bounds[0] <= bounds[1]:
        raise SettingError(
            f"importance_range must be two numbers with 0 <= lower <= upper, not {bounds}."
        )
    if importance.by_token and config.loss in (Loss.GSPO, Loss.GMPO, Loss.VESPO):
        raise SettingError(
            f"importance={importance.value} weighs tokens, but loss={config.loss.value} has one "
            "ratio for a response; use sequence_tis or sequence_mask."
        )


def _check_length(length: int | None, score_at: ScoreAt) -> None:
    """Raise SettingError if bins of a length are not possible; None is for no bins."""
    if length is not None and length % _BLOCK:
        raise SettingError(f"pack={length} must be a multiple of {_BLOCK}.")
    if length is not None and score_at is ScoreAt.LAST_INDEX:
        raise SettingError(
            f"pack={length} leaves padding out, but score_at=last_index learns the value of a step "
            "of padding; choose another score_at or no pack."
        )
