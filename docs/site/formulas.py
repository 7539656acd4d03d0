"""Typesets formulas as MathML while the site is built: no script, no font and no network.

Formulas stay in plain notation in the checkout, ``T^2 KL(p || q) + sum_v g_v / (a + b)``, where they can be read in
an editor, in help() and on a code host. Two places hold formulas: an indented block (of a page or a docstring), and a
table's column that is headed "formula". Fenced blocks are code.
"""

# ruff: noqa: RUF001 - Greek letters, minus signs and primes are meant

from __future__ import annotations

import html
import re
from typing import NamedTuple

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "eps": "ε", "theta": "θ", "lambda": "λ", "mu": "μ",
    "phi": "φ", "tau": "τ",
}  # fmt: skip
FUNCTIONS = {
    "KL", "CE", "JSD", "TCKD", "NCKD", "NLL", "D", "H", "Huber", "argmax", "cos", "exp", "huber", "log", "logaddexp",
    "lse", "max", "mean", "min", "sg", "softmax", "std",
}  # fmt: skip
OPERATORS = {
    "||": "‖", "|": "|", "<-": "←", "->": "→", ">=": "≥", "<=": "≤", "!=": "≠", "-": "−", "*": "·", "...": "…",
    "|->": "↦",
}  # fmt: skip
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵃᵇᵏᵀ", "0123456789+-abkT", strict=True))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ᵢⱼₖₗ", "0123456789+-()ijkl", strict=True))
TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<string>\"[^\"]*\")|(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)"
    rf"|(?P<raised>[{''.join(RAISED)}]+)|(?P<lowered>[{''.join(LOWERED)}]+)"
    r"|(?P<name>[A-Za-z]{2,}(?:_[A-Za-z]{2,})+)|(?P<word>[A-Za-z]{2,}'[a-z]\b|[A-Za-z]+['′]?|[α-ωΔ∂][′]?)"
    r"|(?P<operator>\.\.\.|\|\||<-|->|>=|<=|!=|.)",
    re.S,
)
OPEN, CLOSE = {"(": ")", "[": "]", "{": "}"}, ")]}"
# Signs of code: keyword arguments, calls of functions with an underscore, statements, attributes.
CODE = re.compile(
    r"^ *(from|import|for|def|class|with|if)\b|(?<!\w)(?!log_softmax)[a-z]\w+_\w+\(|\w=[\w\"{(]"
    r"|\w\[[:\w]|[a-z]{2}\.[a-z]{2}|\w\w:$|-> [A-Z]\w+$",
    re.M,
)
MATHS = re.compile(
    r"\^|[ΣΠ√∂‖½²]|\b(KL|CE|sum|mean|log|softmax|argmax|huber|max)\b|\w_\w|[-+*/=] \w"
)


ROLE = re.compile(
    r":\w+:`~?([\w.]+)`|<autoref [^>]*><code>([\w.]+)</code></autoref>"
)
LABEL = re.compile(r"^(\w+=)?\"\w+\"$|^\w+_\w{2,}$")


class Item(NamedTuple):
    """A piece of MathML."""

    kind: str  # "operand", "function", "group", "text" or "operator"
    text: str
    inner: str = ""  # a group without its brackets
    spaced: bool = False  # whether white space came before it


def _lines(text: str) -> list[list[str]]:
    """The cells of each line: two spaces and more begin a new one. A name in a role is its last part."""
    text = ROLE.sub(lambda match: (match[1] or match[2]).rpartition(".")[2], text)
    return [
        re.split(r" {2,}", line.strip()) for line in text.strip("\n").splitlines()
    ]


def is_formula(text: str) -> bool:
    """Whether an indented block is a formula and not code."""
    plain = "\n".join(
        cell for cells in _lines(text) for cell in cells if not LABEL.match(cell)
    )
    return bool(MATHS.search(plain)) and not CODE.search(plain)


def inline(text: str) -> str:
    """A formula within a line, such as a cell of a table. Its words stay text, where a line may break."""
    if LABEL.match(text):
        return f"<code>{html.escape(text)}</code>"
    parts: list[str] = []
    run: list[Item] = []

    def close() -> None:
        if run:
            space = " " * (run[0].spaced and bool(parts))
            parts.append(f"{space}<math>{_row(run)}</math>")
            run.clear()

    for item in _items(_tokens(text)):
        words = re.fullmatch(r"<mtext>(.*)</mtext>|<mo>([,;:.])</mo>", item.text)
        if words:
            close()
            parts.append(" " * item.spaced + (words[1] or words[2]))
        else:
            run.append(item)
    close()
    return "".join(parts)


def block(text: str) -> str:
    """A block of formulas, one a line."""
    lines = _lines(text)
    if all(len(cells) == 1 for cells in lines):
        rows = "".join(
            f'<math display="block">{_row(_items(_tokens(c[0])))}</math>'
            for c in lines
        )
        return f'<div class="formula">{rows}</div>'
    rows = "".join(
        "<tr>" + "".join(f"<td>{inline(cell)}</td>" for cell in cells) + "</tr>"
        for cells in lines
    )
    return f'<div class="formula"><table class="formula">{rows}</table></div>'


def _tokens(text: str) -> list[tuple[str, str]]:
    return [(match.lastgroup or "", match[0]) for match in TOKEN.finditer(text)]


