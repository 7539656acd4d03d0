"""The portable backend: plain PyTorch, a few rows at a time. What "auto" falls back to where there are no kernels.

It serves every call, on every device and in every dtype that PyTorch has. The formulas are those of
:mod:`fastkd.reference`, which computes them on whole tensors and is the oracle. Here a piece of rows stays in the
processor's cache, the operators write to buffers that every piece uses again, and the gradient goes straight to the
tensor that is returned. Fresh memory is what plain PyTorch spends most of its time on.

A piece of dense rows has code of its own (:func:`_dense_piece`). Sparse teachers, mutual learning, and rows whose
vocabulary is spread over processes run the reference's steps piece by piece.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import divergences, mutual, native, reference, topk
from fastkd.chunks import At, put, rows_at, take
from fastkd.divergences import DEFINITIONS, ENTRY, VOCABULARY, Divergence, arguments_of, takes_ratio
from fastkd.plan import piece_rows
from fastkd.reference import empty, evaluate, scale_rows_
from fastkd.rows import Options, Result, Rows, Statistics, Want, counted_rows, row_dtype
from fastkd.topk import Events, topk_rows

__all__ = [
    "empty", "gather_events", "kd_rows", "mutual_rows", "scale_rows_", "shard_results",
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
    """Of the few numbers of a row. Not every device has float64."""
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

    @property
    def total(self) -> Tensor:
        """Of all columns."""
        return self.largest + self.rest

    @property
    def log_total(self) -> Tensor:
        """Its logarithm, also of a rest that is lost in the total."""
        return (self.rest + (self.largest - 1.0)).log1p()


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


def _sum(values: Tensor) -> Tensor:
    """[rows, 1]; what follows with the few numbers of a row is more exact than its columns are."""
    return values.sum(-1, keepdim=True).to(_exact(values.dtype, values.device))


def _exponentials(gap: Tensor, top: Tensor, seat: Tensor, out: Tensor) -> _Softmax:
    powers = torch.exp(gap, out=out)
    largest = powers.gather(-1, seat)
    rest = _sum(powers.scatter_(-1, seat, 0.0))
    powers.scatter_(-1, seat, largest)
    return _Softmax(powers, top, seat, largest.to(rest.dtype), rest)


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
    top, seat = _largest(z)
    gap = torch.sub(z, _finite(top), out=scratch(f"{name} gap", count))
    if model.plain:
        plain = _exponentials(gap, _finite(top), seat, scratch(f"{name} plain", count))
        side = side._replace(plain=plain, height=_sum(gap))
    if not model.softmax:
        return side
    if apart:
        assert label is not None
        if z is logits:
            z = scratch(f"{name} z", count).copy_(z)
        top, seat = _largest(z.scatter_(-1, label, -torch.inf))
        torch.sub(z, _finite(top), out=gap)
        side = side._replace(z=z)
    _divide(gap, temperature)
    keeps = parts and name == "student"
    softmax = _exponentials(
        gap, _finite(top), seat, scratch(f"{name} powers", count) if keeps else gap
    )
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


def _log_ratio(s: _Side, t: _Side, out: Tensor) -> Tensor:
    """log p - log q as one difference of logits less a constant of the row."""
    first, second = s.softmax, t.softmax
    alike = s.temperature is t.temperature or (
        not isinstance(s.temperature, Tensor)
        and not isinstance(t.temperature, Tensor)
        and s.temperature == t.temperature
    )
    if first is None or second is None:
        if alike:
            return _divide(torch.sub(t.z, s.z, out=out), s.temperature)
        torch.div(t.z, t.temperature, out=out)
        return out.sub_(s.z / s.temperature)
    constant = first.log_total - second.log_total
    shift = (first.top - second.top).to(constant.dtype)
    # Where one model's logits are all higher than the other's, their difference has lost digits.
    near = alike and not _waits(out.device) and bool((shift.abs() < NEAR).all())
    if near:
        constant = constant + shift / s.temperature
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

    def total(self, index: int) -> Tensor:
        """The sum of a field over all columns, [rows, 1]."""
        values = self.field(index)
        if self.different is None:
            return _sum(values)
        first, second = self.tops[index].split(1, -1)
        return _sum(values) + first + self.different * second


def _evaluated(
    divergence: Divergence,
    s: _Side,
    t: _Side,
    label: Tensor | None,
    wants_h: bool,
    scratch: _Scratch,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(phi, g, h) of every column, in fresh tensors; 0 of a label that is compared apart."""
    count, function = s.z.shape[0], divergence.function
    apart = None if divergence.target is None else label
    ratio = _log_ratio(s, t, scratch("ratio", count))
    if apart is not None:
        ratio.scatter_(-1, apart, 0.0)
    # Then no logarithm is one of 0. The policy for those costs more than all the rest, and on a device the question
    # whether it is needed would cost a wait.
    quick = not _waits(ratio.device) and bool(ratio.sum().isfinite())
    log_p = log_q = ratio
    if not quick or _reads_logarithms(function):
        log_p = _log_softmax(t, scratch("log p", count))
        log_q = _log_softmax(s, scratch("log q", count))
    pair = None
    if s.softmax is not None and t.softmax is not None:
        pair = (t.softmax.powers, s.softmax.powers)
    if not quick:
        return evaluate(divergence, log_p, log_q, pair)
    if pair is None:
        pair = (torch.ones((), dtype=ratio.dtype, device=ratio.device).expand_as(ratio),) * 2
    if apart is not None and log_p is not ratio:
        for logs in (log_p, log_q):
            logs.scatter_(-1, apart, torch.finfo(ratio.dtype).min)
    entry = arguments_of(function, *pair, log_p, log_q, ratio)
    phi, g, *more = _applied(divergence, entry, scratch)
    h = more[0] if more else None
    if wants_h and h is None:
        assert divergence.degree is not None  # validated
        h = torch.mul(phi, divergence.degree, out=scratch("h", count)).sub_(g)
    if apart is not None:
        for term in (phi, g, h):
            if term is not None:
                term.scatter_(-1, apart, 0.0)
    return phi, g, h


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
        gap = side.z.gather(-1, seats).to(kind) - side.softmax.top.to(kind)
        temperature = side.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.to(kind)
        logs.append(gap / temperature - side.softmax.log_total)
    log_q, log_p = logs
    tops = evaluate(divergence, log_p, log_q)
    for term in made:
        if term is not None:
            term.scatter_(-1, seats, 0.0)
    different = (seats[:, :1] != seats[:, 1:]).to(log_q.dtype)
    return _Terms(*made, seats, different, tops, (log_q, log_p))


