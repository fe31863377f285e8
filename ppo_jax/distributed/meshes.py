"""Meshes of devices: read their sizes, build them, and check that a batch divides over them."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ppo_jax.errors import SettingError
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.sharding import AXES


def parse_mesh(text: str) -> dict[str, int]:
    """Read the sizes of a mesh's axes from a text.

    Args:
      text: axes and sizes such as `data=2,fsdp=4`. The axes are `data`, `fsdp` and `tensor`, and
        each may be left out.

    Returns:
      The sizes of the axes that the text names, as `make_mesh` takes them.

    Raises:
      SettingError: if the text has another form, an unknown axis, or an axis twice.

    Example:
      >>> parse_mesh("data=2,fsdp=4")
      {'data': 2, 'fsdp': 4}
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise SettingError(
                f"mesh must be like data=2,fsdp=4, with each once of the axes {', '.join(AXES)}; "
                f"it is {text!r}."
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(
    sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Build a mesh with the axes `data`, `fsdp` and `tensor`.

    Args:
      sizes: sizes of axes, as `parse_mesh` returns them. If `data` is missing, it takes the devices
        that the other axes leave; other missing axes have size 1.
      devices: the devices of the mesh; by default those of all processes. In one process the mesh
        may use fewer of them than there are.

    Returns:
      A mesh whose neighbouring devices on the last axes have the fastest connections.

    Raises:
      SettingError: if the sizes do not fit the devices.

    Example:
      >>> dict(make_mesh({"fsdp": 1}, jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(sizes or {})
    others = math.prod(size for name, size in sizes.items() if name != "data")
    sizes.setdefault("data", max(1, len(devices) // others))
    needed = sizes["data"] * others
    text = ",".join(f"{name}={sizes[name]}" for name in AXES if name in sizes)
    if needed > len(devices) or (needed < len(devices) and jax.process_count() > 1):
        raise SettingError(f"The mesh {text} needs {needed} devices; there are {len(devices)}.")
    shape = tuple(sizes.get(name, 1) for name in AXES)
    try:
        grid = arrange_devices(shape, devices[:needed])
    except (AssertionError, NotImplementedError, ValueError) as error:
        # For a part of a TPU slice that is not a block, JAX raises a bare AssertionError.
        block = "on a TPU slice they must form a block"
        reason = block if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        raise SettingError(
            f"The mesh {text} cannot be laid over {needed} of {len(devices)} devices: {reason:.300}"
        ) from error
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange_devices(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arrange devices in an array so that neighbours on the last axes are close to each other.

    `jax.make_mesh` handles a single slice only. Here the first axes go over the slices of TPUs, or
    the hosts of GPUs, as far as their sizes allow.

    Args:
      shape: sizes of the axes; their product is the number of devices.
      devices: the devices, in any order.

    Returns:
      The devices, `[*shape]`.

    Raises:
      ValueError: if the shape does not divide by the number of slices, or their sizes differ.
      AssertionError: if the devices are a part of a TPU slice but no block of it.
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


def check_rows(config: PPOConfig, shards: int) -> None:
    """Check that the batch, and every part of it, divides into `shards` equal shards.

    Raises:
      SettingError: naming the setting whose number of rows does not divide.
    """
    rows = {
        "batch_size": config.batch_size,
        "batch_size / minibatches": config.batch_size // config.minibatches,
        "micro_batch": config.rows_at_a_time,
        "rollout_rows": config.rollout_rows,
    }
    for name, count in rows.items():
        if count is not None and count % shards:
            raise SettingError(
                f"{name}={count} rows do not divide evenly over {shards} devices; "
                "change this setting or the mesh."
            )


def batch_shards(mesh: Mesh | None) -> int:
    """Return into how many shards the rows of a batch are split on `mesh`."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
