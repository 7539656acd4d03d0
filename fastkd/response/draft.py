"""The loss of draft models for speculative decoding: divergences, acceptance and weighted sums of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from fastkd.backends import reference
from fastkd.call.checks import check_choice, check_flags, check_rows, checking
from fastkd.call.contract import Options, Result, Rows, Want, row_dtype, total_of
from fastkd.call.rows import Chunks, RowIndices, put, rows_at, take
from fastkd.core.scalars import LARGEST, check_number
from fastkd.divergences import Divergence, forward_kl, jsd, reverse_kl, tvd
from fastkd.engine.gradients import Differentiable, Loss
from fastkd.engine.graphs import Arguments, as_one_op
from fastkd.response.chunks import (
    TEMPORARIES,
    blank,
    chunk_rows,
    kernels_of,
    prepared,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

LOSSES = ("forward_kl", "reverse_kl", "jsd", "cross_entropy", "tvd", "nla", "lk_hybrid")
OF_ACCEPTANCE = ("tvd", "nla", "lk_hybrid")
# The lowest acceptance that nla distinguishes: below it the loss is constant and has no gradient, as in speculators.
LOWEST_ACCEPTANCE = 1e-5
# Below this acceptance, 1 - TV has fewer digits than a sum of minima in the same dtype.
LOW_ACCEPTANCE = 1 / 16
# A logit this far below the maximum has probability 0, and a finite logarithm.
FAR = 1e4
# [C, V] tensors that a chunk holds at once.
DRAFT_TEMPORARIES = 10
# Columns are padded to a multiple of this number, so that rows stay aligned.
ALIGNMENT = 16


class DraftParts(NamedTuple):
    """Detached terms of each row's loss; 0 in dropped rows."""

    # [...]: sum_v min(p_v, q_v), the probability that the target accepts a token sampled from the draft model.
    acceptance: Tensor
    # [...] each: the terms by name, without their weights.
    terms: dict[str, Tensor]
    # The number of counted rows, 0-dim.
    counted: Tensor


class DraftOptions(TypedDict, total=False):
    """The keyword options of draft_loss, except return_parts, which decides the type of the result."""

    draft_to_target: Tensor | None
    eta: float
    positions: Tensor | None
    position_decay: float
    mask: Tensor | None
    weight: Tensor | None
    reduction: str
    num_items: int | float | Tensor | None
    memory_budget: int | None
    backend: str


def _names(losses: str | Mapping[str, float]) -> dict[str, Any]:
    """The weight of each loss by name, in the order of LOSSES; the weights are not checked."""
    if isinstance(losses, str):
        losses = {losses: 1.0}
    if not isinstance(losses, Mapping):
        raise TypeError(f"losses must be a name or a dict of weights, got {type(losses).__name__}")
    if not losses:
        raise ValueError("losses must have at least one name, got an empty dict")
    for name in losses:
        check_choice("losses", name, LOSSES)
    return {name: losses[name] for name in LOSSES if name in losses}


