"""Losses on the relations among the samples of a batch: distances, angles and similarities.

Relations are computed within the student's embeddings [N, D_S] and within the teacher's [N, D_T], then compared. The
widths may therefore differ, and no projection is needed. Trailing dimensions are flattened.

The distance and angle losses are those of Relational Knowledge Distillation (RKD; Park, Kim, Lu, Cho, 2019). Both are
computed from the two matrices of pairwise distances. The distances are computed from differences in float64, because a
Gram matrix would lose the distances between close points. Angles follow from the law of cosines,

    cos(angle at j between i and k) = (d_ij^2 + d_kj^2 - d_ik^2) / (2 d_ij d_kj)

so the N^3 angles cost N^3 operations rather than N^3 D, and no tensor is larger than [N, N]. Each loss is computed with
its derivative with respect to the squared distances, from which matrix products give the gradient of the points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pdist

from fastkd.backends import registry
from fastkd.call.checks import check_choice, check_dense
from fastkd.call.contract import row_dtype
from fastkd.core.scalars import LARGEST, SMALLEST, check_number
from fastkd.core.tensors import check_readable, reciprocal, savable_when_compiled
from fastkd.engine.gradients import differentiable_once
from fastkd.engine.graphs import Arguments, as_one_op
from fastkd.features import over_peak, unit

MEANS = ("distinct", "all")

# (student's distances, teacher's distances, whether to differentiate) -> (loss, half derivative or None). The half
# derivative plus its transpose is the derivative of the loss with respect to the student's squared distances.
# Everything is float64; the matrices are [N, N].
Relation = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def _result_meta(arguments: Arguments) -> list[tuple[Sequence[int], torch.dtype]]:
    """Return shape and dtype of the loss for a compiled graph."""
    return [((), row_dtype(arguments["student"].dtype, arguments["teacher"].dtype))]


@as_one_op(_result_meta)
def rkd_distance_loss(
    student: Tensor, teacher: Tensor, *, delta: float = 1.0, mean: str = "distinct"
) -> Tensor:
    """Distance loss of RKD: the Huber loss between the pairwise distances of student and teacher.

        mean over pairs (i, j) of huber(d_ij(student) / mu_S - d_ij(teacher) / mu_T)

    where mu is the mean distance of each model.

    Args:
        student: [N, ...], float32, bfloat16, float16 or float64.
        teacher: [N, ...], of any width and dtype, on the student's device; it receives a gradient if it requires one.
        delta: the |x| at which the Huber loss changes from x^2 / 2 to delta (|x| - delta / 2).
        mean: "distinct" takes both means over the N (N - 1) pairs of two different samples, as in the paper. "all"
            divides the sum by N^2, which includes the diagonal, and takes mu over distances above 0, as in the authors'
            code.

    Returns:
        0-dim, float32 (float64 if an input is). 0 if there is no pair. The distance of coinciding points has gradient
        0; if all points coincide, their distances in units of the mean are 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
        RuntimeError: the loss is differentiated twice.

    Memory: up to 6 float64 matrices [N, N] during the call; a gradient [N, D] until the backward.

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation" (2019), equations 5 to 7.
    """
    _check(student, teacher)
    return _relation_loss(student, teacher, _distance_relation(delta, mean))


@as_one_op(_result_meta)
def rkd_angle_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    delta: float = 1.0,
    mean: str = "distinct",
    backend: str = "auto",
) -> Tensor:
    """Angle loss of RKD: the Huber loss between the cosines of the angles formed by triples of samples.

        mean over triples (i, j, k) of huber(<e_ij, e_kj>(student) - <e_ij, e_kj>(teacher)),
        e_ij = (x_i - x_j) / d_ij

    The product <e_ij, e_kj> is the cosine of the angle at sample j. The loss takes N^3 steps, whatever the widths, and
    is computed in float64 for every dtype.

    Args:
        student: [N, ...], float32, bfloat16, float16 or float64.
        teacher: [N, ...], of any width and dtype, on the student's device; it receives a gradient if it requires one,
            which takes as long as the loss again.
        delta: as in :func:`rkd_distance_loss`.
        mean: "distinct" averages over the N (N - 1) (N - 2) triples of three different samples, as in the paper. "all"
            divides by N^3, as in the authors' code; the additional triples contribute only if two samples coincide
            for one model and not for the other.
        backend: "cpu" is a C++ kernel for CPU tensors; "portable", or "reference", is plain PyTorch on any device;
            "auto" uses "cpu" if it is available for the tensors, else "portable". If FASTKD_BACKEND names one of
            these, it overrides the argument. With FASTKD_STRICT=1, falling back to "portable" for CPU tensors raises.

    Returns:
        0-dim, float32 (float64 if an input is). 0 if there is no triple. For two coinciding points, e and its cosines
        are 0, with gradient 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
        BackendUnavailable: a backend requested by name cannot serve the call.
        RuntimeError: the loss is differentiated twice.

    Memory: up to 5 float64 matrices [N, N] during the call; "portable" holds four more, and tiles of 64 MiB; a gradient
    [N, D] until the backward.

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation" (2019), equations 8 and 9.
    """
    _check(student, teacher)
    return _relation_loss(student, teacher, _angle_relation(delta, mean, backend))


@as_one_op(_result_meta)
def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance: float = 1.0,
    angle: float = 2.0,
    delta: float = 1.0,
    mean: str = "distinct",
    backend: str = "auto",
) -> Tensor:
    """Both RKD losses, distance * rkd_distance_loss + angle * rkd_angle_loss, with the distances computed once.

    The default weights 1 and 2 are those of the authors' command for metric learning; implementations for CIFAR-100
    use 25 and 50.

    Args:
        student: [N, ...], as in :func:`rkd_distance_loss`.
        teacher: [N, ...], as in :func:`rkd_distance_loss`.
        distance: weight of the distance loss, not negative; 0 omits it.
        angle: weight of the angle loss, not negative; 0 omits it.
        delta: as in :func:`rkd_distance_loss`.
        mean: as in :func:`rkd_distance_loss` and :func:`rkd_angle_loss`.
        backend: as in :func:`rkd_angle_loss`.

    Returns, raises, memory, source: see :func:`rkd_distance_loss` and :func:`rkd_angle_loss`.
    """
    _check(student, teacher)
    terms = [
        (check_number("distance", distance, 0.0, LARGEST), _distance_relation(delta, mean)),
        (check_number("angle", angle, 0.0, LARGEST), _angle_relation(delta, mean, backend)),
    ]
    return _relation_loss(student, teacher, partial(_weighted_sum, terms))


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving loss, 1/N^2 || G_T - G_S ||_F^2, where G is Q Q^T with each row divided by its L2 norm.

    Q holds the embeddings of one model, one per row.

    Args:
        student: [N, ...], float32, bfloat16, float16 or float64; computed in float32, or float64 if an input is.
        teacher: [N, ...], of any width and dtype, on the student's device; it receives a gradient if it requires one.

    Returns:
        0-dim, float32 (float64 if an input is). A row of zeros in Q Q^T stays zero, and its gradient is 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.

    Memory: about 8 matrices [N, N].

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation" (2019), equations 1 to 4.
    """
    _check(student, teacher)
    student, teacher = savable_when_compiled(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = (
            _rows(x, row_dtype(student.dtype, teacher.dtype)) for x in (student, teacher)
        )
        gap = _unit_gram(teacher) - _unit_gram(student)
        return gap.square().sum() / max(len(student) ** 2, 1)


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    over: str = "samples",
    normalize: str = "none",
    reduction: str = "sum",
) -> Tensor:
    """Squared distance of Gram matrices, || G_T - G_S ||_F^2, of samples or of the channels of each sample.

    Args:
        student: [N, ...], or [B, C, ...] for over="channels"; float32, bfloat16, float16 or float64.
        teacher: on the student's device, with the same N, or the same B and C; the other dimensions and the dtype may
            differ. It receives a gradient if it requires one.
        over: "samples": one G [N, N] holds the inner products of the flattened samples. "channels": one G [C, C] per
            sample holds the inner products of its channels over all positions, as in style losses, and the loss is
            summed over samples.
        normalize: "none": the formula above. "width": divide each element of G by the number of products it sums, so
            that models of different widths or resolutions are comparable.
        reduction: "sum": the formula above. "mean": divide it by the number of elements of all G.

    Returns:
        0-dim, float32 (float64 if an input is).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.

    Memory: about 4 times the size of all G, [N, N] or [B, C, C].
    """
    check_choice("over", over, ("samples", "channels"))
    check_choice("normalize", normalize, ("none", "width"))
    check_choice("reduction", reduction, ("sum", "mean"))
    _check(student, teacher, channels=over == "channels")
    student, teacher = savable_when_compiled(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        dtype = row_dtype(student.dtype, teacher.dtype)
        grams = [_gram(x.to(dtype), over, normalize) for x in (student, teacher)]
        gap = grams[1] - grams[0]
        loss = gap.square().sum()
        return loss / max(gap.numel(), 1) if reduction == "mean" else loss


def _gram(x: Tensor, over: str, normalize: str) -> Tensor:
    rows = (
        x.reshape(*x.shape[:2], math.prod(x.shape[2:])) if over == "channels" else _rows(x, x.dtype)
    )
    gram = rows @ rows.transpose(-1, -2)
    return gram / max(rows.shape[-1], 1) if normalize == "width" else gram


def _unit_gram(rows: Tensor) -> Tensor:
    """Return Q Q^T with rows of norm 1.

    Scaling a row of the left factor, or the whole right factor, does not change the result. Both are therefore scaled
    to a largest entry of 1, which rules out overflow.
    """
    return unit(over_peak(rows, -1)[0] @ over_peak(rows, 0, 1)[0].t())


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).to(dtype)


