"""Log-probabilities, entropies and top tokens of logits that are computed a chunk of rows at a time; differentiable.

fastkd/logprobs.py calls :func:`logprobs`. The forward pass saves four numbers per row. The backward pass computes the
logits of each chunk again and overwrites them with their gradient. The losses instead compute their gradient in the
forward pass, and multiply it by one upstream gradient later. Here a row has several outputs, each with an upstream
gradient of its own, so that is impossible. Keeping the logits would avoid one of four matrix products, but take the
memory that chunks are there to avoid.

With z the tempered logits of a row, q their softmax, H its entropy and G the upstream gradients,

    dL/dz = sum_m G_m (1_m - q) - G_H q (log q + H)

where m is the target, each listed id and each top token. Every column gets e (a + b (z - max)), where e = exp(z - max)
and the row has two numbers a and b. The column of a token m also gets G_m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends import registry
from fastkd.backends.logprobs import Tempering, top_tokens
from fastkd.call.checks import check_ids, checking
from fastkd.call.contract import Rows, Shard, kept_rows, row_dtype
from fastkd.call.options import check_options
from fastkd.call.rows import Chunks, RowIndices, put, rows_at, take
from fastkd.core.tensors import copied, precision, savable
from fastkd.engine.chunks import Student, StudentChunks
from fastkd.engine.gradients import differentiable_once
from fastkd.engine.graphs import pack, unpack
from fastkd.engine.ops import by_name, made
from fastkd.engine.plan import Shape, plan, wide


class Request(NamedTuple):
    """What a call computes, apart from its tensors."""

    vocab_size: int  # the columns of this process, without padding
    temperature: float  # where Rows.temperature is None
    logit_scale: float
    softcap: float | None
    ignore_index: int
    entropy: bool
    topk: int
    chunk_size: int | None
    memory_budget: int | None
    shard: Shard | None = None

    @property
    def vocabulary(self) -> int:
        """The number of columns of all processes together, without padding."""
        return self.vocab_size if self.shard is None else self.shard.total

    @property
    def first_column(self) -> int:
        """The token that column 0 of this process stands for."""
        return 0 if self.shard is None else self.shard.first


# The numbers of a row that the forward pass saves for the backward pass.
STATISTICS = 4


class Outputs(NamedTuple):
    """The results of all rows; one that is not requested is None. :func:`logprobs` says what dropped rows contain."""

    target: Tensor | None
    entropy: Tensor | None
    gathered: Tensor | None
    topk_ids: Tensor | None
    topk_logprobs: Tensor | None
    # [..., 4], for the backward pass: the maximum of z, the sum of exp(z - max), the entropy, and z - max of the target
    # or 0; float64 where the device has it.
    statistics: Tensor


class Upstream(NamedTuple):
    """The upstream gradient of each differentiable output; None: the loss does not depend on it."""

    target: Tensor | None
    entropy: Tensor | None
    gathered: Tensor | None
    topk_logprobs: Tensor | None


class _Columns(NamedTuple):
    """Tokens [C, M] of a chunk's rows as columns of this process."""

    local: Tensor  # [C, M]; 0 for a token that this process does not have
    here: Tensor  # [C, M] bool: whether this process has the token

    @classmethod
    def of(cls, ids: Tensor, request: Request) -> _Columns:
        """The columns of these ids, of which some may be padding or invalid."""
        index = ids - request.first_column
        here = (index >= 0) & (index < request.vocab_size)
        return cls(index.masked_fill(~here, 0), here)

    def read(self, logits: Tensor) -> Tensor:
        """The logits [C, M] of the tokens; 0 for those of other processes."""
        if not logits.shape[1]:
            return logits.new_zeros(self.local.shape)
        return logits.gather(1, self.local).masked_fill_(~self.here, 0.0)


def _tempering(request: Request, rows: Rows) -> Tempering:
    return Tempering(
        request.logit_scale, request.softcap or 0.0, request.temperature, rows.temperature
    )


