r"""mdistiller's losses of logits, with its signatures and numbers.

    from fastkd.compat.mdistiller import kd_loss   # was: mdistiller.distillers.KD
    from fastkd.compat.mdistiller import dkd_loss  # was: mdistiller.distillers.DKD

(mdistiller is a repository, megvii-research/mdistiller, and no package; the code of many papers was grown from it.)
T^2 and the mean over the batch, as there; the cross-entropy is added by the caller, as there. ``logit_stand`` is the
fourth argument of the version that came with logit standardisation (Sun et al. 2024). Its attention, relation and hint
losses are :mod:`fastkd.features` and :mod:`fastkd.relations`.

mdistiller's dkd_loss takes logarithms of sums of probabilities, which are 0 once the student is sure of a label: its
loss is then NaN or infinite, and its gradient NaN. Here the two parts come from log-probabilities.
"""

from __future__ import annotations

from torch import Tensor

from fastkd import functional
from fastkd.call.checks import check_pair, check_per_row
from fastkd.divergences import Divergence, dkd, forward_kl
from fastkd.response import standardized_kd_loss

_REMEDY = "Both models must classify into the same classes"


def kd_loss(
    logits_student: Tensor, logits_teacher: Tensor, temperature: float, logit_stand: bool = False
) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)), the mean over the batch.

    Args:
        logits_student: [B, C].
        logits_teacher: [B, C].
        temperature: T > 0.
        logit_stand: standardise the logits of each row first, by their mean and standard deviation.

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
    """T^2 (alpha TCKD + beta NCKD), the mean over the batch: :func:`fastkd.dkd`.

    Args:
        logits_student: [B, C].
        logits_teacher: [B, C].
        target: [B] int64, the labels; -100 is none of them there, and drops a row here.
        alpha: weight of the target class's part, not negative.
        beta: weight of the other classes' part, likewise.
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
