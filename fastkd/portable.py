"""The portable backend: plain PyTorch, a few rows at a time. What "auto" falls back to where there are no kernels.

It serves every call, on every device and in every dtype that PyTorch has. The formulas are those of
:mod:`fastkd.reference`, which computes them on whole tensors and is the oracle. Here a piece of rows stays in the
processor's cache, the operators write to buffers that every piece uses again, and the gradient goes straight to the
tensor that is returned. Fresh memory is what plain PyTorch spends most of its time on.

A piece of dense rows has code of its own (:func:`_dense_piece`). Sparse teachers, mutual learning, and rows whose
vocabulary is spread over processes run the reference's steps piece by piece.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import divergences, mutual, native, reference, topk
from fastkd.chunks import At, put, rows_at, take
from fastkd.divergences import DEFINITIONS, Divergence
from fastkd.reference import empty, evaluate, scale_rows_
from fastkd.plan import piece_rows
from fastkd.rows import Options, Result, Rows, Statistics, Want, counted_rows, row_dtype
from fastkd.topk import Events, topk_rows

__all__ = [
    "empty", "gather_events", "kd_rows", "mutual_rows", "scale_rows_", "shard_results",
    "shard_statistics", "shard_sums", "spread_gradient",
]  # fmt: skip


def _exact(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the few numbers of a row. Not every device has float64."""
    return torch.float64 if device.type in ("cpu", "cuda") else dtype


# ---- pieces of rows


def _counted(rows: Rows, ignore_index: int, device: torch.device) -> Tensor | None:
    """The numbers of the rows that count; None where all go through.

    That is so on a device, where their number would have to be waited for: dropped rows are computed and set to 0.
    """
    if device.type != "cpu":
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


class _Model(NamedTuple):
    """What a call says of one model, and what of it a piece computes."""

    name: str
    scale: float
    softcap: float
    temperature: float | Tensor  # [rows, 1]
    softmax: bool  # at the temperature
    plain: bool  # at temperature 1


class _Side(NamedTuple):
    """One model's columns in a piece, [rows, columns] or [rows, 1]."""

    slope: Tensor | None  # dz / dlogits, where they are soft-capped
    label: Tensor | None  # z of the label
    argument: Tensor | None = None  # of the divergence: log_softmax, or the tempered logits
    infinite: Tensor | None = None  # whether one of it is -inf, but for a label that is compared apart
    log_softmax: Tensor | None = None
    softmax: Tensor | None = None
    top: Tensor | None = None  # of z, of the columns that are compared
    total: Tensor | None = None  # sum of exp((z - top) / temperature) over them
    plain: Tensor | None = None  # exp(z - plain_top)
    plain_top: Tensor | None = None
    plain_sum: Tensor | None = None
    plain_total: Tensor | None = None  # sum of z - plain_top


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


def _sweep(
    logits: Tensor, model: _Model, seat: Tensor | None, divergence: Divergence, scratch: _Scratch
) -> _Side:
    """A side of a piece; seat [rows, 1] is the column of the label, where that is read."""
    count, name, temperature = logits.shape[0], model.name, model.temperature
    apart = divergence.target is not None
    gap = scratch(f"{name} gap", count)
    z, slope = _adjusted(logits, model.scale, model.softcap, gap, scratch, f"{name} slope")
    side = _Side(slope, None if seat is None else z.gather(-1, seat))
    if not divergence.normalized:
        argument = torch.div(z, temperature, out=scratch(f"{name} tempered", count))
        side = side._replace(argument=argument, infinite=(argument.amin(-1) == -torch.inf).any())
    if not (model.softmax or model.plain):
        return side

    top = _finite(z.amax(-1, keepdim=True))
    torch.sub(z, top, out=gap)
    if model.plain:
        plain = torch.exp(gap, out=scratch(f"{name} plain", count))
        side = side._replace(
            plain=plain,
            plain_top=top,
            plain_sum=_sum(plain),
            plain_total=_sum(gap),
        )
    if not model.softmax:
        return side
    if apart:
        assert seat is not None
        lower = _finite(gap.scatter_(-1, seat, -torch.inf).amax(-1, keepdim=True))
        gap.sub_(lower).scatter_(-1, seat, 0.0)
        top = top.to(lower.dtype) + lower
    tempers = isinstance(temperature, Tensor) or temperature != 1.0
    if tempers:
        gap.div_(temperature)
    infinite = (gap.amin(-1) == -torch.inf).any()
    if apart:
        assert seat is not None
        gap.scatter_(-1, seat, -torch.inf)
    powers = scratch(f"{name} powers", count)
    if side.plain is not None and not apart and not tempers:
        powers.copy_(side.plain)
    else:
        torch.exp(gap, out=powers)
    total = _sum(powers)
    side = side._replace(
        log_softmax=gap.sub_(total.log().to(gap.dtype)),
        softmax=powers.div_(total.to(gap.dtype)),
        top=top,
        total=total,
    )
    if divergence.normalized:
        side = side._replace(argument=side.log_softmax, infinite=infinite)
    return side


