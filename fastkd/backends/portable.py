"""The portable backend: plain PyTorch, a few rows at a time. "auto" falls back to it where there are no kernels.

It serves every call, on every device and in every dtype that the losses accept. The formulas are those of
:mod:`fastkd.backends.reference`, the oracle, which computes them on whole tensors. Here a piece of rows stays in the
processor's cache, operators write to buffers that the next piece reuses, and the gradient goes straight to the tensor
that is returned, because plain PyTorch spends most of its time on fresh memory.

A piece of dense rows has code of its own (:func:`_dense_piece`). Sparse teachers, mutual learning, and rows whose
vocabulary is spread over processes run the steps of the reference piece by piece.
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
from fastkd.backends import mutual as reference_mutual
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
from fastkd.core.tensors import finite_max, readable
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


# The search for a row's maximum proceeds in blocks of this many columns.
BLOCK = 512
# If the maxima of both models' logits differ by less, the logits are subtracted directly, without loss of digits.
NEAR = 8.0


def _synchronizes(device: torch.device) -> bool:
    """Whether reading a number from this device makes the host wait for it."""
    return device.type != "cpu"


def _exact(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype for the few numbers of each row: float64 where the device has it."""
    return torch.float64 if device.type in ("cpu", "cuda") else dtype


# Pieces of rows


def _counted(rows: Rows, ignore_index: int, device: torch.device) -> Tensor | None:
    """Indices of the counted rows; None where all rows are computed.

    On a device all rows are computed, because counting them would synchronize; dropped rows are then set to 0.
    """
    if _synchronizes(device):
        return None
    counted = counted_rows(rows, ignore_index)
    if counted is None:
        return None
    indices = counted.flatten().nonzero().squeeze(1)
    return None if indices.numel() == counted.numel() else indices


def _pieces(count: int, step: int, indices: Tensor | None) -> Iterator[At]:
    for start in range(0, count, step):
        piece = slice(start, min(start + step, count))
        yield piece if indices is None else indices[piece]


class _Scratch:
    """Named buffers [rows, columns] that every piece reuses."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = (rows, columns), dtype, device
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        buffer = self.buffers[name]
        return buffer if rows == self.shape[0] else buffer[:rows]


# Dense rows
#
# If a model is sure of a token, the probability of its column rounds to 1, and g - q sum g loses all its digits there.
# So the sum of exponentials is kept separate from its largest term, and the contribution of both models' top columns is
# computed separately, in float64: a few numbers per row.


class _Model(NamedTuple):
    """The options of one model, and which of its softmaxes a piece needs."""

    name: str
    scale: float
    softcap: float
    # A number, or [rows, 1].
    temperature: float | Tensor
    # Whether the softmax at the temperature is needed.
    needs_softmax: bool
    # Whether the softmax at temperature 1 is needed.
    needs_softmax_t1: bool


class _Softmax(NamedTuple):
    """A softmax and the numbers that it is computed from: exps is [rows, columns], the other fields are [rows, 1]."""

    # exp((z - max) / temperature), which is 1 in the top column; once _sweep has divided it by exp_sum, the softmax.
    exps: Tensor
    row_max: Tensor
    # The top column.
    argmax: Tensor
    # exps in the top column: 1, or 0 or NaN in a row that has no softmax.
    max_term: Tensor
    # Sum of exps over the other columns.
    others_sum: Tensor
    # Sum of exps over all columns.
    exp_sum: Tensor
    # Logarithm of exp_sum, from log1p, so that an others_sum too small to change exp_sum still counts.
    log_exp_sum: Tensor


class _Side(NamedTuple):
    """One model's columns in a piece."""

    # Scaled and soft-capped logits; -inf in the column of a label with a separate term.
    z: Tensor
    # dz / dlogits under a softcap; None: the slope is the scale.
    slope: Tensor | None
    # z of the label, [rows, 1].
    label: Tensor | None
    temperature: float | Tensor
    softmax: _Softmax | None = None
    # Over all columns, at temperature 1.
    softmax_t1: _Softmax | None = None
    # Sum of exp(x) x over x = (z - max) / temperature, [rows, 1].
    weighted_sum: Tensor | None = None
    # Sum of z - max at temperature 1, [rows, 1].
    centered_sum: Tensor | None = None


def _adjusted(
    logits: Tensor, scale: float, softcap: float, buffer: Tensor, scratch: _Scratch, name: str
) -> tuple[Tensor, Tensor | None]:
    """Return (scaled and soft-capped logits z, dz / dlogits under a softcap or None).

    z is the logits themselves if nothing changes them, else it is in the buffer.
    """
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
    """Return (the maximum of each row, its column), [rows, 1].

    Computes the maximum of each block first, and searches only the best block for the column: torch's search for the
    column takes 8 times as long.
    """
    blocks = z.shape[-1] // BLOCK
    if blocks < 4:
        return z.max(-1, keepdim=True)
    body = z[:, : blocks * BLOCK].unflatten(-1, (blocks, BLOCK))
    row_max, block = body.amax(-1).max(-1, keepdim=True)
    top_block = body.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1)
    argmax = block * BLOCK + top_block.argmax(-1, keepdim=True)
    if blocks * BLOCK < z.shape[-1]:
        end_max, column = z[:, blocks * BLOCK :].max(-1, keepdim=True)
        in_end = (end_max > row_max) | end_max.isnan()
        row_max = end_max.where(in_end, row_max)
        argmax = (column + blocks * BLOCK).where(in_end, argmax)
    return row_max, argmax


def _finite_largest(z: Tensor) -> tuple[Tensor, Tensor]:
    """Like _largest, but with 0 for a maximum of -inf."""
    row_max, argmax = _largest(z)
    return finite_max(row_max), argmax


def _sum(values: Tensor) -> Tensor:
    """The sum of each row, [rows, 1], in the dtype that :func:`_exact` returns."""
    return values.sum(-1, keepdim=True).to(_exact(values.dtype, values.device))


def _exponentials(centered: Tensor, row_max: Tensor, argmax: Tensor, out: Tensor) -> _Softmax:
    exps = torch.exp(centered, out=out)
    max_term = exps.gather(-1, argmax)
    others_sum = _sum(exps.scatter_(-1, argmax, 0.0))
    exps.scatter_(-1, argmax, max_term)
    max_term = max_term.to(others_sum.dtype)
    log_exp_sum = (others_sum + (max_term - 1.0)).log1p_()
    return _Softmax(exps, row_max, argmax, max_term, others_sum, max_term + others_sum, log_exp_sum)


