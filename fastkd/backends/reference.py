"""The reference backend: the mathematics in plain PyTorch. It is the oracle of every other backend.

Everything is computed in float64, whatever the dtype of the logits, and rounded once. On a device without float64,
everything is computed in float32. The backend allocates several temporaries of the size of the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.backends.angles import angles
from fastkd.backends.logprobs import logprob_gradients, logprob_statistics
from fastkd.backends.mutual import mutual_rows
from fastkd.backends.sparse import Events
from fastkd.call.contract import (
    Options,
    Result,
    Rows,
    ShardCall,
    Statistics,
    Want,
    row_dtype,
    widened,
)
from fastkd.call.log_zero import NEGLIGIBLE, evaluate
from fastkd.core.tensors import finite_max, precision
from fastkd.divergences import Divergence, Target

__all__ = [
    "angles", "empty", "gather_events", "kd_rows", "logprob_gradients", "logprob_statistics",
    "mutual_rows", "scale_rows_", "shard_results",
    "shard_statistics", "shard_sums", "spread_gradient",
]  # fmt: skip


def _adjust(logits: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """Return the scaled and soft-capped logits z = softcap * tanh(scale * logits / softcap), and dz/dlogits."""
    if not softcap:
        return (logits * scale, scale) if scale != 1.0 else (logits, 1.0)
    squashed = torch.tanh(logits * (scale / softcap))
    return softcap * squashed, scale * (1.0 - squashed * squashed)


class Side(NamedTuple):
    """One model's logits without padding columns, and how they are tempered."""

    # Scaled and soft-capped logits.
    z: Tensor
    # dz / dlogits.
    slope: Tensor | float
    # A number, or [..., 1].
    temperature: Tensor | float
    # Bool, True in the label's column if the label has a separate term (LabelTerm); None if it has none.
    is_label: Tensor | None

    @property
    def tempered(self) -> Tensor:
        """The logits that the divergence compares: z / temperature, -inf in the column of a separate label."""
        tempered = self.z / self.temperature
        return (
            tempered if self.is_label is None else tempered.masked_fill(self.is_label, -torch.inf)
        )


def _sides(student: Tensor, teacher: Tensor, rows: Rows, options: Options) -> tuple[Side, Side]:
    dtype = precision(student.device)
    is_label = None
    if options.divergence.target is not None:
        assert rows.labels is not None  # validated
        columns = torch.arange(options.vocab_size, device=student.device) + options.first_column
        is_label = columns == rows.labels.unsqueeze(-1)

    def side(
        logits: Tensor,
        scale: float,
        softcap: float,
        temperature: float,
        row_temperatures: Tensor | None,
    ) -> Side:
        z, slope = _adjust(logits[..., : options.vocab_size].to(dtype), scale, softcap)
        if row_temperatures is None:
            return Side(z, slope, temperature, is_label)
        return Side(z, slope, row_temperatures.to(dtype).unsqueeze(-1), is_label)

    return (
        side(
            student,
            options.logit_scale,
            options.softcap,
            options.temperature,
            rows.temperature,
        ),
        side(
            teacher,
            options.teacher_logit_scale,
            options.teacher_softcap,
            options.teacher_temperature,
            rows.teacher_temperature,
        ),
    )


def _finite_column(maximum: Tensor) -> Tensor:
    """A maximum [...] as [..., 1], with 0 for -inf, so that it can be subtracted from logits."""
    return finite_max(maximum).unsqueeze(-1)


def _row_max(logits: Tensor) -> Tensor:
    """The maximum of each row, [...]; -inf where a process has no column."""
    if logits.shape[-1]:
        return logits.amax(-1)
    return logits.new_full(logits.shape[:-1], -torch.inf)


def _has_cross_entropy(rows: Rows, options: Options) -> bool:
    return rows.labels is not None and options.alpha < 1.0


class LabelTerm(NamedTuple):
    """The separate term of the label (fastkd.divergences.Target), added to the sums over all other tokens.

    Each field is [...], float64.
    """

    phi: Tensor
    # d phi / d (s_y - log-sum-exp of the other tokens): the derivative with respect to the label's tempered logit. The
    # other tokens share -g in proportion to their probabilities.
    g: Tensor
    # The same with respect to the teacher's logits.
    h: Tensor
    # Entropy of the two events "label" and "any other token".
    entropy: Tensor
    # The student's probability of all other tokens together.
    others_probability: Tensor
    # Factor of -log q_y at temperature 1.
    cross_entropy_weight: Tensor