def _project(terms: _Terms, index: int, side: _Side, beyond: Tensor | None, to: Tensor) -> Tensor:
    """x_v - q_v sum_u x_u of the field with that number, in `to`; beyond [rows, 1] is what else is in the sum."""
    x = terms.field(index)
    if terms.seats is None or side.softmax is None:
        return to.copy_(x)
    total = terms.total(index) if beyond is None else terms.total(index) + beyond
    torch.addcmul(x, side.softmax.powers, total.to(x.dtype), value=-1.0, out=to)
    assert terms.logs is not None and terms.different is not None
    own, log_q = terms.tops[index], terms.logs[index - 1]
    others = _sum(x) + terms.different * own.flip(-1)
    if beyond is not None:
        others = others + beyond
    exact = -own * log_q.expm1() - log_q.exp() * others
    return to.scatter_(-1, terms.seats, exact.to(to.dtype))


# ---- the definitions of the table, without fresh memory
#
# Their code runs on _Number in place of tensors, as Triton runs it on its own: what an operator gives goes to a buffer
# of the piece, which is free again as soon as nothing refers to the number. And `where` selects bits, as torch's takes
# 4 nanoseconds an element on a CPU.


class _Pool:
    """Buffers of a piece that are free."""

    def __init__(self, scratch: _Scratch, count: int) -> None:
        self.scratch, self.count, self.made = scratch, count, 0
        self.free: list[Tensor] = []

    def number(self) -> _Number:
        """One whose buffer may hold anything."""
        if not self.free:
            self.made += 1
            self.free.append(self.scratch(f"pool {self.made}", self.count))
        return _Number(self.free.pop(), self, True)


