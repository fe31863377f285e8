"""Making a reward from the name that a user gives on the command line."""

import functools
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ppo_jax import data
from ppo_jax.reward_functions.model import load_model_reward
from ppo_jax.reward_functions.protocol import RewardFn
from ppo_jax.reward_functions.text import TextReward, arguments
from ppo_jax.reward_functions.timed import TimedReward
from ppo_jax.reward_functions.tokens import TokenReward
from ppo_jax.reward_functions.weighted import WeightedReward
from ppo_jax.reward_functions.worker import run_file


def load_reward(
    spec: str,
    given: Literal["text", "tokens"] = "text",
    label: str | None = None,
    *,
    timeout_s: float | None = None,
) -> RewardFn:
    """Make a reward from `my_file.py:function`, or from the name of a reward model.

    Args:
      spec: a Python file and the name of a function in it, joined by a colon; or the folder or
        Hugging Face id of a reward model.
      given: what the function is called with: "text" as in `TextReward`, or "tokens" as in
        `TokenReward`.
      label: name or number of the label whose logit is the score, for a reward model with several
        labels.
      timeout_s: time limit in seconds of a function of texts for one response, as in `TimedReward`;
        None sets no limit.

    Returns:
      The reward.

    Raises:
      ValueError: if `spec` names neither a function nor a reward model, or `given` or `label` does
        not apply to it.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = Path(folder) / "brevity.py"
      ...     _ = file.write_text("def score(prompts, responses): return [-len(responses[0])]")
      ...     reward = load_reward(f"{file}:score")
      >>> reward.function(["2 + 2 ="], [" four"])
      [-5]
    """
    file, _, name = spec.rpartition(":")
    if not _is_function(spec):
        if given == "tokens":
            raise ValueError(
                f"reward_given=tokens needs a function, my_file.py:function; {spec} would be a "
                "reward model."
            )
        try:
            return load_model_reward(spec, label)
        except ValueError as error:
            raise ValueError(
                f"The reward is neither my_file.py:function nor a reward model: {error}"
            ) from error
    if label is not None:
        raise ValueError(
            f"reward_label={label} selects a label of a reward model, but {spec} is a function."
        )
    function, module = _load_function(Path(file), name)
    if timeout_s is not None:
        return TimedReward(function, timeout_s, module, name)
    return TextReward(function) if given == "text" else TokenReward(function)


def load_rewards(
    specs: Sequence[str],
    given: Literal["text", "tokens"] = "text",
    label: str | None = None,
    timeout_s: float | None = None,
) -> RewardFn:
    """Make a reward of one or several functions and reward models, with weights.

    Args:
      specs: what `load_reward` takes, each with `=WEIGHT` behind it or with the weight 1.
      given: as in `load_reward`, for the functions.
      label: as in `load_reward`, for the reward models.
      timeout_s: time limit in seconds of a function for one response, or None; see `TimedReward`.

    Returns:
      The reward if there is one with the weight 1, and otherwise a `WeightedReward`. The parts have
      the names of the functions, or of the folders of the reward models.

    Raises:
      ValueError: if there is no reward, a weight is not finite, all weights are 0, or an option
        applies to none of the rewards; and as `load_reward`.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = Path(folder) / "two_rewards.py"
      ...     _ = file.write_text("a = lambda prompts, responses: [1]; b = a")
      ...     reward = load_rewards([f"{file}:a", f"{file}:b=0.5"])
      >>> [name for name, _ in reward.rewards], reward.weights
      (['a', 'b'], (1.0, 0.5))
    """
    if not specs:
        raise ValueError("Name a reward, such as --reward my_file.py:function.")
    parsed = [_split_weight(spec) for spec in specs]
    functions = [spec for spec, _ in parsed if _is_function(spec)]
    if timeout_s is not None and (given == "tokens" or not functions):
        raise ValueError(
            f"reward_timeout={timeout_s} limits functions of texts, my_file.py:function with "
            f"reward_given=text; {parsed[0][0]} is another kind of reward."
        )
    only_functions, only_models = len(functions) == len(parsed), not functions
    rewards: list[RewardFn] = []
    names: list[str] = []
    for spec, _ in parsed:
        if _is_function(spec):
            chosen = label if only_functions else None
            rewards.append(load_reward(spec, given, chosen, timeout_s=timeout_s))
        else:
            rewards.append(load_reward(spec, given if only_models else "text", label))
        name = spec.rpartition(":")[2] if _is_function(spec) else Path(spec).name
        same = sum(other.partition("#")[0] == name for other in names)
        names.append(f"{name}#{same + 1}" if same else name)
    weights = tuple(weight for _, weight in parsed)
    if weights == (1.0,):
        return rewards[0]
    if not any(weights):
        raise ValueError(f"All weights of the rewards {', '.join(specs)} are 0.")
    return WeightedReward(tuple(zip(names, rewards, strict=True)), weights)


