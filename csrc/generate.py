"""Emit csrc/generated/divergences.h from the definitions in fastkd/divergences.py.

    python csrc/generate.py            write the header
    python csrc/generate.py --check    exit 1 if the header is not what would be written

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
HEADER = ROOT / "csrc" / "generated" / "divergences.h"
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


def functor(function: ast.FunctionDef, vocabulary: tuple[str, ...], always_normalized: bool) -> str:
    """One definition as a struct."""
    arguments = [argument.arg for argument in function.args.args]
    if tuple(arguments[:4]) != ENTRY:
        raise refuse(function, f"arguments that do not start with {', '.join(ENTRY)}")
    params = arguments[5:] if arguments[4:5] == [RATIO] else arguments[4:]
    lines = [f"    const V {name} = splat(params_[{i}]);" for i, name in enumerate(params)]
    uses: dict[str, set[str]] = {}
    for statement in function.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]) if name in (*arguments, *uses):
                raise refuse(statement, f"a second assignment to {name}")
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                lines.append(f"    const V {name} = {expression(value, vocabulary)};")
                uses[name] = names(value)
            case ast.Return(value=ast.Tuple(elts=[phi, g, *h])) if len(h) < 2:
                lines.append(f"    phi_ = {expression(phi, vocabulary)};")
                lines.append(f"    g_ = {expression(g, vocabulary)};")
                teachers = expression(h[0], vocabulary) if h else "degree_ * phi_ - g_"
                lines.append(f"    h_ = {teachers};")
                needed, read = names(g), names(phi) | names(g)
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
    vocabulary: tuple[str, ...] = ()
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef(name=name):
                functions[name] = node
            case ast.Assign(targets=[ast.Name(id="VOCABULARY")], value=value):
                vocabulary = ast.literal_eval(value)
            case ast.AnnAssign(target=ast.Name(id="DEFINITIONS"), value=ast.Tuple(elts=elements)):
                table = [element.id for element in elements if isinstance(element, ast.Name)]
    # Those that can be of tempered logits themselves, as Divergence(name, function, ..., normalized=False) says.
    of_logits = {
        node.args[1].id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and any(k.arg == "normalized" and ast.unparse(k.value) == "False" for k in node.keywords)
        and isinstance(node.args[1], ast.Name)
    }
    structs = "\n\n".join(
        functor(functions[name], vocabulary, name not in of_logits) for name in table
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


def main(arguments: list[str]) -> int:
    """Write the header, or check it."""
    text = header(SOURCE.read_text())
    if "--check" in arguments:
        if HEADER.exists() and HEADER.read_text() == text:
            return 0
        print(f"{HEADER} is stale: run `make divergences`", file=sys.stderr)
        return 1
    HEADER.parent.mkdir(exist_ok=True)
    HEADER.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