def _sweep(
    logits: Tensor,
    model: _Model,
    label: Tensor | None,
    separate_label: bool,
    parts: bool,
    scratch: _Scratch,
) -> _Side:
    """Sweep over one model's logits in a piece; label [rows, 1] is the label's column, if it is needed."""
    count, temperature, name = logits.shape[0], model.temperature, model.name
    z, slope = _adjusted(
        logits, model.scale, model.softcap, scratch(f"{name} z", count), scratch, f"{name} slope"
    )
    side = _Side(z, slope, None if label is None else z.gather(-1, label), temperature)
    if not (model.needs_softmax or model.needs_softmax_t1):
        return side
    row_max, argmax = _finite_largest(z)
    centered = torch.sub(z, row_max, out=scratch(f"{name} centered", count))
    if model.needs_softmax_t1:
        out = scratch(f"{name} softmax at 1", count)
        softmax_t1 = _exponentials(centered, row_max, argmax, out)
        side = side._replace(softmax_t1=softmax_t1, centered_sum=_sum(centered))
    if not model.needs_softmax:
        return side
    if separate_label:
        assert label is not None
        if z is logits:
            z = scratch(f"{name} z", count).copy_(z)
        row_max, argmax = _finite_largest(z.scatter_(-1, label, -torch.inf))
        torch.sub(z, row_max, out=centered)
        side = side._replace(z=z)
    _divide(centered, temperature)
    needs_entropy = parts and name == "student"
    out = scratch(f"{name} exps", count) if needs_entropy else centered
    softmax = _exponentials(centered, row_max, argmax, out)
    if needs_entropy:
        centered.clamp_(min=torch.finfo(centered.dtype).min).mul_(softmax.exps)
        side = side._replace(weighted_sum=_sum(centered))
    softmax.exps.div_(softmax.exp_sum.to(centered.dtype))
    return side._replace(softmax=softmax)


def _divide(z: Tensor, temperature: float | Tensor) -> Tensor:
    return z.div_(temperature) if isinstance(temperature, Tensor) or temperature != 1.0 else z


def _log_softmax(side: _Side, out: Tensor) -> Tensor:
    """The log-probabilities; for a divergence that does not normalize, the tempered logits."""
    if side.softmax is None:
        return torch.div(side.z, side.temperature, out=out)
    centered = _divide(torch.sub(side.z, side.softmax.row_max, out=out), side.temperature)
    return centered.sub_(side.softmax.log_exp_sum.to(out.dtype))


def _same_temperature(s: _Side, t: _Side) -> bool:
    if isinstance(s.temperature, Tensor) or isinstance(t.temperature, Tensor):
        return s.temperature is t.temperature
    return s.temperature == t.temperature


def _near(s: _Side, t: _Side) -> Tensor | None:
    """Whether the maxima of a row's two sides are near each other, [rows, 1]; None if they cannot be compared here."""
    if s.softmax is None or t.softmax is None:
        return None
    if _synchronizes(s.z.device) or not _same_temperature(s, t):
        return None
    return (s.softmax.row_max - t.softmax.row_max).abs() < NEAR


def _log_ratio(s: _Side, t: _Side, out: Tensor) -> Tensor:
    """Compute log p - log q as one difference of logits plus a constant per row."""
    q, p = s.softmax, t.softmax
    same_temperature = _same_temperature(s, t)
    if q is None or p is None:
        if same_temperature:
            return _divide(torch.sub(t.z, s.z, out=out), s.temperature)
        torch.div(t.z, t.temperature, out=out)
        return out.sub_(s.z / s.temperature)
    constant = q.log_exp_sum - p.log_exp_sum
    near = _near(s, t)
    # If one model's logits are all much higher than the other's, their direct difference would lose digits.
    if near is not None and bool(near.all()):
        constant = constant + (q.row_max - p.row_max).to(constant.dtype) / s.temperature
        _divide(torch.sub(t.z, s.z, out=out), s.temperature)
    else:
        torch.sub(t.z, p.row_max, out=out)
        if not same_temperature:
            out.mul_(s.temperature / t.temperature)
        _divide(out.sub_(s.z - q.row_max), s.temperature)
    return out.add_(constant.to(out.dtype))


class _Terms(NamedTuple):
    """Phi, g and h of every column [rows, columns], and of both models' top columns separately, [rows, 2]."""

    phi: Tensor
    g: Tensor
    h: Tensor | None
    # The student's top column and the teacher's; None for a divergence that does not normalize.
    top_columns: Tensor | None = None
    # 1 if the two differ, else 0.
    different: Tensor | None = None
    # (phi, g, h) in the top columns, where the fields phi, g and h are 0.
    top_terms: tuple[Tensor, ...] = ()
    # (log q, log p) in the top columns.
    top_logs: tuple[Tensor, Tensor] | None = None

    def field(self, index: int) -> Tensor:
        """Phi, g or h of every column."""
        values = (self.phi, self.g, self.h)[index]
        assert values is not None
        return values

    def value(self) -> Tensor:
        """The sum of phi over all columns, [rows, 1]."""
        if self.different is None:
            return _sum(self.phi)
        student_top, teacher_top = self.top_terms[0].split(1, -1)
        return _sum(self.phi) + student_top + self.different * teacher_top


