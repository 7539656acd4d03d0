"""Losses in chunks of rows: from hidden states and an lm_head, and against teachers that have to be made into logits.

Read bottom to top: :func:`kd_chunks` is what fastkd.functional calls, KDChunks differentiates in eager mode and
kd_chunks_op under torch.compile; both plan the chunks, run fastkd/engine/chunks.py, and follow
fastkd/engine/autograd.py: gradients in the forward, times the upstream gradient on the device. Two cases are computed
in the backward, with the upstream gradient inside: a loss per row whose weight requires grad (the weight's gradient is
a sum over rows), and float16 logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends import registry
from fastkd.call.checks import Numbers, Prepared, settled
from fastkd.call.contract import Options, Rows, Want, row_dtype
from fastkd.core.tensors import copied, savable
from fastkd.engine import autograd
from fastkd.engine.backend import kernels_for
from fastkd.engine.chunks import Chunked, Student, chunks_of_rows, saved_dtype
from fastkd.engine.plan import TOPK_BYTES, MemoryPlan, Shape, checked_sizes, plan, wide
from fastkd.teachers import Ensemble, LinearTeacher, Teacher, flatten, unflatten, weights_of


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as autocast casts the operands of a matrix product; float64 it leaves alone."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in tensors
    ]


def autocast_teacher(teacher: Teacher) -> Teacher:
    """Likewise: a backward may run where autocast is no longer on."""
    if isinstance(teacher, LinearTeacher):
        hidden, weight, bias = autocast(teacher.hidden, teacher.weight, teacher.bias)
        assert hidden is not None and weight is not None
        return LinearTeacher(hidden, weight, bias)
    if isinstance(teacher, Ensemble):
        members: list[Any] = [
            autocast_teacher(member) if isinstance(member, LinearTeacher) else member
            for member in teacher.teachers
        ]
        return Ensemble(members, teacher.weights, teacher.mean)
    return teacher


class _Call(NamedTuple):
    """What a forward leaves to its backward, beside tensors."""

    options: Options
    want: Want
    wanted: tuple[bool, ...]  # of Student's fields
    backend: str
    teacher: str  # how its tensors go together (fastkd.teachers.flatten)
    weights: Sequence[float]  # of an ensemble
    chunk_size: int | None
    memory_budget: int | None
    logits_dtype: torch.dtype  # of the student

    def row_dtype(self, teacher: Sequence[Tensor]) -> torch.dtype:
        """Of losses, and of a teacher's logits."""
        return row_dtype(self.logits_dtype, *(tensor.dtype for tensor in teacher))

    def chosen(self, student: Student, teacher: Sequence[Tensor]) -> str:
        """The backend that serves it."""
        device, dtype = student.hidden.device.type, self.row_dtype(teacher)
        divergence = self.options.divergence
        return registry.select(self.backend, device, self.logits_dtype, dtype, divergence)

    def run(
        self, student: Student, tensors: Sequence[Tensor], rows: Rows, backward: bool = False
    ) -> Chunked:
        """Plan the chunks, and loop over them; a forward leaves deferred gradients to the backward."""
        backend, teacher = (
            self.chosen(student, tensors),
            unflatten(tensors, self.teacher, self.weights),
        )
        later = self.want.deferred and not backward
        return chunks_of_rows(
            student,
            teacher,
            rows,
            self.options,
            self.want,
            (False,) * 3 if later else self.wanted,
            kernels_for(backend, self.options),
            self._plan(student, teacher, rows, backend).chunk_size,
            self.logits_dtype,
            self.row_dtype(tensors),
        )

    def _plan(
        self,
        given: Student,
        teacher: Tensor | LinearTeacher | Ensemble,
        rows: Rows,
        backend: str,
    ) -> MemoryPlan:
        student, weight, _ = given
        shard = self.options.shard
        # Chunks have collectives in them: all processes plan as the one with the most columns does.
        vocabulary = self.options.vocab_size if shard is None else shard.widest
        columns, row_bytes, hidden = 0, 0, 0
        if isinstance(teacher, Ensemble):
            linear = [member for member in teacher.teachers if isinstance(member, LinearTeacher)]
            columns = vocabulary * (2 if linear else 1)
            hidden = max((member.hidden.shape[-1] for member in linear), default=0)
        elif isinstance(teacher, LinearTeacher):
            columns, hidden = vocabulary, teacher.hidden.shape[-1]
        elif rows.ids is not None:
            row_bytes = TOPK_BYTES * rows.ids.shape[-1]
        else:
            row_bytes = vocabulary * teacher.dtype.itemsize
        if weight is None:  # rows that are packed are copied, and padding is put beside a gradient
            row_bytes += 2 * student.shape[-1] * student.dtype.itemsize
        shape = Shape(
            student.shape[:-1].numel(),
            vocabulary,
            student.dtype,
            self.logits_dtype,
            0 if weight is None else student.shape[-1],
            columns,
            row_bytes,
            hidden,
            sum(tensor.numel() * tensor.itemsize for tensor in flatten(teacher)[0]),
            self.wanted[1],
            student.device.type,
            backend,
        )
        return plan(shape, self.chunk_size, self.memory_budget)


