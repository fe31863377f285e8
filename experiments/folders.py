"""The folder that an experiment writes to."""

from pathlib import Path

from filelock import BaseFileLock

from ppo_jax import create_run_folder, lock_folder


def open_folder(out: Path) -> BaseFileLock:
    """Create the folder of an experiment, and lock it.

    Args:
      out: the folder; must not hold another run.

    Returns:
      The lock, which the caller holds until the end.

    Raises:
      SystemExit: if the folder cannot be used, with a sentence that says why.
    """
    try:
        return lock_folder(create_run_folder(out))
    except (OSError, ValueError) as error:
        raise SystemExit(f"out={out} cannot be used: {error}") from error
