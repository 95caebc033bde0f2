"""What a compiled program's text (HLO) says of its time and its traffic.

The compiler notes its own estimate, in cycles, at every fusion; a loop's body is written once, so all that is in it
counts as often as the loop runs. Collectives have no estimate: they are counted, with their bytes.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b(pred|[subfc]\d+(?:e\d+m\d+\w*)?|bf16|token)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIPS = re.compile(r'"?known_trip_count"?:\{"n":"(\d+)"\}')
_CHILD = {key: re.compile(rf"\b{key}=%?([\w.\-]+)") for key in ("body", "condition", "calls", "to_apply")}
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CALLS = re.compile(r"\b(true_computation|false_computation)=%?([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    kind: str  # its result, "f32[8,128]" or a tuple of such
    opcode: str
    operands: str
    rest: str  # attributes

    @property
    def operand_names(self) -> list[str]:
        """Returns the operands' names; newer compilers write "x#2" for part 2 of a tuple."""
        return re.findall(r"%([\w.\-]+(?:#\d+)?)", self.operands) or re.findall(r"([\w.\-]+)(?:,|$)", self.operands)

    def child(self, key: str) -> str | None:
        found = _CHILD[key].search(self.rest)
        return found and found[1]


@dataclasses.dataclass(frozen=True)
class Collective:
    """All of one kind on arrays of one size: `count` a step, of `size` bytes on a device each."""

    kind: str
    size: int
    count: int

    @property
    def bytes(self) -> int:
        return self.count * self.size


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a module, by name, each a table of lines by the name of what they make."""

    computations: dict[str, dict[str, str]]
    roots: dict[str, str]
    entry: str

    @classmethod
    def of_text(cls, text: str) -> "Program":
        computations, roots, entry, lines = {}, {}, None, {}
        for line in text.splitlines():
            if line[:1] not in (" ", "}", "\t") and (head := _HEAD.match(line)):
                lines = computations[head[2]] = {}
                current = head[2]
                entry = current if head[1] else entry
            elif made := _NAME.match(line):
                lines[made[2]] = line
                if made[1]:
                    roots[current] = made[2]
        assert entry is not None, "no ENTRY: this is not the text of a compiled program"
        return cls(computations, roots, entry)

    def instruction(self, computation: str, name: str) -> Instruction:
        return parsed(self.computations[computation][name.partition("#")[0]])

    def cycles(self) -> int:
        """Returns the compiler's estimate of one run; 0 where it made none (on a CPU)."""
        return self._cycles(self.entry)

    def collectives(self) -> list[Collective]:
        """Returns what the devices say to each other in one run, the most bytes first."""
        counts: collections.Counter = collections.Counter()
        for times, kind, size in self._walk(self.entry, 1):
            counts[kind, size] += times
        found = [Collective(kind, size, count) for (kind, size), count in counts.items()]
        return sorted(found, key=lambda c: (-c.bytes, c.kind))

    def _cycles(self, computation: str) -> int:
        known = self.__dict__.setdefault("_known_cycles", {})  # bodies may be shared
        if computation not in known:
            known[computation] = sum(map(functools.partial(self._of_line, computation), self._lines(computation)))
        return known[computation]

    def _of_line(self, computation: str, line: str) -> int:
        noted = _CYCLES.search(line)
        own = int(noted[1]) if noted else 0
        instruction = parsed(line)
        if instruction.opcode == "while":
            return own + self.trips(computation, instruction) * self._cycles(instruction.child("body"))
        if instruction.opcode == "call":
            return own + self._cycles(instruction.child("to_apply"))
        if instruction.opcode == "conditional":  # the dearest branch: a plan is better too slow than too fast
            return own + max(map(self._cycles, branches(instruction)))
        return own

    def _walk(self, computation: str, times: int) -> Iterator[tuple[int, str, int]]:
        """Yields (how often, kind, bytes) of every collective below; async pairs count once, at their end."""
        for line in self._lines(computation):
            instruction = parsed(line)
            base = instruction.opcode.removesuffix("-done")
            if instruction.opcode == "while":
                rounds = times * self.trips(computation, instruction)
                yield from self._walk(instruction.child("body"), rounds)
            elif instruction.opcode == "conditional":
                for branch in branches(instruction):
                    yield from self._walk(branch, times)
            elif instruction.opcode == "call":
                yield from self._walk(instruction.child("to_apply"), times)
            elif instruction.opcode in ("fusion", "async-start"):
                inner = instruction.child("calls")
                if not self._goes_on(inner):
                    yield from self._walk(inner, times)
            elif base in COLLECTIVES:
                yield times, self._kind(computation, base), self._size(computation, instruction)

    def _lines(self, computation: str) -> Iterator[str]:
        """Yields the lines that may matter: most of a program is arithmetic inside fusions."""
        for line in self.computations[computation].values():
            if _RELEVANT.search(line):
                yield line

    def _goes_on(self, fused: str) -> bool:
        """Returns whether a fusion carries on or ends a collective that another one has begun: it names it again."""
        lines = self.computations[fused].values()
        return "async_collective_fusion" in fused or any('"AsyncCollectiveDone"' in line for line in lines)

    def _kind(self, computation: str, base: str) -> str:
        """Returns the word for what is done; a TPU scatters in a fusion of an all-reduce and a slice."""
        return "reduce-scatter" if base == "all-reduce" and computation.startswith("all-reduce-scatter") else base

    def _size(self, computation: str, instruction: Instruction) -> int:
        """Returns the bytes of what goes in or of what comes out, whichever is more."""
        begun = instruction
        if instruction.opcode.endswith("-done"):
            begun = self.instruction(computation, instruction.operand_names[0])
        return max(sum(self._bytes_of(computation, name) for name in begun.operand_names), bytes_of(instruction.kind))

    def _bytes_of(self, computation: str, name: str) -> int:
        """Returns the bytes of an operand, or of the part of a tuple that it is."""
        whole, _, part = name.partition("#")
        if whole not in self.computations[computation]:
            return 0
        kind = self.instruction(computation, whole).kind
        return bytes_of([match[0] for match in _ARRAY.finditer(kind)][int(part)] if part else kind)

    # --- how often a loop runs ---

    def trips(self, computation: str, loop: Instruction) -> int:
        """Returns how often a loop's body runs: what the compiler says, else what the condition compares with.

        The end of every loop of this package is a constant.
        """
        if noted := _TRIPS.search(loop.rest):
            return int(noted[1])
        condition, body = loop.child("condition"), loop.child("body")
        compare = self._comparison(condition)
        assert compare is not None, f"how often does {loop.name} run?"
        index, limit, direction = compare
        start = self._constant_in(computation, loop, index)
        step = self._step(body, index)
        last = limit + 1 if direction == "LE" else limit
        return max(0, math.ceil((last - start) / step)) if direction in ("LT", "LE", "NE") and step else 1

    def _comparison(self, condition: str) -> tuple[int, int, str] | None:
        """Returns (which part of the loop's state, its limit, direction) of `state[i] < constant`."""
        root = self.instruction(condition, self.roots[condition])
        resolve = functools.partial(self._resolved, condition)
        if root.opcode == "fusion":  # the comparison is inside, its parameters are the fusion's operands
            outer, inner = root.operand_names, root.child("calls")
            root = self.instruction(inner, self.roots[inner])
            resolve = functools.partial(self._resolved, inner, outer=(condition, outer))
        if root.opcode != "compare":
            return None
        left, right = (resolve(name) for name in root.operand_names)
        direction = re.search(r"direction=(\w+)", root.rest)[1]
        if left and right and left[0] == "state" and right[0] == "constant":
            return left[1], right[1], direction
        return None

    def _resolved(self, computation: str, name: str, outer: tuple | None = None) -> tuple[str, int] | None:
        """Returns ("constant", its value) or ("state", which part of the loop's state)."""
        found = self.instruction(computation, name)
        if found.opcode == "parameter" and "#" in name:
            return "state", int(name.partition("#")[2])
        if found.opcode == "constant":
            value = re.fullmatch(r"-?\d+", found.operands)
            return value and ("constant", int(value[0]))
        if found.opcode == "get-tuple-element":
            return "state", int(re.search(r"index=(\d+)", found.rest)[1])
        if found.opcode in ("copy", "bitcast", "convert"):
            return self._resolved(computation, found.operand_names[0], outer)
        if found.opcode == "parameter" and outer is not None:
            return self._resolved(outer[0], outer[1][int(found.operands)])
        return None

    def _constant_in(self, computation: str, loop: Instruction, index: int) -> int:
        """Returns what a part of a loop's state is at first; 0 where it cannot be seen."""
        state = self.instruction(computation, loop.operand_names[0])
        if state.opcode != "tuple":
            return 0
        value = self._resolved(computation, state.operand_names[index])
        return value[1] if value and value[0] == "constant" else 0

    def _step(self, body: str, index: int) -> int:
        """Returns by how much a part of the state grows in a round; 1 where it cannot be seen."""
        root = self.instruction(body, self.roots[body])
        if root.opcode != "tuple":
            return 1
        grown = self.instruction(body, root.operand_names[index])
        if grown.opcode == "fusion":
            inner, outer = grown.child("calls"), grown.operand_names
            grown, place = self.instruction(inner, self.roots[inner]), inner
            resolve: Callable = functools.partial(self._resolved, place, outer=(body, outer))
        else:
            resolve = functools.partial(self._resolved, body)
        if grown.opcode != "add":
            return 1
        values = [resolve(name) for name in grown.operand_names]
        return next((value[1] for value in values if value and value[0] == "constant"), 1)


