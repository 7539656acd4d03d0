"""The portable backend: plain PyTorch, a few rows at a time. "auto" falls back to it where there are no kernels.

It serves every call, on every device and in every dtype that the losses accept. The formulas are those of
:mod:`fastkd.backends.reference`, the oracle, which computes them on whole tensors. Here a piece of rows stays in the
processor's cache, operators write to buffers that the next piece reuses, and the gradient goes straight to the tensor
that is returned, because plain PyTorch would spend most of its time on newly allocated memory.

:func:`_dense_piece` computes a piece of dense rows. With a sparse teacher, :func:`gather_events` reduces each of
the student's rows to a dense row of K + 1 events. Mutual learning, and dense rows whose vocabulary is spread over
processes, are passed to the reference piece by piece.
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
from fastkd.backends.logprobs import logprob_gradients, logprob_statistics
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
    kept_rows,
    row_dtype,
)
from fastkd.call.log_zero import evaluate
from fastkd.call.rows import RowIndices, put, rows_at, take
from fastkd.core.pieces import piece_rows
from fastkd.core.tensors import finite_max, readable
from fastkd.divergences import (
    DEFINITIONS,
    ENTRY,
    RATIO,
    VOCABULARY,
    Divergence,
    _product_in_parts,
    arguments_of,
    is_cross_entropy,
    takes_ratio,
)  # fmt: skip

__all__ = [
    "angles", "empty", "gather_events", "kd_rows", "logprob_gradients", "logprob_statistics",
    "mutual_rows", "scale_rows_", "shard_results",
    "shard_statistics", "shard_sums", "spread_gradient",
]  # fmt: skip


# The search for a row's maximum proceeds in blocks of this many columns.
BLOCK = 512
# If the maxima of a row's student and teacher logits differ by less than this, subtracting the logits directly loses no
# digits.
NEAR = 8.0


def _synchronizes(device: torch.device) -> bool:
    """Whether reading a number from this device makes the host wait for it."""
    return device.type != "cpu"


def _sum_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of values per row, such as sums: float64 on CPUs and CUDA devices, elsewhere the given dtype."""
    return torch.float64 if device.type in ("cpu", "cuda") else dtype


# Pieces of rows


def _kept_indices(rows: Rows, ignore_index: int, device: torch.device) -> Tensor | None:
    """Indices of the kept rows; None where all rows are computed.

    On devices other than the CPU, all rows are computed, because counting them would synchronize; dropped rows are then
    set to 0.
    """
    if _synchronizes(device):
        return None
    kept = kept_rows(rows, ignore_index)
    if kept is None:
        return None
    indices = kept.flatten().nonzero().squeeze(1)
    return None if indices.numel() == kept.numel() else indices


def _pieces(count: int, step: int, indices: Tensor | None) -> Iterator[RowIndices]:
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
# If a model is nearly certain of a token, the token's probability rounds to 1, and g - q sum g has no correct digits in
# its column. The sum of exponentials is therefore kept separate from its largest term, and the terms of each model's
# top column are computed separately. These values per row are float64 where possible (_sum_dtype).


class _SideOptions(NamedTuple):
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

    # exp((z - max) / temperature), which is 1 in the top column. For the softmax at the model's temperature, _sweep
    # divides it by exp_sum, so that it then holds probabilities.
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

    Computes the maximum of each block first, and searches only the block with the row's maximum for the column, because
    torch takes about 10 times as long to find a maximum's column as to find the maximum.
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
    """The sum of each row, [rows, 1], in the dtype that :func:`_sum_dtype` returns."""
    return values.sum(-1, keepdim=True).to(_sum_dtype(values.dtype, values.device))


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
    side_options: _SideOptions,
    label: Tensor | None,
    separate_label: bool,
    wants_entropy: bool,
    scratch: _Scratch,
) -> _Side:
    """Sweep over one model's logits in a piece; label [rows, 1] is the label's column, if it is needed."""
    count, temperature, name = logits.shape[0], side_options.temperature, side_options.name
    z, slope = _adjusted(
        logits,
        side_options.scale,
        side_options.softcap,
        scratch(f"{name} z", count),
        scratch,
        f"{name} slope",
    )
    side = _Side(z, slope, None if label is None else z.gather(-1, label), temperature)
    if not (side_options.needs_softmax or side_options.needs_softmax_t1):
        return side
    row_max, argmax = _finite_largest(z)
    centered = torch.sub(z, row_max, out=scratch(f"{name} centered", count))
    if side_options.needs_softmax_t1:
        out = scratch(f"{name} softmax at 1", count)
        softmax_t1 = _exponentials(centered, row_max, argmax, out)
        side = side._replace(softmax_t1=softmax_t1, centered_sum=_sum(centered))
    if not side_options.needs_softmax:
        return side
    if separate_label:
        assert label is not None
        if z is logits:
            z = scratch(f"{name} z", count).copy_(z)
        row_max, argmax = _finite_largest(z.scatter_(-1, label, -torch.inf))
        torch.sub(z, row_max, out=centered)
        side = side._replace(z=z)
    _divide(centered, temperature)
    needs_entropy = wants_entropy and name == "student"
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
    """Whether the maxima of a row's two sides differ by less than NEAR, [rows, 1].

    None if a side has no softmax, if the temperatures differ, or if reading the answer would synchronize.
    """
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
    tops_differ: Tensor | None = None
    # (phi, g, h) in the top columns, where the fields phi, g and h are 0.
    top_terms: tuple[Tensor, ...] = ()
    # (log q, log p) in the top columns.
    top_logs: tuple[Tensor, Tensor] | None = None

    def field(self, index: int) -> Tensor:
        """Phi, g or h of every column."""
        values = (self.phi, self.g, self.h)[index]
        assert values is not None
        return values

    def phi_sum(self) -> Tensor:
        """The sum of phi over all columns, [rows, 1]."""
        if self.tops_differ is None:
            return _sum(self.phi)
        student_top, teacher_top = self.top_terms[0].split(1, -1)
        return _sum(self.phi) + student_top + self.tops_differ * teacher_top


