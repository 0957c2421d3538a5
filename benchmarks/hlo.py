"""Bytes and collectives of a compiled program, read from its text, with every loop at full length.

XLA's own `cost_analysis` takes the body of a loop once, and there is none for a GPU.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable

_SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "token": 0}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# They move nothing in memory: names for parts of other results, or the end of what -start began.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "domain"),
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


@dataclasses.dataclass
class Cost:
    """What one device does in one run of a program."""

    bytes: float = 0.0  # read and written in its main memory
    collectives: Counter = dataclasses.field(default_factory=Counter)  # kind -> how many
    payload: Counter = dataclasses.field(default_factory=Counter)  # kind -> bytes

    def add(self, other: "Cost", times: int = 1) -> None:
        """Add what another part of the program does, `times` over."""
        self.bytes += times * other.bytes
        for mine, more in (
            (self.collectives, other.collectives),
            (self.payload, other.payload),
        ):
            for kind, number in more.items():
                mine[kind] += times * number


def cost(text: str) -> Cost:
    """Return the cost of a compiled program, from its text (`compiled.as_text()`).

    Every scheduled instruction reads its operands and writes its result; a fusion that only slices
    an operand reads the slice, one that updates a slice in place writes the slice. What a TPU keeps
    in its vector memory (`S(1)`) does not count, and neither do a GPU's caches.
    """
    computations, entry = _parse(text)
    return _Counter(computations).of(entry)


class _Counter:
    def __init__(self, computations: dict[str, dict[str, Instruction]]):
        self._computations = computations
        self._done: dict[str, Cost] = {}

    def of(self, name: str) -> Cost:
        if name not in self._done:
            total = Cost()
            for one in self._computations[name].values():
                total.add(self._instruction(one, self._computations[name]))
            self._done[name] = total
        return self._done[name]

    def _instruction(self, one: Instruction, scope: dict[str, Instruction]) -> Cost:
        found = Cost()
        if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
            return found
        if one.opcode == "while":
            found.add(self.of(_called(one, "body")[0]), _trips(one, self._computations))
            return found
        if one.opcode == "conditional":
            branches = [self.of(name) for name in _called(one, "branch_computations")]
            branches += [self.of(name) for name in _called(one, "(?:true|false)_computation")]
            return max(branches, key=lambda branch: branch.bytes)
        if one.opcode in ("call", "async-start"):
            found.add(self.of((_called(one, "to_apply") + _called(one, "calls"))[0]))
            return found
        kind = one.opcode.removesuffix("-start")
        operands = [scope[name] for name in one.operands if name in scope]
        if kind in _COLLECTIVES:
            size = max(_bytes(_result(one)), sum(_bytes(x.type) for x in operands))
            found.collectives[kind] += 1
            found.payload[kind] += size
        if one.opcode == "fusion":
            inside = self._computations[_called(one, "calls")[0]]
            found.bytes = _of_fusion(one, operands, inside)
            nested = self.of(_called(one, "calls")[0])  # a TPU hides collectives in fusions
            found.collectives, found.payload = nested.collectives.copy(), nested.payload.copy()
            return found
        found.bytes = _moved(one, operands)
        return found


def _moved(one: Instruction, operands: list[Instruction]) -> float:
    """Return the bytes that an instruction outside fusions reads and writes."""
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _bytes(one.type)
    if one.opcode == "dynamic-update-slice":
        return 2 * _bytes(operands[1].type)
    return _bytes(_result(one)) + sum(_bytes(x.type) for x in operands)


def _of_fusion(
    one: Instruction, operands: list[Instruction], inside: dict[str, Instruction]
) -> float:
    users: dict[str, list[Instruction]] = {}
    for instruction in inside.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    parameters = {int(x.attributes): x for x in inside.values() if x.opcode == "parameter"}
    total = sum(_written(x, inside) for x in _roots(inside))
    for number, operand in enumerate(operands):
        if _bytes(operand.type):
            total += min(_bytes(operand.type), _read(parameters[number], users))
    return total


def _roots(inside: dict[str, Instruction]) -> list[Instruction]:
    root = next(x for x in inside.values() if x.is_root)
    return [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]


def _written(root: Instruction, inside: dict[str, Instruction]) -> float:
    while root.opcode in ("bitcast", "copy") and root.operands:
        root = inside[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return _bytes(inside[root.operands[1]].type)
    return _bytes(root.type)


def _read(value: Instruction, users: dict[str, list[Instruction]]) -> float:
    """Return the bytes that a fusion reads of one of its operands."""
    total = 0.0
    for user in users.get(value.name, []):
        if user.opcode == "bitcast":
            total += _read(user, users)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
            total += _bytes(user.type)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # updated where it is
        else:
            return math.inf
    return total


def _trips(one: Instruction, computations: dict[str, dict[str, Instruction]]) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.attributes)
    if known:
        return int(known[1])
    condition = computations[_called(one, "condition")[0]].values()
    limits = [int(x.attributes) for x in condition if x.opcode == "constant"
              and x.type.startswith("s32[]")]  # fmt: skip
    return max(limits, default=1)


def _called(one: Instruction, attribute: str) -> list[str]:
    found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.-]+)", one.attributes)
    return [] if found is None else re.findall(r"[\w.-]+", found[1])


def _result(one: Instruction) -> str:
    """Return the type of what an instruction computes: not its workspace, not its operands."""
    if one.opcode == "custom-call":
        return re.sub(r"\bs8\[\d+\]\{0[^}]*\}", "", one.type)
    if one.opcode.endswith("-start") and one.type.startswith("("):
        shapes = [match[0] for match in _SHAPE.finditer(one.type)]
        return shapes[1] if len(shapes) > 1 else one.type
    return one.type


def _bytes(type_: str) -> float:
    """Return the bytes of a type in a device's main memory."""
    total = 0.0
    for dtype, sizes, layout in _SHAPE.findall(type_):
        if "S(1)" in layout:
            continue
        digits = re.search(r"\d+", dtype)
        width = _SIZES.get(dtype, int(digits[0]) / 8 if digits else 4)
        total += width * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Return the computations by name, and the name of the one that runs."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if header and not line.startswith((" ", "HloModule")):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and " = " in line and line.startswith(" "):
            one = _instruction(line.strip())
            current[one.name] = one
    if not entry:
        raise ValueError("the text of a compiled program has an ENTRY computation; this has none")
    return computations, entry


