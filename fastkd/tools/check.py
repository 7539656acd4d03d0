"""python -m fastkd check: whether a divergence is what it says.

g             against finite differences of phi, entry by entry, in float64
degree        the teacher's gradient that follows from it, against finite differences, likewise
closed form   against the sums of phi and of g
log 0         logits at -inf on either side and on both, and logits so far apart that p and q underflow
backends      float32, bfloat16 and float16 on each that can run it here, as `doctor` judges them
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd.backends import reference
from fastkd.divergences import ENTRY, RATIO, arguments_of, derivatives
from fastkd.tools import doctor
from fastkd.tools.info import devices, obstacle

STEP = 3e-5  # of the finite differences: their error is about 1e-9 of the terms
CLOSE = 1e-6  # relative to those terms: a wrong derivative is off by far more


class TargetError(Exception):
    """MODULE:NAME does not lead to a divergence; the message says what to do."""


class Report(NamedTuple):
    """What was found, a line each."""

    ok: bool
    lines: list[str]


def find(target: str) -> fastkd.Divergence:
    """The divergence at MODULE:NAME, or the one made by the function there.

    Raises:
        TargetError: there is none.
    """
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name) or "/" in module_name or module_name.endswith(".py"):
        raise TargetError(f"{target!r} is not MODULE:NAME, such as my_losses:triangular")
    sys.path.insert(0, str(Path.cwd()))  # as python -m does, for other ways to start
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise TargetError(
                f"there is no module {error.name!r}; run this where `import {module_name}` works, or set PYTHONPATH"
            ) from None
        raise TargetError(f"importing {module_name!r} failed: {error}") from error
    except Exception as error:
        raise TargetError(f"importing {module_name!r} failed: {_said(error)}") from error
    finally:
        sys.path.pop(0)
    if not hasattr(module, name):
        similar = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {similar[0]!r}?" if similar else ""
        raise TargetError(f"module {module_name!r} has no {name!r}{hint}")
    found = getattr(module, name)
    if isinstance(found, fastkd.Divergence):
        return found
    if not callable(found):
        raise TargetError(_not_a_divergence(target, found))
    try:
        inspect.signature(found).bind()
    except TypeError:
        raise TargetError(
            f"{target} needs arguments; name a fastkd.Divergence, such as "
            f"fastkd.Divergence({name.strip('_')!r}, {name}), or a function without arguments that returns one"
        ) from None
    except ValueError:
        pass  # a callable without a signature: calling it tells
    try:
        made = found()
    except Exception as error:
        raise TargetError(f"{target}() failed: {_said(error)}") from error
    if not isinstance(made, fastkd.Divergence):
        raise TargetError(_not_a_divergence(f"{target}()", made))
    return made


def _not_a_divergence(what: str, value: object) -> str:
    return f"{what} is a {type(value).__name__}, and not a fastkd.Divergence or a function that returns one"


def _said(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)
    line = f" (line {where[-1].lineno} of {Path(where[-1].filename).name})" if where else ""
    return f"{type(error).__name__}: {error}{line}"


def _evaluate(divergence: fastkd.Divergence, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(phi, g) of the definition as it stands, in full shape."""
    p, q = (log_p.exp(), log_q.exp()) if divergence.normalized else (torch.ones_like(log_p),) * 2
    phi, g, _ = derivatives(divergence, p, q, log_p, log_q, log_p - log_q)
    return phi.expand_as(log_p), g.expand_as(log_p)


