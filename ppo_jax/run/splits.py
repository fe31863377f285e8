"""The seed by which the held-out rows of a run were chosen."""

from collections.abc import MutableMapping
from typing import Any


def add_split_seed(settings: MutableMapping[str, Any]) -> None:
    """Add `eval_seed` to the settings of a run that is older than this option.

    The seed of such a run also chose its held-out rows.

    Args:
      settings: the settings in the run's `config.json` or `run.json`, which are changed.

    Example:
      >>> settings = {"loop": {"seed": 3}, "command": {"eval_fraction": 0.1}}
      >>> add_split_seed(settings)
      >>> settings["command"]
      {'eval_fraction': 0.1, 'eval_seed': 3}
    """
    loop, command, training = (
        x if isinstance(x := settings.get(name), dict) else {}
        for name in ("loop", "command", "training")
    )
    for options in (command, command.get("training"), training):
        if isinstance(options, dict) and options.get("eval_fraction"):
            options.setdefault("eval_seed", loop.get("seed", 0))
