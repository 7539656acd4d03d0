"""Ensembles with a TopK among their teachers, combined into one TopK of the tokens for which the mean is known.

Each TopK has the probabilities of the tokens that it lists, a dense teacher those of all tokens. The
policy for the tail decides which tokens the combined TopK lists; fastkd.teachers.Ensemble states the formulas.
Logarithms are float32, or float64 if one of the teachers is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.call.checks import LossCall, at_temperature, check_ids, check_logprobs, checking
from fastkd.call.contract import Options, kept_rows, row_dtype
from fastkd.call.routed import JoinedTopK
from fastkd.call.rows import Chunks, put, take
from fastkd.call.tail import MOST, masses
from fastkd.engine.matmul import make_logits
from fastkd.engine.plan import RESPONSE_BUDGET
from fastkd.teachers import Ensemble, LinearTeacher, TopK, flatten, support_union, taken


class _Listed(NamedTuple):
    """A TopK of the ensemble: tensors [..., K], one entry per listed token, and [...], one per row."""

    weight: float  # of the teacher in the ensemble
    ids: Tensor  # int64; -1 is padding
    logprobs: Tensor  # -inf in padding
    tail: Tensor  # log of the mass of all other tokens; -inf if the policy has none
    valid: Tensor  # bool: False if a loss with this TopK alone would be NaN

    def lookup(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(the log-probabilities of these tokens [..., n]; the columns that list them, or K if none does)."""
        k = self.ids.shape[-1]
        ordered, order = self.ids.contiguous().sort(-1)
        place = torch.searchsorted(ordered, ids.contiguous()).clamp_(max=k - 1)
        found = (ordered.gather(-1, place) == ids) & (ids >= 0)
        column = order.gather(-1, place)
        logprobs = self.logprobs.gather(-1, column).masked_fill(~found, -math.inf)
        return logprobs, column.masked_fill(~found, k)

    def log_mass_except(self, columns: Tensor) -> Tensor:
        """The log of the mass [...] of all tokens but those in these columns [..., n]; K stands for no column."""
        k = self.ids.shape[-1]
        removed = torch.zeros_like(self.ids[..., :1], dtype=torch.bool).repeat_interleave(k + 1, -1)
        removed = removed.scatter(-1, columns, True)[..., :k]
        others = self.logprobs.masked_fill(removed, -math.inf)
        return torch.cat([others, self.tail.unsqueeze(-1)], -1).logsumexp(-1)


def combined(
    teacher: Ensemble, call: LossCall, lead: torch.Size, vocabulary: int | None
) -> JoinedTopK:
    """The ensemble as one TopK whose temperature is 1.

    Under an arithmetic mean, the loss must read it at teacher_temperature 1, because each teacher's probabilities have
    been taken at the temperature of the call.

    Args:
        teacher: an ensemble of which at least one teacher is a TopK.
        call: the options of the call, and its rows.
        lead: the leading shape of the rows.
        vocabulary: the number of columns; None if processes share the vocabulary.

    Raises:
        ValueError: the options do not fit the TopKs; or, with FASTKD_CHECK=1, a value is invalid.
    """
    options = call.options
    dtype = row_dtype(*(tensor.dtype for tensor in flatten(teacher)[0]))
    assert teacher.weights is not None  # set by its constructor
    listed, dense = [], []
    for number, (member, weight) in enumerate(zip(teacher.teachers, teacher.weights, strict=True)):
        if weight == 0:
            continue
        if not isinstance(member, TopK):
            dense.append((member, weight))
            continue
        name = f"teacher.teachers[{number}]"
        if teacher.tail == "bucket":
            at_temperature(
                options._replace(teacher_logit_scale=1.0, teacher_softcap=0.0),
                "bucket", member.temperature, call.rows.teacher_temperature is not None, name,
            )  # fmt: skip
        if checking():
            _check_values(member, call, vocabulary, name)
        listed.append(_listed_by(member, weight, call, dtype, vocabulary))
    if dense and vocabulary is None:
        raise ValueError(
            "an Ensemble of TopKs and dense teachers needs the whole vocabulary of each dense teacher, but several "
            "processes share the vocabulary here: pass TopK.from_logits of the dense teachers"
        )
    if not dense and (options.teacher_logit_scale != 1 or options.teacher_softcap):
        at_temperature(options, teacher.tail, 1.0, False)  # raises
    if teacher.tail == "renormalize_teacher":
        ids, logprobs, tail = _union(listed)
    else:
        ids, logprobs, tail = _intersection(teacher, listed, dense, call, lead, vocabulary)
    valid, has_tokens, highest = listed[0].valid, None, listed[0].ids.amax(-1)
    for each in listed:
        valid, highest = valid & each.valid, torch.maximum(highest, each.ids.amax(-1))
        lists_some = (each.ids != -1).any(-1, keepdim=True)
        has_tokens = lists_some if has_tokens is None else has_tokens & lists_some
    assert has_tokens is not None
    ids = ids.masked_fill(~has_tokens, -1).masked_fill(~valid.unsqueeze(-1), -2)
    zero = torch.zeros(lead, dtype=torch.float64, device=ids.device)
    # Masses of 0 pass the check of the sums of probabilities, which has been made teacher by teacher above.
    return JoinedTopK(ids, logprobs, teacher.tail, tail, 1.0, (zero, zero), None, highest)