def check_columns(reward: RewardFn, prompts: data.Prompts) -> None:
    """Check that the columns which functions of texts need exist, without calling the functions.

    Args:
      reward: a reward; one of another kind is not checked.
      prompts: the prompts whose responses it will score. A column may be missing in some of them.

    Raises:
      RewardError: if no prompt has a column that a function needs.

    Example:
      >>> prompts = data.Prompts([{"prompt": "2 + 2 ="}], np.array([[7]]), np.array([[True]]))
      >>> check_columns(TextReward(lambda prompts, responses, answer: ...), prompts)
      Traceback (most recent call last):
      ppo_jax.errors.RewardError: The reward function needs the column 'answer', but the columns of
      the prompts are: prompt. A third parameter called rows gets the whole rows.
    """
    if isinstance(reward, WeightedReward):
        for _, part in reward.rewards:
            check_columns(part, prompts)
    elif isinstance(reward, TextReward | TimedReward):
        row = {name: x for row in reversed(prompts.rows) for name, x in row.items()}
        arguments(reward.function, replace(prompts.take(np.array([0])), rows=[row]), [""])


def _is_function(spec: str) -> bool:
    """Whether a reward is a function in a file, and not a reward model."""
    file, colon, _ = spec.rpartition(":")
    return bool(colon) and file.endswith(".py")


def _split_weight(spec: str) -> tuple[str, float]:
    """Split `REWARD=WEIGHT`; without a number behind the last "=", the weight is 1."""
    reward, sign, number = spec.rpartition("=")
    if not sign or Path(spec).exists():
        return spec, 1.0
    try:
        weight = float(number)
    except ValueError:
        return spec, 1.0
    if not math.isfinite(weight):
        raise ValueError(f"The weight of the reward {spec} must be a finite number.")
    return reward, weight


def load_function(spec: str, purpose: str) -> Callable[..., Any]:
    """Return the function that `my_file.py:function` names.

    Args:
      spec: a Python file and the name of a function in it, joined by a colon.
      purpose: what the function is for, such as "loss", for messages.

    Returns:
      The function.

    Raises:
      ValueError: if `spec` has another form, or its file or function does not exist.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ValueError(f"The {purpose} must be like my_file.py:function, but is {spec!r}.")
    return _load_function(Path(file), name, purpose)[0]


def _load_function(
    file: Path, name: str, purpose: str = "reward"
) -> tuple[Callable[..., Any], str]:
    """Run a Python file as a module; return its function `name` and the name of the module."""
    if not file.is_file():
        raise ValueError(f"The {purpose} file {file} does not exist.")
    # A module beside the file can be imported too. Last, so that it hides no other module.
    _append_to_path(str(file.resolve().parent))
    module_name = _name_for_workers(file.resolve())
    try:
        module = run_file(file, module_name)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"The {purpose} file {file} does not run: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"The {purpose} file {file} has no function {name!r}.")
    return function, module_name


_RUN_FILE = """import importlib.util, sys
spec = importlib.util.spec_from_file_location(__name__, {path!r})
sys.modules[__name__] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def _name_for_workers(file: Path) -> str:
    """Return a new name by which processes that the file's functions spawn can import the file.

    They have the `sys.path` of this process, and find a module of this name there that runs the
    file. The name of the file itself may be that of another module or of an earlier run of it.
    """
    folder = Path(_folder_of_modules().name)
    _append_to_path(str(folder))
    module_name = f"{file.stem}_loaded_{sum(1 for _ in folder.glob('*.py'))}"
    (folder / f"{module_name}.py").write_text(_RUN_FILE.format(path=str(file)))
    return module_name


@functools.cache
def _folder_of_modules() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that exists until this process ends."""
    return tempfile.TemporaryDirectory(prefix="ppo_jax-")


def _append_to_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)
