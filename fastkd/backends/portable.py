"""The portable backend: plain PyTorch, a few rows at a time. What "auto" falls back to where there are no kernels.

It serves every call, on every device and in every dtype that PyTorch has. The formulas are those of
:mod:`fastkd.backends.reference`, which computes them on whole tensors and is the oracle. Here a piece of rows stays in
the processor's cache, the operators write to buffers that every piece uses again, and the gradient goes straight to the
tensor that is returned. Fresh memory is what plain PyTorch spends most of its time on.

A piece of dense rows has code of its own (:func:`_dense_piece`). Sparse teachers, mutual learning, and rows whose
vocabulary is spread over processes run the reference's steps piece by piece.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import divergences
from fastkd.backends import mutual as plain_mutual
from fastkd.backends import native, reference
from fastkd.backends.angles import angles
from fastkd.backends.pieces import piece_rows
from fastkd.backends.reference import empty, scale_rows_
from fastkd.backends.sparse import Events
from fastkd.call import mutual
from fastkd.call.contract import (
    Options,
    Result,
    Rows,
    ShardCall,
    Statistics,
    Want,
    counted_rows,
    row_dtype,
)
from fastkd.call.log_zero import evaluate
from fastkd.call.rows import At, put, rows_at, take
from fastkd.core.tensors import readable
from fastkd.divergences import (
    DEFINITIONS,
    ENTRY,
    RATIO,
    VOCABULARY,
    Divergence,
    arguments_of,
    takes_ratio,
)  # fmt: skip

__all__ = [
    "angles", "empty", "gather_events", "kd_rows", "mutual_rows", "scale_rows_", "shard_results",
    "shard_statistics", "shard_sums", "spread_gradient",
]  # fmt: skip


# Columns that are searched for a row's maximum at once.
BLOCK = 512
# Where the maxima of both models' logits differ by less, so do the logits, without loss.
NEAR = 8.0


def _waits(device: torch.device) -> bool:
    """Whether to ask for a number means to wait for the device."""
    return device.type != "cpu"


def _exact(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype for the few numbers of each row: float64 where the device has it."""
    return torch.float64 if device.type in ("cpu", "cuda") else dtype


# ---- pieces of rows


def _counted(rows: Rows, ignore_index: int, device: torch.device) -> Tensor | None:
    """The numbers of the rows that count; None where all go through.

    That is so on a device, where their number would have to be waited for: dropped rows are computed and set to 0.
    """
    if _waits(device):
        return None
    keep = counted_rows(rows, ignore_index)
    if keep is None:
        return None
    numbers = keep.flatten().nonzero().squeeze(1)
    return None if numbers.numel() == keep.numel() else numbers


def _pieces(count: int, step: int, numbers: Tensor | None) -> Iterator[At]:
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        yield part if numbers is None else numbers[part]


class _Scratch:
    """Buffers [rows, columns] that every piece uses again, by name."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = (rows, columns), dtype, device
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        buffer = self.buffers[name]
        return buffer if rows == self.shape[0] else buffer[:rows]


# ---- dense rows
#
# A model that is sure of a token has a column whose probability is 1 but for rounding, where g - q sum g loses all
# its digits. So the sum of exponentials is kept apart from its largest term, and what the top columns of both models
# give is computed by itself, in float64: a few numbers of a row.


class _Model(NamedTuple):
    """What a call says of one model, and what of it a piece computes."""

    name: str
    scale: float
    softcap: float
    temperature: float | Tensor  # [rows, 1]
    softmax: bool  # at the temperature
    plain: bool  # at temperature 1


class _Softmax(NamedTuple):
    """[rows, columns], and [rows, 1] in float64. exp((z - top) / temperature) is 1 at the top column."""

    powers: Tensor  # these; probabilities once they are divided by total
    top: Tensor
    seat: Tensor  # the top column
    largest: Tensor  # 1 there, or 0 and NaN in a row that has no softmax
    rest: Tensor  # the sum of the other columns
    total: Tensor  # of all columns
    log_total: Tensor  # its logarithm, also of a rest that is lost in the total


class _Side(NamedTuple):
    """One model's columns in a piece."""

    z: Tensor  # scaled and soft-capped; -inf of a label that is compared apart
    slope: Tensor | None  # dz / dlogits, where they are soft-capped
    label: Tensor | None  # z of the label, [rows, 1]
    temperature: float | Tensor
    softmax: _Softmax | None = None
    plain: _Softmax | None = None  # of all columns, at temperature 1
    spread: Tensor | None = None  # sum of exp(x) x over x = (z - top) / temperature, [rows, 1]
    height: Tensor | None = None  # sum of z - top at temperature 1


def _adjusted(
    logits: Tensor, scale: float, softcap: float, buffer: Tensor, scratch: _Scratch, name: str
) -> tuple[Tensor, Tensor | None]:
    """(z, its slope where it is no number): the logits themselves where there is nothing to do, else in the buffer."""
    z = logits
    if z.dtype != buffer.dtype or (z.stride(-1) != 1 and z.shape[-1] > 1):
        z = buffer.copy_(z)
    if softcap:
        z = torch.mul(z, scale / softcap, out=buffer).tanh_()
        slope = torch.mul(z, z, out=scratch(name, z.shape[0]))
        z.mul_(softcap)
        return z, slope.neg_().add_(1.0).mul_(scale)
    return (z if scale == 1.0 else torch.mul(z, scale, out=buffer)), None


def _largest(z: Tensor) -> tuple[Tensor, Tensor]:
    """(the maximum of each row, its column), [rows, 1]. A search of the whole row takes 8 times as long."""
    blocks = z.shape[-1] // BLOCK
    if blocks < 4:
        return z.max(-1, keepdim=True)
    body = z[:, : blocks * BLOCK].unflatten(-1, (blocks, BLOCK))
    top, block = body.amax(-1).max(-1, keepdim=True)
    best = body.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1)
    seat = block * BLOCK + best.argmax(-1, keepdim=True)
    if blocks * BLOCK < z.shape[-1]:
        other, column = z[:, blocks * BLOCK :].max(-1, keepdim=True)
        beyond = (other > top) | other.isnan()
        top, seat = other.where(beyond, top), (column + blocks * BLOCK).where(beyond, seat)
    return top, seat


def _finite(origin: Tensor) -> Tensor:
    return origin.masked_fill(origin == -torch.inf, 0.0)


