"""Mean teachers: the moving average of a student as its teacher."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.call.checks import (
    LossCall,
    check_alike,
    check_choice,
    check_columns,
    check_flags,
    check_logits,
    check_number,
    prepare,
)
from fastkd.call.contract import row_dtype
from fastkd.call.options import as_tensor
from fastkd.core.models import unwrapped
from fastkd.core.scalars import plain
from fastkd.core.tensors import check_readable, savable_when_compiled
from fastkd.functional import kd_loss

BUFFERS = ("copy", "average", "own")
FORMS = ("mse", "kl")


class MeanTeacher(nn.Module):
    r"""The exponential moving average of a student, as its teacher (Tarvainen and Valpola 2017).

        theta' <- a theta' + (1 - a) theta,    a = min(1 - 1/(t + 1), decay)

    t is 1 at the first update, as in the authors' code: the mean of all students so far, while that is faster than
    decay. :meth:`update` belongs after the optimiser's step.

    Args:
        student: the module to start from, which is copied and not kept; of what torch.compile or
            DistributedDataParallel made, the module inside.
        decay: in [0, 1]; 0.99 while the student improves quickly and 0.999 later, in the paper.
        buffers: what becomes of statistics such as those of batch normalisation: "copy" takes the student's; "average"
            averages those of floating point and copies the others; "own" leaves the teacher its own, which it collects
            where it is in training mode, as in the authors' code.
        training: whether the teacher runs in training mode, with dropout and batch statistics, as the authors' does.
            :meth:`train` and :meth:`eval` do not change it.
        dtype: of the teacher's floating-point parameters; None: the student's. Averages need more digits than a
            bfloat16 has: with decay = 0.999 a step is lost in its rounding.

    state_dict() has the number of updates too. Shapes: called as the student is, without a gradient.

    Memory: one more copy of the student.

    Raises:
        ValueError, TypeError: an argument is wrong, or a student that is averaged is another model.
    """

    def __init__(
        self,
        student: nn.Module,
        decay: float = 0.999,
        *,
        buffers: str = "copy",
        training: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}")
        self.decay = check_number("decay", decay, 0.0, 1.0)
        check_choice("buffers", buffers, BUFFERS)
        check_flags(training=training)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
        self.buffers_by = buffers
        self.teacher_trains = training
        self.steps = 0
        self.model = copy.deepcopy(unwrapped(student)).requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.grad = None
            if dtype is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        self.train()

    def train(self, mode: bool = True) -> MeanTeacher:
        """Set this module's mode; the teacher's stays what was asked for."""
        super().train(mode)
        self.model.train(self.teacher_trains)
        return self

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the teacher makes of its inputs, without a graph."""
        with torch.no_grad():
            return self.model(*inputs, **options)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Take one more student into the average."""
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}")
        student = unwrapped(student)
        _check_alike(self.model, student)
        self.steps += 1
        decay = min(1.0 - 1.0 / (self.steps + 1), self.decay)
        pairs: list[tuple[Tensor, Tensor]] = list(
            zip(self.model.parameters(), student.parameters(), strict=True)
        )
        copied: list[tuple[Tensor, Tensor]] = []
        if self.buffers_by != "own":
            copied = list(zip(self.model.buffers(), student.buffers(), strict=True))
        if self.buffers_by == "average":
            pairs, copied = pairs + copied, []
        copied += [pair for pair in pairs if not pair[0].is_floating_point()]
        pairs = [pair for pair in pairs if pair[0].is_floating_point()]
        if pairs:
            averages = [average for average, _ in pairs]
            latest = [value.to(average.device, average.dtype) for average, value in pairs]
            torch._foreach_lerp_(averages, latest, 1.0 - decay)
        for average, value in copied:
            average.copy_(value)

    def get_extra_state(self) -> dict[str, int]:
        """The number of updates, for state_dict()."""
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """From load_state_dict()."""
        self.steps = int(state["steps"])

    def extra_repr(self) -> str:
        """The options."""
        return f"decay={self.decay}, buffers={self.buffers_by!r}, training={self.teacher_trains}"


def _check_alike(teacher: nn.Module, student: nn.Module) -> None:
    for kind in ("parameters", "buffers"):
        ours, theirs = (
            {name: tuple(value.shape) for name, value in getattr(model, f"named_{kind}")()}
            for model in (teacher, student)
        )
        if ours != theirs:
            name = sorted(dict(ours.items() ^ theirs.items()))[0]
            raise ValueError(
                f"student must have the {kind} that the teacher was copied from; {name} is {ours.get(name)} there "
                f"and {theirs.get(name)} here"
            )


def consistency_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    form: str = "mse",
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""How far a student is from its mean teacher (Tarvainen and Valpola 2017).

        "mse"    |softmax(s) - softmax(t)|^2 / V    the paper's
        "kl"     KL(softmax(t) || softmax(s))       its other form, by :func:`fastkd.kd_loss`

    Args:
        student_logits: [..., V], float32, bfloat16, float16 or float64.
        teacher_logits: likewise, of that shape; they get their gradient where they require one.
        form: one of the above.
        mask: [...] bool; a row where it is False is dropped: 0, and no gradient, whatever it holds.
        weight: [...] float, multiplies the loss of a row.
        reduction: "none", "sum", "mean" (sum / number of counted rows) or "batchmean", as in kd_loss.
        num_items: replaces the denominator of the last two.
        backend: of kd_loss, for "kl"; "mse" is plain PyTorch.

    Returns:
        0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits).

    Memory: for "mse" both softmaxes and their difference.

    Raises:
        ValueError, TypeError: the message names the argument.
    """
    check_choice("form", form, FORMS)
    student_logits = check_logits("student_logits", student_logits)
    teacher_logits = check_columns("teacher_logits", teacher_logits)
    check_alike("teacher_logits", teacher_logits, "student_logits", student_logits)
    check_readable("teacher_logits", teacher_logits)
    if form == "mse":
        student_logits, teacher_logits = savable_when_compiled(student_logits, teacher_logits)
        mask, weight = savable_when_compiled(mask, weight)
    options: dict[str, Any] = {
        "mask": mask, "weight": weight, "reduction": reduction, "num_items": num_items, "backend": backend,
    }  # fmt: skip
    if form == "kl":
        loss = kd_loss(student_logits, teacher_logits, **options)
        assert isinstance(loss, Tensor)
        return loss
    lead, device, columns = (
        student_logits.shape[:-1],
        student_logits.device,
        student_logits.shape[-1],
    )
    dtype = row_dtype(student_logits.dtype, teacher_logits.dtype)
    call = prepare(lead, device, dtype, columns, None, **options)
    # The logits of a row that is dropped are replaced, as a NaN times 0 would reach the gradient.
    q, p = (
        _kept(logits.to(dtype), call).softmax(-1) for logits in (student_logits, teacher_logits)
    )
    return _reduced((q - p).square().mean(-1), call)