class KDChunks(torch.autograd.Function):
    """Eager mode. Returns (loss, distillation, cross_entropy, student_entropy); loss is [...] or its 0-dim sum."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        teacher: list[Tensor],
        rows: Rows,
        call: _Call,
        summed: bool,
    ) -> tuple[Tensor | None, ...]:
        """The loss and, unless they are deferred, its gradients."""
        student = Student(hidden, weight, bias)
        result = call.run(student, teacher, rows)
        kept = autograd.rows_to_keep(rows, call.want, result.loss, summed)
        if call.want.deferred:
            ctx.save_for_backward(*savable(*kept, *student, *teacher))
        else:
            ctx.save_for_backward(*savable(*kept), *result.gradients)
            if call.want.inplace:
                torch.autograd.graph.increment_version(hidden)
        ctx.call = call._replace(backend=call.chosen(student, teacher))
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in student]
        ctx.set_materialize_grads(False)
        parts = result[2:5]
        ctx.mark_non_differentiable(*(part for part in parts if part is not None))
        return (result.total if summed else result.loss, *parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """The saved gradients times upstream, or the deferred ones with upstream inside."""
        if upstream is None:
            return (None,) * 7
        with torch.no_grad():
            gradients = KDChunks._gradients(ctx, upstream)
        return (*autograd.differentiable_once(gradients), *(None,) * 4)

    @staticmethod
    def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved_tensors
        rows, saved = Rows(*saved[: len(Rows._fields)]), saved[len(Rows._fields) :]
        upstream = autograd.of_counted_rows(upstream, rows, call.options.ignore_index)
        if call.want.deferred:
            hidden, weight, bias, *teacher = saved
            if autograd.graph_is_kept():
                call = call._replace(
                    want=call.want._replace(inplace=False)
                )  # logits are needed again
            rows = autograd.with_upstream(rows, upstream)
            gradients = call.run(
                Student(hidden, weight, bias), teacher, rows, backward=True
            ).gradients
            if call.want.inplace:
                torch.autograd.graph.increment_version(hidden)
        else:
            gradients = autograd.scaled(registry.load(call.backend), saved, upstream)
        return tuple(
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )


# The custom op; autograd.kd_rows_op says how options travel. What is planned, and how many rows are packed, depends on
# sizes and values that a graph leaves open, and so is decided when the op runs.


@torch.library.custom_op("fastkd::kd_chunks", mutates_args=())
def kd_chunks_op(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    teacher: list[Tensor],
    labels: Tensor | None,
    row_weight: Tensor | None,
    temperature: Tensor | None,
    teacher_temperature: Tensor | None,
    scale: Tensor | None,
    ids: Tensor | None,
    tail_logprob: Tensor | None,
    backend: str,
    form: str,
    chunk_size: int | None,
    memory_budget: int | None,
    members: int,
    wanted: list[bool],
    logits_dtype: torch.dtype,
    backward: bool,
    names: str,
    constants: list[float],
    integers: list[int],
    symbols: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Chunked and Gradients as one tuple; what is not wanted is an empty tensor."""
    rows = Rows(labels, row_weight, temperature, teacher_temperature, scale, ids, tail_logprob)
    schema = autograd.Schema(names, constants, integers, symbols)
    options, want, weights = autograd.from_schema(schema, rows, members)
    call = _Call(
        options,
        want,
        tuple(wanted),
        backend,
        form,
        weights,
        chunk_size,
        memory_budget,
        logits_dtype,
    )
    result = call.run(Student(hidden, weight, bias), teacher, rows, backward)
    return tuple(  # type: ignore[return-value]
        hidden.new_empty(0) if tensor is None else tensor
        for tensor in (*result[:-1], *result.gradients)
    )