class RowStatistics(NamedTuple):
    """What the first sweep computes for each row, over the columns of one process or of all. Each field is [...].

    The fields without `teacher` are the student's.
    """

    # Maximum of the tempered logits.
    max: Tensor
    teacher_max: Tensor
    # Sum of exp(tempered logits - max).
    exp_sum: Tensor
    teacher_exp_sum: Tensor
    # Sum of exp(z - max_t1), at temperature 1.
    exp_sum_t1: Tensor
    max_t1: Tensor
    # z of the label; -inf if another process has its column.
    label: Tensor
    # The same for the teacher, if the label has a separate term.
    teacher_label: Tensor
    teacher_exp_sum_t1: Tensor
    teacher_max_t1: Tensor
    # Sum of z - max_t1.
    centered_sum: Tensor
    # How many columns these statistics cover.
    columns: Tensor


def label_term(s: Side, t: Side, statistics: RowStatistics, target: Target) -> LabelTerm:
    """Compute the label's separate term from the statistics of all other tokens."""

    def logit_against_others(side: Side, label: Tensor, row_max: Tensor, exp_sum: Tensor) -> Tensor:
        temperature = side.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.squeeze(-1).to(label.dtype)
        return (label / temperature - row_max) - exp_sum.log()

    b = logit_against_others(s, statistics.label, statistics.max, statistics.exp_sum)
    a = logit_against_others(
        t, statistics.teacher_label, statistics.teacher_max, statistics.teacher_exp_sum
    )
    p, p_others, q, q_others = a.sigmoid(), (-a).sigmoid(), b.sigmoid(), (-b).sigmoid()
    logs = [torch.nn.functional.logsigmoid(x) for x in (a, -a, b, -b)]

    def product(probability: Tensor, difference: Tensor) -> Tensor:
        return torch.where(probability < NEGLIGIBLE, 0.0, probability * difference)

    phi = g = h = weight = torch.zeros_like(a)
    if target.form == "binary":
        divergence = product(p, logs[0] - logs[2]) + product(p_others, logs[1] - logs[3])
        phi = product(weight + target.weight, divergence)
        # The difference of whichever probabilities are smaller, because two probabilities near 1 would cancel.
        g = target.weight * torch.where(b > 0, p_others - q_others, q - p)
        h = product(weight + target.weight, product(p * p_others, a - b))
    else:
        log_p = (
            statistics.teacher_label
            - finite_max(statistics.teacher_max_t1)
            - statistics.teacher_exp_sum_t1.log()
        )
        weight = target.weight * log_p.exp()
    entropy = -product(q, logs[2]) - product(q_others, logs[3])
    return LabelTerm(phi, g, h, entropy, q_others, weight)


