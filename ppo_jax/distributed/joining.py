"""The options of a run of several processes, and the start of each."""

import os
import socket
from dataclasses import dataclass

from ppo_jax.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Several processes that train together, each with its own devices.

    If coordinator, count or index is None, it is read from the environment variable
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES or JAX_PROCESS_ID. If none of them is given in either
    way, there is one process.

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
          ValueError: if the processes cannot connect to one another.
        """
        address = self.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        count = _number(self.count, "JAX_NUM_PROCESSES")
        index = _number(self.index, "JAX_PROCESS_ID")
        named = (address, count, index)
        if not self.detect and named == (None, None, None):
            return
        if not self.detect and None in named:
            raise SettingError(
                "Several processes need coordinator, count and index, or detect, but "
                f"coordinator={address}, count={count} and index={index}."
            )
        for name in ("lost_after_s", "join_within_s"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if address is not None:
            _check_address(address, listens=index == 0)
        import jax  # Not at the top, so that the command line lists the options quickly.

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
    """Check that an address is HOST:PORT and, in process 0, that it can listen on this port.

    Without this check JAX would abort a process that cannot listen.
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
    """Return `given`, or the number in an environment variable if `given` is None."""
    text = os.environ.get(variable)
    if given is not None or text is None:
        return given
    if not text.isdecimal():
        raise SettingError(f"{variable} must be a number, not {text!r}.")
    return int(text)
