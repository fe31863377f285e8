"""Count the communication and the memory traffic of a compiled program from its HLO text.

HLO is the language in which XLA prints a compiled program. XLA's own cost analysis counts the body
of a loop once, whereas this module counts it once for each iteration.

The format of the text is not a stable interface of XLA. Operations in an unknown format are not
counted.
"""

import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

from flax.struct import PyTreeNode

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (8, 16, 32, 64)
}
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"(calls|to_apply|condition|body|branch_computations)=(?:%([\w.-]+)|\{([^}]*)\})"
)
_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all)(-start)?"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAMED_TRIPS = re.compile(r'trips=(\d+)/while"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
# Operations that move no data themselves, because their outputs share memory with their inputs or
# because the computations that they call are counted instead.
_FREE = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "constant",
    "copy-done",
    "async-done",
}


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


class Account(NamedTuple):
    """What one device does in one call of a program.

    Attributes:
      collectives: the collective operations by kind, such as `all-reduce`.
      bytes: bytes that all operations read from and write to main memory. This is an upper bound,
        because an operation that reads a slice of an array is counted with the whole array.
      cycles: the TPU compiler's estimate of clock cycles; 0 from other compilers.
    """

    collectives: dict[str, Collective]
    bytes: int
    cycles: int


class _Instruction(NamedTuple):
    """One line of HLO, `%name = type opcode(rest`."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([\w.-]+)", self.rest.split(")")[0])


_Computations = dict[str, list[_Instruction]]


def account(text: str) -> Account:
    """Count the collectives, memory traffic and cycles of one call of a compiled program.

    A loop that may end early is counted as if it made all of its iterations.

    Args:
      text: the HLO text of the program, from `compiled.as_text()`.

    Returns:
      The counts for one device.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> step = lambda x, _: (x @ x, None)
      >>> loop = jax.jit(lambda x: jax.lax.scan(step, x, length=5)[0])
      >>> account(loop.lower(jnp.ones((8, 8))).compile().as_text()).collectives
      {}
    """
    computations, entry = _parse(text)
    runs, fused = _count_runs(computations, entry)
    types = {x.name: x.type for instructions in computations.values() for x in instructions}
    moved = cycles = 0
    for name in computations.keys() - fused:
        for x in computations[name]:
            if estimate := _CYCLES.search(x.rest):
                cycles += runs[name] * int(estimate.group(1))
            if x.opcode not in _FREE:
                moved += runs[name] * sum(_traffic(x, types, memory=0))
    return Account(_collectives(computations, runs, fused, types), moved, cycles)


def _parse(text: str) -> tuple[_Computations, str]:
    """Return the instructions of each computation, and the name of the entry computation."""
    computations: _Computations = {}
    entry, current = "", list[_Instruction]()
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head.group(2)] = []
            entry = head.group(2) if head.group(1) else entry
        elif match := _INSTRUCTION.match(line):
            current.append(_Instruction(*match.groups()))
    return computations, entry


def _count_runs(computations: _Computations, entry: str) -> tuple[dict[str, int], set[str]]:
    """Return how often each computation runs, and the computations that one operation fuses."""
    runs: dict[str, int] = defaultdict(int)
    fused: set[str] = set()

    def run(name: str, count: int) -> None:
        runs[name] += count
        for x in computations.get(name, ()):
            called = {
                role: re.findall(r"[\w.-]+", single or several)
                for role, single, several in _CALLED.findall(x.rest)
            }
            trips = 1
            if x.opcode == "while" and "condition" in called:
                named = _NAMED_TRIPS.search(x.rest)
                condition = computations.get(called["condition"][0], [])
                trips = int(named.group(1)) if named else _trips(condition)
            for role, names in called.items():
                if role in ("calls", "to_apply") and x.opcode != "call":
                    fused.update(names)
                for other in names:
                    run(other, count * trips)

    run(entry, 1)
    return runs, fused


def _trips(condition: list[_Instruction]) -> int:
    """Return the number of iterations of a loop, from its condition `counter < bound`.

    The loops of this package count from 0, so the result is the bound, or 1 if the condition has
    none. The scope of a decoding loop is named after the number instead.
    """
    constants = {
        x.name: int(x.rest.split(")")[0])
        for x in condition
        if x.opcode == "constant" and x.type.startswith("s32")
    }
    bounds = [
        constants[name]
        for x in condition
        if x.opcode == "compare" and "direction=LT" in x.rest
        for name in x.operands
        if name in constants
    ]
    return max(bounds or constants.values(), default=1)


def _collectives(
    computations: _Computations, runs: dict[str, int], fused: set[str], types: dict[str, str]
) -> dict[str, Collective]:
    """Count the collective operations by kind."""
    found: dict[tuple[str, str, int], int] = {}
    for name, instructions in computations.items():
        for x in instructions:
            if not (match := _COLLECTIVE.fullmatch(x.opcode)):
                continue
            kind, start = match.groups()
            read, written = _traffic(x, types)
            if start and kind != "all-reduce":  # the type of its result names its operands too
                written -= read
            # XLA splits an operation over several fusions to overlap it with computation. It then
            # appears in each of them, on a channel of its own, and counts once.
            channel = _CHANNEL.search(x.rest) if name in fused else None
            key = (channel.group() if channel else x.name, kind, max(read, written))
            found[key] = max(runs[name], found.get(key, 0))
    counts, sizes = Counter[str](), Counter[str]()
    for (_, kind, size), count in found.items():
        counts[kind] += count
        sizes[kind] += count * size
    return {kind: Collective(counts[kind], sizes[kind]) for kind in counts}


def _traffic(x: _Instruction, types: dict[str, str], memory: int | None = None) -> tuple[int, int]:
    """Return the bytes of the operands and of the result of an instruction."""
    read = sum(_bytes(types[name], memory) for name in x.operands if name in types)
    return read, _bytes(x.type, memory)


def _bytes(kind: str, memory: int | None = None) -> int:
    """Return the bytes of all arrays of a type, or of those in one memory space (0 is main)."""
    total = 0
    for name, shape, layout in _ARRAY.findall(kind):
        space = re.search(r"S\((\d+)\)", layout)
        if memory is None or (int(space.group(1)) if space else 0) == memory:
            size = math.prod(int(axis) for axis in shape.split(",") if axis)
            total += size * _BITS.get(name, 0) // 8
    return total