def _evaluated(
    divergence: Divergence,
    s: _Side,
    t: _Side,
    label: Tensor | None,
    wants_h: bool,
    scratch: _Scratch,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (phi, g, h) of every column in buffers of their own; 0 in the column of a label with a separate term."""
    count, num_terms = s.z.shape[0], 3 if wants_h else 2
    separate_label = None if divergence.target is None else label
    pair = None
    if s.softmax is not None and t.softmax is not None:
        pair = (t.softmax.exps, s.softmax.exps)
    reads = _reads(divergence.function, divergence.params, num_terms)
    if pair is not None and separate_label is None and reads <= {*ENTRY[:2]}:
        # The definition reads only p and q, so it has no logarithm of 0.
        phi, g, *more = _applied(divergence, (*pair, *pair[:1] * 3), scratch, num_terms)
        return phi, g, more[0] if more else None
    near = _near(s, t)
    if near is not None and bool(near.any()) and not bool(near.all()):
        return _evaluated_separately(near, divergence, s, t, label, wants_h, scratch)
    ratio = _log_ratio(s, t, scratch("ratio", count))
    if separate_label is not None:
        ratio.scatter_(-1, separate_label, 0.0)
    # The treatment of log 0 (fastkd.call.log_zero) costs more than all the rest, so rows without a log 0 skip it. On
    # devices other than the CPU, no row skips it, because checking for a log 0 would synchronize.
    finite = _finite_rows(ratio)
    log_p = log_q = ratio
    if not _all(finite) or not reads.isdisjoint(ENTRY[2:]):
        log_p = _log_softmax(t, scratch("log p", count))
        log_q = _log_softmax(s, scratch("log q", count))
        if separate_label is None and _all(finite):
            finite = finite & _finite_rows(log_p) & _finite_rows(log_q)
    if not _all(finite):
        if not _synchronizes(ratio.device) and bool(finite.any()):
            return _evaluated_separately(finite, divergence, s, t, label, wants_h, scratch)
        return evaluate(divergence, log_p, log_q, pair)
    if pair is None:
        pair = (torch.ones((), dtype=ratio.dtype, device=ratio.device).expand_as(ratio),) * 2
    if separate_label is not None and log_p is not ratio:
        for logs in (log_p, log_q):
            logs.scatter_(-1, separate_label, torch.finfo(ratio.dtype).min)
    entry = arguments_of(divergence.function, *pair, log_p, log_q, ratio)
    phi, g, *more = _applied(divergence, entry, scratch, num_terms)
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
    """Whether the mask is True in all rows; False on devices other than the CPU, where reading it would synchronize."""
    return not _synchronizes(rows.device) and bool(rows.all())


def _finite_rows(values: Tensor) -> Tensor:
    """Which rows are certainly finite. A row whose sum overflows counts as not finite."""
    return values.sum(-1).isfinite()


def _evaluated_separately(
    mask: Tensor,
    divergence: Divergence,
    s: _Side,
    t: _Side,
    label: Tensor | None,
    wants_h: bool,
    scratch: _Scratch,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Evaluate the rows inside and outside the mask separately, so that no row's result depends on the other rows."""

    def select(value: Any, indices: Tensor) -> Any:
        if isinstance(value, Tensor):
            return value[indices]
        if isinstance(value, (_Side, _Softmax)):
            return type(value)(*(select(field, indices) for field in value))
        return value

    terms: list[Tensor] = []
    for selected in (mask.flatten(), ~mask.flatten()):
        indices = selected.nonzero().squeeze(1)
        sides = select(s, indices), select(t, indices)
        if s.temperature is t.temperature:
            sides = sides[0], sides[1]._replace(temperature=sides[0].temperature)
        evaluated = _evaluated(divergence, *sides, select(label, indices), wants_h, scratch)
        kept_terms = [
            term for term in (evaluated if wants_h else evaluated[:2]) if term is not None
        ]
        terms = terms or [kept.new_empty(mask.shape[0], kept.shape[1]) for kept in kept_terms]
        for term, kept in zip(terms, kept_terms, strict=True):
            term[indices] = kept
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
        sum_dtype = side.softmax.others_sum.dtype
        centered = side.z.gather(-1, top_columns).to(sum_dtype) - side.softmax.row_max
        temperature = side.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.to(sum_dtype)
        logs.append(_divide(centered, temperature) - side.softmax.log_exp_sum)
    log_q, log_p = logs
    top_terms = evaluate(divergence, log_p, log_q)
    for term in columns:
        if term is not None:
            term.scatter_(-1, top_columns, 0.0)
    tops_differ = (top_columns[:, :1] != top_columns[:, 1:]).to(log_q.dtype)
    terms = _Terms(*columns, top_columns, tops_differ, top_terms, (log_q, log_p))
    if wants_h and is_cross_entropy(divergence):
        return _with_centered_h(terms, divergence, s, t, scratch)
    return terms


def _with_centered_h(
    terms: _Terms, divergence: Divergence, s: _Side, t: _Side, scratch: _Scratch
) -> _Terms:
    """Replace h of a multiple of the cross-entropy by -p (log q - mean), with the mean of log q under p.

    The two differ by a multiple of p, which the projection removes. Without this step, the projection would subtract p
    times the mean from p log q after both have been rounded. Rows with a log 0 stay as they are.
    """
    assert divergence.closed_form is not None and s.softmax is not None and t.softmax is not None
    assert terms.h is not None and terms.top_columns is not None and terms.top_logs is not None
    weight = divergence.closed_form.cross
    log_q, log_p = terms.top_logs
    mean = terms.phi_sum() / -weight
    origin = mean + s.softmax.log_exp_sum
    h = torch.sub(s.z, s.softmax.row_max, out=scratch("centered h", s.z.shape[0]))
    h = _divide(h, s.temperature).sub_(origin.to(h.dtype))
    h.mul_(t.softmax.exps).mul_(-weight).scatter_(-1, terms.top_columns, 0.0)
    top_h = -weight * log_p.exp() * (log_q - mean)
    finite = _finite_rows(h) & _finite_rows(top_h)
    if not _all(finite):
        finite = finite.unsqueeze(-1)
        h, top_h = h.where(finite, terms.h), top_h.where(finite, terms.top_terms[2])
    return terms._replace(h=h, top_terms=(*terms.top_terms[:2], top_h))


# Running the definitions of fastkd.divergences in reused buffers
#
# A definition's code runs once on symbols instead of tensors, which records its operations as a list of steps. Steps
# that no wanted term needs are left out. Each step writes to a buffer of the piece, and overwrites an operand if no
# later step reads it. `where` is done by bitwise operations, because torch.where is slow on a CPU (4 nanoseconds per
# element).


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
        indicator = condition if yes - no == 1.0 else condition * (yes - no)
        return indicator + no if no else indicator
    if bound == 0.0 and no == 0.0:
        branch = number if condition.operator == "gt" else -number
        if yes is branch:
            return branch.apply("clamp_min", 0.0)
    if (condition.operator, number.operator, bound) == ("gt", RATIO, 0.0):
        names = tuple(x.operator if isinstance(x, _Symbol) else "" for x in (yes, no))
        # yes and no are p and q, or their logarithms; p is the larger one exactly where the log-ratio is positive.
        if names in (ENTRY[:2], ENTRY[2:]):
            assert isinstance(yes, _Symbol)
            return yes.apply("maximum", no)
        if names[::-1] in (ENTRY[:2], ENTRY[2:]):
            assert isinstance(yes, _Symbol)
            return yes.apply("minimum", no)
    return condition.apply("mask").apply("select", yes, no)


def _log_mixture(log_ratio: _Symbol, p_share: float, q_share: float) -> _Symbol:
    """Compute the same as log_mixture of fastkd.divergences, in fewer steps."""
    minus_abs = -log_ratio.apply("abs")
    change = minus_abs.apply("expm1")
    if p_share == q_share:  # both 1/2, so the argument of log1p is never below -1/2
        return (change * p_share).apply("log1p")
    below = log_ratio < 0.0
    lower, upper = _where(below, p_share, q_share), _where(below, q_share, p_share)
    change = change * lower
    direct = (minus_abs.apply("exp") * lower + upper).apply("log")
    return _where(change > -0.3, change.apply("log1p"), direct)


def _distance(p: _Symbol, q: _Symbol, log_ratio: _Symbol) -> _Symbol:
    """Compute the same as distance of fastkd.divergences."""
    return _where(log_ratio > 0.0, p, q) * (-log_ratio.apply("abs")).apply("expm1") * -1.0


def _power(log_x: _Symbol, high: float, low: float) -> _Symbol:
    """Compute the same as power of fastkd.divergences."""
    return _exp_of_parts(*_product_in_parts(log_x, high, low))


def _power_product(
    log_x: _Symbol, a_high: float, a_low: float, log_y: _Symbol, b_high: float, b_low: float
) -> _Symbol:
    """Compute the same as power_product of fastkd.divergences."""
    x_exact, x_rest = _product_in_parts(log_x, a_high, a_low)
    y_exact, y_rest = _product_in_parts(log_y, b_high, b_low)
    return _exp_of_parts(x_exact + y_exact, x_rest + y_rest)


def _exp_of_parts(exact: _Symbol, rest: _Symbol) -> _Symbol:
    total = exact + rest
    result = total.apply("exp")
    lost = _where(total.apply("abs") < 80.0, (exact - total) + rest, 0.0)
    return result * lost + result


def _function(operator: str) -> Callable[..., _Symbol]:
    return lambda symbol, *others: symbol.apply(operator, *others)


_WORDS = {word: _function(word) for word in VOCABULARY} | {
    "where": _where,
    "log_mixture": _log_mixture,
    "log_even_mixture": lambda log_ratio: _log_mixture(log_ratio, 0.5, 0.5),
    "distance": _distance,
    "power": _power,
    "power_product": _power_product,
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

    It uses PyTorch's sign operator, which costs much less than the exponential in the table's definition.
    """
    difference = p - q
    sign = difference.apply("sign") * 0.5
    return difference.apply("abs") * 0.5, -(q * sign), p * sign


_FASTER_DEFINITIONS = {divergences._tvd: _tvd}


class _Step(NamedTuple):
    """A call that writes to a buffer."""

    function: Callable[..., Any]
    # An int is the index of a buffer, a float is a literal.
    operands: tuple[int | float, ...]
    # The index of a buffer.
    out: int


class _Program(NamedTuple):
    """A definition as steps. The first buffers hold its arguments; all but p and q may be overwritten."""

    steps: list[_Step]
    # How many buffers the steps use, arguments included.
    buffers: int
    # The indices of the buffers that hold phi, g and h.
    terms: list[int]
    # The names of the arguments that the steps read.
    reads: frozenset[str]


_OPERATORS: dict[str, Callable[..., Any]] = {
    "mask": _mask,
    "select": _select,
    "copy": lambda x, out: out.copy_(x),
}


@functools.lru_cache(maxsize=256)
def _program(function: Callable[..., Any], params: tuple[float, ...], num_terms: int) -> _Program:
    """Record, as steps, the first `num_terms` terms that a definition of the table returns."""
    symbols: _Symbols = {}
    names = (*ENTRY, RATIO)[: 5 if takes_ratio(function) else 4]
    entry = [_Symbol(name, (), symbols) for name in names]
    on_symbols = _FASTER_DEFINITIONS.get(function) or FunctionType(
        function.__code__, vars(divergences) | _WORDS
    )
    terms: list[_Symbol] = []
    for term in on_symbols(*entry, *params)[:num_terms]:
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
        call = _OPERATORS.get(symbol.operator) or getattr(torch, symbol.operator)
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
    divergence: Divergence, entry: Sequence[Tensor], scratch: _Scratch, num_terms: int = 3
) -> list[Tensor]:
    """Return the first `num_terms` terms of the definition in buffers of their own. Logarithms may be overwritten."""
    function, params = divergence.function, divergence.params
    shape, dtype = entry[-1].shape, entry[-1].dtype
    if function not in DEFINITIONS:
        # A user's definition may return its arguments, or one number per row.
        terms = function(*entry, *params)[:num_terms]
        return [term.to(dtype).expand(shape).clone() for term in terms]
    program = _program(function, params, num_terms)
    buffers = list(entry)
    buffers += [
        scratch(f"pool {number}", shape[0]) for number in range(len(entry), program.buffers)
    ]
    for call, operands, out in program.steps:
        call(*[buffers[x] if type(x) is int else x for x in operands], out=buffers[out])
    return [buffers[number] for number in program.terms]


def _reads(
    function: Callable[..., Any], params: tuple[float, ...], num_terms: int
) -> frozenset[str]:
    """The names of the arguments that a definition reads."""
    if function in DEFINITIONS:
        return _program(function, params, num_terms).reads
    return frozenset((*ENTRY, RATIO))


def _label_term(s: _Side, t: _Side, divergence: Divergence) -> reference.LabelTerm:
    """Compute the label's separate term with the reference's code; its fields are [rows, 1]."""
    assert s.softmax is not None and t.softmax is not None and divergence.target is not None
    sum_dtype = s.softmax.others_sum.dtype
    zero = torch.zeros((), dtype=sum_dtype, device=s.z.device)

    def flat(value: Tensor | None) -> Tensor:
        return zero if value is None else value.to(sum_dtype).squeeze(-1)

    def tempered_max(side: _Side) -> Tensor:
        assert side.softmax is not None
        temperature = side.temperature
        divisor = flat(temperature) if isinstance(temperature, Tensor) else temperature
        return flat(side.softmax.row_max) / divisor

    def sum_and_max_t1(side: _Side) -> tuple[Tensor, Tensor]:
        softmax = side.softmax_t1
        return (zero, zero) if softmax is None else (flat(softmax.exp_sum), flat(softmax.row_max))

    exp_sum_t1, max_t1 = sum_and_max_t1(s)
    teacher_exp_sum_t1, teacher_max_t1 = sum_and_max_t1(t)
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
    """A piece of dense rows [rows, columns], and the options and wanted outputs of the call."""

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
    def has_divergence(self) -> bool:
        """Whether the divergence is computed."""
        return self.options.alpha > 0.0 or self.want.parts

    @property
    def has_cross_entropy(self) -> bool:
        """Whether the loss has a cross-entropy term."""
        return self.rows.labels is not None and self.options.alpha < 1.0

    @property
    def has_separate_label(self) -> bool:
        """Whether the divergence has a separate term for the label."""
        return self.has_divergence and self.options.divergence.target is not None

    @property
    def has_label_cross_entropy(self) -> bool:
        """Whether the label's separate term is a cross-entropy at temperature 1."""
        target = self.options.divergence.target
        return self.has_divergence and target is not None and target.form == "label"

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
    # _same_temperature compares tensors by identity, so both sides share one tensor if their temperatures are the same.
    teacher_temperature = temperature
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
    """Sweep over both models' logits; the teacher's side is None if it is not needed."""
    options, parts = piece.options, piece.want.parts
    normalizes = piece.has_divergence and options.divergence.normalized
    label_cross_entropy, separate_label = piece.has_label_cross_entropy, piece.has_separate_label
    student = _SideOptions(
        "student",
        options.logit_scale,
        options.softcap,
        piece.temperature,
        needs_softmax=normalizes or parts,
        needs_softmax_t1=piece.has_cross_entropy or label_cross_entropy,
    )
    s = _sweep(piece.student, student, piece.label, separate_label, parts, piece.scratch)
    if not piece.has_divergence:
        return s, None
    teacher = _SideOptions(
        "teacher",
        options.teacher_logit_scale,
        options.teacher_softcap,
        piece.teacher_temperature,
        needs_softmax=normalizes,
        needs_softmax_t1=label_cross_entropy,
    )
    return s, _sweep(piece.teacher, teacher, piece.label, separate_label, False, piece.scratch)


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
    sum_dtype = softmax.others_sum.dtype
    value = softmax.log_exp_sum - (s.label.to(sum_dtype) - softmax.row_max.to(sum_dtype))
    smooth = softmax.log_exp_sum - s.centered_sum / options.vocab_size
    return (1.0 - smoothing) * value + smoothing * smooth if smoothing else value


class _DivergenceResult(NamedTuple):
    """The results of a divergence for a piece."""

    # [rows, 1], T^2 included.
    distillation: Tensor
    # Of the student at temperature T, [rows, 1].
    entropy: Tensor | None = None
    terms: _Terms | None = None
    # The label's separate term.
    label: reference.LabelTerm | None = None


def _divergence_result(piece: _Piece, s: _Side, t: _Side | None) -> _DivergenceResult:
    sum_dtype = _sum_dtype(piece.scratch.dtype, piece.student.device)
    if t is None:
        shape, device = (piece.student.shape[0], 1), piece.student.device
        return _DivergenceResult(torch.zeros(shape, dtype=sum_dtype, device=device))
    divergence, options = piece.options.divergence, piece.options
    side = s if divergence.normalized else s._replace(softmax=None)
    wants_h = piece.want.teacher_gradient
    terms = _terms(divergence, side, t, piece.label, wants_h, piece.scratch)
    distillation = terms.phi_sum()
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
    return _DivergenceResult(distillation, entropy, terms, label)


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
    divergence_result = _divergence_result(piece, s, t)
    cross_entropy = torch.zeros_like(divergence_result.distillation)
    if piece.has_cross_entropy:
        cross_entropy = _cross_entropy(s, options, options.label_smoothing)
    loss = torch.zeros_like(divergence_result.distillation)
    if options.alpha:
        loss = options.alpha * divergence_result.distillation
    if piece.has_cross_entropy:
        loss = loss + options.cross_entropy_weight * cross_entropy
    weight = _weights(piece, s, t)
    loss = loss * weight

    kept = None  # on a CPU all rows of a piece are kept
    if _synchronizes(student.device):
        kept = kept_rows(rows, options.ignore_index)
        kept = None if kept is None else kept.unsqueeze(-1)
    scale = options.scale if rows.scale is None else options.scale * rows.scale.to(scratch.dtype)
    row_scale = weight * scale
    student_out, teacher_out = outs
    # The teacher's gradient comes first, because the student's may overwrite logits that are still read.
    if teacher_out is not None:
        if t is None:
            teacher_out.copy_((torch.zeros_like(loss) * row_scale).expand_as(teacher_out))
        else:
            gradient = _divergence_gradient(piece, t, divergence_result, 2, row_scale, teacher_out)
            _finish(gradient, t.slope, options.teacher_logit_scale, kept, teacher_out)
    if student_out is not None:
        gradient = _divergence_gradient(piece, s, divergence_result, 1, row_scale, student_out)
        _add_cross_entropies(gradient, piece, s, divergence_result, row_scale)
        _finish(gradient, s.slope, options.logit_scale, kept, student_out)

    def zero_dropped(value: Tensor) -> Tensor:
        return value if kept is None else value.masked_fill(~kept, 0.0)

    entropy = None if divergence_result.entropy is None else zero_dropped(divergence_result.entropy)
    return _Values(
        zero_dropped(loss),
        zero_dropped(divergence_result.distillation),
        zero_dropped(cross_entropy),
        entropy,
    )


def _divergence_gradient(
    piece: _Piece,
    side: _Side,
    divergence_result: _DivergenceResult,
    index: int,
    row_scale: float | Tensor,
    out: Tensor,
) -> Tensor:
    """Compute the gradient of the divergence with respect to one side's z, in `out` if that has the right dtype.

    It is factor * (x_v - p_v sum_u x_u), with p the side's softmax and x the field of _Terms that index selects: 1 for
    g and the student's gradient, 2 for h and the teacher's. x is overwritten.
    """
    dtype, terms, label = piece.scratch.dtype, divergence_result.terms, divergence_result.label
    if out.dtype != dtype:
        out = piece.scratch("gradient", out.shape[0])
    if not piece.options.alpha:
        return out.zero_()
    assert terms is not None
    factor = row_scale * (piece.options.alpha * piece.t_squared / side.temperature)
    x = terms.field(index)
    if terms.top_columns is None or side.softmax is None:
        torch.mul(x, factor, out=out)
    else:
        assert terms.top_logs is not None and terms.tops_differ is not None
        top_values, log_p = terms.top_terms[index], terms.top_logs[index - 1]
        # For each of the two top columns, the sum over all columns but itself.
        others = _sum(x) + terms.tops_differ * top_values.flip(-1)
        if label is not None:
            others = others + label[index]
        total = others[:, :1] + top_values[:, :1]
        top_gradients = -top_values * log_p.expm1() - log_p.exp() * others
        _multiply(x, factor)
        torch.addcmul(x, side.softmax.exps, (total * factor).to(x.dtype), value=-1.0, out=out)
        out.scatter_(-1, terms.top_columns, (top_gradients * factor).to(dtype))
    if label is not None:
        assert piece.label is not None
        out.scatter_(-1, piece.label, (label[index] * factor).to(dtype))
    return out


def _finish(
    gradient: Tensor, slope: Tensor | None, scale: float, kept: Tensor | None, out: Tensor
) -> None:
    """Turn a gradient with respect to z into one with respect to the logits, and write it to `out`."""
    _multiply(gradient, scale if slope is None else slope)
    if kept is not None:
        gradient.masked_fill_(~kept, 0.0)
    if gradient is not out:
        out.copy_(gradient)


def _multiply(gradient: Tensor, factor: float | Tensor) -> Tensor:
    return gradient.mul_(factor) if isinstance(factor, Tensor) or factor != 1.0 else gradient


def _add_cross_entropies(
    gradient: Tensor,
    piece: _Piece,
    s: _Side,
    divergence_result: _DivergenceResult,
    row_scale: float | Tensor,
) -> None:
    """Add the gradients of the cross-entropy, and of a label term that is a cross-entropy."""
    options, label = piece.options, divergence_result.label
    if piece.has_cross_entropy:
        factor = options.cross_entropy_weight * row_scale
        _add_cross_entropy(gradient, s, piece.label, factor, options, options.label_smoothing)
    if piece.has_label_cross_entropy and label is not None and options.alpha:
        factor = options.alpha * row_scale * label.cross_entropy_weight
        _add_cross_entropy(gradient, s, piece.label, factor, options, 0.0)


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
    # The label's column is computed separately: if q_y is nearly 1, q_y - 1 loses its digits; expm1(log q_y) does not.
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
    kept = _kept_indices(rows, options.ignore_index, device)
    count = lead.numel() if kept is None else kept.numel()
    step = min(piece_rows(columns, dtype, device.type), max(count, 1))
    scratch = _Scratch(step, columns, dtype, device)
    gradients = (result.student_gradient, result.teacher_gradient)
    per_row = (result.loss, *result.parts[:3])
    if kept is not None:
        _clear_dropped([*per_row, *gradients], kept, lead)
    for indices in _pieces(count, step, kept):
        s, t = (take(logits, lead, indices)[:, :columns] for logits in (student, teacher))
        outs = [_Out(gradient, lead, indices, columns) for gradient in gradients]
        buffers = [out.buffer(scratch, name) for out, name in zip(outs, ("s", "t"), strict=True)]
        values = _dense_piece(s, t, rows_at(rows, lead, indices), options, want, buffers, scratch)
        for all_rows, value in zip(per_row, values, strict=True):
            if all_rows is not None and value is not None:
                put(all_rows, lead, indices, value.squeeze(-1).to(dtype))
        for out in outs:
            out.close()
    for gradient in gradients:
        if gradient is not None and gradient.shape[-1] > columns:
            gradient[..., columns:] = 0.0
    factor = options.scale if rows.scale is None else options.scale * rows.scale
    total = result.loss.sum(dtype=_sum_dtype(dtype, device)) * factor
    return result._replace(total=total.to(dtype))


def _clear_dropped(values: Sequence[Tensor | None], kept: Tensor, lead: torch.Size) -> None:
    """Set every row whose index is not among `kept` to 0."""
    dropped = torch.ones(lead.numel(), dtype=torch.bool, device=kept.device)
    dropped[kept] = False
    indices = dropped.nonzero().squeeze(1)
    for value in values:
        if value is not None:
            put(value, lead, indices, torch.zeros((), dtype=value.dtype, device=value.device))


class _Out:
    """Where a piece writes its gradient: the result's memory, or a buffer if the piece's rows are not adjacent."""

    def __init__(
        self, all_rows: Tensor | None, lead: torch.Size, indices: RowIndices, columns: int
    ) -> None:
        self.all_rows, self.lead, self.indices, self.columns = all_rows, lead, indices, columns
        self.packed: Tensor | None = None

    def buffer(self, scratch: _Scratch, name: str) -> Tensor | None:
        """The memory to write to, [rows, columns]; None: no gradient is wanted."""
        if self.all_rows is None:
            return None
        if isinstance(self.indices, slice):
            try:
                rows = self.all_rows.view(self.lead.numel(), self.all_rows.shape[-1])
            except RuntimeError:  # an in-place gradient has the strides of the caller's logits
                pass
            else:
                return rows[self.indices, : self.columns]
        count = (
            len(self.indices)
            if isinstance(self.indices, Tensor)
            else self.indices.stop - self.indices.start
        )
        self.packed = scratch(f"{name} packed", count)
        return self.packed

    def close(self) -> None:
        """Copy the rows of a buffer to the result."""
        if self.packed is not None and self.all_rows is not None:
            packed = self.packed.to(self.all_rows.dtype)
            put(self.all_rows[..., : self.columns], self.lead, self.indices, packed)


# Sparse teachers


def gather_events(student: Tensor, rows: Rows, options: Options, parts: bool) -> Events:
    """Reduce the student's rows to the K + 1 events of a sparse teacher (fastkd/backends/sparse.py).

    On a CPU, every field of a dropped row is 0, except valid, which is True. Other devices compute dropped rows like
    the rest.
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
    for indices, s, rows_of_piece, scratch in _student_pieces(student, rows, options, dtype):
        values = _events_of_piece(s, rows_of_piece, options, parts, scratch)
        for output, value in zip(outputs, values, strict=True):
            put(output, lead, indices, value)
    return events


def _student_pieces(
    student: Tensor, rows: Rows, options: Options, dtype: torch.dtype
) -> Iterator[tuple[RowIndices, Tensor, Rows, _Scratch]]:
    """Yield (row indices, logits, Rows, scratch buffers) for each piece of the kept rows."""
    lead, device, columns = student.shape[:-1], student.device, options.vocab_size
    student = readable(student)
    kept = _kept_indices(rows, options.ignore_index, device)
    count = lead.numel() if kept is None else kept.numel()
    step = min(piece_rows(columns, dtype, device.type), max(count, 1))
    scratch = _Scratch(step, columns, dtype, device)
    for indices in _pieces(count, step, kept):
        yield (
            indices,
            take(student, lead, indices)[:, :columns],
            rows_at(rows, lead, indices),
            scratch,
        )


def _id_columns(ids: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return (is_local, columns, marks), each of the shape of ids.

    is_local: whether this process has the column of the id. columns: that column, or 0 if it is not local. marks: -inf
    for local columns and inf for others, so that scattering the marks with amin sets the listed columns to -inf.
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
    sum_dtype = _sum_dtype(dtype, student.device)
    z = scratch("z", count)
    adjusted, _ = _adjusted(student, options.logit_scale, options.softcap, z, scratch, "slope")
    is_local, id_columns, marks = _id_columns(ids, options)
    tokens = adjusted.gather(-1, id_columns).masked_fill_(~is_local, -torch.inf)
    origin = tokens.amax(-1, keepdim=True)
    statistics_t1: list[Tensor] = []  # the fields log_sum, label and mean of Events
    if rows.labels is not None and options.alpha < 1.0:
        row_max = finite_max(adjusted.amax(-1, keepdim=True))
        label_is_local, label_column = _label_columns(rows.labels, options)
        label = adjusted.gather(-1, label_column) - row_max
        centered = torch.sub(adjusted, row_max, out=scratch("exps", count))
        mean = _sum(centered) / options.vocabulary
        statistics_t1 = [
            _sum(centered.exp_()).log(),
            label.masked_fill(~label_is_local, -torch.inf),
        ]
        statistics_t1 += [mean] if options.label_smoothing else []
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
    tail = (tail_origin - finite_max(origin)).to(sum_dtype) + temperature * log_sum
    values = [origin, tail_origin, tail, log_sum, *entropy, *statistics_t1]
    fields = [value.squeeze(-1).to(dtype) for value in values]
    fields.insert(2, tokens - finite_max(origin))
    return [*fields, _valid_ids(ids, options)]


def _valid_ids(ids: Tensor, options: Options) -> Tensor:
    """Which rows list only distinct ids of the vocabulary, apart from padding (-1)."""
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
    kept = _kept_indices(weighted, options.ignore_index, student.device)
    if kept is not None:
        _clear_dropped([out], kept, lead)
    for indices, s, _, scratch in _student_pieces(student, weighted, options, dtype):

        def select(value: Any, indices: RowIndices = indices) -> Any:
            return take(value, lead, indices) if isinstance(value, Tensor) else value

        piece = _spread_piece(
            s,
            Events(*map(select, events)),
            select(gradient),
            select(cross_entropy_scale),
            rows_at(rows, lead, indices),
            options,
            scratch,
        )
        put(out[..., :columns], lead, indices, piece.to(out.dtype))
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
        label_gradient = (factor * (options.label_smoothing - 1.0)).masked_fill(
            ~label_is_local, 0.0
        )
        cross_entropy.scatter_add_(-1, label_column, label_gradient)
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
    """Divide all rows into pieces. Dropped rows are included; their results are 0 or are not used."""
    count, step = lead.numel(), piece_rows(columns, dtype, device.type)
    # Without rows there is one empty slice, so that results get their shapes.
    return [slice(start, min(start + step, count)) for start in range(0, max(count, 1), step)]


def shard_statistics(call: ShardCall) -> Statistics:
    """Compute the statistics of this process's columns: 12 numbers per row in float64."""
    pieces = [reference.shard_statistics(piece) for _, piece in _shard_pieces(call)]
    return Statistics(torch.cat([statistics.gathered for statistics in pieces]))


def shard_sums(call: ShardCall) -> Tensor | None:
    """Compute 4 sums per row over this process's columns, in float64, given the statistics of all processes."""
    pieces = [reference.shard_sums(piece) for _, piece in _shard_pieces(call)]
    return torch.cat([sums for sums in pieces if sums is not None])


def shard_results(call: ShardCall) -> None:
    """Fill the result, given the statistics and the sums of all processes."""
    lead = call.student.shape[:-1]
    for indices, piece in _shard_pieces(call):

        def empty_piece(all_rows: Tensor | None, indices: slice = indices) -> Any:
            return None if all_rows is None else torch.empty_like(take(all_rows, lead, indices))

        fields = [empty_piece(all_rows) for all_rows in call.result._replace(total=None)]  # type: ignore[arg-type]
        piece_result = Result(*fields)
        reference.shard_results(piece._replace(result=piece_result))
        for all_rows, values in zip(call.result, piece_result, strict=True):
            if all_rows is not None and values is not None:
                put(all_rows, lead, indices, values)


def _shard_pieces(call: ShardCall) -> Iterator[tuple[slice, ShardCall]]:
    """Yield (a slice of the rows, the call restricted to these rows) for each piece; call.result stays whole."""
    lead = call.student.shape[:-1]
    dtype = row_dtype(call.student.dtype, call.teacher.dtype)
    for indices in _slices(lead, call.options.vocab_size, dtype, call.student.device):
        yield (
            indices,
            call._replace(
                student=take(call.student, lead, indices),
                teacher=take(call.teacher, lead, indices),
                rows=rows_at(call.rows, lead, indices),
                statistics=None
                if call.statistics is None
                else Statistics(call.statistics.gathered[:, indices]),
                sums=None if call.sums is None else call.sums[:, indices],
            ),
        )


def mutual_rows(
    logits: Sequence[Tensor],
    rows: Rows,
    options: mutual.Options,
    wanted: Sequence[bool],
    parts: bool,
) -> mutual.Result:
    """Compute each student's loss for every row, and the gradients; :mod:`fastkd.call.mutual` has the contract."""
    first, students = logits[0], len(logits)
    lead, dtype = first.shape[:-1], row_dtype(first.dtype)
    result = mutual.outputs(logits, wanted, parts, dtype=dtype)
    for indices in _slices(lead, students * first.shape[-1], dtype, first.device):
        piece_logits = [take(student, lead, indices) for student in logits]
        piece = reference_mutual.mutual_rows(
            piece_logits, rows_at(rows, lead, indices), options, wanted, parts
        )
        for name in ("loss", "divergence", "cross_entropy"):
            all_rows, values = getattr(result, name), getattr(piece, name)
            for student in range(students if all_rows is not None else 0):
                put(all_rows[student], lead, indices, values[student])
        for gradient, values in zip(result.gradients, piece.gradients, strict=True):
            if gradient is not None and values is not None:
                put(gradient, lead, indices, values)
    scale = options.scale if rows.scale is None else options.scale * rows.scale
    total = result.loss.reshape(students, -1).sum(-1, dtype=_sum_dtype(dtype, first.device)) * scale
    return result._replace(total=total.to(dtype))
