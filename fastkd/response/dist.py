"""DIST: correlation between and within classes, instead of equal probabilities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.call.contract import Options, Result, Rows, Want, row_dtype
from fastkd.call.rows import Chunks, RowIndices, put, take
from fastkd.core.scalars import LARGEST, check_number
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

# [C, V] tensors that a chunk holds in addition to TEMPORARIES of fastkd/response/chunks.py.
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
    r"""DIST (Huang et al. 2022): correlation between and within classes, instead of equal probabilities.

        T^2 [beta (1 - mean_n r(q_n., p_n.)) + gamma (1 - mean_v r(q_.v, p_.v))],

        r(x, y) = <x - mean x, y - mean y> / (||x - mean x|| ||y - mean y|| + eps)

    over the counted rows n, with q and p at temperature T. A row or column that is constant in one model or in both has
    r = 0, so the second term of a single row is gamma. If it is constant in only one model, the gradient has the size
    of 1 / eps, as in the authors' code. Most columns of a language model have almost no probability. Their correlation
    has little effect if their norms are below the square root of eps.

    The second term depends on all rows of a call: micro-batches and processes compute it over their own rows.

    Args:
        student_logits: [..., V].
        teacher: dense logits [..., V]; if they require grad, they get a gradient.
        labels: [...] int64; a row whose label is ignore_index is dropped.
        beta: weight of the relation between classes, finite and not negative.
        gamma: weight of the relation within a class, finite and not negative.
        temperature: T > 0.
        teacher_temperature: the teacher's temperature; None: the student's. T^2 is always the student's.
        scale_by_temperature: multiply by T^2.
        eps: positive, in the denominator.
        ignore_index: the label that drops a row.
        mask: [...] bool; a row where it is False is dropped.
        vocab_size: as in :func:`fastkd.kd_loss`.
        memory_budget: as in :func:`fastkd.response.adaptive_kl_loss`.

    Returns:
        The loss, 0-dim; float32 (float64 for float64 logits). With no counted row it is 0 with a graph.

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
                f"{name} must be a number, because a class is compared over all rows; got a tensor"
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

        def probabilities(at: RowIndices) -> tuple[Tensor, Tensor]:
            first, second = [
                softmax_of(take(x[..., :width], lead, at), temperature, dtype)
                for x, temperature in zip((student, teacher), temperatures, strict=True)
            ]
            return first, second

        # Functions, so that nothing of a chunk outlives it.
        def collect(at: RowIndices) -> tuple[_Moments, Tensor]:
            q, p = probabilities(at)
            return _Moments.of(q, p, 0), _Moments.of(q, p, 1).correlation(eps).sum()

        classes = _Moments.empty(width, student.device)
        between = torch.zeros((), dtype=torch.float64, device=student.device)
        for at in chunks:
            more, correlations = collect(at)
            classes, between = classes.merged(more), between + correlations
        square = options.temperature**2 if options.scale_by_temperature else 1.0
        within = classes.correlation(eps).mean()
        loss = square * (beta * (1.0 - between / count) + gamma * (1.0 - within))
        factor = -square * (1.0 if rows.scale is None else rows.scale.to(dtype))

        def differentiate(at: RowIndices, side: int, whole: Tensor) -> None:
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
    """Moments of pairs (q, p) along the rows or the columns of a chunk, float64, in a shape that broadcasts with it."""

    # How many pairs.
    number: int
    means: tuple[Tensor, Tensor]
    # Sums of (q - mean q)^2 and of (p - mean p)^2.
    squares: tuple[Tensor, Tensor]
    # Sum of (q - mean q) (p - mean p).
    product: Tensor

    @classmethod
    def of(cls, q: Tensor, p: Tensor, dim: int) -> _Moments:
        """The moments of q and p [C, V]: of each column for dim 0, of each row for dim 1."""

        def total(x: Tensor) -> Tensor:
            return x.sum(dim, keepdim=True, dtype=torch.float64)

        count = q.shape[dim]
        q_mean, p_mean = total(q) / count, total(p) / count
        q, p = q - q_mean.to(q.dtype), p - p_mean.to(p.dtype)
        # The remaining means, which are not 0 because the means were rounded to float32 before centring.
        q_error, p_error = total(q) / count, total(p) / count
        product = total(q * p) - count * q_error * p_error
        squares = (
            (total(q.square_()) - count * q_error * q_error).clamp_(min=0.0),
            (total(p.square_()) - count * p_error * p_error).clamp_(min=0.0),
        )
        return cls(count, (q_mean, p_mean), squares, product)

    @classmethod
    def empty(cls, width: int, device: torch.device) -> _Moments:
        """Empty accumulator for the moments of each column."""
        zeros = torch.zeros(1, width, dtype=torch.float64, device=device)
        return cls(0, (zeros, zeros), (zeros, zeros), zeros)

    def merged(self, other: _Moments) -> _Moments:
        """The moments of both sets of pairs together (Chan, Golub and LeVeque 1983)."""
        count = self.number + other.number
        share = other.number / count
        shifts = [b - a for a, b in zip(self.means, other.means, strict=True)]
        means = [a + shift * share for a, shift in zip(self.means, shifts, strict=True)]
        squares = [
            a + b + shift * shift * (self.number * share)
            for a, b, shift in zip(self.squares, other.squares, shifts, strict=True)
        ]
        product = self.product + other.product + shifts[0] * shifts[1] * (self.number * share)
        return _Moments(count, (means[0], means[1]), (squares[0], squares[1]), product)

    def correlation(self, eps: float) -> Tensor:
        """The correlation r of each row or column, with eps in the denominator."""
        return self.product / (self.squares[0].sqrt() * self.squares[1].sqrt() + eps)

    def slope(self, own: Tensor, other: Tensor, side: int, eps: float) -> Tensor:
        """The derivative dr / d own, [C, V]; own is q for side 0 and p for side 1."""
        own_norm, other_norm = self.squares[side].sqrt(), self.squares[1 - side].sqrt()
        denominator = own_norm * other_norm + eps
        factor = self.product * other_norm / (own_norm * denominator * denominator)
        factor = torch.where(own_norm == 0, 0.0, factor).to(own.dtype)
        result = (other - self.means[1 - side].to(own.dtype)).mul_(
            (1.0 / denominator).to(own.dtype)
        )
        return result.sub_((own - self.means[side].to(own.dtype)).mul_(factor))
