"""Emit csrc/generated/: divergences.h from fastkd/divergences.py, and options.h from fastkd/call/options.py.

    python csrc/generate.py            write the headers
    python csrc/generate.py --check    exit 1 if a header is not what would be written

A definition is straight-line: assignments of expressions over its arguments and the vocabulary, then
``return phi, g`` or ``return phi, g, h``. Anything else is refused with the line that holds it. Needs neither torch nor
a compiler.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "fastkd" / "divergences.py"
GENERATED = ROOT / "csrc" / "generated"
OPTIONS = ROOT / "fastkd" / "call" / "options.py"
OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
COMPARISONS = {ast.Gt: ">", ast.Lt: "<", ast.GtE: ">=", ast.LtE: "<="}
ENTRY = ("p", "q", "log_p", "log_q")
RATIO = "log_ratio"  # what may follow them


def refuse(node: ast.AST, what: str) -> SystemExit:
    """The exception for a definition that cannot be translated."""
    return SystemExit(f"{SOURCE}:{getattr(node, 'lineno', '?')}: a definition cannot hold {what}")


def expression(node: ast.expr, vocabulary: tuple[str, ...]) -> str:
    """The C++ of an expression; every value is a vector V, every comparison a mask."""

    def go(child: ast.expr) -> str:
        return expression(child, vocabulary)

    match node:
        case ast.Name(id=name):
            return name
        case ast.Constant(value=float() | int() as value):
            return f"splat({float(value)!r}f)"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return f"({go(left)} {OPERATORS[type(op)]} {go(right)})"
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return f"(-{go(operand)})"
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            return f"({go(left)} {COMPARISONS[type(op)]} {go(right)})"
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in vocabulary:
            return f"{name}({', '.join(map(go, args))})"
    raise refuse(node, ast.unparse(node))


def names(node: ast.AST) -> set[str]:
    """The names that an expression reads."""
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def power(node: ast.expr, powers: dict[str, int]) -> int | None:
    """The power of c by which an expression is multiplied if p and q are, and their logarithms stay; None: no power.

    A name that `powers` lacks does not depend on p and q.
    """

    def go(child: ast.expr) -> int | None:
        return power(child, powers)

    match node:
        case ast.Name(id=name):
            return powers.get(name, 0)
        case ast.UnaryOp(operand=operand):
            return go(operand)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            parts = go(left), go(right)
            return None if None in parts else parts[0] + parts[1]
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
            return go(left) if go(left) == go(right) else None
        case ast.Call(func=ast.Name(id="where"), args=[condition, left, right]) if (
            go(condition) == 0
        ):
            return go(left) if go(left) == go(right) else None
        case ast.Call(func=ast.Name(id="distance"), args=[left, right, ratio]) if go(ratio) == 0:
            return go(left) if go(left) == go(right) else None
    inner = {powers.get(name, 0) for name in names(node)}
    return 0 if inner <= {0} else None


def functor(
    function: ast.FunctionDef, vocabulary: tuple[str, ...], always_normalized: bool, exact: bool
) -> str:
    """One definition as a struct."""
    arguments = [argument.arg for argument in function.args.args]
    if tuple(arguments[:4]) != ENTRY:
        raise refuse(function, f"arguments that do not start with {', '.join(ENTRY)}")
    params = arguments[5:] if arguments[4:5] == [RATIO] else arguments[4:]
    lines = [f"    const V {name} = splat(params_[{i}]);" for i, name in enumerate(params)]
    uses: dict[str, set[str]] = {}
    powers: dict[str, int | None] = {"p": 1, "q": 1}
    for statement in function.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]) if name in (*arguments, *uses):
                raise refuse(statement, f"a second assignment to {name}")
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                lines.append(f"    const V {name} = {expression(value, vocabulary)};")
                uses[name] = names(value)
                powers[name] = power(value, powers)
            case ast.Return(value=ast.Tuple(elts=[phi, g, *h])) if len(h) < 2:
                lines.append(f"    phi_ = {expression(phi, vocabulary)};")
                lines.append(f"    g_ = {expression(g, vocabulary)};")
                teachers = expression(h[0], vocabulary) if h else "degree_ * phi_ - g_"
                lines.append(f"    h_ = {teachers};")
                needed, read = names(g), names(phi) | names(g)
                linear = power(g, powers) == 1
            case ast.Expr(value=ast.Constant()):
                continue
            case _:
                raise refuse(statement, ast.unparse(statement))

    def uses_logs(reached: set[str]) -> str:
        for _ in uses:
            reached = reached.union(*(uses.get(name, set()) for name in reached))
        return "true" if reached & {"log_p", "log_q", RATIO} else "false"

    return "\n".join(
        [
            f"struct {function.name.lstrip('_')} {{",
            f"  static constexpr bool always_normalized = {str(always_normalized).lower()};",
            f"  static constexpr bool uses_logs = {uses_logs(read)}, gradient_uses_logs = {uses_logs(needed)};",
            "  // Whether a factor of p and q, with the same logarithms, is one of g.",
            f"  static constexpr bool gradient_is_linear = {str(linear).lower()};",
            f"  static constexpr bool exact_exponents = {str(exact).lower()};",
            "  static FASTKD_INLINE void eval(V p, V q, V log_p, V log_q, V log_ratio, const float* params_,",
            "                                 float degree_, V& phi_, V& g_, V& h_) {",
            *lines,
            "  }",
            "};",
        ]
    )


def header(source: str) -> str:
    """The whole header, from the text of fastkd/divergences.py."""
    functions: dict[str, ast.FunctionDef] = {}
    table: list[str] = []
    exact: list[str] = []
    vocabulary: tuple[str, ...] = ()
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef(name=name):
                functions[name] = node
            case ast.Assign(targets=[ast.Name(id="VOCABULARY")], value=value):
                vocabulary = ast.literal_eval(value)
            case ast.AnnAssign(target=ast.Name(id="DEFINITIONS"), value=ast.Tuple(elts=elements)):
                table = [element.id for element in elements if isinstance(element, ast.Name)]
            case ast.AnnAssign(
                target=ast.Name(id="WITH_EXACT_EXPONENTS"), value=ast.Tuple(elts=elements)
            ):
                exact = [element.id for element in elements if isinstance(element, ast.Name)]
    # Those that can be of tempered logits themselves, as Divergence(name, function, ..., normalized=False) says.
    of_logits = {
        node.args[1].id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and any(k.arg == "normalized" and ast.unparse(k.value) == "False" for k in node.keywords)
        and isinstance(node.args[1], ast.Name)
    }
    structs = "\n\n".join(
        functor(functions[name], vocabulary, name not in of_logits, name in exact) for name in table
    )
    return f"""\
