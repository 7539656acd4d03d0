"""Mean teachers: the teacher is a moving average of the student."""

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
    prepare,
)
from fastkd.call.contract import row_dtype
from fastkd.call.options import as_tensor
from fastkd.core.models import unwrapped
from fastkd.core.scalars import check_number, plain
from fastkd.core.tensors import check_readable, savable_when_compiled
from fastkd.functional import kd_loss

BUFFERS = ("copy", "average", "own")
FORMS = ("mse", "kl")


class MeanTeacher(nn.Module):
    r"""A teacher that is the exponential moving average of a student (Tarvainen and Valpola 2017).

        theta' <- a theta' + (1 - a) theta,    a = min(1 - 1/(t + 1), decay)

    t is 1 at the first update, as in the authors' code. So the teacher is the plain mean of all students so far, until
    decay limits a. Call :meth:`update` after each step of the optimizer.

    Args:
        student: the module to start from. It is copied, without the wrappers of torch.compile and
            DistributedDataParallel.
        decay: in [0, 1]; in the paper 0.99 while the student improves quickly, and 0.999 later.
        buffers: how buffers such as the statistics of batch normalization are updated. "copy" copies the student's.
            "average" averages floating-point buffers and copies the others. "own" does not update them; the teacher
            collects its own statistics in training mode, as in the authors' code.
        training: whether the teacher runs in training mode, with dropout and batch statistics, as in the authors' code.
            :meth:`train` and :meth:`eval` do not change it.
        dtype: dtype of the teacher's floating-point parameters; None: the student's. bfloat16 has too few digits for an
            average: with decay = 0.999, a step is lost in rounding.

    Call the module like the student; it computes no gradient. state_dict() includes the number of updates.

    Memory: one more copy of the student.

    Raises:
        ValueError, TypeError: an argument is wrong, or a student passed to update() has another architecture.
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
        """Set the mode of this module; the teacher keeps the mode that `training` requested."""
        super().train(mode)
        self.model.train(self.teacher_trains)
        return self

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run the teacher without a graph."""
        with torch.no_grad():
            return self.model(*inputs, **options)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Include one more state of the student in the average."""
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
        """Restore the number of updates, for load_state_dict()."""
        self.steps = int(state["steps"])

    def extra_repr(self) -> str:
        """The options, for repr()."""
        return f"decay={self.decay}, buffers={self.buffers_by!r}, training={self.teacher_trains}"


def _check_alike(teacher: nn.Module, student: nn.Module) -> None:
    for kind in ("parameters", "buffers"):
        teacher_shapes, student_shapes = (
            {name: tuple(value.shape) for name, value in getattr(model, f"named_{kind}")()}
            for model in (teacher, student)
        )
        if teacher_shapes != student_shapes:
            name = sorted(dict(teacher_shapes.items() ^ student_shapes.items()))[0]
            raise ValueError(
                f"student must have the {kind} of the model that the teacher was copied from; {name} has shape "
                f"{teacher_shapes.get(name)} in the teacher and {student_shapes.get(name)} in the student"
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
    r"""The distance of a student from its mean teacher (Tarvainen and Valpola 2017).

        "mse"    |softmax(s) - softmax(t)|^2 / V    the paper's main form
        "kl"     KL(softmax(t) || softmax(s))       the paper's other form, by :func:`fastkd.kd_loss`

    Args:
        student_logits: [..., V], float32, bfloat16, float16 or float64.
        teacher_logits: of the same shape and dtypes; if they require grad, they get a gradient.
        form: one of the above.
        mask: [...] bool; a row where it is False is dropped: its loss and gradient are 0, whatever its logits are.
        weight: [...] float, multiplies the loss of a row.
        reduction: "none", "sum", "mean" (sum / number of counted rows) or "batchmean", as in kd_loss.
        num_items: replaces the denominator of "mean" and "batchmean".
        backend: the backend of kd_loss for "kl"; "mse" is plain PyTorch.

    Returns:
        0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits).

    Memory: for "mse", both softmaxes and their difference.

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
    # The logits of dropped rows are replaced, because their NaN times 0 would reach the gradient.
    q, p = (
        _clear_dropped(logits.to(dtype), call).softmax(-1)
        for logits in (student_logits, teacher_logits)
    )
    return _reduced((q - p).square().mean(-1), call)


def _clear_dropped(logits: Tensor, call: LossCall) -> Tensor:
    weight = call.rows.weight
    return logits if weight is None else torch.where((weight != 0).unsqueeze(-1), logits, 0.0)


def _reduced(loss: Tensor, call: LossCall) -> Tensor:
    """Apply the weights and the reduction of a call to the loss of each row."""
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
    r"""Weight of a consistency loss that grows from exp(-5) to 1: exp(-5 (1 - step/length)^2), then 1.

    From Laine and Aila, "Temporal ensembling" (2017), and used by Tarvainen and Valpola (2017).

    Args:
        step: the position in training, in the unit of length; a negative step counts as 0.
        length: the step at which the weight reaches 1; 0: the weight is always 1.

    Raises:
        ValueError, TypeError: length is negative or infinite, or an argument is not a number.
    """
    length = check_number("length", length, 0.0, math.inf, open_right=True)
    step = plain(step)
    if isinstance(step, (bool, Tensor)) or not isinstance(step, (int, float)):
        raise TypeError(f"step must be a number, got {type(step).__name__}")
    if step != step:
        raise ValueError("step must be a number, got nan")
    remaining = 1.0 - min(max(step, 0.0), length) / length if length else 0.0
    exponent = -5.0 * remaining * remaining
    # torch.compile would make math.exp of a step a constant of the graph; a power stays an expression of the step.
    compiling = torch.compiler.is_compiling()
    return float(math.e**exponent) if compiling else math.exp(exponent)