def _chunk_size(student: Student, request: Request, weight_gradient: bool, backend: str) -> int:
    hidden, weight, _ = student
    shard = request.shard
    shape = Shape(
        hidden.shape[:-1].numel(),
        request.vocab_size if shard is None else shard.widest,
        hidden.dtype,
        wide(hidden.dtype),
        0 if weight is None else hidden.shape[-1],
        weight_gradient=weight_gradient,
        device=hidden.device.type,
        backend="" if backend in ("cpu", "triton") and not request.topk else "portable",
    )
    return plan(shape, request.chunk_size, request.memory_budget).chunk_size


def _chunks(
    student: Student, rows: Rows, request: Request, weight_gradient: bool, backend: str
) -> tuple[Chunks, bool]:
    """(the chunks, whether they contain dropped rows); both passes use equal chunks, and so get the same bits."""
    hidden = student.hidden
    capturing = hidden.is_cuda and torch.cuda.is_current_stream_capturing()
    size = _chunk_size(student, request, weight_gradient, backend)
    lead, drops = hidden.shape[:-1], not capturing
    return Chunks.of(rows, lead, request.ignore_index, size, even=True, drops=drops), capturing


def _check_values(rows: Rows, request: Request) -> None:
    """Check the values of kept rows (FASTKD_CHECK=1), which waits for the device."""
    kept, vocabulary = kept_rows(rows, request.ignore_index), request.vocabulary

    def first_row(bad: Tensor) -> int | None:
        bad = (bad if kept is None else bad & kept).flatten()
        return int(bad.nonzero()[0]) if bad.any() else None

    labels, temperature = rows.labels, rows.temperature
    if labels is not None:
        row = first_row((labels < 0) | (labels >= vocabulary))
        if row is not None:
            raise ValueError(
                f"targets must be in [0, {vocabulary}) or ignore_index ({request.ignore_index}); "
                f"row {row} has {int(labels.flatten()[row])}"
            )
    if temperature is not None:
        row = first_row(~(temperature > 0))
        if row is not None:
            raise ValueError(
                f"temperature must be positive; row {row} has {float(temperature.flatten()[row])}"
            )
    if rows.ids is not None:
        check_ids(rows.ids, vocabulary, kept, "ids")


# ---- forward


def _unfilled(student: Student, rows: Rows, request: Request) -> Outputs:
    """The outputs, with the values of dropped rows everywhere."""
    hidden = student.hidden
    lead, device, dtype = hidden.shape[:-1], hidden.device, row_dtype(hidden.dtype)

    def zeros() -> Tensor:
        return torch.zeros(lead, dtype=dtype, device=device)

    def impossible(width: int) -> Tensor:
        return torch.full((*lead, width), -math.inf, dtype=dtype, device=device)

    top = None
    if request.topk:
        top = torch.full((*lead, request.topk), -1, dtype=torch.int64, device=device)
    return Outputs(
        None if rows.labels is None else zeros(),
        zeros() if request.entropy else None,
        None if rows.ids is None else impossible(rows.ids.shape[-1]),
        top,
        impossible(request.topk) if request.topk else None,
        torch.zeros((*lead, STATISTICS), dtype=precision(device), device=device),
    )