_RELEVANT = re.compile(
    rf"estimated_cycles| (?:while|call|conditional|fusion|async-start|(?:{'|'.join(COLLECTIVES)})(?:-done)?)\("
)


def parsed(line: str) -> Instruction:
    """Returns the parts of a line `%name = kind opcode(operands), attributes`."""
    name = _NAME.match(line)
    rest = _COMMENT.sub("", line[name.end() :])
    end = _closing(rest) if rest.startswith("(") else rest.index(" ") - 1
    kind, rest = rest[: end + 1], rest[end + 1 :].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    return Instruction(name[2], kind, opcode, rest[:end], rest[end + 1 :])


def _closing(text: str) -> int:
    """Returns where the bracket that opens the text is closed."""
    depth = 0
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if depth == 0:
            return place.start()
    raise AssertionError(f"no closing bracket: {text[:80]}")


def branches(conditional: Instruction) -> list[str]:
    """Returns the computations of which one is run."""
    if listed := _BRANCHES.search(conditional.rest):
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return [name for _, name in _CALLS.findall(conditional.rest)]


def bytes_of(kind: str) -> int:
    """Returns the bytes of an array's type, or of all in a tuple's; padding in the device's layout is not counted."""
    return sum(
        _width(dtype) * math.prod(map(int, filter(None, sizes.split(",")))) for dtype, sizes in _ARRAY.findall(kind)
    )


def _width(dtype: str) -> int:
    """Returns the bytes of one element, at least one."""
    if dtype in ("pred", "token"):
        return int(dtype == "pred")
    bits = int(re.search(r"\d+", dtype)[0])
    return max(1, bits // 8)