class _Number:
    """A tensor of a piece in a definition."""

    __slots__ = ("owned", "pool", "tensor")

    def __init__(self, tensor: Tensor, pool: _Pool, owned: bool = False) -> None:
        self.tensor, self.pool, self.owned = tensor, pool, owned

    def __del__(self) -> None:
        if self.owned:
            self.pool.free.append(self.tensor)

    def apply(self, operator: Callable[..., Tensor], *others: Operand) -> _Number:
        """What a function of torch gives."""
        made = self.pool.number()
        operator(self.tensor, *map(_plain, others), out=made.tensor)
        return made

    def __add__(self, other: Operand) -> _Number:
        return self.apply(torch.add, other)

    def __sub__(self, other: Operand) -> _Number:
        return self.apply(torch.sub, other)

    def __rsub__(self, other: float) -> _Number:
        made = -self
        made.tensor.add_(other)
        return made

    def __mul__(self, other: Operand) -> _Number:
        return self.apply(torch.mul, other)

    def __truediv__(self, other: Operand) -> _Number:
        return self.apply(torch.div, other)

    def __neg__(self) -> _Number:
        return self.apply(torch.neg)

    __radd__, __rmul__ = __add__, __mul__

    def __lt__(self, other: Operand) -> _Condition:
        return _Condition(torch.lt, self, other)

    def __gt__(self, other: Operand) -> _Condition:
        return _Condition(torch.gt, self, other)


class _Condition(NamedTuple):
    """A comparison, which is computed where it is used."""

    operator: Callable[..., Tensor]
    number: _Number
    other: Operand

    def as_number(self) -> _Number:
        """1 where it holds, else 0."""
        return self.number.apply(self.operator, self.other)


Operand = _Number | float


def _plain(operand: Operand) -> Tensor | float:
    return operand.tensor if isinstance(operand, _Number) else operand


def _where(condition: _Condition, yes: Operand, no: Operand) -> _Number:
    made = condition.as_number()
    if not isinstance(yes, _Number) and not isinstance(no, _Number):
        if (yes, no) != (1.0, 0.0):
            made.tensor.mul_(yes - no).add_(no)
        return made
    kind = torch.int32 if made.tensor.itemsize == 4 else torch.int64
    bits = made.tensor.view(kind).gt_(0).neg_()
    if isinstance(yes, _Number) and isinstance(no, _Number):
        other = no.tensor.view(kind)
        difference = condition.number.pool.number()
        torch.bitwise_xor(yes.tensor.view(kind), other, out=difference.tensor.view(kind))
        bits.bitwise_and_(difference.tensor.view(kind)).bitwise_xor_(other)
    elif isinstance(yes, _Number):
        bits.bitwise_and_(yes.tensor.view(kind))
        if no:
            made = made + _where(condition, 0.0, no)
    else:
        assert isinstance(no, _Number)
        bits.bitwise_not_().bitwise_and_(no.tensor.view(kind))
        if yes:
            made = made + _where(condition, yes, 0.0)
    return made


def _log_mixture(log_ratio: _Number, share: float, rest: float) -> _Number:
    """As fastkd.divergences has it, in fewer steps."""
    size = log_ratio.apply(torch.abs)
    size.tensor.neg_()
    change = size.apply(torch.expm1)
    if share == rest:  # it is never below -1/2
        change.tensor.mul_(share).log1p_()
        return change
    below = log_ratio < 0.0
    lower, upper = _where(below, share, rest), _where(below, rest, share)
    change.tensor.mul_(lower.tensor)
    size.tensor.exp_().mul_(lower.tensor).add_(upper.tensor).log_()
    return _where(change > -0.3, change.apply(torch.log1p), size)


def _function(operator: Callable[..., Tensor]) -> Callable[..., _Number]:
    return lambda number, *others: number.apply(operator, *others)


_WORDS = {
    word: _function(getattr(torch, word))
    for word in VOCABULARY
    if word not in ("where", "log_mixture")
} | {"where": _where, "log_mixture": _log_mixture}


