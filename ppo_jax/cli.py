"""The command `ppo-jax`: every stage on one's own model, data and reward."""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from ppo_jax.commands.inference import Evaluate, Generate
from ppo_jax.commands.models import Convert, Info
from ppo_jax.commands.plan import Plan
from ppo_jax.commands.runs import Compare, Replay
from ppo_jax.commands.supervised import SFT, Reward
from ppo_jax.commands.train import Train
from ppo_jax.distributed import processes
from ppo_jax.errors import SettingError
from ppo_jax.ppo.presets import PRESETS
from ppo_jax.ppo.settings import PPOConfig


def main(args: list[str] | None = None) -> None:
    """Entry point; every error that a user can mend is one sentence and exit status 2."""
    args = sys.argv[1:] if args is None else args
    spelled = list(
        itertools.chain.from_iterable(
            a.split("=", 1) if a.startswith("--preset=") else [a] for a in args
        )
    )
    chosen = next((b for a, b in itertools.pairwise(spelled) if a == "--preset"), "default")
    missing = tyro.MISSING
    train = Train(
        model=missing,
        prompts=missing,
        reward=missing,
        out=missing,
        ppo=PRESETS.get(chosen, PPOConfig()),
    )
    commands = (
        Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[SFT, tyro.conf.subcommand("sft")]
        | Annotated[Reward, tyro.conf.subcommand("reward")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Replay, tyro.conf.subcommand("replay")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Convert, tyro.conf.subcommand("convert")]
        | Annotated[Info, tyro.conf.subcommand("info", default=Info(model=missing))]
        | Annotated[Plan, tyro.conf.subcommand("plan", default=Plan(model=missing))]
    )
    keep_compiled()
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # that PyTorch is not here, which nothing needs
    try:
        with _interrupts(), _no_leftovers():
            tyro.cli(
                commands,
                config=(tyro.conf.EnumChoicesFromValues,),
                prog="ppo-jax",
                description=__doc__,
                args=args,
            ).run()
    except KeyboardInterrupt:  # a reward's own
        print("ppo-jax: Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, RuntimeError, OSError, SettingError) as error:
        several = jax.distributed.is_initialized()
        lost = (
            "Another process is probably gone: "
            if several and isinstance(error, jax.errors.JaxRuntimeError)
            else ""
        )
        print(f"ppo-jax: {lost}{error}", file=sys.stderr)
        if several:
            processes.end(2)
        raise SystemExit(2) from error


def keep_compiled() -> None:
    """Compiled programs are kept for the next start, unless JAX's own settings say where or whether."""
    if jax.config.jax_compilation_cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "ppo_jax" / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C ends the program at once: as an exception it is lost where it meets a callback of JAX's. A run has its own way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: Any) -> None:
        os.write(2, b"ppo-jax: Interrupted.\n")
        os._exit(128 + number)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _no_leftovers() -> Iterator[None]:
    """Where one array of a checkpoint fails, threads of TensorStore tell an event loop that is gone of all the others."""
    shown = sys.unraisablehook
    sys.unraisablehook = lambda about: (
        None if str(about.exc_value) == "Event loop is closed" else shown(about)
    )
    try:
        yield
    finally:
        sys.unraisablehook = shown


if __name__ == "__main__":
    main()
