"""A run's `config.json`, and what of it must be the same for a run to go on."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppo_jax import data, hashing
from ppo_jax.distributed import processes
from ppo_jax.ppo.iteration import Agent
from ppo_jax.run import provenance
from ppo_jax.run.files import plain, read_json, write_json

_LOG = logging.getLogger(__name__)

# Settings that shape no result, or only name what `hashes` covers.
_FREE = {
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
        "prompts",
        "eval_prompts",
        "reward",
        "loop",
        "ppo",
        "mesh",
        "processes",
    },
    "ppo": set(),
    "data": set(),
    "jax": set(),
}
_MAY_COME = {"eval_prompts"}  # what a run may get when it goes on


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Settings, and hashes of what they name: as JSON knows them."""

    settings: dict[str, Any]
    hashes: dict[str, Any]

    def write(self, folder: Path, *, first_update: int) -> None:
        """Writes `config.json`, with the environment of each process that worked on the run."""
        file = folder / "config.json"
        before = read_config(folder)["processes"] if first_update else []
        all_processes = [*before, {"first_update": first_update, **provenance.environment()}]
        write_json(
            file, {"settings": self.settings, "hashes": self.hashes, "processes": all_processes}
        )


def start_config(
    agent: Agent,
    loop: Any,
    command: Any,
    models: Any,
    tokenizer: Any,
    prompts: data.Prompts,
    eval_prompts: data.Prompts | None,
    reward: Any,
    loss_fn: Any = None,
) -> RunConfig:
    """Of a run about to start; `models` are all parameters that it starts from."""
    longest = max(
        p.tokens.shape[1] for p in (prompts, eval_prompts) if p is not None
    )  # padding shapes the last bits
    settings = {
        "ppo": plain(agent.config),
        "loop": plain(loop),
        "command": plain(command),
        "data": {"longest_prompt": longest},
        "jax": provenance.numerics(),
    }
    hashes = {
        "model": hashing.digest(models),
        "model_config": hashing.text_hash(agent.model.about),
        "stop_ids": hashing.text_hash(agent.stop_ids, agent.pad_id),
        "tokenizer": provenance.tokenizer_hash(tokenizer),
        "prompts": _data_hash(prompts),
        "reward": provenance.code_hash(reward),
    }
    if loss_fn is not None:
        hashes["loss"] = provenance.code_hash(loss_fn)
    if eval_prompts is not None:
        hashes["eval_prompts"] = _data_hash(eval_prompts)
    return RunConfig(json.loads(json.dumps(settings)), hashes)


def _data_hash(prompts: data.Prompts) -> str:
    """Of no padding: longer prompts elsewhere are no change of these."""
    return hashing.text_hash(
        prompts.tokens[prompts.mask], prompts.mask.sum(axis=1), list(prompts.rows)
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a run; ValueError, if `folder` holds none."""
    config = read_json(folder / "config.json")
    kinds = {"settings": dict, "hashes": dict, "processes": list}
    is_one = isinstance(config, dict) and all(
        isinstance(config.get(name), kind) for name, kind in kinds.items()
    )
    if not is_one or not all(
        isinstance(config["settings"].get(part), dict | None) for part in _FREE
    ):
        raise ValueError(f"{folder / 'config.json'} is not the one of a run.")
    return config


def setting_differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of each setting of a run that shapes the result and differs from another's.

    Example:
      >>> runs = ({"ppo": {"lam": lam}, "loop": {"save_every": every}} for lam, every in ((0.9, 1), (1.0, 2)))
      >>> list(setting_differences(*runs))
      [('ppo.lam', 0.9, 1.0)]
    """
    decays = [
        (run.get("ppo") or {}).get("decay_learning_rate") for run in (old, new)
    ]  # over all updates: so they count too
    for part, free in _FREE.items():
        for name, a, b in provenance.differences(old.get(part) or {}, new.get(part) or {}):
            first = name.split(".")[0]
            if first not in free or (any(decays) and (part, first) == ("loop", "updates")):
                yield f"{part}.{name}" if part != "command" else name, a, b


def place_differences(old: list[Any], new: list[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of what differs between where two runs, `processes` of their configs, were last at work: versions,
    devices and flags, which decide over last bits."""
    for name, a, b in provenance.differences(old[-1] if old else None, new[-1] if new else None):
        if name.split(".")[0] in ("versions", "xla_flags", "device_kinds", "cpu_cores"):
            yield name, a, b


def check_unchanged(folder: Path, now: RunConfig) -> None:
    """Raises ValueError, naming it, if anything that shapes the result is not as it was when the run in `folder` began; warns of
    other versions, devices or flags, with which it may agree to rounding only."""
    before = read_config(folder)
    for name, old, new in setting_differences(before["settings"], now.settings):
        raise ValueError(
            f"{name} was {old} in the run in {folder} and is {new} now; to resume, set it as it was."
        )
    for name, old, new in place_differences(before["processes"], [provenance.environment()]):
        if processes.is_first():
            _LOG.warning(
                "%s was %s when the run in %s was last at work and is %s now: the last bits may differ.",
                name,
                old,
                folder,
                new,
            )
    for name in dict.fromkeys([*before["hashes"], *(now.hashes.keys() - _MAY_COME)]):
        old, new = before["hashes"].get(name), now.hashes.get(name)
        if old != new:
            raise ValueError(
                f"The {name} of the run in {folder} had the hash {old} and has {new} now; to resume, give the same."
            )
