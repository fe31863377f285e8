"""Add up what one call of a compiled program costs a device, inside and outside loops."""

import re
from collections import Counter
from functools import partial
from typing import NamedTuple

from flax.struct import PyTreeNode

from ppo_jax.plan import hlo, traffic
from ppo_jax.plan.topology import Chip

_CHANNEL = re.compile(r"channel_id=(\d+)")


class Collective(PyTreeNode):
    """All collective operations of one kind.

    Attributes:
      count: how many of them run.
      bytes: sum of their sizes. The size of one is that of its result or of its operands, whichever
        is larger.

    Example:
      >>> Collective(count=2, bytes=44).bytes
      44
    """

    count: int
    bytes: int


class Costs(NamedTuple):
    """What a part of a program costs one device.

    Attributes:
      collectives: the collective operations by kind, such as `all-reduce`.
      bytes: bytes that operations read from and write to main memory.
      cycles: the TPU compiler's estimate of clock cycles; 0 from other compilers.
      compute_s: seconds without collectives. An operation takes its cycles or the time to move its
        bytes, whichever is longer.
      collective_s: seconds of the collectives at the published rate of the chip's links, if
        nothing else happens meanwhile.
    """

    collectives: dict[str, Collective]
    bytes: int
    cycles: int
    compute_s: float
    collective_s: float

    @property
    def seconds(self) -> float:
        """Seconds with collectives."""
        return self.compute_s + self.collective_s


class Account(NamedTuple):
    """What one call of a program costs one device.

    Attributes:
      total: the whole program.
      loops: the part of it in loops.
      steps: the part of it in loops whose scope is named after their number of iterations.
      step_count: the number of these iterations.
    """

    total: Costs
    loops: Costs
    steps: Costs
    step_count: int


def account(text: str, chip: Chip) -> Account:
    """Add up the costs of one call of a compiled program.

    A loop that may end early is counted as if it made all of its iterations.

    Args:
      text: the HLO text of the program, from `compiled.as_text()`.
      chip: what the device offers.

    Returns:
      The costs for one device.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ppo_jax.plan.topology import CHIPS
      >>> step = lambda x, _: (x @ x, None)
      >>> loop = jax.jit(lambda x: jax.lax.scan(step, x, length=5)[0])
      >>> text = loop.lower(jnp.ones((8, 8))).compile().as_text()
      >>> account(text, CHIPS["v5e"]).total.collectives
      {}
    """
    module = hlo.parse(text)
    runs, fused, step_count = hlo.count_runs(module)
    costs = partial(_costs, module, fused, chip)
    return Account(
        total=costs({name: x.total for name, x in runs.items()}),
        loops=costs({name: x.in_loops for name, x in runs.items()}),
        steps=costs({name: x.in_steps for name, x in runs.items()}),
        step_count=step_count,
    )


def _costs(module: hlo.Module, fused: set[str], chip: Chip, runs: dict[str, int]) -> Costs:
    """Add up the costs of all operations; `runs` says how often each computation runs."""
    moved = cycles = 0
    seconds = 0.0
    for name in module.computations.keys() - fused:
        if not (count := runs.get(name, 0)):
            continue
        for x in module.computations[name]:
            size = traffic.traffic(module, x)
            moved += count * size
            cycles += count * x.cycles
            # The links move the bytes of a collective, in the time that is counted for them.
            size = 0 if traffic.COLLECTIVE.fullmatch(x.opcode) else size
            seconds += count * operation_seconds(x, size, chip)
    found = _collectives(module, fused, runs)
    return Costs(found, moved, cycles, seconds, collective_seconds(found, chip))


def operation_seconds(x: hlo.Instruction, size: int, chip: Chip) -> float:
    """Return the time of an operation that moves `size` bytes: of its cycles or its bytes."""
    return max(x.cycles / (chip.clock * 1e9), size / (chip.bandwidth * 1e9))


def collective_seconds(collectives: dict[str, Collective], chip: Chip) -> float:
    """Return the time of collectives at the published rate of all links of a chip.

    An all-reduce sends everything twice, as a reduce-scatter and an all-gather.
    """
    twice = lambda kind: 2 if kind == "all-reduce" else 1
    sent = sum(twice(kind) * x.bytes for kind, x in collectives.items())
    return sent / (chip.link * 1e9)


def _collectives(
    module: hlo.Module, fused: set[str], runs: dict[str, int]
) -> dict[str, Collective]:
    """Count the collective operations by kind."""
    found: dict[tuple[str, str, int], int] = {}
    for name, instructions in module.computations.items():
        for x in instructions:
            if not (match := traffic.COLLECTIVE.fullmatch(x.opcode)) or not (
                count := runs.get(name, 0)
            ):
                continue
            kind, start = match.groups()
            operands = (module.by_name[y].type for y in x.operands if y in module.by_name)
            read, written = sum(map(traffic.size, operands)), traffic.size(x.type)
            if start and kind != "all-reduce":  # the type of its result names its operands too
                written -= read
            # XLA splits an operation over several fusions to overlap it with computation. It then
            # appears in each of them, on a channel of its own, and counts once.
            channel = _CHANNEL.search(x.rest) if name in fused else None
            key = (channel.group() if channel else x.name, kind, max(read, written))
            found[key] = max(count, found.get(key, 0))
    counts, sizes = Counter[str](), Counter[str]()
    for (_, kind, size), count in found.items():
        counts[kind] += count
        sizes[kind] += count * size
    return {kind: Collective(counts[kind], sizes[kind]) for kind in counts}