def _check_values(member: TopK, call: LossCall, vocabulary: int | None, name: str) -> None:
    """Raise if a kept row of the TopK with this name has invalid ids or log-probabilities."""
    options = call.options._replace(tail=member.tail)
    check_ids(
        member.ids, vocabulary or 2**31, kept_rows(call.rows, options.ignore_index), f"{name}.ids"
    )
    tail_logprob = member.tail_logprob if member.tail == "bucket" else None
    rows = call.rows._replace(ids=member.ids, tail_logprob=tail_logprob)
    check_logprobs(member.logprobs.detach(), rows, options, teacher=name)


def _listed_by(
    member: TopK, weight: float, call: LossCall, dtype: torch.dtype, vocabulary: int | None
) -> _Listed:
    ids, own = member.ids.to(torch.int64), member.logprobs.detach()
    padding = ids < 0
    ordered = ids.sort(-1).values
    repeats = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    valid, empty = (ids >= -1).all(-1) & ~repeats.any(-1), (ids == -1).all(-1)
    logprobs = own.to(dtype).masked_fill(padding, -math.inf)
    tail = torch.full(ids.shape[:-1], -math.inf, dtype=dtype, device=ids.device)
    if member.tail == "bucket":
        total, mass = masses(ids, own)
        if member.tail_logprob is None:
            tail = mass.log()
        else:
            tail = member.tail_logprob.detach().to(torch.float64)
            total = total + tail.exp()
        if vocabulary is not None and ids.shape[-1] >= vocabulary:  # a row may list every token
            tail = tail.masked_fill((ids >= 0).sum(-1) == vocabulary, -math.inf)
        return _Listed(weight, ids, logprobs, tail.to(dtype), valid & ((total <= MOST) | empty))
    valid = valid & ((logprobs.amax(-1).abs() < math.inf) | empty)
    logprobs = logprobs * member.temperature  # of p^t, where t is the temperature of p
    if member.tail == "renormalize_teacher":
        temperatures = call.rows.teacher_temperature
        if temperatures is None:
            logprobs = logprobs / call.options.teacher_temperature
        else:
            logprobs = logprobs / temperatures.to(dtype).unsqueeze(-1)
            valid = valid & (temperatures > 0)
        logprobs = logprobs.log_softmax(-1).masked_fill(padding, -math.inf)
    return _Listed(weight, ids, logprobs, tail, valid)


def _log_sum(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).logsumexp(0)


def _union(listed: Sequence[_Listed]) -> tuple[Tensor, Tensor, None]:
    """(ids [..., sum K], logprobs, None) of sum_k w_k p_k, with p_k = 0 for tokens that teacher k does not list."""
    ids = listed[0].ids
    for each in listed[1:]:
        ids = support_union(ids, each.ids)
    terms = [math.log(each.weight) + each.lookup(ids)[0] for each in listed]
    return ids, _log_sum(terms), None


