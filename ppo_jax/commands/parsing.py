"""From the arguments of `ppo-jax` to the command that they name, with its options."""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import operator
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ppo_jax import __version__
from ppo_jax.commands.command_line import CONFIGURABLE, OptionRules
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
from ppo_jax.errors import SettingError
from ppo_jax.ppo.presets import PRESETS
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.stores import store_url

COMMANDS: dict[str, type] = {
    kind.__name__.lower(): kind
    for kind in (
        *(Train, Value, SFT, Reward, Evaluate, Generate),
        *(Replay, Compare, Report, Convert, Info, Plan),
    )
}
_HELP = {"-h", "--help"}
_DESCRIPTION = """PPO and the stages before and after it, on your own model and data.

ppo-jax COMMAND --help shows common options, and COMMAND --help-all all of them.

ppo-jax --version shows the version."""


def parse(args: Sequence[str]) -> Any:
    """Return the command of a command line.

    Args:
      args: the arguments after the name of the program.

    Returns:
      An instance of a class of `ppo_jax.commands`, whose method `run` runs the command; with
      --print-config or --dry-run, another object with this method.

    Raises:
      SystemExit: if the arguments ask for help or the version, or are wrong, after this is printed.
      SettingError: if a setting is out of range, an option does not exist, or the file of settings
        is wrong.
    """
    if list(args) == ["--version"]:
        print(f"ppo-jax {__version__}")
        raise SystemExit(0)
    brief = not _HELP.isdisjoint(args) and "--help-all" not in args
    args = ["--help" if x == "--help-all" else x for x in args]
    called = args[0] if args and args[0] in COMMANDS else None
    args = list(_with_one_spelling(called, args))
    rules = OptionRules(all_options=not brief)
    shown = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(shown) if brief and not called else contextlib.nullcontext()
        ):
            command, unknown = tyro.cli(
                _commands(called, args),
                config=(tyro.conf.EnumChoicesFromValues,),
                prog="ppo-jax",
                description=_DESCRIPTION,
                args=args,
                registry=rules.registry,
                return_unknown_args=True,
            )
    except SystemExit as ending:
        # The names of all commands make the line too long, and the list below has them.
        print(shown.getvalue().replace(f"{{{','.join(COMMANDS)}}}", "COMMAND"), end="")
        if not ending.code and called and not _HELP.isdisjoint(args):
            print(_footer(called, brief=brief))
        raise
    if unknown:
        raise SettingError(_unknown(command, unknown))
    requests = rules.requests
    if requests.print_config:
        return PrintConfig(command)
    return DryRun(command) if requests.dry_run else command


def _unknown(command: Any, words: Sequence[str]) -> str:
    """Return a sentence about arguments that are no options of a command."""
    called = type(command).__name__.lower()
    name = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if name is None:
        return f"ppo-jax {called} takes no argument {words[0]!r}; options begin with --."
    from ppo_jax.commands.config_files import option_names

    known = [*option_names(command), *CONFIGURABLE.get(type(command), ())]
    options = [f"--{option.replace('_', '-')}" for option in known]
    near = difflib.get_close_matches(name.replace("_", "-"), options, n=3)
    similar = f"similar options are {', '.join(near)}, and " if near else ""
    return (
        f"{name} is no option of ppo-jax {called}; {similar}ppo-jax {called} --help-all lists all."
    )


def _with_one_spelling(called: str | None, args: Sequence[str]) -> Iterator[str]:
    """Yield arguments, with the names that options of `info` and `plan` have in other commands."""
    for arg in args:
        name, sign, value = arg.partition("=")
        if called == "info" and name == "--model":  # The model needs no name there.
            yield from [value] if sign else []
        elif called in ("info", "plan") and name in ("--prompt-tokens", "--prompt_tokens"):
            yield f"--max-prompt-tokens{sign}{value}"
        else:
            yield arg