def _finite(origin: Tensor) -> Tensor:
    return origin.masked_fill(origin == -torch.inf, 0.0)


def _sum(values: Tensor) -> Tensor:
    """[rows, 1]; what follows with the few numbers of a row is more exact than its columns are."""
    return values.sum(-1, keepdim=True).to(_exact(values.dtype, values.device))


def _definition(
    divergence: Divergence, s: _Side, t: _Side, seat: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(phi, g) of every column; 0 of a label that is compared apart."""
    log_p, log_q = t.argument, s.argument
    assert log_p is not None and log_q is not None
    p, q = t.softmax, s.softmax
    assert s.infinite is not None and t.infinite is not None
    # Its policy for log 0 costs more than all the rest. To ask whether it is needed a device would have to be waited for.
    if log_p.device.type != "cpu" or bool(s.infinite | t.infinite):
        return evaluate(divergence, log_p, log_q, None if p is None or q is None else (p, q))
    if not divergence.normalized:
        p = q = torch.ones((), dtype=log_p.dtype, device=log_p.device).expand_as(log_p)
    apart = divergence.target is not None
    if apart:
        assert seat is not None
        lowest = torch.finfo(log_p.dtype).min
        log_p, log_q = log_p.scatter_(-1, seat, lowest), log_q.scatter_(-1, seat, lowest)
    phi, g = _quick(divergence.function)(p, q, log_p, log_q, *divergence.params)
    # A definition may return a number a row, or one of its arguments.
    phi, g = (term.to(log_p.dtype).expand_as(log_p) for term in (phi, g))
    if apart:
        assert seat is not None
        phi, g = phi.scatter(-1, seat, 0.0), g.scatter(-1, seat, 0.0)
    return phi, g


def _where(condition: Tensor, yes: Tensor | float, no: Tensor | float) -> Tensor:
    """torch.where of two numbers takes 6 times as long on a CPU."""
    if isinstance(yes, Tensor) or isinstance(no, Tensor):
        return torch.where(condition, yes, no)
    result = condition.to(torch.get_default_dtype())
    return result if (yes, no) == (1.0, 0.0) else result.mul_(yes - no).add_(no)


@functools.cache
def _quick(function: Callable[..., Any]) -> Callable[..., Any]:
    """A definition of the table with that `where`."""
    if function not in DEFINITIONS:
        return function
    return FunctionType(function.__code__, vars(divergences) | {"where": _where})


def _entropy(side: _Side) -> Tensor:
    """[rows, 1], of softmax at the temperature."""
    q, log_q = side.softmax, side.log_softmax
    assert q is not None and log_q is not None
    # -inf only where q is 0, which then takes the place of its product.
    return -_sum(q * log_q.clamp(min=torch.finfo(q.dtype).min))


def _label_apart(
    s: _Side, t: _Side, models: tuple[_Model, _Model], divergence: Divergence
) -> reference._Apart:
    """What the label's token adds, [rows, 1] each."""
    assert s.label is not None and t.label is not None and divergence.target is not None
    kind = _exact(s.label.dtype, s.label.device)

    def row(value: Tensor | None) -> Tensor:
        return torch.zeros((), dtype=kind) if value is None else value.to(kind).squeeze(-1)

    sides, tops = [], []
    for side, model in zip((s, t), models, strict=True):
        sides.append(reference._Side(side.label, 1.0, model.temperature, None))
        spread = model.temperature
        tops.append(row(side.top) / (row(spread) if isinstance(spread, Tensor) else spread))
    found = reference._Found(
        *tops, row(s.total), row(t.total), row(s.plain_sum), row(s.plain_top), row(s.label), row(t.label),
        row(t.plain_sum), row(t.plain_top), row(s.plain_total), row(None),
    )  # fmt: skip
    made = reference._apart(*sides, found, divergence.target)
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
    outs: tuple[Tensor | None, Tensor | None],
    scratch: _Scratch,
) -> _Values:
    """The loss of some rows [rows, columns], and the gradients, which it writes into outs."""
    divergence, alpha = options.divergence, options.alpha
    count, device, dtype = student.shape[0], student.device, scratch.dtype
    kind = _exact(dtype, device)

    def column(value: Tensor | None, number: float) -> float | Tensor:
        return number if value is None else value.to(dtype).unsqueeze(-1)

    temperature = column(rows.temperature, options.temperature)
    teacher_temperature = column(rows.teacher_temperature, options.teacher_temperature)
    target = divergence.target
    with_labels = rows.labels is not None and alpha < 1.0
    by_label = target is not None and target.form == "label"
    compares = alpha > 0.0 or want.parts
    models = (
        _Model(
            "student", options.logit_scale, options.softcap, temperature,
            compares and (divergence.normalized or want.parts), with_labels or (by_label and compares),
        ),
        _Model(
            "teacher", options.teacher_logit_scale, options.teacher_softcap, teacher_temperature,
            compares and divergence.normalized, by_label and compares,
        ),
    )  # fmt: skip

    seat = valid = None
    if rows.labels is not None and options.reads_labels:
        labels = rows.labels.unsqueeze(-1)
        valid = (labels >= 0) & (labels < options.vocab_size)
        seat = labels.masked_fill(~valid, 0)
    s = _sweep(student, models[0], seat, divergence, scratch)
    t = _sweep(teacher, models[1], seat, divergence, scratch) if compares else None

    # What multiplies a row: NaN where a label or a temperature is invalid.
    weight: float | Tensor = column(rows.weight, 1.0)
    invalid = None if valid is None else ~valid
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
    distillation, entropy, apart = zeros, None, None
    phi = g = torch.empty(0)
    phi_sum = g_sum = zeros
    if compares:
        assert t is not None
        phi, g = _definition(divergence, s, t, seat)
        phi_sum, g_sum = _sum(phi), _sum(g)
        if want.parts:
            entropy = _entropy(s)
        distillation = phi_sum
        if target is not None:
            apart = _label_apart(s, t, models, divergence)
            distillation = phi_sum + apart.phi
            if entropy is not None:
                entropy = apart.entropy + apart.others * entropy
        distillation = distillation * t_squared

    def cross_entropy_of(smoothing: float) -> Tensor:
        assert s.label is not None and s.plain_sum is not None and s.plain_top is not None
        assert s.plain_total is not None
        log_sum = s.plain_sum.log()
        value = log_sum - (s.label.to(kind) - s.plain_top.to(kind))
        if not smoothing:
            return value
        return (1.0 - smoothing) * value + smoothing * (
            log_sum - s.plain_total / options.vocab_size
        )

    cross_entropy = cross_entropy_of(options.label_smoothing) if with_labels else zeros
    if by_label and apart is not None:
        value = cross_entropy_of(0.0)
        distillation = distillation + torch.where(apart.weight == 0, 0.0, apart.weight * value)
    loss = alpha * distillation if alpha else zeros
    if with_labels:
        loss = loss + (1.0 - alpha) * cross_entropy
    loss = loss * weight

    keep = None
    if device.type != "cpu":
        keep = counted_rows(rows, options.ignore_index)
        keep = None if keep is None else keep.unsqueeze(-1)

    def finish(gradient: Tensor, slope: Tensor | None, scale: float, out: Tensor) -> None:
        if slope is not None:
            gradient.mul_(slope)
        elif scale != 1.0:
            gradient.mul_(scale)
        if keep is not None:
            gradient.masked_fill_(~keep, 0.0)
        if gradient is not out:
            out.copy_(gradient)

    def project(g: Tensor, q: Tensor | None, total: Tensor, to: Tensor) -> Tensor:
        if q is None or not divergence.normalized:
            return to.copy_(g)
        return torch.addcmul(g, q, total.to(dtype), value=-1.0, out=to)

    student_out, teacher_out = outs
    # The teacher's first: the student's may overwrite logits that phi and g are views of.
    if teacher_out is not None:
        to = teacher_out if teacher_out.dtype == dtype else scratch("gradient", count)
        if alpha:
            assert t is not None and divergence.degree is not None
            h = divergence.degree * phi - g
            total = divergence.degree * phi_sum - g_sum
            gradient = project(h, t.softmax, total if apart is None else total + apart.h, to)
            if apart is not None and seat is not None:
                gradient.scatter_(-1, seat, apart.h.to(dtype))
            _multiply(gradient, row_scale * (alpha * t_squared / teacher_temperature))
        else:
            gradient = to.zero_()
            _multiply(gradient, row_scale)  # NaN where it is
        finish(gradient, t.slope if t else None, options.teacher_logit_scale, teacher_out)
    if student_out is not None:
        to = student_out if student_out.dtype == dtype else scratch("gradient", count)
        towards: float | Tensor = (1.0 - alpha) * row_scale if with_labels else 0.0
        if alpha:
            total = g_sum if apart is None else g_sum + apart.g
            gradient = project(g, s.softmax, total, to)
            if apart is not None and seat is not None:
                gradient.scatter_(-1, seat, apart.g.to(dtype))
            _multiply(gradient, row_scale * (alpha * t_squared / temperature))
        else:
            gradient = to.zero_()
        if with_labels:
            _add_cross_entropy(gradient, s, seat, towards, options, options.label_smoothing)
        if by_label and apart is not None and alpha:
            of_label = alpha * row_scale * apart.weight.to(dtype)
            _add_cross_entropy(gradient, s, seat, of_label, options, 0.0)
        finish(gradient, s.slope, options.logit_scale, student_out)

    def kept(value: Tensor) -> Tensor:
        return value if keep is None else value.masked_fill(~keep, 0.0)

    return _Values(
        kept(loss),
        kept(distillation),
        kept(cross_entropy),
        None if entropy is None else kept(entropy),
    )


