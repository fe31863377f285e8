"""Settings of a command from a YAML or JSON file, and their YAML form."""

import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from ppo_jax.commands.command_line import FLAT_GROUPS, SHORT_NAMES
from ppo_jax.errors import SettingError
from ppo_jax.run.files import config_file
from ppo_jax.run.serialize import to_json
from ppo_jax.run.splits import add_split_seed

Command = TypeVar("Command")

_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
)


class _RepeatedName(Exception):
    """A mapping in a file has a name more than once."""


def _without_repeats(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return a mapping of names and values; raise `_RepeatedName` if a name is repeated."""
    mapping: dict[Any, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise _RepeatedName(name)
        mapping[name] = value
    return mapping


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2, where 1e-5 is a number and no is a text, unlike YAML 1.1."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node; raise `_RepeatedName` if a name is repeated."""
        _without_repeats((key.value, None) for key, _ in node.value if isinstance(key.value, str))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes YAML that means the same in YAML 1.1 and 1.2."""


_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), _first
        )


class SettingsFile(NamedTuple):
    """The settings in a file.

    Attributes:
      path: the file.
      given: the settings by name; the names have dots between their parts.
      of_a_run: whether the file is the `config.json` of a run.
    """

    path: Path
    given: dict[str, Any]
    of_a_run: bool


def read_settings(path: Path) -> SettingsFile:
    """Read the settings in a YAML or JSON file, or in the folder of a run.

    Of a run that was resumed, the option `resume` is left out, because it is about its folder.

    Args:
      path: the file, or the folder of a run, with a `run.json` or `config.json`.

    Raises:
      SettingError: if the file cannot be read, holds no settings, or has a name twice.
    """
    try:
        return _settings_in(path)
    except _RepeatedName as error:
        raise SettingError(f"config={path} sets {error} twice; keep one of them.") from error


def _settings_in(path: Path) -> SettingsFile:
    file = path / config_file(path) if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        content = (
            json.loads(text, object_pairs_hook=_without_repeats)
            if file.suffix == ".json"
            else yaml.load(text, _Loader)
        )
    except OSError as error:
        raise SettingError(f"config={path} cannot be read: {error.strerror}.") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SettingError(f"config={path} is not YAML: line {line}: {error.problem}.") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(f"config={path} is neither YAML nor JSON: {reason}.") from error
    content = {} if content is None else content
    if not isinstance(content, Mapping):
        raise SettingError(f"config={path} must hold names with values, such as batch_size: 64.")
    of_a_run = isinstance(content.get("settings"), Mapping) and "hashes" in content
    if of_a_run:
        add_split_seed(content["settings"])
        content = content["settings"].get("command")
        if not isinstance(content, Mapping):
            raise SettingError(
                f"config={path} is of a run that was started from Python and not by ppo-jax train, "
                "so that it has no options."
            )
    given = _without_repeats(_flatten(content))
    if of_a_run and given.get("resume") in ("yes", "auto"):
        del given["resume"]
    return SettingsFile(path, given, of_a_run)


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the names and values in nested mappings, with dots between the parts of a name."""
    for key, value in content.items():
        name = prefix + str(key).replace("-", "_")
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value


def with_settings(command: Command, file: SettingsFile, called: str) -> Command:
    """Return the settings of a command with those of a file in their place.

    Args:
      command: the settings, a dataclass.
      file: the settings in the file.
      called: the name of the command.

    Returns:
      The settings. They are checked as a whole only when tyro makes the command of them and of the
      options, which may replace some.

    Raises:
      SettingError: if a name is not that of a setting, two names are those of one setting, or a
        value has another type. Of the `config.json` of a run, names that do not exist any more are
        ignored.
    """
    paths = dict(_paths(command, (), ((),)))
    groups = {name[: m.start()] for name in paths for m in re.finditer(r"\.", name)}
    tree: dict[str, Any] = {}
    seen: dict[tuple[str, ...], str] = {}
    for name, value in file.given.items():
        if name not in paths:
            if file.of_a_run or (name in groups and value is None):
                continue
            close = difflib.get_close_matches(name, paths, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help-all lists all."
            raise SettingError(
                f"config={file.path} sets {name}, which is no option of ppo-jax {called}; {hint}"
            )
        if (other := seen.setdefault(paths[name], name)) != name:
            raise SettingError(
                f"config={file.path} sets {other} and {name}, which are the same setting; keep one "
                "of them."
            )
        *parents, last = paths[name]
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = (name, value)
    return _replaced(command, tree, file.path)


def option_names(command: Any) -> list[str]:
    """Return the names of the settings of a command, a dataclass, as options have them."""
    return [name for name, _ in _paths(command, (), ((),))]


def _paths(
    settings: Any, path: tuple[str, ...], spellings: tuple[tuple[str, ...], ...]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each name of a setting with its path of fields.

    The name of a flat group may be left out, and so may that of the group of a short name.
    """
    for field in dataclasses.fields(settings):
        value, here = getattr(settings, field.name), (*path, field.name)
        longer = tuple((*spelling, field.name) for spelling in spellings)
        if dataclasses.is_dataclass(value):
            yield from _paths(value, here, longer + spellings * (field.name in FLAT_GROUPS))
            continue
        if field.name in SHORT_NAMES.get(type(settings), ()):
            yield field.name, here
        for spelling in longer:
            yield ".".join(spelling), here


def _replaced(settings: Command, tree: Mapping[str, Any], file: Path) -> Command:
    """Return settings with some of their fields replaced, at any depth.

    The result is not checked as a whole, because options may still replace some of its settings.
    """
    kinds, result = get_type_hints(type(settings), include_extras=True), copy.copy(settings)
    for field, change in tree.items():
        if isinstance(change, Mapping):
            new = _replaced(getattr(settings, field), change, file)
            object.__setattr__(result, field, new)
            continue
        name, value = change
        try:
            new = TypeAdapter(kinds[field]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            reasons = ", or ".join(
                dict.fromkeys(x["msg"].replace("Input should", "it should") for x in error.errors())
            )
            raise SettingError(
                f"config={file} sets {name} to {json.dumps(value)}, but {reasons}."
            ) from error
        object.__setattr__(result, field, new)
    return result


def as_yaml(command: Any) -> str:
    """Return the settings of a command as YAML, which `read_settings` reads.

    Args:
      command: the settings, a dataclass.
    """
    return yaml.dump(
        _without_flat_groups(to_json(command)), Dumper=_Dumper, sort_keys=False, allow_unicode=True
    )


def _without_flat_groups(settings: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, value in settings.items():
        value = _without_flat_groups(value) if isinstance(value, dict) else value
        shown |= value if name in FLAT_GROUPS else {name: value}
    return shown
