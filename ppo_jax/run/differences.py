"""Differences between two runs: settings on which the result depends, and the environment."""

from collections.abc import Iterator, Sequence
from typing import Any

from ppo_jax.run import provenance

# Settings on which the result does not depend, or which name a file or model that is hashed.
FREE: dict[str, set[str]] = {
    "loop": {
        "updates",
        "eval_every",
        "save_every",
        "keep",
        "samples",
        "tensorboard",
        "wandb_project",
        "progress",
        "faults",
    },
    "command": {
        "out",
        "resume",
        "preset",
        "updates",
        "model",
        "adapter",
        "reference",
        "fork_from",
        "fork_update",
        "prompts",
        "eval_prompts",
        "eval_fraction",
        "data_options",
        "reward",
        "reward_timeout",
        "advantage",
        "loss",
        "loop",
        "ppo",
        "mesh",
        "processes",
        "data",
        "from_scratch",
        "training",
        "run_options",
        "columns",
        "label_column",
        "labels",
    },
    "training": {"eval_data"},
    "ppo": set(),
    "data": set(),
    "jax": set(),
}
# Parts of the environment that can change the last bits of a result.
_ENVIRONMENT = ("versions", "xla_flags", "device_kinds", "cpu_cores")

Difference = tuple[str, Any, Any]


def setting_differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Difference]:
    """Yield the settings that differ between two runs and on which the result depends.

    Args:
      old: the settings of one run.
      new: the settings of the other.

    Yields:
      The name of each such setting, and its two values.

    Example:
      >>> old = {"ppo": {"lam": 0.9}, "loop": {"save_every": 1}}
      >>> new = {"ppo": {"lam": 1.0}, "loop": {"save_every": 2}}
      >>> list(setting_differences(old, new))
      [('ppo.lam', 0.9, 1.0)]
    """
    # The result depends on the number of updates only if the learning rate decays over them.
    decays = any(_decays(run.get("ppo") or {}) for run in (old, new))
    for part, free in FREE.items():
        for name, a, b in provenance.differences(old.get(part) or {}, new.get(part) or {}):
            first = name.split(".")[0]
            if first not in free or (decays and (part, first) == ("loop", "updates")):
                yield f"{part}.{name}" if part != "command" else name, a, b


def _decays(ppo: dict[str, Any]) -> bool:
    """Whether a learning rate of these settings depends on the number of updates."""
    critic = ppo.get("critic") or {}
    return bool(ppo.get("decay_learning_rate") or critic.get("decay_learning_rate"))


def environment_differences(old: Sequence[Any], new: Sequence[Any]) -> Iterator[Difference]:
    """Yield the versions, devices and flags that differ between the last processes of two runs.

    These can change the last bits of a result.

    Args:
      old: the entry `processes` of one run's `config.json`.
      new: the entry of the other.

    Yields:
      The name of each difference, and its two values.
    """
    for name, a, b in provenance.differences(old[-1] if old else None, new[-1] if new else None):
        if name.split(".")[0] in _ENVIRONMENT:
            yield name, a, b
