"""Call a user's own functions with shapes only, so that a mistake is found before a run starts."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.errors import SettingError, first_line
from ppo_jax.ops.losses import PolicyLossFn
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.types import AdvantageFn, Experience, Rollout, Scores


def check_advantage_fn(
    advantage_fn: AdvantageFn, config: PPOConfig, *, prompt_tokens: int, name: str
) -> None:
    """Check that an advantage estimator returns what an update needs.

    Args:
      advantage_fn: the estimator.
      config: the settings, which give the number and the greatest length of the responses.
      prompt_tokens: the length of every prompt.
      name: what the user calls the estimator, such as "advantage=my_file.py:function".

    Raises:
      SettingError: if it takes other arguments, fails, or returns something else than two arrays
        with an entry for each token.

    Example:
      >>> good = lambda rewards, values, mask, *, rollout, scores: (rewards - values, rewards)
      >>> check_advantage_fn(good, PPOConfig(), prompt_tokens=3, name="advantage_fn=good")
      >>> bad = lambda rewards, values, mask, *, rollout, scores: rewards
      >>> check_advantage_fn(bad, PPOConfig(), prompt_tokens=3, name="advantage_fn=bad")
      Traceback (most recent call last):
      ppo_jax.errors.SettingError: advantage_fn=bad must return two arrays of [64, 24], not one of \
[64, 24].
    """
    shape = rows, length = config.batch_size, config.max_new_tokens
    x, mask = _array(shape), _array(shape, bool)
    tokens = _array((rows, prompt_tokens + length), jnp.int32)
    ended, groups = _array((rows,), bool), _array((rows,), jnp.int32)
    rollout = Rollout(tokens, _array(tokens.shape, bool), mask, x, ended, groups)
    found = _call(
        advantage_fn,
        (x, x, mask),
        {"rollout": rollout, "scores": Scores(x, x, x, x, x)},
        call=f"{name} is called as advantage(rewards, values, mask, rollout=..., scores=...)",
    )
    shapes = [x.shape for x in jax.tree.leaves(found)]
    if not isinstance(found, tuple | list) or shapes != [shape, shape]:
        several = isinstance(found, tuple | list)
        given = " and ".join(str(list(x)) for x in shapes)
        raise SettingError(
            f"{name} must return two arrays of {list(shape)}, not {'' if several else 'one of '}"
            f"{given or found}."
        )


def check_policy_loss(policy_loss: PolicyLossFn, config: PPOConfig, *, name: str) -> None:
    """Check that a loss of the policy returns one number.

    Args:
      policy_loss: the loss.
      config: the settings, which give the number and the greatest length of the responses.
      name: what the user calls the loss, such as "loss=my_file.py:function".

    Raises:
      SettingError: if it takes other arguments, fails, or returns anything else.

    Example:
      >>> bad = lambda logprobs, old_logprobs, advantages, mask, *, aggregate: logprobs
      >>> check_policy_loss(bad, PPOConfig(), name="loss=bad")
      Traceback (most recent call last):
      ppo_jax.errors.SettingError: loss=bad must return one number, as aggregate(terms, mask) \
does, not [16, 24].
    """
    shape = rows, length = config.rows_at_a_time, config.max_new_tokens
    x, mask = _array(shape), _array(shape, bool)
    arrays: dict[str, Any] = {}
    if takes_experience(policy_loss):
        tokens = _array((rows, 1 + length), jnp.int32)  # The length of prompts does not matter.
        seen, row = _array(tokens.shape, bool), _array((rows,))
        groups = _array((rows,), jnp.int32)
        experience = Experience(tokens, seen, mask, mask, x, x, x, x, x, x, groups, row)
        arrays = {"experience": experience}
    found = _call(
        policy_loss,
        (x, x, x, mask),
        arrays,
        call=f"{name} is called as loss(logprobs, old_logprobs, advantages, mask, aggregate=...)",
        aggregate=partial(config.weighting.function.mean, count=jnp.float32(1)),
    )
    if getattr(found, "shape", None) != ():
        given = list(found.shape) if hasattr(found, "shape") else found
        raise SettingError(
            f"{name} must return one number, as aggregate(terms, mask) does, not {given}."
        )


def takes_experience(policy_loss: Callable[..., Any]) -> bool:
    """Whether a loss of the policy has the keyword `experience`, and so gets the minibatch."""
    try:
        parameter = inspect.signature(policy_loss).parameters.get("experience")
    except ValueError:  # Some built-in functions have no signature.
        return False
    return parameter is not None and parameter.kind is inspect.Parameter.KEYWORD_ONLY


def own_name(option: str, function: Callable[..., Any]) -> str:
    """Return what an error calls a function that was passed in Python."""
    return f"{option}={getattr(function, '__name__', type(function).__name__)}"


def _array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    arrays: dict[str, Any],
    *,
    call: str,
    **static: Any,
) -> Any:
    """Return the shapes of what a function returns; `call` says how it is called."""
    try:
        return jax.eval_shape(lambda x, named: function(*x, **named, **static), args, arrays)
    except Exception as error:  # Whatever the user's function raises.
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise SettingError(f"{call}, which fails: {reason}") from error