def _instruction(line: str) -> Instruction:
    is_root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closed(rest) if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].strip()
    opcode, _, _ = rest.partition("(")
    end = _closed(rest[len(opcode) :]) + len(opcode)
    inner = rest[len(opcode) + 1 : end - 1]
    is_plain = opcode in ("parameter", "constant")
    operands = () if is_plain else tuple(re.findall(r"%([\w.-]+)", inner))
    attributes = inner if is_plain else rest[end:]
    return Instruction(name.lstrip("%"), type_, opcode, operands, attributes, is_root)


def _closed(text: str) -> int:
    """Return where the parenthesis that `text` starts with is closed."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    return len(text)


def count(text: str) -> Counter[str]:
    """Count the collectives in the text of a compiled program; those of a loop's body once.

    A TPU's program writes one that runs beside other work several times, with the same channel.
    """
    pattern = rf"= .*? ({'|'.join(_COLLECTIVES)})(?:-start)?\(.*?channel_id=(\d+)"
    return Counter(kind for kind, _ in {*re.findall(pattern, text)})


def compare(found: Cost, floor: Cost) -> dict[str, int]:
    """Return the collectives that a program has beyond another one's, by kind."""
    more = found.collectives.copy()
    more.subtract(floor.collectives)
    return {kind: number for kind, number in sorted(more.items()) if number}


def listed(
    counts: Iterable[tuple[str, float]], number: Callable[[float], str] = lambda x: f"{x:.0f}"
) -> str:
    """Return "2 all-gather, 1 all-reduce"."""
    return ", ".join(f"{number(n)} {kind}" for kind, n in sorted(counts)) or "-"
