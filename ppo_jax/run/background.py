"""Write checkpoints in a thread, from a copy of the arrays that the next update cannot change."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

_SHARE = 0.5  # largest share of the free memory that the copy may take


class Background:
    """Runs one call at a time in a thread, and raises its error at the next occasion.

    Example:
      >>> background = Background()
      >>> background.start(lambda: None)
      >>> background.wait()
      >>> background.close()
    """

    def __init__(self) -> None:
        """Start no thread yet."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    def start(self, call: Callable[[], None]) -> None:
        """Wait for the earlier call, raise its error if it had one, and start another call."""
        self.wait()
        self._pending = self._thread.submit(call)

    def wait(self) -> None:
        """Wait until nothing is running, and raise the error of the call that has ended."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread. A call that is running ends first."""
        self._thread.shutdown()


def host_copy(arrays: Any, *, free: int) -> Any | None:
    """Copy arrays to the host, so that they stay as they are when the originals are donated.

    Args:
      arrays: a pytree of arrays of a single process.
      free: bytes of free memory, as from `free_memory`.

    Returns:
      The tree with numpy arrays, or None if a copy would take more than half of the free memory.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(arrays))
    if size > _SHARE * free:
        return None

    def copy(x: Any) -> np.ndarray:
        # On the CPU, numpy shares the memory of an array; from other devices it is a copy already.
        shares = not isinstance(x, jax.Array) or any(d.platform == "cpu" for d in x.devices())
        return np.array(x, copy=True) if shares else jax.device_get(x)

    return jax.tree.map(copy, arrays)


def free_memory() -> int:
    """Return the bytes of memory that this process may still take; 0 if they are not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    sizes = dict(line.split(":") for line in lines)
    free = 1024 * int(sizes.get("MemAvailable", "0 kB").split()[0])
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # There are no limits, or they have another form.
        return free
    return free if limit == "max" else min(free, int(limit) - used)
