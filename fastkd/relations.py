"""Losses on the relations among the samples of a batch: distances, angles, similarities.

A student [N, D_S] and a teacher [N, D_T] are compared by what their embeddings say of the samples' relations, so the
widths may differ and nothing has to be projected. Any trailing shape is flattened.

Distances and angles are those of Relational Knowledge Distillation (Park, Kim, Lu, Cho, 2019). Both follow from the two
matrices of distances, which are computed from differences in float64: a Gram matrix would lose the distances of points
that are close to each other. By the law of cosines

    cos(angle at j between i and k) = (d_ij^2 + d_kj^2 - d_ik^2) / (2 d_ij d_kj)

so that the N^3 angles cost N^3 steps and not N^3 D, and nothing larger than [N, N] is held. A loss is computed with its
derivative to the squared distances, from which the gradient of the points is one product of matrices.
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
from fastkd.call.checks import LARGEST, SMALLEST, check_choice, check_dense, check_number
from fastkd.call.contract import row_dtype
from fastkd.core.tensors import check_readable, reciprocal, savable_when_compiled
from fastkd.engine.autograd import differentiable_once
from fastkd.engine.graphs import Arguments, as_one_op
from fastkd.features import over_peak, unit

MEANS = ("distinct", "all")

# (distances of the student, of the teacher, whether the second result is wanted) -> the loss, and a matrix which, with
# its transpose added, is the loss's derivative to the student's squared distances. All float64, matrices [N, N].
Relation = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def _returned(given: Arguments) -> list[tuple[Sequence[int], torch.dtype]]:
    """The shape and dtype of a loss of distances, for a compiled graph."""
    return [((), row_dtype(given["student"].dtype, given["teacher"].dtype))]


@as_one_op(_returned)
def rkd_distance_loss(
    student: Tensor, teacher: Tensor, *, delta: float = 1.0, mean: str = "distinct"
) -> Tensor:
    """Huber's loss between the distances of two samples, each in units of its model's mean distance mu.

        mean over pairs (i, j) of huber(d_ij(student) / mu_S - d_ij(teacher) / mu_T)

    Args:
        student: [N, ...], float32, bfloat16, float16 or float64.
        teacher: [N, ...], of any width and dtype on the student's device; it gets a gradient where it requires one.
        delta: where Huber's loss turns from half the square of x to delta (abs(x) - delta / 2).
        mean: "distinct" takes both means over the N (N - 1) pairs of two samples, as the paper has it. "all" divides
            the sum by N^2, diagonal included, and takes mu over distances above 0, as the authors' code does.

    Returns:
        0-dim, float32 (float64 where an input is). 0 where there is no pair. The distance of points that
        coincide has no gradient; where all coincide, their distances in units of the mean are 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.
        RuntimeError: it is differentiated twice.

    Memory: up to 6 matrices [N, N] of float64 in the call; a gradient [N, D] until the backward.

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation" (2019), equations 5 to 7.
    """
    _check(student, teacher)
    return _of_distances(student, teacher, _distance(delta, mean))


@as_one_op(_returned)
def rkd_angle_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    delta: float = 1.0,
    mean: str = "distinct",
    backend: str = "auto",
) -> Tensor:
    """Huber's loss between the cosines of the angle at sample j between samples i and k.

        mean over triples (i, j, k) of huber(<e_ij, e_kj>(student) - <e_ij, e_kj>(teacher)),
        e_ij = (x_i - x_j) / d_ij

    It costs N^3 steps, whatever the widths. The arithmetic is float64's in every dtype.

    Args:
        student: [N, ...], float32, bfloat16, float16 or float64.
        teacher: [N, ...], of any width and dtype on the student's device; it gets a gradient where it requires one,
            which costs the loss again.
        delta: as in :func:`rkd_distance_loss`.
        mean: "distinct" is over the N (N - 1) (N - 2) triples of three samples, as the paper has it. "all" divides
            by N^3, as the authors' code does; the other triples add 0, but where samples coincide for one model only.
        backend: "cpu" is a kernel for CPU tensors; "portable", or "reference", is plain PyTorch on any device; "auto"
            is the first where it can serve. FASTKD_BACKEND overrides it where it names one of them; FASTKD_STRICT=1
            makes it an error that CPU tensors fall back to "portable".

    Returns:
        0-dim, float32 (float64 where an input is). 0 where there is no triple. Where two points coincide, e is 0 and so
        are its cosines and their gradient.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.
        BackendUnavailable: a backend asked for by name cannot serve the call.
        RuntimeError: it is differentiated twice.

    Memory: up to 5 matrices [N, N] of float64 in the call, where "portable" holds four more and tiles of 64 MiB; a
    gradient [N, D] until the backward.

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation" (2019), equations 8 and 9.
    """
    _check(student, teacher)
    return _of_distances(student, teacher, _angle(delta, mean, backend))


@as_one_op(_returned)
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
    """The two terms, distance * rkd_distance_loss + angle * rkd_angle_loss, with the distances computed once.

    The weights 1 and 2 are those of the authors' command for metric learning; code for CIFAR-100 has 25 and 50.

    Args:
        student: [N, ...].
        teacher: [N, ...].
        distance: the weight of the first term, not negative.
        angle: the weight of the second; 0 leaves it out.
        delta: as in :func:`rkd_distance_loss`, and so is mean.
        mean: see there.
        backend: as in :func:`rkd_angle_loss`.

    Returns, raises, memory, source: as for the two.
    """
    _check(student, teacher)
    terms = [
        (check_number("distance", distance, 0.0, LARGEST), _distance(delta, mean)),
        (
            check_number("angle", angle, 0.0, LARGEST),
            _angle(delta, mean, backend),
        ),
    ]
    return _of_distances(student, teacher, partial(_sum, terms))


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving distillation: 1/N^2 || G_T - G_S ||_F^2, G = Q Q^T with each row divided by its L2 norm.

    Args:
        student: [N, ...], float32, bfloat16, float16 or float64; computed in float32 or wider.
        teacher: [N, ...], of any width and dtype on the student's device; it gets a gradient where it requires one.

    Returns:
        0-dim, float32 (float64 where an input is). A row of G that is all zeros stays so, and has no gradient.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or device.

    Memory: some 8 matrices [N, N].

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
    """|| G_T - G_S ||_F^2, where G has the inner products of samples, or of the channels of a sample.

    Args:
        student: [N, ...]; over channels [B, C, ...]. float32, bfloat16, float16 or float64.
        teacher: likewise on the same device, with as many samples and, over channels, channels. The rest may differ.
            It gets a gradient where it requires one.
        over: "samples" has one G [N, N] of the flattened samples; "channels" one G [C, C] a sample, of each channel's
            values over all positions, as losses of style have it, and adds up the samples.
        normalize: "none" as the formula stands; "width" divides each G by the number of products that its elements sum,
            so that models of different widths or resolutions compare.
        reduction: "sum" as the formula stands; "mean" divides it by the number of elements of all G.

    Returns:
        0-dim, float32 (float64 where an input is).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or not among those named.

    Memory: some 4 times all G, [N, N] or [B, C, C].
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
    """Q Q^T with unit rows. What a row, or Q as a whole, is multiplied by does not matter, so nothing overflows."""
    return unit(over_peak(rows, -1)[0] @ over_peak(rows, 0, 1)[0].t())


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).to(dtype)


