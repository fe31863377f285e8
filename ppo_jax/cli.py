"""The command `ppo-jax`: PPO and the stages before and after it, on your own model and data."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from ppo_jax.commands.named_files import check_named_files
from ppo_jax.commands.parsing import COMMANDS as COMMANDS
from ppo_jax.commands.parsing import parse as parse
from ppo_jax.errors import SettingError


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
    # Otherwise transformers warns that PyTorch is missing, although it is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with _exit_on_interrupt(), _quiet_event_loops():
            command = parse(args)
            check_named_files(command)  # Before JAX is imported, which takes longer.
            keep_compiled_programs()
            command.run()
    except KeyboardInterrupt:  # A reward function may raise it.
        print("ppo-jax: Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise
    except AssertionError as error:
        if (platforms := _missing_platforms()) is None:
            raise
        print(
            f"ppo-jax: JAX finds no device for JAX_PLATFORMS={platforms}; install JAX with "
            "the plugin for it, such as jax[cuda13], or unset JAX_PLATFORMS.",
            file=sys.stderr,
        )
        raise SystemExit(2) from error
    except (ValueError, RuntimeError, OSError, SettingError) as error:
        _report(error)
        raise SystemExit(2) from error


def _report(error: Exception) -> None:
    """Print an error, and end one of several processes at once."""
    several = lost = False
    if "jax" in sys.modules:  # Arguments may be wrong before JAX is imported.
        import jax

        several = jax.distributed.is_initialized()
        lost = several and isinstance(error, jax.errors.JaxRuntimeError)
    prefix = "Another process is probably gone: " if lost else ""
    print(f"ppo-jax: {prefix}{error}", file=sys.stderr)
    if several:
        from ppo_jax.distributed import processes

        processes.exit_at_once(2)


def _missing_platforms() -> str | None:
    """Return the platforms that JAX was told to use if it finds no device of them, or None."""
    import jax

    try:
        found = bool(jax.devices())
    except (AssertionError, RuntimeError):  # JAX asserts that a platform has a plugin.
        found = False
    return None if found else str(jax.config.values["jax_platforms"])


def keep_compiled_programs() -> None:
    """Store compiled programs on disk for later runs, unless JAX's settings say otherwise."""
    import jax  # Not at the top, so that help and errors about arguments appear quickly.

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

    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:  # A forked worker of a reward ends without a word.
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