def compute(student: Student, rows: Rows, request: Request, weight_gradient: bool) -> Outputs:
    """All outputs of all rows. weight_gradient: whether the backward pass will compute the gradient of the weight."""
    hidden = student.hidden
    lead, device, logits_dtype = hidden.shape[:-1], hidden.device, wide(hidden.dtype)
    if checking():
        _check_values(rows, request)
    backend = registry.select_logprobs(device, logits_dtype)
    kernels = registry.load(backend)
    chunks, with_dropped = _chunks(student, rows, request, weight_gradient, backend)
    outputs = _unfilled(student, rows, request)
    student_chunks = StudentChunks(student, lead, request.vocab_size, (False,) * 3, False)
    buffer = kernels.empty((chunks.size, request.vocab_size), logits_dtype, device)

    def process_chunk(indices: RowIndices) -> None:
        chunk_rows = rows_at(rows, lead, indices)
        count = indices.stop - indices.start if isinstance(indices, slice) else indices.numel()
        logits = student_chunks.logits(indices, buffer[:count])
        statistics = kernels.logprob_statistics(
            logits, _tempering(request, chunk_rows), request.entropy
        )
        results = _results(logits, statistics, chunk_rows, request)
        kept = kept_rows(chunk_rows, request.ignore_index) if with_dropped else None
        for everywhere, values in zip(outputs, results, strict=True):
            if everywhere is None or values is None:
                continue
            if kept is not None:
                of_row = kept.view(-1, *(1,) * (values.dim() - 1))
                values = torch.where(of_row, values, take(everywhere, lead, indices))
            put(everywhere, lead, indices, values.to(everywhere.dtype))

    for indices in chunks:
        process_chunk(indices)
    return outputs


def _results(z: Tensor, statistics: Tensor, rows: Rows, request: Request) -> Outputs:
    """The outputs of a chunk, given its tempered logits [C, V] and their statistics."""
    labels, ids, k = rows.labels, rows.ids, request.topk
    listed = [] if labels is None else [labels.unsqueeze(-1)]
    listed += [] if ids is None else [ids]
    tokens = torch.cat(listed, -1) if listed else None
    found = None if tokens is None else _Columns.of(tokens, request).read(z).to(statistics.dtype)
    top_ids = top_z = None
    if k:
        local = min(k, z.shape[1])
        top_ids = top_tokens(z, local)
        top_z = z.gather(1, top_ids).to(statistics.dtype)
        top_ids = top_ids + request.first_column
    if request.shard is not None:
        statistics, found, top_z, top_ids = _exchanged(statistics, found, top_z, top_ids, request)
    maximum, exp_sum, centered = statistics.unbind(-1)
    log_sum = exp_sum.log()
    if rows.temperature is not None:  # an invalid temperature makes its row NaN
        log_sum = log_sum.masked_fill(~(rows.temperature > 0), math.nan)
    entropy = log_sum - centered / exp_sum

    def logprobs(values: Tensor) -> Tensor:
        return (values - maximum.unsqueeze(-1)) - log_sum.unsqueeze(-1)

    target = gathered = None
    target_gap = torch.zeros_like(maximum)
    if labels is not None and found is not None:
        target_gap = found[:, 0] - maximum
    if tokens is not None and found is not None:
        valid = (tokens >= 0) & (tokens < request.vocabulary)
        found = logprobs(found).masked_fill(~valid, math.nan)
        if labels is not None:
            target, found = found[:, 0], found[:, 1:]
        if ids is not None:
            gathered = found.masked_fill(ids == -1, -math.inf)
    return Outputs(
        target,
        entropy if request.entropy else None,
        gathered,
        top_ids,
        None if top_z is None else logprobs(top_z),
        torch.stack([maximum, exp_sum, entropy, target_gap], -1),
    )