def _distance_relation(delta: float, mean: str) -> Relation:
    delta, mean = _check_huber(delta, mean)

    def relation(
        student: Tensor, teacher: Tensor, differentiate: bool
    ) -> tuple[Tensor, Tensor | None]:
        points = len(student)
        pairs = max(points**2 if mean == "all" else points * (points - 1), 1)
        (unit, count), (teacher_unit, _) = (_reciprocal_mean(x, mean) for x in (student, teacher))
        gap = student * unit - teacher * teacher_unit
        slope = gap.clamp(-delta, delta)
        loss = (slope * gap.sub_(slope, alpha=0.5)).sum() / pairs
        if not differentiate:
            return loss, None
        # mu depends on every distance, so its derivative is subtracted from each. Each order of a pair contributes
        # 0.5 / d times the derivative with respect to d, because d(d^2) = 2 d d(d).
        through_mean = (slope * student).sum() * unit * unit / count
        half_derivative = slope.mul_(unit).sub_(through_mean).mul_(reciprocal(student))
        return loss, half_derivative.mul_(0.5 / pairs)

    return relation


def _reciprocal_mean(distances: Tensor, mean: str) -> tuple[Tensor, Tensor | int]:
    """Return (1 / mu, or 0 if mu is 0; the number of distances averaged)."""
    points = len(distances)
    count = (distances > 0).sum().clamp(min=1) if mean == "all" else max(points * (points - 1), 1)
    return reciprocal(distances.sum() / count), count


