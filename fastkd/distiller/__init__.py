"""Distiller: a student, a teacher and losses between them, the part that every distillation loop has in common.

    distiller = Distiller(student, teacher, {
        "kd": Term(fastkd.KDLoss(temperature=4.0, alpha=0.9)),                      # on logits
        "hint": Term(HintLoss(Regressor(32, 64, "conv")), "layer2", "layer3", weight=0.1),
        "attention": Term(attention_transfer_loss, ["layer1", "layer2"], ["layer1", "layer3"]),
        "hidden": Term(FeatureLoss({"model.layers.1": "model.layers.3"}, 64, 96)),  # names its own layers
    })
    loss, parts = distiller(images, labels=labels)

A weight may depend on the step. The two stages of FitNets, then an alpha that falls from 1:

    "hint": Term(.., weight=lambda step: 1.0 if step < 1000 else 0.0),
    "kd": Term(KDLoss(temperature=4.0), weight=lambda step: alpha(step)),
    "ce": Term(KDLoss(alpha=0.0), weight=lambda step: 1.0 - alpha(step)),
"""

from fastkd.core.models import unwrapped
from fastkd.distiller.distiller import Distiller, Tap, Term, find_logits, first_tensor

__all__ = [
    "Distiller",
    "Tap",
    "Term",
    "find_logits",
    "first_tensor",
    "unwrapped",
]
