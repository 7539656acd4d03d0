"""Students that teach each other, themselves and their later generations; no teacher has to be trained before.

mutual_loss         M students, each with the others as teachers (fastkd/online/mutual.py); co-distillation is one
                    of its forms
ensemble_loss       branches of one model, taught by their gated ensemble as it is trained
MeanTeacher         a teacher that is the moving average of the student, with consistency_loss and ramp_up
born_again          the student of a generation teaches the next; generations_teacher makes an ensemble of them
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.call.checks import (
    Prepared,
    check_alike,
    check_choice,
    check_columns,
    check_flags,
    check_int,
    check_logits,
    check_number,
    prepare,
)
from fastkd.call.contract import row_dtype
from fastkd.core.models import unwrapped
from fastkd.core.scalars import plain
from fastkd.core.tensors import check_readable, savable, savable_when_compiled
from fastkd.functional import kd_loss
from fastkd.online.mutual import MutualParts, check_students, mutual_loss
from fastkd.teachers import Ensemble

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

BUFFERS = ("copy", "average", "own")
FORMS = ("mse", "kl")


# ---- on-the-fly ensembles


def ensemble_logits(logits: Sequence[Tensor], gate: Tensor | None = None) -> Tensor:
    r"""The gated mean of the branches' logits, sum_i g_i z_i (Lan, Zhu and Gong 2018).

    Args:
        logits: of every branch [..., V], two or more, of one shape, dtype and device.
        gate: [M] or [..., M] floating point, which sums to 1 over the last dimension: the softmax of what the model has
            learned. None: 1/M each.

    Returns:
        [..., V], differentiable by branches and gate; float32 (float64 for float64 logits), as logits that are rounded
        once more would cost the losses of them digits.

    Memory: the result, and for each branch that is not float32 a copy while its product is made.

    Raises:
        ValueError, TypeError: the message names the argument.
    """
    branches = check_students(logits)
    dtype, lead = row_dtype(branches[0].dtype), branches[0].shape[:-1]
    if gate is None:
        return torch.stack([branch.to(dtype) for branch in branches]).mean(0)
    if not isinstance(gate, Tensor):
        raise TypeError(f"gate must be a tensor or None, got {type(gate).__name__}")
    if not gate.is_floating_point():
        raise TypeError(f"gate must be floating point, got {gate.dtype}")
    shapes = ((len(branches),), (*lead, len(branches)))
    if gate.shape not in shapes:
        raise ValueError(
            f"gate must have one weight a branch, shape {shapes[0]} or {shapes[1]}; got {tuple(gate.shape)}"
        )
    if gate.device != branches[0].device:
        raise ValueError(
            f"gate must be on {branches[0].device}, where the logits are; got {gate.device}"
        )
    gate, *branches = savable(gate, *branches)
    weights = gate.to(dtype).unsqueeze(-1).unbind(-2)
    mixed = weights[0] * branches[0].to(dtype)
    for weight, branch in zip(weights[1:], branches[1:], strict=True):
        mixed = torch.addcmul(mixed, weight, branch.to(dtype))
    return mixed


def ensemble_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    gate: Tensor | None = None,
    *,
    temperature: float = 3.0,
    ensemble_weight: float = 1.0,
    **options: Any,
) -> Tensor:
    r"""On-the-fly native ensemble, ONE (Lan, Zhu and Gong 2018): branches taught by their ensemble, that by the labels.

        sum_i CE(z_i, label)  +  CE(z_e, label)  +  ensemble_weight T^2 sum_i KL(softmax(z_e / T) || softmax(z_i / T))

    with z_e = :func:`ensemble_logits`. The ensemble is a constant in the last term: branches learn from it, and it
    learns, with its gate and again with its branches, from the labels. A branch's two terms are one sweep.

    Args:
        logits: of every branch [..., V], as in ensemble_logits.
        labels: [...] int64.
        gate: as in ensemble_logits.
        temperature: T; 3 in the paper.
        ensemble_weight: multiplies the divergences; 1 in the paper.
        **options: scale_by_temperature, label_smoothing, ignore_index, mask, weight, reduction, num_items and backend,
            as :func:`fastkd.kd_loss` has them.

    Returns:
        0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits).

    Memory: the ensemble's logits in float32, and the gradients of all.

    Raises:
        ValueError, TypeError: the message names the argument.
    """
    allowed = {"scale_by_temperature", "label_smoothing", "ignore_index", "mask", "weight", "reduction", "num_items",
               "backend"}  # fmt: skip
    if unknown := options.keys() - allowed:
        raise TypeError(f"ensemble_loss has no option {', '.join(sorted(unknown))}")
    branches = _without_dropped(check_students(logits), labels, options)
    mixed = ensemble_logits(branches, gate)
    target = mixed.detach()
    ensemble_weight = check_number(
        "ensemble_weight", ensemble_weight, 0.0, math.inf, open_right=True
    )
    total = 1.0 + ensemble_weight
    # alpha D + (1 - alpha) CE in one sweep, and both times 1 + ensemble_weight.
    alpha = ensemble_weight / total
    loss = _loss(mixed, target, labels, alpha=0.0, **options)
    for branch in branches:
        of_branch = _loss(branch, target, labels, alpha=alpha, temperature=temperature, **options)
        loss = loss + total * of_branch
    return loss


def _without_dropped(
    branches: Sequence[Tensor], labels: Tensor, options: dict[str, Any]
) -> Sequence[Tensor]:
    """The branches with 0 in rows that are dropped, which may hold anything and would reach the gate's gradient."""
    kept = labels != options.get("ignore_index", -100) if isinstance(labels, Tensor) else None
    for name in ("mask", "weight"):
        value = options.get(name)
        if isinstance(value, Tensor) and (kept is None or _alike(value, kept)):
            kept = value != 0 if kept is None else kept & (value != 0)
    lead, device = branches[0].shape[:-1], branches[0].device
    if kept is None or kept.shape != lead or kept.device != device:
        return branches  # kd_loss says what is wrong
    return [torch.where(kept.unsqueeze(-1), branch, 0.0) for branch in branches]


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.device == second.device


