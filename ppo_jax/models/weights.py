"""Weights between the Hugging Face format and ours, by a table that covers every tensor or names what it does not.

A family's table is a list of `Rule`s; names hold `{i}` where they repeat for each layer. Only safetensors is read or written.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ppo_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Rule:
    """One stored tensor and the parameters that it holds.

    Attributes:
      stored: the name in the file, e.g. `h.{i}.attn.c_attn.weight`.
      ours: path(s) in our tree, `/` between levels; several lie side by side on the last axis of the stored tensor.
      transpose: the stored matrix is `(out, in)`, ours `(in, out)`.
    """

    stored: str
    ours: tuple[str, ...]
    transpose: bool = False

    def at(self, layer: int) -> "Rule":
        return Rule(self.stored.format(i=layer), tuple(path.format(i=layer) for path in self.ours), self.transpose)


def expand(rules: Iterable[Rule], layers: int) -> list[Rule]:
    """The rules of every layer."""
    return [rule.at(i) for rule in rules for i in (range(layers) if "{i}" in rule.stored else [0])]


def to_params(tensors: Mapping[str, np.ndarray], rules: Iterable[Rule], shapes: Params, *, source: str) -> Params:
    """Our parameters, float32, of stored tensors.

    Args:
      tensors: stored arrays by name.
      rules: the expanded table.
      shapes: the tree that must result, of anything with a `shape`.
      source: where the tensors are from, for messages.

    Raises:
      ValueError: naming every tensor that is missing, left over or of another shape.
    """
    rules = list(rules)
    want = flatten_dict(shapes, sep="/")
    missing = [rule.stored for rule in rules if rule.stored not in tensors]
    left_over = sorted(set(tensors) - {rule.stored for rule in rules})
    if missing or left_over:
        raise ValueError(f"{source} does not fit the model: missing tensors {missing}, left over {left_over}.")
    found: dict[str, np.ndarray] = {}
    for rule in rules:
        tensor = np.asarray(tensors[rule.stored]).astype(np.float32)
        parts = np.split(tensor.T if rule.transpose else tensor, len(rule.ours), axis=-1)
        found.update(zip(rule.ours, parts, strict=True))
    wrong = [f"{path} is {found[path].shape}, not {want[path].shape}" for path in want if found[path].shape != want[path].shape]
    if wrong:
        raise ValueError(f"{source} holds tensors of the wrong shape: {'; '.join(wrong)}.")
    return unflatten_dict({path: jax.numpy.asarray(found[path]) for path in want}, sep="/")


def from_params(params: Params, rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """Stored tensors of our parameters; the inverse of `to_params`.

    Raises:
      ValueError: naming every parameter that the table leaves out.
    """
    flat = flatten_dict(params, sep="/")
    rules = list(rules)
    forgotten = sorted(set(flat) - {path for rule in rules for path in rule.ours})
    if forgotten:
        raise ValueError(f"The weight table has no rule for {forgotten}.")
    tensors = {}
    for rule in rules:
        tensor = np.concatenate([np.asarray(flat[path]) for path in rule.ours], axis=-1)
        tensors[rule.stored] = np.ascontiguousarray(tensor.T if rule.transpose else tensor)
    return tensors


def read_safetensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a model folder, in one file or in shards.

    Raises:
      ValueError: if there are none, or a file is damaged. Pickles are never opened.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    elif single.exists():
        files = [single]
    else:
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        why = f" ({', '.join(pickles)} is a pickle, which can run code; convert it to safetensors)" if pickles else ""
        raise ValueError(f"{folder} holds no model.safetensors{why}.")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as stored:
                tensors.update({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is no readable safetensors file: {error}.") from error
    return tensors


def write_safetensors(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