def _angle_relation(delta: float, mean: str, backend: str) -> Relation:
    delta, mean = _check_huber(delta, mean)
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, got {type(backend).__name__}")
    check_choice("backend", backend, ("auto", *registry.ANGLES))

    def relation(
        student: Tensor, teacher: Tensor, differentiate: bool
    ) -> tuple[Tensor, Tensor | None]:
        points = len(student)
        angles = registry.function(registry.select_angles(backend, student.device), "angles")
        loss, half_derivative = angles(student, teacher, delta, differentiate)
        triples = points**3 if mean == "all" else points * (points - 1) * (points - 2)
        if mean == "all":
            # For i = k the cosine is 1, or 0 where the points coincide. Models that differ in this add huber(1).
            slope = min(delta, 1.0)
            loss = loss + ((student > 0) != (teacher > 0)).sum() * (slope * (1 - slope / 2))
        triples = max(triples, 1)
        return loss / triples, None if half_derivative is None else half_derivative.div_(triples)

    return relation


def _weighted_sum(
    terms: list[tuple[float, Relation]], student: Tensor, teacher: Tensor, differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """Relation that is the weighted sum of the (weight, relation) pairs in terms."""
    loss = student.new_zeros(())
    half_derivative = torch.zeros_like(student) if differentiate else None
    for weight, relation in terms:
        if weight == 0:
            continue
        term, term_derivative = relation(student, teacher, differentiate)
        loss = loss + weight * term
        if half_derivative is not None and term_derivative is not None:
            half_derivative.add_(term_derivative, alpha=weight)
    return loss, half_derivative


class _RelationLoss(torch.autograd.Function):
    """Autograd function of a relation of two sets of points."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, relation: Relation) -> Tensor:
        """Compute the loss and save its gradients."""
        points, teacher_points = (_rows(x, torch.float64) for x in (student, teacher))
        distances, teacher_distances = _distances(points), _distances(teacher_points)
        student_needs_grad, teacher_needs_grad = ctx.needs_input_grad[:2]
        loss, half_derivative = relation(distances, teacher_distances, student_needs_grad)
        gradient = teacher_gradient = None
        if half_derivative is not None:
            gradient = _points_gradient(half_derivative, points).to(row_dtype(student.dtype))
        if teacher_needs_grad:
            # The Huber loss is even, so swapping the models gives the teacher's derivative.
            _, half_derivative = relation(teacher_distances, distances, True)
            assert half_derivative is not None
            teacher_gradient = _points_gradient(half_derivative, teacher_points).to(
                row_dtype(teacher.dtype)
            )
        ctx.save_for_backward(gradient, teacher_gradient)
        ctx.inputs = [(x.shape, x.dtype) for x in (student, teacher)]
        return loss.to(row_dtype(student.dtype, teacher.dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the saved gradients times the upstream gradient, in the dtypes of the inputs."""
        with torch.no_grad():
            gradients = tuple(
                None if saved is None else (saved * upstream).to(dtype).view(shape)
                for saved, (shape, dtype) in zip(ctx.saved_tensors, ctx.inputs, strict=True)
            )
        return (*differentiable_once(gradients), None)


def _relation_loss(student: Tensor, teacher: Tensor, relation: Relation) -> Tensor:
    check_readable("student", student)
    check_readable("teacher", teacher)
    return _RelationLoss.apply(student, teacher, relation)


def _distances(points: Tensor) -> Tensor:
    """Return the distances [N, N] of points [N, D], exact for close points and 0 for coinciding ones."""
    count = len(points)
    upper = torch.ones(count, count, dtype=torch.bool, device=points.device).triu_(1)
    distances = points.new_zeros(count, count).masked_scatter_(upper, pdist(points))
    return distances + distances.t()


def _points_gradient(half_derivative: Tensor, points: Tensor) -> Tensor:
    """Return the gradient [N, D] of the points: row i is sum_j 2 w_ij (x_i - x_j), with w the full derivative."""
    points = points - points.mean(0)
    totals = half_derivative.sum(0) + half_derivative.sum(1)
    products = half_derivative @ points + half_derivative.t() @ points
    return 2 * (totals.unsqueeze(-1) * points - products)


def _check_huber(delta: float, mean: str) -> tuple[float, str]:
    check_choice("mean", mean, MEANS)
    return check_number("delta", delta, SMALLEST, LARGEST), mean


def _check(student: object, teacher: object, channels: bool = False) -> None:
    """Raise unless both are floating-point [N, ...], or [B, C, ...] with channels, of equal N (or B, C) and device."""
    for argument, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
        check_dense(argument, value)
        if value.dim() < 1 + channels:
            shape = "[B, C, ...]" if channels else "[N, ...]"
            raise ValueError(f"{argument} must be {shape}, got shape {tuple(value.shape)}")
    assert isinstance(student, Tensor) and isinstance(teacher, Tensor)
    shared = 1 + channels
    if student.shape[:shared] != teacher.shape[:shared]:
        kind = "samples and channels" if channels else "samples"
        raise ValueError(
            f"teacher must have as many {kind} as student, {tuple(student.shape[:shared])}; "
            f"got {tuple(teacher.shape[:shared])}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher must be on {student.device}, where student is; got {teacher.device}"
        )