def _label_columns(z: Tensor, labels: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return (whether z has the label's column, that column or 0), each [..., 1]."""
    column = labels.unsqueeze(-1) - options.first_column
    is_local = (column >= 0) & (column < z.shape[-1])
    return is_local, torch.where(is_local, column, 0)


def _label_logits(z: Tensor, labels: Tensor, options: Options) -> Tensor:
    """Return z of the labels, [...]; -inf if z does not have the label's column."""
    if not z.shape[-1]:
        return _row_max(z)
    is_local, column = _label_columns(z, labels, options)
    return torch.where(is_local, z.gather(-1, column), -torch.inf).squeeze(-1)


def _minus_labels(q: Tensor, labels: Tensor, options: Options, smoothing: float) -> Tensor:
    """Return q with (1 - smoothing) subtracted in the columns of the labels."""
    if not q.shape[-1]:
        return q
    is_local, column = _label_columns(q, labels, options)
    return q.scatter_add(-1, column, is_local.to(q.dtype) * (smoothing - 1.0))


def _statistics(s: Side, t: Side, rows: Rows, options: Options) -> RowStatistics:
    def exp_sum(logits: Tensor, row_max: Tensor) -> Tensor:
        return (logits - _finite_column(row_max)).exp().sum(-1)

    student_max, teacher_max = _row_max(s.tempered), _row_max(t.tempered)
    max_t1, teacher_max_t1 = _row_max(s.z), _row_max(t.z)
    label = teacher_label = torch.zeros_like(student_max)
    if rows.labels is not None and options.reads_labels:
        label = _label_logits(s.z, rows.labels, options)
    if s.is_label is not None:
        assert rows.labels is not None
        teacher_label = _label_logits(t.z, rows.labels, options)
    return RowStatistics(
        max=student_max,
        teacher_max=teacher_max,
        exp_sum=exp_sum(s.tempered, student_max),
        teacher_exp_sum=exp_sum(t.tempered, teacher_max),
        exp_sum_t1=exp_sum(s.z, max_t1),
        max_t1=max_t1,
        label=label,
        teacher_label=teacher_label,
        teacher_exp_sum_t1=exp_sum(t.z, teacher_max_t1),
        teacher_max_t1=teacher_max_t1,
        centered_sum=(s.z - _finite_column(max_t1)).sum(-1),
        columns=torch.full_like(label, s.z.shape[-1]),
    )


def _merged(gathered: Tensor) -> RowStatistics:
    """Merge the statistics of several processes, [processes, ..., fields]; the sums in float64."""
    local = RowStatistics(*gathered.to(torch.float64).unbind(-1))

    def rescaled_sum(exp_sums: Tensor, maxima: Tensor, maximum: Tensor) -> Tensor:
        return (exp_sums * (maxima - finite_max(maximum)).exp()).sum(0)

    student_max, teacher_max = local.max.amax(0), local.teacher_max.amax(0)
    max_t1, teacher_max_t1 = local.max_t1.amax(0), local.teacher_max_t1.amax(0)
    shift = finite_max(local.max_t1) - finite_max(max_t1)
    return RowStatistics(
        max=student_max,
        teacher_max=teacher_max,
        exp_sum=rescaled_sum(local.exp_sum, local.max, student_max),
        teacher_exp_sum=rescaled_sum(local.teacher_exp_sum, local.teacher_max, teacher_max),
        exp_sum_t1=rescaled_sum(local.exp_sum_t1, local.max_t1, max_t1),
        max_t1=max_t1,
        label=local.label.amax(0),
        teacher_label=local.teacher_label.amax(0),
        teacher_exp_sum_t1=rescaled_sum(
            local.teacher_exp_sum_t1, local.teacher_max_t1, teacher_max_t1
        ),
        teacher_max_t1=teacher_max_t1,
        centered_sum=(local.centered_sum + shift * local.columns).sum(0),
        columns=local.columns.sum(0),
    )


class _Softmax(NamedTuple):
    """Log-probabilities and probabilities of rows, [..., columns] each."""

    logs: Tensor
    probabilities: Tensor


def _softmax(logits: Tensor, row_max: Tensor, exp_sum: Tensor) -> _Softmax:
    centered = logits - _finite_column(row_max).to(logits.dtype)
    exp_sum = exp_sum.unsqueeze(-1)
    return _Softmax(
        centered - exp_sum.log().to(centered.dtype), centered.exp() / exp_sum.to(centered.dtype)
    )


class _Terms(NamedTuple):
    """Each column's probabilities, phi, and the derivatives of phi; [..., columns] each."""

    p: _Softmax
    q: _Softmax
    phi: Tensor
    g: Tensor
    h: Tensor


def _terms(s: Side, t: Side, statistics: RowStatistics, divergence: Divergence) -> _Terms:
    q = _softmax(s.tempered, statistics.max, statistics.exp_sum)
    p = _softmax(t.tempered, statistics.teacher_max, statistics.teacher_exp_sum)
    if divergence.normalized:
        pair = (p.probabilities, q.probabilities)
        return _Terms(p, q, *evaluate(divergence, p.logs, q.logs, pair))
    return _Terms(p, q, *evaluate(divergence, t.tempered, s.tempered))


class _Sums(NamedTuple):
    """Sums over the columns of one process, or of all; [...] each."""

    phi: Tensor
    g: Tensor
    h: Tensor
    entropy: Tensor


def _sums(terms: _Terms) -> _Sums:
    q = terms.q
    entropy = -torch.where(q.probabilities == 0, 0.0, q.probabilities * q.logs).sum(-1)
    return _Sums(terms.phi.sum(-1), terms.g.sum(-1), terms.h.sum(-1), entropy)


class _Sweeps(NamedTuple):
    """What the sweeps over the rows computed; statistics and sums cover the whole vocabulary."""

    s: Side
    t: Side
    statistics: RowStatistics
    terms: _Terms
    # Over all tokens, except a label that has a separate term.
    sums: _Sums
    # The label's separate term; None if the divergence has none.
    label: LabelTerm | None


def _sweeps(
    s: Side, t: Side, statistics: RowStatistics, terms: _Terms, sums: _Sums, target: Target | None
) -> _Sweeps:
    label = None
    if target is not None:
        label = LabelTerm(*(x.to(s.z.dtype) for x in label_term(s, t, statistics, target)))
    return _Sweeps(s, t, statistics, terms, sums, label)


def _sums_with_label(sweeps: _Sweeps) -> _Sums:
    sums, label = sweeps.sums, sweeps.label
    if label is not None:
        entropy = label.entropy + label.others_probability * sums.entropy
        sums = _Sums(sums.phi + label.phi, sums.g + label.g, sums.h + label.h, entropy)
    return _Sums(*(value.to(sweeps.s.z.dtype) for value in sums))


class _CrossEntropy(NamedTuple):
    """The cross-entropy of the labels at temperature 1."""

    # [...].
    value: Tensor
    # With respect to z, [..., columns]; 0.0 without a cross-entropy.
    gradient: Tensor | float


def _cross_entropy(
    sweeps: _Sweeps, rows: Rows, options: Options, smoothing: float
) -> _CrossEntropy:
    z, statistics = sweeps.s.z, sweeps.statistics
    _, q = _softmax(z, statistics.max_t1, statistics.exp_sum_t1)
    log_sum = statistics.exp_sum_t1.log()
    value = (1.0 - smoothing) * (log_sum - (statistics.label - finite_max(statistics.max_t1)))
    assert rows.labels is not None
    gradient = _minus_labels(q, rows.labels, options, smoothing)
    if smoothing:
        value = value + smoothing * (log_sum - statistics.centered_sum / options.vocabulary)
        gradient = gradient - smoothing / options.vocabulary
    return _CrossEntropy(value.to(z.dtype), gradient)


class _Losses(NamedTuple):
    """The unweighted terms of each row's loss, [...] each, and what labels add to the gradient."""

    # Over all tokens, with the label's separate term.
    sums: _Sums
    distillation: Tensor
    cross_entropy: _CrossEntropy
    # Gradient of the part of the distillation that is a cross-entropy of the label (Target.form "label").
    label_gradient: Tensor | float


def _losses(sweeps: _Sweeps, rows: Rows, options: Options) -> _Losses:
    sums = _sums_with_label(sweeps)
    t_squared = _t_squared(sweeps, options)
    distillation = sums.phi * (
        t_squared.squeeze(-1) if isinstance(t_squared, Tensor) else t_squared
    )
    cross_entropy = _CrossEntropy(torch.zeros_like(distillation), 0.0)
    if _has_cross_entropy(rows, options):
        cross_entropy = _cross_entropy(sweeps, rows, options, options.label_smoothing)
    label_gradient: Tensor | float = 0.0
    target = options.divergence.target
    if target is not None and target.form == "label":
        assert sweeps.label is not None
        factor = sweeps.label.cross_entropy_weight
        value, gradient = _cross_entropy(sweeps, rows, options, 0.0)
        distillation = distillation + torch.where(factor == 0, 0.0, factor * value)
        label_gradient = factor.unsqueeze(-1) * gradient
    return _Losses(sums, distillation, cross_entropy, label_gradient)


def _t_squared(sweeps: _Sweeps, options: Options) -> Tensor | float:
    """The factor T^2 of the distillation, or 1."""
    temperature = sweeps.s.temperature
    return temperature * temperature if options.scale_by_temperature else 1.0


def _row_weights(sweeps: _Sweeps, rows: Rows, options: Options) -> tuple[Tensor, Tensor]:
    """Return (weights [...], NaN in an invalid row; whether the row is counted, bool [...])."""
    labels, statistics = rows.labels, sweeps.statistics
    dtype = sweeps.s.z.dtype
    weight = torch.ones_like(sweeps.sums.phi, dtype=dtype)
    if rows.weight is not None:
        weight = rows.weight.to(dtype)
    counted = weight != 0
    if labels is not None:
        counted = counted & (labels != options.ignore_index)
    for temperatures in (rows.temperature, rows.teacher_temperature):
        if temperatures is not None:
            weight = torch.where(temperatures > 0, weight, torch.nan)
    if options.divergence.normalized and options.alpha:
        # A comparison in a definition may hide a NaN or +inf among the logits; the sums of exponentials do not.
        invalid = (statistics.exp_sum + statistics.teacher_exp_sum).isnan()
        if options.divergence.target is not None:  # the label's logit is in neither sum
            invalid = invalid | (statistics.label == torch.inf)
            invalid = invalid | (statistics.teacher_label == torch.inf)
        weight = torch.where(invalid, torch.nan, weight)
    if labels is not None and options.reads_labels:
        valid = (labels >= 0) & (labels < options.vocabulary)
        weight = torch.where(valid, weight, torch.nan)
    return weight, counted


def _student_gradient(sweeps: _Sweeps, losses: _Losses, rows: Rows, options: Options) -> Tensor:
    """The gradient of each row's unweighted loss with respect to the student's logits."""
    s, terms, alpha = sweeps.s, sweeps.terms, options.alpha
    gradient = torch.zeros_like(s.z)
    if alpha:
        gradient = terms.g
        if options.divergence.normalized:
            # From the derivative with respect to log-probabilities to that with respect to tempered logits.
            gradient = gradient - terms.q.probabilities * losses.sums.g.unsqueeze(-1)
        if sweeps.label is not None and s.is_label is not None:
            gradient = torch.where(s.is_label, sweeps.label.g.unsqueeze(-1), gradient)
        factor = _t_squared(sweeps, options) / s.temperature
        gradient = alpha * (gradient * factor + losses.label_gradient)
    if _has_cross_entropy(rows, options):
        gradient = gradient + options.cross_entropy_weight * losses.cross_entropy.gradient
    return gradient * s.slope


def _teacher_gradient(sweeps: _Sweeps, losses: _Losses, options: Options) -> Tensor:
    """The gradient of each row's unweighted loss with respect to the teacher's logits."""
    t, terms, label, alpha = sweeps.t, sweeps.terms, sweeps.label, options.alpha
    gradient = torch.zeros_like(t.z)
    if alpha:
        gradient = terms.h
        if options.divergence.normalized:
            gradient = gradient - terms.p.probabilities * losses.sums.h.unsqueeze(-1)
        if label is not None and t.is_label is not None:
            gradient = torch.where(t.is_label, label.h.unsqueeze(-1), gradient)
        gradient = gradient * (alpha * _t_squared(sweeps, options) / t.temperature)
    return gradient * t.slope


def _results(
    computed: tuple[_Sweeps, _Losses, Tensor | None, Tensor | None],
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    options: Options,
    parts: bool,
) -> Result:
    """The outputs in fresh tensors, weighted and without dropped rows.

    computed: the sweeps, the losses, and the gradients of the unweighted losses, None if they are not wanted.
    """
    sweeps, losses, *gradients = computed
    alpha = options.alpha
    weight, counted = _row_weights(sweeps, rows, options)
    scale: float | Tensor = options.scale
    if rows.scale is not None:
        scale = options.scale * rows.scale.to(sweeps.s.z.dtype)
    row_scale = (weight * scale).unsqueeze(-1)

    loss = torch.zeros_like(losses.distillation)
    if alpha:
        loss = alpha * losses.distillation
    if _has_cross_entropy(rows, options):
        loss = loss + options.cross_entropy_weight * losses.cross_entropy.value
    # A dropped row contributes 0, whatever its logits are. Its value is replaced, because NaN times 0 is NaN.
    loss = torch.where(counted, loss * weight, 0.0)

    def finish(gradient: Tensor | None, like: Tensor) -> Tensor | None:
        if gradient is None:
            return None
        gradient = torch.where(counted.unsqueeze(-1), gradient * row_scale, 0.0).to(like.dtype)
        padding = like.shape[-1] - options.vocab_size
        return torch.nn.functional.pad(gradient, (0, padding)) if padding else gradient.contiguous()

    dtype = row_dtype(student.dtype, teacher.dtype)
    terms: tuple[Tensor | None, ...] = (None, None, None)
    if parts:
        terms = tuple(
            torch.where(counted, term, 0.0).to(dtype)
            for term in (losses.distillation, losses.cross_entropy.value, losses.sums.entropy)
        )
    total = (loss.sum() * scale).to(dtype)
    student_gradient, teacher_gradient = map(finish, gradients, (student, teacher))
    return Result(loss.to(dtype), total, student_gradient, teacher_gradient, *terms)


def kd_rows(student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want) -> Result:
    """Compute the loss of each row and its gradients; :class:`fastkd.call.contract.Result` has shapes and meaning."""
    s, t = _sides(student, teacher, rows, options)
    statistics = _merged(torch.stack(_statistics(s, t, rows, options), -1).unsqueeze(0))
    terms = _terms(s, t, statistics, options.divergence)
    sweeps = _sweeps(s, t, statistics, terms, _sums(terms), options.divergence.target)
    losses = _losses(sweeps, rows, options)
    of_student = _student_gradient(sweeps, losses, rows, options) if want.student_gradient else None
    of_teacher = _teacher_gradient(sweeps, losses, options) if want.teacher_gradient else None
    computed = (sweeps, losses, of_student, of_teacher)
    result = _results(computed, student, teacher, rows, options, want.parts)
    if want.inplace and result.student_gradient is not None:
        result = result._replace(student_gradient=student.copy_(result.student_gradient))
    return result


# The steps of a call if several processes share the vocabulary; fastkd/call/contract.py describes what they exchange.


def shard_statistics(call: ShardCall) -> Statistics:
    """Compute the statistics of this process's columns: 12 numbers per row in float64."""
    student, teacher, rows, options, *_ = call
    statistics = _statistics(*_sides(student, teacher, rows, options), rows, options)
    return Statistics(torch.stack(statistics, -1).flatten(0, -2).to(torch.float64))


def shard_sums(call: ShardCall) -> Tensor | None:
    """Compute the sums over this process's columns, given the statistics of all: 4 numbers per row in float64."""
    s, t = _sides(call.student, call.teacher, call.rows, call.options)
    statistics = _merged_statistics(call.known(), call.student)
    terms = _terms(s, t, statistics, call.options.divergence)
    return torch.stack(_sums(terms), -1).flatten(0, -2).to(torch.float64)


def shard_results(call: ShardCall) -> None:
    """Fill the result, given the statistics and the sums of all processes."""
    student, teacher, rows, options, result, _, gathered_sums = call
    assert gathered_sums is not None
    s, t = _sides(student, teacher, rows, options)
    statistics = _merged_statistics(call.known(), student)
    terms = _terms(s, t, statistics, options.divergence)
    sums = _Sums(*gathered_sums.sum(0).reshape(*student.shape[:-1], -1).unbind(-1))
    sweeps = _sweeps(s, t, statistics, terms, sums, options.divergence.target)
    losses = _losses(sweeps, rows, options)
    of_student = of_teacher = None
    if result.student_gradient is not None:
        of_student = _student_gradient(sweeps, losses, rows, options)
    if result.teacher_gradient is not None:
        of_teacher = _teacher_gradient(sweeps, losses, options)
    computed = (sweeps, losses, of_student, of_teacher)
    outputs = _results(computed, student, teacher, rows, options, result.distillation is not None)
    for output, value in zip(result, outputs, strict=True):
        if output is not None and output is not result.total:
            assert value is not None
            output.copy_(value)


def _merged_statistics(statistics: Statistics, student: Tensor) -> RowStatistics:
    gathered = statistics.gathered
    return _merged(gathered.reshape(gathered.shape[0], *student.shape[:-1], -1))


def gather_events(student: Tensor, rows: Rows, options: Options, parts: bool) -> Events:
    """Reduce the student's rows to the K + 1 events of a sparse teacher (fastkd/backends/sparse.py)."""
    ids, columns = rows.ids, options.vocab_size
    assert ids is not None
    z, _ = _adjust(widened(student[..., :columns]), options.logit_scale, options.softcap)
    temperature = _student_temperature(rows, options, z.dtype)
    is_local, id_columns, counts = _id_columns(ids, z, options)
    in_vocabulary = (ids == -1) | ((ids >= 0) & (ids < options.vocabulary))
    valid = in_vocabulary.all(-1) & (counts <= 1).all(-1)

    tokens = z.gather(-1, id_columns).masked_fill(~is_local, -torch.inf)
    others = z.masked_fill(counts > 0, -torch.inf)
    origin, tail_origin = tokens.amax(-1), others.amax(-1)
    others = (others - _finite_column(tail_origin)) / temperature
    log_sum = others.logsumexp(-1)
    entropy = None
    if parts:
        log_q = others - torch.where(log_sum == -torch.inf, 0.0, log_sum).unsqueeze(-1)
        q = log_q.exp()
        entropy = -torch.where(q == 0, 0.0, q * log_q).sum(-1)
    log_sum_t1 = label = mean = None
    if rows.labels is not None and _has_cross_entropy(rows, options):
        z = z - _finite_column(torch.maximum(origin, tail_origin))
        log_sum_t1 = z.logsumexp(-1)
        label = _label_logits(z, rows.labels, options)
        mean = z.sum(-1) / options.vocabulary if options.label_smoothing else None
    row_temperature = temperature.squeeze(-1) if isinstance(temperature, Tensor) else temperature
    return Events(
        origin,
        tail_origin,
        tokens - _finite_column(origin),
        tail_origin - finite_max(origin) + row_temperature * log_sum,
        log_sum,
        entropy,
        log_sum_t1,
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
    """Write the gradient with respect to the student's logits, from that of the events [..., K + 1].

    cross_entropy_scale, if given, adds the gradient of the cross-entropy.
    """
    ids, columns = rows.ids, options.vocab_size
    assert ids is not None
    z, slope = _adjust(widened(student[..., :columns]), options.logit_scale, options.softcap)
    temperature = _student_temperature(rows, options, z.dtype)
    is_local, id_columns, counts = _id_columns(ids, z, options)

    log_share = (z - events.tail_origin.unsqueeze(-1)) / temperature
    log_share = log_share - events.tail_log_sum.unsqueeze(-1)
    result = log_share.exp() * gradient[..., -1:]
    result = result.masked_fill((counts > 0) | (z == -torch.inf), 0.0)
    result.scatter_add_(-1, id_columns, gradient[..., :-1].masked_fill(~is_local, 0.0))
    if cross_entropy_scale is not None:
        assert rows.labels is not None and events.log_sum is not None
        smoothing = options.label_smoothing
        log_q = z - torch.maximum(events.origin, events.tail_origin).unsqueeze(-1)
        cross_entropy = (log_q - events.log_sum.unsqueeze(-1)).exp()
        cross_entropy = _minus_labels(cross_entropy, rows.labels, options, smoothing) - (
            smoothing / options.vocabulary
        )
        result = result + cross_entropy_scale.unsqueeze(-1) * cross_entropy
    assert rows.weight is not None
    weight = rows.weight.unsqueeze(-1)
    result = torch.where(weight.isnan(), torch.nan, torch.where(weight == 0, 0.0, result * slope))
    padding = student.shape[-1] - columns
    return out.copy_(torch.nn.functional.pad(result, (0, padding)) if padding else result)


def _id_columns(ids: Tensor, z: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return (whether z has the id's column, that column or 0, how often ids name each column of z)."""
    ids = ids - options.first_column
    is_local = (ids >= 0) & (ids < z.shape[-1])
    columns = ids.where(is_local, 0)
    counts = torch.zeros(z.shape, dtype=torch.int32, device=z.device)
    return is_local, columns, counts.scatter_add_(-1, columns, is_local.to(torch.int32))


def _student_temperature(rows: Rows, options: Options, dtype: torch.dtype) -> Tensor | float:
    if rows.temperature is None:
        return options.temperature
    return rows.temperature.to(dtype).unsqueeze(-1)


def scale_rows_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply each row of gradient [..., V] by upstream, a scalar or [...]."""
    gradient.mul_(upstream.unsqueeze(-1) if upstream.dim() else upstream)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate uninitialized memory for the logits of a chunk."""
    return torch.empty(shape, dtype=dtype, device=device)