@overload
def draft_loss(
    student_logits: Tensor,
    teacher: Tensor,
    losses: str | Mapping[str, float] = "forward_kl",
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[DraftOptions],
) -> Tensor: ...
@overload
def draft_loss(
    student_logits: Tensor,
    teacher: Tensor,
    losses: str | Mapping[str, float] = "forward_kl",
    *,
    return_parts: Literal[True],
    **options: Unpack[DraftOptions],
) -> tuple[Tensor, DraftParts]: ...
@overload
def draft_loss(
    student_logits: Tensor,
    teacher: Tensor,
    losses: str | Mapping[str, float] = "forward_kl",
    *,
    return_parts: bool,
    **options: Unpack[DraftOptions],
) -> Tensor | tuple[Tensor, DraftParts]: ...
def draft_loss(
    student_logits: Tensor,
    teacher: Tensor,
    losses: str | Mapping[str, float] = "forward_kl",
    *,
    draft_to_target: Tensor | None = None,
    eta: float = 3.0,
    positions: Tensor | None = None,
    position_decay: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    memory_budget: int | None = None,
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, DraftParts]:
    r"""Loss of a draft model (q) for speculative decoding against its target model (p): a weighted sum of terms.

    The probability that the target accepts a token sampled from the draft model is a = sum_v min(p_v, q_v) =
    1 - TV(p, q) (Leviathan, Kalman and Matias 2023). The terms are

        "forward_kl"     KL(p || q)
        "reverse_kl"     KL(q || p)
        "jsd"            the Jensen-Shannon divergence, beta = 1/2
        "cross_entropy"  -log q(argmax p)
        "tvd"            1 - a
        "nla"            -log max(a, 1e-5), the negative log of the acceptance
        "lk_hybrid"      l KL(p || q) + (1 - l) (1 - a),  l = exp(-eta sg(a))      (LK losses, Samarin et al. 2026)

    sg stops the gradient. The gradient of "nla" is that of "tvd" divided by a, so it is not small when few tokens are
    accepted, unlike that of "tvd".

    A draft vocabulary may be a subset of the target's. p is then renormalized over the subset in the first four terms
    and in the KL of "lk_hybrid". The acceptance a uses p as it is, because the verifier does: the target's mass outside
    the subset is never accepted. (speculators cuts and renormalizes the target's logits for all terms; to get its
    values, pass ``teacher[..., draft_to_target]`` and no draft_to_target.)

    Args:
        student_logits: [..., D], the draft model's logits, one column per draft token.
        teacher: [..., V], the target model's logits. They get no gradient.
        losses: the name of a term, or a dict from names to weights that are not negative, such as
            {"cross_entropy": 0.1, "tvd": 0.9}. A term of weight 0 is only measured, for return_parts.
        draft_to_target: [D] int64, the target's token for each draft token, all distinct. (EAGLE-3 checkpoints store
            offsets: pass ``torch.arange(D) + d2t``.) None: both models have the same vocabulary.
        eta: of "lk_hybrid", not negative.
        positions: [...] int64, the position of each row in the draft; for position_decay.
        position_decay: g in (0, 1]: the loss of a row is multiplied by g^position.
        mask: [...] bool; a row where it is False is dropped.
        weight: [...] float, multiplies the loss of a row.
        reduction: as in :func:`fastkd.kd_loss`. "mean" divides by the number of counted rows, without their weights.
        num_items: as in :func:`fastkd.kd_loss`.
        memory_budget: as in :func:`fastkd.response.adaptive_kl_loss`.
        return_parts: return (loss, :class:`DraftParts`).
        backend: as in :func:`fastkd.kd_loss`.

    Returns:
        The loss: 0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits). If draft_to_target has
        repeated or invalid tokens, the loss is NaN, because raising would require waiting for the device; with
        FASTKD_CHECK=1 it raises.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the requested backend cannot serve this call.

    Memory: the gradient, and one chunk.
    """
    weights = _names(losses)
    return _draft_loss(
        student_logits, teacher, draft_to_target, names=" ".join(weights), **weights, eta=eta,
        positions=positions, position_decay=position_decay, mask=mask, weight=weight,
        reduction=reduction, num_items=num_items, memory_budget=memory_budget,
        return_parts=return_parts, backend=backend,
    )  # fmt: skip


def _returned(arguments: Arguments) -> list[tuple[Sequence[int], torch.dtype]]:
    """The shapes and dtypes of :func:`_as_list`, for a compiled graph."""
    student, teacher = arguments["student_logits"], arguments["teacher"]
    lead, dtype = student.shape[:-1], row_dtype(student.dtype, teacher.dtype)
    per_row = arguments.get("reduction", "mean") == "none"
    loss: tuple[Sequence[int], torch.dtype] = (lead if per_row else (), dtype)
    if not arguments["return_parts"]:
        return [loss]
    return [loss, *[(lead, dtype)] * (1 + len(arguments["names"].split())), ((), torch.int64)]


def _as_list(returned: Any) -> list[Tensor]:
    if isinstance(returned, Tensor):
        return [returned]
    loss, parts = returned
    return [loss, parts.acceptance, *parts.terms.values(), parts.counted]


