"""Losses on the teacher's response that are no sum over the vocabulary of one function of p and q.

Rows that do not count are packed away, the others go through in chunks, and the gradient of a chunk is computed with
it in the forward: beside the gradient, a call holds what one chunk takes (memory_budget). Packing waits for the
device, so none of these can be recorded in a CUDA graph. In a compiled graph each is one op, which runs as it is here.

Read top to bottom: the loop over chunks and its differentiation, then each loss with what it does to a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends import reference, registry
from fastkd.backends.pieces import PIECE_TEMPORARIES
from fastkd.call.checks import (
    LARGEST,
    Prepared,
    check_choice,
    check_int,
    check_logits,
    check_number,
    check_rows,
    check_teacher,
    check_vocabulary,
    is_dtensor,
    prepare,
)
from fastkd.call.contract import Options, Rows, Want, counted_rows, row_dtype
from fastkd.call.rows import put, rows_at, take
from fastkd.core.scalars import plain
from fastkd.core.tensors import savable
from fastkd.divergences import Divergence, forward_kl, reverse_kl, squared_error
from fastkd.engine import autograd
from fastkd.engine.graphs import Arguments, as_one_op
from fastkd.engine.plan import REFERENCE_TEMPORARIES
from fastkd.functional import kd_loss

# Bytes of a chunk of a call that names none: on a CPU it stays close to the cache.
CPU_BUDGET, DEVICE_BUDGET = 32 << 20, 1 << 30
# [C, V] tensors of the dtype of losses that a chunk holds at once, at most; tests/losses/test_response.py measures it.
TEMPORARIES = 28
DIST_TEMPORARIES = 4  # those of dist_loss beyond them
# Most teachers have half of their mass in fewer tokens.
FIRST_TOKENS = 64


class _Outcome(NamedTuple):
    """Of some rows, or of all; gradients are of the loss times weight and scale."""

    loss: Tensor
    student_gradient: Tensor | None = None
    teacher_gradient: Tensor | None = None


Wanted = tuple[bool, bool]  # gradients: of the student, of the teacher
# (student, teacher, rows, options, wanted) -> outcome: of whole tensors, or of a chunk [C, V]
Compute = Callable[[Tensor, Tensor, Rows, Options, Wanted], _Outcome]


class _Computed(torch.autograd.Function):
    """A loss whose gradient is computed in the forward, or in the backward where the logits are float16."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        rows: Rows,
        options: Options,
        compute: Compute,
        wanted: Wanted,
    ) -> Tensor:
        """The loss and, unless it is deferred, its gradient."""
        low = [x.dtype == torch.float16 for x in (student, teacher)]
        deferred = any(x and y for x, y in zip(low, wanted, strict=True))
        outcome = compute(student, teacher, rows, options, (False, False) if deferred else wanted)
        kept = (student, teacher) if deferred else outcome[1:]
        keeps_rows = deferred or outcome.loss.dim() > 0
        ctx.save_for_backward(*savable(*kept, *(rows if keeps_rows else Rows())))
        ctx.call = (options, compute, wanted, deferred)
        return outcome.loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The saved gradient times upstream, or the deferred one with upstream inside."""
        options, compute, wanted, deferred = ctx.call
        first, second, *others = ctx.saved_tensors
        rows = Rows(*others)
        with torch.no_grad():
            upstream = autograd.of_counted_rows(upstream, rows, options.ignore_index)
            if deferred:
                rows = autograd.with_upstream(rows, upstream)
                gradients = compute(first, second, rows, options, wanted)[1:]
            else:
                gradients = autograd.scaled(reference, (first, second), upstream)
        return (*autograd.differentiable_once(gradients), None, None, None, None)


def _differentiable(student: Tensor, teacher: Tensor, call: Prepared, compute: Compute) -> Tensor:
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (student, teacher))
    return _Computed.apply(student, teacher, call.rows, call.options, compute, wanted)


def _prepared(
    student: object,
    teacher: object,
    labels: Tensor | None,
    vocab_size: int | None,
    unequal: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Prepared]:
    """The arguments that these losses share, checked. unequal: widths may differ, and vocab_size is not asked for."""
    for name, value in (("student_logits", student), ("teacher", teacher)):
        if is_dtensor(value):
            raise TypeError(
                f"{name} must be a plain tensor with its whole vocabulary, got a DTensor"
            )
    student = check_logits("student_logits", student)
    teacher = check_logits("teacher", teacher)
    lead, device = student.shape[:-1], student.device
    check_teacher(teacher, "student_logits", lead, device)
    widths = {"student_logits": student.shape[-1], "teacher": teacher.shape[-1]}
    vocabulary = min(widths.values()) if unequal else check_vocabulary(vocab_size, widths)
    dtype = row_dtype(student.dtype, teacher.dtype)
    return student, teacher, prepare(lead, device, dtype, vocabulary, labels, **options)


def _counted(rows: Rows, options: Options) -> Tensor | None:
    """The numbers of the rows that are read; None where all are."""
    keep = counted_rows(rows, options.ignore_index)
    return None if keep is None else keep.flatten().nonzero().squeeze(1)


def _chunk_rows(
    memory_budget: int | None, width: int, dtype: torch.dtype, device: torch.device, extra: int = 0
) -> int:
    """How many rows of that width a chunk has; extra: other temporaries, of float32."""
    memory_budget = plain(memory_budget)
    if memory_budget is not None and type(memory_budget) is not int:
        raise TypeError(f"memory_budget must be an int or None, got {type(memory_budget).__name__}")
    a_row = width * (TEMPORARIES + extra) * dtype.itemsize
    if memory_budget is None:
        return max((CPU_BUDGET if device.type == "cpu" else DEVICE_BUDGET) // a_row, 1)
    if memory_budget < a_row:
        raise ValueError(
            f"memory_budget must be at least {a_row} bytes, which one row takes; got {memory_budget}"
        )
    return memory_budget // a_row


def _chunks(count: int, size: int, numbers: Tensor | None) -> list[slice | Tensor]:
    parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return list(parts) if numbers is None else [numbers[part] for part in parts]


def _by_rows(size: int, summed: bool, of_chunk: Compute, columns: tuple[int, int]) -> Compute:
    """The loss of whole tensors from that of a chunk; columns of the student and of the teacher count."""

    def compute(
        student: Tensor, teacher: Tensor, rows: Rows, options: Options, wanted: Wanted
    ) -> _Outcome:
        lead = student.shape[:-1]
        numbers = _counted(rows, options)
        count = lead.numel() if numbers is None else numbers.numel()
        logits = [student[..., : columns[0]], teacher[..., : columns[1]]]
        loss = torch.zeros(
            lead, dtype=row_dtype(student.dtype, teacher.dtype), device=student.device
        )
        gradients = [_blank(x, wants) for x, wants in zip((student, teacher), wanted, strict=True)]

        def run(at: slice | Tensor) -> None:  # a function, so that nothing of a chunk outlives it
            s, t = (take(x, lead, at) for x in logits)
            outcome = of_chunk(s, t, rows_at(rows, lead, at), options, wanted)
            put(loss, lead, at, outcome.loss)
            for whole, part, width in zip(gradients, outcome[1:], columns, strict=True):
                if whole is not None and part is not None:
                    put(whole[..., :width], lead, at, part.to(whole.dtype))

        for at in _chunks(count, size, numbers):
            run(at)
        if summed:
            factor = options.scale if rows.scale is None else options.scale * rows.scale
            loss = (loss.sum(dtype=torch.float64) * factor).to(loss.dtype)
        return _Outcome(loss, *gradients)

    return compute


def _blank(logits: Tensor, wanted: bool) -> Tensor | None:
    """Contiguous zeros for a gradient: what is not written belongs to rows that are dropped, or to padding."""
    return torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device) if wanted else None


def _factor(
    rows: Rows, options: Options, dtype: torch.dtype
) -> tuple[Tensor | float, Tensor | float]:
    """(what multiplies the loss of a row, what multiplies its gradient), [C, 1] or numbers: weight, T^2, scale."""
    weight: Tensor | float = 1.0 if rows.weight is None else rows.weight.to(dtype).unsqueeze(-1)
    for tempering in (rows.temperature, rows.teacher_temperature):
        if tempering is not None:  # an invalid one poisons its row
            weight = weight * torch.where(tempering > 0, 1.0, torch.nan).unsqueeze(-1).to(dtype)
    if options.scale_by_temperature:
        temperature = _temperature(options.temperature, rows.temperature)
        weight = weight * temperature * temperature
    scale = options.scale if rows.scale is None else options.scale * rows.scale.to(dtype)
    return weight, weight * scale


def _temperature(value: float, rows: Tensor | None) -> float | Tensor:
    return value if rows is None else rows.unsqueeze(-1)


def _sum(values: Tensor) -> Tensor:
    """[C, 1] in float64, in which rows of 100,000 columns lose no digit."""
    return values.sum(-1, keepdim=True, dtype=torch.float64)


def _softmax(logits: Tensor, temperature: float | Tensor, dtype: torch.dtype) -> Tensor:
    """[C, V]; torch's is off by 1e-5 on a CPU, in rows of 50,000 columns."""
    p = logits.to(dtype) - logits.amax(-1, keepdim=True).to(dtype)
    p = p.div_(temperature).exp_()
    return p.div_(_sum(p).to(dtype))


