"""The text of a PTX module as instructions: functions, registers, labels, variables in shared and local memory.

Names are resolved here. A register or label has one name in the whole program, `function@name` or, within a nested
scope, `function@name@number of the scope`, so that the machine needs no scopes.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from support.ptx.faults import Fault
from support.ptx.numbers import PACKED, SIZES, size_of

_HEADER = re.compile(
    r"(?:\.visible\s+|\.weak\s+)?\.(?P<kind>entry|func)\s+(?:\((?P<results>[^)]*)\)\s*)?(?P<name>[\w$]+)\s*"
    r"(?:\((?P<parameters>[^)]*)\))?\s*(?P<end>[{;])"
)
_DIRECTIVES = re.compile(
    r"^\s*\.(?:loc|file|pragma|section|maxntid|minnctapersm|maxnreg|reqntid|explicitcluster|noreturn|language)\b[^\n]*",
    re.M,
)
_VARIABLE = re.compile(
    r"\.(?P<space>shared|local)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$]+)(?:\[(?P<count>\d*)\])?"
)
_NAME = re.compile(r"(?<![\w.$%])%?[A-Za-z_$][\w$]*")
_LABEL = re.compile(r"\s*([$\w]+):\s*")


@dataclass
class Instruction:
    """An opcode and its operands, with all names resolved."""

    text: str
    name: str  # the opcode up to the first dot
    modifiers: tuple[str, ...]  # its other parts, without types
    types: tuple[str, ...]
    operands: list[str]
    guard: str | None = None  # the predicate that must be true, or false if negated
    negated: bool = False
    targets: list[int] = field(default_factory=list)  # of a branch, as indices of instructions
    in_entry: bool = True

    @property
    def type(self) -> str:
        """The last type of the opcode, that of most operands."""
        return self.types[-1]

    def has(self, *modifiers: str) -> bool:
        """Whether the opcode has one of these modifiers."""
        return any(modifier in self.modifiers for modifier in modifiers)

    def one_of(self, *modifiers: str) -> str:
        """The one of these modifiers that the opcode has."""
        return next(modifier for modifier in modifiers if modifier in self.modifiers)

    def only(self, modifiers: str) -> None:
        """Raise Fault if the opcode has a modifier that is not listed, since it could change the meaning."""
        others = set(self.modifiers) - set(modifiers.split())
        if others:
            raise Fault(f"{self.name} with .{' .'.join(sorted(others))} is not implemented")


@dataclass
class Parameter:
    """A parameter of a function, or a variable in memory."""

    name: str
    size: int
    align: int


@dataclass
class Function:
    """A function of the module; `first` is the index of its first instruction."""

    name: str
    is_entry: bool
    parameters: list[Parameter]
    results: list[Parameter]
    first: int = 0


def split_operands(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, pending = [], 0, ""
    for piece in text.split(","):
        pending = f"{pending},{piece}" if depth else piece
        depth += sum(map(piece.count, "[{(")) - sum(map(piece.count, "]})"))
        if depth == 0:
            parts.append(pending.strip())
    if depth:
        parts.append(pending.strip())
    return parts if parts[-1] else parts[:-1]


def _parameter(text: str) -> Parameter:
    declared = re.match(r"\.param\s+(.*?)([\w$]+)(?:\[(\d*)\])?$", text.strip(), re.S)
    if declared is None:
        raise Fault(f"parameter {text!r} is not understood")
    attributes, name, count = declared.groups()
    element = next(size_of(part) for part in re.findall(r"\.(\w+)", attributes) if part in SIZES)
    align = (
        re.search(r"\.align\s+(\d+)", attributes) if count else None
    )  # else it is that of what a pointer leads to
    return Parameter(name, element * int(count or 1), int(align[1]) if align else element)


def _parameters(text: str | None) -> list[Parameter]:
    return [_parameter(part) for part in split_operands(text or "")]


def _statements(body: str) -> list[str]:
    """The statements of a function's body; '{' and '}' alone open and close a scope."""
    found, pending, in_vector = [], "", False
    for token in re.findall(r"[{};]|[^{};]+", body):
        if token == "{" and (not pending.strip() or _LABEL.fullmatch(pending)):
            found += [pending, "{"]
            pending = ""
        elif token == "}" and not in_vector:
            found += [pending, "}"]
            pending = ""
        elif token == ";":
            found.append(pending)
            pending = ""
        else:
            in_vector = token == "{" or (in_vector and token != "}")
            pending += token
    return [" ".join(statement.split()) for statement in found if statement.strip()]


class _Text(NamedTuple):
    """A module's text in parts."""

    bodies: dict[str, tuple[Function, str]]
    outside: str  # of all functions


@functools.lru_cache(maxsize=4)
def _parts(text: str) -> _Text:
    text = _DIRECTIVES.sub("", re.sub(r"//[^\n]*", "", text))
    bodies, outside, end = {}, [], 0
    for header in _HEADER.finditer(text):
        if header["end"] == ";":
            continue
        outside.append(text[end : header.start()])
        end, depth = header.end(), 1
        for brace in re.compile(r"[{}]").finditer(text, header.end()):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                end = brace.end()
                break
        function = Function(
            header["name"],
            header["kind"] == "entry",
            _parameters(header["parameters"]),
            _parameters(header["results"]),
        )
        bodies[function.name] = function, text[header.end() : end - 1]
    return _Text(bodies, "".join([*outside, text[end:]]))


