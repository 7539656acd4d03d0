r"""mdistiller's losses of logits, with the same signatures and results.

    from fastkd.compat.mdistiller import kd_loss   # was: mdistiller.distillers.KD
    from fastkd.compat.mdistiller import dkd_loss  # was: mdistiller.distillers.DKD

mdistiller is the repository megvii-research/mdistiller, not a package; the code of many papers is derived from it. As
there, losses have the factor T^2 and are averaged over the batch, and callers add the cross-entropy themselves.
``logit_stand`` comes from the version with logit standardization (Sun et al. 2024). For mdistiller's attention,
relation and hint losses see :mod:`fastkd.features` and :mod:`fastkd.relations`.

mdistiller's dkd_loss takes the logarithm of sums of probabilities. If the student is certain of a label, a sum is 0, so
the loss is NaN or infinite and its gradient NaN. Here both terms are computed from log-probabilities and stay finite.
"""

from __future__ import annotations

from torch import Tensor

from fastkd import functional
from fastkd.call.checks import check_pair, check_per_row
from fastkd.divergences import Divergence, dkd, forward_kl
from fastkd.response import standardized_kd_loss

_REMEDY = "Use two models with the same classes"


def kd_loss(
    logits_student: Tensor, logits_teacher: Tensor, temperature: float, logit_stand: bool = False
) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)), averaged over the batch.

    Args:
        logits_student: [B, C].
        logits_teacher: [B, C].
        temperature: T > 0.
        logit_stand: first standardize the logits of each row: subtract their mean, divide by their standard deviation.

    Returns:
        0-dim.
    """
    return _loss(logits_student, logits_teacher, None, forward_kl(), temperature, logit_stand)


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    logit_stand: bool = False,
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD), averaged over the batch; see :func:`fastkd.dkd`.

    Args:
        logits_student: [B, C].
        logits_teacher: [B, C].
        target: [B] int64, the labels. A label of -100 drops the row; mdistiller does not accept it.
        alpha: weight of TCKD, the target class's term; not negative.
        beta: weight of NCKD, the other classes' term; not negative.
        temperature: T > 0.
        logit_stand: as in :func:`kd_loss`.

    Returns:
        0-dim.
    """
    divergence = dkd(alpha, beta)
    return _loss(
        logits_student, logits_teacher, target.reshape(-1), divergence, temperature, logit_stand
    )


def _loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    divergence: Divergence,
    temperature: float,
    standardized: bool,
) -> Tensor:
    check_pair("logits_teacher", teacher, "logits_student", student, _REMEDY, lowest=2)
    check_per_row("target", labels, student.shape[:-1])
    loss = standardized_kd_loss if standardized else functional.kd_loss
    return loss(student, teacher, labels, divergence=divergence, temperature=temperature)
