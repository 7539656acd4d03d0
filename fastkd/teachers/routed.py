"""Several teachers, each for its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.teachers.linear import LinearTeacher
from fastkd.teachers.tensors import FLOATS, check_tensor, checked_list
from fastkd.teachers.topk import TopK

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False)
class RoutedTeacher:
    """Several teachers, each for its own rows: mathematics from one teacher, code from another, in one call.

        p of row r = p of the i-th row of teachers[k],    k = index[r],    i = how many rows before r have index k

    A teacher runs on its own rows only, and its tensors contain no others. Each row has the loss that a call with
    its teacher alone would compute. Reductions such as "mean" are over the rows of all teachers. Multi-teacher
    on-policy distillation is described in arXiv:2601.02780.

    Args:
        teachers: one or more, numbered from 0. Either all are TopKs (:class:`TopK`), or each is dense logits [n, V] or
            a :class:`LinearTeacher` with hidden states [n, H]; widths, heads and dtypes may differ. n is the number of
            rows whose index is the number of the teacher, possibly 0. The n rows are in the order of the student's
            rows, flattened. They include the rows that a mask or a label drops, because a teacher's forward pass
            computes those too; their values are not read.
        index: an integer tensor, the number of each row's teacher. Its shape is the leading shape of the student's
            logits or the first dimensions of it: with logits [B, T, V] it is [B, T], or [B] for whole sequences.

    A teacher's rows may be in one dimension or in several. With logits [B, T, V], the logits of a teacher of b whole
    sequences may be [b T, V] or [b, T, V].

    TopKs are joined into one TopK with the largest K; shorter rows are padded. All need the same policy for the tail.
    Each row keeps the mass of the tail that its own teacher gives. Under "bucket" and "truncate" all must have been
    taken at the same temperature. Dense logits and LinearTeachers are processed in chunks of rows with the same
    teacher, so the logits of a LinearTeacher are never held for all rows. teacher_temperature, teacher_logit_scale and
    teacher_softcap of the loss apply to every teacher. If all teachers are dense logits and one requires grad, kd_loss
    copies them into one tensor [..., V], and each gets the gradient of its rows.

    The loss compares the number of each teacher's rows with index, and raises if they differ. If all teachers are
    TopKs, or one requires grad, a loss on a GPU or under torch.compile does not raise: every row is NaN, because
    raising would require waiting for the device or breaking the graph. In eager mode on a GPU, FASTKD_CHECK=1 makes
    the loss raise.

    Raises:
        TypeError, ValueError: a wrong type, dtype or value; the message names the argument.
    """

    teachers: Sequence[Tensor | TopK | LinearTeacher]
    index: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "teachers", checked_list(self.teachers))
        check_tensor("index", self.index, INTEGERS)
        for number, teacher in enumerate(self.teachers):
            if isinstance(teacher, Tensor):
                check_tensor(f"teachers[{number}]", teacher, FLOATS)
                if teacher.dim() == 0:
                    raise ValueError(
                        f"teachers[{number}] must be dense logits [n, V], got a scalar"
                    )
            elif not isinstance(teacher, (TopK, LinearTeacher)):
                raise TypeError(
                    f"teachers[{number}] must be dense logits, a TopK or a LinearTeacher, "
                    f"got {type(teacher).__name__}"
                )
        sparse = [isinstance(teacher, TopK) for teacher in self.teachers]
        if any(sparse) and not all(sparse):
            raise TypeError(
                f"teachers[{sparse.index(True)}] is a TopK and teachers[{sparse.index(False)}] is not: pass a TopK for "
                "all (TopK.from_logits makes one from dense logits), or for none"
            )
        self._check_alike()

    def _check_alike(self) -> None:
        """Raise unless all TopKs have the same policy and, if the policy needs it, the same temperature."""
        first = self.teachers[0]
        if not isinstance(first, TopK):
            return
        for number, teacher in enumerate(self.teachers):
            assert isinstance(teacher, TopK)
            if teacher.tail != first.tail:
                raise ValueError(
                    f"teachers[{number}].tail must be that of teachers[0], {first.tail!r}; got {teacher.tail!r}"
                )
            if not first.renormalizes and teacher.temperature != first.temperature:
                raise ValueError(
                    f"teachers[{number}].temperature must be that of teachers[0], {first.temperature}, because "
                    f"tail={first.tail!r} needs log-probabilities at the temperature of the loss; "
                    f"got {teacher.temperature}"
                )

    @property
    def is_sparse(self) -> bool:
        """Whether the teachers are TopKs."""
        return isinstance(self.teachers[0], TopK)

    def leads(self) -> list[torch.Size]:
        """The leading shape of each teacher's rows."""
        return [rows_of(teacher).shape[:-1] for teacher in self.teachers]

    def sizes(self) -> list[int]:
        """How many rows each teacher has."""
        return [lead.numel() for lead in self.leads()]


def rows_of(teacher: Tensor | TopK | LinearTeacher) -> Tensor:
    """The teacher's ids, hidden states or logits: a tensor with one vector per row of the teacher."""
    if isinstance(teacher, TopK):
        return teacher.ids
    return teacher.hidden if isinstance(teacher, LinearTeacher) else teacher