def _distance(delta: float, mean: str) -> Relation:
    delta, mean = _huber(delta, mean)

    def relation(student: Tensor, teacher: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        points = len(student)
        total = points**2 if mean == "all" else points * (points - 1)
        (unit, count), (teacher_unit, _) = (_reciprocal_mean(x, mean) for x in (student, teacher))
        gap = student * unit - teacher * teacher_unit
        slope = gap.clamp(-delta, delta)
        loss = (slope * gap.sub_(slope, alpha=0.5)).sum() / max(total, 1)
        if not wanted:
            return loss, None
        # mu depends on every distance. A pair has the same derivative in both orders, d(d^2) = 2 d d(d).
        through_mean = (slope * student).sum() * unit * unit / count
        halves = slope.mul_(unit).sub_(through_mean).mul_(reciprocal(student))
        return loss, halves.mul_(0.5 / max(total, 1))

    return relation


def _reciprocal_mean(distances: Tensor, mean: str) -> tuple[Tensor, Tensor | int]:
    """(1 / mu, or 0 where mu is; over how many distances it is the mean)."""
    points = len(distances)
    count = (distances > 0).sum().clamp(min=1) if mean == "all" else max(points * (points - 1), 1)
    return reciprocal(distances.sum() / count), count


def _angle(delta: float, mean: str, backend: str) -> Relation:
    delta, mean = _huber(delta, mean)
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, got {type(backend).__name__}")
    check_choice("backend", backend, ("auto", *registry.ANGLES))

    def relation(student: Tensor, teacher: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        points = len(student)
        angles = registry.function(registry.select_angles(backend, student.device), "angles")
        loss, halves = angles(student, teacher, delta, wanted)
        total = points**3 if mean == "all" else points * (points - 1) * (points - 2)
        if mean == "all":
            # i = k: the cosine is 1, or 0 where the points coincide
            least = min(delta, 1.0)
            loss = loss + ((student > 0) != (teacher > 0)).sum() * (least * (1 - least / 2))
        total = max(total, 1)
        return loss / total, None if halves is None else halves.div_(total)

    return relation


def _sum(
    terms: list[tuple[float, Relation]], student: Tensor, teacher: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """The relation that is the sum of others, each times a weight."""
    loss, halves = student.new_zeros(()), torch.zeros_like(student) if wanted else None
    for weight, relation in terms:
        if weight == 0:
            continue
        value, more = relation(student, teacher, wanted)
        loss = loss + weight * value
        if halves is not None and more is not None:
            halves.add_(more, alpha=weight)
    return loss, halves


class _OfDistances(torch.autograd.Function):
    """A relation of two sets of points."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, relation: Relation) -> Tensor:
        """The loss; its gradients are computed here and saved."""
        points, teacher_points = (_rows(x, torch.float64) for x in (student, teacher))
        distances, teacher_distances = _distances(points), _distances(teacher_points)
        of_student, of_teacher = ctx.needs_input_grad[:2]
        loss, halves = relation(distances, teacher_distances, of_student)
        gradient = teacher_gradient = None
        if halves is not None:
            gradient = _of_points(halves, points).to(row_dtype(student.dtype))
        if of_teacher:  # Huber's loss is even, so the two may change places
            _, halves = relation(teacher_distances, distances, True)
            assert halves is not None
            teacher_gradient = _of_points(halves, teacher_points).to(row_dtype(teacher.dtype))
        ctx.save_for_backward(gradient, teacher_gradient)
        ctx.like = [(x.shape, x.dtype) for x in (student, teacher)]
        return loss.to(row_dtype(student.dtype, teacher.dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The saved gradients times upstream, then in the dtype of the points."""
        with torch.no_grad():
            gradients = tuple(
                None if saved is None else (saved * upstream).to(dtype).view(shape)
                for saved, (shape, dtype) in zip(ctx.saved_tensors, ctx.like, strict=True)
            )
        return (*differentiable_once(gradients), None)


def _of_distances(student: Tensor, teacher: Tensor, relation: Relation) -> Tensor:
    check_readable("student", student)
    check_readable("teacher", teacher)
    return _OfDistances.apply(student, teacher, relation)


def _distances(points: Tensor) -> Tensor:
    """[N, N] of points [N, D], from differences: exact where points are close, 0 where they coincide."""
    count = len(points)
    upper = torch.ones(count, count, dtype=torch.bool, device=points.device).triu_(1)
    distances = points.new_zeros(count, count).masked_scatter_(upper, pdist(points))
    return distances + distances.t()


def _of_points(halves: Tensor, points: Tensor) -> Tensor:
    """The gradient [N, D], from a derivative to squared distances: element i is sum_j 2 w_ij (x_i - x_j)."""
    points = points - points.mean(0)
    totals = halves.sum(0) + halves.sum(1)
    return 2 * (totals.unsqueeze(-1) * points - halves @ points - halves.t() @ points)


def _huber(delta: float, mean: str) -> tuple[float, str]:
    check_choice("mean", mean, MEANS)
    return check_number("delta", delta, SMALLEST, LARGEST), mean


def _check(student: object, teacher: object, channels: bool = False) -> None:
    """Raise unless the two are floating-point tensors [N, ...], or [B, C, ...], of one N, or B and C, and device."""
    for argument, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
        check_dense(argument, value)
        if value.dim() < 1 + channels:
            wanted = "[B, C, ...]" if channels else "[N, ...]"
            raise ValueError(f"{argument} must be {wanted}, got shape {tuple(value.shape)}")
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
