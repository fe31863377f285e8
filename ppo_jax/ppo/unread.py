"""Refuse settings that have no effect, because nothing that is chosen reads them.

Each method names the settings that it reads in its line of `ppo_jax.ppo.choices`. Settings that
belong to another setting, and those that an own function replaces, are listed here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

from ppo_jax.errors import SettingError
from ppo_jax.ppo.choices import Advantage, Loss, Method

if TYPE_CHECKING:
    from ppo_jax.ppo.settings import PPOConfig
    from ppo_jax.types import LossFn

# Settings that have an effect only if another setting differs from its default.
_PARTS = {
    "kl_horizon": "kl_target",
    "kl_loss": "kl_loss_coef",
    "missing_eos_penalty": "missing_eos",
    "overlong_penalty": "overlong_buffer",
}
_OWN_ADVANTAGE = ("advantage", *Advantage.settings())
_OWN_POLICY_LOSS = ("loss", *Loss.settings())
# Not the clip, the weights of tokens and the like, which a loss of one's own usually reads.
_OF_TERMS = ("kl_loss_coef", "positive_nll_coef")
_OWN_LOSS = ("loss", "dual_clip", "entropy_coef", "entropy_target", *_OF_TERMS)


def refuse(
    settings: Any, names: Iterable[str], choice: str, *, usual: Any = None, prefix: str = ""
) -> None:
    """Raise SettingError if one of some settings differs from its default.

    Args:
      settings: a dataclass of settings.
      names: the settings that nothing reads.
      choice: the choice because of which that is so, for the message.
      usual: settings whose values count as the defaults; the class of `settings` if None.
      prefix: text before the name of a setting in the message.
    """
    for name in names:
        value, default = getattr(settings, name), getattr(usual or type(settings), name)
        if value != default:
            raise SettingError(
                f"{prefix}{name}={_shown(value)} has no effect with {choice}; leave it at "
                f"{_shown(default)}."
            )


def _shown(value: Any) -> str:
    """Return a value as a user writes it."""
    return "none" if value is None else str(getattr(value, "value", value))


def find_unread(values: Mapping[str, Any], kind: "type[PPOConfig]") -> Iterator[tuple[str, str]]:
    """Find the settings that have no effect, whatever model and functions are used.

    Args:
      values: the settings by name, with members of enumerations or their values.
      kind: the class of the settings.

    Yields:
      The name of each such setting, and the choice that does not read it.
    """
    defaults = {field.name: field.default for field in fields(kind)}
    chosen = {
        name: type(default)(values[name]) if isinstance(default, Enum) else values[name]
        for name, default in defaults.items()
    }
    for name, value in chosen.items():
        if isinstance(value, Method):
            yield from ((x, f"{name}={value.value}") for x in value.unread)
    for name, switch in _PARTS.items():
        if chosen[switch] == defaults[switch]:
            yield name, f"{switch}={_shown(chosen[switch])}"


def check_read(config: "PPOConfig") -> None:
    """Raise SettingError if a setting has no effect, whatever model and functions are used."""
    for name, choice in find_unread(vars(config), type(config)):
        refuse(config, [name], choice)


def check_critic_settings(config: "PPOConfig", critic: str) -> None:
    """Raise SettingError if a setting of the critic has no effect with a kind of critic.

    Args:
      config: the settings.
      critic: "shared", "none", or anything else for a critic with its own trunk.
    """
    own = config.critic
    if critic == "shared":
        refuse(own, ["freeze_attention"], "critic=shared", prefix="critic.")
    if critic == "none":
        refuse(own, vars(own), "critic=none", prefix="critic.")
        # A weight of 0 or no clip asks for nothing.
        wanted = [name for name in ("vf_coef", "value_clip") if getattr(config, name)]
        refuse(config, wanted, "critic=none")


def check_replaced(
    config: "PPOConfig",
    usual: "PPOConfig",
    *,
    advantage: str | None = None,
    loss: str | None = None,
) -> None:
    """Raise SettingError if functions in files replace what a setting was changed for.

    Args:
      config: the settings.
      usual: the settings of the preset that they began with.
      advantage: the advantage estimator in a file, or None.
      loss: the loss of the policy in a file, or None.
    """
    if advantage is not None:
        refuse(config, _OWN_ADVANTAGE, f"advantage={advantage}", usual=usual, prefix="ppo.")
    if loss is not None:
        refuse(config, _OWN_POLICY_LOSS, f"loss={loss}", usual=usual, prefix="ppo.")


def check_loss_fn(config: "PPOConfig", loss_fn: Callable[..., Any] | None) -> None:
    """Raise SettingError if a loss of one's own does not hold what a setting was changed to.

    Args:
      config: the settings.
      loss_fn: the `LossFn` that replaces the loss of the settings, or None.
    """
    if loss_fn is None:
        return
    held = getattr(loss_fn, "held", {})
    if "policy_loss" in held:  # It was made with one of the losses that `loss` names, or another.
        held = {"loss": config.loss, **held}
    unread = [x for x in _OWN_LOSS if x not in held or held[x] != getattr(config, x)]
    refuse(config, unread, "this loss_fn, which does not read it")


def hold(loss_fn: "LossFn", values: Mapping[str, Any]) -> "LossFn":
    """Note the values of settings that a `LossFn` was made with, for `check_loss_fn`."""
    vars(loss_fn)["held"] = values
    return loss_fn


def held_values(loss: Callable[..., Any], terms: Iterable[Callable[..., Any]]) -> dict[str, Any]:
    """Return the values of settings that a loss of `[B, R]` arrays and terms were made with.

    Args:
      loss: the loss, whose settings are the keywords that are bound in it and in its `policy_loss`.
      terms: terms as `loss_terms` makes them, which hold the settings.
    """
    held: dict[str, Any] = {}
    for term in terms:
        for x in getattr(term, "args", ()):
            held |= {name: getattr(x, name) for name in _OF_TERMS if hasattr(x, name)}
    return held | _bound(loss)


def _bound(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the keywords that are bound in a partial function, and in one that it holds."""
    if not isinstance(function, partial):
        return {}
    found = _bound(function.func) | function.keywords
    inner = found.get("policy_loss")
    return found if inner is None else found | _bound(inner)
