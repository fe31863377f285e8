"""What a compiled program does, read from its text: each loop's body counted as often as it runs, which XLA's own sums do not do.

The text is not a stable interface; what is not recognised counts nothing.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16} | {
    f"{kind}{n}": n for kind in "suf" for n in (8, 16, 32, 64)
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
_CHANNEL = re.compile(r"channel_id=(\d+)")
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


class Collective(NamedTuple):
    count: int
    bytes: int  # of the whole arrays that each leaves or, where it scatters, reads; summed


class Account(NamedTuple):
    """What one device does in one call of a program."""

    collectives: dict[str, Collective]  # by kind
    bytes: int  # read and written in main memory by each operation: a bound from above, since slices count their whole operand
    cycles: int  # the TPU compiler's own estimate of its operations, where it gives one


def account(text: str) -> Account:
    """Sums over the text of a compiled program (`compiled.as_text()`). A loop that may end early counts as if it did not.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> step = lambda x, _: (x @ x, None)
      >>> compiled = jax.jit(lambda x: jax.lax.scan(step, x, length=5)[0]).lower(jnp.ones((8, 8))).compile()
      >>> account(compiled.as_text()).collectives
      {}
    """
    computations, entry, types = _parse(text)
    times, fused = _times(computations, entry)
    found: dict[tuple, tuple[str, int, int]] = {}
    moved = cycles = 0
    for name, instructions in computations.items():
        for own, kind, opcode, rest in instructions:
            match = _COLLECTIVE.fullmatch(opcode)
            if match:
                read, left = sum(_bytes(t) for t in _operands(rest, types)), _bytes(kind)
                left -= (
                    read if match.group(2) and match.group(1) != "all-reduce" else 0
                )  # the start of one names what it reads too
                # One that is spread over several fusions, to run beside them, stands in each of them, on its own channel.
                channel = _CHANNEL.search(rest) if name in fused else None
                key = (channel.group(1), match.group(1), max(read, left)) if channel else (own,)
                found[key] = (
                    match.group(1),
                    max(read, left),
                    max(times[name], found.get(key, (0, 0, 0))[2]),
                )
            if name in fused:
                continue
            estimate = _CYCLES.search(rest)
            cycles += times[name] * int(estimate.group(1)) if estimate else 0
            if opcode not in _FREE:
                moved += times[name] * sum(
                    _bytes(t, memory=0) for t in (kind, *_operands(rest, types))
                )
    kinds = defaultdict(lambda: Collective(0, 0))
    for kind, size, count in found.values():
        kinds[kind] = Collective(kinds[kind].count + count, kinds[kind].bytes + count * size)
    return Account(dict(kinds), moved, cycles)


def _parse(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str, dict[str, str]]:
    """Instructions `(name, type, opcode, rest)` by computation; the entry's name; the type of each instruction."""
    computations, types, entry, current = {}, {}, "", []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations[head.group(2)] = []
            entry = head.group(2) if head.group(1) else entry
        elif match := _INSTRUCTION.match(line):
            current.append(match.groups())
            types[match.group(1)] = match.group(2)
    return computations, entry, types


def _times(computations: dict, entry: str) -> tuple[dict[str, int], set[str]]:
    """How often each computation runs, and those that are part of one operation."""
    calls = {name: [] for name in computations}
    fused = set()
    for name, instructions in computations.items():
        for _, _, opcode, rest in instructions:
            called = {
                role: re.findall(r"[\w.-]+", one or more)
                for role, one, more in _CALLED.findall(rest)
            }
            trips = (
                _trips(computations.get(called["condition"][0], []))
                if opcode == "while" and "condition" in called
                else 1
            )
            for role, names in called.items():
                calls[name] += [(other, trips) for other in names if other in computations]
                if role in ("calls", "to_apply") and opcode != "call":
                    fused.update(names)
    times = defaultdict(int)

    def run(name: str, count: int) -> None:
        times[name] += count
        for other, trips in calls[name]:
            run(other, count * trips)

    run(entry, 1)
    return times, fused


def _trips(condition: list[tuple[str, str, str, str]]) -> int:
    """The bound of `counter < bound` in a loop's condition; 1 if there is none. Ours count from 0, or from 1 in decoding."""
    whole = lambda kind, opcode: opcode == "constant" and kind.startswith("s32")
    constants = {
        name: int(rest.split(")")[0])
        for name, kind, opcode, rest in condition
        if whole(kind, opcode)
    }
    for _, _, opcode, rest in condition:
        if opcode == "compare" and "direction=LT" in rest:
            bounds = [
                constants[name]
                for name in re.findall(r"%([\w.-]+)", rest.split(")")[0])
                if name in constants
            ]
            if bounds:
                return max(bounds)
    return max(constants.values(), default=1)


def _operands(rest: str, types: dict[str, str]) -> list[str]:
    return [types[name] for name in re.findall(r"%([\w.-]+)", rest.split(")")[0]) if name in types]


def _bytes(kind: str, memory: int | None = None) -> int:
    """Of all arrays of a type, or of those in one memory space."""
    total = 0
    for name, shape, layout in _ARRAY.findall(kind):
        space = re.search(r"S\((\d+)\)", layout)
        if memory is None or (int(space.group(1)) if space else 0) == memory:
            total += (
                math.prod(int(size) for size in shape.split(",") if size) * _BITS.get(name, 0) // 8
            )
    return total
