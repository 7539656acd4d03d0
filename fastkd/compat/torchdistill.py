r"""torchdistill's losses that fastkd computes, with its constructors, calls and numbers.

    from fastkd.compat import torchdistill

    torchdistill.register()  # and in the yaml, key: 'fastkd.KDLoss' for 'KDLoss'
    torchdistill.register(prefix="")  # or: every configuration that says 'KDLoss' gets fastkd's

Importing this module does not import torchdistill; registering does. A criterion gets the dictionaries that
torchdistill's hooks fill, ``{path: {"input" or "output": tensor}}``, of the student and of the teacher.

What is its convention is kept: T^2 and beta multiply the distillation term only where there is a cross-entropy (alpha,
and targets); "mean" is over rows and classes for the first and over rows for the second. What differs: with
alpha=None and no beta KDLoss and LogitStdKDLoss can be made, where torchdistill's raise TypeError; without a reduction
theirs adds tensors of different shapes, and these raise.

SPKDLoss is not here: torchdistill's divides rows of the Gram matrix by their sum of absolute values, and the paper, as
:func:`fastkd.relations.similarity_loss` does, by their Euclidean norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.call.checks import check_choice, check_pair, check_per_row
from fastkd.features import attention_transfer_loss
from fastkd.functional import kd_loss
from fastkd.relations import rkd_angle_loss, rkd_distance_loss
from fastkd.response import dist_loss, standardized_kd_loss

Outputs = Mapping[str, Mapping[str, Any]]


_REMEDY = "Both modules must return logits of the same classes"


class _OnLogits(nn.Module):
    """A loss of the logits that hooks have caught."""

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
    ) -> None:
        super().__init__()
        self.student_module_path = student_module_path
        self.student_module_io = student_module_io
        self.teacher_module_path = teacher_module_path
        self.teacher_module_io = teacher_module_io

    def _logits(self, student_io_dict: Outputs, teacher_io_dict: Outputs) -> tuple[Tensor, Tensor]:
        """Classes last: [N, C], or [N, ..., C] of maps [N, C, ...]."""
        student = student_io_dict[self.student_module_path][self.student_module_io]
        teacher = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        name = f"{self.teacher_module_path!r} of the teacher"
        own = f"{self.student_module_path!r} of the student"
        check_pair(name, teacher, own, student, _REMEDY, lowest=2)
        return student.movedim(1, -1), teacher.movedim(1, -1)


class KDLoss(_OnLogits):
    r"""torchdistill's KDLoss: alpha CE + beta T^2 KL(softmax(t / T) || softmax(s / T)).

    The KL alone, without T^2 and beta, where alpha is None or 0 or the call has no targets.

    Args:
        student_module_path: of the student's module whose logits are taken.
        student_module_io: "input" or "output" of it.
        teacher_module_path: likewise of the teacher.
        teacher_module_io: likewise.
        temperature: T > 0.
        alpha: weight of the cross-entropy, or None for none.
        beta: weight of the KL; None: 1 - alpha.
        reduction: "batchmean" (over the first dimension; the cross-entropy "mean"), "mean" or "sum".
        kwargs: of torch.nn.CrossEntropyLoss. Rows that it ignores are in the KL all the same, as there.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            student_module_path, student_module_io, teacher_module_path, teacher_module_io
        )
        check_choice("reduction", reduction, ("batchmean", "mean", "sum"))
        self.temperature = temperature
        self.alpha = alpha
        self.beta = 1.0 - (alpha or 0.0) if beta is None else beta
        self.reduction = reduction
        of_labels = "mean" if reduction == "batchmean" else reduction
        self.cross_entropy_loss = nn.CrossEntropyLoss(reduction=of_labels, **kwargs)

    def forward(
        self,
        student_io_dict: Outputs,
        teacher_io_dict: Outputs,
        targets: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """What the hooks caught of student and teacher, class indices [N, ...]; 0-dim."""
        student, teacher = self._logits(student_io_dict, teacher_io_dict)
        soft = self._soft(student, teacher)
        if not self.alpha or targets is None:
            return soft
        if not targets.is_floating_point():  # of probabilities CrossEntropyLoss takes another shape
            check_per_row("targets", targets, student.shape[:-1])
        hard = self.cross_entropy_loss(student.movedim(-1, 1), targets)
        return self.alpha * hard + self.beta * self.temperature**2 * soft

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss(student, teacher, **self._options(student))

    def _options(self, student: Tensor) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "scale_by_temperature": False,
            "reduction": self.reduction,
            "num_items": max(student.numel(), 1) if self.reduction == "mean" else None,
        }