def _to_logits(
    derivative: Tensor, probabilities: Tensor, temperature: float | Tensor, factor: Tensor | float
) -> Tensor:
    """From a derivative by probabilities to one by logits, p (g - sum p g) / T, times factor; overwrites the first."""
    derivative.mul_(probabilities)
    total = _sum(derivative).to(derivative.dtype)
    return derivative.addcmul_(probabilities, total, value=-1.0).mul_(factor / temperature)


def _returned(given: Arguments) -> list[tuple[Sequence[int], torch.dtype]]:
    """The shape and dtype of a loss, for a compiled graph."""
    student, teacher = given["student_logits"], given["teacher"]
    per_row = given.get("reduction", "mean") == "none"
    return [(student.shape[:-1] if per_row else (), row_dtype(student.dtype, teacher.dtype))]


# ---- adaptive KL


@as_one_op(_returned)
def adaptive_kl_loss(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    head_mass: float = 0.5,
    crossing: str = "head",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Adaptive KL (AKL, Wu et al. 2024): forward and reverse KL, weighed by where student and teacher differ.

        T^2 (w_h KL(p || q) + w_t KL(q || p)),    w_h = G_h / (G_h + G_t),    w_t = G_t / (G_h + G_t)

    G = sum |p - q| over the head and over the tail of the row: the teacher's most probable tokens, as few as hold
    head_mass, and the others. The weights are constants of the gradient. A row with p = q has loss and gradient 0.
    Of tokens with one logit those of lower number come first, as in a stable sort.

    No row is sorted: the head is found among the teacher's most probable tokens, 64 at first, then eight times as
    many for the rows where they do not hold enough.

    Args:
        student_logits: [..., V].
        teacher: dense logits [..., V]; if they require grad they get their gradient.
        labels: [...] int64; a row whose label is ignore_index is dropped.
        head_mass: in (0, 1).
        crossing: the side of the token with which the sum of probabilities passes head_mass. "head": the head holds
            at least head_mass, as in the paper. "tail": it holds at most that, or one token, as in its code.
        temperature: as in :func:`fastkd.kd_loss`, and so are all options that are not listed here.
        memory_budget: bytes that a chunk may take; None: 32 MB on a CPU, 1 GB elsewhere, or one row.

    Returns:
        The loss: 0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the backend asked for cannot serve this call.

    Memory: the gradient, and one chunk.
    """
    head_mass = check_number("head_mass", head_mass, 0.0, 1.0, open_right=True)
    if head_mass == 0.0:
        raise ValueError("head_mass must be in (0, 1), got 0.0")
    check_choice("crossing", crossing, ("head", "tail"))
    student, teacher, call = _prepared(
        student_logits, teacher, labels, vocab_size,
        temperature=temperature, teacher_temperature=teacher_temperature,
        scale_by_temperature=scale_by_temperature, ignore_index=ignore_index, mask=mask, weight=weight,
        reduction=reduction, num_items=num_items, backend=backend,
    )  # fmt: skip
    kernels, extra = _kernels(call, student, teacher)

    def of_chunk(s: Tensor, t: Tensor, rows: Rows, options: Options, wanted: Wanted) -> _Outcome:
        s, t = _widened(s, t)
        share = _head_share(s, t, rows, options, head_mass, crossing)
        weights = torch.ones_like(share) if rows.weight is None else rows.weight
        outcomes = []
        for divergence, part in ((forward_kl(), share), (reverse_kl(), 1.0 - share)):
            weighted = rows._replace(weight=(weights * part).to(s.dtype), labels=None)
            options = options._replace(divergence=divergence)
            outcomes.append(kernels.kd_rows(s, t, weighted, options, Want(*wanted)))
        first, second = outcomes
        for mine, its in zip(first[2:4], second[2:4], strict=True):
            if mine is not None:
                mine.add_(its)
        return _Outcome(first.loss + second.loss, *first[2:4])

    width = call.options.vocab_size
    size = _chunk_rows(
        memory_budget, width, row_dtype(student.dtype, teacher.dtype), student.device, extra
    )
    compute = _by_rows(size, call.summed, of_chunk, (width, width))
    return _differentiable(student, teacher, call, compute)


def _kernels(call: Prepared, student: Tensor, teacher: Tensor) -> tuple[Any, int]:
    """(the backend for chunks of :func:`_widened` logits, the temporaries that it takes)."""
    dtype = row_dtype(student.dtype, teacher.dtype)
    chosen = registry.select(
        call.backend, student.device.type, dtype, dtype, call.options.divergence
    )
    extra = {"reference": REFERENCE_TEMPORARIES, "portable": PIECE_TEMPORARIES}
    return registry.load(chosen), extra.get(chosen, 0)


def _widened(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """In the dtype of losses, so that several gradients are added before one is rounded."""
    dtype = row_dtype(student.dtype, teacher.dtype)
    return student.to(dtype), teacher.to(dtype)


def _head_share(
    student: Tensor, teacher: Tensor, rows: Rows, options: Options, mass: float, crossing: str
) -> Tensor:
    """[C] float64: G_h / (G_h + G_t); 1/2 where both are 0."""
    dtype = student.dtype
    q = _softmax(student, _temperature(options.temperature, rows.temperature), dtype)
    tempering = _temperature(options.teacher_temperature, rows.teacher_temperature)
    p = _softmax(teacher, tempering, dtype)
    lowest, tied = _head(teacher, p, mass, crossing)
    gap = q.sub_(p).abs_()
    total = _sum(gap).squeeze(-1)
    equal = teacher == lowest.unsqueeze(-1)
    # Those of the lowest logit in the head, in the order of their numbers.
    head = equal & (equal.cumsum(-1, dtype=torch.int32) <= tied.unsqueeze(-1))
    head |= teacher > lowest.unsqueeze(-1)
    share = _sum(gap.masked_fill_(~head, 0.0)).squeeze(-1) / total
    return torch.where(total == 0, 0.5, share.clamp(max=1.0))


def _head(teacher: Tensor, p: Tensor, mass: float, crossing: str) -> tuple[Tensor, Tensor]:
    """(the lowest logit in the head of each row, how many tokens of that logit are in it), [C]."""
    count, width = teacher.shape
    lowest = torch.empty(count, dtype=teacher.dtype, device=teacher.device)
    tied = torch.empty(count, dtype=torch.int64, device=teacher.device)
    left, k = torch.arange(count, device=teacher.device), min(FIRST_TOKENS, width)
    while True:
        these, likely = (teacher, p) if left.numel() == count else (teacher[left], p[left])
        logits, ids = these.topk(k, dim=-1)
        held = likely.gather(-1, ids).to(torch.float64).cumsum(-1)
        within = held < mass if crossing == "head" else held <= mass
        size = (within.sum(-1) + (crossing == "head")).clamp(min=1, max=k)
        last = logits.gather(-1, (size - 1).unsqueeze(-1))
        lowest[left] = last.squeeze(-1)
        tied[left] = size - (logits > last).sum(-1)
        left = left[~(held[:, -1] > mass)]
        if k == width or not left.numel():
            return lowest, tied
        k = min(8 * k, width)


# ---- relations between and within classes


@as_one_op(_returned)
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
        memory_budget: as in :func:`adaptive_kl_loss`.

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
    eps = _positive("eps", eps)
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a number: a class is compared over all rows; got a tensor"
            )
    student, teacher, call = _prepared(
        student_logits, teacher, labels, vocab_size,
        temperature=temperature, teacher_temperature=teacher_temperature,
        scale_by_temperature=scale_by_temperature, ignore_index=ignore_index, mask=mask, reduction="sum",
    )  # fmt: skip
    dtype, width = row_dtype(student.dtype, teacher.dtype), call.options.vocab_size
    size = _chunk_rows(memory_budget, width, dtype, student.device, DIST_TEMPORARIES)

    def compute(
        student: Tensor, teacher: Tensor, rows: Rows, options: Options, wanted: Wanted
    ) -> _Outcome:
        lead, numbers = student.shape[:-1], _counted(rows, options)
        count = lead.numel() if numbers is None else numbers.numel()
        gradients = [_blank(x, wants) for x, wants in zip((student, teacher), wanted, strict=True)]
        if count == 0:
            return _Outcome(torch.zeros((), dtype=dtype, device=student.device), *gradients)
        chunks = _chunks(count, size, numbers)
        temperatures = (options.temperature, options.teacher_temperature)

        def probabilities(at: slice | Tensor) -> tuple[Tensor, Tensor]:
            first, second = [
                _softmax(take(x[..., :width], lead, at), temperature, dtype)
                for x, temperature in zip((student, teacher), temperatures, strict=True)
            ]
            return first, second

        # Functions, so that nothing of a chunk outlives it.
        def collect(at: slice | Tensor) -> tuple[_Moments, Tensor]:
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

        def differentiate(at: slice | Tensor, side: int, whole: Tensor) -> None:
            pair = probabilities(at)
            own, other = pair[side], pair[1 - side]
            g = _Moments.of(*pair, 1).slope(own, other, side, eps).mul_(beta / count)
            g.add_(classes.slope(own, other, side, eps), alpha=gamma / width)
            g = _to_logits(g, own, temperatures[side], factor)
            put(whole[..., :width], lead, at, g.to(whole.dtype))

        for side, whole in enumerate(gradients):
            if whole is not None:
                for at in chunks:
                    differentiate(at, side, whole)
        return _Outcome(loss.to(dtype), *gradients)

    return _differentiable(student, teacher, call, compute)


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


def _positive(argument: str, value: float) -> float:
    value = check_number(argument, value, 0.0, LARGEST)
    if value == 0.0:
        raise ValueError(f"{argument} must be positive, got {value}")
    return value


# ---- logit standardisation


@as_one_op(_returned)
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
    r"""Distillation of standardised logits (Sun et al. 2024), which need agree in shape and not in scale.

        alpha T^2 D(softmax(Z(t) / T), softmax(Z(s) / T)) + (1 - alpha) CE(softmax(s), label),

        Z(z) = (z - mean z) / (std z + eps)

    with the deviation of a sample, as torch.std has it. A softmax does not see the mean, so this is kd_loss with a
    temperature T (std + eps) for each row and side, but for T^2, which stays T's, and for the gradient, which goes
    through the standard deviation. No standardised logits are held. The cross-entropy sees the logits as they are.

    Args:
        student_logits: [..., V], V > 1. All finite: the deviation of a row with -inf is NaN, and so is its loss.
        teacher: dense logits [..., V]; if they require grad they get their gradient.
        labels: as in :func:`fastkd.kd_loss`, and so are all options that are not listed here.
        divergence: a divergence of probabilities at one temperature (not "squared_error", which sees the mean, nor
            "nkd", whose label's part is at temperature 1).
        temperature: the base temperature T > 0, which the paper has at 2 and more.
        eps: positive, added to the standard deviation.
        memory_budget: as in :func:`adaptive_kl_loss`.

    Returns:
        The loss: 0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the backend asked for cannot serve this call.

    Memory: the gradient, and one chunk.
    """
    eps = _positive("eps", eps)
    student, teacher, call = _prepared(
        student_logits, teacher, labels, vocab_size, divergence=divergence,
        temperature=temperature, teacher_temperature=teacher_temperature, alpha=alpha,
        scale_by_temperature=scale_by_temperature, label_smoothing=label_smoothing, ignore_index=ignore_index,
        mask=mask, weight=weight, reduction=reduction, num_items=num_items, backend=backend,
    )  # fmt: skip
    chosen, width = call.options.divergence, call.options.vocab_size
    if not chosen.normalized:
        raise ValueError(
            f"the divergence {chosen.name!r} is one of logits, and standardisation is for one of probabilities"
        )
    if chosen.target is not None and chosen.target.form == "label":
        raise ValueError(
            f"the divergence {chosen.name!r} takes the label's part at temperature 1, of logits as they are"
        )
    if width < 2:
        raise ValueError(f"a standard deviation needs at least 2 columns, got {width}")
    if teacher.requires_grad and torch.is_grad_enabled() and chosen.degree is None:
        raise ValueError(
            f"teacher requires grad, and the divergence {chosen.name!r} does not say its degree; detach the teacher"
        )
    kernels, extra = _kernels(call, student, teacher)

    def of_chunk(s: Tensor, t: Tensor, rows: Rows, options: Options, wanted: Wanted) -> _Outcome:
        s, t = _widened(s, t)
        base = _factor(rows._replace(weight=None), options, s.dtype)[0]  # T^2
        temperatures = (
            _temperature(options.temperature, rows.temperature),
            _temperature(options.teacher_temperature, rows.teacher_temperature),
        )
        deviations = [_deviation(s), _deviation(t)]
        tempered = [
            ((deviation + eps) * temperature).squeeze(-1).to(s.dtype)
            for deviation, temperature in zip(deviations, temperatures, strict=True)
        ]
        weights = torch.ones_like(s[:, 0]) if rows.weight is None else rows.weight.to(s.dtype)
        plain = rows._replace(
            labels=None if chosen.target is None else rows.labels,
            weight=(options.alpha * weights.unsqueeze(-1) * base).squeeze(-1),
            temperature=tempered[0],
            teacher_temperature=tempered[1],
        )
        distil = options._replace(alpha=1.0, scale_by_temperature=False, label_smoothing=0.0)
        result = kernels.kd_rows(s, t, plain, distil, Want(*wanted))
        for logits, deviation, gradient in zip((s, t), deviations, result[2:4], strict=True):
            if gradient is not None:
                _through_deviation(gradient, logits, deviation, eps)
        if options.alpha == 1.0:
            return _Outcome(result.loss, *result[2:4])
        labelled = rows._replace(
            weight=(1.0 - options.alpha) * weights, temperature=None, teacher_temperature=None
        )
        hard = options._replace(alpha=0.0, temperature=1.0, teacher_temperature=1.0)
        entropy = kernels.kd_rows(s, t, labelled, hard, Want(wanted[0]))
        if result.student_gradient is not None:
            result.student_gradient.add_(entropy.student_gradient)
        return _Outcome(result.loss + entropy.loss, *result[2:4])

    size = _chunk_rows(
        memory_budget, width, row_dtype(student.dtype, teacher.dtype), student.device, extra
    )
    compute = _by_rows(size, call.summed, of_chunk, (width, width))
    return _differentiable(student, teacher, call, compute)


def _centred(logits: Tensor) -> Tensor:
    """Less their mean. First less one of them: a mean of the size of a common shift would have no digits left."""
    logits = logits - logits[:, :1]
    return logits.sub_((_sum(logits) / logits.shape[1]).to(logits.dtype))


def _deviation(logits: Tensor) -> Tensor:
    """[C, 1] float64, of a sample."""
    return (_sum(_centred(logits).square_()) / (logits.shape[1] - 1)).sqrt()


def _through_deviation(gradient: Tensor, logits: Tensor, deviation: Tensor, eps: float) -> None:
    """Make of G, the gradient at fixed temperatures T (std + eps), the whole one, in place.

        G - (sum_i G_i (s_i - mean)) (s_i - mean) / ((V - 1) std (std + eps))

    as the loss is one of s / temperature, and G sums to 0. Where std is 0, so is its derivative, as torch has it.
    """
    centred = _centred(logits)
    along = _sum(gradient * centred)
    along = along / ((logits.shape[1] - 1) * deviation * (deviation + eps))
    along = torch.where(deviation == 0, 0.0, along)
    gradient.addcmul_(centred, along.to(gradient.dtype), value=-1.0)


# ---- unequal vocabularies


@as_one_op(_returned)
def uld_loss(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_by_temperature: bool = False,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    r"""Universal logit distillation (ULD, Boizard et al. 2024), for models of different tokenizers.

        sum_i |p_(i) - q_(i)|,    p_(1) >= p_(2) >= ..., q_(1) >= q_(2) >= ...

    the shorter of the two padded with 0: the Wasserstein distance where every two tokens are equally far apart. Its
    gradient sends that of the i-th largest probability to the token that has it; of tokens with one logit the first.

    Both models have one row a position. Answers differ in length where tokenizers do: :func:`common_positions` takes
    as many positions of each as the shorter answer has, as their code does.

    Args:
        student_logits: [..., V].
        teacher: dense logits [..., W] of the same leading shape; if they require grad they get their gradient.
        labels: [...] int64; a row whose label is ignore_index is dropped.
        temperature: T > 0, or a float tensor [...] with one per row.
        teacher_temperature: the teacher's own temperature, likewise; None: as the student's.
        scale_by_temperature: multiply by the student's T^2. Off, as in their code.
        ignore_index: the label that drops a row.
        mask: [...] bool; a row where it is False is dropped.
        weight: [...] float, multiplies the loss of a row.
        reduction: "none", "sum", "mean", "batchmean", as in :func:`fastkd.kd_loss`. Their code takes the mean of
            each answer and then the mean of those: weight each row by 1 / (its answer's rows), and num_items=answers.
        num_items: as in :func:`fastkd.kd_loss`.
        memory_budget: as in :func:`adaptive_kl_loss`.

    Returns:
        The loss: 0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.

    Memory: the gradient, and one chunk with the order of its tokens.
    """
    student, teacher, call = _prepared(
        student_logits, teacher, labels, None, unequal=True,
        temperature=temperature, teacher_temperature=teacher_temperature,
        scale_by_temperature=scale_by_temperature, ignore_index=ignore_index, mask=mask, weight=weight,
        reduction=reduction, num_items=num_items,
    )  # fmt: skip
    widths = (student.shape[-1], teacher.shape[-1])
    dtype = row_dtype(student.dtype, teacher.dtype)
    size = _chunk_rows(memory_budget, max(widths), dtype, student.device)
    compute = _by_rows(size, call.summed, _sorted_distance, widths)
    return _differentiable(student, teacher, call, compute)


def _sorted_distance(
    student: Tensor, teacher: Tensor, rows: Rows, options: Options, wanted: Wanted
) -> _Outcome:
    dtype = row_dtype(student.dtype, teacher.dtype)
    temperatures = (
        _temperature(options.temperature, rows.temperature),
        _temperature(options.teacher_temperature, rows.teacher_temperature),
    )
    sides, orders = [], []
    for logits, temperature in zip((student, teacher), temperatures, strict=True):
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        sides.append(_softmax(ordered, temperature, dtype))
        orders.append(order)
    common = min(student.shape[1], teacher.shape[1])
    gap = sides[0][:, :common] - sides[1][:, :common]
    total = _sum(gap.abs()) + sum(_sum(x[:, common:]) for x in sides)
    weight, factor = _factor(rows, options, dtype)
    gradients: list[Tensor | None] = [None, None]
    for side, sign in ((0, 1.0), (1, -1.0)):
        if wanted[side]:
            # Beyond the other's vocabulary there is this one's probability alone.
            g = torch.ones_like(sides[side])
            g[:, :common] = gap.sign().mul_(sign)
            g = _to_logits(g, sides[side], temperatures[side], factor)
            gradients[side] = torch.empty_like(g).scatter_(-1, orders[side], g)
    return _Outcome((total.to(dtype) * weight).squeeze(-1), *gradients)


def common_positions(
    student_labels: Tensor, teacher_labels: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Masks of the positions at which answers of two tokenizers are compared: the first ones of each, as many of both.

        s, t = common_positions(student_labels[:, 1:], teacher_labels[:, 1:])
        uld_loss(student_logits[:, :-1][s], teacher_logits[:, :-1][t])

    Args:
        student_labels: [B, S] int64, ignore_index wherever a position has no token of the answer.
        teacher_labels: [B, R] int64 of the same answers in the other tokenizer's tokens.
        ignore_index: that label.

    Returns:
        Bool masks [B, S] and [B, R], with equally many positions in each row.

    Raises:
        ValueError, TypeError: not two int64 tensors with one row an answer, on one device.
    """
    for name, value in (("student_labels", student_labels), ("teacher_labels", teacher_labels)):
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            raise TypeError(
                f"{name} must be an int64 tensor, got {getattr(value, 'dtype', value)!r}"
            )
        if value.dim() != 2:
            raise ValueError(f"{name} must be [answers, positions], got shape {tuple(value.shape)}")
    if len(student_labels) != len(teacher_labels) or student_labels.device != teacher_labels.device:
        raise ValueError(
            f"teacher_labels must have {len(student_labels)} rows on {student_labels.device}, as student_labels "
            f"have; got {len(teacher_labels)} on {teacher_labels.device}"
        )
    ignore_index = check_int("ignore_index", ignore_index)
    counted = [labels != ignore_index for labels in (student_labels, teacher_labels)]
    shorter = torch.minimum(*(kept.sum(-1, keepdim=True) for kept in counted))
    first, second = (kept & (kept.cumsum(-1) <= shorter) for kept in counted)
    return first, second


# ---- policies


def policy_distillation_loss(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    form: str = "kl",
    temperature: float | Tensor = 0.01,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""The losses of policy distillation (Rusu et al. 2016) of a teacher's Q-values, or logits, t.

        "nll"   -log softmax(s)[argmax t]
        "mse"   ||s - t||^2
        "kl"    KL(softmax(t / tau) || softmax(s))

    tau, the temperature, sharpens the teacher alone, and there is no tau^2. Each is one call of
    :func:`fastkd.kd_loss`.

    Args:
        student_logits: [..., V], one column an action.
        teacher: dense logits [..., V]; if they require grad they get their gradient ("nll" has none, and raises).
        labels: [...] int64; a row whose label is ignore_index is dropped.
        form: one of the above.
        temperature: tau > 0 of "kl", a number or a float tensor [...]; the others do not use it.
        ignore_index: as in :func:`fastkd.kd_loss`, and so are all options that follow it.

    Returns:
        The loss: 0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the backend asked for cannot serve this call.

    Memory: the gradient.
    """
    check_choice("form", form, ("nll", "mse", "kl"))
    teacher = check_logits("teacher", teacher)
    shared: dict[str, Any] = {
        "ignore_index": ignore_index, "mask": mask, "weight": weight, "reduction": reduction,
        "num_items": num_items, "vocab_size": vocab_size, "backend": backend,
    }  # fmt: skip
    if form == "kl":
        return kd_loss(
            student_logits,
            teacher,
            labels,
            teacher_temperature=temperature,
            scale_by_temperature=False,
            **shared,
        )
    if form == "mse":
        return 2.0 * kd_loss(student_logits, teacher, labels, divergence=squared_error(), **shared)
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher requires grad, and its argmax has no gradient; detach it")
    vocab_size = None if vocab_size is None else check_int("vocab_size", vocab_size)
    ignore_index = check_int("ignore_index", ignore_index)
    best = teacher[..., :vocab_size].argmax(-1)
    if mask is not None:
        check_rows("mask", mask, best.shape, best.device, (torch.bool,))
    if labels is not None:
        check_rows("labels", labels, best.shape, best.device, (torch.int64,))
        counted = labels != ignore_index
        shared["mask"] = counted if mask is None else counted & mask
    shared["ignore_index"] = -100  # no argmax is
    return kd_loss(student_logits, teacher, best, alpha=0.0, **shared)