def _multiply(gradient: Tensor, factor: float | Tensor) -> None:
    if isinstance(factor, Tensor) or factor != 1.0:
        gradient.mul_(factor)


def _add_cross_entropy(
    gradient: Tensor,
    s: _Side,
    seat: Tensor | None,
    factor: float | Tensor,
    options: Options,
    smoothing: float,
) -> None:
    """Add factor times (softmax - target), the target smoothed."""
    assert s.plain is not None and s.plain_sum is not None and seat is not None
    dtype = gradient.dtype
    gradient.addcmul_(s.plain, (factor / s.plain_sum).to(dtype))
    at_label = torch.as_tensor(factor * (smoothing - 1.0), dtype=dtype, device=gradient.device)
    gradient.scatter_add_(-1, seat, at_label.expand(seat.shape))
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
    if student.device.type != "cpu":
        z.masked_fill_(weight == 0, 0.0)
    return z


def _divide(z: Tensor, temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor) or temperature != 1.0:
        z.div_(temperature)


# ---- steps of the reference, a piece of rows at a time


def _slices(lead: torch.Size, columns: int, dtype: torch.dtype, device: torch.device) -> list[slice]:
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
        part = Result(
            *(
                None if value is None or name == "total" else torch.empty_like(take(value, lead, at))
                for name, value in result._asdict().items()
            )
        )
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
