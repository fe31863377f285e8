"""Where a result comes from: hashes of code and tokenizers, the environment, and differences."""

import dataclasses
import enum
import importlib.metadata
import inspect
import json
import os
import platform
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from ppo_jax.hashing import digest, text_hash

DETERMINISTIC_GPU = "--xla_gpu_deterministic_ops=true"
_PACKAGES = (
    "ppo-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "numpy",
)
# Settings of JAX that change numbers: its random bits, the width of its types, its precision.
_NUMERICS = (
    "default_prng_impl",
    "threefry_partitionable",
    "enable_x64",
    "default_matmul_precision",
    "numpy_dtype_promotion",
)


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of all rules of a fast tokenizer; of the vocabulary for any other tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        has_vocabulary = hasattr(tokenizer, "get_vocab")
        return text_hash(sorted(tokenizer.get_vocab().items()) if has_vocabulary else None)
    rules = json.loads(backend.to_str())
    for name in ("truncation", "padding"):  # these are left over from the last call
        rules.pop(name, None)
    return text_hash(rules, bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)))


def code_hash(thing: Any) -> str:
    """Hash of a function or a callable object: its file, its name and the values that it holds.

    The values are those of closures, defaults and arguments of partial functions, and the fields of
    named tuples, dataclasses and callable objects: strings, numbers, arrays, tuples of these, and
    functions again. Lists and other mutable values do not count, because they may change during a
    run. Code without a file counts by its name only.
    """
    return text_hash(*_identity(thing, ()))


def _identity(thing: Any, parents: tuple[int, ...]) -> Iterator[str]:
    """Yield texts that identify `thing`; `parents` are the ids of the objects that hold it."""
    if id(thing) in parents:  # it holds itself
        return
    if isinstance(thing, str | int | float | None | enum.Enum | np.dtype):
        yield repr(thing)
    elif isinstance(thing, Array | np.ndarray) or _is_tree(thing):
        yield digest(thing)
    elif hasattr(thing, "get_vocab"):
        yield tokenizer_hash(thing)
    elif callable(thing) or isinstance(thing, tuple) or dataclasses.is_dataclass(thing):
        thing = inspect.unwrap(thing)
        if not isinstance(thing, tuple | partial):
            code = thing if inspect.isroutine(thing) or inspect.isclass(thing) else type(thing)
            yield f"{_file_hash(code)} {getattr(code, '__qualname__', None)}"
        for part in _parts(thing):
            yield from _identity(part, (*parents, id(thing)))


def _parts(thing: Any) -> Iterator[Any]:
    """Yield the values that a function or an object holds."""
    if isinstance(thing, tuple):
        yield from thing
    elif isinstance(thing, partial):
        yield from (thing.func, *thing.args, *_flat(thing.keywords))
    elif inspect.ismethod(thing):
        yield from (thing.__self__, thing.__func__)
    elif inspect.isfunction(thing):
        yield from _flat(inspect.getclosurevars(thing).nonlocals)
        yield from (*(thing.__defaults__ or ()), *_flat(thing.__kwdefaults__ or {}))
    elif not inspect.isroutine(thing) and not inspect.isclass(thing):
        yield from _flat(getattr(thing, "__dict__", {}))


def _flat(named: Mapping[str, Any]) -> Iterator[Any]:
    """Yield names and values in the order of the names."""
    return (x for item in sorted(named.items()) for x in item)


def _file_hash(code: Any) -> str | None:
    try:
        file = inspect.getsourcefile(code)
        return text_hash(np.fromfile(file, np.uint8)) if file else None
    except (TypeError, OSError):
        return None


def _is_tree(x: Any) -> bool:
    leaves = jax.tree.leaves(x) if isinstance(x, Mapping) else [None]
    return all(isinstance(leaf, Array | np.ndarray) for leaf in leaves)


def environment() -> dict[str, Any]:
    """Versions, devices and flags of this process."""
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [f"{d.platform} {d.device_kind} {d.id}" for d in jax.devices()],
        "device_kinds": sorted({f"{d.platform} {d.device_kind}" for d in jax.devices()}),
        "cpu_cores": _cores() if jax.default_backend() == "cpu" else None,
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": versions,
    }


def _cores() -> int | None:
    """The number of CPU cores that this process may use; XLA splits sums among them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def numerics() -> dict[str, Any]:
    """The settings of JAX that change numbers."""
    return {name: getattr(jax.config, f"jax_{name}") for name in _NUMERICS}


def make_deterministic() -> None:
    """Asks XLA for GPU kernels that give the same bits every time.

    It has no effect once a device has been used.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC_GPU not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC_GPU}".strip()


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield where two nested mappings differ: the dotted name and both values.

    Example:
      >>> list(differences({"ppo": {"lam": 1, "gamma": 1}}, {"ppo": {"lam": 0.9, "gamma": 1}}))
      [('ppo.lam', 1, 0.9)]
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in dict.fromkeys([*a, *b]):
            yield from differences(a.get(name), b.get(name), f"{path}.{name}" if path else name)
    elif a != b:
        yield path, a, b
