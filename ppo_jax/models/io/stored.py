"""A model as it is stored, in a folder, a snapshot of the hub or a GGUF file: its `config.json`, and its tensors by name."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_jax.models.io import gguf_format, weights
from ppo_jax.models.io.families import family_of
from ppo_jax.models.io.family import Family

_SECOND_COPIES = ("consolidated*", "*/*")  # of the weights, in other formats
_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")


def resolve(model: str | Path, files: tuple[str, ...] = _FILES) -> Path:
    """A local folder as it is, else the snapshot of a Hugging Face id, of these files.

    Raises:
      ValueError: if there is neither.
    """
    if Path(model).is_dir():
        if (
            not (Path(model) / "config.json").is_file()
            or not (Path(model) / "model" / "config.json").is_file()
        ):
            return Path(model)
        raise ValueError(f"{model} is the folder of a run; its model is {Path(model) / 'model'}.")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(model), allow_patterns=files, ignore_patterns=_SECOND_COPIES
            )
        )
    except (
        Exception
    ) as error:  # the hub raises many kinds; each means that there is no such model to be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{str(model)!r} is no folder here, nor a model that the hub gives: {reason}"
        ) from error


def read(model: str | Path) -> tuple[Path, dict[str, Any], Mapping[str, Any]]:
    """Where a model is, its `config.json` and its tensors, each read when it is asked for."""
    if gguf_format.is_gguf(model):
        return Path(model), *gguf_format.read(Path(model))
    folder = resolve(model)
    hf = _config_in(folder)  # before the tensors, so that a family that is unknown is named
    return folder, hf, weights.StoredTensors(folder)


def _config_in(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(
            f"{folder} holds no config.json, so it is no model in the Hugging Face format."
        )
    hf = read_json(file)
    family_of(hf.get("model_type"))
    return hf


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object.")
    return content


def read_config(model: str | Path) -> dict[str, Any]:
    """The `config.json` of a model, or what a .gguf file says in its place; weights need not be there.

    Raises:
      ValueError: if there is none, or its family is not known.
    """
    return (
        gguf_format.read(Path(model))[0]
        if gguf_format.is_gguf(model)
        else _config_in(resolve(model, ("config.json",)))
    )


def named(stored: Mapping[str, Any], rules: list[weights.Rule], family: Family) -> "_Renamed":
    """The stored tensors by the names of the table, without those that are no parameters."""
    known = {rule.stored for rule in rules}
    today = {name: re.sub(r"\.(gamma|beta)$", _of_norms, name) for name in stored}
    names = {
        new if new in known or family.prefix + new not in known else family.prefix + new: name
        for name, new in today.items()
    }
    if len(names) < len(stored):
        raise ValueError(
            f"One parameter is stored under two names: {', '.join(sorted(set(stored) - set(names.values())))} is one."
        )
    return _Renamed(
        stored, {new: old for new, old in names.items() if not family.ignored.fullmatch(old)}
    )


def _of_norms(match: re.Match) -> str:
    """What files converted from TensorFlow call gamma and beta."""
    return {"gamma": ".weight", "beta": ".bias"}[match.group(1)]


class _Renamed(dict):
    """Tensors under new names, read when they are asked for."""

    def __init__(self, stored: Mapping[str, Any], names: dict[str, str]):
        super().__init__(names)
        self._stored = stored

    def __getitem__(self, name: str) -> Any:
        return self._stored[super().__getitem__(name)]

    def pop(self, name: str) -> Any:
        return self._stored[super().pop(name)]
