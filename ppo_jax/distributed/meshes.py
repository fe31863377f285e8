"""Build meshes of devices, read their sizes from a text, and check that a batch divides evenly."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ppo_jax.errors import SettingError
from ppo_jax.ppo.groups import check_groups
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.sharding import AXES

GROUPS = (*AXES, "rollout")
"""Names of the mesh axes, and of the group of devices that only sample."""


def parse_mesh(text: str, names: Sequence[str] = AXES) -> dict[str, int]:
    """Read the sizes of a mesh's axes from a text.

    Args:
      text: axes and sizes such as `data=2,fsdp=4`. Each axis may be left out.
      names: the names of the axes.

    Returns:
      The sizes of the axes that the text names, as `make_mesh` takes them.

    Raises:
      SettingError: if the text has another form, names an axis that does not exist, or names an
        axis twice.

    Example:
      >>> parse_mesh("data=2,fsdp=4")
      {'data': 2, 'fsdp': 4}
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in names or name in sizes or not size.isdecimal() or int(size) < 1:
            raise SettingError(
                f"mesh must be like data=2,fsdp=4, with the axes {', '.join(names)} each once at "
                f"most, but is {text!r}."
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(
    sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Build a mesh with the axes `data`, `fsdp` and `tensor`.

    Args:
      sizes: the size of each axis, as `parse_mesh` returns them. If `data` is missing, its size is
        the number of devices divided by the sizes of the other axes. Any other missing axis has
        size 1.
      devices: the devices of the mesh; by default those of all processes. A program of one process
        may have a mesh of fewer devices than it has.

    Returns:
      The mesh. Devices that are neighbours on its last axes have the fastest connections.

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


def make_meshes(sizes: Mapping[str, int]) -> tuple[Mesh, Mesh | None]:
    """Build the mesh of the devices that learn, and that of the devices that only sample.

    Args:
      sizes: the size of each axis, as in `make_mesh`. The size `rollout`, if there is one, is the
        number of devices that only sample; each has all parameters of the policy.

    Returns:
      The mesh that learns, and the mesh that samples, or None if the first one samples as well.

    Raises:
      SettingError: if the sizes do not fit the devices, or there are several processes.

    Example:
      >>> make_meshes({"data": 1})[1] is None
      True
    """
    others, count = {name: x for name, x in sizes.items() if name != "rollout"}, len(jax.devices())
    rollout = sizes.get("rollout", 0)
    if not rollout:
        return make_mesh(others), None
    if jax.process_count() > 1:
        raise SettingError(
            f"mesh with rollout={rollout} runs in one process; there are {jax.process_count()}."
        )
    if rollout >= count:
        raise SettingError(
            f"mesh with rollout={rollout} leaves no device to learn on; there are {count} devices."
        )
    learning, sampling = jax.devices()[:-rollout], jax.devices()[-rollout:]
    return make_mesh(others, learning), make_mesh({"data": rollout}, sampling)


def arrange_devices(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arrange devices in an array whose last axes connect devices that are close to each other.

    Devices of different TPU slices, or of different hosts of GPUs, are connected by a slower
    network. The first axes are laid over the slices or hosts as far as their sizes allow.
    `jax.make_mesh`, in contrast, supports a single slice only.

    Args:
      shape: sizes of the axes; their product is the number of devices.
      devices: the devices, in any order.

    Returns:
      The devices, `[*shape]`.

    Raises:
      ValueError: if the number of slices does not divide the shape, or if slices have different
        numbers of devices.
      AssertionError: if the devices are a part of a TPU slice that is not a rectangular block.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    outer, left = [], slices
    for size in shape:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    if left > 1:
        raise ValueError(f"its axis sizes cannot be divided among {slices} slices or hosts.")
    inner = [size // parts for size, parts in zip(shape, outer, strict=True)]
    if slices == 1:
        return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


def check_rows(config: PPOConfig, shards: int) -> None:
    """Check that the batch, and every part of it, divides into `shards` equal shards.

    Args:
      config: the settings, which give the numbers of rows.
      shards: number of devices that share the rows of a batch.

    Raises:
      SettingError: if a number of rows does not divide evenly (the message names it), or if the
        responses to one prompt would be split over devices.
    """
    rows = {
        "batch_size": config.batch_size,
        "batch_size / minibatches": config.batch_size // config.minibatches,
        "micro_batch": config.rows_at_a_time,
        "rollout_rows": config.rollout_rows,
        "rollout_slots": config.rollout_slots,
    }
    for name, count in rows.items():
        if count is not None and count % shards:
            raise SettingError(
                f"{name}={count} does not divide evenly over {shards} devices; "
                "change this setting or the mesh."
            )
    check_groups(config, config.batch_size // shards)


def check_sampled_rows(config: PPOConfig, mesh: Mesh) -> None:
    """Check that the rows that are sampled at a time divide over the devices of a mesh.

    Args:
      config: the settings, which give the numbers of rows.
      mesh: the mesh of the devices that sample.

    Raises:
      SettingError: if a number of rows does not divide evenly; the message names it.
    """
    for name in ("batch_size", "rollout_rows", "rollout_slots"):
        count, shards = getattr(config, name), batch_shards(mesh)
        if count is not None and count % shards:
            raise SettingError(
                f"{name}={count} does not divide evenly over the {shards} devices that sample; "
                "change this setting or rollout in the mesh."
            )


def batch_shards(mesh: Mesh | None) -> int:
    """Return the number of shards that the rows of a batch are split into on a mesh, or 1."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
