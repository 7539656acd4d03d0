"""Students that teach each other, themselves and their later generations; no teacher has to be trained before.

mutual_loss         M students, each with the others as teachers; co-distillation is one of its forms
ensemble_loss       branches of one model, taught by their gated ensemble as it is trained
MeanTeacher         a teacher that is the moving average of the student, with consistency_loss and ramp_up
born_again          the student of a generation teaches the next; generations_teacher makes an ensemble of them
"""

from fastkd.online.born_again import born_again, generations_teacher
from fastkd.online.ensembles import ensemble_logits, ensemble_loss
from fastkd.online.mean_teacher import MeanTeacher, consistency_loss, ramp_up
from fastkd.online.mutual import MutualParts, mutual_loss

__all__ = [
    "MeanTeacher",
    "MutualParts",
    "born_again",
    "consistency_loss",
    "ensemble_logits",
    "ensemble_loss",
    "generations_teacher",
    "mutual_loss",
    "ramp_up",
]