def _derivatives(f: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives from the left and from the right, entry by entry: they differ where f has a kink."""

    def one_sided(h: float) -> Tensor:
        return (4.0 * f(at + h) - 3.0 * f(at) - f(at + 2.0 * h)) / (2.0 * h)

    return one_sided(-STEP), one_sided(STEP)


def _outside(value: Tensor, left: Tensor, right: Tensor, size: Tensor) -> Tensor:
    """Where value is not between the two derivatives: at a kink any subgradient will do. A NaN is outside."""
    low, high = torch.minimum(left, right), torch.maximum(left, right)
    slack = CLOSE * (size + low.abs() + high.abs())
    return ~((value >= low - slack) & (value <= high + slack))


def _points(normalized: bool) -> tuple[Tensor, Tensor]:
    """Every pair of log p and log q of two interleaved grids, flat; they never meet."""
    low, high = (-18.0, -0.01) if normalized else (-9.0, 9.0)
    grid = torch.linspace(low, high, 60, dtype=torch.float64)
    log_p, log_q = torch.meshgrid(grid, grid - 0.29 * (grid[1] - grid[0]), indexing="ij")
    return log_p.flatten(), log_q.flatten()


def _rows(normalized: bool) -> tuple[Tensor, Tensor]:
    """Rows of log p and log q [6, 50], flat to peaked."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64).unsqueeze(-1)
    log_p, log_q = (
        spread * torch.randn(6, 50, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return (log_p.log_softmax(-1), log_q.log_softmax(-1)) if normalized else (log_p, log_q)


class _Check:
    """The divergence under test, and what was found so far."""

    def __init__(self, divergence: fastkd.Divergence) -> None:
        self.divergence, self.ok, self.lines = divergence, True, [f"divergence {divergence.name}"]

    def good(self, what: str, line: str) -> None:
        self.lines.append(f"  ok    {what}: {line}")

    def note(self, what: str, line: str) -> None:
        self.lines.append(f"  -     {what}: {line}")

    def bad(self, what: str, line: str) -> None:
        self.ok = False
        self.lines.append(f"  FAIL  {what}: {line}")

    def definition(self) -> bool:
        """The function can be called and returns (phi, g); the checks that follow need that."""
        log_p, log_q = _points(self.divergence.normalized)
        try:
            phi, g = _evaluate(self.divergence, log_p, log_q)
        except Exception as error:
            entry = arguments_of(self.divergence.function, *ENTRY, RATIO)
            arguments = ", ".join([*entry, *(f"{x:g}" for x in self.divergence.params)])
            self.bad(
                "definition", f"function({arguments}) does not return (phi, g): {_said(error)}"
            )
            return False
        for name, value in (("phi", phi), ("g", g)):
            wrong = ~value.isfinite()
            if wrong.any():
                at = int(wrong.nonzero()[0])
                self.bad(
                    "definition",
                    f"{name} is {float(value[at])} at {self.place(log_p[at], log_q[at])}",
                )
                return False
        self.good("definition", f"phi and g are finite at {log_p.numel()} pairs of p and q")
        return True

    def place(self, log_p: Tensor, log_q: Tensor) -> str:
        """A pair of probabilities, as messages show it."""
        if self.divergence.normalized:
            return f"p = {float(log_p.exp()):.4g}, q = {float(log_q.exp()):.4g}"
        return f"log_p = {float(log_p):.4g}, log_q = {float(log_q):.4g}"

    def student(self) -> None:
        """g is the total derivative of phi by log q."""
        log_p, log_q = _points(self.divergence.normalized)
        phi, g = _evaluate(self.divergence, log_p, log_q)
        left, right = _derivatives(lambda x: _evaluate(self.divergence, log_p, x)[0], log_q)
        # Some units of rounding in phi, over the step.
        size = phi.abs() * (32 * torch.finfo(torch.float64).eps / STEP / CLOSE)
        wrong = _outside(g, left, right, size)
        if wrong.any():
            at = int(torch.where(wrong, (g - left).abs(), -1.0).argmax())
            where = self.place(log_p[at], log_q[at])
            self.bad(
                "g",
                f"is not d phi / d log q at {int(wrong.sum())} of {wrong.numel()} pairs. At {where} it is "
                f"{float(g[at]):.6g}, and the derivative {float(left[at]):.6g}",
            )
        else:
            self.good("g", f"is d phi / d log q, by finite differences at {g.numel()} pairs")

    def teacher(self) -> None:
        """The projection of degree * phi - g is that of d phi / d log p."""
        divergence = self.divergence
        log_p, log_q = _rows(divergence.normalized)
        phi, g = _evaluate(divergence, log_p, log_q)
        left, right = _derivatives(lambda x: _evaluate(divergence, x, log_q)[0], log_p)

        def project(x: Tensor) -> Tensor:
            return reference._project(x, log_p.exp(), x.sum(-1) if divergence.normalized else None)

        exact = project((left + right) / 2)
        size = ((left.abs() + g.abs() + phi.abs()).amax(-1, keepdim=True)).expand_as(exact)
        # The degree that fits best, should it exist: exact = degree * phi - g.
        basis = project(phi)
        fit = round(
            float(((exact + project(g)) * basis).sum() / (basis * basis).sum().clamp(min=1e-300)), 6
        )
        fits = not _outside(project(fit * phi - g), exact, exact, size).any()
        if divergence.degree is None:
            hint = (
                f" degree={fit:g} would be right: set it" if fits else " No degree would be right"
            )
            self.note("degree", f"not set, so a teacher that requires grad is refused.{hint}")
            return
        found = project(divergence.degree * phi - g)
        wrong = _outside(found, exact, exact, size)
        if not wrong.any():
            self.good(
                "degree",
                f"{divergence.degree:g} gives the teacher's gradient, by finite differences",
            )
            return
        worst = float((found - exact).abs().amax() / exact.abs().amax())
        advice = (
            f"degree={fit:g} fits"
            if fits
            else "no degree fits: leave it None, and detach the teacher"
        )
        self.bad(
            "degree",
            f"the teacher's gradient that follows from degree {divergence.degree:g} is off by {worst:.2g} of the "
            f"largest entry; {advice}",
        )

    def minimum(self) -> None:
        """A student that equals the teacher is the best one."""
        divergence = self.divergence
        log_p, log_q = _rows(divergence.normalized)
        best, at_best = _evaluate(divergence, log_p, log_p)
        phi, g = _evaluate(divergence, log_p, log_q)
        total = at_best.sum(-1) if divergence.normalized else None
        gradient = reference._project(at_best, log_p.exp(), total)
        rounding = 1e-9 * (phi.abs() + best.abs()).sum(-1)
        if not bool((gradient.abs() <= 1e-9 * g.abs().sum(-1, keepdim=True)).all()):
            self.bad("minimum", "the gradient is not 0 where the student equals the teacher")
        elif not bool((phi.sum(-1) >= best.sum(-1) - rounding).all()):
            at = int((phi.sum(-1) - best.sum(-1)).argmin())
            lower, value = float(phi.sum(-1)[at]), float(best.sum(-1)[at])
            self.bad(
                "minimum", f"{lower:.6g} for a random student, {value:.6g} for the teacher itself"
            )
        else:
            self.good("minimum", "where the student equals the teacher")

    def closed_form(self) -> None:
        """The moments give the sums."""
        divergence, form = self.divergence, self.divergence.closed_form
        if form is None:
            self.note("closed form", "none")
            return
        if not divergence.normalized:
            self.bad("closed form", "is for distributions, and normalized is False")
            return
        log_p, log_q = _rows(True)
        phi, g = _evaluate(divergence, log_p, log_q)
        p, q = log_p.exp(), log_q.exp()
        forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
        value = form.forward * forward + form.reverse * reverse - form.cross * (p * log_q).sum(-1)
        slope = -form.forward + form.reverse * (reverse + 1.0) - form.cross
        for name, given, terms in (("phi", value, phi), ("g", slope, g)):
            summed = terms.sum(-1)
            error = (given - summed).abs()
            if not bool((error <= 1e-10 * terms.abs().sum(-1).clamp(min=1e-3)).all()):
                at = int(error.argmax())
                self.bad(
                    "closed form",
                    f"its sum of {name} is {float(given[at]):.8g} where the entries add up to {float(summed[at]):.8g}",
                )
                return
        self.good("closed form", "is the sum of phi, and of g")

    def log_zero(self) -> None:
        """Infinite logits, and probabilities that underflow, in plain PyTorch in both precisions."""
        both, student, teacher = _row("both"), _row("student"), _row("teacher")
        for dtype in (torch.float64, torch.float32):
            loss, gradient = self.loss(*(x.to(dtype) for x in both))
            kept_loss, kept_gradient = self.loss(*(x[:, 2:].to(dtype) for x in both))
            wide = torch.nn.functional.pad(kept_gradient, (2, 0))
            if not (torch.allclose(loss, kept_loss) and torch.allclose(gradient, wide, atol=1e-7)):
                self.bad("-inf on both sides", "the columns do not count for nothing")
                return
        self.good("-inf on both sides", "counts for nothing")
        for where, row in (("the student", student), ("the teacher", teacher)):
            self.finite(f"-inf in {where} alone", row)
        far = _row("far")
        self.finite("p and q underflow", far)

    def finite(self, what: str, row: tuple[Tensor, Tensor]) -> None:
        """No NaN; a finite value comes with a finite gradient, and float32 has both if float64 does."""
        exact, exact_gradient = self.loss(*row)
        loss, gradient = self.loss(*(x.float() for x in row))
        for dtype, value, slope in (
            ("float64", exact, exact_gradient),
            ("float32", loss, gradient),
        ):
            if value.isnan().any():
                self.bad(what, f"the loss is NaN in {dtype}")
                return
            if value.isfinite().all() and not slope.isfinite().all():
                self.bad(what, f"the loss is finite in {dtype}, and its gradient is not")
                return
        if bool(exact.isfinite().all()) != bool(loss.isfinite().all()):
            self.bad(
                what, f"the loss is {float(exact):.6g} in float64 and {float(loss):.6g} in float32"
            )
            return
        if math.isfinite(float(exact)):
            self.good(what, f"loss {float(exact):.6g}, the gradient is finite")
        else:
            state = "finite" if exact_gradient.isfinite().all() else "not finite either"
            self.good(what, f"the loss is infinite, the gradient is {state}")

    def loss(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, the student's gradient) in the dtype of the logits, in which the reference does not compute."""
        student = student.detach().clone().requires_grad_()
        loss = fastkd.kd_loss(student, teacher, divergence=self.divergence, backend="portable")
        (gradient,) = torch.autograd.grad(loss, student)
        return loss.detach(), gradient

    def backends(self) -> None:
        """As `doctor` judges them."""
        truth = doctor.Truth()
        for name in fastkd.available_backends():
            obstacles = {device: obstacle(name, device, self.divergence) for device in devices()}
            served = [device for device, why in obstacles.items() if why is None]
            for device in served:
                verdict = doctor.judge(self.divergence, name, device, truth)
                what = f"{name} on {device}"
                if verdict.failure is None:
                    self.good(what, f"largest error / bar: {doctor.ratios(verdict.worst)}")
                else:
                    self.bad(what, str(verdict.failure))
            if not served:
                why = next(why for why in obstacles.values() if why is not None)
                self.note(name, f"not run: {why.reason}. {why.remedy}")


def _row(kind: str) -> tuple[Tensor, Tensor]:
    """A row of student and teacher logits [1, 12] with that difficulty, in float64."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (
        2.0 * torch.randn(1, 12, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    if kind == "far":  # in the last columns exp(-120) and exp(-130), which are 0 in float32
        student[:, 6:] -= 120.0
        teacher[:, 6:] -= 130.0
    if kind in ("both", "student"):
        student[:, :2] = -math.inf
    if kind in ("both", "teacher"):
        teacher[:, :2] = -math.inf
    return student, teacher


def check(divergence: fastkd.Divergence) -> Report:
    """Everything that can be said about a divergence on this machine."""
    found = _Check(divergence)
    with doctor.own_settings():
        if found.definition():
            found.student()
            found.teacher()
            found.minimum()
            found.closed_form()
            found.log_zero()
            found.backends()
    found.lines.append("it is what it says" if found.ok else "something is wrong: see FAIL above")
    return Report(found.ok, found.lines)
