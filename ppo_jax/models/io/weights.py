"""Weights between the Hugging Face format and ours, by a table that covers every tensor or names what it does not.

A family's table is a list of `Rule`s; names hold `{i}` where they repeat for each layer. Only safetensors is read or written.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from ppo_jax.sharding import put
from ppo_jax.types import Params

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 2**30  # of a file; larger models are split


@dataclasses.dataclass(frozen=True)
class Rule:
    """One stored tensor and the parameters that it holds.

    Attributes:
      stored: the name in the file, e.g. `transformer.h.{i}.attn.c_attn.weight`.
      ours: path(s) in our tree, `/` between levels; several lie side by side on the last axis of the tensor, transposed if it is.
      transpose: the stored matrix is `(out, in)`, ours `(in, out)`.
      heads: several lie side by side within each of so many heads instead.
    """

    stored: str
    ours: tuple[str, ...]
    transpose: bool = False
    heads: int = 1

    def at(self, layer: int) -> "Rule":
        ours = tuple(path.format(i=layer) for path in self.ours)
        return dataclasses.replace(self, stored=self.stored.format(i=layer), ours=ours)

    def load(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Our parameters of the stored tensor."""
        tensor = tensor.T if self.transpose else tensor
        if len(self.ours) == 1:
            return {self.ours[0]: tensor}
        parts = np.split(
            tensor.reshape(*tensor.shape[:-1], self.heads, -1), len(self.ours), axis=-1
        )
        return {
            path: part.reshape(*part.shape[:-2], -1)
            for path, part in zip(self.ours, parts, strict=True)
        }

    def save(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """The stored tensor; the inverse of `load`."""
        parts = [np.asarray(params[path]) for path in self.ours]
        tensor = parts[0]
        if len(parts) > 1:
            tensor = np.concatenate(
                [part.reshape(*part.shape[:-1], self.heads, -1) for part in parts], axis=-1
            )
            tensor = tensor.reshape(*tensor.shape[:-2], -1)
        return np.ascontiguousarray(tensor.T if self.transpose else tensor)


def linear(
    stored: str, *ours: str, bias: bool = True, transpose: bool = True, heads: int = 1
) -> list[Rule]:
    """The rules of a linear layer; PyTorch's `Linear` is stored transposed."""
    rules = [Rule(f"{stored}.weight", tuple(f"{path}/kernel" for path in ours), transpose, heads)]
    return rules + (
        [Rule(f"{stored}.bias", tuple(f"{path}/bias" for path in ours), heads=heads)]
        if bias
        else []
    )


def norm(stored: str, ours: str, bias: bool = True) -> list[Rule]:
    """The rules of a norm, whose scale is called a weight."""
    return [Rule(f"{stored}.weight", (f"{ours}/scale",))] + (
        [Rule(f"{stored}.bias", (f"{ours}/bias",))] if bias else []
    )


def expand(rules: Iterable[Rule], layers: int) -> list[Rule]:
    """The rules of every layer."""
    return [rule.at(i) for rule in rules for i in (range(layers) if "{i}" in rule.stored else [0])]


def to_params(
    tensors: Mapping[str, np.ndarray], rules: Iterable[Rule], shapes: Params, *, source: str
) -> Params:
    """Our parameters, float32, of stored tensors, read one at a time.

    Args:
      tensors: stored arrays by name.
      rules: the expanded table.
      shapes: the tree that must result, of anything with a `shape`; where a leaf has a `sharding`, the parameter goes there.
      source: where the tensors are from, for messages.

    Raises:
      ValueError: naming every tensor that is missing, left over or of another shape.
    """
    rules = list(rules)
    want = flatten_dict(shapes, sep="/")
    missing = [rule.stored for rule in rules if rule.stored not in tensors]
    left_over = sorted(set(tensors) - {rule.stored for rule in rules})
    if missing or left_over:
        raise ValueError(
            f"{source} does not fit the model: missing tensors {missing}, left over {left_over}."
        )
    found, wrong = {}, []
    for rule in rules:
        tensor = np.asarray(tensors[rule.stored])
        try:
            parts = rule.load(tensor)
        except ValueError:
            parts = {
                path: tensor for path in rule.ours
            }  # cannot be split, so none has the right shape
        for path, part in parts.items():
            if part.shape != want[path].shape:
                wrong.append(f"{path} is {part.shape} in {rule.stored}, not {want[path].shape}")
            else:
                found[path] = put(part.astype(np.float32), getattr(want[path], "sharding", None))
    if wrong:
        raise ValueError(f"{source} holds tensors of the wrong shape: {'; '.join(wrong)}.")
    return unflatten_dict({path: found[path] for path in want}, sep="/")


def from_params(params: Params, rules: Iterable[Rule]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and stored tensors of our parameters; the inverse of `to_params`.

    Raises:
      ValueError: naming every parameter that the table leaves out.
    """
    flat = flatten_dict(params, sep="/")
    rules = list(rules)
    forgotten = sorted(set(flat) - {path for rule in rules for path in rule.ours})
    if forgotten:
        raise ValueError(f"The weight table has no rule for {forgotten}.")
    return ((rule.stored, rule.save(flat)) for rule in rules)


class StoredTensors(Mapping[str, np.ndarray]):
    """The tensors of a model folder, in one safetensors file or in shards; each is read when it is asked for.

    Raises:
      ValueError: if there are none, a file is damaged, or a tensor that is read holds whole numbers. Pickles are never opened.
    """

    def __init__(self, folder: Path):
        self._files = {}
        for file in _files(folder):
            try:
                opened = safe_open(file, framework="flax")  # knows bfloat16, which numpy does not
                self._files.update(dict.fromkeys(opened.keys(), opened))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is no readable safetensors file: {error}.") from error

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = np.asarray(self._files[name].get_tensor(name))
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(
                f"The tensor {name} is of {tensor.dtype}, as in a quantised model; save it in float32, 16 or bfloat16."
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _files(folder: Path) -> list[Path]:
    index, single = folder / _INDEX, folder / _SINGLE
    if single.exists():  # before the index, as `transformers` has it
        return [single]
    if index.exists():
        return [folder / name for name in _shards(index)]
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    )
    why = (
        f" ({', '.join(pickles)} is a pickle, which can run code; convert it to safetensors)"
        if pickles
        else ""
    )
    raise ValueError(f"{folder} holds no model.safetensors{why}.")


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        return sorted({Path(name).name for name in names})  # a name may not lead out of the folder
    except (ValueError, KeyError, AttributeError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"{index} is no index of safetensors files: {error}.") from error


def save_file(tensors: dict[str, np.ndarray], file: Path) -> None:
    """Writes one safetensors file, with the permissions that any new file gets."""
    file.unlink(missing_ok=True)
    file.touch()
    mode = file.stat().st_mode
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)  # of its own accord the library lets nobody but the owner read


@contextlib.contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Makes one ValueError, with the folder's name, of what a disk that is full, gone or read-only raises within."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be written: {error}.") from error


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes `model.safetensors`, or shards of up to `shard_bytes` and their index; one file's tensors are held at a time.

    What the folder held of a model before goes: its single file, or its index and the shards that this names.
    """
    shard, size, total = {}, 0, 0
    written: list[list[str]] = []  # names of the tensors of each file

    def write() -> None:
        save_file(shard, folder / f"{len(written)}.part")
        written.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            write()
            size = 0
        shard[name], size, total = tensor, size + tensor.nbytes, total + tensor.nbytes
    write()
    old, files = _stale(folder), [_SINGLE]
    if len(written) > 1:
        files = [f"model-{i + 1:05}-of-{len(written):05}.safetensors" for i in range(len(written))]
    for i, file in enumerate(files):
        (folder / f"{i}.part").replace(folder / file)
    if len(written) > 1:
        weight_map = {
            name: file for file, names in zip(files, written, strict=True) for name in names
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        files.append(_INDEX)
    for name in old - set(files):
        (folder / name).unlink(missing_ok=True)


def _stale(folder: Path) -> set[str]:
    """Names of the files that hold a folder's model."""
    try:
        shards = _shards(folder / _INDEX)
    except ValueError:  # there is no index, or none that names anything
        shards = []
    return {_SINGLE, _INDEX, *(name for name in shards if name.endswith(".safetensors"))}


def transposed(rule: Rule) -> Rule:
    """The rule with a stored tensor of `(out, in)`."""
    return dataclasses.replace(rule, transpose=True)
