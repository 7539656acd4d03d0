r"""torchtune's distillation losses, with its constructors, calls and numbers.

    from fastkd.compat.torchtune import ForwardKLLoss  # was: torchtune.modules.loss

torchtune need not be installed. A recipe takes them from its config:

    kd_loss:
      _component_: fastkd.compat.torchtune.ForwardKLWithChunkedOutputLoss

What is torchtune's convention is kept: its forward KL is the cross-entropy -sum p log q, without the teacher's entropy
(same gradient), no temperature, the mean over labels that are not ignore_index. What differs, on purpose:

- with no counted row the loss is 0 and part of the graph, where torchtune's is a constant, or NaN from the chunked
  reverse and symmetric losses;
- a token that the student holds for impossible and the teacher does not costs infinitely much in forward KL, and one
  that the teacher holds for impossible does in reverse KL, as the formulas say; torchtune counts both as 0. Columns
  at -inf on both sides are 0 here and there, but torchtune's reverse KL has a gradient of NaN for them;
- labels are cut where the student's chunks end, whatever cut those; lists of different lengths raise, where torchtune
  leaves out what is left over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.call.checks import check_number, check_pair
from fastkd.divergences import mixture
from fastkd.functional import kd_loss

_REMEDY = (
    "torchtune's losses compare whole vocabularies: where the rest is padding of one tokenizer, cut the logits of both "
    "models to its n tokens, [..., :n], before the loss"
)


class _Loss(nn.Module):
    """The mean, or the sum, of forward (-sum p log q) + reverse KL(q || p), by their shares."""

    def __init__(self, forward_share: float, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self._forward_share = forward_share

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        normalize: bool = True,
    ) -> Tensor:
        """The loss over the rows whose label is not ignore_index.

        Args:
            student_logits: [..., V].
            teacher_logits: [..., V].
            labels: one a row, of any shape.
            normalize: divide by the number of these rows.

        Returns:
            0-dim.
        """
        return self._loss(
            student_logits, teacher_logits, labels, reduction="mean" if normalize else "sum"
        )

    def _loss(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, **options: Any
    ) -> Tensor:
        check_pair("teacher_logits", teacher_logits, "student_logits", student_logits, _REMEDY)
        if labels.numel() == student_logits.shape[:-1].numel():  # or kd_loss says what is wrong
            labels = labels.reshape(student_logits.shape[:-1])
        options["ignore_index"] = self.ignore_index
        share = self._forward_share
        if share == 1.0:
            options["divergence"] = "soft_cross_entropy"
            return kd_loss(student_logits, teacher_logits, labels, **options)
        if share == 0.0:
            options["divergence"] = "reverse_kl"
            return kd_loss(student_logits, teacher_logits, labels, **options)
        kl = kd_loss(
            student_logits,
            teacher_logits,
            labels,
            divergence=mixture(share, 1.0 - share),
            **options,
        )
        entropy = kd_loss(
            teacher_logits, teacher_logits, labels, divergence="soft_cross_entropy", **options
        )
        return kl + share * entropy


class ForwardKLLoss(_Loss):
    """torchtune.modules.loss.ForwardKLLoss: -sum p log q, the forward KL but for the teacher's entropy.

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
    """torchtune.modules.loss.SymmetricKLLoss: r (-sum p log q) + (1 - r) KL(q || p), in one sweep.

    The teacher's entropy, which is in the value and not in the gradient, takes a second sweep of its logits.

    Args:
        sym_kd_ratio: r, in [0, 1].
        ignore_index: the label that drops a row.
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(check_number("sym_kd_ratio", sym_kd_ratio, 0.0, 1.0), ignore_index)
        self.sym_kd_ratio = sym_kd_ratio


class _ChunkedLoss(_Loss):
    """The same, of lists of logits, chunks along the sequence as a model with chunked output gives them."""

    def __init__(self, num_output_chunks: int, forward_share: float, ignore_index: int) -> None:
        super().__init__(forward_share, ignore_index)
        self.num_output_chunks = num_output_chunks

    def forward(  # type: ignore[override]  # as torchtune has it
        self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        """The mean over all rows of all chunks whose label is not ignore_index.

        Args:
            student_logits: [batch, tokens of the chunk, V] each, of chunks however they were cut: by torch.chunk, as
                torchtune 0.6 does, by torch.tensor_split, as its main branch does, or by hand.
            teacher_logits: likewise, of the same chunks.
            labels: [batch, tokens], which are cut as the student's logits are.

        Returns:
            0-dim.

        Raises:
            ValueError: there are not as many chunks of the student and of the teacher, or their tokens are not those
                of the labels.
        """
        for name, chunks in (
            ("student_logits", student_logits),
            ("teacher_logits", teacher_logits),
        ):
            if isinstance(chunks, Tensor) or not chunks or any(x.dim() != 3 for x in chunks):
                raise ValueError(
                    f"{name} must be a list of chunks [batch, tokens, V], as a model with chunked output returns; "
                    f"for whole logits there is {type(self).__name__.replace('WithChunkedOutput', '')}"
                )
        lengths = [chunk.shape[1] for chunk in student_logits]
        tokens = labels.shape[1] if labels.dim() == 2 else None
        if len(student_logits) != len(teacher_logits) or sum(lengths) != tokens:
            raise ValueError(
                "student_logits and teacher_logits must have as many chunks, and labels [batch, tokens] the tokens of "
                f"them all; got {len(student_logits)} and {len(teacher_logits)} chunks, {sum(lengths)} tokens of the "
                f"student and labels {tuple(labels.shape)}"
            )
        counted = (labels != self.ignore_index).sum()
        of_labels = labels.split(lengths, dim=1)
        losses = [
            self._loss(*chunk, num_items=counted)
            for chunk in zip(student_logits, teacher_logits, of_labels, strict=True)
        ]
        return torch.stack(losses).sum()


class ForwardKLWithChunkedOutputLoss(_ChunkedLoss):
    """torchtune.modules.loss.ForwardKLWithChunkedOutputLoss: ForwardKLLoss of lists of chunks.

    Args:
        num_output_chunks: into how many chunks the model cuts its output; kept for recipes, which read it.
        ignore_index: the label that drops a row.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, 1.0, ignore_index)


class ReverseKLWithChunkedOutputLoss(_ChunkedLoss):
    """torchtune.modules.loss.ReverseKLWithChunkedOutputLoss: ReverseKLLoss of lists of chunks.

    Args:
        num_output_chunks: into how many chunks the model cuts its output; kept for recipes, which read it.
        ignore_index: the label that drops a row.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, 0.0, ignore_index)


class SymmetricKLWithChunkedOutputLoss(_ChunkedLoss):
    """torchtune.modules.loss.SymmetricKLWithChunkedOutputLoss: SymmetricKLLoss of lists of chunks.

    Args:
        num_output_chunks: into how many chunks the model cuts its output; kept for recipes, which read it.
        sym_kd_ratio: r, in [0, 1].
        ignore_index: the label that drops a row.
    """

    def __init__(
        self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100
    ) -> None:
        share = check_number("sym_kd_ratio", sym_kd_ratio, 0.0, 1.0)
        super().__init__(num_output_chunks, share, ignore_index)
        self.sym_kd_ratio = sym_kd_ratio
