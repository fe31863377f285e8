"""Start several processes that run one program, let them exchange short texts, and stop them.

With one process, every function here does the obvious thing without communication.
"""

import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ppo_jax.errors import Fault, GradientError, NonFiniteError, RewardError, SettingError
from ppo_jax.hashing import text_hash

_FAULTS = {kind.kind: kind for kind in (RewardError, NonFiniteError, GradientError)}
_TEXT_BYTES = 2048  # `gather_text` sends multiples of this


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Several processes that train together, each with its own devices.

    What is not given is read from the environment variables JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. If they are not set either, there is one process.

    Example:
      >>> Processes().start()  # a single process has nothing to join
    """

    coordinator: str | None = None
    """Address of process 0, as HOST:PORT."""
    count: int | None = None
    """Number of processes."""
    index: int | None = None
    """Number of this process, counted from 0."""
    detect: bool = False
    """Ask the cluster for coordinator, count and index (Slurm, Open MPI, Kubernetes, Cloud TPU)."""
    lost_after_s: int = 30
    """Seconds without a sign of life after which a process counts as lost and the others stop."""
    join_within_s: int = 300
    """Seconds within which all processes must start; otherwise JAX aborts those that have."""

    def start(self) -> None:
        """Join the other processes; do nothing if there are none.

        Call this before JAX uses a device for the first time.

        Raises:
          SettingError: if some of coordinator, count and index are missing or malformed.
          ValueError: if the other processes cannot be reached.
        """
        address = self.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        count = _number(self.count, "JAX_NUM_PROCESSES")
        index = _number(self.index, "JAX_PROCESS_ID")
        named = (address, count, index)
        if not self.detect and named == (None, None, None):
            return
        if not self.detect and None in named:
            raise SettingError(
                "Several processes need coordinator, count and index, or detect; "
                f"they are {address}, {count}, {index}."
            )
        for name in ("lost_after_s", "join_within_s"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if address is not None:
            _check_address(address, listens=index == 0)
        try:
            jax.distributed.initialize(
                address,
                count,
                index,
                heartbeat_timeout_seconds=self.lost_after_s,
                initialization_timeout=self.join_within_s,
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"The processes cannot join each other: {reason}") from error


def _check_address(address: str, *, listens: bool) -> None:
    """Check that an address is HOST:PORT, and that process 0 can listen there.

    JAX would abort the process where it cannot listen.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise SettingError(f"coordinator must be HOST:PORT, not {address!r}.")
    if listens:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ValueError(
                f"Process 0 cannot listen on port {port}: {error.strerror}."
            ) from error


def _number(given: int | None, variable: str) -> int | None:
    """Return `given`, or else the number in an environment variable."""
    text = os.environ.get(variable)
    if given is not None or text is None:
        return given
    if not text.isdecimal():
        raise SettingError(f"{variable} must be a number, not {text!r}.")
    return int(text)


def is_first() -> bool:
    """Return whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Print a text in the first process only."""
    if is_first():
        print(text, flush=True)


def gather_text(text: str) -> list[str]:
    """Return the texts of all processes, in every process.

    All processes must call this together.

    Example:
      >>> gather_text("here")
      ['here']
    """
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(errors="surrogatepass"), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    # Sizes are rounded up, so that few programs are compiled.
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
    """Raise a fault of one process in all processes; None in all of them raises nothing.

    Raises:
      Fault: that of the first process that has one. With several processes it is a new object of
        the same class, whose message names the process.
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
      values: numpy arrays, or objects with a stable `repr`, by name.

    Raises:
      ValueError: in every process, naming the first value that is not the same.
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
    """Run `call` in the first process while the others wait for it.

    Raises:
      ValueError: in the other processes, with the message of what `call` raised. In the first
        process, the ValueError or OSError that `call` raised.
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
    """End this process without waiting for the others, as the interpreter's normal end would."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
