"""Describe slices of TPUs, so that programs can be compiled for them on any machine.

The compiler comes with the package `libtpu`, and no TPU is needed.
"""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax

from ppo_jax.errors import SettingError


class Chip(NamedTuple):
    """The memory and speed of one JAX device of a TPU slice.

    A device is a chip, except on v4, where each of the two cores of a chip is a device.

    Attributes:
      memory: memory that programs may use, in GiB, as the compiler reports it.
      peak: published peak rate of bfloat16 arithmetic, in TFLOP/s.
      clock: clock rate in GHz: the peak rate divided by the operations of one cycle.
      bandwidth: published bandwidth of the main memory, in GB/s.
      link: published bandwidth of all interchip links together, in GB/s in each direction.

    Example:
      >>> CHIPS["v5e"].memory
      15.75
    """

    memory: float
    peak: float
    clock: float
    bandwidth: float
    link: float


# Bandwidths are those of https://docs.cloud.google.com/tpu/docs/v5e and the pages beside it, where
# the interchip bandwidth of both directions is given. For v4 it is from an earlier version of
# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, which gives 2,400 Gb/s.
CHIPS = {
    "v4": Chip(15.25, 137.5, 1.05, 600, 150),
    "v5e": Chip(15.75, 197, 1.5, 819, 200),
    "v5p": Chip(95.74, 459, 1.75, 2765, 600),
    "v6e": Chip(31.25, 918, 1.75, 1638, 400),
}

# The default shape of each size: https://docs.cloud.google.com/tpu/docs/v5e and pages beside it.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    *("4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
)
# By the prefix of an accelerator type: the chip, its shapes, and how much a chip adds to the size.
_ACCELERATORS = {
    "v4": ("v4", _CUBIC, 2),
    "v5e": ("v5e", _FLAT, 1),
    "v5litepod": ("v5e", _FLAT, 1),
    "v5p": ("v5p", _CUBIC, 2),
    "v6e": ("v6e", _FLAT, 1),
}

# Without these environment variables, libtpu looks for TPUs that are attached to this machine.
_NO_TPU_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def slice_shape(name: str) -> str:
    """Return the kind of chip and the shape of a TPU slice, which may be named by its size.

    The sizes are those of Google Cloud's accelerator types, which count chips on v5e and v6e, and
    cores, of which a chip has two, on v4 and v5p.

    Args:
      name: an accelerator type such as `v5e-8`, or a chip and a shape such as `v5e:2x4`.

    Returns:
      The chip and the default shape of this size, or `name` if it has a shape already.

    Raises:
      SettingError: if no slice has this size.

    Example:
      >>> slice_shape("v5e-8"), slice_shape("v4-8"), slice_shape("v6e:4x4")
      ('v5e:2x4', 'v4:2x2x1', 'v6e:4x4')
    """
    kind, _, size = name.partition("-")
    if kind not in _ACCELERATORS or not size.isdecimal():
        return name
    chip, shapes, per_chip = _ACCELERATORS[kind]
    sizes = {per_chip * math.prod(map(int, shape.split("x"))): shape for shape in shapes}
    if int(size) not in sizes:
        raise SettingError(
            f"topology {name!r} has a size that {chip} does not come in: "
            f"{', '.join(map(str, sizes))}."
        )
    return f"{chip}:{sizes[int(size)]}"


def make_topology(name: str) -> list[jax.Device]:
    """Return the devices of a TPU slice, for which programs can be compiled but not run.

    Args:
      name: kind of chip (see `CHIPS`) and shape of the slice, such as `v5e:4x4`, or an accelerator
        type such as `v5e-8`.

    Returns:
      The devices, from which `make_mesh` makes a mesh.

    Raises:
      SettingError: if the name has another form, there is no such slice, or libtpu is missing.

    Example::

      mesh = make_mesh({"fsdp": 16}, make_topology("v5e:4x4"))
    """
    name = slice_shape(name)
    if name.partition(":")[0] not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)+", name):
        raise SettingError(
            f"topology must be like v5e:4x4 or v5e-16, with a chip of {', '.join(CHIPS)}; "
            f"it is {name!r}."
        )
    for variable, value in _NO_TPU_HOST.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    # By default the compiler gives each host a block of 2x2 chips.
    alone = {"chips_per_host_bounds": (1, 1, 1)} if name.endswith(":1x1") else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **alone)
        return list(found.devices)
    except Exception as error:  # JAX and libtpu raise several kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not importlib.util.find_spec("libtpu"):
            reason += " (libtpu comes with pip install 'ppo-jax[tpu-aot]')"
        raise SettingError(f"No compiler for {name}: {reason}") from error
