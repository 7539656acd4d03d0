"""The portable backend: plain PyTorch, a few rows at a time. What "auto" falls back to where there are no kernels.

It serves every call, on every device and in every dtype that PyTorch has. The formulas are those of
:mod:`fastkd.reference`, which computes them on whole tensors and is the oracle. Here a piece of rows stays in the
processor's cache, the operators write to buffers that every piece uses again, and the gradient goes straight to the
tensor that is returned. Fresh memory is what plain PyTorch spends most of its time on.

A piece of dense rows has code of its own (:func:`_dense_piece`). Sparse teachers, mutual learning, and rows whose
vocabulary is spread over processes run the reference's steps piece by piece.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import mutual, native, reference, topk
from fastkd.chunks import At, put, rows_at, take
from fastkd.divergences import Divergence
from fastkd.reference import empty, evaluate, scale_rows_
from fastkd.rows import Options, Result, Rows, Statistics, Want, counted_rows, row_dtype
from fastkd.topk import Events, topk_rows

__all__ = [
    "empty", "gather_events", "kd_rows", "mutual_rows", "scale_rows_", "shard_results",
    "shard_statistics", "shard_sums", "spread_gradient",
]  # fmt: skip

# Bytes of one [rows, columns] tensor of a piece: on a CPU of each thread, whose own cache then holds most of the
# piece; elsewhere a launch costs microseconds, in which a device reads megabytes.
CPU_BYTES, DEVICE_BYTES = 256 << 10, 32 << 20
# How many of them a piece holds at most, those that a definition makes included; tests/test_portable.py measures it.
TEMPORARIES = 16


def rows_of_piece(columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of that many columns go through at once."""
    room = CPU_BYTES * torch.get_num_threads() if device.type == "cpu" else DEVICE_BYTES
    return max(room // max(columns * dtype.itemsize, 1), 1)


def workspace(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that a call holds beside its results."""
    rows = min(rows, rows_of_piece(columns, dtype, device))
    return TEMPORARIES * rows * columns * dtype.itemsize


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


def _sweep(
    logits: Tensor, model: _Model, seat: Tensor | None, divergence: Divergence, scratch: _Scratch
) -> _Side:
    """A side of a piece; seat [rows, 1] is the column of the label, where that is read."""
    count, name, temperature = logits.shape[0], model.name, model.temperature
    apart = divergence.target is not None
    gap = scratch(f"{name} gap", count)
    z, slope = logits, None
    if z.dtype != scratch.dtype or (z.stride(-1) != 1 and z.shape[-1] > 1):
        z = gap.copy_(z)
    if model.softcap:
        z = torch.mul(z, model.scale / model.softcap, out=gap).tanh_()
        slope = torch.mul(z, z, out=scratch(f"{name} slope", count))
        slope.neg_().add_(1.0).mul_(model.scale)
        z.mul_(model.softcap)
    elif model.scale != 1.0:
        z = torch.mul(z, model.scale, out=gap)
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
    phi, g = divergence.function(p, q, log_p, log_q, *divergence.params)
    # A definition may return a number a row, or one of its arguments.
    phi, g = (term.to(log_p.dtype).expand_as(log_p) for term in (phi, g))
    if apart:
        assert seat is not None
        phi, g = phi.scatter(-1, seat, 0.0), g.scatter(-1, seat, 0.0)
    return phi, g


def _entropy(side: _Side) -> Tensor:
    """[rows, 1], of softmax at the temperature."""
    q, log_q = side.softmax, side.log_softmax
    assert q is not None and log_q is not None
    return -_sum((q * log_q).masked_fill_(q == 0, 0.0))


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
    if options.reads_labels:
        assert rows.labels is not None  # validated
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
    step = min(rows_of_piece(columns, dtype, device), max(count, 1))
    scratch = _Scratch(step, columns, dtype, device)
    gradients = (result.student_gradient, result.teacher_gradient)
    if numbers is not None:
        _clear_dropped(result, numbers, lead)
    for at in _pieces(count, step, numbers):
        s, t = (take(logits, lead, at)[:, :columns] for logits in (student, teacher))
        outs = [_Out(gradient, lead, at, columns) for gradient in gradients]
        buffers = [out.buffer(scratch, name) for out, name in zip(outs, ("s", "t"), strict=True)]
        values = _dense_piece(s, t, rows_at(rows, lead, at), options, want, buffers, scratch)
        for whole, part in zip((result.loss, *result[4:]), values, strict=True):
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


def _clear_dropped(result: Result, counted: Tensor, lead: torch.Size) -> None:
    """Set to 0 what the rows that are not counted have of the result."""
    dropped = torch.ones(lead.numel(), dtype=torch.bool, device=counted.device)
    dropped[counted] = False
    at = dropped.nonzero().squeeze(1)
    for name, value in result._asdict().items():
        if value is not None and name != "total":
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
