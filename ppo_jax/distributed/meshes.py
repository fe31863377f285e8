"""The only file that knows devices: the mesh, arrays onto it and back, the compiled steps of an iteration, several processes.

Every function works in one process and in many. In many, each runs the same program; each holds the rows of the batch that lie on
its devices (`rows_here`), and no number that shapes the result is known to one process alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ppo_jax.errors import SettingError
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.sharding import AXES


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of a mesh's axes.

    Raises:
      SettingError: if the text is not like the example.

    Example:
      >>> parse_mesh("data=2,fsdp=4")
      {'data': 2, 'fsdp': 4}
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise SettingError(
                f"mesh must be like data=2,fsdp=4, of the axes {', '.join(AXES)}, each once; not {text!r}."
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the given devices, by default all; what `sizes` leaves open is on `data`. One process may use fewer of them.

    Raises:
      SettingError: if the sizes do not fit the devices.

    Example:
      >>> dict(make_mesh({"fsdp": 1}, jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(sizes or {})
    rest = int(np.prod([size for name, size in sizes.items() if name != "data"], dtype=int))
    sizes.setdefault("data", max(1, len(devices) // rest))
    need = sizes["data"] * rest
    said = ",".join(f"{name}={sizes[name]}" for name in AXES if name in sizes)
    if need > len(devices) or (need < len(devices) and jax.process_count() > 1):
        raise SettingError(f"The mesh {said} needs {need} devices; there are {len(devices)}.")
    shape = tuple(sizes.get(name, 1) for name in AXES)
    try:
        return Mesh(lay_out(shape, devices[:need]), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    except (
        AssertionError,
        NotImplementedError,
        ValueError,
    ) as error:  # JAX asserts that a part of a TPU slice is a block
        block = isinstance(error, AssertionError)
        reason = (
            "in a TPU slice they must form a block" if block else f"{type(error).__name__}: {error}"
        )
        raise SettingError(
            f"The mesh {said} cannot be laid over {need} of {len(devices)} devices: {reason:.300}"
        ) from error


def lay_out(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices `[*shape]`, neighbours on the last axes the closest to each other. `jax.make_mesh` knows a single slice alone; here
    the first axes go over the slices of TPUs, or the hosts of GPUs, as far as their sizes allow.

    Raises:
      ValueError: if the shape does not divide by the slices, which must be of one size.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    outer, left = [], slices
    for size in shape:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    if left > 1:
        raise ValueError(f"its sizes do not divide by the number of slices or hosts, {slices}.")
    inner = [size // parts for size, parts in zip(shape, outer, strict=True)]
    if slices == 1:
        return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


def check_rows(config: PPOConfig, devices: int) -> None:
    """Raises SettingError, naming it, if a number of rows does not spread evenly over so many devices."""
    rows = {
        "batch_size": config.batch_size,
        "batch_size / minibatches": config.batch_size // config.minibatches,
        "micro_batch": config.rows_at_a_time,
        "rollout_rows": config.rollout_rows,
    }
    for name, count in rows.items():
        if count is not None and count % devices:
            raise SettingError(
                f"{name}={count} rows do not spread evenly over {devices} devices; change it, or the mesh."
            )


def devices_of_rows(mesh: Mesh | None) -> int:
    """Over how many devices the rows of a batch are spread."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
