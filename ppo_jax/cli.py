"""The command `ppo-jax`: PPO and the stages before and after it, on your own model and data."""

import contextlib
import functools
import itertools
import operator
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import jax
import tyro

from ppo_jax.commands.convert import Convert
from ppo_jax.commands.evaluation import Evaluate
from ppo_jax.commands.inference import Generate
from ppo_jax.commands.models import Info
from ppo_jax.commands.plan import Plan
from ppo_jax.commands.report import Report
from ppo_jax.commands.runs import Compare, Replay
from ppo_jax.commands.supervised import SFT, Reward
from ppo_jax.commands.train import Train
from ppo_jax.commands.value import Value
from ppo_jax.distributed import processes
from ppo_jax.errors import SettingError
from ppo_jax.ppo.presets import PRESETS
from ppo_jax.ppo.settings import PPOConfig


def main(args: list[str] | None = None) -> None:
    """Run the command.

    An error that the user can correct is printed as one sentence, with exit status 2.

    Args:
      args: the command line without the program's name; None takes it from `sys.argv`.
    """
    try:
        try:
            _run(sys.argv[1:] if args is None else args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # The reader of the output has ended, such as `head`.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def _run(args: list[str]) -> None:
    """Run the command, and print errors that the user can correct."""
    keep_compiled_programs()
    # Otherwise transformers warns that PyTorch is missing, although it is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with _exit_on_interrupt(), _quiet_event_loops():
            parse(args).run()
    except KeyboardInterrupt:  # A reward function may raise it.
        print("ppo-jax: Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise
    except AssertionError as error:
        if not _lacks_platform():
            raise
        platforms = jax.config.values["jax_platforms"]
        print(
            f"ppo-jax: JAX finds no device for JAX_PLATFORMS={platforms}; install JAX with "
            "the plugin for it, such as jax[cuda13], or unset JAX_PLATFORMS.",
            file=sys.stderr,
        )
        raise SystemExit(2) from error
    except (ValueError, RuntimeError, OSError, SettingError) as error:
        several = jax.distributed.is_initialized()
        lost = several and isinstance(error, jax.errors.JaxRuntimeError)
        prefix = "Another process is probably gone: " if lost else ""
        print(f"ppo-jax: {prefix}{error}", file=sys.stderr)
        if several:
            processes.exit_at_once(2)
        raise SystemExit(2) from error


def parse(args: list[str]) -> Any:
    """Return the subcommand, an instance of a class of `ppo_jax.commands`, of a command line.

    Raises:
      SystemExit: if the command line asks for help, or is wrong, after this is printed.
    """
    return tyro.cli(
        _commands(_preset(args)),
        config=(tyro.conf.EnumChoicesFromValues,),
        prog="ppo-jax",
        description=__doc__,
        args=args,
    )


def _lacks_platform() -> bool:
    """Whether JAX finds no device of the platforms that it was told to use."""
    try:
        return not jax.devices()
    except (AssertionError, RuntimeError):  # JAX asserts that a platform has a plugin.
        return True


def _preset(args: list[str]) -> PPOConfig:
    """Return the settings of the preset on the command line, or the default settings.

    A preset that does not exist is reported later, when tyro parses the command line.
    """
    arguments = itertools.chain.from_iterable(
        a.split("=", 1) if a.startswith("--preset=") else [a] for a in args
    )
    chosen = next((b for a, b in itertools.pairwise(arguments) if a == "--preset"), "default")
    return PRESETS.get(chosen, PPOConfig())


def _commands(ppo: PPOConfig) -> Any:
    """Return the union type of all subcommands for tyro, with their default options."""
    missing = tyro.MISSING
    train = Train(model=missing, prompts=missing, reward=missing, out=missing, ppo=ppo)
    defaults: dict[type, dict[str, Any]] = {
        Train: {"default": train},
        Value: {"default": Value(train=train)},
        Info: {"default": Info(model=missing)},
        Plan: {"default": Plan(model=missing)},
    }
    kinds = (
        Train,
        Value,
        SFT,
        Reward,
        Evaluate,
        Generate,
        Replay,
        Compare,
        Report,
        Convert,
        Info,
        Plan,
    )
    subcommands = (
        Annotated[kind, tyro.conf.subcommand(kind.__name__.lower(), **defaults.get(kind, {}))]
        for kind in kinds
    )
    return functools.reduce(operator.or_, subcommands)


def keep_compiled_programs() -> None:
    """Store compiled programs on disk for later runs, unless JAX's settings say otherwise."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "ppo_jax" / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@contextlib.contextmanager
def _exit_on_interrupt() -> Iterator[None]:
    """Make Ctrl-C end the program at once.

    Python would raise KeyboardInterrupt, which is lost if it happens inside a callback of JAX.
    During training, `faults.StopSignals` handles the signal instead.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, b"ppo-jax: Interrupted.\n")
        os._exit(128 + number)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _quiet_event_loops() -> Iterator[None]:
    """Do not print errors of TensorStore's threads that use an event loop after it is closed.

    Such an error is printed for every array of a checkpoint if one of them cannot be read.
    """
    show = sys.unraisablehook

    def show_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others
    try:
        yield
    finally:
        sys.unraisablehook = show


if __name__ == "__main__":
    main()
