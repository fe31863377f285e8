"""Let several processes train together: join them, exchange texts between them, and end them.

All processes run the same program, and each has its own devices. If there is only one process, the
functions of this module return at once and communicate with nothing.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ppo_jax.distributed.joining import Processes as Processes
from ppo_jax.errors import Fault, GradientError, NonFiniteError, RewardError
from ppo_jax.hashing import text_hash

_FAULTS = {kind.kind: kind for kind in (RewardError, NonFiniteError, GradientError)}
_TEXT_BYTES = 2048  # `gather_text` pads every text to a multiple of this number of bytes.


def is_first() -> bool:
    """Return whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Print a text in the first process only."""
    if is_first():
        print(text, flush=True)


def gather_text(text: str) -> list[str]:
    """Return a list of the texts that all processes passed, in the order of the processes.

    Every process must call this function, and each gets the same list.

    Args:
      text: the text of this process, of any length.

    Example:
      >>> gather_text("here")
      ['here']
    """
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(errors="surrogatepass"), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    # The size is rounded up, because JAX compiles a program for each size that occurs.
    padding = _TEXT_BYTES * (1 + max(lengths) // _TEXT_BYTES) - len(data)
    rows = multihost_utils.process_allgather(np.pad(data, (0, padding)))
    return [
        bytes(row[:length]).decode(errors="surrogatepass")
        for row, length in zip(rows, lengths, strict=True)
    ]


def any_process(flag: bool) -> bool:
    """Return whether `flag` is True in any process."""
    return any(gather_text("yes" if flag else ""))


def raise_everywhere(fault: Fault | None) -> None:
    """Raise the fault of one process in all processes.

    Args:
      fault: the fault of this process, or None. If it is None in every process, nothing is raised.

    Raises:
      Fault: the fault of the first process that has one. If there are several processes, it is a
        new object of the same class, whose message names the process.
    """
    if jax.process_count() == 1:
        if fault is not None:
            raise fault
        return
    sent = "" if fault is None else json.dumps([fault.kind, fault.rows, str(fault)])
    for number, text in enumerate(gather_text(sent)):
        if text:
            kind, rows, message = json.loads(text)
            raise _FAULTS[kind](f"In process {number}: {message}", rows) from fault


def check_same(values: Mapping[str, Any]) -> None:
    """Check that all processes have the same values.

    Args:
      values: values by name. Each is a numpy array, or an object whose `repr` depends on nothing
        but its value.

    Raises:
      ValueError: in every process, if a value differs. The message names the first such value.
    """
    sent = json.dumps({name: text_hash(value) for name, value in values.items()}, sort_keys=True)
    first, *others = map(json.loads, gather_text(sent))
    for number, other in enumerate(others, 1):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"{name} is not the same in process {number} as in process 0; start all "
                    "processes with the same command and files."
                )


def on_first_process(call: Callable[[], Any]) -> None:
    """Call a function in the first process while the others wait until it has returned.

    Args:
      call: a function without arguments. Its result is not used.

    Raises:
      ValueError: if `call` raised a ValueError or OSError. The first process raises that error
        itself, and the others raise a ValueError with the same message.
    """
    message, error = "", None
    if is_first():
        try:
            call()
        except (ValueError, OSError) as raised:
            message, error = str(raised) or type(raised).__name__, raised
    message = gather_text(message)[0]
    if message:
        raise error or ValueError(message)


def exit_at_once(status: int) -> None:
    """End this process at once, whereas a normal exit of Python would wait for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