// Generated by csrc/generate.py from fastkd/divergences.py. Do not edit: run `make divergences`.
//
// Included inside a namespace that defines V and the vocabulary: cpu/vec.h's vectors, once for each instruction set, or
// cuda/math.h's floats.

{structs}

// The table, in the order of DEFINITIONS.
#define FASTKD_DIVERGENCES(X) {" ".join(f"X({name.lstrip('_')})" for name in table)}
"""


def scalars(source: str) -> list[tuple[str, object, str, str]]:
    """(name, default, C++ type, C++ field) of every option, from the text of fastkd/call/options.py."""
    found = []
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="TABLE")], value=ast.Tuple(elts=rows)):
                for row in rows:
                    if not isinstance(row, ast.Call) or len(row.args) != 4:
                        raise SystemExit(
                            f"{OPTIONS}:{row.lineno}: a row of TABLE is Scalar(name, default, check, cpp, ...)"
                        )
                    name, default, _, cpp = row.args
                    kind, field = ast.literal_eval(cpp).split()
                    found.append((ast.literal_eval(name), ast.literal_eval(default), kind, field))
    return found


def options_header(source: str) -> str:
    """The whole header options.h, from the text of fastkd/call/options.py."""
    table = scalars(source)

    def fields(prefix: str) -> str:
        lines = []
        for _, default, kind, field in table:
            side, dot, name = field.rpartition(".")
            if side + dot == prefix:
                value = "0" if default is None else str(default).lower()
                lines.append(f"  {kind} {name} = {value};")
        return "\n".join(lines)

    def unpacked(index: int, field: str) -> str:
        side, _, name = field.rpartition(".")
        target = f"{side}_tempering.{name}" if side else name
        return f"  loss.{target} = std::get<{index}>(values);"

    assignments = "\n".join(unpacked(i, field) for i, (*_, field) in enumerate(table))
    return f"""\
// Generated by csrc/generate.py from fastkd/call/options.py. Do not edit: run `make divergences`.
#pragma once
#include <cstdint>
#include <tuple>

namespace fastkd {{

// The options of one side, student or teacher: what is done to its logits before the softmax.
struct SideOptions {{
{fields("student.")}
}};

// The other scalar options of a loss.
struct ScalarOptions {{
{fields("")}
}};

// The options as Python passes them, and their names in that order.
using PackedOptions = std::tuple<{", ".join(kind for _, _, kind, _ in table)}>;
constexpr const char* OPTION_NAMES = "{" ".join(name for name, *_ in table)}";

template <class Loss>
void unpack(Loss& loss, const PackedOptions& values) {{
{assignments}
}}

}}  // namespace fastkd
"""


def main(arguments: list[str]) -> int:
    """Write the headers, or check them."""
    headers = {
        GENERATED / "divergences.h": header(SOURCE.read_text()),
        GENERATED / "options.h": options_header(OPTIONS.read_text()),
    }
    if "--check" in arguments:
        stale = [
            path for path, text in headers.items() if not path.exists() or path.read_text() != text
        ]
        for path in stale:
            print(f"{path} is stale: run `make divergences`", file=sys.stderr)
        return 1 if stale else 0
    GENERATED.mkdir(exist_ok=True)
    for path, text in headers.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
