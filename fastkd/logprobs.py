"""Log-probabilities, entropies and top tokens of a student, from hidden states and an lm_head.

On-policy distillation reads a few numbers per position from the student: the log-probability of the sampled token, the
entropy, the log-probabilities of tokens that a teacher lists, and the tokens that the student itself prefers.
:func:`fused_linear_logprobs` computes them in one pass of chunks, without ever holding all logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastkd.call.checks import (
    check_head,
    check_logits,
    check_rows,
    check_vocabulary,
)
from fastkd.call.contract import Rows
from fastkd.call.options import check_options
from fastkd.core.scalars import check_flag, check_int, plain
from fastkd.core.tensors import check_readable
from fastkd.engine import logprobs
from fastkd.engine.chunks import Student
from fastkd.engine.linear import autocast
from fastkd.engine.plan import checked_sizes
from fastkd.functional import not_compiled_over_processes
from fastkd.teachers.tensors import FLOATS, check_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class LogProbs(NamedTuple):
    """What :func:`fused_linear_logprobs` returns; a field is None if it was not requested."""

    target: Tensor | None  # [...], log q of targets; 0 in dropped rows
    entropy: Tensor | None  # [...], entropy of q in nats; 0 in dropped rows
    gathered: Tensor | None  # [..., K], log q of ids; -inf for padding and in dropped rows
    topk_ids: Tensor | None  # [..., k] int64, the top tokens, best first; -1 in dropped rows
    topk_logprobs: Tensor | None  # [..., k], log q of topk_ids; -inf in dropped rows


class StudentTopK(NamedTuple):
    """What :func:`student_topk` returns."""

    ids: Tensor  # [..., k] int64, the most probable tokens, best first; -1 in dropped rows
    logprobs: Tensor  # [..., k], their log-probabilities; -inf in dropped rows


@not_compiled_over_processes
def fused_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    entropy: bool = True,
    topk: int = 0,
    vocab_size: int | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    sequence_dim: int | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> LogProbs:
    r"""Log-probabilities, entropy and top tokens of q = softmax(z), where z are the tempered logits of an lm_head.

        z = softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap) / temperature

    target, entropy, gathered and topk_logprobs are differentiable with respect to hidden, weight and bias. The choice
    of the top tokens is not. If G_m is the upstream gradient of log q of token m, and G_H that of the entropy H, the
    gradient with respect to z is

        sum_m G_m (1_m - q) - G_H q (log q + H)

    Dropped rows are removed first. The other rows are processed in chunks, whose logits are float32 (float64 for
    float64). The forward pass saves its inputs and four numbers per row. The backward pass computes the logits of each
    chunk again, and overwrites them with their gradient. A training step therefore costs four matrix products, or three
    if weight is frozen: one more than with saved logits. Between the passes, the call holds no logits. Since the
    backward pass reads weight again, weight must not change before it, and the whole weight that was gathered from FSDP
    shards is kept until then.

    Args:
        hidden: [..., H], float32, bfloat16 or float16; float64 is computed in float64. Any strides are allowed.
        weight: [V, H], the lm_head, with the dtype and device of hidden; under autocast both are cast to the autocast
            dtype. A DTensor sharded by FSDP is gathered once per call, and its gradient is averaged over the processes.
        targets: [...] int64, the token of each row for `target`: the one that the row predicts. A row whose target is
            ignore_index is dropped. None: `target` is not computed.
        ids: [..., K] int64 or int32, the tokens of each row for `gathered`, distinct within a row; -1 is padding.
            None: `gathered` is not computed.
        bias: [V], or None.
        temperature: T > 0, a number or a float tensor [...] with one value per row.
        logit_scale: factor of the logits, applied before softcap.
        softcap: c > 0; the scaled logits become c tanh(logits / c).
        mask: [...] bool; rows where it is False are dropped. Dropped rows may contain NaN.
        ignore_index: the target that drops a row.
        entropy: whether to compute the entropy.
        topk: how many of the most probable tokens to return. Of tokens with equal logits, the lower id comes first.
        vocab_size: number of leading rows of weight that count, for models that pad their vocabulary. With
            process_group it is the size of the whole vocabulary.
        process_group: the torch.distributed group, or one-dimensional mesh, whose processes share the vocabulary:
            weight is then [V_r, H], this process's part of a column-parallel lm_head, in rank order, and may be
            uneven. All other arguments are equal on every process; targets and ids count tokens of the whole
            vocabulary. Each process gets the same outputs, bit for bit, and the gradient of its own part of weight. The
            gradient of hidden is summed over the processes. Each chunk needs one all-gather of a few numbers per row.
        sequence_dim: for sequence-parallel hidden states, the dimension of hidden along which the processes of
            process_group hold equal parts of the rows. The parts are gathered, and their gradient is scattered. The
            outputs and all other per-row arguments cover all rows.
        chunk_size: rows per chunk; takes precedence over memory_budget. None: as many as memory_budget allows.
        memory_budget: bytes that each pass may hold beyond its inputs, outputs and gradients; None: 384 MiB on a CPU,
            2112 MiB elsewhere. A budget too small for one row raises. :func:`fastkd.memory_plan` with teacher="none"
            itemizes them.

    Returns:
        :class:`LogProbs`, in float32 (float64 for float64). The log-probability of an invalid target or id is NaN, and
        so is everything in a row whose element of a temperature tensor is not positive, because raising an error would
        require waiting for the device; with FASTKD_CHECK=1 the call waits and raises.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.parallel.CollectiveError: another process has stopped, or did not make this call in time.
        RuntimeError: another process of the group has raised.
    """
    from fastkd.parallel import layout, share

    group = layout.group_of_head(process_group, hidden, weight)
    hidden_argument = hidden
    hidden = layout.local_hidden("hidden", hidden, group)
    weight = layout.local_weight("weight", weight, group)
    bias = layout.local_weight("bias", bias, group)
    with share.agreed_by(group) as agreement:
        sequence = layout.sequence_of(hidden_argument, group, sequence_dim, "hidden")
        local_hidden = hidden
        if sequence is not None:
            hidden = sequence.stand_in(local_hidden)
        check_head(hidden, weight, bias, "")
        hidden, head, bias = autocast(hidden, weight, bias)  # type: ignore[assignment]  # a tensor stays one
        student = Student(hidden, head, bias)
        check_flag("entropy", entropy)
        if targets is None and ids is None and not entropy and not topk:
            raise ValueError("nothing is requested: pass targets or ids, entropy=True, or topk > 0")
        rows, request = _prepared(
            student, "hidden", layout.local("targets", targets, None, group),
            layout.local("ids", ids, None, group), temperature, logit_scale, softcap,
            layout.local("mask", mask, None, group), ignore_index, entropy,
            _count("topk", topk, 0), chunk_size, memory_budget,
        )  # fmt: skip
        if group is None:
            vocabulary = check_vocabulary(vocab_size, {"weight": weight.shape[0]})
            request = request._replace(vocab_size=vocabulary)
    if agreement is not None:
        request = _shared(
            agreement, student, "weight", weight.shape[0], rows, request, vocab_size, sequence_dim
        )
        if sequence is not None:
            (all_hidden,) = autocast(sequence.gathered(local_hidden))
            assert all_hidden is not None
        else:
            all_hidden = layout.summed_gradient(student.hidden, hidden_argument, group)
        student = student._replace(hidden=all_hidden)
    _check_k("topk", request)
    return LogProbs(*logprobs.logprobs(student, rows, request))


@not_compiled_over_processes
def student_topk(
    student: Tensor,
    weight: Tensor | None = None,
    *,
    k: int,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> StudentTopK:
    """The k most probable tokens of each row and their log-probabilities, without gradients.

    Ask a teacher server to score these tokens, or use them as the support of a divergence.
    :func:`fastkd.support_union` joins them with the tokens that a teacher lists.

    Args:
        student: hidden states [..., H] if weight is given, else logits [..., V].
        weight: [V, H], the lm_head; the logits are then computed a chunk of rows at a time. None: student holds logits.
        k: how many tokens, at most the size of the vocabulary. Of tokens with equal logits, the lower id comes first,
            on every device and for any number of processes.
        bias: [V], or None; only with weight.
        temperature: as in :func:`fused_linear_logprobs`. It changes the log-probabilities, but not the ids.
        logit_scale: as above. A negative one reverses the order of the tokens.
        softcap: as above.
        mask: as above.
        vocab_size: as above; padding is never among the tokens.
        process_group: as above. Logits are then [..., V_r], this process's columns.
        chunk_size: as above.
        memory_budget: as above.

    Returns:
        :class:`StudentTopK`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.parallel.CollectiveError: another process has stopped, or did not make this call in time.
        RuntimeError: another process of the group has raised.
    """
    from fastkd.parallel import layout, share

    with torch.no_grad():
        if weight is None:
            name = "student"
            group = layout.group_of(process_group, student)
            student = layout.local("student", student, -1, group)
        else:
            name = "weight"
            group = layout.group_of_head(process_group, student, weight)
            student = layout.local_hidden("student", student, group)
            weight = layout.local_weight("weight", weight, group)
            bias = layout.local_weight("bias", bias, group)
        with share.agreed_by(group) as agreement:
            if weight is None:
                if bias is not None:
                    raise ValueError("bias belongs to weight, and weight is None")
                of_student = Student(check_logits("student", student, group is not None).detach())
                width = student.shape[-1]
            else:
                check_head(student, weight, bias, "", "student")
                width = weight.shape[0]
                of_student = Student(*autocast(student.detach(), weight.detach(), bias))  # type: ignore[arg-type]
            rows, request = _prepared(
                of_student, "student", None, None, temperature, logit_scale, softcap,
                layout.local("mask", mask, None, group), -100, False, _count("k", k, 1), chunk_size,
                memory_budget,
            )  # fmt: skip
            if group is None:
                request = request._replace(vocab_size=check_vocabulary(vocab_size, {name: width}))
        if agreement is not None:
            request = _shared(agreement, of_student, name, width, rows, request, vocab_size)
        _check_k("k", request)
        *_, top_ids, top_logprobs = logprobs.logprobs(of_student, rows, request)
    assert top_ids is not None and top_logprobs is not None
    return StudentTopK(top_ids, top_logprobs)


def _count(argument: str, value: object, least: int) -> int:
    value = check_int(argument, value)
    if value < least:
        raise ValueError(f"{argument} must be at least {least}, got {value}")
    return value


def _check_k(argument: str, request: logprobs.Request) -> None:
    if request.topk > request.vocabulary:
        raise ValueError(
            f"{argument} must be at most {request.vocabulary}, the size of the vocabulary; got {request.topk}"
        )


def _prepared(
    student: Student,
    name: str,
    targets: Tensor | None,
    ids: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    mask: Tensor | None,
    ignore_index: int,
    entropy: bool,
    topk: int,
    chunk_size: int | None,
    memory_budget: int | None,
) -> tuple[Rows, logprobs.Request]:
    """Check the options and the tensors of rows; the size of the vocabulary follows. name: the argument with rows."""
    hidden = student.hidden
    lead, device = hidden.shape[:-1], hidden.device
    temperatures = None
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError("temperature requires grad, and it gets no gradient; detach it")
        if temperature.dim() == 0:
            temperature = temperature.to(device, non_blocking=True).expand(lead)
        check_rows("temperature", temperature, lead, device, FLOATS)
        temperatures, temperature = temperature.to(torch.float32).contiguous(), 1.0
    numbers: dict[str, Any] = {
        "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap
    }  # fmt: skip
    numbers = {name: plain(value) for name, value in numbers.items()}
    if not torch.compiler.is_compiling():  # a graph checks them when it runs
        check_options(**numbers)
    if targets is not None:
        check_rows("targets", targets, lead, device, (torch.int64,))
    if mask is not None:
        check_rows("mask", mask, lead, device, (torch.bool,))
        mask = mask.to(torch.float32)
    if ids is not None:
        check_tensor("ids", ids, (torch.int64, torch.int32))
        if ids.dim() == 0 or ids.shape[:-1] != lead or not ids.shape[-1]:
            raise ValueError(
                f"ids must be [..., K] with K > 0 and the leading shape of {name}, {tuple(lead)}; "
                f"got shape {tuple(ids.shape)}"
            )
        if ids.device != device:
            raise ValueError(f"ids must be on {device}, where {name} is; got {ids.device}")
        check_readable("ids", ids)
        ids = ids.to(torch.int64).contiguous()
    rows = Rows(
        None if targets is None else targets.contiguous(),
        None if mask is None else mask.contiguous(),
        temperatures,
        ids=ids,
    )
    sizes = checked_sizes(chunk_size, memory_budget)
    ignore_index = check_int("ignore_index", ignore_index)
    request = logprobs.Request(
        0, **numbers, ignore_index=ignore_index, entropy=entropy, topk=topk,
        chunk_size=sizes[0], memory_budget=sizes[1],
    )  # fmt: skip
    return rows, request


def _shared(
    agreement: Any,
    student: Student,
    argument: str,
    width: int,
    rows: Rows,
    request: logprobs.Request,
    vocab_size: int | None,
    sequence_dim: int | None = None,
) -> logprobs.Request:
    """The request restricted to this process's columns, once all processes agree."""
    from fastkd.parallel import share

    grad_enabled = torch.is_grad_enabled()
    facts: dict[str, object] = {
        "sequence_dim": sequence_dim,
        "the shape of rows": tuple(student.hidden.shape[:-1]),
        "the student": [(x.dtype, x.device.type) for x in student if x is not None],
        "what requires grad": [grad_enabled and x is not None and x.requires_grad for x in student],
    }
    names = {"labels": "targets", "weight": "mask", "temperature": "temperature", "ids": "ids"}
    per_row = {name: getattr(rows, field) for field, name in names.items()}
    facts |= {name: value for name, value in request._asdict().items() if name != "shard"}
    facts |= share.facts_of_rows(per_row)
    shard, columns = share.share_columns(agreement, argument, width, vocab_size, facts)
    return request._replace(vocab_size=columns, shard=shard)
