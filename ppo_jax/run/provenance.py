"""Where a result comes from: digests of parameters, data and code, what a run was made with, and where two of them differ."""

import dataclasses
import enum
import functools
import importlib.metadata
import inspect
import json
import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

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


def tokenizer_hash(tokenizer: Any) -> str:
    """Of all that a fast tokenizer does, cleaned-up spaces among it; of another, the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return text_hash(
            sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else None
        )
    rules = json.loads(backend.to_str())
    rules = {
        name: rule for name, rule in rules.items() if name not in ("truncation", "padding")
    }  # those are the last call's
    return text_hash(rules, bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)))


def code_hash(thing: Any) -> str | None:
    """Of a function, or of an object that is called: the file it is written in, its name, and the values that it holds.

    Values are those of a closure, of defaults, of a partial function's arguments, and the fields of named tuples, data classes and
    objects that are called: strings, numbers and tuples of them, arrays, and again functions. Lists and other things that change
    while a run goes on do not count; what is written without a file counts by its name alone.
    """
    return text_hash(*_held(thing, ()))


def _held(thing: Any, within: tuple[int, ...]) -> Iterator[str]:
    """What tells `thing` from others; one that holds itself counts once."""
    if id(thing) in within:
        return
    if isinstance(thing, str | int | float | None | enum.Enum | np.dtype):
        yield repr(thing)
    elif isinstance(thing, jax.Array | np.ndarray) or _is_tree(thing):
        yield digest(thing)
    elif hasattr(thing, "get_vocab"):
        yield tokenizer_hash(thing)
    elif callable(thing) or isinstance(thing, tuple) or dataclasses.is_dataclass(thing):
        thing = inspect.unwrap(thing)
        if not isinstance(thing, tuple | functools.partial):
            code = thing if inspect.isroutine(thing) or inspect.isclass(thing) else type(thing)
            yield f"{_file_hash(code)} {getattr(code, '__qualname__', None)}"
        for part in _parts(thing):
            yield from _held(part, (*within, id(thing)))


def _parts(thing: Any) -> Iterator[Any]:
    """The values that a function or an object holds."""
    items = lambda named: (x for item in sorted(named.items()) for x in item)
    if isinstance(thing, tuple):
        yield from thing
    elif isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *items(thing.keywords))
    elif inspect.ismethod(thing):
        yield from (thing.__self__, thing.__func__)
    elif inspect.isfunction(thing):
        yield from items(inspect.getclosurevars(thing).nonlocals)
        yield from (*(thing.__defaults__ or ()), *items(thing.__kwdefaults__ or {}))
    elif not inspect.isroutine(thing) and not inspect.isclass(thing):
        yield from items(getattr(thing, "__dict__", {}))


def _file_hash(code: Any) -> str | None:
    try:
        file = inspect.getsourcefile(code)
        return text_hash(np.fromfile(file, np.uint8)) if file else None
    except (TypeError, OSError):
        return None


def _is_tree(x: Any) -> bool:
    return isinstance(x, Mapping) and all(
        isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(x)
    )


def environment() -> dict[str, Any]:
    """Versions, devices and flags."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
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
    """Those that this process may use: sums are split among them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def numerics() -> dict[str, Any]:
    """JAX's own settings that change numbers: its random bits, the width of its types, the precision of its products."""
    names = (
        "jax_default_prng_impl",
        "jax_threefry_partitionable",
        "jax_enable_x64",
        "jax_default_matmul_precision",
        "jax_numpy_dtype_promotion",
    )
    return {name.removeprefix("jax_"): getattr(jax.config, name) for name in names}


def make_deterministic() -> None:
    """Asks XLA for GPU kernels that give the same bits every time; before the first use of a device."""
    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC_GPU not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC_GPU}".strip()


def differences(a: Any, b: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two nested mappings part: dotted name and both values.

    Example:
      >>> list(differences({"ppo": {"lam": 1, "gamma": 1}}, {"ppo": {"lam": 0.9, "gamma": 1}}))
      [('ppo.lam', 1, 0.9)]
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in dict.fromkeys([*a, *b]):
            yield from differences(a.get(name), b.get(name), f"{at}.{name}" if at else name)
    elif a != b:
        yield at, a, b
