r"""torchdistill's losses computed by fastkd, with the same constructors, calls and results.

    from fastkd.compat import torchdistill

    torchdistill.register()  # then write key: 'fastkd.KDLoss' in the yaml, in place of 'KDLoss'
    torchdistill.register(prefix="")  # or replace 'KDLoss' itself, for every configuration

Importing this module does not import torchdistill; registering does. A criterion receives the dictionaries that
torchdistill's hooks fill for student and teacher, ``{path: {"input" or "output": tensor}}``.

torchdistill's conventions are kept: T^2 and beta multiply the distillation term only if there is a cross-entropy (alpha
is set and the call has targets); "mean" averages the distillation term over rows and classes, and the cross-entropy
over rows. Two things differ: KDLoss and LogitStdKDLoss can be constructed with alpha=None and no beta, for which
torchdistill raises TypeError; and reduction="none" raises, because torchdistill then adds tensors of different shapes.

SPKDLoss is not provided: torchdistill divides the rows of the Gram matrix by their sum of absolute values, whereas the
paper and :func:`fastkd.relations.similarity_loss` divide by their Euclidean norm.
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


_REMEDY = "Choose two modules that return logits of the same classes"


class _LogitsLoss(nn.Module):
    """Base of losses on the logits that torchdistill's hooks capture."""

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
        """Return the logits of student and teacher with classes last: [N, C], or [N, ..., C] for maps [N, C, ...]."""
        student = student_io_dict[self.student_module_path][self.student_module_io]
        teacher = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        teacher_name = f"{self.teacher_module_path!r} of the teacher"
        student_name = f"{self.student_module_path!r} of the student"
        check_pair(teacher_name, teacher, student_name, student, _REMEDY, lowest=2)
        return student.movedim(1, -1), teacher.movedim(1, -1)


class KDLoss(_LogitsLoss):
    r"""torchdistill's KDLoss: alpha CE + beta T^2 KL(softmax(t / T) || softmax(s / T)).

    If alpha is None or 0, or the call has no targets, the loss is the KL alone, without T^2 and beta.

    Args:
        student_module_path: path of the student's module that returns the logits.
        student_module_io: "input" or "output" of that module.
        teacher_module_path: path of the teacher's module that returns the logits.
        teacher_module_io: "input" or "output" of that module.
        temperature: T > 0.
        alpha: weight of the cross-entropy; None: no cross-entropy.
        beta: weight of the KL; None: 1 - alpha.
        reduction: "batchmean" (sum / size of the first dimension, with a cross-entropy of reduction "mean"), "mean" or
            "sum".
        kwargs: arguments of torch.nn.CrossEntropyLoss. As in torchdistill, rows that it ignores still count in the KL.
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
        ce_reduction = "mean" if reduction == "batchmean" else reduction
        self.cross_entropy_loss = nn.CrossEntropyLoss(reduction=ce_reduction, **kwargs)

    def forward(
        self,
        student_io_dict: Outputs,
        teacher_io_dict: Outputs,
        targets: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return the loss, 0-dim.

        Args:
            student_io_dict: the tensors that hooks captured from the student.
            teacher_io_dict: the tensors that hooks captured from the teacher.
            targets: [N, ...] class indices, or probabilities as torch.nn.CrossEntropyLoss accepts them; None: no
                cross-entropy.
            *args: ignored.
            **kwargs: ignored.
        """
        student, teacher = self._logits(student_io_dict, teacher_io_dict)
        kl = self._kl(student, teacher)
        if not self.alpha or targets is None:
            return kl
        if not targets.is_floating_point():  # targets of probabilities have another shape
            check_per_row("targets", targets, student.shape[:-1])
        cross_entropy = self.cross_entropy_loss(student.movedim(-1, 1), targets)
        return self.alpha * cross_entropy + self.beta * self.temperature**2 * kl

    def _kl(self, student: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss(student, teacher, **self._options(student))

    def _options(self, student: Tensor) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "scale_by_temperature": False,
            "reduction": self.reduction,
            "num_items": max(student.numel(), 1) if self.reduction == "mean" else None,
        }