class LogitStdKDLoss(KDLoss):
    r"""torchdistill's LogitStdKDLoss: KDLoss of logits [N, C] that are standardised first, but for the cross-entropy's.

    Args:
        student_module_path: as in :class:`KDLoss`, and so is what is not listed here.
        student_module_io: see there.
        teacher_module_path: see there.
        teacher_module_io: see there.
        temperature: T > 0.
        eps: added to the standard deviation.
        alpha: see there.
        beta: see there.
        reduction: see there.
        kwargs: see there.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        eps: float = 1e-7,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            student_module_path, student_module_io, teacher_module_path, teacher_module_io,
            temperature, alpha, beta, reduction, **kwargs,
        )  # fmt: skip
        self.eps = eps

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        _check_rows("LogitStdKDLoss", student)
        return standardized_kd_loss(student, teacher, eps=self.eps, **self._options(student))


class DISTLoss(_OnLogits):
    r"""torchdistill's DISTLoss: T^2 [beta (1 - mean r of rows) + gamma (1 - mean r of columns)], r the correlation.

    torchdistill bounds each norm in r from below by eps; here eps^2 is added to their product. That is the same to
    eps^2 over the product.

    Args:
        student_module_path: as in :class:`KDLoss`.
        student_module_io: see there.
        teacher_module_path: see there.
        teacher_module_io: see there.
        beta: weight of the relation between classes.
        gamma: weight of the relation within a class.
        tau: T > 0.
        eps: positive.
        kwargs: accepted and not used, as there.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        beta: float = 1.0,
        gamma: float = 1.0,
        tau: float = 1.0,
        eps: float = 1e-8,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            student_module_path, student_module_io, teacher_module_path, teacher_module_io
        )
        self.beta = beta
        self.gamma = gamma
        self.tau = tau
        self.eps = eps

    def forward(
        self, student_io_dict: Outputs, teacher_io_dict: Outputs, *args: Any, **kwargs: Any
    ) -> Tensor:
        """What the hooks caught of student and teacher, logits [N, C]; 0-dim."""
        student, teacher = self._logits(student_io_dict, teacher_io_dict)
        _check_rows("DISTLoss", student)
        return dist_loss(
            student,
            teacher,
            beta=self.beta,
            gamma=self.gamma,
            temperature=self.tau,
            eps=self.eps**2,
        )


class ATLoss(nn.Module):
    r"""torchdistill's ATLoss: attention transfer over pairs of layers, :func:`fastkd.features.attention_transfer_loss`.

    Args:
        at_pairs: name -> {"student": {"path", "io"}, "teacher": {"path", "io"}, "weight"}.
        mode: "code": the mean of squared differences; "paper": the mean over the batch of their norms.
        kwargs: accepted and not used, as there.
    """

    def __init__(
        self, at_pairs: Mapping[str, Mapping[str, Any]], mode: str = "code", **kwargs: Any
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("code", "paper"))
        self.at_pairs = at_pairs
        self.mode = mode

    def forward(
        self, student_io_dict: Outputs, teacher_io_dict: Outputs, *args: Any, **kwargs: Any
    ) -> Tensor:
        """What the hooks caught of student and teacher, maps [N, C, H, W]; 0-dim."""
        losses = [
            # the paper has half of each norm
            (2.0 if self.mode == "paper" else 1.0)
            * pair.get("weight", 1)
            * attention_transfer_loss(
                _caught(student_io_dict, pair["student"]),
                _caught(teacher_io_dict, pair["teacher"]).detach(),
                form=self.mode,
            )
            for pair in self.at_pairs.values()
        ]
        return torch.stack(losses).sum()


class RKDLoss(nn.Module):
    r"""torchdistill's RKDLoss: relational distillation, the distance and the angle term of :mod:`fastkd.relations`.

    Args:
        student_output_path: of the student's module whose output is taken.
        teacher_output_path: likewise of the teacher.
        dist_factor: weight of the distances; None or 0 leaves them out.
        angle_factor: weight of the angles; likewise.
        reduction: "mean" (over all N^2 pairs and N^3 triples) or "sum".
        kwargs: accepted and not used, as there.
    """

    def __init__(
        self,
        student_output_path: str,
        teacher_output_path: str,
        dist_factor: float | None,
        angle_factor: float | None,
        reduction: str,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum"))
        self.student_output_path = student_output_path
        self.teacher_output_path = teacher_output_path
        self.dist_factor = dist_factor
        self.angle_factor = angle_factor
        self.reduction = reduction

    def forward(
        self, student_io_dict: Outputs, teacher_io_dict: Outputs, *args: Any, **kwargs: Any
    ) -> Tensor:
        """What the hooks caught of student and teacher, [N, ...]; 0-dim."""
        student = student_io_dict[self.student_output_path]["output"]
        teacher = teacher_io_dict[self.teacher_output_path]["output"].detach()
        loss = student.sum() * 0.0
        for factor, term, order in (
            (self.dist_factor, rkd_distance_loss, 2),
            (self.angle_factor, rkd_angle_loss, 3),
        ):
            if factor:
                count = len(student) ** order if self.reduction == "sum" else 1
                loss = loss + factor * count * term(student, teacher, mean="all")
        return loss


LOSSES = (KDLoss, LogitStdKDLoss, DISTLoss, ATLoss, RKDLoss)


def register(prefix: str = "fastkd.") -> None:
    """Put these losses in torchdistill's registry, where its configurations find them by "key".

    Args:
        prefix: before each name. "" replaces torchdistill's own.

    Raises:
        ImportError: torchdistill is not installed.
    """
    try:
        from torchdistill.losses.registry import (
            register_mid_level_loss,
        )
    except ImportError as error:
        raise ImportError(
            "torchdistill's registry is what this is for: pip install torchdistill"
        ) from error
    for loss in LOSSES:
        register_mid_level_loss(key=f"{prefix}{loss.__name__}")(loss)


def _caught(io_dict: Outputs, of: Mapping[str, str]) -> Tensor:
    return io_dict[of["path"]][of["io"]]


def _check_rows(name: str, logits: Tensor) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits must be [N, C] for {name}, got {logits.dim()} dimensions")