def _items(tokens: list[tuple[str, str]], end: str = "") -> list[Item]:
    """Takes tokens up to the bracket `end`, and away from the list."""
    items: list[Item] = []
    spaced = False
    while tokens and tokens[0][1] != end:
        kind, text = tokens.pop(0)
        if kind == "space":
            spaced = True
            continue
        if kind in ("raised", "lowered"):
            table = RAISED if kind == "raised" else LOWERED
            script = f"<mrow>{_row(_items(_tokens(''.join(table[c] for c in text))))}</mrow>"
            _attach(items, "msup" if kind == "raised" else "msub", script)
        elif text in "^_" and items and tokens:
            _attach(items, "msup" if text == "^" else "msub", _script(tokens))
        elif text == "/" and items and tokens:
            _divide(items, tokens, spaced)
        else:
            items.append(_item(kind, text, tokens)._replace(spaced=spaced))
        spaced = False
    return items


def _item(kind: str, text: str, tokens: list[tuple[str, str]]) -> Item:
    """One token, or a bracket with what is in it."""
    if text in OPEN and any(OPEN[text] == token for _, token in tokens):
        inner = _row(_items(tokens, OPEN[text]))
        if tokens:
            tokens.pop(0)
        brackets = f"<mo>{text}</mo>", f"<mo>{OPEN[text]}</mo>"
        return Item(
            "group", f"<mrow>{brackets[0]}{inner}{brackets[1]}</mrow>", inner
        )
    if text in ("√", "sqrt") and tokens:
        while tokens[0][0] == "space":
            tokens.pop(0)
        under = _item(*tokens.pop(0), tokens)
        return Item("operand", f"<msqrt>{under.inner or under.text}</msqrt>")
    if text == "abs" and tokens and tokens[0][1] == "(":
        group = _item(*tokens.pop(0), tokens)
        return Item("operand", f"<mrow><mo>|</mo>{group.inner}<mo>|</mo></mrow>")
    if text == "½":
        return Item("operand", "<mfrac><mn>1</mn><mn>2</mn></mfrac>")
    if kind == "number":
        return Item("operand", f"<mn>{text}</mn>")
    if kind in ("name", "string"):
        return Item("text", f"<mtext>{html.escape(text)}</mtext>")
    if kind == "word":
        return _word(text)
    if text == "Σ":
        return Item("function", "<mo>Σ</mo>")
    return Item("operator", f"<mo>{html.escape(OPERATORS.get(text, text))}</mo>")


def _word(text: str) -> Item:
    stem, prime = text.rstrip("'′"), "′" if text[-1] in "'′" else ""
    if stem == "sum":
        return Item("function", "<mo>Σ</mo>")
    if stem in FUNCTIONS:
        return Item("function", f'<mi mathvariant="normal">{stem}</mi>')
    if stem in GREEK or len(stem) == 1:
        letter = f"<mi>{GREEK.get(stem, stem)}</mi>"
        return Item(
            "operand", f"<msup>{letter}<mo>{prime}</mo></msup>" if prime else letter
        )
    if set(stem) <= set("ab") or re.fullmatch("d[a-zA-Z]", stem):
        letters = "".join(f"<mi>{letter}</mi>" for letter in stem)
        return Item("operand", f"<mrow>{letters}</mrow>", letters)
    return Item("text", f"<mtext>{html.escape(text)}</mtext>")


def _script(tokens: list[tuple[str, str]]) -> str:
    """An exponent or an index: one token, or what a bracket holds."""
    item = _item(*tokens.pop(0), tokens)
    if (
        tokens
        and tokens[0][0] == "word"
        and item.kind == "operand"
        and "<mn>" in item.text
    ):
        item = Item(
            "operand", item.text + _item(*tokens.pop(0), tokens).text
        )  # d_2k
    return f"<mrow>{item.inner or item.text}</mrow>"


def _attach(items: list[Item], tag: str, script: str) -> None:
    """Puts an exponent or an index on the last item; both on one where it has the other already."""
    last = items.pop()
    both = re.fullmatch(r"<msub>(.*?)(<mrow>.*</mrow>)</msub>", last.text, re.S)
    if tag == "msup" and both and last.kind != "group":
        text = f"<msubsup>{both[1]}{both[2]}{script}</msubsup>"
    else:
        text = f"<{tag}>{last.text}{script}</{tag}>"
    items.append(last._replace(text=text, inner=""))


def _divide(items: list[Item], tokens: list[tuple[str, str]], spaced: bool) -> None:
    """A fraction where a bracket or two numbers say how far it goes, and else a slash."""
    if tokens[0][0] == "space":
        tokens.pop(0)
    over = items[-1]
    applied = (
        over.kind == "group" and len(items) > 1 and items[-2].kind == "function"
    )
    under = _item(*tokens.pop(0), tokens)
    scripts: list[Item] = [under]
    while tokens and tokens[0][1] in "^_" and len(tokens) > 1:
        tag = "msup" if tokens.pop(0)[1] == "^" else "msub"
        _attach(scripts, tag, _script(tokens))
    under = scripts[0]
    numbers = (
        "<mn>" in over.text and over.kind == under.kind == "operand" and not spaced
    )
    if not applied and (numbers or (under.kind == "group" and under.inner)):
        items.pop()
        text = f"<mfrac><mrow>{over.inner or over.text}</mrow><mrow>{under.inner or under.text}</mrow></mfrac>"
        items.append(Item("operand", text, spaced=over.spaced))
    else:
        items += [
            Item("operator", '<mo lspace="0.1em" rspace="0.1em">/</mo>'),
            under,
        ]


def _row(items: list[Item]) -> str:
    """The items side by side, with space where a product or a word needs it."""
    parts = []
    for before, item in zip([None, *items], items, strict=False):
        if before is not None and item.spaced:
            if "text" in (before.kind, item.kind):
                parts.append('<mspace width="0.3em"/>')
            elif "operator" not in (before.kind, item.kind):
                parts.append('<mspace width="0.17em"/>')
            elif "<mo>,</mo>" in before.text or "<mo>;</mo>" in before.text:
                parts.append('<mspace width="0.3em"/>')
        parts.append(item.text)
    return "".join(parts)