class LogitStdKDLoss(KDLoss):
    r"""torchdistill's LogitStdKDLoss: KDLoss whose KL is computed from standardized logits [N, C].

    The cross-entropy is computed from the original logits.

    Args:
        student_module_path: as in :class:`KDLoss`.
        student_module_io: as in :class:`KDLoss`.
        teacher_module_path: as in :class:`KDLoss`.
        teacher_module_io: as in :class:`KDLoss`.
        temperature: T > 0.
        eps: added to the standard deviation.
        alpha: as in :class:`KDLoss`.
        beta: as in :class:`KDLoss`.
        reduction: as in :class:`KDLoss`.
        kwargs: as in :class:`KDLoss`.
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

    def _kl(self, student: Tensor, teacher: Tensor) -> Tensor:
        _check_rows("LogitStdKDLoss", student)
        return standardized_kd_loss(student, teacher, eps=self.eps, **self._options(student))


class DISTLoss(_LogitsLoss):
    r"""torchdistill's DISTLoss: T^2 [beta (1 - mean r of rows) + gamma (1 - mean r of columns)].

    r is the correlation of student and teacher. torchdistill clamps each of the two norms in r to at least eps; here
    eps^2 is added to their product, which differs by a factor of about 1 + eps^2 / product.

    Args:
        student_module_path: as in :class:`KDLoss`.
        student_module_io: as in :class:`KDLoss`.
        teacher_module_path: as in :class:`KDLoss`.
        teacher_module_io: as in :class:`KDLoss`.
        beta: weight of the inter-class relation, over rows.
        gamma: weight of the intra-class relation, over columns.
        tau: the temperature T > 0.
        eps: positive.
        kwargs: accepted and ignored, as in torchdistill.
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
        """Return the loss, 0-dim, of the logits [N, C] that hooks captured from student and teacher."""
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
        mode: "code": the mean of squared differences; "paper": their Euclidean norm, averaged over the batch.
        kwargs: accepted and ignored, as in torchdistill.
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
        """Return the loss, 0-dim, of the maps [N, C, H, W] that hooks captured from student and teacher."""
        losses = [
            # The paper's factor 1/2 is missing in torchdistill.
            (2.0 if self.mode == "paper" else 1.0)
            * pair.get("weight", 1)
            * attention_transfer_loss(
                _captured(student_io_dict, pair["student"]),
                _captured(teacher_io_dict, pair["teacher"]).detach(),
                form=self.mode,
            )
            for pair in self.at_pairs.values()
        ]
        return torch.stack(losses).sum()


class RKDLoss(nn.Module):
    r"""torchdistill's RKDLoss: relational distillation with the distance and angle losses of :mod:`fastkd.relations`.

    Args:
        student_output_path: path of the student's module whose output is compared.
        teacher_output_path: path of the teacher's module whose output is compared.
        dist_factor: weight of the distance loss; None or 0 omits it.
        angle_factor: weight of the angle loss; None or 0 omits it.
        reduction: "mean" (over all N^2 pairs and N^3 triples) or "sum".
        kwargs: accepted and ignored, as in torchdistill.
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
        """Return the loss, 0-dim, of the outputs [N, ...] that hooks captured from student and teacher."""
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
    """Register these losses with torchdistill, whose configurations refer to them by "key".

    Args:
        prefix: put before each name. "" replaces torchdistill's losses.

    Raises:
        ImportError: torchdistill is not installed.
    """
    try:
        from torchdistill.losses.registry import (
            register_mid_level_loss,
        )
    except ImportError as error:
        raise ImportError(
            "register() adds fastkd's losses to torchdistill, which is not installed: pip install torchdistill"
        ) from error
    for loss in LOSSES:
        register_mid_level_loss(key=f"{prefix}{loss.__name__}")(loss)


def _captured(io_dict: Outputs, source: Mapping[str, str]) -> Tensor:
    return io_dict[source["path"]][source["io"]]


def _check_rows(name: str, logits: Tensor) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits must be [N, C] for {name}, got {logits.dim()} dimensions")
