"""DIST: correlation between classes and within a class, in place of equality."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.call.checks import (
    LARGEST,
    check_number,
)
from fastkd.call.contract import Options, Result, Rows, Want, row_dtype
from fastkd.call.rows import At, Chunks, put, take
from fastkd.engine.graphs import as_one_op
from fastkd.response.chunks import (
    blank,
    chunk_rows,
    differentiable,
    positive,
    prepared,
    returned,
    softmax_of,
    to_logits,
)

# [C, V] tensors that a chunk holds beyond TEMPORARIES of fastkd/response/chunks.py.
DIST_TEMPORARIES = 4


@as_one_op(returned)
def dist_loss(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale_by_temperature: bool = True,
    eps: float = 1e-8,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    r"""DIST (Huang et al. 2022): correlation in place of equality, between classes and within a class.

        T^2 [beta (1 - mean_n r(q_n., p_n.)) + gamma (1 - mean_v r(q_.v, p_.v))],

        r(x, y) = <x - mean x, y - mean y> / (||x - mean x|| ||y - mean y|| + eps)

    over the rows n that count, q and p at temperature T. A constant row or column, of one model or of both, has r = 0;
    so a single row has gamma as its second term. Where one model's alone is constant the gradient is of the size of 1 /
    eps, as in their code. With the columns of a language model, most of which
    hold next to no probability, eps decides: their correlation counts for little where norms are below its root.

    The second term ties the rows of a batch: micro-batches and processes each take their own rows alone.

    Args:
        student_logits: [..., V].
        teacher: dense logits [..., V]; if they require grad they get their gradient.
        labels: [...] int64; a row whose label is ignore_index is dropped.
        beta: weight of the relation between classes, finite and not negative.
        gamma: weight of the relation within a class, likewise.
        temperature: T > 0.
        teacher_temperature: the teacher's own; None: as the student's. T^2 is always the student's.
        scale_by_temperature: multiply by T^2.
        eps: positive, in the denominator.
        ignore_index: the label that drops a row.
        mask: [...] bool; a row where it is False is dropped.
        vocab_size: as in :func:`fastkd.kd_loss`.
        memory_budget: as in :func:`fastkd.response.adaptive_kl_loss`.

    Returns:
        The loss, 0-dim; float32 (float64 for float64 logits). With no counted row it is 0 and part of the graph.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.

    Memory: the gradient, one chunk, and some float64 vectors of V elements.
    """
    beta, gamma = (
        check_number("beta", beta, 0.0, LARGEST),
        check_number("gamma", gamma, 0.0, LARGEST),
    )
    eps = positive("eps", eps)
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a number: a class is compared over all rows; got a tensor"
            )
    student, teacher, call = prepared(
        student_logits, teacher, labels, vocab_size,
        temperature=temperature, teacher_temperature=teacher_temperature,
        scale_by_temperature=scale_by_temperature, ignore_index=ignore_index, mask=mask, reduction="sum",
    )  # fmt: skip
    dtype, width = row_dtype(student.dtype, teacher.dtype), call.options.vocab_size
    size = chunk_rows(memory_budget, width, dtype, student.device, DIST_TEMPORARIES)

    def compute(
        student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want
    ) -> Result:
        lead, wanted = student.shape[:-1], (want.student_gradient, want.teacher_gradient)
        chunks = Chunks.of(rows, lead, options.ignore_index, size)
        count = chunks.count
        gradients = [blank(x, wants) for x, wants in zip((student, teacher), wanted, strict=True)]
        if count == 0:
            nothing = torch.zeros((), dtype=dtype, device=student.device)
            return Result(nothing, nothing, *gradients)
        temperatures = (options.temperature, options.teacher_temperature)

        def probabilities(at: At) -> tuple[Tensor, Tensor]:
            first, second = [
                softmax_of(take(x[..., :width], lead, at), temperature, dtype)
                for x, temperature in zip((student, teacher), temperatures, strict=True)
            ]
            return first, second

        # Functions, so that nothing of a chunk outlives it.
        def collect(at: At) -> tuple[_Moments, Tensor]:
            q, p = probabilities(at)
            return _Moments.of(q, p, 0), _Moments.of(q, p, 1).correlation(eps).sum()

        classes = _Moments.of_nothing(width, student.device)
        between = torch.zeros((), dtype=torch.float64, device=student.device)
        for at in chunks:
            more, correlations = collect(at)
            classes, between = classes.merged(more), between + correlations
        square = options.temperature**2 if options.scale_by_temperature else 1.0
        within = classes.correlation(eps).mean()
        loss = square * (beta * (1.0 - between / count) + gamma * (1.0 - within))
        factor = -square * (1.0 if rows.scale is None else rows.scale.to(dtype))

        def differentiate(at: At, side: int, whole: Tensor) -> None:
            pair = probabilities(at)
            own, other = pair[side], pair[1 - side]
            g = _Moments.of(*pair, 1).slope(own, other, side, eps).mul_(beta / count)
            g.add_(classes.slope(own, other, side, eps), alpha=gamma / width)
            g = to_logits(g, own, temperatures[side], factor)
            put(whole[..., :width], lead, at, g.to(whole.dtype))

        for side, whole in enumerate(gradients):
            if whole is not None:
                for at in chunks:
                    differentiate(at, side, whole)
        loss = loss.to(dtype)  # one number of all rows
        return Result(loss, loss, *gradients)

    return differentiable(student, teacher, call, compute)


class _Moments(NamedTuple):
    """Of pairs (q, p), along the rows or the columns of a chunk: float64, all of one shape that broadcasts with it."""

    number: int  # of pairs
    means: tuple[Tensor, Tensor]
    squares: tuple[Tensor, Tensor]  # sums of (q - mean q)^2 and of (p - mean p)^2
    product: Tensor  # sum of (q - mean q) (p - mean p)

    @classmethod
    def of(cls, q: Tensor, p: Tensor, dim: int) -> _Moments:
        """Of [C, V]; dim 0: each column's, dim 1: each row's."""

        def total(x: Tensor) -> Tensor:
            return x.sum(dim, keepdim=True, dtype=torch.float64)

        count = q.shape[dim]
        q_mean, p_mean = total(q) / count, total(p) / count
        q, p = q - q_mean.to(q.dtype), p - p_mean.to(p.dtype)
        # Means of what is left: centring in float32 leaves a rounding of the mean.
        q_rest, p_rest = total(q) / count, total(p) / count
        product = total(q * p) - count * q_rest * p_rest
        squares = (
            (total(q.square_()) - count * q_rest * q_rest).clamp_(min=0.0),
            (total(p.square_()) - count * p_rest * p_rest).clamp_(min=0.0),
        )
        return cls(count, (q_mean, p_mean), squares, product)

    @classmethod
    def of_nothing(cls, width: int, device: torch.device) -> _Moments:
        """Of no row, each column's."""
        zeros = torch.zeros(1, width, dtype=torch.float64, device=device)
        return cls(0, (zeros, zeros), (zeros, zeros), zeros)

    def merged(self, other: _Moments) -> _Moments:
        """Of both together (Chan, Golub and LeVeque 1983)."""
        count = self.number + other.number
        share = other.number / count
        gaps = [its - mine for mine, its in zip(self.means, other.means, strict=True)]
        means = [mine + gap * share for mine, gap in zip(self.means, gaps, strict=True)]
        squares = [
            mine + its + gap * gap * (self.number * share)
            for mine, its, gap in zip(self.squares, other.squares, gaps, strict=True)
        ]
        product = self.product + other.product + gaps[0] * gaps[1] * (self.number * share)
        return _Moments(count, (means[0], means[1]), (squares[0], squares[1]), product)

    def correlation(self, eps: float) -> Tensor:
        """R of each, with eps in its denominator."""
        return self.product / (self.squares[0].sqrt() * self.squares[1].sqrt() + eps)

    def slope(self, own: Tensor, other: Tensor, side: int, eps: float) -> Tensor:
        """[C, V]: dr / d own, where own is the side of the pair with that number."""
        own_norm, other_norm = self.squares[side].sqrt(), self.squares[1 - side].sqrt()
        below = own_norm * other_norm + eps
        along = self.product * other_norm / (own_norm * below * below)
        along = torch.where(own_norm == 0, 0.0, along).to(own.dtype)
        result = (other - self.means[1 - side].to(own.dtype)).mul_((1.0 / below).to(own.dtype))
        return result.sub_((own - self.means[side].to(own.dtype)).mul_(along))