def _exchanged(
    statistics: Tensor,
    found: Tensor | None,
    top_z: Tensor | None,
    top_ids: Tensor | None,
    request: Request,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The statistics, the logits of tokens and the top tokens of all processes, with the same bits on each.

    One all-gather; an id is exact in float64.
    """
    from fastkd.parallel.collectives import all_gather

    shard, k = request.shard, request.topk
    assert shard is not None
    parts = [statistics] if found is None else [statistics, found]
    if top_z is not None and top_ids is not None:
        missing = (0, k - top_z.shape[1])  # a shard may have fewer than k columns
        parts.append(torch.nn.functional.pad(top_z, missing, value=-math.inf))
        ids = top_ids.to(statistics.dtype)
        parts.append(torch.nn.functional.pad(ids, missing, value=float(shard.total)))
    gathered = all_gather(torch.cat(parts, -1), shard.group, "the statistics of rows").wait()
    of_ranks = gathered.split([part.shape[1] for part in parts], -1)
    maxima, exp_sums, centered = of_ranks[0].unbind(-1)  # [ranks, C]
    maximum = maxima.amax(0)
    gap = (maxima - maximum.masked_fill(maximum == -math.inf, 0.0)).clamp(min=-1e300)
    factor = gap.exp()
    merged = (maximum, (exp_sums * factor).sum(0), (factor * (centered + gap * exp_sums)).sum(0))
    if found is not None:
        found = of_ranks[1].sum(0)  # only one process has the token
    if top_z is not None:
        # A process of a higher rank has higher token ids, so a stable sort puts the lower of two ids with equal logits
        # first.
        values, ids = (each.transpose(0, 1).flatten(1) for each in of_ranks[-2:])
        order = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        top_z, top_ids = values.gather(1, order), ids.gather(1, order).to(torch.int64)
    return torch.stack(merged, -1), found, top_z, top_ids


# ---- backward


def gradients(
    student: Student,
    rows: Rows,
    request: Request,
    statistics: Tensor,
    topk_ids: Tensor | None,
    upstream: Upstream,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of the fields of Student, in their dtypes; None where they are not wanted."""
    hidden = student.hidden
    lead, device, logits_dtype = hidden.shape[:-1], hidden.device, wide(hidden.dtype)
    backend = registry.select_logprobs(device, logits_dtype)
    kernels = registry.load(backend)
    chunks, with_dropped = _chunks(student, rows, request, wanted[1], backend)
    factor = None
    if hidden.dtype == torch.float16:
        upstream, factor = _normalized(upstream, kept_rows(rows, request.ignore_index))
    student_chunks = StudentChunks(
        student, lead, request.vocab_size, wanted, False, chunks.count <= chunks.size
    )
    buffers = [kernels.empty((chunks.size, request.vocab_size), logits_dtype, device)]

    def process_chunk(indices: RowIndices) -> None:
        chunk_rows = rows_at(rows, lead, indices)
        count = indices.stop - indices.start if isinstance(indices, slice) else indices.numel()
        logits = student_chunks.logits(indices, buffers[0][:count])
        of_chunk = Upstream(*(None if g is None else take(g, lead, indices) for g in upstream))
        top = None if topk_ids is None else take(topk_ids, lead, indices)
        _overwrite_with_gradient(
            logits, take(statistics, lead, indices), chunk_rows, top, of_chunk, request, kernels
        )
        if with_dropped:
            kept = kept_rows(chunk_rows, request.ignore_index)
            if kept is not None:
                logits.masked_fill_(~kept.unsqueeze(-1), 0.0)
        student_chunks.add(indices, logits, None)

    for indices in chunks:
        process_chunk(indices)
    buffers.clear()  # frees it before finished() converts the gradients
    results = student_chunks.finished(chunks.indices)
    if factor is not None:
        for gradient in results:
            if gradient is not None:
                gradient.mul_(factor)
    return tuple(
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(results, student, strict=True)
    )


def _normalized(upstream: Upstream, kept: Tensor | None) -> tuple[Upstream, Tensor]:
    """(the upstream gradients over their largest magnitude, that magnitude).

    Without this division, small gradients of logits would underflow to 0 as float16 operands of a matrix product.
    """

    def of_kept(gradient: Tensor) -> Tensor:
        if kept is None:
            return gradient
        return torch.where(
            kept.view(*kept.shape, *(1,) * (gradient.dim() - kept.dim())), gradient, 0.0
        )

    given = [
        of_kept(gradient) for gradient in upstream if gradient is not None and gradient.numel()
    ]
    largest = [gradient.abs().amax() for gradient in given]
    factor = torch.stack(largest).amax() if largest else torch.ones(())
    factor = torch.where((factor > 0) & (factor < math.inf), factor, 1.0)
    return Upstream(*(None if g is None else g / factor for g in upstream)), factor


def _overwrite_with_gradient(
    logits: Tensor,
    statistics: Tensor,
    rows: Rows,
    topk_ids: Tensor | None,
    upstream: Upstream,
    request: Request,
    kernels: Any,
) -> None:
    """Overwrite the logits [C, V] of a chunk with their gradient."""
    wide_dtype = statistics.dtype
    maximum, exp_sum, entropy, target_gap = statistics.unbind(-1)
    of_target, of_entropy, of_gathered, of_top = (
        None if gradient is None else gradient.to(wide_dtype) for gradient in upstream
    )
    temperature: float | Tensor = request.temperature
    if rows.temperature is not None:
        valid = rows.temperature > 0
        temperature = rows.temperature.to(wide_dtype).masked_fill(~valid, math.nan)
    # For each group of tokens: ids [C, M] and the upstream gradients [C, M] of their log-probabilities.
    groups: list[tuple[Tensor, Tensor]] = []
    if rows.labels is not None and of_target is not None:
        invalid = (rows.labels < 0) | (rows.labels >= request.vocabulary)
        of_target = of_target.masked_fill(invalid, math.nan)
        groups.append((rows.labels.unsqueeze(-1), of_target.unsqueeze(-1)))
    if rows.ids is not None and of_gathered is not None:
        of_gathered = of_gathered.masked_fill(rows.ids == -1, 0.0)
        invalid = (rows.ids < -1) | (rows.ids >= request.vocabulary)
        groups.append((rows.ids, of_gathered.masked_fill(invalid, math.nan)))
    if topk_ids is not None and of_top is not None:
        groups.append((topk_ids, of_top))
    total = sum((gradient.sum(-1) for _, gradient in groups), torch.zeros_like(exp_sum))
    a, b = -total / exp_sum, torch.zeros_like(total)
    if of_entropy is not None:
        a = a - of_entropy * (entropy - exp_sum.log()) / exp_sum
        b = -of_entropy / exp_sum
    a, b = a / temperature, b / temperature
    tempering = _tempering(request, rows)
    columns = [_Columns.of(ids, request) for ids, _ in groups]
    raw = [column.read(logits).to(wide_dtype) for column in columns]
    kernels.logprob_gradients(logits, tempering, maximum, torch.stack([a, b], -1))
    if not logits.shape[1]:
        return
    is_target = of_target is not None
    for column, x, (_, gradient) in zip(columns, raw, groups, strict=True):
        capped = tempering.cap_(x)
        slope = tempering.slope(capped)
        own = (
            gradient
            * slope
            / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
        )
        if is_target:
            # Where the target has almost all probability, its own gradient cancels the share of all columns, so the
            # sum is computed in float64. Its z is that of the forward pass, which is rounded as the maximum is.
            gap = target_gap.unsqueeze(-1).clamp(min=-1e4)
            own = own + gap.exp() * (a.unsqueeze(-1) + b.unsqueeze(-1) * gap) * slope
            own = torch.where(column.here, own, logits.gather(1, column.local).to(wide_dtype))
            logits.scatter_(1, column.local, own.to(logits.dtype))
            is_target = False
        else:
            own = own.masked_fill(~column.here, 0.0)
            # The ids of a row are distinct, and padding and ids of other processes add 0, so the order of the additions
            # does not change the result.
            logits.scatter_add_(1, column.local, own.to(logits.dtype))


# ---- differentiation


class _Differentiable(torch.autograd.Function):
    """apply(request, rows, *student) returns the fields of Outputs but the last."""

    @staticmethod
    def forward(ctx: Any, request: Request, rows: Rows, *student: Tensor | None) -> Any:
        """Compute the outputs, and save the inputs and the statistics of the rows."""
        ctx.request, ctx.wanted = request, ctx.needs_input_grad[2:]
        outputs = compute(Student(*student), rows, request, ctx.wanted[1])  # type: ignore[arg-type]  # hidden is given
        ctx.save_for_backward(*savable(*student, *rows), outputs.statistics, outputs.topk_ids)
        ctx.set_materialize_grads(False)
        if outputs.topk_ids is not None:
            ctx.mark_non_differentiable(outputs.topk_ids)
        return outputs[:-1]

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the logits again, and the gradients from them."""
        target, entropy, gathered, _, topk_logprobs = upstreams
        upstream = Upstream(target, entropy, gathered, topk_logprobs)
        if all(gradient is None for gradient in upstream):
            return (None,) * 5
        *tensors, statistics, topk_ids = ctx.saved_tensors
        student, rows = Student(*tensors[:3]), Rows(*tensors[3:])
        with torch.no_grad():
            results = gradients(
                student, rows, ctx.request, statistics, topk_ids, upstream, ctx.wanted
            )
        return (None, None, *differentiable_once(results))


@torch.library.custom_op("fastkd::logprobs", mutates_args=())
def logprobs_op(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor | None,
    kept: Tensor | None,
    temperature: Tensor | None,
    ids: Tensor | None,
    wanted: list[bool],
    vocab_size: int,
    ignore_index: int,
    entropy: bool,
    topk: int,
    chunk_size: int | None,
    memory_budget: int | None,
    kinds: str,
    constants: list[float],
    integers: list[int],
    symbols: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of Outputs; one that is not requested is an empty tensor."""
    request = _request(
        vocab_size, ignore_index, entropy, topk, chunk_size, memory_budget,
        unpack(kinds, constants, integers, symbols),
    )  # fmt: skip
    rows = Rows(labels, kept, temperature, ids=ids)
    outputs = compute(Student(hidden, weight, bias), rows, request, wanted[1])
    return tuple(hidden.new_empty(0) if x is None else x for x in outputs)  # type: ignore[return-value]


@torch.library.custom_op("fastkd::logprobs_gradient", mutates_args=())
def logprobs_gradient_op(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor | None,
    kept: Tensor | None,
    temperature: Tensor | None,
    ids: Tensor | None,
    wanted: list[bool],
    vocab_size: int,
    ignore_index: int,
    entropy: bool,
    topk: int,
    chunk_size: int | None,
    memory_budget: int | None,
    kinds: str,
    constants: list[float],
    integers: list[int],
    symbols: list[Tensor],
    statistics: Tensor,
    topk_ids: Tensor | None,
    of_target: Tensor | None,
    of_entropy: Tensor | None,
    of_gathered: Tensor | None,
    of_topk: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; one that is not wanted is an empty tensor."""
    request = _request(
        vocab_size, ignore_index, entropy, topk, chunk_size, memory_budget,
        unpack(kinds, constants, integers, symbols),
    )  # fmt: skip
    rows = Rows(labels, kept, temperature, ids=ids)
    upstream = Upstream(of_target, of_entropy, of_gathered, of_topk)
    student = Student(hidden, weight, bias)
    results = gradients(student, rows, request, statistics, topk_ids, upstream, wanted)
    return tuple(hidden.new_empty(0) if x is None else x for x in results)  # type: ignore[return-value]


def _request(
    vocab_size: int,
    ignore_index: int,
    entropy: bool,
    topk: int,
    chunk_size: int | None,
    memory_budget: int | None,
    numbers: Sequence[Any],
) -> Request:
    """The request of an op, whose numbers are checked now that they are known."""
    temperature, logit_scale, softcap = numbers
    values = check_options(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    return Request(
        vocab_size, **values, ignore_index=ignore_index, entropy=entropy, topk=topk,
        chunk_size=chunk_size, memory_budget=memory_budget,
    )  # fmt: skip


@logprobs_op.register_fake
def _logprobs_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = by_name(logprobs_op, arguments)
    hidden, ids, k = inputs["hidden"], inputs["ids"], inputs["topk"]
    lead, dtype = hidden.shape[:-1], row_dtype(hidden.dtype)
    width = 0 if ids is None else ids.shape[-1]
    return (
        made(hidden, lead, dtype, inputs["labels"] is not None),
        made(hidden, lead, dtype, inputs["entropy"]),
        made(hidden, (*lead, width), dtype, ids is not None),
        made(hidden, (*lead, k), torch.int64, k > 0),
        made(hidden, (*lead, k), dtype, k > 0),
        made(hidden, (*lead, STATISTICS), precision(hidden.device)),
    )


@logprobs_gradient_op.register_fake
def _logprobs_gradient_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = by_name(logprobs_gradient_op, arguments)
    student = (inputs["hidden"], inputs["weight"], inputs["bias"])
    return tuple(
        made(inputs["hidden"], x.shape, x.dtype)
        if x is not None and wants
        else inputs["hidden"].new_empty(0)
        for x, wants in zip(student, inputs["wanted"], strict=True)
    )


_TENSORS = ("hidden", "weight", "bias", "labels", "kept", "temperature", "ids")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    arguments = by_name(logprobs_op, inputs)
    *_, topk_ids, _, statistics = output
    wanted = dict(zip(_TENSORS, arguments["wanted"], strict=False))
    # A graph cannot tell whether a constant is an inference tensor, which autograd could not save.
    tensors = [
        x if x is None or wanted.get(name) else copied(x)
        for name, x in arguments.items()
        if name in _TENSORS
    ]
    symbols = arguments["symbols"]
    ctx.save_for_backward(*tensors, *symbols, topk_ids, statistics)
    ctx.others = {name: x for name, x in arguments.items() if name not in (*_TENSORS, "symbols")}
    ctx.count = len(symbols)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *upstreams: Tensor | None) -> tuple[Any, ...]:
    of_target, of_entropy, of_gathered, _, of_topk, _ = upstreams
    others = ctx.others
    # torch takes any empty list for a list of tensors, and expects one gradient per tensor of a list.
    nothing: tuple[Any, ...] = (
        *(None if x or not isinstance(x, list) else [] for x in others.values()),
    )
    symbols = [None] * ctx.count
    if all(x is None for x in (of_target, of_entropy, of_gathered, of_topk)):
        return (*(None,) * len(_TENSORS), *nothing, symbols)
    saved = ctx.saved_tensors
    tensors, rest = saved[: len(_TENSORS)], saved[len(_TENSORS) :]
    computed = logprobs_gradient_op(
        **dict(zip(_TENSORS, tensors, strict=True)), **others, symbols=list(rest[: ctx.count]),
        statistics=rest[-1], topk_ids=rest[-2] if others["topk"] else None,
        of_target=of_target, of_entropy=of_entropy, of_gathered=of_gathered, of_topk=of_topk,
    )  # fmt: skip
    of_student = (x if wants else None for x, wants in zip(computed, others["wanted"], strict=True))
    return (*of_student, *(None,) * (len(_TENSORS) - 3), *nothing, symbols)


logprobs_op.register_autograd(_differentiate, setup_context=_save)


def logprobs(student: Student, rows: Rows, request: Request) -> tuple[Tensor | None, ...]:
    """The fields of Outputs but the last; those that Upstream lists are differentiable.

    In dropped rows, target and entropy are 0, log-probabilities of ids and of top tokens -inf, and topk_ids -1.
    """
    if torch.compiler.is_compiling() and request.shard is None:
        enabled = torch.is_grad_enabled()
        wanted = [enabled and x is not None and x.requires_grad for x in student]
        numbers = pack((request.temperature, request.logit_scale, request.softcap))
        results = logprobs_op(
            *student, rows.labels, rows.weight, rows.temperature, rows.ids, wanted,
            request.vocab_size, request.ignore_index, request.entropy, request.topk,
            request.chunk_size, request.memory_budget, *numbers,
        )  # fmt: skip
        requested = (
            rows.labels is not None, request.entropy, rows.ids is not None, request.topk > 0, request.topk > 0,
        )  # fmt: skip
        return tuple(x if wants else None for x, wants in zip(results[:-1], requested, strict=True))
    # If the graph broke during the validation, the numbers have not been checked.
    checked = check_options(
        temperature=request.temperature, logit_scale=request.logit_scale, softcap=request.softcap
    )
    return _Differentiable.apply(request._replace(**checked), rows, *student)