def _loss(*arguments: Tensor, **options: Any) -> Tensor:
    loss = kd_loss(*arguments, **options)
    assert isinstance(loss, Tensor)
    return loss


# ---- mean teachers


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
        return _loss(student_logits, teacher_logits, **options)
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


def _kept(logits: Tensor, call: Prepared) -> Tensor:
    weight = call.rows.weight
    return logits if weight is None else torch.where((weight != 0).unsqueeze(-1), logits, 0.0)


def _reduced(loss: Tensor, call: Prepared) -> Tensor:
    """The rows' loss with the weights and the reduction of a call."""
    if call.rows.weight is not None:
        loss = loss * call.rows.weight
    if not call.summed:
        return loss
    scale: float | Tensor = call.options.scale
    if call.rows.scale is not None:
        scale = call.rows.scale
    elif (
        call.numbers is not None
    ):  # in a compiled graph the options hold a stand-in (fastkd.engine.graphs)
        items = torch.ones((), dtype=torch.float64, device="cpu") * call.numbers.items
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


# ---- born-again networks


def born_again(
    make_student: Callable[[], nn.Module],
    train: Callable[[nn.Module, nn.Module | None], object],
    generations: int,
    *,
    teacher: nn.Module | None = None,
) -> Iterator[nn.Module]:
    """Born-again networks (Furlanello et al. 2018): the student of a generation teaches the next.

        for model in born_again(make_student, train, generations=3):
            evaluate(model)

    Args:
        make_student: a fresh student, of the same architecture in the paper.
        train: train(student, teacher) trains the student in place; teacher is None for a first generation without one,
            which learns from the labels. How it distils is its own: :func:`fastkd.kd_loss`, for instance.
        generations: how many students.
        teacher: of the first generation, or None.

    Yields:
        Each generation once it is trained, in evaluation mode and frozen, as it is the next one's teacher.

    Memory: two models at a time, and those that the caller keeps.

    Raises:
        ValueError, TypeError: an argument is wrong; before anything is trained.
    """
    for argument, value in (("make_student", make_student), ("train", train)):
        if not callable(value):
            raise TypeError(f"{argument} must be callable, got {type(value).__name__}")
    if teacher is not None and not callable(teacher):
        raise TypeError(f"teacher must be a module or None, got {type(teacher).__name__}")
    generations = check_int("generations", generations)
    if generations < 1:
        raise ValueError(f"generations must be at least 1, got {generations}")
    return _generations(make_student, train, generations, teacher)


def _generations(
    make_student: Callable[[], nn.Module],
    train: Callable[[nn.Module, nn.Module | None], object],
    generations: int,
    teacher: nn.Module | None,
) -> Iterator[nn.Module]:
    for _ in range(generations):
        student = make_student()
        if student is teacher:
            raise ValueError("make_student must return a fresh module, and returned its teacher")
        train(student, teacher)
        teacher = student.eval().requires_grad_(False)
        yield teacher


def generations_teacher(
    models: Sequence[nn.Module],
    *inputs: Any,
    weights: Sequence[float] | None = None,
    mean: str = "arithmetic",
    **options: Any,
) -> Ensemble:
    """The generations together as one teacher of a batch: a :class:`fastkd.Ensemble` of their logits on it.

    Args:
        models: modules that return logits [..., V], or something with those as `.logits`.
        *inputs: what they are called with.
        weights: as in Ensemble.
        mean: as in Ensemble: "arithmetic" as in the paper's ensembles, or "geometric".
        **options: more of what they are called with.

    Memory: the logits of every model.

    Raises:
        ValueError, TypeError: as Ensemble does.
    """
    if not isinstance(models, Iterable) or isinstance(models, (str, Tensor)):
        raise TypeError(f"models must be a list of modules, got {type(models).__name__}")
    models = list(models)
    for index, model in enumerate(models):
        if not callable(model):
            raise TypeError(f"models[{index}] must be callable, got {type(model).__name__}")
    with torch.no_grad():
        outputs = [model(*inputs, **options) for model in models]
    return Ensemble([getattr(output, "logits", output) for output in outputs], weights, mean)
