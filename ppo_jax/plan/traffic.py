"""Count the bytes that an operation of a compiled program reads from and writes to main memory.

On a TPU, arrays lie in memory in tiles, whose padding is read and written too. An operation that
reads or updates a part of an array in place is counted with the tiles that it touches.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

from ppo_jax.plan.hlo import Instruction, Module

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (8, 16, 32, 64)
}
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")
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
}
COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all)(-start)?"
)
"""Operations that send data between devices."""

# Operations that read a part of their first operand.
_READS_PART = {"slice", "dynamic-slice", "gather"}
# Operations that change the order of elements only, and are not executed at the end of a fusion.
_SAME = {"bitcast", "reshape", "transpose"}


class Shape(NamedTuple):
    """An array in memory.

    Attributes:
      dtype: its type in HLO, such as `bf16`.
      sizes: the size of each dimension.
      layout: the layout in HLO, such as `1,0:T(8,128)S(1)`; empty for the default.
    """

    dtype: str
    sizes: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """The bytes of its elements."""
        return math.prod(self.sizes) * _BITS.get(self.dtype, 0) // 8

    @property
    def padded(self) -> int:
        """The bytes that it takes in memory: those of all its tiles."""
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        order = re.match(r"[\d,]+", self.layout)
        if not tile or not order or not self.sizes:
            return self.bytes
        sizes = [self.sizes[int(axis)] for axis in order.group().split(",")]
        tiles = [int(size) for size in reversed(tile.group(1).split(","))]
        tiles += [1] * (len(sizes) - len(tiles))
        full = math.prod(-(-n // t) * t for n, t in zip(sizes, tiles, strict=False))
        return full * _BITS.get(self.dtype, 0) // 8

    @property
    def in_main_memory(self) -> bool:
        """Whether it lies in main memory and not in the memory of the core."""
        space = re.search(r"S\((\d+)\)", self.layout)
        return space is None or space.group(1) == "0"


def shapes(kind: str) -> list[Shape]:
    """Return the arrays of a type, which is one array or a tuple."""
    return [
        Shape(dtype, tuple(int(size) for size in sizes.split(",") if size), layout)
        for dtype, sizes, layout in _ARRAY.findall(kind)
    ]


def size(kind: str) -> int:
    """Return the bytes of the elements of all arrays of a type."""
    return sum(shape.bytes for shape in shapes(kind))


def is_transfer(x: Instruction) -> bool:
    """Return whether an operation is a copy beside which the chip computes."""
    return x.opcode.endswith("-start")


def traffic(module: Module, x: Instruction) -> int:
    """Return the bytes that an operation reads from main memory and writes to it."""
    if x.opcode in _FREE or x.opcode.endswith("-done"):
        return 0
    operands = [_operand(module, name) for name in x.operands]
    if is_transfer(x):
        return _transferred(x, operands)
    if x.opcode == "fusion":
        return _fused(module, x, operands)
    if x.opcode in _READS_PART:
        read = [_part(operands[0], shapes(x.type)), *map(_moved, operands[1:])]
        return sum(read) + _moved(shapes(x.type))
    if x.opcode == "dynamic-update-slice":
        return 2 * _part(operands[0], operands[1]) + _moved(operands[1])
    return sum(map(_moved, operands)) + _moved(shapes(x.type))


def _operand(module: Module, name: str) -> list[Shape]:
    return shapes(module.by_name[name].type) if name in module.by_name else []


def _moved(arrays: list[Shape]) -> int:
    """Return the bytes of the arrays that lie in main memory."""
    return sum(x.padded for x in arrays if x.in_main_memory)


def _part(whole: list[Shape], part: list[Shape]) -> int:
    """Return the bytes that the tiles of a part take in an array in main memory."""
    if not whole or not part or not whole[0].in_main_memory:
        return 0
    if len(whole[0].sizes) != len(part[0].sizes):
        return part[0].padded
    return whole[0]._replace(sizes=part[0].sizes).padded


def _transferred(x: Instruction, operands: list[list[Shape]]) -> int:
    """Return the bytes of a copy between two memories, whose type names both of its ends."""
    ends, sources = shapes(x.type), [y for operand in operands for y in operand]
    if not sources or len(ends) <= len(sources):
        return 0
    # The type of a copy names its result first, and that of other operations their operands.
    result = ends[0] if x.opcode == "copy-start" else ends[len(sources)]
    return _part(sources[:1], [result]) + _moved([result])


def _fused(module: Module, x: Instruction, operands: list[list[Shape]]) -> int:
    """Return the bytes that a fusion reads and writes."""
    inside = module.computations.get(x.called.get("calls", [""])[0], [])
    users: dict[str, list[Instruction]] = defaultdict(list)
    for y in inside:
        for name in dict.fromkeys(y.operands):
            users[name].append(y)
    total = 0
    for y in inside:
        n = y.number if y.opcode == "parameter" else None
        if n is not None and n < len(operands):
            total += _read(module, y.name, operands[n], users)
    roots = [y for y in inside if y.root]
    if roots and roots[0].opcode == "tuple":
        roots = [module.by_name[name] for name in roots[0].operands if name in module.by_name]
    results = shapes(x.type)
    if len(roots) != len(results):
        return total + _moved(results)
    return total + sum(
        _written(module, y, result) for y, result in zip(roots, results, strict=True)
    )


def _read(
    module: Module, name: str, whole: list[Shape], users: dict[str, list[Instruction]]
) -> int:
    """Return the bytes that a fusion reads of one operand."""
    total = 0
    for user in users[name]:
        first = user.operands[0] == name and name not in user.operands[1:]
        if _passes_on(user):
            continue
        if first and user.opcode == "bitcast":
            total += _read(module, user.name, whole, users)
        elif first and user.opcode in _READS_PART:
            total += _part(whole, shapes(user.type))
        elif first and user.opcode == "dynamic-update-slice":
            total += _part(whole, _operand(module, user.operands[1]))
        else:
            return _moved(whole)
    return min(total, _moved(whole))


def _passes_on(x: Instruction) -> bool:
    """Return whether a part of a fusion leaves its operands to the fusion's result or the links."""
    return (x.opcode == "tuple" and x.root) or bool(COLLECTIVE.fullmatch(x.opcode))


def _written(module: Module, root: Instruction, result: Shape) -> int:
    """Return the bytes that a fusion writes of one result, which may be updated in place."""
    while root.opcode in _SAME and root.operands[0] in module.by_name:
        root = module.by_name[root.operands[0]]
    if root.opcode == "parameter" or _passes_on(root):
        return 0
    if root.opcode != "dynamic-update-slice":
        return _moved([result])
    return _part([result], _operand(module, root.operands[1]))
