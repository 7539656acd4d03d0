"""The reference: the mathematics in plain PyTorch. It is the oracle of every other backend, and their fallback.

Everything is computed in float32, or in float64 when a logit tensor is float64; [N, V] temporaries are not avoided.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastkd.divergences import Divergence
from fastkd.rows import Options, Result, Rows, Want, row_dtype
from fastkd.topk import Events, topk_rows

# A probability below this counts as 0 beside a logit of -inf on the other side (see evaluate).
NEGLIGIBLE = 1e-30
# With log 0 replaced by the most negative finite number, a term above this can only be infinite.
INFINITE = 1e6


def evaluate(
    divergence: Divergence,
    log_p: Tensor,
    log_q: Tensor,
    probabilities: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(phi, g) of every entry, with the one policy for log 0, so that no definition has to handle it.

    - Both sides at -inf: 0 * (-inf) = 0, the entry contributes nothing to the value and to the gradient.
    - One side at -inf, the other's probability not negligible: log 0 is replaced by the most negative finite
      number. Terms that carry a factor 0 vanish, and what is still above INFINITE is the mathematical infinity
      (forward KL where p > 0 = q); g stays what it is in the limit (-p there).
    - One side at -inf and the other below NEGLIGIBLE: nothing, as in the first case.

    probabilities are (p, q) where the caller has them; a softmax is more exact than the exp of its logarithm.
    """
    if not divergence.normalized:
        probabilities = (torch.ones_like(log_p),) * 2
    p, q = probabilities or (log_p.exp(), log_q.exp())
    p_gone, q_gone = log_p == -torch.inf, log_q == -torch.inf
    lowest = torch.finfo(log_p.dtype).min
    phi, g = divergence.function(
        p,
        q,
        log_p.masked_fill(p_gone, lowest),
        log_q.masked_fill(q_gone, lowest),
        *divergence.params,
    )
    one_side = p_gone ^ q_gone
    nothing = (p_gone & (q < NEGLIGIBLE)) | (q_gone & (p < NEGLIGIBLE)) | (p_gone & q_gone)

    def settle(term: Tensor) -> Tensor:
        term = torch.where(one_side & (term.abs() > INFINITE), term * torch.inf, term)
        return term.masked_fill(nothing, 0.0)

    return settle(phi), settle(g)


