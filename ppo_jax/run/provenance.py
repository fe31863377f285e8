"""Record what a result depends on: hashes of code and tokenizers, versions, devices and flags."""

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
# Settings of JAX on which numbers depend: random bits, widths of types and precision.
_NUMERICS = (
    "default_prng_impl",
    "threefry_partitionable",
    "enable_x64",
    "default_matmul_precision",
    "numpy_dtype_promotion",
)


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash all rules of a fast tokenizer, or the vocabulary of any other tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        has_vocabulary = hasattr(tokenizer, "get_vocab")
        return text_hash(sorted(tokenizer.get_vocab().items()) if has_vocabulary else None)
    rules = json.loads(backend.to_str())
    for name in ("truncation", "padding"):  # They depend on the last call of the tokenizer.
        rules.pop(name, None)
    return text_hash(rules, bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)))


def code_hash(thing: Any) -> str:
    """Hash a function or a callable object by its file, its name and the values that it holds.

    The values of a function are those in its closure, its defaults and, for a partial function, its
    arguments. The values of a named tuple, a dataclass or a callable object are its fields. The
    hash covers strings, numbers, arrays, functions and tuples of these. It does not cover lists and
    other mutable values, because they may change during a run. Code that is not in a file is hashed
    by its name only.

    Args:
      thing: the function or object.

    Returns:
      16 hexadecimal digits.
    """
    return text_hash(*_identity(thing, ()))


def _identity(thing: Any, parents: tuple[int, ...]) -> Iterator[str]:
    """Yield texts that identify `thing`; `parents` are the ids of the objects that hold it."""
    if id(thing) in parents:  # The object holds itself.
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
    """Return the versions, devices and flags of this process, in the types of JSON."""
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
    """Return the number of CPU cores of this process. XLA splits a sum into as many parts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def numerics() -> dict[str, Any]:
    """Return the settings of JAX on which the numbers of a result depend."""
    return {name: getattr(jax.config, f"jax_{name}") for name in _NUMERICS}


def make_deterministic() -> None:
    """Make XLA use GPU kernels that give the same bits every time.

    Call this before JAX uses a device for the first time; later it has no effect.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC_GPU not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC_GPU}".strip()


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the differences between two nested mappings.

    Args:
      a: a mapping, or a value in it.
      b: the other mapping, or the other value.
      path: text before every name, without the dot that follows it.

    Yields:
      For each difference, its name with dots between the levels, and both values. A value that is
      missing is None.

    Example:
      >>> list(differences({"ppo": {"lam": 1, "gamma": 1}}, {"ppo": {"lam": 0.9, "gamma": 1}}))
      [('ppo.lam', 1, 0.9)]
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in dict.fromkeys([*a, *b]):
            yield from differences(a.get(name), b.get(name), f"{path}.{name}" if path else name)
    elif a != b:
        yield path, a, b
