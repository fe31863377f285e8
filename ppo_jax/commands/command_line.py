"""How the options of the commands appear on the command line: their names, order and help."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from ppo_jax.commands.evaluation import Evaluate
from ppo_jax.commands.inference import Generate
from ppo_jax.commands.prompts import PromptOptions
from ppo_jax.commands.supervised import SFT, Reward, RunOptions
from ppo_jax.commands.train import Train
from ppo_jax.distributed.joining import Processes
from ppo_jax.models.lora_settings import LoRA
from ppo_jax.ppo.critic_settings import CriticConfig
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.run.settings import Faults, LoopConfig

# For mypy, these are types that take no argument.
_Suppress: Any = tyro.conf.Suppress
_FlagCreatePairsOff: Any = tyro.conf.FlagCreatePairsOff

# Settings that are also options without the name of their group, such as --seed for --loop.seed.
SHORT_NAMES: dict[type, tuple[str, ...]] = {
    LoopConfig: ("updates", "seed"),
    PPOConfig: (
        *("batch_size", "max_new_tokens", "learning_rate", "kl_coef"),
        *("epochs", "weight_decay", "temperature", "top_k", "top_p"),  # as in other commands
    ),
}
# Options that --help shows; --help-all shows all. A class that is not named here shows all of them.
_COMMON: dict[type, set[str]] = {
    Train: {
        *("model", "prompts", "reward", "out", "eval_prompts", "eval_fraction", "critic"),
        *("preset", "resume", "data_options", "lora", "loop", "ppo"),
    },
    LoopConfig: {*SHORT_NAMES[LoopConfig], "eval_every"},
    PPOConfig: {
        *("batch_size", "max_new_tokens", "learning_rate", "kl_coef", "minibatches", "micro_batch"),
    },
    LoRA: {"rank"},
    RunOptions: {"resume"},
    PromptOptions: set(),
    CriticConfig: set(),
    Faults: set(),
    Processes: set(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requests:
    """Options that say what happens with the settings of a command.

    They are no settings themselves, so that no `config.json` holds them.
    """

    config: Path | None = None
    """Settings from a YAML or JSON file, such as the config.json of a run. Options that are given
    as well take precedence."""
    print_config: bool = False
    """Print the settings that the command would use, as --config reads them, and stop."""
    dry_run: bool = False
    """Read model config, data and reward, report memory and number of steps, and stop. Nothing is
    compiled or written."""


# Groups of settings whose name is in no option: --epochs, not --training.epochs.
FLAT_GROUPS = {"train", "training", "columns", "data_options", "run_options", "sampling"}

# The commands that take options of `Requests`, with the names of these.
CONFIGURABLE: dict[type, tuple[str, ...]] = {
    **dict.fromkeys((Train, SFT, Reward), ("config", "print_config", "dry_run")),
    **dict.fromkeys((Evaluate, Generate), ("config", "print_config")),
}


class OptionRules:
    """The rules by which tyro makes options of the dataclasses of the commands.

    Attributes:
      registry: the rules, for `tyro.cli`.
      requests: the requests that the command line made, once it is parsed.
    """

    def __init__(self, *, all_options: bool):
        """Make the rules; without `all_options`, only common options exist, for a short help."""
        self.registry = ConstructorRegistry()
        self.registry.struct_rule(self._rule)
        self.requests = Requests()
        self._all = all_options
        self._active: set[type] = set()

    def _default_fields(self, info: StructTypeInfo) -> tuple[StructFieldSpec, ...]:
        """Return the fields that tyro makes of a dataclass without these rules."""
        self._active.add(info.type)
        spec = ConstructorRegistry.get_struct_spec(info)
        self._active.discard(info.type)
        assert isinstance(spec, StructConstructorSpec)
        return spec.fields

    def _rule(self, info: StructTypeInfo) -> StructConstructorSpec | None:
        kind: Any = info.type
        ours = dataclasses.is_dataclass(kind) and kind.__module__.startswith("ppo_jax.")
        if not ours or kind in self._active:
            return None
        fields = [self._field(kind, field) for field in self._default_fields(info)]
        if kind in SHORT_NAMES:  # The command has these options, and then makes the object.
            later = lambda **given: partial(kind, **given)
            rest = tuple(field for field in fields if field.name not in SHORT_NAMES[kind])
            return StructConstructorSpec(self._described(kind, later), rest)
        short = [field for group in fields for field in self._short(info, group)]
        asked = [*self._requests(info)]
        required = [field for field in fields if field.default is tyro.MISSING]
        others = [field for field in fields if field.default is not tyro.MISSING]
        make = partial(self._make, kind, [field.name for field in short])
        return StructConstructorSpec(
            self._described(kind, make), (*required, *short, *asked, *others)
        )

    def _field(self, kind: type, field: StructFieldSpec) -> StructFieldSpec:
        """Hide the field in a short help, unless it is common, and let its help flow."""
        hidden = not (self._all or field.name in _COMMON.get(kind, {field.name}))
        type_ = _Suppress[field.type] if hidden else field.type
        return dataclasses.replace(field, type=type_, helptext=partial(_flowing, field.helptext))

    def _short(self, info: StructTypeInfo, group: StructFieldSpec) -> Iterator[StructFieldSpec]:
        """Yield the options of a group that have a short name, such as `loop.seed`."""
        kind = type(group.default)
        if kind not in SHORT_NAMES:
            return
        fields = self._default_fields(dataclasses.replace(info, type=kind, default=group.default))
        for field in (self._field(kind, x) for x in fields if x.name in SHORT_NAMES[kind]):
            path, short = f"{group.name}.{field.name}", field.name.replace("_", "-")
            long = tyro.conf.arg(name=path.replace("_", "-"), aliases=(f"--{short}",))
            named = long if self._all else tyro.conf.arg(name=short)
            annotated: Any = Annotated[field.type, named]
            yield dataclasses.replace(field, name=path, type=annotated)

    def _requests(self, info: StructTypeInfo) -> Iterator[StructFieldSpec]:
        """Yield the options of a command that are no settings."""
        requests = dataclasses.replace(info, type=Requests, default=Requests())
        names = CONFIGURABLE.get(info.type, ())
        for field in (x for x in self._default_fields(requests) if x.name in names):
            named: Any = Annotated[field.type, tyro.conf.arg(name=field.name)]
            field = self._field(Requests, field)
            yield dataclasses.replace(
                field, name=f"request_{field.name}", type=_FlagCreatePairsOff[named]
            )

    def _make(self, kind: Any, short: list[str], **given: Any) -> Any:
        """Make a command of its options, and note the requests."""
        if kind in CONFIGURABLE:
            names = CONFIGURABLE[kind]
            self.requests = Requests(**{name: given.pop(f"request_{name}") for name in names})
        groups: dict[str, dict[str, Any]] = {}
        for name in short:
            group, _, option = name.partition(".")
            groups.setdefault(group, {})[option] = given.pop(name)
        made = {group: given[group](**options) for group, options in groups.items()}
        return kind(**given | made)

    def _described(self, kind: type, make: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that makes an object, with the docstring that tyro shows above it."""

        def described(**given: Any) -> Any:
            return make(**given)

        text = kind.__doc__ or ""
        described.__doc__ = text if self._all else text.partition("\n\n")[0]
        return described


def _flowing(text: str | Callable[[], str | None] | None) -> str | None:
    """Return the help of an option without the line breaks of the source."""
    found = text() if callable(text) else text
    return None if found is None else " ".join(found.split())
