"""Several processes that run one program: how they start, agree and end. With one process, every function is trivial."""

import dataclasses
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ppo_jax.errors import Fault, GradientError, NonFiniteError, RewardError, SettingError
from ppo_jax.hashing import text_hash

_FAULTS = {kind.kind: kind for kind in (RewardError, NonFiniteError, GradientError)}
_MESSAGE = 2048  # bytes that `told` carries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Several processes, each with its own devices; what is left out comes from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID."""

    coordinator: str | None = None
    """HOST:PORT where process 0 listens."""
    count: int | None = None
    """How many there are."""
    index: int | None = None
    """Number of this one, from 0."""
    detect: bool = False
    """Ask the cluster for all of it (Slurm, Open MPI, Kubernetes, Cloud TPU)."""
    lost_after_s: int = 30
    """Seconds of silence after which a process counts as dead, and the others end."""
    join_within_s: int = 300
    """Seconds within which all must have started, or JAX aborts those that have."""

    def start(self) -> None:
        """Joins the other processes, before the first use of a device; nothing, if no others are named.

        Raises:
          SettingError: if some of coordinator, count and index are missing.
          ValueError: if the others cannot be reached.
        """
        where = self.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        count = _number(self.count, "JAX_NUM_PROCESSES")
        index = _number(self.index, "JAX_PROCESS_ID")
        if not self.detect and where is None and count is None and index is None:
            return
        if not self.detect and None in (where, count, index):
            raise SettingError(
                f"Several processes need coordinator, count and index, or detect; here are {where}, {count}, {index}."
            )
        for name in ("lost_after_s", "join_within_s"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if where is not None:
            _check_place(where, listens=index == 0)
        limits = {
            "heartbeat_timeout_seconds": self.lost_after_s,
            "initialization_timeout": self.join_within_s,
        }
        try:
            jax.distributed.initialize(where, count, index, **limits)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"The processes do not come together: {str(error).splitlines()[0]}"
            ) from error


def _check_place(where: str, *, listens: bool) -> None:
    """Raises SettingError if it is no HOST:PORT, ValueError if process 0 cannot listen there, which JAX would not survive."""
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise SettingError(f"coordinator must be HOST:PORT, not {where!r}.")
    if listens:
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind(("", int(port)))
            except OSError as error:
                raise ValueError(
                    f"Process 0 cannot listen on port {port}: {error.strerror}."
                ) from error


def _number(given: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if given is not None or text is None:
        return given
    if not text.isdecimal():
        raise SettingError(f"{variable} must be a number, not {text!r}.")
    return int(text)


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints, in the first process."""
    if is_first():
        print(text, flush=True)


def told(text: str) -> list[str]:
    """What each process says, in all of them; cut to 2,048 bytes.

    Example:
      >>> told("here")
      ['here']
    """
    if jax.process_count() == 1:
        return [text]
    line = np.zeros(_MESSAGE, np.uint8)
    data = np.frombuffer(text.encode(errors="backslashreplace")[:_MESSAGE], np.uint8)
    line[: data.size] = data
    return [
        bytes(row).rstrip(b"\0").decode(errors="ignore")
        for row in multihost_utils.process_allgather(line)
    ]


def any_process(flag: bool) -> bool:
    """Whether it is so in any."""
    return "1" in told("1" if flag else "0")


def agree(fault: Fault | None) -> None:
    """Raises in every process the fault of the first that has one."""
    if jax.process_count() == 1:
        if fault is not None:
            raise fault
        return
    mine = "" if fault is None else _as_line(fault)
    for number, text in enumerate(told(mine)):
        if text:
            kind, rows, message = json.loads(text)
            raise _FAULTS[kind](f"In process {number}: {message}", tuple(rows)) from fault


def _as_line(fault: Fault) -> str:
    """A fault as JSON, with as much of its message as `told` carries."""
    message, line = str(fault), ""
    while not line or len(line.encode(errors="backslashreplace")) > _MESSAGE:
        line = json.dumps([fault.kind, list(fault.rows[:64]), message], ensure_ascii=False)
        message = message[: len(message) * 3 // 4]
    return line


def check_same(values: Mapping[str, Any]) -> None:
    """Raises ValueError in every process, naming it, if one has another value than the first."""
    names = sorted(values)
    said = told("".join(text_hash(name, values[name])[:6] for name in names))
    for number, marks in enumerate(said):
        if marks != said[0]:
            at = next(
                (
                    i
                    for i in range(len(names))
                    if marks[6 * i : 6 * i + 6] != said[0][6 * i : 6 * i + 6]
                ),
                0,
            )
            raise ValueError(
                f"{names[at]} is not the same in process {number} as in process 0; all need the same command and files."
            )


def first_does(call: Callable[[], Any]) -> None:
    """`call` in the first process while the others wait.

    Raises:
      ValueError: in all of them, with the message of that which the first raised.
    """
    message, error = "", None
    if is_first():
        try:
            call()
        except (ValueError, OSError) as raised:
            message, error = str(raised) or type(raised).__name__, raised
    message = told(message)[0]
    if message:
        raise (ValueError(message) if error is None else error)


def end(status: int) -> None:
    """Leaves at once: no waiting for the others, as one that fails would otherwise do at the interpreter's end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
