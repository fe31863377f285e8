"""Write and read `config.json`, and check that a run can be resumed with the current settings."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_jax import data
from ppo_jax.distributed import processes
from ppo_jax.hashing import digest, text_hash
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.run import provenance
from ppo_jax.run.assembly import Learner
from ppo_jax.run.differences import FREE, environment_differences, setting_differences
from ppo_jax.run.files import SUPERVISED, read_json, write_json
from ppo_jax.run.serialize import to_json, without_unread
from ppo_jax.run.settings import LoopConfig
from ppo_jax.run.splits import add_split_seed

_LOG = logging.getLogger(__name__)

# Hashes that a resumed run may have although the run that it continues did not.
_MAY_BE_ADDED = {"eval_prompts"}


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run, and hashes of its model, data and functions, in the types of JSON.

    Attributes:
      settings: the settings by group, such as `ppo` and `loop`.
      hashes: the hashes by what they are of, such as `prompts`.
      file: the name of the file in the run's folder.
    """

    settings: dict[str, Any]
    hashes: dict[str, Any]
    file: str = "config.json"

    def write(
        self, folder: Path, *, first_update: int, forked_from: Mapping[str, Any] | None = None
    ) -> None:
        """Write the file, with the environment of this process and of the earlier ones.

        Args:
          folder: the run's folder.
          first_update: the number of updates that earlier processes have made.
          forked_from: if the run starts from a checkpoint of another one, which one that is.
        """
        earlier: dict[str, Any] = {}
        if forked_from is not None:
            earlier = {"forked_from": dict(forked_from)}
        elif first_update:
            earlier = read_config(folder, self.file)
        here = {"first_update": first_update, **provenance.environment()}
        content = {
            "settings": self.settings,
            "hashes": self.hashes,
            "processes": [*earlier.get("processes", []), here],
        }
        if "forked_from" in earlier:  # The runs that it was forked from stay on record.
            content["forked_from"] = earlier["forked_from"]
        write_json(folder / self.file, content)


def start_config(
    learner: Learner,
    parameters: Any,
    prompts: data.Prompts,
    eval_prompts: data.Prompts | None,
    reward: Any,
    *,
    loop: LoopConfig,
    command: Any = None,
    functions: Mapping[str, Callable | None] | None = None,
) -> RunConfig:
    """Make the `config.json` of a run that is about to start.

    Args:
      learner: what is trained.
      parameters: all parameters that the run starts from.
      prompts: the prompts to train on.
      eval_prompts: held-out prompts, or None.
      reward: the reward.
      loop: the settings of the loop.
      command: the settings of the command, or None if the run was started from Python.
      functions: functions that replace those that the settings name, by their purpose, or None.

    Returns:
      The settings and hashes.
    """
    agent = learner.agent
    both = [p for p in (prompts, eval_prompts) if p is not None]
    settings = {
        "ppo": agent.config,
        "loop": loop,
        "command": command,
        # The amount of padding can change the last bits.
        "data": {"longest_prompt": max(p.tokens.shape[1] for p in both)},
        "jax": provenance.numerics(),
    }
    hashes = {
        "model": digest(parameters),
        "model_config": text_hash(agent.model.about),
        "stop_ids": text_hash(agent.stop_ids, agent.pad_id),
        "tokenizer": provenance.tokenizer_hash(learner.tokenizer),
        "prompts": _prompts_hash(prompts),
        "reward": provenance.code_hash(reward),
    }
    if agent.ref_model is not None:
        hashes["reference_config"] = text_hash(agent.ref_model.about)
    for name, function in (functions or {}).items():
        if function is not None:
            hashes[name] = provenance.code_hash(function)
    if eval_prompts is not None:
        hashes["eval_prompts"] = _prompts_hash(eval_prompts)
    return RunConfig(to_json(settings), hashes)


def _prompts_hash(prompts: data.Prompts) -> str:
    """Hash the unpadded tokens and the rows, so that padding does not change the hash."""
    tokens, mask = prompts.tokens, prompts.mask
    return text_hash(tokens[mask], mask.sum(axis=1), list(prompts.rows))


def read_config(folder: Path, file: str = "config.json") -> dict[str, Any]:
    """Read the settings of a run; raise ValueError if `folder` holds none.

    Args:
      folder: the run's folder.
      file: the name of the file; `SUPERVISED` for that of a supervised run.
    """
    if not (folder / file).is_file():
        raise ValueError(
            f"{folder} is not the folder of a run, because it has no {file}; ppo-jax train writes "
            "a config.json, and ppo-jax sft and reward a run.json."
        )
    config = read_json(folder / file)
    if isinstance(config, dict) and "model_type" in config:
        raise ValueError(
            f"{folder / file} is not the configuration of a run of ppo-jax train, but of a model; "
            f"ppo-jax train and convert take a model as --model {folder}."
        )
    kinds = {"settings": dict, "hashes": dict, "processes": list}
    valid = isinstance(config, dict) and all(
        isinstance(config.get(name), kind) for name, kind in kinds.items()
    )
    if not valid or not all(isinstance(config["settings"].get(part), dict | None) for part in FREE):
        raise ValueError(f"{folder / file} is not the configuration of a run.")
    add_split_seed(config["settings"])
    # The run may be older than a setting, which then has its default.
    parts = {"loop": LoopConfig()} | ({} if file == SUPERVISED else {"ppo": PPOConfig()})
    for part, defaults in parts.items():
        config["settings"][part] = to_json(defaults) | (config["settings"].get(part) or {})
    if file != SUPERVISED:
        for group in (config["settings"], config["settings"].get("command") or {}):
            group["ppo"] = without_unread(group.get("ppo") or {})
    return config


def check_unchanged(folder: Path, now: RunConfig) -> None:
    """Check that the run in `folder` can be resumed with the configuration `now`.

    Versions, devices and flags that have changed since are named in a warning, because the result
    may then differ in its last bits.

    Args:
      folder: the run's folder.
      now: the configuration of the run that starts.

    Raises:
      ValueError: if a setting, model, file or function on which the result depends has changed
        since the run began. The message names the first one.
    """
    before = read_config(folder, now.file)
    for name, old, new in setting_differences(before["settings"], now.settings):
        raise ValueError(
            f"{name} was {old} in the run in {folder} and is {new} now; to resume, set it to {old}."
        )
    for name, old, new in environment_differences(before["processes"], [provenance.environment()]):
        if processes.is_first():
            _LOG.warning(
                "%s was %s when the run in %s last ran and is %s now: the last bits may differ.",
                name,
                old,
                folder,
                new,
            )
    for name in dict.fromkeys([*before["hashes"], *(now.hashes.keys() - _MAY_BE_ADDED)]):
        old, new = before["hashes"].get(name), now.hashes.get(name)
        if old != new:
            raise ValueError(
                f"The {name} of the run in {folder} had the hash {old} and has {new} now; to "
                f"resume, use the same {name}."
            )
