"""Distillation of standardized logits, which may differ in scale."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.call.contract import Options, Rows, Want, row_dtype
from fastkd.divergences import Divergence, has_teacher_derivative
from fastkd.engine.graphs import as_one_op
from fastkd.response.chunks import (
    Outcome,
    Wanted,
    as_column,
    both_widened,
    by_rows,
    chunk_rows,
    differentiable,
    factors_of,
    kernels_of,
    positive,
    prepared,
    returned,
    row_sum,
)


@as_one_op(returned)
def standardized_kd_loss(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Tensor = 2.0,
    teacher_temperature: float | Tensor | None = None,
    eps: float = 1e-7,
    alpha: float = 1.0,
    scale_by_temperature: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Distillation of standardized logits (Sun et al. 2024), for models whose logits differ in scale.

        alpha T^2 D(softmax(Z(t) / T), softmax(Z(s) / T)) + (1 - alpha) CE(softmax(s), label),

        Z(z) = (z - mean z) / (std z + eps)

    std is the sample standard deviation, like torch.std. A softmax does not depend on the mean, so this equals kd_loss
    with the temperature T (std + eps) for each row and model, with two differences: the factor stays T^2, and the
    gradient goes through the standard deviation. Standardized logits are never stored. The cross-entropy uses the
    logits without standardization.

    Args:
        student_logits: [..., V], V > 1, all finite: the deviation of a row with -inf is NaN, and so is its loss.
        teacher: dense logits [..., V]; if they require grad, they get a gradient.
        labels: as in :func:`fastkd.kd_loss`, like all options that are not listed here.
        divergence: a divergence of probabilities at one temperature (not "squared_error", which depends on the mean,
            nor "nkd", whose label term is at temperature 1).
        temperature: the base temperature T > 0; 2 or more in the paper.
        eps: positive, added to the standard deviation.
        memory_budget: as in :func:`fastkd.response.adaptive_kl_loss`.

    Returns:
        The loss: 0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the requested backend cannot serve this call.

    Memory: the gradient, and one chunk.
    """
    eps = positive("eps", eps)
    student, teacher, call = prepared(
        student_logits, teacher, labels, vocab_size, divergence=divergence,
        temperature=temperature, teacher_temperature=teacher_temperature, alpha=alpha,
        scale_by_temperature=scale_by_temperature, label_smoothing=label_smoothing, ignore_index=ignore_index,
        mask=mask, weight=weight, reduction=reduction, num_items=num_items, backend=backend,
    )  # fmt: skip
    chosen, width = call.options.divergence, call.options.vocab_size
    if not chosen.normalized:
        raise ValueError(
            f"divergence must compare probabilities, got {chosen.name!r}, which compares logits"
        )
    if chosen.target is not None and chosen.target.form == "label":
        raise ValueError(
            f"divergence must not have a cross-entropy of the label at temperature 1, got {chosen.name!r}"
        )
    if width < 2:
        raise ValueError(
            f"student_logits must have at least 2 columns for a standard deviation, got {width}"
        )
    if teacher.requires_grad and torch.is_grad_enabled() and not has_teacher_derivative(chosen):
        raise ValueError(
            f"teacher requires grad, and the divergence {chosen.name!r} has no degree; detach the teacher"
        )
    kernels, extra = kernels_of(call, student, teacher)

    def of_chunk(s: Tensor, t: Tensor, rows: Rows, options: Options, wanted: Wanted) -> Outcome:
        s, t = both_widened(s, t)
        base = factors_of(rows._replace(weight=None), options, s.dtype)[0]  # T^2
        temperatures = (
            as_column(options.temperature, rows.temperature),
            as_column(options.teacher_temperature, rows.teacher_temperature),
        )
        deviations = [_deviation(s), _deviation(t)]
        tempered = [
            (deviation + eps) * temperature
            for deviation, temperature in zip(deviations, temperatures, strict=True)
        ]
        # Both sides get the student's temperature. If the teacher had its own, the rounding of the two would change
        # log p - log q, which is all that there is if the models are close.
        common, factor = tempered[0].squeeze(-1).to(s.dtype), tempered[0] / tempered[1]
        scaled = (s - s.amax(-1, keepdim=True), _scaled(t, factor))
        weights = torch.ones_like(s[:, 0]) if rows.weight is None else rows.weight.to(s.dtype)
        plain = rows._replace(
            labels=None if chosen.target is None else rows.labels,
            weight=(options.alpha * weights.unsqueeze(-1) * base).squeeze(-1),
            temperature=common,
            teacher_temperature=common,
        )
        distil = options._replace(alpha=1.0, scale_by_temperature=False, label_smoothing=0.0)
        result = kernels.kd_rows(*scaled, plain, distil, Want(*wanted))
        if result.teacher_gradient is not None:
            result.teacher_gradient.mul_(factor.to(t.dtype))
        for logits, deviation, gradient in zip((s, t), deviations, result[2:4], strict=True):
            if gradient is not None:
                _through_deviation(gradient, logits, deviation, eps)
        if options.alpha == 1.0:
            return Outcome(result.loss, *result[2:4])
        labelled = rows._replace(
            weight=(1.0 - options.alpha) * weights, temperature=None, teacher_temperature=None
        )
        hard = options._replace(alpha=0.0, temperature=1.0, teacher_temperature=1.0)
        entropy = kernels.kd_rows(s, t, labelled, hard, Want(wanted[0]))
        if result.student_gradient is not None:
            result.student_gradient.add_(entropy.student_gradient)
        return Outcome(result.loss + entropy.loss, *result[2:4])

    size = chunk_rows(
        memory_budget, width, row_dtype(student.dtype, teacher.dtype), student.device, extra
    )
    compute = by_rows(size, of_chunk, (width, width))
    return differentiable(student, teacher, call, compute)


def _centred(logits: Tensor) -> Tensor:
    """The logits minus their mean. The first column is subtracted before, so that a common offset costs no digits."""
    logits = logits - logits[:, :1]
    return logits.sub_((row_sum(logits) / logits.shape[1]).to(logits.dtype))


def _scaled(logits: Tensor, factor: Tensor) -> Tensor:
    """The logits, relative to their maximum, times a factor [C, 1] in float64, of which two floats are used."""
    relative, high = logits - logits.amax(-1, keepdim=True), factor.to(logits.dtype)
    return (relative * high).addcmul_(relative, (factor - high).to(logits.dtype))


def _deviation(logits: Tensor) -> Tensor:
    """The sample standard deviation of each row, [C, 1] float64."""
    return (row_sum(_centred(logits).square_()) / (logits.shape[1] - 1)).sqrt()


def _through_deviation(gradient: Tensor, logits: Tensor, deviation: Tensor, eps: float) -> None:
    """Add to the gradient G at fixed temperatures T (std + eps) its part through the standard deviation, in place.

        G - (sum_i G_i (s_i - mean)) (s_i - mean) / ((V - 1) std (std + eps))

    This holds because the loss depends on s / temperature alone and G sums to 0. Where std is 0, its derivative is 0,
    as in torch.
    """
    centred = _centred(logits)
    along = row_sum(gradient * centred)
    along = along / ((logits.shape[1] - 1) * deviation * (deviation + eps))
    along = torch.where(deviation == 0, 0.0, along)
    gradient.addcmul_(centred, along.to(gradient.dtype), value=-1.0)