def _adjust(logits: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """Scaled and soft-capped logits z, and dz/dlogits. z = softcap * tanh(scale * logits / softcap)."""
    if not softcap:
        return (logits * scale, scale) if scale != 1.0 else (logits, 1.0)
    squashed = torch.tanh(logits * (scale / softcap))
    return softcap * squashed, scale * (1.0 - squashed * squashed)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities, probabilities). torch.softmax is off by 1e-5 on a CPU, in rows of 50,000 columns."""
    gap = logits - logits.amax(-1, keepdim=True)
    exponentials = gap.exp()
    total = exponentials.sum(-1, keepdim=True)
    return gap - total.log(), exponentials / total


def _project(derivative: Tensor, probabilities: Tensor, normalized: bool) -> Tensor:
    """From a derivative by log-probabilities to one by tempered logits: x_v - p_v sum_u x_u."""
    if not normalized:
        return derivative
    return derivative - probabilities * derivative.sum(-1, keepdim=True)


def _cross_entropy(z: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """(value [...], gradient [..., V]) of label-smoothed cross-entropy at temperature 1."""
    log_q, q = _softmax(z)
    target = labels.unsqueeze(-1)
    value = -(1.0 - smoothing) * log_q.gather(-1, target).squeeze(-1)
    gradient = q.scatter_add(-1, target, torch.full_like(log_q[..., :1], smoothing - 1.0))
    if smoothing:
        value = value - smoothing * log_q.mean(-1)
        gradient = gradient - smoothing / z.shape[-1]
    return value, gradient


def kd_rows(student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want) -> Result:
    """The loss of each row and its gradients; shapes and meaning as :class:`fastkd.rows.Result` has them."""
    if rows.ids is not None:
        return topk_rows(sys.modules[__name__], student, teacher, rows, options, want)
    divergence, alpha, vocabulary = options.divergence, options.alpha, options.vocab_size
    dtype = row_dtype(student.dtype, teacher.dtype)

    def per_row(value: Tensor | None, fallback: float) -> Tensor | float:
        return fallback if value is None else value.to(dtype).unsqueeze(-1)

    temperature = per_row(rows.temperature, options.temperature)
    teacher_temperature = per_row(rows.teacher_temperature, options.teacher_temperature)
    s, ds = _adjust(student[..., :vocabulary].to(dtype), options.logit_scale, options.softcap)
    t, dt = _adjust(
        teacher[..., :vocabulary].to(dtype), options.teacher_logit_scale, options.teacher_softcap
    )

    tempered_s, tempered_t = s / temperature, t / teacher_temperature
    (log_q, q), (log_p, p) = _softmax(tempered_s), _softmax(tempered_t)
    if divergence.normalized:
        phi, g = evaluate(divergence, log_p, log_q, (p, q))
    else:
        phi, g = evaluate(divergence, tempered_t, tempered_s)
    t_squared: Tensor | float = temperature * temperature if options.scale_by_temperature else 1.0
    distillation = phi.sum(-1) * (
        t_squared.squeeze(-1) if isinstance(t_squared, Tensor) else t_squared
    )

    # A dropped row contributes 0 whatever its logits hold, so it is selected away and not multiplied by 0.
    labels = rows.labels
    weight = torch.ones_like(distillation) if rows.weight is None else rows.weight.to(dtype)
    keep = weight != 0
    if labels is not None:
        keep = keep & (labels != options.ignore_index)
    for tempering in (rows.temperature, rows.teacher_temperature):
        if tempering is not None:  # an invalid temperature poisons its row
            weight = torch.where(tempering > 0, weight, torch.nan)

    cross_entropy = torch.zeros_like(distillation)
    cross_entropy_gradient: Tensor | float = 0.0
    with_labels = labels is not None and alpha < 1.0
    if labels is not None and with_labels:
        valid = (labels >= 0) & (labels < vocabulary)
        cross_entropy, cross_entropy_gradient = _cross_entropy(
            s, torch.where(valid, labels, 0), options.label_smoothing
        )
        weight = torch.where(valid, weight, torch.nan)  # and so does an invalid label

    scale = options.scale if rows.scale is None else options.scale * rows.scale.to(dtype)
    row_scale = (weight * scale).unsqueeze(-1)
    loss = torch.zeros_like(distillation)
    if alpha:
        loss = alpha * distillation
    if with_labels:
        loss = loss + (1.0 - alpha) * cross_entropy
    loss = torch.where(keep, loss * weight, 0.0)

    def finish(gradient: Tensor, like: Tensor) -> Tensor:
        gradient = torch.where(keep.unsqueeze(-1), gradient * row_scale, 0.0).to(like.dtype)
        padding = like.shape[-1] - vocabulary
        return torch.nn.functional.pad(gradient, (0, padding)) if padding else gradient.contiguous()

    student_gradient = teacher_gradient = None
    if want.student_gradient:
        gradient = torch.zeros_like(s)
        if alpha:
            gradient = _project(g, q, divergence.normalized) * (alpha * t_squared / temperature)
        if with_labels:
            gradient = gradient + (1.0 - alpha) * cross_entropy_gradient
        student_gradient = finish(gradient * ds, student)
    if want.teacher_gradient:
        assert divergence.degree is not None  # validated
        gradient = torch.zeros_like(t)
        if alpha:
            h = divergence.degree * phi - g
            gradient = _project(h, p, divergence.normalized) * (
                alpha * t_squared / teacher_temperature
            )
        teacher_gradient = finish(gradient * dt, teacher)
    if want.inplace and student_gradient is not None:
        student_gradient = student.copy_(student_gradient)

    parts: tuple[Tensor | None, ...] = (None, None, None)
    if want.parts:
        entropy = -torch.where(q == 0, 0.0, q * log_q).sum(-1)
        parts = tuple(
            torch.where(keep, part, 0.0) for part in (distillation, cross_entropy, entropy)
        )
    return Result(loss, loss.sum() * scale, student_gradient, teacher_gradient, *parts)


def gather_events(student: Tensor, rows: Rows, options: Options, parts: bool) -> Events:
    """The student's rows as a sparse teacher sees them: fastkd/topk.py."""
    ids, vocabulary = rows.ids, options.vocab_size
    assert ids is not None
    z, _ = _adjust(_upcast(student[..., :vocabulary]), options.logit_scale, options.softcap)
    temperature = _temperature_of(rows, options, z.dtype)
    in_range, seats, counts = _seat(ids, z)
    valid = (in_range | (ids == -1)).all(-1) & (counts <= 1).all(-1)

    def finite(origin: Tensor) -> Tensor:
        return torch.where(origin == -torch.inf, 0.0, origin).unsqueeze(-1)

    tokens = z.gather(-1, seats).masked_fill(~in_range, -torch.inf)
    others = z.masked_fill(counts > 0, -torch.inf)
    origin, tail_origin = tokens.amax(-1), others.amax(-1)
    others = (others - finite(tail_origin)) / temperature
    log_sum = others.logsumexp(-1)
    entropy = None
    if parts:
        log_q = others - torch.where(log_sum == -torch.inf, 0.0, log_sum).unsqueeze(-1)
        q = log_q.exp()
        entropy = -torch.where(q == 0, 0.0, q * log_q).sum(-1)
    log_sum_at_1 = label = mean = None
    if rows.labels is not None and options.alpha < 1.0:
        z = z - finite(torch.maximum(origin, tail_origin))
        log_sum_at_1 = z.logsumexp(-1)
        label = z.gather(-1, rows.labels.clamp(0, vocabulary - 1).unsqueeze(-1)).squeeze(-1)
        mean = z.mean(-1) if options.label_smoothing else None
    spread = temperature.squeeze(-1) if isinstance(temperature, Tensor) else temperature
    return Events(
        origin,
        tail_origin,
        tokens - finite(origin),
        tail_origin - finite(origin).squeeze(-1) + spread * log_sum,
        log_sum,
        entropy,
        log_sum_at_1,
        label,
        mean,
        valid,
    )


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
    ids, vocabulary = rows.ids, options.vocab_size
    assert ids is not None
    z, slope = _adjust(_upcast(student[..., :vocabulary]), options.logit_scale, options.softcap)
    temperature = _temperature_of(rows, options, z.dtype)
    in_range, seats, counts = _seat(ids, z)

    share = (z - events.tail_origin.unsqueeze(-1)) / temperature - events.tail_log_sum.unsqueeze(-1)
    result = share.exp() * gradient[..., -1:]
    result = result.masked_fill((counts > 0) | (z == -torch.inf), 0.0)
    result.scatter_add_(-1, seats, gradient[..., :-1].masked_fill(~in_range, 0.0))
    if cross_entropy_scale is not None:
        assert rows.labels is not None and events.log_sum is not None
        labels = rows.labels.clamp(0, vocabulary - 1).unsqueeze(-1)
        smoothing = options.label_smoothing
        log_q = z - torch.maximum(events.origin, events.tail_origin).unsqueeze(-1)
        cross_entropy = (log_q - events.log_sum.unsqueeze(-1)).exp() - smoothing / vocabulary
        cross_entropy.scatter_add_(-1, labels, torch.full_like(z[..., :1], smoothing - 1.0))
        result = result + cross_entropy_scale.unsqueeze(-1) * cross_entropy
    assert rows.weight is not None
    weight = rows.weight.unsqueeze(-1)
    result = torch.where(weight.isnan(), torch.nan, torch.where(weight == 0, 0.0, result * slope))
    padding = student.shape[-1] - vocabulary
    return out.copy_(torch.nn.functional.pad(result, (0, padding)) if padding else result)


def _seat(ids: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(which ids are columns of z, those columns with 0 for the others, how often each column is named)."""
    in_range = (ids >= 0) & (ids < z.shape[-1])
    seats = ids.where(in_range, 0)
    counts = torch.zeros(z.shape, dtype=torch.int32, device=z.device)
    return in_range, seats, counts.scatter_add_(-1, seats, in_range.to(torch.int32))


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.to(torch.float32)


def _temperature_of(rows: Rows, options: Options, dtype: torch.dtype) -> Tensor | float:
    if rows.temperature is None:
        return options.temperature
    return rows.temperature.to(dtype).unsqueeze(-1)


def scale_rows_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply each row of gradient [..., V] by upstream, a scalar or [...]."""
    gradient.mul_(upstream.unsqueeze(-1) if upstream.dim() else upstream)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for logits of a chunk."""
    return torch.empty(shape, dtype=dtype, device=device)