def _finite_largest(z: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and 0 for a maximum of -inf."""
    top, seat = _largest(z)
    return _finite(top), seat


def _sum(values: Tensor) -> Tensor:
    """[rows, 1]; what follows with the few numbers of a row is more exact than its columns are."""
    return values.sum(-1, keepdim=True).to(_exact(values.dtype, values.device))


def _exponentials(gap: Tensor, top: Tensor, seat: Tensor, out: Tensor) -> _Softmax:
    powers = torch.exp(gap, out=out)
    largest = powers.gather(-1, seat)
    rest = _sum(powers.scatter_(-1, seat, 0.0))
    powers.scatter_(-1, seat, largest)
    largest = largest.to(rest.dtype)
    log_total = (rest + (largest - 1.0)).log1p_()
    return _Softmax(powers, top, seat, largest, rest, largest + rest, log_total)


def _sweep(
    logits: Tensor, model: _Model, label: Tensor | None, apart: bool, parts: bool, scratch: _Scratch
) -> _Side:
    """A side of a piece; label [rows, 1] is the label's column, where that is read."""
    count, temperature, name = logits.shape[0], model.temperature, model.name
    z, slope = _adjusted(
        logits, model.scale, model.softcap, scratch(f"{name} z", count), scratch, f"{name} slope"
    )
    side = _Side(z, slope, None if label is None else z.gather(-1, label), temperature)
    if not (model.softmax or model.plain):
        return side
    top, seat = _finite_largest(z)
    gap = torch.sub(z, top, out=scratch(f"{name} gap", count))
    if model.plain:
        plain = _exponentials(gap, top, seat, scratch(f"{name} plain", count))
        side = side._replace(plain=plain, height=_sum(gap))
    if not model.softmax:
        return side
    if apart:
        assert label is not None
        if z is logits:
            z = scratch(f"{name} z", count).copy_(z)
        top, seat = _finite_largest(z.scatter_(-1, label, -torch.inf))
        torch.sub(z, top, out=gap)
        side = side._replace(z=z)
    _divide(gap, temperature)
    keeps = parts and name == "student"
    softmax = _exponentials(gap, top, seat, scratch(f"{name} powers", count) if keeps else gap)
    if keeps:
        gap.clamp_(min=torch.finfo(gap.dtype).min).mul_(softmax.powers)
        side = side._replace(spread=_sum(gap))
    softmax.powers.div_(softmax.total.to(gap.dtype))
    return side._replace(softmax=softmax)


def _divide(z: Tensor, temperature: float | Tensor) -> Tensor:
    return z.div_(temperature) if isinstance(temperature, Tensor) or temperature != 1.0 else z


def _log_softmax(side: _Side, out: Tensor) -> Tensor:
    """Or the tempered logits, where nothing is normalised."""
    if side.softmax is None:
        return torch.div(side.z, side.temperature, out=out)
    gap = _divide(torch.sub(side.z, side.softmax.top, out=out), side.temperature)
    return gap.sub_(side.softmax.log_total.to(out.dtype))


def _same_temperature(s: _Side, t: _Side) -> bool:
    if isinstance(s.temperature, Tensor) or isinstance(t.temperature, Tensor):
        return s.temperature is t.temperature
    return s.temperature == t.temperature


def _near(s: _Side, t: _Side) -> Tensor | None:
    """Which rows [rows, 1] have logits of both models in one range; None where that is not asked for."""
    if s.softmax is None or t.softmax is None or _waits(s.z.device) or not _same_temperature(s, t):
        return None
    return (s.softmax.top - t.softmax.top).abs() < NEAR


def _log_ratio(s: _Side, t: _Side, out: Tensor) -> Tensor:
    """log p - log q as one difference of logits less a constant of the row."""
    first, second = s.softmax, t.softmax
    alike = _same_temperature(s, t)
    if first is None or second is None:
        if alike:
            return _divide(torch.sub(t.z, s.z, out=out), s.temperature)
        torch.div(t.z, t.temperature, out=out)
        return out.sub_(s.z / s.temperature)
    constant = first.log_total - second.log_total
    near = _near(s, t)
    # Where one model's logits are all higher than the other's, their difference has lost digits.
    if near is not None and bool(near.all()):
        constant = constant + (first.top - second.top).to(constant.dtype) / s.temperature
        _divide(torch.sub(t.z, s.z, out=out), s.temperature)
    else:
        torch.sub(t.z, second.top, out=out)
        if not alike:
            out.mul_(s.temperature / t.temperature)
        _divide(out.sub_(s.z - first.top), s.temperature)
    return out.add_(constant.to(out.dtype))


class _Terms(NamedTuple):
    """What the divergence gives in every column [rows, columns], and in both models' top columns, [rows, 2]."""

    phi: Tensor
    g: Tensor
    h: Tensor | None
    seats: Tensor | None = (
        None  # the student's top column and the teacher's; None where nothing is normalised
    )
    different: Tensor | None = None  # 0 and 1: whether they are
    tops: tuple[Tensor, ...] = ()  # phi, g and h there, where phi, g and h themselves are 0
    logs: tuple[Tensor, Tensor] | None = None  # log q and log p there

    def field(self, index: int) -> Tensor:
        """Phi, g or h of every column."""
        values = (self.phi, self.g, self.h)[index]
        assert values is not None
        return values

    def value(self) -> Tensor:
        """The sum of phi over all columns, [rows, 1]."""
        if self.different is None:
            return _sum(self.phi)
        first, second = self.tops[0].split(1, -1)
        return _sum(self.phi) + first + self.different * second


def _evaluated(
    divergence: Divergence,
    s: _Side,
    t: _Side,
    label: Tensor | None,
    wants_h: bool,
    scratch: _Scratch,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(phi, g, h) of every column, in memory of their own; 0 of a label that is compared apart."""
    count, wanted = s.z.shape[0], 3 if wants_h else 2
    apart = None if divergence.target is None else label
    pair = None
    if s.softmax is not None and t.softmax is not None:
        pair = (t.softmax.powers, s.softmax.powers)
    reads = _reads(divergence.function, divergence.params, wanted)
    if pair is not None and apart is None and reads <= {*ENTRY[:2]}:
        # Nothing is a logarithm of 0.
        phi, g, *more = _applied(divergence, (*pair, *pair[:1] * 3), scratch, wanted)
        return phi, g, more[0] if more else None
    near = None if _waits(s.z.device) else _near(s, t)
    if near is not None and bool(near.any()) and not bool(near.all()):
        return _apart_by(near, divergence, s, t, label, wants_h, scratch)
    ratio = _log_ratio(s, t, scratch("ratio", count))
    if apart is not None:
        ratio.scatter_(-1, apart, 0.0)
    # Then no logarithm is one of 0. The policy for those costs more than all the rest, and on a device the question
    # whether it is needed would cost a wait.
    finite = _finite_rows(ratio)
    log_p = log_q = ratio
    if not _all(finite) or not reads.isdisjoint(ENTRY[2:]):
        log_p = _log_softmax(t, scratch("log p", count))
        log_q = _log_softmax(s, scratch("log q", count))
        if apart is None and _all(finite):
            finite = finite & _finite_rows(log_p) & _finite_rows(log_q)
    if not _all(finite):
        if not _waits(ratio.device) and bool(finite.any()):
            return _apart_by(finite, divergence, s, t, label, wants_h, scratch)
        return evaluate(divergence, log_p, log_q, pair)
    if pair is None:
        pair = (torch.ones((), dtype=ratio.dtype, device=ratio.device).expand_as(ratio),) * 2
    if apart is not None and log_p is not ratio:
        for logs in (log_p, log_q):
            logs.scatter_(-1, apart, torch.finfo(ratio.dtype).min)
    entry = arguments_of(divergence.function, *pair, log_p, log_q, ratio)
    phi, g, *more = _applied(divergence, entry, scratch, wanted)
    h = more[0] if more else None
    if wants_h and h is None:
        assert divergence.degree is not None  # validated
        h = torch.mul(phi, divergence.degree, out=scratch("h", count)).sub_(g)
    if apart is not None:
        for term in (phi, g, h):
            if term is not None:
                term.scatter_(-1, apart, 0.0)
    return phi, g, h


def _all(rows: Tensor) -> bool:
    """On a device that would have to be waited for, the answer is no."""
    return not _waits(rows.device) and bool(rows.all())


def _finite_rows(values: Tensor) -> Tensor:
    """Which rows have finite numbers alone; not one whose sum overflows either."""
    return values.sum(-1).isfinite()


def _apart_by(
    mask: Tensor,
    divergence: Divergence,
    s: _Side,
    t: _Side,
    label: Tensor | None,
    wants_h: bool,
    scratch: _Scratch,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The terms of a piece whose rows are computed in two ways: each kind by itself, so that no row changes another."""

    def rows_of(value: Any, numbers: Tensor) -> Any:
        if isinstance(value, Tensor):
            return value[numbers]
        if isinstance(value, (_Side, _Softmax)):
            return type(value)(*(rows_of(part, numbers) for part in value))
        return value

    terms: list[Tensor] = []
    for kind in (mask.flatten(), ~mask.flatten()):
        numbers = kind.nonzero().squeeze(1)
        sides = rows_of(s, numbers), rows_of(t, numbers)
        if s.temperature is t.temperature:
            sides = sides[0], sides[1]._replace(temperature=sides[0].temperature)
        found = _evaluated(divergence, *sides, rows_of(label, numbers), wants_h, scratch)
        parts = [term for term in (found if wants_h else found[:2]) if term is not None]
        terms = terms or [part.new_empty(mask.shape[0], part.shape[1]) for part in parts]
        for term, part in zip(terms, parts, strict=True):
            term[numbers] = part
    phi, g, *more = terms
    return phi, g, more[0] if more else None


def _terms(
    divergence: Divergence,
    s: _Side,
    t: _Side,
    label: Tensor | None,
    wants_h: bool,
    scratch: _Scratch,
) -> _Terms:
    made = _evaluated(divergence, s, t, label, wants_h, scratch)
    if not divergence.normalized:
        return _Terms(*made)
    assert s.softmax is not None and t.softmax is not None
    seats = torch.cat([s.softmax.seat, t.softmax.seat], -1)
    logs = []
    for side in (s, t):
        assert side.softmax is not None
        kind = side.softmax.rest.dtype
        gap = side.z.gather(-1, seats).to(kind) - side.softmax.top
        temperature = side.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.to(kind)
        logs.append(_divide(gap, temperature) - side.softmax.log_total)
    log_q, log_p = logs
    tops = evaluate(divergence, log_p, log_q)
    for term in made:
        if term is not None:
            term.scatter_(-1, seats, 0.0)
    different = (seats[:, :1] != seats[:, 1:]).to(log_q.dtype)
    return _Terms(*made, seats, different, tops, (log_q, log_p))


def _project(
    terms: _Terms,
    index: int,
    side: _Side,
    beyond: Tensor | None,
    factor: float | Tensor,
    to: Tensor,
) -> Tensor:
    """factor (x_v - q_v sum_u x_u) of the field with that number, in `to`; the field is overwritten.

    beyond [rows, 1] is what else is in the sum.
    """
    x = terms.field(index)
    if terms.seats is None or side.softmax is None:
        return torch.mul(x, factor, out=to)
    assert terms.logs is not None and terms.different is not None
    own, log_q = terms.tops[index], terms.logs[index - 1]
    # The sum of all columns but one, for each of the two top columns.
    others = _sum(x) + terms.different * own.flip(-1)
    if beyond is not None:
        others = others + beyond
    total = others[:, :1] + own[:, :1]
    exact = -own * log_q.expm1() - log_q.exp() * others
    _multiply(x, factor)
    torch.addcmul(x, side.softmax.powers, (total * factor).to(x.dtype), value=-1.0, out=to)
    return to.scatter_(-1, terms.seats, (exact * factor).to(to.dtype))


# ---- the definitions of the table, without fresh memory
#
# Their code runs once on symbols in place of tensors, and what it does becomes a list of steps: without those that
# nothing wanted needs, and each writes to a buffer of the piece, over an operand that is not read again where there is
# one. `where` selects bits, as torch's takes 4 nanoseconds an element on a CPU.


class _Symbol:
    """A value in a definition: an operator, and what it is applied to."""

    __slots__ = ("made", "operands", "operator")

    def __init__(self, operator: str, operands: tuple[Operand, ...], made: _Made) -> None:
        self.operator, self.operands, self.made = operator, operands, made

    def apply(self, operator: str, *others: Operand) -> _Symbol:
        """The operator of this and the others: the same symbol where the definition has it twice."""
        operands = (self, *others)
        if (operator, operands) not in self.made:
            self.made[operator, operands] = _Symbol(operator, operands, self.made)
        return self.made[operator, operands]

    def _scaled(self) -> tuple[_Symbol, float] | None:
        """(x, number) where this is their product."""
        if self.operator == "mul" and not isinstance(self.operands[1], _Symbol):
            assert isinstance(self.operands[0], _Symbol)
            return self.operands[0], self.operands[1]
        return None

    def __add__(self, other: Operand) -> _Symbol:
        return self.apply("add", other)

    def __sub__(self, other: Operand) -> _Symbol:
        return self.apply("sub", other)

    def __rsub__(self, other: float) -> _Symbol:
        return -self + other

    def __mul__(self, other: Operand) -> _Symbol:
        scaled = self._scaled()
        if scaled is not None and not isinstance(other, _Symbol):
            return scaled[0] * (scaled[1] * other)
        return self.apply("mul", other)

    def __truediv__(self, other: Operand) -> _Symbol:
        return self.apply("div", other)

    def __neg__(self) -> _Symbol:
        return self.apply("neg") if self._scaled() is None else self * -1.0

    __radd__, __rmul__ = __add__, __mul__

    def __lt__(self, other: Operand) -> _Symbol:
        return self.apply("lt", other)

    def __gt__(self, other: Operand) -> _Symbol:
        return self.apply("gt", other)


Operand = _Symbol | float
_Made = dict[tuple[str, tuple[Any, ...]], _Symbol]


def _where(condition: _Symbol, yes: Operand, no: Operand) -> _Symbol:
    number, bound = condition.operands
    assert isinstance(number, _Symbol)
    if not isinstance(yes, _Symbol) and not isinstance(no, _Symbol):
        made = condition if yes - no == 1.0 else condition * (yes - no)
        return made + no if no else made
    if bound == 0.0 and no == 0.0:
        size = number if condition.operator == "gt" else -number
        if yes is size:
            return size.apply("clamp_min", 0.0)
    if (condition.operator, number.operator, bound) == ("gt", RATIO, 0.0):
        names = tuple(x.operator if isinstance(x, _Symbol) else "" for x in (yes, no))
        if names in (
            ENTRY[:2],
            ENTRY[2:],
        ):  # p and q or their logarithms, the larger of which is p's there
            assert isinstance(yes, _Symbol)
            return yes.apply("maximum", no)
        if names[::-1] in (ENTRY[:2], ENTRY[2:]):
            assert isinstance(yes, _Symbol)
            return yes.apply("minimum", no)
    return condition.apply("mask").apply("select", yes, no)


def _log_mixture(log_ratio: _Symbol, share: float, rest: float) -> _Symbol:
    """As fastkd.divergences has it, in fewer steps."""
    size = -log_ratio.apply("abs")
    change = size.apply("expm1")
    if share == rest:  # it is never below -1/2
        return (change * share).apply("log1p")
    below = log_ratio < 0.0
    lower, upper = _where(below, share, rest), _where(below, rest, share)
    change = change * lower
    far = (size.apply("exp") * lower + upper).apply("log")
    return _where(change > -0.3, change.apply("log1p"), far)


def _function(operator: str) -> Callable[..., _Symbol]:
    return lambda symbol, *others: symbol.apply(operator, *others)


_WORDS = {word: _function(word) for word in VOCABULARY} | {
    "where": _where,
    "log_mixture": _log_mixture,
}


def _as_integers(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.itemsize == 4 else torch.int64)


def _mask(condition: Tensor, out: Tensor) -> None:
    """All bits where the condition is 1, none where it is 0."""
    torch.gt(_as_integers(condition), 0, out=_as_integers(out)).neg_()


@functools.cache
def _bits(number: float, size: int) -> int:
    """Those of a float of that many bytes, as an integer."""
    value: int = struct.unpack(
        *(("<i", struct.pack("<f", number)) if size == 4 else ("<q", struct.pack("<d", number)))
    )[0]
    return value


def _select(mask: Tensor, yes: Tensor | float, no: Tensor | float, out: Tensor) -> None:
    """The bits of yes where there is a mask, of no elsewhere; out may be yes."""
    made, bits = _as_integers(out), _as_integers(mask)
    one: Any
    other: Any
    one, other = (
        _as_integers(x) if isinstance(x, Tensor) else _bits(x, out.itemsize) for x in (yes, no)
    )
    if isinstance(no, float) and other == 0:
        torch.bitwise_and(one, bits, out=made)
    else:
        # torch takes no number first.
        torch.bitwise_xor(*((one, other) if isinstance(yes, Tensor) else (other, one)), out=made)
        made.bitwise_and_(bits).bitwise_xor_(other)


def _tvd(p: _Symbol, q: _Symbol, *_: Any) -> tuple[_Symbol, _Symbol, _Symbol]:
    """As fastkd.divergences has it but for rounding, which is as plain PyTorch's, and without a logarithm.

    Plain PyTorch takes the sign of p - q too, and next to its time an exponential of the ratio costs too much.
    """
    gap = p - q
    sign = gap.apply("sign") * 0.5
    return gap.apply("abs") * 0.5, -(q * sign), p * sign


_SHORTER = {divergences._tvd: _tvd}


class _Step(NamedTuple):
    """A call that writes to a buffer. Of the operands, an int is a buffer's number, and a float is itself."""

    function: Callable[..., Any]
    operands: tuple[int | float, ...]
    out: int


class _Program(NamedTuple):
    """The first buffers are the definition's arguments. All but p and q are overwritten."""

    steps: list[_Step]
    buffers: int
    terms: list[int]  # the numbers of the buffers of phi, g and h
    reads: frozenset[str]  # which arguments any step reads


_OWN: dict[str, Callable[..., Any]] = {
    "mask": _mask,
    "select": _select,
    "copy": lambda x, out: out.copy_(x),
}


@functools.lru_cache(maxsize=256)
def _program(function: Callable[..., Any], params: tuple[float, ...], wanted: int) -> _Program:
    """The first of the terms that a definition of the table returns, as steps."""
    made: _Made = {}
    names = (*ENTRY, RATIO)[: 5 if takes_ratio(function) else 4]
    entry = [_Symbol(name, (), made) for name in names]
    on_symbols = _SHORTER.get(function) or FunctionType(
        function.__code__, vars(divergences) | _WORDS
    )
    terms: list[_Symbol] = []
    for term in on_symbols(*entry, *params)[:wanted]:
        # Memory of its own.
        terms.append(term.apply("copy") if term in entry or term in terms else term)
    uses: dict[_Symbol, int] = {}
    ordered: list[_Symbol] = []

    def visit(symbol: Operand) -> None:
        if not isinstance(symbol, _Symbol):
            return
        uses[symbol] = uses.get(symbol, 0) + 1
        if uses[symbol] == 1 and symbol.operands:
            for operand in symbol.operands:
                visit(operand)
            ordered.append(symbol)

    for term in terms:
        visit(term)
    places = {symbol: number for number, symbol in enumerate(entry)}
    kept = {*entry[:2], *terms}
    free: list[int] = []
    buffers = len(entry)
    steps = []
    for symbol in ordered:
        operands = tuple(places[x] if isinstance(x, _Symbol) else float(x) for x in symbol.operands)
        last = []
        for x in symbol.operands:
            if isinstance(x, _Symbol):
                uses[x] -= 1
                if not uses[x] and x not in kept:
                    last.append(places[x])
        # What a selection writes first is what `yes` is read for, and `no` is still to be read.
        over = last
        if symbol.operator == "select":
            yes, no = symbol.operands[1:]
            over = [places[yes]] if isinstance(yes, _Symbol) and yes is not no else []
            over = [place for place in over if place in last]
        if over:
            place = over[0]
            last.remove(place)
        elif free:
            place = free.pop()
        else:
            place, buffers = buffers, buffers + 1
        free += last
        places[symbol] = place
        call = _OWN.get(symbol.operator) or getattr(torch, symbol.operator)
        steps.append(_Step(call, operands, place))
    reads = frozenset(symbol.operator for symbol in entry if symbol in uses)
    return _Program(steps, buffers, [places[term] for term in terms], reads)


def _applied(
    divergence: Divergence, entry: Sequence[Tensor], scratch: _Scratch, wanted: int = 3
) -> list[Tensor]:
    """The first of the terms that the definition returns, in memory of their own. The logarithms may be overwritten."""
    function, params = divergence.function, divergence.params
    shape, dtype = entry[-1].shape, entry[-1].dtype
    if function not in DEFINITIONS:
        # It may return its arguments, or a number a row.
        made = function(*entry, *params)[:wanted]
        return [term.to(dtype).expand(shape).clone() for term in made]
    program = _program(function, params, wanted)
    buffers = list(entry)
    buffers += [
        scratch(f"pool {number}", shape[0]) for number in range(len(entry), program.buffers)
    ]
    for call, operands, out in program.steps:
        call(*[buffers[x] if type(x) is int else x for x in operands], out=buffers[out])
    return [buffers[number] for number in program.terms]


def _reads(function: Callable[..., Any], params: tuple[float, ...], wanted: int) -> frozenset[str]:
    """Which of its arguments a definition needs."""
    if function in DEFINITIONS:
        return _program(function, params, wanted).reads
    return frozenset((*ENTRY, RATIO))


def _label_apart(s: _Side, t: _Side, divergence: Divergence) -> reference._Apart:
    """What the label's token adds, [rows, 1] each."""
    assert s.softmax is not None and t.softmax is not None and divergence.target is not None
    assert s.label is not None and t.label is not None
    kind = s.softmax.rest.dtype
    nothing = torch.zeros((), dtype=kind, device=s.z.device)

    def row(value: Tensor | None) -> Tensor:
        return nothing if value is None else value.to(kind).squeeze(-1)

    sides, tops = [], []
    for side in (s, t):
        assert side.softmax is not None
        spread = side.temperature
        sides.append(reference._Side(side.z, 1.0, spread, None))
        tops.append(row(side.softmax.top) / (row(spread) if isinstance(spread, Tensor) else spread))
    plain = [(None, None) if x.plain is None else (x.plain.total, x.plain.top) for x in (s, t)]
    found = reference._Found(
        s_top=tops[0],
        t_top=tops[1],
        s_sum=row(s.softmax.total),
        t_sum=row(t.softmax.total),
        plain_sum=row(plain[0][0]),
        plain_top=row(plain[0][1]),
        label=row(s.label),
        t_label=row(t.label),
        t_plain_sum=row(plain[1][0]),
        t_plain_top=row(plain[1][1]),
        total=nothing,
        columns=nothing,
    )
    made = reference._apart(sides[0], sides[1], found, divergence.target)
    return reference._Apart(*(value.unsqueeze(-1) for value in made))


class _Values(NamedTuple):
    """The results of the rows of a piece, [rows, 1]."""

    loss: Tensor
    distillation: Tensor
    cross_entropy: Tensor
    student_entropy: Tensor | None


def _dense_piece(
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    options: Options,
    want: Want,
    outs: Sequence[Tensor | None],
    scratch: _Scratch,
) -> _Values:
    """The loss of some rows [rows, columns], and the gradients, which it writes into outs."""
    divergence, alpha, target = options.divergence, options.alpha, options.divergence.target
    count, device, dtype = student.shape[0], student.device, scratch.dtype
    kind = _exact(dtype, device)

    def column(value: Tensor | None, number: float) -> float | Tensor:
        return number if value is None else value.to(dtype).unsqueeze(-1)

    temperature = column(rows.temperature, options.temperature)
    teacher_temperature = temperature
    if rows.teacher_temperature is not rows.temperature or rows.temperature is None:
        teacher_temperature = column(rows.teacher_temperature, options.teacher_temperature)
    with_labels = rows.labels is not None and alpha < 1.0
    compares = alpha > 0.0 or want.parts
    by_label = compares and target is not None and target.form == "label"
    normalizes = compares and divergence.normalized
    models = (
        _Model(
            "student", options.logit_scale, options.softcap, temperature,
            normalizes or want.parts, with_labels or by_label,
        ),
        _Model(
            "teacher", options.teacher_logit_scale, options.teacher_softcap, teacher_temperature,
            normalizes, by_label,
        ),
    )  # fmt: skip

    label = invalid = None
    if rows.labels is not None and options.reads_labels:
        label = rows.labels.unsqueeze(-1)
        invalid = (label < 0) | (label >= options.vocab_size)
        label = label.masked_fill(invalid, 0)
    apart = target is not None and compares
    s = _sweep(student, models[0], label, apart, want.parts, scratch)
    t = _sweep(teacher, models[1], label, apart, False, scratch) if compares else None

    # What multiplies a row: NaN where a label or a temperature is invalid.
    weight: float | Tensor = column(rows.weight, 1.0)
    for tempering in (rows.temperature, rows.teacher_temperature):
        if tempering is not None:
            wrong = ~(tempering > 0).unsqueeze(-1)
            invalid = wrong if invalid is None else invalid | wrong
    for side in (s, t):
        if side is not None and side.softmax is not None:
            # NaN or +inf among its logits, which a definition with a comparison in it may lose.
            wrong = side.softmax.total.isnan()
            if apart and side.label is not None:  # which is not in the sum
                wrong = wrong | (side.label == torch.inf)
            invalid = wrong if invalid is None else invalid | wrong
    if invalid is not None:
        if not isinstance(weight, Tensor):
            weight = torch.full((count, 1), weight, dtype=dtype, device=device)
        weight = weight.masked_fill(invalid, torch.nan)
    scale = options.scale if rows.scale is None else options.scale * rows.scale.to(dtype)
    row_scale = weight * scale
    t_squared = temperature * temperature if options.scale_by_temperature else 1.0

    zeros = torch.zeros((count, 1), dtype=kind, device=device)
    distillation, entropy, terms, added = zeros, None, None, None
    if compares:
        assert t is not None
        plain_side = s if divergence.normalized else s._replace(softmax=None)
        terms = _terms(divergence, plain_side, t, label, outs[1] is not None, scratch)
        distillation = terms.value()
        if want.parts:
            assert s.softmax is not None and s.spread is not None
            entropy = s.softmax.log_total - s.spread / s.softmax.total
        if target is not None:
            added = _label_apart(s, t, divergence)
            distillation = distillation + added.phi
            if entropy is not None:
                entropy = added.entropy + added.others * entropy
        distillation = distillation * t_squared

    def cross_entropy_of(smoothing: float) -> Tensor:
        assert s.plain is not None and s.label is not None and s.height is not None
        value = s.plain.log_total - (s.label.to(kind) - s.plain.top.to(kind))
        smooth = s.plain.log_total - s.height / options.vocab_size
        return (1.0 - smoothing) * value + smoothing * smooth if smoothing else value

    cross_entropy = cross_entropy_of(options.label_smoothing) if with_labels else zeros
    if by_label and added is not None:
        value = cross_entropy_of(0.0)
        distillation = distillation + torch.where(added.weight == 0, 0.0, added.weight * value)
    loss = alpha * distillation if alpha else zeros
    if with_labels:
        loss = loss + (1.0 - alpha) * cross_entropy
    loss = loss * weight

    keep = None  # on a CPU they all are
    if _waits(device):
        keep = counted_rows(rows, options.ignore_index)
        keep = None if keep is None else keep.unsqueeze(-1)

    def differentiated(index: int, side: _Side, spread: float | Tensor, out: Tensor) -> Tensor:
        """The divergence's part."""
        to = out if out.dtype == dtype else scratch("gradient", count)
        if not alpha:
            return to.zero_()
        assert terms is not None
        beyond = None if added is None else added[index]
        factor = row_scale * (alpha * t_squared / spread)
        gradient = _project(terms, index, side, beyond, factor, to)
        if beyond is not None:
            assert label is not None
            gradient.scatter_(-1, label, (beyond * factor).to(dtype))
        return gradient

    def finish(gradient: Tensor, slope: Tensor | None, scale: float, out: Tensor) -> None:
        _multiply(gradient, scale if slope is None else slope)
        if keep is not None:
            gradient.masked_fill_(~keep, 0.0)
        if gradient is not out:
            out.copy_(gradient)

    student_out, teacher_out = outs
    # The teacher's first, as the student's may overwrite logits that are still read.
    if teacher_out is not None:
        if t is None:
            teacher_out.copy_((zeros * row_scale).expand_as(teacher_out))
        else:
            gradient = differentiated(2, t, teacher_temperature, teacher_out)
            finish(gradient, t.slope, options.teacher_logit_scale, teacher_out)
    if student_out is not None:
        gradient = differentiated(1, s, temperature, student_out)
        if with_labels:
            factor = (1.0 - alpha) * row_scale
            _add_cross_entropy(gradient, s, label, factor, options, options.label_smoothing)
        if by_label and added is not None and alpha:
            factor = alpha * row_scale * added.weight
            _add_cross_entropy(gradient, s, label, factor, options, 0.0)
        finish(gradient, s.slope, options.logit_scale, student_out)

    def kept(value: Tensor) -> Tensor:
        return value if keep is None else value.masked_fill(~keep, 0.0)

    entropy = None if entropy is None else kept(entropy)
    return _Values(kept(loss), kept(distillation), kept(cross_entropy), entropy)


def _multiply(gradient: Tensor, factor: float | Tensor) -> Tensor:
    return gradient.mul_(factor) if isinstance(factor, Tensor) or factor != 1.0 else gradient


def _add_cross_entropy(
    gradient: Tensor,
    s: _Side,
    label: Tensor | None,
    factor: float | Tensor,
    options: Options,
    smoothing: float,
) -> None:
    """Add factor times (softmax - target), the target smoothed."""
    assert s.plain is not None and s.label is not None and label is not None
    # The label's column by itself: its probability less 1 has no digits left where the student is sure of it.
    s.plain.powers.scatter_(-1, label, 0.0)
    gradient.addcmul_(s.plain.powers, (factor / s.plain.total).to(gradient.dtype))
    log_q = (s.label.to(s.plain.rest.dtype) - s.plain.top) - s.plain.log_total
    gradient.scatter_add_(-1, label, (factor * (log_q.expm1() + smoothing)).to(gradient.dtype))
    if smoothing:
        gradient.sub_(factor * (smoothing / options.vocab_size))


@torch.no_grad()
def kd_rows(student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want) -> Result:
    """The loss of each row and its gradients; shapes and meaning as :class:`fastkd.call.contract.Result` has them."""
    student, teacher = readable(student), readable(teacher)
    lead, device, columns = student.shape[:-1], student.device, options.vocab_size
    dtype = row_dtype(student.dtype, teacher.dtype)
    result = native.outputs(student, teacher, want, row_dtype=dtype)
    numbers = _counted(rows, options.ignore_index, device)
    count = lead.numel() if numbers is None else numbers.numel()
    step = min(piece_rows(columns, dtype, device.type), max(count, 1))
    scratch = _Scratch(step, columns, dtype, device)
    gradients = (result.student_gradient, result.teacher_gradient)
    per_row = (result.loss, *result[4:])
    if numbers is not None:
        _clear_dropped([*per_row, *gradients], numbers, lead)
    for at in _pieces(count, step, numbers):
        s, t = (take(logits, lead, at)[:, :columns] for logits in (student, teacher))
        outs = [_Out(gradient, lead, at, columns) for gradient in gradients]
        buffers = [out.buffer(scratch, name) for out, name in zip(outs, ("s", "t"), strict=True)]
        values = _dense_piece(s, t, rows_at(rows, lead, at), options, want, buffers, scratch)
        for whole, part in zip(per_row, values, strict=True):
            if whole is not None and part is not None:
                put(whole, lead, at, part.squeeze(-1).to(dtype))
        for out in outs:
            out.close()
    for gradient in gradients:
        if gradient is not None and gradient.shape[-1] > columns:
            gradient[..., columns:] = 0.0
    factor = options.scale if rows.scale is None else options.scale * rows.scale
    total = result.loss.sum(dtype=_exact(dtype, device)) * factor
    return result._replace(total=total.to(dtype))


def _clear_dropped(values: Sequence[Tensor | None], counted: Tensor, lead: torch.Size) -> None:
    """Set the rows that are not counted to 0."""
    dropped = torch.ones(lead.numel(), dtype=torch.bool, device=counted.device)
    dropped[counted] = False
    at = dropped.nonzero().squeeze(1)
    for value in values:
        if value is not None:
            put(value, lead, at, torch.zeros((), dtype=value.dtype, device=value.device))


class _Out:
    """Where a piece's gradient goes: the result's own memory, or a buffer where its rows are not next to each other."""

    def __init__(self, whole: Tensor | None, lead: torch.Size, at: At, columns: int) -> None:
        self.whole, self.lead, self.at, self.columns = whole, lead, at, columns
        self.packed: Tensor | None = None

    def buffer(self, scratch: _Scratch, name: str) -> Tensor | None:
        """[rows, columns], to write to."""
        if self.whole is None:
            return None
        if isinstance(self.at, slice):
            try:
                rows = self.whole.view(self.lead.numel(), self.whole.shape[-1])
            except RuntimeError:  # strides of the caller, whose logits are overwritten
                pass
            else:
                return rows[self.at, : self.columns]
        count = len(self.at) if isinstance(self.at, Tensor) else self.at.stop - self.at.start
        self.packed = scratch(f"{name} packed", count)
        return self.packed

    def close(self) -> None:
        """Bring a buffer's rows to their places."""
        if self.packed is not None and self.whole is not None:
            packed = self.packed.to(self.whole.dtype)
            put(self.whole[..., : self.columns], self.lead, self.at, packed)


# ---- sparse teachers


def gather_events(student: Tensor, rows: Rows, options: Options, parts: bool) -> Events:
    """The student's rows as a sparse teacher sees them: fastkd/backends/sparse.py. Of a row that is dropped, zeros."""
    lead, device, dtype = student.shape[:-1], student.device, row_dtype(student.dtype)
    assert rows.ids is not None
    with_labels = rows.labels is not None and options.alpha < 1.0
    smooths = with_labels and options.label_smoothing > 0

    def per_row(wanted: bool, *columns: int) -> Any:
        return torch.zeros((*lead, *columns), dtype=dtype, device=device) if wanted else None

    events = Events(
        per_row(True), per_row(True), per_row(True, rows.ids.shape[-1]), per_row(True), per_row(True),
        per_row(parts), per_row(with_labels), per_row(with_labels), per_row(smooths),
        torch.ones(lead, dtype=torch.bool, device=device),
    )  # fmt: skip
    wholes = [value for value in events if isinstance(value, Tensor)]
    for at, s, some, scratch in _student_pieces(student, rows, options, dtype):
        made = _events_of_piece(s, some, options, parts, scratch)
        for whole, value in zip(wholes, made, strict=True):
            put(whole, lead, at, value)
    return events


def _student_pieces(
    student: Tensor, rows: Rows, options: Options, dtype: torch.dtype
) -> Iterator[tuple[At, Tensor, Rows, _Scratch]]:
    """(which rows, their logits, what belongs to them, buffers) of the counted rows, piece by piece."""
    lead, device, columns = student.shape[:-1], student.device, options.vocab_size
    student = readable(student)
    numbers = _counted(rows, options.ignore_index, device)
    count = lead.numel() if numbers is None else numbers.numel()
    step = min(piece_rows(columns, dtype, device.type), max(count, 1))
    scratch = _Scratch(step, columns, dtype, device)
    for at in _pieces(count, step, numbers):
        yield at, take(student, lead, at)[:, :columns], rows_at(rows, lead, at), scratch


def _seats(ids: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """(which ids are columns here, which columns those are and 0 for the others, -inf there and inf for the others)."""
    seats = ids - options.first_column
    here = (seats >= 0) & (seats < options.vocab_size)
    marks = torch.full(ids.shape, torch.inf, device=ids.device).masked_fill_(here, -torch.inf)
    return here, seats.masked_fill(~here, 0), marks


def _events_of_piece(
    student: Tensor, rows: Rows, options: Options, parts: bool, scratch: _Scratch
) -> list[Tensor]:
    """The fields of Events that are there, [rows, ...]."""
    ids, dtype, count = rows.ids, scratch.dtype, student.shape[0]
    assert ids is not None
    kind = _exact(dtype, student.device)
    z = scratch("z", count)
    adjusted, _ = _adjusted(student, options.logit_scale, options.softcap, z, scratch, "slope")
    here, seats, marks = _seats(ids, options)
    tokens = adjusted.gather(-1, seats).masked_fill_(~here, -torch.inf)
    origin = tokens.amax(-1, keepdim=True)
    at_1: list[Tensor] = []
    if rows.labels is not None and options.alpha < 1.0:
        top = _finite(adjusted.amax(-1, keepdim=True))
        label = rows.labels.unsqueeze(-1) - options.first_column
        named = (label >= 0) & (label < options.vocab_size)
        of_label = adjusted.gather(-1, label.masked_fill(~named, 0)) - top
        gap = torch.sub(adjusted, top, out=scratch("powers", count))
        mean = _sum(gap) / options.vocabulary
        at_1 = [_sum(gap.exp_()).log(), of_label.masked_fill(~named, -torch.inf)]
        at_1 += [mean] if options.label_smoothing else []
    if adjusted is not z:
        z.copy_(adjusted)
    z.scatter_reduce_(-1, seats, marks.to(dtype), "amin")
    tail_origin = z.amax(-1, keepdim=True)
    temperature: float | Tensor = options.temperature
    if rows.temperature is not None:
        temperature = rows.temperature.to(dtype).unsqueeze(-1)
    _divide(z.sub_(_finite(tail_origin)), temperature)
    powers = torch.exp(z, out=scratch("powers", count))
    total = _sum(powers)
    log_sum = total.log()
    entropy = []
    if parts:
        powers.div_(total.clamp(min=torch.finfo(dtype).tiny).to(dtype))
        log_q = z.sub_(_finite(log_sum).to(dtype)).clamp_(min=torch.finfo(dtype).min)
        entropy = [-_sum(powers.mul_(log_q))]
    tail = (tail_origin - _finite(origin)).to(kind) + temperature * log_sum
    known = ((ids == -1) | ((ids >= 0) & (ids < options.vocabulary))).all(-1)
    ordered = ids.sort(-1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(-1)
    numbers = [origin, tail_origin, tail, log_sum, *entropy, *at_1]
    made = [value.squeeze(-1).to(dtype) for value in numbers]
    made.insert(2, tokens - _finite(origin))
    return [*made, known & ~twice]


def spread_gradient(
    student: Tensor,
    events: Events,
    gradient: Tensor,
    cross_entropy_scale: Tensor | None,
    rows: Rows,
    options: Options,
    out: Tensor,
) -> Tensor:
    """The gradient of the events [..., K + 1], and the cross-entropy's, as that of the student's logits."""
    lead, columns, dtype = student.shape[:-1], options.vocab_size, row_dtype(student.dtype)
    assert rows.weight is not None
    counts = rows._replace(labels=None)  # its weight says which rows do
    numbers = _counted(counts, options.ignore_index, student.device)
    if numbers is not None:
        _clear_dropped([out], numbers, lead)
    for at, s, _, scratch in _student_pieces(student, counts, options, dtype):

        def part(value: Any, at: At = at) -> Any:
            return take(value, lead, at) if isinstance(value, Tensor) else value

        few, of_events = rows_at(rows, lead, at), Events(*map(part, events))
        made = _spread_piece(
            s, of_events, part(gradient), part(cross_entropy_scale), few, options, scratch
        )
        put(out[..., :columns], lead, at, made.to(out.dtype))
    if out.shape[-1] > columns:
        out[..., columns:] = 0.0
    return out


def _spread_piece(
    student: Tensor,
    events: Events,
    gradient: Tensor,
    cross_entropy_scale: Tensor | None,
    rows: Rows,
    options: Options,
    scratch: _Scratch,
) -> Tensor:
    ids, dtype, count = rows.ids, scratch.dtype, student.shape[0]
    assert ids is not None and rows.weight is not None
    z = scratch("z", count)
    adjusted, slope = _adjusted(student, options.logit_scale, options.softcap, z, scratch, "slope")
    here, seats, marks = _seats(ids, options)

    def column(value: Tensor) -> Tensor:
        return value.to(dtype).unsqueeze(-1)

    entropic = None
    if cross_entropy_scale is not None:
        assert rows.labels is not None and events.log_sum is not None
        origin = column(torch.maximum(events.origin, events.tail_origin) + events.log_sum)
        factor = column(cross_entropy_scale)
        entropic = torch.sub(adjusted, origin, out=scratch("entropic", count)).exp_().mul_(factor)
        label = rows.labels.unsqueeze(-1) - options.first_column
        named = (label >= 0) & (label < options.vocab_size)
        at_label = (factor * (options.label_smoothing - 1.0)).masked_fill(~named, 0.0)
        entropic.scatter_add_(-1, label.masked_fill(~named, 0), at_label)
        if options.label_smoothing:
            entropic.sub_(factor * (options.label_smoothing / options.vocabulary))
    if adjusted is not z:
        z.copy_(adjusted)
    z.scatter_reduce_(-1, seats, marks.to(dtype), "amin")
    temperature: float | Tensor = options.temperature
    if rows.temperature is not None:
        temperature = column(rows.temperature)
    _divide(z.sub_(_finite(column(events.tail_origin))), temperature)
    z.sub_(_finite(column(events.tail_log_sum))).exp_()
    # Where there is no tail its derivative may be infinite, and is one of nothing.
    of_tail = gradient[:, -1:].masked_fill(column(events.tail_log_sum) == -torch.inf, 0.0)
    z.mul_(of_tail)
    z.scatter_add_(-1, seats, gradient[:, :-1].masked_fill(~here, 0.0).to(dtype))
    if entropic is not None:
        z.add_(entropic)
    if slope is not None:
        z.mul_(slope)
    elif options.logit_scale != 1.0:
        z.mul_(options.logit_scale)
    weight = column(rows.weight)
    z.add_(torch.where(weight.isnan(), torch.nan, 0.0))
    if _waits(student.device):
        z.masked_fill_(weight == 0, 0.0)
    return z


# ---- steps of the reference, a piece of rows at a time


def _slices(
    lead: torch.Size, columns: int, dtype: torch.dtype, device: torch.device
) -> list[slice]:
    """All rows, none packed: what is computed of a dropped one is not used."""
    count, step = lead.numel(), piece_rows(columns, dtype, device.type)
    # One of no rows where there are none, so that what is returned has its shape.
    return [slice(start, min(start + step, count)) for start in range(0, max(count, 1), step)]


def shard_statistics(call: ShardCall) -> Statistics:
    """Of this process's columns: 12 numbers a row in float64."""
    made = [reference.shard_statistics(part) for _, part in _parts_of_shard(call)]
    return Statistics(torch.cat([statistics.gathered for statistics in made]))


def shard_sums(call: ShardCall) -> Tensor | None:
    """Of this process's columns, given the statistics of all: 3 numbers a row in float64."""
    made = [reference.shard_sums(part) for _, part in _parts_of_shard(call)]
    return torch.cat([sums for sums in made if sums is not None])


def shard_results(call: ShardCall) -> None:
    """Fill the result, given the statistics and the sums of all processes."""
    lead = call.student.shape[:-1]
    for at, part in _parts_of_shard(call):

        def memory(whole: Tensor | None, at: slice = at) -> Any:
            return None if whole is None else torch.empty_like(take(whole, lead, at))

        fields = [memory(whole) for whole in call.result._replace(total=None)]  # type: ignore[arg-type]
        own = Result(*fields)
        reference.shard_results(part._replace(result=own))
        for whole, values in zip(call.result, own, strict=True):
            if whole is not None and values is not None:
                put(whole, lead, at, values)


def _parts_of_shard(call: ShardCall) -> Iterator[tuple[slice, ShardCall]]:
    """(which rows, the call of these rows alone, but for its result)."""
    lead = call.student.shape[:-1]
    dtype = row_dtype(call.student.dtype, call.teacher.dtype)
    for at in _slices(lead, call.options.vocab_size, dtype, call.student.device):
        yield (
            at,
            call._replace(
                student=take(call.student, lead, at),
                teacher=take(call.teacher, lead, at),
                rows=rows_at(call.rows, lead, at),
                statistics=None
                if call.statistics is None
                else Statistics(call.statistics.gathered[:, at]),
                sums=None if call.sums is None else call.sums[:, at],
            ),
        )


def mutual_rows(
    logits: Sequence[Tensor],
    rows: Rows,
    options: mutual.Options,
    wanted: Sequence[bool],
    parts: bool,
) -> mutual.Result:
    """The losses of every row's students and their gradients: :mod:`fastkd.call.mutual` has the contract."""
    first, students = logits[0], len(logits)
    lead, dtype = first.shape[:-1], row_dtype(first.dtype)
    result = mutual.outputs(logits, wanted, parts, dtype=dtype)
    for at in _slices(lead, students * first.shape[-1], dtype, first.device):
        some = [take(student, lead, at) for student in logits]
        made = plain_mutual.mutual_rows(some, rows_at(rows, lead, at), options, wanted, parts)
        for name in ("loss", "divergence", "cross_entropy"):
            whole, values = getattr(result, name), getattr(made, name)
            for student in range(students if whole is not None else 0):
                put(whole[student], lead, at, values[student])
        for gradient, values in zip(result.gradients, made.gradients, strict=True):
            if gradient is not None and values is not None:
                put(gradient, lead, at, values)
    scale = options.scale if rows.scale is None else options.scale * rows.scale
    total = result.loss.reshape(students, -1).sum(-1, dtype=_exact(dtype, first.device)) * scale
    return result._replace(total=total.to(dtype))