def _evaluated(
    divergence: Divergence,
    s: _Side,
    t: _Side,
    label: Tensor | None,
    wants_h: bool,
    scratch: _Scratch,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (phi, g, h) of every column in buffers of their own; 0 in the column of a label with a separate term."""
    count, wanted = s.z.shape[0], 3 if wants_h else 2
    separate_label = None if divergence.target is None else label
    pair = None
    if s.softmax is not None and t.softmax is not None:
        pair = (t.softmax.exps, s.softmax.exps)
    reads = _reads(divergence.function, divergence.params, wanted)
    if pair is not None and separate_label is None and reads <= {*ENTRY[:2]}:
        # The definition reads only p and q, so it has no logarithm of 0.
        phi, g, *more = _applied(divergence, (*pair, *pair[:1] * 3), scratch, wanted)
        return phi, g, more[0] if more else None
    near = _near(s, t)
    if near is not None and bool(near.any()) and not bool(near.all()):
        return _evaluated_by_kind(near, divergence, s, t, label, wants_h, scratch)
    ratio = _log_ratio(s, t, scratch("ratio", count))
    if separate_label is not None:
        ratio.scatter_(-1, separate_label, 0.0)
    # The policy for log 0 costs more than all the rest, so finite rows, which have no log 0, skip it. On a device no
    # row skips it, because checking for that would synchronize.
    finite = _finite_rows(ratio)
    log_p = log_q = ratio
    if not _all(finite) or not reads.isdisjoint(ENTRY[2:]):
        log_p = _log_softmax(t, scratch("log p", count))
        log_q = _log_softmax(s, scratch("log q", count))
        if separate_label is None and _all(finite):
            finite = finite & _finite_rows(log_p) & _finite_rows(log_q)
    if not _all(finite):
        if not _synchronizes(ratio.device) and bool(finite.any()):
            return _evaluated_by_kind(finite, divergence, s, t, label, wants_h, scratch)
        return evaluate(divergence, log_p, log_q, pair)
    if pair is None:
        pair = (torch.ones((), dtype=ratio.dtype, device=ratio.device).expand_as(ratio),) * 2
    if separate_label is not None and log_p is not ratio:
        for logs in (log_p, log_q):
            logs.scatter_(-1, separate_label, torch.finfo(ratio.dtype).min)
    entry = arguments_of(divergence.function, *pair, log_p, log_q, ratio)
    phi, g, *more = _applied(divergence, entry, scratch, wanted)
    h = more[0] if more else None
    if wants_h and h is None:
        assert divergence.degree is not None  # validated
        h = torch.mul(phi, divergence.degree, out=scratch("h", count)).sub_(g)
    if separate_label is not None:
        for term in (phi, g, h):
            if term is not None:
                term.scatter_(-1, separate_label, 0.0)
    return phi, g, h


def _all(rows: Tensor) -> bool:
    """Whether the mask is True in all rows; False on a device, because reading it would synchronize."""
    return not _synchronizes(rows.device) and bool(rows.all())


def _finite_rows(values: Tensor) -> Tensor:
    """Which rows are certainly finite. A row whose sum overflows counts as not finite."""
    return values.sum(-1).isfinite()


def _evaluated_by_kind(
    kind: Tensor,
    divergence: Divergence,
    s: _Side,
    t: _Side,
    label: Tensor | None,
    wants_h: bool,
    scratch: _Scratch,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Evaluate the rows where the mask `kind` is True and the other rows separately, so that no row changes another."""

    def select(value: Any, indices: Tensor) -> Any:
        if isinstance(value, Tensor):
            return value[indices]
        if isinstance(value, (_Side, _Softmax)):
            return type(value)(*(select(field, indices) for field in value))
        return value

    terms: list[Tensor] = []
    for mask in (kind.flatten(), ~kind.flatten()):
        indices = mask.nonzero().squeeze(1)
        sides = select(s, indices), select(t, indices)
        if s.temperature is t.temperature:
            sides = sides[0], sides[1]._replace(temperature=sides[0].temperature)
        evaluated = _evaluated(divergence, *sides, select(label, indices), wants_h, scratch)
        parts = [term for term in (evaluated if wants_h else evaluated[:2]) if term is not None]
        terms = terms or [part.new_empty(kind.shape[0], part.shape[1]) for part in parts]
        for term, part in zip(terms, parts, strict=True):
            term[indices] = part
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
    columns = _evaluated(divergence, s, t, label, wants_h, scratch)
    if not divergence.normalized:
        return _Terms(*columns)
    assert s.softmax is not None and t.softmax is not None
    top_columns = torch.cat([s.softmax.argmax, t.softmax.argmax], -1)
    logs = []
    for side in (s, t):
        assert side.softmax is not None
        exact = side.softmax.others_sum.dtype
        centered = side.z.gather(-1, top_columns).to(exact) - side.softmax.row_max
        temperature = side.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.to(exact)
        logs.append(_divide(centered, temperature) - side.softmax.log_exp_sum)
    log_q, log_p = logs
    top_terms = evaluate(divergence, log_p, log_q)
    for term in columns:
        if term is not None:
            term.scatter_(-1, top_columns, 0.0)
    different = (top_columns[:, :1] != top_columns[:, 1:]).to(log_q.dtype)
    return _Terms(*columns, top_columns, different, top_terms, (log_q, log_p))


def _project(
    terms: _Terms,
    index: int,
    side: _Side,
    label_term: Tensor | None,
    factor: float | Tensor,
    out: Tensor,
) -> Tensor:
    """Write factor (x_v - q_v sum_u x_u) to out, for the field x of the terms with that index; x is overwritten.

    label_term [rows, 1] is added to the sum.
    """
    x = terms.field(index)
    if terms.top_columns is None or side.softmax is None:
        return torch.mul(x, factor, out=out)
    assert terms.top_logs is not None and terms.different is not None
    own, log_q = terms.top_terms[index], terms.top_logs[index - 1]
    # For each of the two top columns, the sum over all columns but itself.
    others = _sum(x) + terms.different * own.flip(-1)
    if label_term is not None:
        others = others + label_term
    total = others[:, :1] + own[:, :1]
    exact = -own * log_q.expm1() - log_q.exp() * others
    _multiply(x, factor)
    torch.addcmul(x, side.softmax.exps, (total * factor).to(x.dtype), value=-1.0, out=out)
    return out.scatter_(-1, terms.top_columns, (exact * factor).to(out.dtype))


# The definitions of the table, run in buffers that are reused
#
# A definition's code runs once on symbols instead of tensors, which records its operations as a list of steps. Steps
# that no wanted term needs are left out. Each step writes to a buffer of the piece, and overwrites an operand if no
# later step reads it. `where` selects bits, because torch.where takes 4 nanoseconds per element on a CPU.


class _Symbol:
    """A value in a definition: an operator and its operands."""

    __slots__ = ("operands", "operator", "symbols")

    def __init__(self, operator: str, operands: tuple[Operand, ...], symbols: _Symbols) -> None:
        self.operator, self.operands, self.symbols = operator, operands, symbols

    def apply(self, operator: str, *others: Operand) -> _Symbol:
        """Apply the operator to this symbol and the others; equal expressions give the same symbol."""
        operands = (self, *others)
        if (operator, operands) not in self.symbols:
            self.symbols[operator, operands] = _Symbol(operator, operands, self.symbols)
        return self.symbols[operator, operands]

    def _scaled(self) -> tuple[_Symbol, float] | None:
        """Return (x, number) if this symbol is their product."""
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
_Symbols = dict[tuple[str, tuple[Any, ...]], _Symbol]


def _where(condition: _Symbol, yes: Operand, no: Operand) -> _Symbol:
    number, bound = condition.operands
    assert isinstance(number, _Symbol)
    if not isinstance(yes, _Symbol) and not isinstance(no, _Symbol):
        step = condition if yes - no == 1.0 else condition * (yes - no)
        return step + no if no else step
    if bound == 0.0 and no == 0.0:
        size = number if condition.operator == "gt" else -number
        if yes is size:
            return size.apply("clamp_min", 0.0)
    if (condition.operator, number.operator, bound) == ("gt", RATIO, 0.0):
        names = tuple(x.operator if isinstance(x, _Symbol) else "" for x in (yes, no))
        # p and q, or their logarithms: where the ratio is positive, the larger one is p's.
        if names in (ENTRY[:2], ENTRY[2:]):
            assert isinstance(yes, _Symbol)
            return yes.apply("maximum", no)
        if names[::-1] in (ENTRY[:2], ENTRY[2:]):
            assert isinstance(yes, _Symbol)
            return yes.apply("minimum", no)
    return condition.apply("mask").apply("select", yes, no)


def _log_mixture(log_ratio: _Symbol, share: float, rest: float) -> _Symbol:
    """Compute the same as log_mixture of fastkd.divergences, in fewer steps."""
    size = -log_ratio.apply("abs")
    change = size.apply("expm1")
    if share == rest:  # both 1/2, so the argument of log1p is never below -1/2
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
    """Set all bits where the condition is 1, and none where it is 0."""
    torch.gt(_as_integers(condition), 0, out=_as_integers(out)).neg_()


@functools.cache
def _bits(number: float, size: int) -> int:
    """The bits of a float of `size` bytes, as an integer."""
    value: int = struct.unpack(
        *(("<i", struct.pack("<f", number)) if size == 4 else ("<q", struct.pack("<d", number)))
    )[0]
    return value


def _select(mask: Tensor, yes: Tensor | float, no: Tensor | float, out: Tensor) -> None:
    """Select the bits of yes where the mask is set, and of no elsewhere; out may be yes."""
    result, bits = _as_integers(out), _as_integers(mask)
    yes_bits: Any
    no_bits: Any
    yes_bits, no_bits = (
        _as_integers(x) if isinstance(x, Tensor) else _bits(x, out.itemsize) for x in (yes, no)
    )
    if isinstance(no, float) and no_bits == 0:
        torch.bitwise_and(yes_bits, bits, out=result)
    else:
        # torch requires the tensor as the first operand.
        operands = (yes_bits, no_bits) if isinstance(yes, Tensor) else (no_bits, yes_bits)
        torch.bitwise_xor(*operands, out=result)
        result.bitwise_and_(bits).bitwise_xor_(no_bits)


def _tvd(p: _Symbol, q: _Symbol, *_: Any) -> tuple[_Symbol, _Symbol, _Symbol]:
    """Compute tvd of fastkd.divergences without a logarithm; only the rounding differs.

    PyTorch has a sign operator; the exponential in the table's definition would cost much more than that.
    """
    difference = p - q
    sign = difference.apply("sign") * 0.5
    return difference.apply("abs") * 0.5, -(q * sign), p * sign


_SHORTER = {divergences._tvd: _tvd}


class _Step(NamedTuple):
    """A call that writes to a buffer."""

    function: Callable[..., Any]
    # An int is the number of a buffer, a float is a number.
    operands: tuple[int | float, ...]
    # The number of a buffer.
    out: int


class _Program(NamedTuple):
    """A definition as steps. The first buffers hold its arguments; all but p and q may be overwritten."""

    steps: list[_Step]
    # How many buffers the steps use, arguments included.
    buffers: int
    # The numbers of the buffers of phi, g and h.
    terms: list[int]
    # The arguments that any step reads.
    reads: frozenset[str]


_OWN: dict[str, Callable[..., Any]] = {
    "mask": _mask,
    "select": _select,
    "copy": lambda x, out: out.copy_(x),
}


@functools.lru_cache(maxsize=256)
def _program(function: Callable[..., Any], params: tuple[float, ...], wanted: int) -> _Program:
    """Record, as steps, the first `wanted` terms that a definition of the table returns."""
    symbols: _Symbols = {}
    names = (*ENTRY, RATIO)[: 5 if takes_ratio(function) else 4]
    entry = [_Symbol(name, (), symbols) for name in names]
    on_symbols = _SHORTER.get(function) or FunctionType(
        function.__code__, vars(divergences) | _WORDS
    )
    terms: list[_Symbol] = []
    for term in on_symbols(*entry, *params)[:wanted]:
        # Each term needs a buffer of its own.
        terms.append(term.apply("copy") if term in entry or term in terms else term)
    ordered, uses = _in_order(terms)
    reads = frozenset(symbol.operator for symbol in entry if symbol in uses)
    buffer_of = {symbol: number for number, symbol in enumerate(entry)}
    protected = {*entry[:2], *terms}
    free: list[int] = []
    buffers = len(entry)
    steps = []
    for symbol in ordered:
        operands = tuple(
            buffer_of[x] if isinstance(x, _Symbol) else float(x) for x in symbol.operands
        )
        released = []
        for x in symbol.operands:
            if isinstance(x, _Symbol):
                uses[x] -= 1
                if not uses[x] and x not in protected:
                    released.append(buffer_of[x])
        # A selection reads `no` after its first write, so it may only overwrite `yes`.
        reusable = released
        if symbol.operator == "select":
            yes, no = symbol.operands[1:]
            reusable = [buffer_of[yes]] if isinstance(yes, _Symbol) and yes is not no else []
            reusable = [buffer for buffer in reusable if buffer in released]
        if reusable:
            out = reusable[0]
            released.remove(out)
        elif free:
            out = free.pop()
        else:
            out, buffers = buffers, buffers + 1
        free += released
        buffer_of[symbol] = out
        call = _OWN.get(symbol.operator) or getattr(torch, symbol.operator)
        steps.append(_Step(call, operands, out))
    return _Program(steps, buffers, [buffer_of[term] for term in terms], reads)


def _in_order(terms: Sequence[_Symbol]) -> tuple[list[_Symbol], dict[_Symbol, int]]:
    """Return (the symbols that the terms need, operands first; how often each symbol is read or is a term)."""
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
    return ordered, uses


def _applied(
    divergence: Divergence, entry: Sequence[Tensor], scratch: _Scratch, wanted: int = 3
) -> list[Tensor]:
    """Return the first `wanted` terms of the definition in buffers of their own. Logarithms may be overwritten."""
    function, params = divergence.function, divergence.params
    shape, dtype = entry[-1].shape, entry[-1].dtype
    if function not in DEFINITIONS:
        # A user's definition may return its arguments, or one number per row.
        terms = function(*entry, *params)[:wanted]
        return [term.to(dtype).expand(shape).clone() for term in terms]
    program = _program(function, params, wanted)
    buffers = list(entry)
    buffers += [
        scratch(f"pool {number}", shape[0]) for number in range(len(entry), program.buffers)
    ]
    for call, operands, out in program.steps:
        call(*[buffers[x] if type(x) is int else x for x in operands], out=buffers[out])
    return [buffers[number] for number in program.terms]


def _reads(function: Callable[..., Any], params: tuple[float, ...], wanted: int) -> frozenset[str]:
    """The names of the arguments that a definition reads."""
    if function in DEFINITIONS:
        return _program(function, params, wanted).reads
    return frozenset((*ENTRY, RATIO))


def _label_term(s: _Side, t: _Side, divergence: Divergence) -> reference.LabelTerm:
    """Compute the label's separate term as the reference does, [rows, 1] each."""
    assert s.softmax is not None and t.softmax is not None and divergence.target is not None
    exact = s.softmax.others_sum.dtype
    zero = torch.zeros((), dtype=exact, device=s.z.device)

    def flat(value: Tensor | None) -> Tensor:
        return zero if value is None else value.to(exact).squeeze(-1)

    def tempered_max(side: _Side) -> Tensor:
        assert side.softmax is not None
        temperature = side.temperature
        divisor = flat(temperature) if isinstance(temperature, Tensor) else temperature
        return flat(side.softmax.row_max) / divisor

    def at_1(side: _Side) -> tuple[Tensor, Tensor]:
        softmax = side.softmax_t1
        return (zero, zero) if softmax is None else (flat(softmax.exp_sum), flat(softmax.row_max))

    exp_sum_t1, max_t1 = at_1(s)
    teacher_exp_sum_t1, teacher_max_t1 = at_1(t)
    statistics = reference.RowStatistics(
        max=tempered_max(s),
        teacher_max=tempered_max(t),
        exp_sum=flat(s.softmax.exp_sum),
        teacher_exp_sum=flat(t.softmax.exp_sum),
        exp_sum_t1=exp_sum_t1,
        max_t1=max_t1,
        label=flat(s.label),
        teacher_label=flat(t.label),
        teacher_exp_sum_t1=teacher_exp_sum_t1,
        teacher_max_t1=teacher_max_t1,
        centered_sum=zero,
        columns=zero,
    )
    sides = [reference.Side(side.z, 1.0, side.temperature, None) for side in (s, t)]
    term = reference.label_term(sides[0], sides[1], statistics, divergence.target)
    return reference.LabelTerm(*(value.unsqueeze(-1) for value in term))


class _Values(NamedTuple):
    """The results of the rows of a piece, [rows, 1]."""

    loss: Tensor
    distillation: Tensor
    cross_entropy: Tensor
    student_entropy: Tensor | None


class _Piece(NamedTuple):
    """A piece of dense rows [rows, columns], and what the call asks of it."""

    student: Tensor
    teacher: Tensor
    rows: Rows
    options: Options
    want: Want
    scratch: _Scratch
    # Numbers, or [rows, 1].
    temperature: float | Tensor
    teacher_temperature: float | Tensor
    # The label's column, [rows, 1], 0 for an invalid label; None: labels only drop rows.
    label: Tensor | None
    # Which labels are not in the vocabulary, [rows, 1].
    invalid_label: Tensor | None

    @property
    def compares(self) -> bool:
        """Whether the divergence is computed."""
        return self.options.alpha > 0.0 or self.want.parts

    @property
    def has_cross_entropy(self) -> bool:
        """Whether the loss has a cross-entropy of the labels."""
        return self.rows.labels is not None and self.options.alpha < 1.0

    @property
    def has_separate_label(self) -> bool:
        """Whether the divergence has a separate term for the label."""
        return self.compares and self.options.divergence.target is not None

    @property
    def has_label_cross_entropy(self) -> bool:
        """Whether the label's separate term is a cross-entropy at temperature 1."""
        target = self.options.divergence.target
        return self.compares and target is not None and target.form == "label"

    @property
    def t_squared(self) -> float | Tensor:
        """The factor T^2 of the distillation, or 1."""
        return self.temperature * self.temperature if self.options.scale_by_temperature else 1.0


def _piece(
    student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want, scratch: _Scratch
) -> _Piece:
    def column(value: Tensor | None, default: float) -> float | Tensor:
        return default if value is None else value.to(scratch.dtype).unsqueeze(-1)

    temperature = column(rows.temperature, options.temperature)
    teacher_temperature = (
        temperature  # the same object if they are the same, as _same_temperature expects
    )
    if rows.teacher_temperature is not rows.temperature or rows.temperature is None:
        teacher_temperature = column(rows.teacher_temperature, options.teacher_temperature)
    label = invalid = None
    if rows.labels is not None and options.reads_labels:
        label = rows.labels.unsqueeze(-1)
        invalid = (label < 0) | (label >= options.vocab_size)
        label = label.masked_fill(invalid, 0)
    return _Piece(
        student, teacher, rows, options, want, scratch, temperature, teacher_temperature, label,
        invalid,
    )  # fmt: skip


def _sides(piece: _Piece) -> tuple[_Side, _Side | None]:
    """Sweep over both models' logits; None: the teacher's are not needed."""
    options, parts = piece.options, piece.want.parts
    normalizes = piece.compares and options.divergence.normalized
    by_label, separate = piece.has_label_cross_entropy, piece.has_separate_label
    student = _Model(
        "student",
        options.logit_scale,
        options.softcap,
        piece.temperature,
        needs_softmax=normalizes or parts,
        needs_softmax_t1=piece.has_cross_entropy or by_label,
    )
    s = _sweep(piece.student, student, piece.label, separate, parts, piece.scratch)
    if not piece.compares:
        return s, None
    teacher = _Model(
        "teacher",
        options.teacher_logit_scale,
        options.teacher_softcap,
        piece.teacher_temperature,
        needs_softmax=normalizes,
        needs_softmax_t1=by_label,
    )
    return s, _sweep(piece.teacher, teacher, piece.label, separate, False, piece.scratch)


def _weights(piece: _Piece, s: _Side, t: _Side | None) -> float | Tensor:
    """The weight of each row, a number or [rows, 1]: NaN if the row is invalid."""
    rows, scratch = piece.rows, piece.scratch
    invalid = [] if piece.invalid_label is None else [piece.invalid_label]
    for temperatures in (rows.temperature, rows.teacher_temperature):
        if temperatures is not None:
            invalid.append(~(temperatures > 0).unsqueeze(-1))
    for side in (s, t):
        if side is not None and side.softmax is not None:
            # A comparison in a definition may hide a NaN or +inf among the logits; the sum of exponentials shows it.
            invalid.append(side.softmax.exp_sum.isnan())
            if piece.has_separate_label and side.label is not None:  # its logit is not in the sum
                invalid.append(side.label == torch.inf)
    weight: float | Tensor = 1.0
    if rows.weight is not None:
        weight = rows.weight.to(scratch.dtype).unsqueeze(-1)
    if invalid:
        if not isinstance(weight, Tensor):
            shape, device = (piece.student.shape[0], 1), piece.student.device
            weight = torch.full(shape, weight, dtype=scratch.dtype, device=device)
        weight = weight.masked_fill(functools.reduce(torch.logical_or, invalid), torch.nan)
    return weight


def _cross_entropy(s: _Side, options: Options, smoothing: float) -> Tensor:
    """The label-smoothed cross-entropy of each row, [rows, 1]."""
    assert s.softmax_t1 is not None and s.label is not None and s.centered_sum is not None
    softmax = s.softmax_t1
    exact = softmax.others_sum.dtype
    value = softmax.log_exp_sum - (s.label.to(exact) - softmax.row_max.to(exact))
    smooth = softmax.log_exp_sum - s.centered_sum / options.vocab_size
    return (1.0 - smoothing) * value + smoothing * smooth if smoothing else value


class _Compared(NamedTuple):
    """The results of a divergence for a piece."""

    # [rows, 1], T^2 included.
    distillation: Tensor
    # Of the student at temperature T, [rows, 1].
    entropy: Tensor | None = None
    terms: _Terms | None = None
    # The label's separate term.
    label: reference.LabelTerm | None = None


def _compared(piece: _Piece, s: _Side, t: _Side | None) -> _Compared:
    exact = _exact(piece.scratch.dtype, piece.student.device)
    if t is None:
        shape, device = (piece.student.shape[0], 1), piece.student.device
        return _Compared(torch.zeros(shape, dtype=exact, device=device))
    divergence, options = piece.options.divergence, piece.options
    side = s if divergence.normalized else s._replace(softmax=None)
    wants_h = piece.want.teacher_gradient
    terms = _terms(divergence, side, t, piece.label, wants_h, piece.scratch)
    distillation = terms.value()
    entropy = label = None
    if piece.want.parts:
        assert s.softmax is not None and s.weighted_sum is not None
        entropy = s.softmax.log_exp_sum - s.weighted_sum / s.softmax.exp_sum
    if divergence.target is not None:
        label = _label_term(s, t, divergence)
        distillation = distillation + label.phi
        if entropy is not None:
            entropy = label.entropy + label.others_probability * entropy
    distillation = distillation * piece.t_squared
    if piece.has_label_cross_entropy and label is not None:
        factor = label.cross_entropy_weight
        value = _cross_entropy(s, options, 0.0)
        distillation = distillation + torch.where(factor == 0, 0.0, factor * value)
    return _Compared(distillation, entropy, terms, label)


def _dense_piece(
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    options: Options,
    want: Want,
    outs: Sequence[Tensor | None],
    scratch: _Scratch,
) -> _Values:
    """Compute the loss of some rows [rows, columns], and write the wanted gradients into outs."""
    piece = _piece(student, teacher, rows, options, want, scratch)
    s, t = _sides(piece)
    compared = _compared(piece, s, t)
    cross_entropy = torch.zeros_like(compared.distillation)
    if piece.has_cross_entropy:
        cross_entropy = _cross_entropy(s, options, options.label_smoothing)
    loss = torch.zeros_like(compared.distillation)
    if options.alpha:
        loss = options.alpha * compared.distillation
    if piece.has_cross_entropy:
        loss = loss + (1.0 - options.alpha) * cross_entropy
    weight = _weights(piece, s, t)
    loss = loss * weight

    counted = None  # on a CPU all rows of a piece are counted
    if _synchronizes(student.device):
        counted = counted_rows(rows, options.ignore_index)
        counted = None if counted is None else counted.unsqueeze(-1)
    _write_gradients(piece, s, t, compared, weight, counted, outs)

    def select(value: Tensor) -> Tensor:
        return value if counted is None else value.masked_fill(~counted, 0.0)

    entropy = None if compared.entropy is None else select(compared.entropy)
    return _Values(select(loss), select(compared.distillation), select(cross_entropy), entropy)


def _write_gradients(
    piece: _Piece,
    s: _Side,
    t: _Side | None,
    compared: _Compared,
    weight: float | Tensor,
    counted: Tensor | None,
    outs: Sequence[Tensor | None],
) -> None:
    options, alpha, dtype = piece.options, piece.options.alpha, piece.scratch.dtype
    scale = (
        options.scale if piece.rows.scale is None else options.scale * piece.rows.scale.to(dtype)
    )
    row_scale = weight * scale

    def of_divergence(index: int, side: _Side, out: Tensor) -> Tensor:
        """The gradient of the divergence with respect to one side's z; index 1 selects g, 2 selects h."""
        to = out if out.dtype == dtype else piece.scratch("gradient", out.shape[0])
        if not alpha:
            return to.zero_()
        assert compared.terms is not None
        label = None if compared.label is None else compared.label[index]
        factor = row_scale * (alpha * piece.t_squared / side.temperature)
        gradient = _project(compared.terms, index, side, label, factor, to)
        if label is not None:
            assert piece.label is not None
            gradient.scatter_(-1, piece.label, (label * factor).to(dtype))
        return gradient

    def finish(gradient: Tensor, slope: Tensor | None, scale: float, out: Tensor) -> None:
        _multiply(gradient, scale if slope is None else slope)
        if counted is not None:
            gradient.masked_fill_(~counted, 0.0)
        if gradient is not out:
            out.copy_(gradient)

    student_out, teacher_out = outs
    # The teacher's gradient comes first, because the student's may overwrite logits that are still read.
    if teacher_out is not None:
        if t is None:
            zeros = torch.zeros_like(compared.distillation)
            teacher_out.copy_((zeros * row_scale).expand_as(teacher_out))
        else:
            gradient = of_divergence(2, t, teacher_out)
            finish(gradient, t.slope, options.teacher_logit_scale, teacher_out)
    if student_out is not None:
        gradient = of_divergence(1, s, student_out)
        if piece.has_cross_entropy:
            factor = (1.0 - alpha) * row_scale
            _add_cross_entropy(gradient, s, piece.label, factor, options, options.label_smoothing)
        if piece.has_label_cross_entropy and compared.label is not None and alpha:
            factor = alpha * row_scale * compared.label.cross_entropy_weight
            _add_cross_entropy(gradient, s, piece.label, factor, options, 0.0)
        finish(gradient, s.slope, options.logit_scale, student_out)


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
    """Add factor times (softmax - smoothed label) to the gradient."""
    assert s.softmax_t1 is not None and s.label is not None and label is not None
    softmax = s.softmax_t1
    # The label's column is computed separately: q_y - 1 has no digits left if the student is sure of the label.
    softmax.exps.scatter_(-1, label, 0.0)
    gradient.addcmul_(softmax.exps, (factor / softmax.exp_sum).to(gradient.dtype))
    log_q = (s.label.to(softmax.others_sum.dtype) - softmax.row_max) - softmax.log_exp_sum
    gradient.scatter_add_(-1, label, (factor * (log_q.expm1() + smoothing)).to(gradient.dtype))
    if smoothing:
        gradient.sub_(factor * (smoothing / options.vocab_size))


@torch.no_grad()
def kd_rows(student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want) -> Result:
    """Compute the loss of each row and its gradients; :class:`fastkd.call.contract.Result` describes the outputs."""
    student, teacher = readable(student), readable(teacher)
    lead, device, columns = student.shape[:-1], student.device, options.vocab_size
    dtype = row_dtype(student.dtype, teacher.dtype)
    result = native.outputs(student, teacher, want, row_dtype=dtype)
    indices = _counted(rows, options.ignore_index, device)
    count = lead.numel() if indices is None else indices.numel()
    step = min(piece_rows(columns, dtype, device.type), max(count, 1))
    scratch = _Scratch(step, columns, dtype, device)
    gradients = (result.student_gradient, result.teacher_gradient)
    per_row = (result.loss, *result[4:])
    if indices is not None:
        _clear_dropped([*per_row, *gradients], indices, lead)
    for at in _pieces(count, step, indices):
        s, t = (take(logits, lead, at)[:, :columns] for logits in (student, teacher))
        outs = [_Out(gradient, lead, at, columns) for gradient in gradients]
        buffers = [out.buffer(scratch, name) for out, name in zip(outs, ("s", "t"), strict=True)]
        values = _dense_piece(s, t, rows_at(rows, lead, at), options, want, buffers, scratch)
        for whole, value in zip(per_row, values, strict=True):
            if whole is not None and value is not None:
                put(whole, lead, at, value.squeeze(-1).to(dtype))
        for out in outs:
            out.close()
    for gradient in gradients:
        if gradient is not None and gradient.shape[-1] > columns:
            gradient[..., columns:] = 0.0
    factor = options.scale if rows.scale is None else options.scale * rows.scale
    total = result.loss.sum(dtype=_exact(dtype, device)) * factor
    return result._replace(total=total.to(dtype))


def _clear_dropped(values: Sequence[Tensor | None], counted: Tensor, lead: torch.Size) -> None:
    """Set every row whose index is not among `counted` to 0."""
    dropped = torch.ones(lead.numel(), dtype=torch.bool, device=counted.device)
    dropped[counted] = False
    at = dropped.nonzero().squeeze(1)
    for value in values:
        if value is not None:
            put(value, lead, at, torch.zeros((), dtype=value.dtype, device=value.device))


class _Out:
    """Where a piece writes its gradient: the result's memory, or a buffer if the piece's rows are not adjacent."""

    def __init__(self, whole: Tensor | None, lead: torch.Size, at: At, columns: int) -> None:
        self.whole, self.lead, self.at, self.columns = whole, lead, at, columns
        self.packed: Tensor | None = None

    def buffer(self, scratch: _Scratch, name: str) -> Tensor | None:
        """The memory to write to, [rows, columns]; None: no gradient is wanted."""
        if self.whole is None:
            return None
        if isinstance(self.at, slice):
            try:
                rows = self.whole.view(self.lead.numel(), self.whole.shape[-1])
            except RuntimeError:  # in place: the strides are those of the caller's logits
                pass
            else:
                return rows[self.at, : self.columns]
        count = len(self.at) if isinstance(self.at, Tensor) else self.at.stop - self.at.start
        self.packed = scratch(f"{name} packed", count)
        return self.packed

    def close(self) -> None:
        """Copy the rows of a buffer to the result."""
        if self.packed is not None and self.whole is not None:
            packed = self.packed.to(self.whole.dtype)
            put(self.whole[..., : self.columns], self.lead, self.at, packed)


# Sparse teachers


def gather_events(student: Tensor, rows: Rows, options: Options, parts: bool) -> Events:
    """Reduce the student's rows to the K + 1 events of a sparse teacher (fastkd/backends/sparse.py).

    Dropped rows get zeros.
    """
    lead, device, dtype = student.shape[:-1], student.device, row_dtype(student.dtype)
    assert rows.ids is not None
    has_cross_entropy = rows.labels is not None and options.alpha < 1.0
    smooths = has_cross_entropy and options.label_smoothing > 0

    def per_row(wanted: bool, *columns: int) -> Any:
        return torch.zeros((*lead, *columns), dtype=dtype, device=device) if wanted else None

    events = Events(
        per_row(True), per_row(True), per_row(True, rows.ids.shape[-1]), per_row(True), per_row(True),
        per_row(parts), per_row(has_cross_entropy), per_row(has_cross_entropy), per_row(smooths),
        torch.ones(lead, dtype=torch.bool, device=device),
    )  # fmt: skip
    outputs = [value for value in events if isinstance(value, Tensor)]
    for at, s, rows_of_piece, scratch in _student_pieces(student, rows, options, dtype):
        values = _events_of_piece(s, rows_of_piece, options, parts, scratch)
        for output, value in zip(outputs, values, strict=True):
            put(output, lead, at, value)
    return events


def _student_pieces(
    student: Tensor, rows: Rows, options: Options, dtype: torch.dtype
) -> Iterator[tuple[At, Tensor, Rows, _Scratch]]:
    """Yield (which rows, their logits, their Rows, buffers) of the counted rows, piece by piece."""
    lead, device, columns = student.shape[:-1], student.device, options.vocab_size
    student = readable(student)
    indices = _counted(rows, options.ignore_index, device)
    count = lead.numel() if indices is None else indices.numel()
    step = min(piece_rows(columns, dtype, device.type), max(count, 1))
    scratch = _Scratch(step, columns, dtype, device)
    for at in _pieces(count, step, indices):
        yield at, take(student, lead, at)[:, :columns], rows_at(rows, lead, at), scratch


def _id_columns(ids: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors of the shape of ids.

    They are: whether this process has the id's column; that column, or 0; and -inf if it has the column, else inf,
    so that amin with these marks sets the listed columns to -inf.
    """
    columns = ids - options.first_column
    is_local = (columns >= 0) & (columns < options.vocab_size)
    marks = torch.full(ids.shape, torch.inf, device=ids.device).masked_fill_(is_local, -torch.inf)
    return is_local, columns.masked_fill(~is_local, 0), marks


def _label_columns(labels: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return (whether this process has the label's column, that column or 0), [rows, 1]."""
    columns = labels.unsqueeze(-1) - options.first_column
    is_local = (columns >= 0) & (columns < options.vocab_size)
    return is_local, columns.masked_fill(~is_local, 0)


def _events_of_piece(
    student: Tensor, rows: Rows, options: Options, parts: bool, scratch: _Scratch
) -> list[Tensor]:
    """The fields of Events that are not None, [rows, ...]."""
    ids, dtype, count = rows.ids, scratch.dtype, student.shape[0]
    assert ids is not None
    exact = _exact(dtype, student.device)
    z = scratch("z", count)
    adjusted, _ = _adjusted(student, options.logit_scale, options.softcap, z, scratch, "slope")
    is_local, id_columns, marks = _id_columns(ids, options)
    tokens = adjusted.gather(-1, id_columns).masked_fill_(~is_local, -torch.inf)
    origin = tokens.amax(-1, keepdim=True)
    at_1: list[Tensor] = []  # log_sum, label and mean
    if rows.labels is not None and options.alpha < 1.0:
        row_max = finite_max(adjusted.amax(-1, keepdim=True))
        label_is_local, label_column = _label_columns(rows.labels, options)
        label = adjusted.gather(-1, label_column) - row_max
        centered = torch.sub(adjusted, row_max, out=scratch("exps", count))
        mean = _sum(centered) / options.vocabulary
        at_1 = [_sum(centered.exp_()).log(), label.masked_fill(~label_is_local, -torch.inf)]
        at_1 += [mean] if options.label_smoothing else []
    if adjusted is not z:
        z.copy_(adjusted)
    z.scatter_reduce_(-1, id_columns, marks.to(dtype), "amin")
    tail_origin = z.amax(-1, keepdim=True)
    temperature: float | Tensor = options.temperature
    if rows.temperature is not None:
        temperature = rows.temperature.to(dtype).unsqueeze(-1)
    _divide(z.sub_(finite_max(tail_origin)), temperature)
    exps = torch.exp(z, out=scratch("exps", count))
    exp_sum = _sum(exps)
    log_sum = exp_sum.log()
    entropy = []
    if parts:
        exps.div_(exp_sum.clamp(min=torch.finfo(dtype).tiny).to(dtype))
        log_q = z.sub_(finite_max(log_sum).to(dtype)).clamp_(min=torch.finfo(dtype).min)
        entropy = [-_sum(exps.mul_(log_q))]
    tail = (tail_origin - finite_max(origin)).to(exact) + temperature * log_sum
    values = [origin, tail_origin, tail, log_sum, *entropy, *at_1]
    fields = [value.squeeze(-1).to(dtype) for value in values]
    fields.insert(2, tokens - finite_max(origin))
    return [*fields, _valid_ids(ids, options)]


def _valid_ids(ids: Tensor, options: Options) -> Tensor:
    """Which rows have distinct ids that are in the vocabulary or padding."""
    in_vocabulary = ((ids == -1) | ((ids >= 0) & (ids < options.vocabulary))).all(-1)
    ordered = ids.sort(-1).values
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(-1)
    return in_vocabulary & ~repeated


def spread_gradient(
    student: Tensor,
    events: Events,
    gradient: Tensor,
    cross_entropy_scale: Tensor | None,
    rows: Rows,
    options: Options,
    out: Tensor,
) -> Tensor:
    """Convert the gradient [..., K + 1] of the events to that of the student's logits, and add the cross-entropy's."""
    lead, columns, dtype = student.shape[:-1], options.vocab_size, row_dtype(student.dtype)
    assert rows.weight is not None
    weighted = rows._replace(labels=None)  # the weight is 0 in every dropped row
    indices = _counted(weighted, options.ignore_index, student.device)
    if indices is not None:
        _clear_dropped([out], indices, lead)
    for at, s, _, scratch in _student_pieces(student, weighted, options, dtype):

        def select(value: Any, at: At = at) -> Any:
            return take(value, lead, at) if isinstance(value, Tensor) else value

        piece = _spread_piece(
            s,
            Events(*map(select, events)),
            select(gradient),
            select(cross_entropy_scale),
            rows_at(rows, lead, at),
            options,
            scratch,
        )
        put(out[..., :columns], lead, at, piece.to(out.dtype))
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
    is_local, id_columns, marks = _id_columns(ids, options)

    def column(value: Tensor) -> Tensor:
        return value.to(dtype).unsqueeze(-1)

    cross_entropy = None
    if cross_entropy_scale is not None:
        assert rows.labels is not None and events.log_sum is not None
        log_norm = column(torch.maximum(events.origin, events.tail_origin) + events.log_sum)
        factor = column(cross_entropy_scale)
        cross_entropy = torch.sub(adjusted, log_norm, out=scratch("cross-entropy", count))
        cross_entropy.exp_().mul_(factor)
        label_is_local, label_column = _label_columns(rows.labels, options)
        at_label = (factor * (options.label_smoothing - 1.0)).masked_fill(~label_is_local, 0.0)
        cross_entropy.scatter_add_(-1, label_column, at_label)
        if options.label_smoothing:
            cross_entropy.sub_(factor * (options.label_smoothing / options.vocabulary))
    if adjusted is not z:
        z.copy_(adjusted)
    z.scatter_reduce_(-1, id_columns, marks.to(dtype), "amin")
    temperature: float | Tensor = options.temperature
    if rows.temperature is not None:
        temperature = column(rows.temperature)
    _divide(z.sub_(finite_max(column(events.tail_origin))), temperature)
    z.sub_(finite_max(column(events.tail_log_sum))).exp_()
    # If a row has no tail, the gradient of the tail may be infinite, but it belongs to no column.
    no_tail = column(events.tail_log_sum) == -torch.inf
    z.mul_(gradient[:, -1:].masked_fill(no_tail, 0.0))
    z.scatter_add_(-1, id_columns, gradient[:, :-1].masked_fill(~is_local, 0.0).to(dtype))
    if cross_entropy is not None:
        z.add_(cross_entropy)
    if slope is not None:
        z.mul_(slope)
    elif options.logit_scale != 1.0:
        z.mul_(options.logit_scale)
    weight = column(rows.weight)
    z.add_(torch.where(weight.isnan(), torch.nan, 0.0))
    if _synchronizes(student.device):
        z.masked_fill_(weight == 0, 0.0)
    return z


# Steps of the reference, a piece of rows at a time


def _slices(
    lead: torch.Size, columns: int, dtype: torch.dtype, device: torch.device
) -> list[slice]:
    """Slices of all rows, dropped ones included: their results are 0 or are not used."""
    count, step = lead.numel(), piece_rows(columns, dtype, device.type)
    # Without rows there is one empty slice, so that results get their shapes.
    return [slice(start, min(start + step, count)) for start in range(0, max(count, 1), step)]


def shard_statistics(call: ShardCall) -> Statistics:
    """Compute the statistics of this process's columns: 12 numbers per row in float64."""
    pieces = [reference.shard_statistics(piece) for _, piece in _shard_pieces(call)]
    return Statistics(torch.cat([statistics.gathered for statistics in pieces]))


def shard_sums(call: ShardCall) -> Tensor | None:
    """Compute the sums over this process's columns, given the statistics of all: 4 numbers per row in float64."""
    pieces = [reference.shard_sums(piece) for _, piece in _shard_pieces(call)]
    return torch.cat([sums for sums in pieces if sums is not None])


def shard_results(call: ShardCall) -> None:
    """Fill the result, given the statistics and the sums of all processes."""
    lead = call.student.shape[:-1]
    for at, piece in _shard_pieces(call):

        def memory(whole: Tensor | None, at: slice = at) -> Any:
            return None if whole is None else torch.empty_like(take(whole, lead, at))

        fields = [memory(whole) for whole in call.result._replace(total=None)]  # type: ignore[arg-type]
        piece_result = Result(*fields)
        reference.shard_results(piece._replace(result=piece_result))
        for whole, values in zip(call.result, piece_result, strict=True):
            if whole is not None and values is not None:
                put(whole, lead, at, values)


def _shard_pieces(call: ShardCall) -> Iterator[tuple[slice, ShardCall]]:
    """Yield (which rows, the call restricted to these rows, except for its result)."""
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
    """Compute the losses of each row's students and their gradients; :mod:`fastkd.call.mutual` has the contract."""
    first, students = logits[0], len(logits)
    lead, dtype = first.shape[:-1], row_dtype(first.dtype)
    result = mutual.outputs(logits, wanted, parts, dtype=dtype)
    for at in _slices(lead, students * first.shape[-1], dtype, first.device):
        piece_logits = [take(student, lead, at) for student in logits]
        piece = reference_mutual.mutual_rows(
            piece_logits, rows_at(rows, lead, at), options, wanted, parts
        )
        for name in ("loss", "divergence", "cross_entropy"):
            whole, values = getattr(result, name), getattr(piece, name)
            for student in range(students if whole is not None else 0):
                put(whole[student], lead, at, values[student])
        for gradient, values in zip(result.gradients, piece.gradients, strict=True):
            if gradient is not None and values is not None:
                put(gradient, lead, at, values)
    scale = options.scale if rows.scale is None else options.scale * rows.scale
    total = result.loss.reshape(students, -1).sum(-1, dtype=_exact(dtype, first.device)) * scale
    return result._replace(total=total.to(dtype))
