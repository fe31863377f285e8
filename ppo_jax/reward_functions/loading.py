"""Making a reward from the name that a user gives on the command line."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ppo_jax.hashing import text_hash
from ppo_jax.reward_functions.model import load_model_reward
from ppo_jax.reward_functions.protocol import RewardFn
from ppo_jax.reward_functions.text import TextReward
from ppo_jax.reward_functions.tokens import TokenReward


def load_reward(
    spec: str, given: Literal["text", "tokens"] = "text", label: str | None = None
) -> RewardFn:
    """Make a reward from `my_file.py:function`, or from the name of a reward model.

    Args:
      spec: a Python file and the name of a function in it, joined by a colon; or the folder or
        Hugging Face id of a reward model.
      given: what the function is called with: "text" as in `TextReward`, or "tokens" as in
        `TokenReward`.
      label: name or number of the label whose logit is the score, for a reward model with several
        labels.

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
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py"):
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
    function = _load_function(Path(file), name)
    return TextReward(function) if given == "text" else TokenReward(function)


def _load_function(file: Path, name: str) -> Callable[..., Any]:
    """Run a Python file as a module and return its function `name`."""
    if not file.is_file():
        raise ValueError(f"The reward file {file} does not exist.")
    # Worker processes that are spawned get this path, and can then import the file by its name. A
    # module beside it can be imported too. Last, so that no file beside it hides another module.
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    module_name = file.stem if _imports(file) else f"{file.stem}_{text_hash(str(file.resolve()))}"
    module_spec = importlib.util.spec_from_file_location(module_name, file)
    assert module_spec is not None and module_spec.loader is not None  # It ends in .py.
    # Dataclasses and pickle look their classes up in sys.modules.
    sys.modules[module_name] = module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"The reward file {file} does not run: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"The reward file {file} has no function {name!r}.")
    return function


def _imports(file: Path) -> bool:
    """Whether `import` of the name of a file finds this file and not another module."""
    name = file.stem
    loaded = sys.modules.get(name)
    if loaded is not None:
        return getattr(loaded, "__file__", None) == str(file)
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None and Path(found.origin).samefile(file)