def _from_list(tensors: list[Tensor], arguments: Arguments) -> Any:
    if not arguments["return_parts"]:
        return tensors[0]
    loss, acceptance, *terms, counted = tensors
    named = dict(zip(arguments["names"].split(), (x.detach() for x in terms), strict=True))
    return loss, DraftParts(acceptance.detach(), named, counted.detach())


@as_one_op(_returned, flatten=_as_list, unflatten=_from_list)
def _draft_loss(
    student_logits: Tensor,
    teacher: Tensor,
    draft_to_target: Tensor | None,
    *,
    names: str,
    eta: float,
    positions: Tensor | None,
    position_decay: float,
    mask: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    num_items: int | float | Tensor | None,
    memory_budget: int | None,
    return_parts: bool,
    backend: str,
    forward_kl: float = 0.0,
    reverse_kl: float = 0.0,
    jsd: float = 0.0,
    cross_entropy: float = 0.0,
    tvd: float = 0.0,
    nla: float = 0.0,
    lk_hybrid: float = 0.0,
) -> Tensor | tuple[Tensor, DraftParts]:
    """draft_loss with a number per term; names lists the terms that were passed, separated by spaces."""
    values = (forward_kl, reverse_kl, jsd, cross_entropy, tvd, nla, lk_hybrid)
    weights = {
        name: check_number(f"losses[{name!r}]", value, 0.0, LARGEST)
        for name, value in zip(LOSSES, values, strict=True)
        if name in names.split()
    }
    if not any(weights.values()):
        raise ValueError("losses must have a weight that is not 0; all of them are")
    eta = check_number("eta", eta, 0.0, LARGEST)
    check_flags(return_parts=return_parts)
    student, target, call = prepared(
        student_logits, teacher, None, None, unequal=True,
        mask=mask, weight=weight, reduction=reduction, num_items=num_items, backend=backend,
    )  # fmt: skip
    if target.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher requires grad, and draft_loss has no gradient for it; detach it")
    columns, valid = _columns(draft_to_target, student, target)
    factor = _row_factor(positions, position_decay, valid, student)
    if factor is not None:
        rows = call.rows
        dtype = row_dtype(student.dtype, target.dtype)
        whole = factor.to(dtype).expand(student.shape[:-1])
        if rows.weight is not None:  # a dropped row has weight 0 there, whatever its position is
            whole = torch.where(rows.weight == 0, 0.0, rows.weight * whole)
        call = call._replace(rows=rows._replace(weight=whole.contiguous()))
    kernels, extra = kernels_of(call, student, target)
    width = student.shape[-1] + ALIGNMENT
    dtype = row_dtype(student.dtype, target.dtype)
    # The target's rows are copied if some are dropped.
    held = DRAFT_TEMPORARIES + -(-target.shape[-1] // width) + extra
    size = chunk_rows(memory_budget, width, dtype, student.device, held - TEMPORARIES)
    terms = _Terms(kernels, weights, eta, columns, return_parts)

    def compute(
        student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want
    ) -> _Computed:
        lead = student.shape[:-1]
        loss, acceptance, *values = (
            torch.zeros(lead, dtype=dtype, device=student.device)
            for _ in range(2 + len(weights) * return_parts)
        )
        gradient = blank(student, want.student_gradient)

        # A function, so that its local tensors are freed after each chunk.
        def run(indices: RowIndices) -> None:
            s, t = take(student, lead, indices), take(teacher, lead, indices)
            of_chunk = rows_at(rows, lead, indices)
            chunk = _Chunk(terms, s, t, of_chunk, options, gradient is not None)
            put(loss, lead, indices, chunk.loss())
            if gradient is not None and chunk.gradient is not None:
                put(gradient, lead, indices, chunk.gradient.to(gradient.dtype))
            if return_parts:
                assert chunk.acceptance is not None
                put(acceptance, lead, indices, chunk.acceptance)
                for name, value in zip(weights, values, strict=True):
                    put(value, lead, indices, chunk.values[name])

        for indices in Chunks.of(rows, lead, options.ignore_index, size):
            run(indices)
        parts = (acceptance, *values) if return_parts else ()
        return _Computed(loss, total_of(loss, rows, options), (gradient, None), parts)

    wanted = torch.is_grad_enabled() and student.requires_grad
    want = Want(wanted, deferred=wanted and student.dtype == torch.float16)
    rule = Loss(compute, call.options, want, call.summed, reference.scale_rows_)
    result, *parts = Differentiable.apply(rule, call.rows, 2, student, target)
    if not return_parts:
        return result
    counted = call.counted
    if not isinstance(counted, Tensor):
        counted = torch.tensor(counted, device=student.device)
    acceptance, *of_terms = parts
    return result, DraftParts(acceptance, dict(zip(weights, of_terms, strict=True)), counted)


class _Computed(NamedTuple):
    """What :class:`Differentiable` needs of a computation."""

    loss: Tensor
    total: Tensor
    gradients: tuple[Tensor | None, Tensor | None]
    parts: tuple[Tensor, ...]


class _Terms(NamedTuple):
    """What all chunks of a call share."""

    kernels: Any  # the backend
    weights: dict[str, float]  # the weight of each term by name
    eta: float
    columns: Tensor | None  # [D], the target's column of each draft token; None: the same columns
    measured: bool  # whether the values of all terms and the acceptance are wanted

    def weight(self, name: str) -> float:
        """The weight of a term; 0 if it was not passed."""
        return self.weights.get(name, 0.0)

    def needed(self, name: str) -> bool:
        """Whether the value of a term is needed: it was passed, and has a weight or is measured."""
        return name in self.weights and (self.measured or self.weights[name] > 0.0)

    @property
    def of_acceptance(self) -> bool:
        """Whether the acceptance is needed, and so the target's mass outside the draft vocabulary."""
        return self.measured or any(self.weight(name) for name in OF_ACCEPTANCE)


class _Chunk:
    """The terms of some rows, [C, D] and [C, V], and the gradient of their weighted sum.

    Each kernel call computes one divergence. It also computes the cross-entropy if the ratio of the two weights is the
    same in every row. The gradients are added in the dtype of losses, before their sum is rounded.
    """

    def __init__(
        self,
        terms: _Terms,
        student: Tensor,
        teacher: Tensor,
        rows: Rows,
        options: Options,
        wanted: bool,
    ) -> None:
        self.terms, self.scale, self.options, self.wanted = terms, rows.scale, options, wanted
        self.size = student.shape[-1]
        self.values: dict[str, Tensor] = {}  # the terms by name, [C], without weights
        self.gradient: Tensor | None = None  # [C, D], of scale * loss
        self.acceptance: Tensor | None = None  # [C]; None if nothing needs it
        # Both models' logits of the draft vocabulary; the same with one more column, for the target's other tokens; and
        # argmax p.
        self.subset, self.whole, self.labels = self._pairs(student, teacher)
        of_rows = rows.weight
        self.of_rows = torch.ones_like(self.subset[0][:, 0]) if of_rows is None else of_rows
        if terms.of_acceptance:
            self._terms_of_acceptance()
        if terms.needed("forward_kl") or terms.needed("lk_hybrid"):
            self._forward_terms()
        if terms.needed("cross_entropy") and "cross_entropy" not in self.values:
            self._add_with_cross_entropy(forward_kl(), self.subset, 0.0)
        for name, divergence in (("reverse_kl", reverse_kl()), ("jsd", jsd(0.5))):
            if terms.needed(name):
                result = self._add(divergence, self.subset, self._factor(terms.weight(name)))
                self.values[name] = result.distillation

    def loss(self) -> Tensor:
        """The weighted sum of the terms, times the weight of each row, [C]."""
        weighted = [w * self.values[name] for name, w in self.terms.weights.items() if w]
        return self.of_rows * torch.stack(weighted).sum(0)

    def _terms_of_acceptance(self) -> None:
        """Compute the acceptance and the terms that are functions of it; "lk_hybrid" also needs the KL."""
        terms = self.terms
        distance, hybrid = terms.weight("tvd"), terms.weight("lk_hybrid")
        negative_log = terms.weight("nla")
        by_row = negative_log > 0.0 or hybrid > 0.0
        if distance > 0.0 and terms.weight("cross_entropy") > 0.0 and not by_row:
            result = self._add_with_cross_entropy(tvd(), self.whole, distance)
        else:
            factor = torch.ones_like(self.of_rows) if by_row else self._factor(distance)
            result = self._add(tvd(), self.whole, factor)
        self.values["tvd"] = result.distillation
        self.acceptance = acceptance = 1.0 - result.distillation
        if terms.needed("nla"):
            self._sum_low_acceptance(acceptance)
        self.values["nla"] = -acceptance.clamp(min=LOWEST_ACCEPTANCE).log()
        if self.gradient is not None and by_row:
            # The gradient of a function of the distance is that of the distance times the function's derivative.
            slope = torch.where(acceptance >= LOWEST_ACCEPTANCE, negative_log / acceptance, 0.0)
            slope = slope + distance + hybrid * (1.0 - self._share())
            self.gradient.mul_((self.of_rows * slope).unsqueeze(-1))

    def _sum_low_acceptance(self, acceptance: Tensor) -> None:
        """Replace the acceptance by sum_v min(p_v, q_v) where 1 - TV has lost digits that its logarithm needs."""
        low = (acceptance < LOW_ACCEPTANCE).nonzero().squeeze(-1)
        if low.numel():
            logs = []
            for logits in self.whole:
                rows = logits if low.numel() == len(logits) else logits[low]
                top, best = rows.max(-1)
                log_sum = top + self._cross_entropy(rows, best)
                logs.append(rows - log_sum.unsqueeze(-1))
            acceptance[low] = torch.minimum(*logs, out=logs[0]).exp_().sum(-1)

    def _share(self) -> Tensor:
        """The weight of the KL in "lk_hybrid", [C]."""
        assert self.acceptance is not None
        return (-self.terms.eta * self.acceptance).exp()

    def _forward_terms(self) -> None:
        """Compute the KL and "lk_hybrid". One kernel call adds the gradient of the KL in both."""
        terms, values = self.terms, self.values
        onward, hybrid = terms.weight("forward_kl"), terms.weight("lk_hybrid")
        hard = terms.weight("cross_entropy") if "cross_entropy" not in values else 0.0
        if onward > 0.0 and hard > 0.0 and hybrid == 0.0:
            result = self._add_with_cross_entropy(forward_kl(), self.subset, onward)
        else:
            factor = self._factor(onward)
            if hybrid > 0.0:
                of_hybrid = self.of_rows * hybrid * self._share()
                factor = of_hybrid if factor is None else factor + of_hybrid
            result = self._add(forward_kl(), self.subset, factor)
        values["forward_kl"] = result.distillation
        if terms.needed("lk_hybrid"):
            share = self._share()
            values["lk_hybrid"] = share * values["forward_kl"] + (1.0 - share) * values["tvd"]

    def _factor(self, weight: float) -> Tensor | None:
        """The factor of each row's gradient for a term of this weight, [C]; None: the term is only measured."""
        return self.of_rows * weight if weight else None

    def _add_with_cross_entropy(
        self, divergence: Divergence, pair: tuple[Tensor, Tensor], weight: float
    ) -> Any:
        """Compute a divergence of this weight and the cross-entropy in one sweep."""
        total = weight + self.terms.weight("cross_entropy")
        alpha = weight / total if total else 0.0
        result = self._add(divergence, pair, self._factor(total), alpha, self.labels)
        self.values["cross_entropy"] = result.cross_entropy
        return result

    def _add(
        self,
        divergence: Divergence,
        pair: tuple[Tensor, Tensor],
        factor: Tensor | None,
        alpha: float = 1.0,
        labels: Tensor | None = None,
    ) -> Any:
        """Compute a divergence without weights, and add factor [C] times its gradient if factor is not None."""
        options = self.options._replace(
            divergence=divergence, alpha=alpha, vocab_size=pair[0].shape[-1]
        )
        rows = Rows(labels=labels, weight=factor, scale=self.scale)
        want = Want(self.wanted and factor is not None, parts=True)
        result = self.terms.kernels.kd_rows(*pair, rows, options, want)
        if result.student_gradient is not None:
            added = result.student_gradient[:, : self.size]
            self.gradient = added if self.gradient is None else self.gradient.add_(added)
        return result

    def _pairs(
        self, student: Tensor, teacher: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor | None]:
        """(student and teacher, the same with a column for the target's other tokens, argmax p if it is needed)."""
        dtype, columns = row_dtype(student.dtype, teacher.dtype), self.terms.columns
        needs_labels = self.terms.needed("cross_entropy")
        if columns is None or not self.terms.of_acceptance:
            listed = teacher if columns is None else teacher.index_select(-1, columns)
            pair = (student.to(dtype), listed.to(dtype))
            return pair, pair, listed.argmax(-1) if needs_labels else None
        count, size = student.shape
        width = -(-(size + 1) // ALIGNMENT) * ALIGNMENT
        s, t = (student.new_empty(count, width, dtype=dtype)[:, : size + 1] for _ in range(2))
        s[:, :size] = student
        s[:, size] = s[:, :size].amax(-1) - FAR
        t[:, :size] = teacher.index_select(-1, columns)
        top, best = t[:, :size].max(-1)
        # -log of the most probable draft token's probability, among the draft tokens and among all tokens.
        among_draft = self._cross_entropy(t[:, :size], best)
        among_all = self._cross_entropy(teacher, columns[best])
        # The logarithm of the draft tokens' mass. If rounding makes it 0 or more, no mass is left for the other tokens.
        mass = among_draft - among_all
        rest = torch.where(mass >= 0.0, -math.inf, (-torch.expm1(mass)).log())
        rest = torch.maximum(top + among_all + rest, top - FAR)
        t[:, size] = torch.where(top == -math.inf, 0.0, rest)
        return (s[:, :size], t[:, :size]), (s, t), best

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """-log softmax(logits)[label] of each row, [C]."""
        options = self.options._replace(alpha=0.0, vocab_size=logits.shape[-1])
        result: Result = self.terms.kernels.kd_rows(
            logits, logits, Rows(labels=labels), options, Want(parts=True)
        )
        assert result.cross_entropy is not None
        return result.cross_entropy


def _columns(
    draft_to_target: Tensor | None, student: Tensor, teacher: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(the target's column of each draft token, whether all of them are distinct columns, 0-dim)."""
    size, vocabulary = student.shape[-1], teacher.shape[-1]
    if draft_to_target is None:
        if size != vocabulary:
            raise ValueError(
                f"student_logits has {size} columns, and teacher has {vocabulary}; pass draft_to_target, the "
                "target's token for each draft token"
            )
        return None, None
    if isinstance(draft_to_target, Tensor) and draft_to_target.shape != (size,):
        raise ValueError(
            f"draft_to_target must be [{size}], the target's token for each column of student_logits; got shape "
            f"{tuple(draft_to_target.shape)}"
        )
    check_rows(
        "draft_to_target", draft_to_target, torch.Size((size,)), student.device, (torch.int64,)
    )
    ordered = draft_to_target.sort().values
    valid = (ordered[1:] != ordered[:-1]).all() & (ordered[0] >= 0) & (ordered[-1] < vocabulary)
    if checking() and not valid:
        raise ValueError(
            f"draft_to_target must be distinct tokens in [0, {vocabulary}); some are repeated or outside. If it holds "
            "offsets, pass torch.arange(len(draft_to_target)) + draft_to_target"
        )
    return draft_to_target.clamp(0, vocabulary - 1), valid


def _row_factor(
    positions: Tensor | None, position_decay: float, valid: Tensor | None, student: Tensor
) -> Tensor | None:
    """The factor of each row's loss, [...] or 0-dim: position_decay^position, and NaN if the columns are not valid."""
    position_decay = check_number("position_decay", position_decay, 0.0, 1.0)
    if position_decay == 0.0:
        raise ValueError("position_decay must be in (0, 1], got 0.0")
    factor = None if valid is None else torch.where(valid, 1.0, math.nan)
    if positions is None:
        if position_decay != 1.0:
            raise ValueError(
                f"positions must be given for position_decay; position_decay is {position_decay}"
            )
        return factor
    check_rows("positions", positions, student.shape[:-1], student.device, (torch.int64,))
    decay = torch.as_tensor(position_decay, dtype=torch.float64, device=student.device) ** positions
    return decay if factor is None else decay * factor
