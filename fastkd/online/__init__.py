"""Online distillation: students that teach each other, themselves or the next generation, without a trained teacher.

mutual_loss         M students that teach each other; co-distillation is one of its forms
ensemble_loss       branches of one model that learn from their gated ensemble, which is trained with them
MeanTeacher         a teacher that is the moving average of the student, with consistency_loss and ramp_up
born_again          the student of a generation teaches the next; generations_teacher makes an ensemble of all
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
