"""Read the text of a compiled program: its operations, and how often each of them runs.

HLO is the language in which XLA prints a compiled program. XLA's own cost analysis counts the body
of a loop once, whereas `count_runs` counts it once for each iteration.

The format of the text is not a stable interface of XLA. Operations in an unknown format are not
counted.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)")
_CALLED = re.compile(
    r"(calls|to_apply|condition|body|branch_computations)=(?:%([\w.-]+)|\{([^}]*)\})"
)
_NAMED_TRIPS = re.compile(r'trips=(\d+)/while"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Instruction(NamedTuple):
    """One line of HLO, `%name = type opcode(rest`.

    Attributes:
      name: its name, which no other instruction of the program has.
      type: shape and layout of the result.
      opcode: the operation.
      rest: the operands and attributes.
      root: whether its result is that of its computation.
    """

    name: str
    type: str
    opcode: str
    rest: str
    root: bool = False

    @property
    def operands(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([\w.-]+)", self.rest.split(")")[0])

    @property
    def called(self) -> dict[str, list[str]]:
        """The computations that it calls, by their role, such as `body`."""
        return {
            role: re.findall(r"[\w.-]+", single or several)
            for role, single, several in _CALLED.findall(self.rest)
        }

    @property
    def scope(self) -> str:
        """The names of the functions and scopes that it comes from; empty if unknown."""
        scope = re.search(r'op_name="([^"]*)"', self.rest)
        return scope.group(1) if scope else ""

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimate of clock cycles; 0 if there is none."""
        estimate = _CYCLES.search(self.rest)
        return int(estimate.group(1)) if estimate else 0

    @property
    def number(self) -> int | None:
        """The number of the parameter, or of the element that is read from a tuple."""
        pattern = r"(\d+)\)" if self.opcode == "parameter" else r".*\bindex=(\d+)"
        number = re.match(pattern, self.rest)
        return int(number.group(1)) if number else None


class Module(NamedTuple):
    """A compiled program.

    Attributes:
      computations: the instructions of each computation.
      entry: the name of the computation that runs first.
      by_name: every instruction by its name.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    by_name: dict[str, Instruction]


class Runs(NamedTuple):
    """How often a computation runs.

    Attributes:
      total: all its runs.
      in_loops: those inside a loop.
      in_steps: those inside a loop whose scope is named after its number of iterations.
    """

    total: int = 0
    in_loops: int = 0
    in_steps: int = 0


def parse(text: str) -> Module:
    """Read the text of a program, from `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", list[Instruction]()
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head.group(2)] = []
            entry = head.group(2) if head.group(1) else entry
        elif match := _INSTRUCTION.match(line):
            root, name, kind, opcode, rest = match.groups()
            current.append(Instruction(name, kind, opcode, rest, bool(root)))
    by_name = {x.name: x for instructions in computations.values() for x in instructions}
    return Module(computations, entry, by_name)


def count_runs(module: Module) -> tuple[dict[str, Runs], set[str], int]:
    """Count how often each computation runs in one call of the program.

    A loop that may end early is counted as if it made all of its iterations. Their number is the
    one that the loop's scope is named after, as in `jax.named_scope("trips=5")`, or follows from
    the condition `counter < bound`.

    Returns:
      The runs, the computations that one operation fuses, and the number of iterations of loops
      whose scope is named after it.
    """
    runs: dict[str, Runs] = defaultdict(Runs)
    fused: set[str] = set()
    steps = 0

    def run(name: str, count: int, in_loop: bool, in_step: bool) -> None:
        nonlocal steps
        before, more = runs[name], (count, count * in_loop, count * in_step)
        runs[name] = Runs(*(a + b for a, b in zip(before, more, strict=True)))
        for x in module.computations.get(name, ()):
            trips, looped, named = 1, in_loop, None
            if x.opcode == "while":
                looped, named = True, _NAMED_TRIPS.search(x.rest)
                trips = int(named.group(1)) if named else _trips(module, x)
                steps += count * trips if named and not in_step else 0
            for role, names in x.called.items():
                if role in ("calls", "to_apply") and x.opcode != "call":
                    fused.update(names)
                for other in names:
                    run(other, count * trips, looped, in_step or bool(named))

    run(module.entry, 1, in_loop=False, in_step=False)
    return runs, fused, steps


def _trips(module: Module, loop: Instruction) -> int:
    """Return the number of iterations of a loop, from its condition `counter < bound`.

    The counter starts from 0 and advances by 1 unless the program says otherwise. The result is 1
    if the condition has no bound.
    """
    condition = module.computations.get(loop.called.get("condition", [""])[0], [])
    values = ((x.name, _constant(x)) for x in condition)
    constants = {name: value for name, value in values if value is not None}
    bounds: list[int] = []
    for x in condition:
        if x.opcode != "compare" or "direction=LT" not in x.rest:
            continue
        for name in set(x.operands) & constants.keys():
            start, stride = _counter(module, loop, next((y for y in x.operands if y != name), ""))
            bounds.append(math.ceil((constants[name] - start) / stride))
    return max(bounds or constants.values(), default=1)


def _counter(module: Module, loop: Instruction, name: str) -> tuple[int, int]:
    """Return the first value and the stride of the element of a loop's state that `name` reads."""
    read, body = module.by_name.get(name), module.computations.get(loop.called["body"][0], [])
    number = read.number if read and read.opcode == "get-tuple-element" else None
    end = next((x for x in body if x.root and x.opcode == "tuple"), None)
    begin = module.by_name.get(loop.operands[0])
    if number is None or end is None or begin is None or begin.opcode != "tuple":
        return 0, 1
    first = _constant(module.by_name.get(begin.operands[number]))
    advance = module.by_name.get(end.operands[number])
    by = [_constant(module.by_name.get(x)) for x in advance.operands] if advance else []
    stride = next((x for x in by if x), None) if advance and advance.opcode == "add" else None
    return first or 0, stride or 1


def _constant(x: Instruction | None) -> int | None:
    """Return the value of an integer constant."""
    if x is None or x.opcode != "constant" or not re.match("[su]32", x.type):
        return None
    value = re.match(r"-?\d+", x.rest)
    return int(value.group()) if value else None