class Program:
    """An entry of a PTX module and the functions that it calls."""

    def __init__(self, text: str, entry: str) -> None:
        self.instructions: list[Instruction] = []
        self.functions: dict[str, Function] = {}
        self.registers: dict[str, str] = {}  # name: type
        self.parameters: dict[str, int] = {}  # in functions and calls, name: bytes
        self.labels: dict[str, int] = {}
        self.shared: list[Parameter] = []
        self.local: list[Parameter] = []
        bodies, outside = _parts(text)
        self.dynamic = re.findall(r"\.extern\s+\.shared[^;]*?\b([\w$]+)\[\]\s*;", outside)
        if entry not in bodies:
            raise Fault(f"the module has no entry {entry!r}")
        for variable in _VARIABLE.finditer(outside):
            if variable["count"] != "":
                self.declare_variable(variable, variable["name"])
        for name in self._reachable(bodies, entry):
            function, body = bodies[name]
            function = replace(function, first=len(self.instructions))
            self.functions[name] = function
            _Body(self, function).read(_statements(body))
        self.entry = self.functions[entry]

    def declare_variable(self, variable: re.Match[str], name: str) -> None:
        """Reserve memory for a variable in shared or local memory."""
        size = size_of(variable["type"])
        count = 1 if variable["count"] is None else int(variable["count"])
        where = self.shared if variable["space"] == "shared" else self.local
        where.append(Parameter(name, size * count, int(variable["align"] or size)))

    @staticmethod
    def _reachable(bodies: dict[str, tuple[Function, str]], entry: str) -> list[str]:
        """The entry and what it calls, callees first: of several threads, those in a callee then go first."""
        found: list[str] = []
        ahead = [entry]
        while ahead:
            name = ahead.pop()
            if name in found:
                found.remove(name)
            found.append(name)
            words = set(re.findall(r"[\w$]+", bodies[name][1]))
            ahead += [other for other in bodies if other in words and other != name]
        return found[::-1]


class _Body:
    """The reader of one function's body."""

    def __init__(self, program: Program, function: Function) -> None:
        self.program, self.function = program, function
        self.scopes: list[dict[str, str]] = [{}]
        self.opened = 0
        self.branches: list[tuple[Instruction, list[dict[str, str]], list[str]]] = []
        self.tables: dict[str, list[str]] = {}  # of brx.idx
        for parameter in [] if function.is_entry else function.parameters + function.results:
            self._declare(parameter.name)
            program.parameters[self._resolved(parameter.name)] = parameter.size

    def read(self, statements: list[str]) -> None:
        for statement in statements:
            if statement == "{":
                self.scopes.append({})
                self.opened += 1
            elif statement == "}":
                self.scopes.pop()
            else:
                self._statement(statement)
        for instruction, scopes, labels in self.branches:
            for label in labels:
                name = next((s[label] for s in reversed(scopes) if label in s), None)
                if name not in self.program.labels:
                    raise Fault(f"there is no label {label!r} for {instruction.text}")
                instruction.targets.append(self.program.labels[name])

    def _declare(self, name: str) -> str:
        suffix = f"@{self.opened}" if len(self.scopes) > 1 else ""
        self.scopes[-1][name] = f"{self.function.name}@{name}{suffix}"
        return self.scopes[-1][name]

    def _resolved(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def _statement(self, statement: str) -> None:
        while label := _LABEL.match(statement):
            statement = statement[label.end() :]
            if statement.startswith(".branchtargets"):
                self.tables[label[1]] = split_operands(statement.removeprefix(".branchtargets"))
                return
            self.program.labels[self._declare(label[1])] = len(self.program.instructions)
        if statement.startswith(".reg"):
            self._registers(statement)
        elif statement.startswith(".param"):
            parameter = _parameter(statement)
            self.program.parameters[self._declare(parameter.name)] = parameter.size
        elif variable := _VARIABLE.match(statement):
            self.program.declare_variable(variable, self._declare(variable["name"]))
        elif statement.startswith("."):
            raise Fault(f"directive {statement!r} is not understood")
        elif statement:
            self._instruction(statement)

    def _registers(self, statement: str) -> None:
        declared = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement)
        if declared is None:
            raise Fault(f"registers {statement!r} are not understood")
        for name in split_operands(declared[2]):
            many = re.match(r"(%?[\w$]+)<(\d+)>$", name)
            for each in [f"{many[1]}{k}" for k in range(int(many[2]))] if many else [name]:
                self.program.registers[self._declare(each)] = declared[1]

    def _instruction(self, text: str) -> None:
        guard = re.match(r"@(!?)(%?[\w$]+)\s+", text)
        opcode, _, rest = (text[guard.end() :] if guard else text).partition(" ")
        name, *parts = opcode.replace("::", "__").split(".")
        instruction = Instruction(
            text,
            name,
            tuple(part for part in parts if part not in SIZES and part not in PACKED),
            tuple(part for part in parts if part in SIZES or part in PACKED),
            split_operands(_NAME.sub(lambda found: self._resolved(found[0]), rest)),
            self._resolved(guard[2]) if guard else None,
            bool(guard and guard[1]),
            in_entry=self.function.is_entry,
        )
        if name == "bra":
            self.branches.append((instruction, list(self.scopes), [rest.strip()]))
        elif name == "brx":
            table = split_operands(rest)[1]
            self.branches.append((instruction, list(self.scopes), self.tables[table]))
        self.program.instructions.append(instruction)