@functools.cache
def _on_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A definition of the table, with those words."""
    return FunctionType(function.__code__, vars(divergences) | _WORDS)


def _applied(divergence: Divergence, entry: Sequence[Tensor], scratch: _Scratch) -> list[Tensor]:
    """What the definition gives, in memory of its own."""
    function, params = divergence.function, divergence.params
    shape, dtype = entry[-1].shape, entry[-1].dtype
    if function not in DEFINITIONS:
        # It may return its arguments, or a number a row.
        made = function(*entry, *params)
        return [term.to(dtype).expand(shape).clone() for term in made]
    pool = _Pool(scratch, shape[0])
    numbers = _on_numbers(function)(*(_Number(tensor, pool) for tensor in entry), *params)
    assert all(number.owned for number in numbers)
    return [number.tensor for number in numbers]


@functools.cache
def _reads_logarithms(function: Callable[..., Any]) -> bool:
    """Whether a definition uses log_p or log_q, and not their difference alone."""
    if not takes_ratio(function):
        return True
    names = {str(step.argval) for step in dis.get_instructions(function)}
    return any(log in name for name in names for log in ENTRY[2:])


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
    """Of the rows of a piece, [rows, 1]."""

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
        distillation = terms.total(0)
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
        gradient = _project(terms, index, side, beyond, to)
        if beyond is not None:
            assert label is not None
            gradient.scatter_(-1, label, beyond.to(dtype))
        return _multiply(gradient, row_scale * (alpha * t_squared / spread))

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
    """The loss of each row and its gradients; shapes and meaning as :class:`fastkd.rows.Result` has them."""
    if rows.ids is not None:
        return topk_rows(sys.modules[__name__], student, teacher, rows, options, want)
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
    """The student's rows as a sparse teacher sees them: fastkd/topk.py. Of a row that is dropped, zeros."""
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
    z.scatter_add_(-1, seats, gradient[:, :-1].masked_fill(~here, 0.0))
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


def shard_statistics(
    student: Tensor, teacher: Tensor, rows: Rows, options: Options, result: Result
) -> Statistics:
    """Of this process's columns: 12 numbers a row in float64."""
    if rows.ids is not None:
        return topk.shard_statistics(sys.modules[__name__], student, teacher, rows, options, result)
    made = [
        reference.shard_statistics(*given, result)
        for _, given in _parts_of_shard(student, teacher, rows, options)
    ]
    return Statistics(torch.cat([statistics.gathered for statistics in made]))


def shard_sums(
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    options: Options,
    result: Result,
    statistics: Statistics,
) -> Tensor | None:
    """Of this process's columns, given the statistics of all: 3 numbers a row in float64."""
    if rows.ids is not None:
        return None
    made = [
        reference.shard_sums(*given, result, Statistics(statistics.gathered[:, at]))
        for at, given in _parts_of_shard(student, teacher, rows, options)
    ]
    return torch.cat([sums for sums in made if sums is not None])


def shard_results(
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    options: Options,
    result: Result,
    statistics: Statistics,
    sums: Tensor | None,
) -> None:
    """Fill the result, given the statistics and the sums of all processes."""
    if rows.ids is not None:
        topk.shard_results(
            sys.modules[__name__], student, teacher, rows, options, result, statistics
        )
        return
    assert sums is not None
    lead = student.shape[:-1]
    for at, given in _parts_of_shard(student, teacher, rows, options):

        def memory(whole: Tensor | None, at: slice = at) -> Any:
            return None if whole is None else torch.empty_like(take(whole, lead, at))

        fields = [memory(whole) for whole in result._replace(total=None)]  # type: ignore[arg-type]
        part = Result(*fields)
        of_rows = Statistics(statistics.gathered[:, at])
        reference.shard_results(*given, part, of_rows, sums[:, at])
        for whole, values in zip(result, part, strict=True):
            if whole is not None and values is not None:
                put(whole, lead, at, values)


def _parts_of_shard(
    student: Tensor, teacher: Tensor, rows: Rows, options: Options
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Rows, Options]]]:
    lead = student.shape[:-1]
    dtype = row_dtype(student.dtype, teacher.dtype)
    for at in _slices(lead, options.vocab_size, dtype, student.device):
        s, t = take(student, lead, at), take(teacher, lead, at)
        yield at, (s, t, rows_at(rows, lead, at), options)


def mutual_rows(
    logits: Sequence[Tensor],
    rows: Rows,
    options: mutual.Options,
    wanted: Sequence[bool],
    parts: bool,
) -> mutual.Result:
    """The losses of every row's students and their gradients: :mod:`fastkd.mutual` has the contract."""
    first, students = logits[0], len(logits)
    lead, dtype = first.shape[:-1], row_dtype(first.dtype)
    result = mutual.outputs(logits, wanted, parts, dtype=dtype)
    for at in _slices(lead, students * first.shape[-1], dtype, first.device):
        some = [take(student, lead, at) for student in logits]
        made = mutual.mutual_rows(some, rows_at(rows, lead, at), options, wanted, parts)
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