@kd_chunks_op.register_fake
def _kd_chunks_fake(hidden, weight, bias, teacher, *others):  # type: ignore[no-untyped-def]
    *_, wanted, logits_dtype, backward, _, _, integers, _ = others
    want = autograd.wanted_of(integers)
    dtype = row_dtype(logits_dtype, *(tensor.dtype for tensor in teacher))
    lead = hidden.shape[:-1]

    def made(shape: Sequence[int], dtype: torch.dtype, present: bool) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype) if present else hidden.new_empty(0)

    gradients = [
        hidden.new_empty(0)
        if tensor is None
        else made(
            tensor.shape,
            saved_dtype(tensor, weight is None),
            present and (backward or not want.deferred),
        )
        for tensor, present in zip((hidden, weight, bias), wanted, strict=True)
    ]
    return (
        made(lead, dtype, True),
        made((), dtype, True),
        *(made(lead, dtype, want.parts) for _ in range(3)),
        *gradients,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, teacher, *rest = inputs
    rows, settings = Rows(*rest[: len(Rows._fields)]), rest[len(Rows._fields) :]
    *settings, names, constants, integers, symbols = settings
    *_, ctx.wanted, _, _ = settings
    ctx.want, ctx.ignore_index = autograd.wanted_of(integers), autograd.ignored_by(integers)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
    kept = list(output[5:])
    if ctx.want.deferred:
        pairs = zip((hidden, weight, bias), ctx.wanted, strict=True)
        kept = [x if x is None or trained else copied(x) for x, trained in pairs]
        kept += [*map(copied, teacher), *symbols]
    ctx.save_for_backward(*(row if row is None else copied(row) for row in rows), *kept)
    ctx.settings = (*settings[:-1], True, names, constants, integers)  # of the second call
    ctx.teachers, ctx.symbols = len(teacher), len(symbols)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, loss: Tensor | None, total: Tensor | None, *_: Any
) -> tuple[Tensor | list[None] | None, ...]:
    upstream = (
        loss if total is None else total
    )  # used per row or summed, never both (see kd_chunks)
    of_schema = autograd.gradients_of_schema(ctx.settings[-2], ctx.symbols)
    if upstream is None:
        return (*(None,) * 3, [None] * ctx.teachers, *(None,) * 15, *of_schema)
    saved = ctx.saved_tensors
    rows, saved = Rows(*saved[: len(Rows._fields)]), saved[len(Rows._fields) :]
    upstream = autograd.of_counted_rows(upstream, rows, ctx.ignore_index)
    if ctx.want.deferred:
        hidden, weight, bias, *others = saved
        teacher, symbols = others[: ctx.teachers], others[ctx.teachers :]
        rows = autograd.with_upstream(rows, upstream)
        results = kd_chunks_op(hidden, weight, bias, teacher, *rows, *ctx.settings, symbols)
        gradients = results[5:]
    else:
        factor = upstream.unsqueeze(-1) if upstream.dim() else upstream
        gradients = tuple(gradient * factor for gradient in saved)
    return (
        *(
            gradient.to(dtype) if present else None
            for gradient, dtype, present in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)
        ),
        [None] * ctx.teachers,
        *(None,) * 15,
        *of_schema,
    )


kd_chunks_op.register_autograd(_backward, setup_context=_setup_context)


def kd_chunks(
    student: Student,
    teacher: Teacher,
    prepared: Prepared,
    want: Want,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor | None, ...]:
    """(loss, distillation, cross_entropy, student_entropy), differentiable; the loss is [...] or its 0-dim sum.

    The last three arguments are those of fused_linear_kd_loss.
    """
    options, rows, _, backend, summed, numbers = prepared
    if (
        isinstance(teacher, Ensemble)
        and teacher.mean == "arithmetic"
        and not options.divergence.normalized
    ):
        raise ValueError(
            f"the divergence {options.divergence.name!r} is one of logits, and the arithmetic mean of an Ensemble is "
            "one of probabilities; use mean='geometric'"
        )
    tensors, form = flatten(teacher)
    weights = weights_of(teacher)
    wanted = tuple(
        want.student_gradient and tensor is not None and tensor.requires_grad for tensor in student
    )
    dense_half = student.weight is None and student.hidden.dtype == torch.float16
    want = want._replace(deferred=any(wanted) and (dense_half or (not summed and any(wanted[1:]))))
    if logits_dtype is None:
        dtype = student.hidden.dtype
        logits_dtype = dtype if student.weight is None else wide(dtype)
    chunk_size, memory_budget = checked_sizes(chunk_size, memory_budget)
    compiling = torch.compiler.is_compiling()
    if compiling and numbers is not None and not want.inplace:
        results = kd_chunks_op(
            *student,
            tensors,
            *rows,
            backend,
            form,
            chunk_size,
            memory_budget,
            len(weights),
            list(wanted),
            logits_dtype,
            False,
            *autograd.as_schema(options, want, numbers, weights),
        )
        loss = results[1] if summed else results[0]
        return (loss, *(part.detach() if want.parts else None for part in results[2:5]))
    call = _Call(
        options, want, wanted, backend, form, weights, chunk_size, memory_budget, logits_dtype
    )
    if numbers is None and not compiling:
        return KDChunks.apply(*student, tensors, rows, call, summed)
    # As in fastkd.engine.autograd: the graph was broken inside the validation.
    return torch.compiler.disable(_run_eagerly)(numbers, *student, tensors, rows, call, summed)


def _run_eagerly(
    numbers: Numbers | None,
    hidden: Tensor,
    weight: Any,
    bias: Any,
    teacher: list[Tensor],
    rows: Rows,
    call: _Call,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    if numbers is not None:
        call = call._replace(options=settled(call.options, numbers, rows))
    return KDChunks.apply(hidden, weight, bias, teacher, rows, call, *rest)
