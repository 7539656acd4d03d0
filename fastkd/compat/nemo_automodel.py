"""NeMo AutoModel: its distillation loss.

    from fastkd.compat.nemo_automodel import KDLoss  # was: from nemo_automodel.components.loss.kd_loss import KDLoss

NeMo AutoModel need not be installed. docs/stacks/nemo.md lists what differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastkd.functional import kd_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class KDLoss(nn.Module):
    """``nemo_automodel.components.loss.kd_loss.KDLoss``: forward KL times T^2, a mean over the rows that have a label.

        T^2 sum over rows of KL(p || q) / num_batch_labels

    with p and q the softmaxes of logits / T. Without num_batch_labels, the divisor is the number of rows that count.

    Args:
        ignore_index: the label of rows that do not count.
        temperature: T > 0.
        fp32_upcast: accepted, but without effect: the loss is always computed in float32.
        tp_group: the processes that share the vocabulary, if logits are plain tensors. DTensors that are sharded over
            the vocabulary know their group themselves.
        chunk_size: accepted, but without effect: probabilities are never stored.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: ProcessGroup | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.fp32_upcast = fp32_upcast
        self.tp_group = tp_group
        self.chunk_size = chunk_size

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_batch_labels: int | None = None,
    ) -> Tensor:
        """Compute the loss, a scalar; 0 if no row counts.

        Args:
            student_logits: [..., V]; views are not copied.
            teacher_logits: the same shape.
            labels: [...], already shifted.
            num_batch_labels: the number of labels in all micro-batches of a step.

        Raises:
            TypeError, ValueError: an argument has the wrong shape, dtype, device or value; the message names it.
        """
        return kd_loss(
            student_logits,
            teacher_logits,
            mask=labels != self.ignore_index,
            temperature=self.temperature,
            num_items=num_batch_labels,
            process_group=self.tp_group,
        )