def _kept(logits: Tensor, call: LossCall) -> Tensor:
    weight = call.rows.weight
    return logits if weight is None else torch.where((weight != 0).unsqueeze(-1), logits, 0.0)


def _reduced(loss: Tensor, call: LossCall) -> Tensor:
    """The rows' loss with the weights and the reduction of a call."""
    if call.rows.weight is not None:
        loss = loss * call.rows.weight
    if not call.summed:
        return loss
    scale: float | Tensor = call.options.scale
    if call.rows.scale is not None:
        scale = call.rows.scale
    elif call.numbers is not None:  # in a compiled graph, the options hold a stand-in
        items = as_tensor(call.numbers.num_items)
        scale = items.reciprocal().to(loss.device, loss.dtype)
    return loss.sum() * scale


def ramp_up(step: float, length: float) -> float:
    r"""The weight of a consistency loss that grows from exp(-5) to 1: exp(-5 (1 - step/length)^2), then 1.

    From Laine and Aila, "Temporal ensembling" (2017), and used by Tarvainen and Valpola (2017).

    Args:
        step: how far training is, in whatever length is in; below 0 counts as 0.
        length: where the weight becomes 1; 0: from the start.

    Raises:
        ValueError, TypeError: length is negative, or an argument is no finite number.
    """
    length = check_number("length", length, 0.0, math.inf, open_right=True)
    step = plain(step)
    if isinstance(step, (bool, Tensor)) or not isinstance(step, (int, float)):
        raise TypeError(f"step must be a number, got {type(step).__name__}")
    if step != step:
        raise ValueError("step must be a number, got nan")
    rest = 1.0 - min(max(step, 0.0), length) / length if length else 0.0
    return math.exp(-5.0 * rest * rest)
