"""Read the tensors of a model folder from safetensors files, and write them.

Pickled weights (`*.bin`, `*.pt`) are never opened, because unpickling can run code.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from ppo_jax.models.io.weights import TensorReader

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes, by their names in a safetensors file
SHARD_BYTES = 5 * 2**30  # Largest file; a larger model is written in several shards.


def open_tensors(folder: Path) -> dict[str, TensorReader]:
    """Return a reader for each tensor of a model folder, by name.

    A reader copies its tensor from the file to host memory. It makes no JAX array, so that a tensor
    goes to a device only once, when the caller puts it there. bfloat16 tensors have the dtype
    `ml_dtypes.bfloat16`. A reader raises ValueError if its tensor does not have a floating-point
    dtype.

    Args:
      folder: a folder with `model.safetensors`, or with shards and their index.

    Raises:
      ValueError: if the folder has no safetensors file, or a file is damaged.
    """
    readers: dict[str, TensorReader] = {}
    for file in _files(folder):
        try:
            opened = safe_open(file, framework="numpy")
            for name in opened.keys():  # noqa: SIM118 (it is not a dict)
                readers[name] = partial(_read, opened, name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}.") from error
    return readers


def _read(file: safe_open, name: str) -> np.ndarray:
    dtype = file.get_slice(name).get_dtype()
    if dtype not in _FLOATS:
        raise ValueError(
            f"The tensor {name} has dtype {dtype}, as in a quantised model; save the model in "
            "float32, float16 or bfloat16."
        )
    return file.get_tensor(name)


def _files(folder: Path) -> list[Path]:
    index, single = folder / _INDEX, folder / _SINGLE
    if single.exists():  # The single file has precedence over the index, as in `transformers`.
        return [single]
    if index.exists():
        return [folder / name for name in _shards(index)]
    pickles = [p.name for end in ("bin", "pt*") for p in sorted(folder.glob(f"*.{end}"))]
    hint = ""
    if pickles:
        hint = f", only {', '.join(pickles)}: a pickle can run code, so convert it to safetensors"
    raise ValueError(f"{folder} has no model.safetensors{hint}.")


def _shards(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text())["weight_map"].values()
        # Only the file names are used, so that an index cannot point outside the folder.
        return sorted({Path(name).name for name in names})
    except (ValueError, KeyError, AttributeError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error}.") from error


def save_file(tensors: dict[str, np.ndarray], file: Path) -> None:
    """Write one safetensors file, with the permissions of any new file."""
    file.unlink(missing_ok=True)
    file.touch()
    mode = file.stat().st_mode
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)  # The library makes the file readable by its owner only.


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Turn an error of the disk inside the context into a ValueError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be written: {error}.") from error


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `model.safetensors`, or shards and their index if there are over `shard_bytes` bytes.

    The weights of an earlier model in the folder are removed: its single file, or its index and
    the shards that the index names.

    Args:
      folder: the folder to write to.
      tensors: pairs of a name and a tensor. The tensors of one file are in memory at a time.
      shard_bytes: size at which a new file is started.
    """
    shard_of: dict[str, int] = {}  # The number of the shard of each tensor.
    count = total = 0
    for shard in _split(tensors, shard_bytes):
        save_file(shard, folder / f"{count}.part")
        shard_of |= dict.fromkeys(shard, count)
        count += 1
        total += sum(tensor.nbytes for tensor in shard.values())
        del shard  # Frees its tensors before the next ones are made.
    stale, files = _stale(folder), [_SINGLE]
    if count > 1:
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        (folder / f"{i}.part").replace(folder / file)
    if count > 1:
        weight_map = {name: files[i] for name, i in shard_of.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        files.append(_INDEX)
    for name in stale - set(files):
        (folder / name).unlink(missing_ok=True)


def _split(
    tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the tensors in dictionaries of up to `shard_bytes` bytes, or of one larger tensor."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _stale(folder: Path) -> set[str]:
    """Return the names of the files that may hold the folder's earlier model."""
    try:
        shards = _shards(folder / _INDEX)
    except ValueError:  # There is no index, or it is damaged.
        shards = []
    return {_SINGLE, _INDEX, *(name for name in shards if name.endswith(".safetensors"))}
