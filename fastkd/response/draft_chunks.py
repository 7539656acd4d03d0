"""Computes a chunk of rows of a draft model's loss: the terms, their weighted sum and its gradient.

:func:`compute_chunk` chooses one of three ways: the backend's draft_rows (:mod:`fastkd.call.draft`); :class:`Composed`,
one call of kd_rows per divergence; or :class:`Shared`, where several processes share both vocabularies.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.call.contract import Options, Rows, Want, factor_of, row_dtype
from fastkd.call.contract import Result as DivergenceResult
from fastkd.call.draft import LOWEST_ACCEPTANCE, Result, Terms
from fastkd.call.log_zero import evaluate
from fastkd.core.tensors import finite_max, precision
from fastkd.divergences import Divergence, forward_kl, jsd, reverse_kl, tvd

# Below this acceptance, 1 - TV has fewer digits than a sum of minima in the same dtype.
LOW_ACCEPTANCE = 1 / 16
# The probability of a logit this far below the maximum rounds to 0, but its logarithm is finite.
FAR = 1e4
# Columns are padded to a multiple of this number, so that rows stay aligned.
ALIGNMENT = 16


class Shard(NamedTuple):
    """What a process needs to know of two vocabularies that several processes share."""

    group: Any  # torch.distributed.ProcessGroup
    rank: int
    first: int  # the index of this process's first target column among those of all processes
    widest: int  # the number of draft tokens of the process that has the most
    widest_target: int  # the number of target columns of the process that has the most


def compute_chunk(
    kernels: Any,
    terms: Terms,
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    options: Options,
    want: Want,
    shard: Shard | None = None,
) -> Result:
    """The results of rows [C, D] and [C, V]. kernels: the backend; with want.inplace, student may be overwritten."""
    if shard is None and hasattr(kernels, "draft_rows"):
        result: Result = kernels.draft_rows(student, teacher, rows, options, terms, want)
        return result
    chunk: Composed | Shared
    if shard is None:
        chunk = Composed(kernels, terms, student, teacher, rows, options, want.student_gradient)
    else:
        chunk = Shared(shard, terms, student, teacher, rows, options, want.student_gradient)
    gradient = None if chunk.gradient is None else chunk.gradient.to(student.dtype)
    if not terms.measured:
        return Result(chunk.loss(), gradient, None, {})
    values = {name: chunk.values[name] for name in terms.weights}
    return Result(chunk.loss(), gradient, chunk.acceptance, values)


class Composed:
    """The terms of some rows, [C, D] and [C, V], and the gradient of their weighted sum.

    Each kernel call computes one divergence. It also computes the cross-entropy if the ratio of the two weights is the
    same in every row. The gradients are added in the dtype of losses, before their sum is rounded.
    """

    def __init__(
        self,
        kernels: Any,
        terms: Terms,
        student: Tensor,
        teacher: Tensor,
        rows: Rows,
        options: Options,
        wanted: bool,
    ) -> None:
        self.kernels, self.terms, self.options = kernels, terms, options
        self.scale, self.wanted = rows.scale, wanted
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
        result = self.kernels.kd_rows(*pair, rows, options, want)
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
        result: DivergenceResult = self.kernels.kd_rows(
            logits, logits, Rows(labels=labels), options, Want(parts=True)
        )
        assert result.cross_entropy is not None
        return result.cross_entropy


class Shared:
    """The terms of some rows whose columns several processes share, and the gradient of their weighted sum.

    This process has the columns [C, D_r] of the draft model and [C, V_r] of the target, and gets their gradient.
    The processes exchange a few numbers per row, twice: the normalizers of both sides, and the sums over columns. Each
    process has the target's columns of its own draft tokens. Everything is computed in PyTorch.
    """

    def __init__(
        self,
        shard: Shard,
        terms: Terms,
        student: Tensor,
        teacher: Tensor,
        rows: Rows,
        options: Options,
        wanted: bool,
    ) -> None:
        self.shard, self.terms = shard, terms
        self.values: dict[str, Tensor] = {}  # the terms by name, [C], without weights
        self.gradient: Tensor | None = None  # [C, D_r], of scale * loss
        dtype = row_dtype(student.dtype, teacher.dtype)
        listed = teacher if terms.columns is None else teacher.index_select(-1, terms.columns)
        s, t = student.to(dtype), listed.to(dtype)
        self.of_rows = s.new_ones(len(s)) if rows.weight is None else rows.weight
        log_q, log_p = self._log_probabilities(s, t, teacher)
        sums, g = self._sums(log_q, log_p)
        self._set_values(sums)
        if wanted:
            factor = (self.of_rows * factor_of(rows, options)).unsqueeze(-1)
            self.gradient = self._gradient(log_q, log_p, sums, g).mul_(factor.to(dtype))

    def loss(self) -> Tensor:
        """The weighted sum of the terms, times the weight of each row, [C]."""
        weighted = [w * self.values[name] for name, w in self.terms.weights.items() if w]
        return self.of_rows * torch.stack(weighted).sum(0)

    def _gathered(self, numbers: list[Tensor], what: str) -> list[Tensor]:
        """All processes' values of these numbers [C], as [processes, C] each."""
        from fastkd.parallel.collectives import all_gather

        stacked = torch.stack([number.to(self.wide) for number in numbers])
        return list(all_gather(stacked, self.shard.group, what).wait().unbind(1))

    def _log_probabilities(self, s: Tensor, t: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """(log q, log p) of this process's draft tokens, p renormalized over all processes' draft tokens."""
        self.wide = precision(s.device)
        sides = [s, t]
        if self.terms.columns is not None and self.terms.of_acceptance:
            sides.append(teacher)
        numbers = [number for side in sides for number in _normalizer(side, self.wide)]
        # The target's most probable draft token: its column here, and the student's logit of it.
        self.top = t.argmax(-1) if t.shape[-1] else None
        numbers.append(
            s.new_full((len(s),), -math.inf)
            if self.top is None
            else s.gather(-1, self.top.unsqueeze(-1)).squeeze(-1)
        )
        *of_sides, top_logits = self._gathered(numbers, "the normalizers of rows")
        merged = [_merged(*of_sides[i : i + 2]) for i in range(0, len(of_sides), 2)]
        (s_max, s_log_sum), (t_max, t_log_sum), *whole = merged
        owner = of_sides[2].argmax(0)
        self.owns_top = owner == self.shard.rank
        top_logit = top_logits.gather(0, owner.unsqueeze(0)).squeeze(0)
        self.hard = s_log_sum - (top_logit - s_max)
        # Rows in which the target excludes every draft token: nothing is accepted, and no renormalized p exists.
        self.empty = t_max == -math.inf
        self.log_mass = torch.zeros_like(t_max)
        for maximum, log_sum in whole:
            self.log_mass = ((t_max + t_log_sum) - (maximum + log_sum)).clamp(max=0.0)
        self.log_mass = self.log_mass.masked_fill(self.empty, -math.inf)

        def logs(z: Tensor, maximum: Tensor, log_sum: Tensor) -> Tensor:
            centred = z - maximum.to(z.dtype).unsqueeze(-1)
            return centred.sub_(log_sum.to(z.dtype).unsqueeze(-1))

        log_p = logs(t, finite_max(t_max), t_log_sum)
        return logs(s, s_max, s_log_sum), log_p.masked_fill_(self.empty.unsqueeze(-1), -math.inf)

    def _accepted(self, log_p: Tensor) -> Tensor:
        """The logarithms of the target's probabilities, not renormalized."""
        return log_p + self.log_mass.to(log_p.dtype).unsqueeze(-1)

    def _sums(self, log_q: Tensor, log_p: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(the sums over all processes' columns, [C]; d phi / d log q of this process's columns by divergence)."""
        terms = self.terms
        local: dict[str, Tensor] = {}
        g: dict[str, Tensor] = {}
        hybrid = terms.needed("lk_hybrid")
        sides = {
            name: (divergence, log_p)
            for name, divergence in (
                ("forward_kl", forward_kl()), ("reverse_kl", reverse_kl()), ("jsd", jsd(0.5))
            )
            if terms.needed(name) or (hybrid and name == "forward_kl")
        }  # fmt: skip
        if terms.of_acceptance:
            accepted = self._accepted(log_p)
            sides["tvd"] = (tvd(), accepted)
            local["acceptance"] = torch.minimum(accepted, log_q).exp().sum(-1, dtype=self.wide)
        for name, (divergence, log_t) in sides.items():
            phi, g[name], _ = evaluate(divergence, log_t, log_q)
            local[name] = phi.sum(-1, dtype=self.wide)
            local[f"g of {name}"] = g[name].sum(-1, dtype=self.wide)
        if not local:
            return {}, {}
        gathered = self._gathered(list(local.values()), "the sums over rows")
        return dict(zip(local, (x.sum(0) for x in gathered), strict=True)), g

    def _set_values(self, sums: dict[str, Tensor]) -> None:
        terms, dtype = self.terms, self.of_rows.dtype
        values: dict[str, Tensor] = {"cross_entropy": self.hard}
        for name in ("forward_kl", "reverse_kl", "jsd"):
            if name in sums:
                values[name] = sums[name].masked_fill(self.empty, math.nan)
        self.acceptance: Tensor | None = None
        if terms.of_acceptance:
            # sum max(q - m p, 0) = sum |q - m p| / 2 + (1 - m) / 2, where m is the target's mass on the draft tokens.
            values["tvd"] = sums["tvd"] - 0.5 * torch.expm1(self.log_mass)
            acceptance = sums["acceptance"]
            values["nla"] = -acceptance.clamp(min=LOWEST_ACCEPTANCE).log()
            self.share = (-terms.eta * acceptance).exp()
            if "forward_kl" in values:
                values["lk_hybrid"] = self.share * values["forward_kl"]
                values["lk_hybrid"] += (1.0 - self.share) * values["tvd"]
            self.wide_acceptance, self.acceptance = acceptance, acceptance.to(dtype)
        self.values = {name: value.to(dtype) for name, value in values.items()}

    def _gradient(
        self, log_q: Tensor, log_p: Tensor, sums: dict[str, Tensor], g: dict[str, Tensor]
    ) -> Tensor:
        """The gradient of the weighted sum, [C, D_r]: sum_k w_k (g_k - q sum g_k), plus w (q - onehot) of CE."""
        terms, dtype = self.terms, log_q.dtype
        hard = terms.weight("cross_entropy")
        slopes: dict[str, Tensor | float] = {
            name: terms.weight(name) for name in ("forward_kl", "reverse_kl", "jsd", "tvd")
        }
        if terms.weight("lk_hybrid"):
            slopes["forward_kl"] = slopes["forward_kl"] + terms.weight("lk_hybrid") * self.share
            slopes["tvd"] = slopes["tvd"] + terms.weight("lk_hybrid") * (1.0 - self.share)
        if terms.weight("nla"):
            slope = terms.weight("nla") / self.wide_acceptance
            slope = slope.masked_fill(self.wide_acceptance < LOWEST_ACCEPTANCE, 0.0)
            slopes["tvd"] = slopes["tvd"] + slope
        total = torch.full_like(self.hard, hard)
        gradient = torch.zeros_like(log_q)
        for name, of_term in slopes.items():
            if not isinstance(of_term, Tensor) and of_term == 0.0:
                continue
            factor = of_term * torch.ones_like(self.hard)
            if name != "tvd":
                factor = factor.masked_fill(self.empty, math.nan)
            gradient.addcmul_(g[name], factor.to(dtype).unsqueeze(-1))
            total = total - factor * sums[f"g of {name}"]
        gradient.addcmul_(log_q.exp(), total.to(dtype).unsqueeze(-1))
        if hard and self.top is not None:
            one = (self.owns_top * -hard).to(dtype).unsqueeze(-1)
            gradient.scatter_add_(-1, self.top.unsqueeze(-1), one)
        return gradient


def _normalizer(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(the maximum, the sum of exponentials relative to it) of each row, [C]; -inf and 0 without columns."""
    if not z.shape[-1]:
        return z.new_full((len(z),), -math.inf), z.new_zeros(len(z))
    maximum = z.amax(-1)
    centred = z.to(row_dtype(z.dtype)) - finite_max(maximum).unsqueeze(-1)
    return maximum, centred.exp_().sum(-1, dtype=dtype)


def _merged(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """(the maximum, the log-sum-exp relative to it) of all processes, [C], from those of each, [processes, C]."""
    maximum = maxima.amax(0)
    return maximum, ((maxima - finite_max(maximum)).exp() * sums).sum(0).log()