@dataclass(frozen=True)
class PrintConfig:
    """Print the settings of a command."""

    command: Any

    def run(self) -> None:
        """Print them as YAML."""
        from ppo_jax.commands.config_files import as_yaml

        print(as_yaml(self.command), end="")


@dataclass(frozen=True)
class DryRun:
    """Read everything that a command needs, and report what it would do."""

    command: Any

    def run(self) -> None:
        """Print the report."""
        from ppo_jax.commands.dry_run import dry_run

        dry_run(self.command)


def _footer(called: str, *, brief: bool) -> str:
    """Return what stands below the help of a command."""
    kind = COMMANDS[called]
    more = f"\nppo-jax {called} --help-all shows all options." if brief else ""
    example = textwrap.indent(inspect.cleandoc(kind.example), "  ")  # type: ignore[attr-defined]
    return f"Example:\n{example}{more}"


def _commands(called: str | None, args: Sequence[str]) -> Any:
    """Return the union type of all commands for tyro, with their default options."""
    subcommands = []
    for name, kind in COMMANDS.items():
        default = _defaults(kind, name, args if name == called else [])
        given = {} if default is None else {"default": default}
        if called is None:  # The list of commands shows what each does in one sentence.
            given["description"] = (kind.__doc__ or "").partition("\n\n")[0]
        subcommands.append(Annotated[kind, tyro.conf.subcommand(name, **given)])
    return functools.reduce(operator.or_, subcommands)


def _defaults(kind: type, called: str, args: Sequence[str]) -> Any:
    """Return a command with the settings that it has without options, or None if tyro knows them.

    These are the defaults of its fields, the preset that the command line or the file of settings
    names, and the settings in that file. Settings without a default are `tyro.MISSING`.
    """
    if kind is Value:
        return Value(train=_defaults(Train, called, args))
    if kind not in (*CONFIGURABLE, Info, Plan):
        return None
    path, preset = _value_of("--config", args), _value_of("--preset", args)
    file = None
    if path is not None and kind in CONFIGURABLE:
        if url := store_url(path):
            raise SettingError(
                f"config={url} is in an object store; copy it to this machine first."
            )
        from ppo_jax.commands.config_files import read_settings

        file = read_settings(Path(path))
        if file.of_a_run and kind in (Evaluate, Generate):
            raise SettingError(
                f"config={path} holds the settings of a run; {called} takes the run as --model."
            )
        for name in ("model", "reward"):  # tyro appends to the default of an option for many.
            if any(x.partition("=")[0] == f"--{name}" for x in args):
                file.given.pop(name, None)
    own = file and file.given.get("preset")
    if preset and own and preset != own:
        raise SettingError(
            f"config={path} has preset={own} and its settings; leave out --preset {preset}, or "
            "remove preset and the settings that it should change from the file."
        )
    ppo: dict[str, Any] = {}
    if kind is Train:
        ppo["ppo"] = PRESETS.get(str(preset or own), PPOConfig())
    default = _unchecked(kind, **ppo)
    if file is None:
        return default
    from ppo_jax.commands.config_files import with_settings

    return with_settings(default, file, called)


def _unchecked(kind: type, **given: Any) -> Any:
    """Return a dataclass whose fields without a value are `tyro.MISSING`.

    Its settings are not checked, because some may be missing. tyro makes another one of them and of
    the options, which is checked.
    """
    made: Any = object.__new__(kind)
    for field in dataclasses.fields(kind):
        value, factory = given.get(field.name, field.default), field.default_factory
        if value is dataclasses.MISSING and callable(factory):
            value = factory()
        missing = value is dataclasses.MISSING
        object.__setattr__(made, field.name, tyro.MISSING if missing else value)
    return made


def _value_of(option: str, args: Sequence[str]) -> str | None:
    """Return the value of an option on a command line, or None.

    A value that is wrong is reported later, when tyro parses the command line.
    """
    parts = itertools.chain.from_iterable(
        x.split("=", 1) if x.startswith(f"{option}=") else [x] for x in args
    )
    return next((value for name, value in itertools.pairwise(parts) if name == option), None)
