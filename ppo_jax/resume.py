"""A run's `config.json`, and what of it must be the same for a run to go on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ppo_jax import data, provenance
from ppo_jax.iteration import Agent
from ppo_jax.logging import plain, read_json, write_json

# Settings that shape no result, or only name what `hashes` covers.
_FREE = {
    "loop": {"updates", "eval_every", "save_every", "keep", "samples", "tensorboard", "wandb_project", "progress", "faults"},
    "command": {"out", "resume", "preset", "updates", "model", "prompts", "eval_prompts", "reward", "loop", "ppo", "mesh",
                "processes"},
    "ppo": set(),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Settings, and hashes of what they name: as JSON knows them."""

    settings: dict[str, Any]
    hashes: dict[str, Any]

    def write(self, folder: Path, *, first_update: int) -> None:
        """Writes `config.json`, with the environment of each process that worked on the run."""
        file = folder / "config.json"
        before = read_json(file).get("processes", []) if first_update else []
        processes = [*before, {"first_update": first_update, **provenance.environment()}]
        write_json(file, {"settings": self.settings, "hashes": self.hashes, "processes": processes})


def start_config(
    agent: Agent, loop: Any, command: Any, models: Any, tokenizer: Any, prompts: data.Prompts, eval_prompts: data.Prompts | None,
    reward: Any,
) -> RunConfig:  # fmt: skip
    """Of a run about to start; `models` are all parameters that it starts from."""
    settings = {"ppo": plain(agent.config), "loop": plain(loop), "command": plain(command)}
    hashes = {
        "model": provenance.digest(models),
        "model_config": provenance.text_hash(agent.model.about),
        "stop_ids": provenance.text_hash(agent.stop_ids, agent.pad_id),
        "tokenizer": provenance.tokenizer_hash(tokenizer),
        "prompts": _data_hash(prompts),
        "reward": provenance.code_hash(reward),
    }
    if eval_prompts is not None:
        hashes["eval_prompts"] = _data_hash(eval_prompts)
    return RunConfig(json.loads(json.dumps(settings)), hashes)


def _data_hash(prompts: data.Prompts) -> str:
    return provenance.text_hash(prompts.tokens, prompts.mask, list(prompts.rows))


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a run; ValueError, if `folder` holds none."""
    config = read_json(folder / "config.json")
    parts = [config.get(name) for name in ("settings", "hashes")] if isinstance(config, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{folder / 'config.json'} is not the one of a run.")
    return config


def check_unchanged(folder: Path, now: RunConfig) -> None:
    """Raises ValueError, naming it, if anything that shapes the result is not as it was when the run in `folder` began."""
    before = read_config(folder)
    decays = now.settings["ppo"]["decay_learning_rate"]  # over all updates, so their number shapes the result too
    for part, free in _FREE.items():
        for name, old, new in provenance.differences(before["settings"].get(part), now.settings[part]):
            first = name.split(".")[0]
            if first not in free or (decays and (part, first) == ("loop", "updates")):
                full = f"{part}.{name}" if part != "command" else name
                raise ValueError(f"{full} was {old} in the run in {folder} and is {new} now; to resume, set it as it was.")
    for name, old in before["hashes"].items():
        if old != now.hashes.get(name):
            raise ValueError(f"The {name} of the run in {folder} had the hash {old} and has {now.hashes.get(name)} now; to resume, "
                             "give the same.")  # fmt: skip