def _intersection(
    teacher: Ensemble,
    listed: Sequence[_Listed],
    dense: Sequence[tuple[Tensor | LinearTeacher, float]],
    call: LossCall,
    lead: torch.Size,
    vocabulary: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(ids, logprobs, tail) of the mean over the tokens that every TopK lists; tail is None for a geometric mean."""
    ids = min(listed, key=lambda each: each.ids.shape[-1]).ids
    found = [each.lookup(ids) for each in listed]
    for each, (_, columns) in zip(listed, found, strict=True):
        ids = ids.masked_fill(columns == each.ids.shape[-1], -1)
    is_padding = ids < 0
    geometric = teacher.mean == "geometric"
    terms, tails = [], []
    for each, (logprobs, columns) in zip(listed, found, strict=True):
        terms.append(each.weight * logprobs if geometric else math.log(each.weight) + logprobs)
        columns = columns.masked_fill(is_padding, each.ids.shape[-1])
        tails.append(math.log(each.weight) + each.log_mass_except(columns))
    for member, weight in dense:
        assert vocabulary is not None  # else combined() has raised
        logits, tail = _of_dense(member, ids, call, lead, vocabulary, terms[0].dtype, geometric)
        terms.append(weight * logits if geometric else math.log(weight) + logits)
        tails.append(math.log(weight) + tail)
    if geometric:
        return ids, torch.stack(terms).sum(0).masked_fill(is_padding, -math.inf), None
    return ids, _log_sum(terms).masked_fill(is_padding, -math.inf), _log_sum(tails)


def _of_dense(
    member: Tensor | LinearTeacher,
    ids: Tensor,
    call: LossCall,
    lead: torch.Size,
    vocabulary: int,
    dtype: torch.dtype,
    untempered: bool,
) -> tuple[Tensor, Tensor]:
    """(a dense teacher's log-probabilities of the tokens ids [..., K], the log of the mass of all other tokens [...]).

    Both are at the temperature of the call, or at temperature 1 if untempered. Only kept rows are computed, a chunk at
    a time; others have 0.
    """
    options, device = call.options, ids.device
    logprobs = torch.zeros(ids.shape, dtype=dtype, device=device)
    tails = torch.zeros(lead, dtype=dtype, device=device)
    temperature = 1.0 if untempered else options.teacher_temperature
    # Four tensors of this width exist at once: the logits, their tempered copy, the copy without the listed tokens, and
    # the exponentials of logsumexp.
    row_bytes = 4 * vocabulary * dtype.itemsize
    size = max(RESPONSE_BUDGET.of(device.type) // row_bytes, 1)
    for indices in Chunks.of(call.rows, lead, options.ignore_index, size, even=True):
        z = _logits(member, indices, lead, vocabulary, dtype, options)
        of_chunk = take(ids, lead, indices)
        of_chunk = of_chunk.masked_fill((of_chunk < 0) | (of_chunk >= vocabulary), -1)
        of_tokens, tail = taken(z / temperature, of_chunk)
        put(logprobs, lead, indices, of_tokens)
        put(tails, lead, indices, tail)
    return logprobs, tails


def _logits(
    member: Tensor | LinearTeacher,
    indices: slice | Tensor,
    lead: torch.Size,
    vocabulary: int,
    dtype: torch.dtype,
    options: Options,
) -> Tensor:
    """The logits [C, V] of these rows, scaled and soft-capped."""
    if isinstance(member, LinearTeacher):
        rows = take(member.hidden, lead, indices)
        out = torch.empty(len(rows), vocabulary, dtype=dtype, device=rows.device)
        bias = None if member.bias is None else member.bias[:vocabulary]
        z = make_logits(rows, member.weight[:vocabulary], bias, out)
    else:
        z = take(member, lead, indices)[:, :vocabulary].detach().to(dtype)
    z = z * options.teacher_logit_scale
    if options.teacher_softcap:
        z = options.teacher_softcap * torch.tanh(z / options.teacher_softcap)
    return z
