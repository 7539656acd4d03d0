r"""torchtune's distillation losses, with the same constructors, calls and results.

    from fastkd.compat.torchtune import ForwardKLLoss  # was: torchtune.modules.loss

torchtune need not be installed. In a recipe's config:

    kd_loss:
      _component_: fastkd.compat.torchtune.ForwardKLWithChunkedOutputLoss

torchtune's conventions are kept: the forward KL is the cross-entropy -sum p log q, without the teacher's entropy (the
gradient is the same); there is no temperature; the mean is over labels that are not ignore_index. Three things differ
deliberately:

- with no counted row the loss is 0 and part of the graph; torchtune's is a constant, or NaN for the chunked reverse and
  symmetric losses;
- a token at -inf for the student only makes the forward KL infinite, and a token at -inf for the teacher only makes the
  reverse KL infinite, as the formulas require; torchtune counts both as 0. Columns at -inf on both sides count as 0 in
  both, but torchtune's reverse KL has a NaN gradient for them;
- labels are split where the student's chunks end, however the chunks were cut; lists of different lengths raise, where
  torchtune ignores the surplus chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.call.checks import check_pair
from fastkd.core.scalars import check_number
from fastkd.divergences import mixture
from fastkd.functional import kd_loss

_REMEDY = (
    "torchtune's losses compare whole vocabularies. If both models use one tokenizer and differ in padding, cut the "
    "logits of both to the n real tokens, [..., :n], before the loss"
)


class _Loss(nn.Module):
    """Mean or sum over rows of w (-sum p log q) + (1 - w) KL(q || p), where w is forward_weight."""

    def __init__(self, forward_weight: float, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self._forward_weight = forward_weight

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        normalize: bool = True,
    ) -> Tensor:
        """Return the loss over the rows whose label is not ignore_index, 0-dim.

        Args:
            student_logits: [..., V].
            teacher_logits: [..., V].
            labels: one per row, in any shape.
            normalize: divide the sum by the number of counted rows.
        """
        return self._loss(
            student_logits, teacher_logits, labels, reduction="mean" if normalize else "sum"
        )

    def _loss(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, **options: Any
    ) -> Tensor:
        check_pair("teacher_logits", teacher_logits, "student_logits", student_logits, _REMEDY)
        if labels.numel() == student_logits.shape[:-1].numel():  # otherwise kd_loss raises
            labels = labels.reshape(student_logits.shape[:-1])
        options["ignore_index"] = self.ignore_index
        weight = self._forward_weight
        if weight == 1.0:
            options["divergence"] = "soft_cross_entropy"
            return kd_loss(student_logits, teacher_logits, labels, **options)
        if weight == 0.0:
            options["divergence"] = "reverse_kl"
            return kd_loss(student_logits, teacher_logits, labels, **options)
        kl = kd_loss(
            student_logits,
            teacher_logits,
            labels,
            divergence=mixture(weight, 1.0 - weight),
            **options,
        )
        entropy = kd_loss(
            teacher_logits, teacher_logits, labels, divergence="soft_cross_entropy", **options
        )
        return kl + weight * entropy


class ForwardKLLoss(_Loss):
    """torchtune.modules.loss.ForwardKLLoss: -sum p log q, which is the forward KL plus the teacher's entropy.

    Args:
        ignore_index: the label that drops a row.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(1.0, ignore_index)


class ReverseKLLoss(_Loss):
    """torchtune.modules.loss.ReverseKLLoss: KL(q || p).

    Args:
        ignore_index: the label that drops a row.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(0.0, ignore_index)


class SymmetricKLLoss(_Loss):
    """torchtune.modules.loss.SymmetricKLLoss: r (-sum p log q) + (1 - r) KL(q || p).

    The value contains the teacher's entropy, which has no gradient and is computed in a second pass over its logits.

    Args:
        sym_kd_ratio: r, in [0, 1].
        ignore_index: the label that drops a row.
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(check_number("sym_kd_ratio", sym_kd_ratio, 0.0, 1.0), ignore_index)
        self.sym_kd_ratio = sym_kd_ratio


class _ChunkedLoss(_Loss):
    """The same loss of lists of logits: chunks along the sequence, as models with chunked output return."""

    def __init__(self, num_output_chunks: int, forward_weight: float, ignore_index: int) -> None:
        super().__init__(forward_weight, ignore_index)
        self.num_output_chunks = num_output_chunks

    def forward(  # type: ignore[override]  # the signature is torchtune's
        self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        """Return the mean over the rows of all chunks whose label is not ignore_index, 0-dim.

        Args:
            student_logits: chunks [batch, tokens of the chunk, V], cut in any way: by torch.chunk as in torchtune 0.6,
                by torch.tensor_split as in its main branch, or by hand.
            teacher_logits: the teacher's chunks, cut in the same places.
            labels: [batch, tokens], not chunked.

        Raises:
            ValueError: student and teacher have different numbers of chunks, or the chunks do not have as many tokens
                as the labels.
        """
        for name, chunks in (
            ("student_logits", student_logits),
            ("teacher_logits", teacher_logits),
        ):
            if isinstance(chunks, Tensor) or not chunks or any(x.dim() != 3 for x in chunks):
                raise ValueError(
                    f"{name} must be a list of chunks [batch, tokens, V], as a model with chunked output returns; "
                    f"for logits in one tensor use {type(self).__name__.replace('WithChunkedOutput', '')}"
                )
        lengths = [chunk.shape[1] for chunk in student_logits]
        tokens = labels.shape[1] if labels.dim() == 2 else None
        if len(student_logits) != len(teacher_logits) or sum(lengths) != tokens:
            raise ValueError(
                "student_logits and teacher_logits must have the same number of chunks, and together as many tokens as "
                f"labels [batch, tokens]; got {len(student_logits)} and {len(teacher_logits)} chunks, {sum(lengths)} "
                f"tokens of the student and labels {tuple(labels.shape)}"
            )
        counted = (labels != self.ignore_index).sum()
        label_chunks = labels.split(lengths, dim=1)
        losses = [
            self._loss(*chunk, num_items=counted)
            for chunk in zip(student_logits, teacher_logits, label_chunks, strict=True)
        ]
        return torch.stack(losses).sum()


class ForwardKLWithChunkedOutputLoss(_ChunkedLoss):
    """torchtune.modules.loss.ForwardKLWithChunkedOutputLoss: ForwardKLLoss of lists of chunks.

    Args:
        num_output_chunks: the number of chunks of the model's output; recipes read this attribute.
        ignore_index: the label that drops a row.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, 1.0, ignore_index)


class ReverseKLWithChunkedOutputLoss(_ChunkedLoss):
    """torchtune.modules.loss.ReverseKLWithChunkedOutputLoss: ReverseKLLoss of lists of chunks.

    Args:
        num_output_chunks: the number of chunks of the model's output; recipes read this attribute.
        ignore_index: the label that drops a row.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, 0.0, ignore_index)


class SymmetricKLWithChunkedOutputLoss(_ChunkedLoss):
    """torchtune.modules.loss.SymmetricKLWithChunkedOutputLoss: SymmetricKLLoss of lists of chunks.

    Args:
        num_output_chunks: the number of chunks of the model's output; recipes read this attribute.
        sym_kd_ratio: r, in [0, 1].
        ignore_index: the label that drops a row.
    """

    def __init__(
        self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100
    ) -> None:
        weight = check_number("sym_kd_ratio", sym_kd_ratio, 0.0, 1.0)
        super().__init__(num_output_chunks, weight, ignore_index)
        self.sym_kd_ratio = sym_kd_ratio
