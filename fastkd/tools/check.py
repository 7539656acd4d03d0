"""The command python -m fastkd check, which verifies a divergence.

g             compared with finite differences of phi, entry by entry, in float64
degree        the teacher's gradient that it implies, compared with finite differences in float64
closed form   its value and sum of g, compared with the sums of phi and g
log 0         logits at -inf on either side and on both, and logits so far apart that p and q underflow
backends      float32, bfloat16 and float16 on every backend that can run it here, with the bars of `doctor`
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
from fastkd.divergences import ENTRY, RATIO, arguments_of, derivatives, has_teacher_derivative
from fastkd.tools import doctor
from fastkd.tools.info import devices, obstacle

STEP = 3e-5  # of the finite differences, whose relative error is then about 1e-9
CLOSE = 1e-6  # relative tolerance; wrong derivatives differ by far more


class TargetError(Exception):
    """MODULE:NAME does not name a divergence; the message says what to change."""


class Report(NamedTuple):
    """Result of a check: whether everything passed, and one line per finding."""

    ok: bool
    lines: list[str]


def find(target: str) -> fastkd.Divergence:
    """Return the divergence named MODULE:NAME, or the one that the function of that name returns.

    Raises:
        TargetError: there is no such divergence.
    """
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name) or "/" in module_name or module_name.endswith(".py"):
        raise TargetError(f"{target!r} is not MODULE:NAME, such as my_losses:triangular")
    sys.path.insert(
        0, str(Path.cwd())
    )  # python -m does the same; other ways to start Python may not
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise TargetError(
                f"there is no module {error.name!r}; run this where `import {module_name}` works, or set PYTHONPATH"
            ) from None
        raise TargetError(f"importing {module_name!r} failed: {error}") from error
    except Exception as error:
        raise TargetError(f"importing {module_name!r} failed: {_describe(error)}") from error
    finally:
        sys.path.pop(0)
    if not hasattr(module, name):
        similar = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {similar[0]!r}?" if similar else ""
        raise TargetError(f"module {module_name!r} has no {name!r}{hint}")
    value = getattr(module, name)
    if isinstance(value, fastkd.Divergence):
        return value
    if not callable(value):
        raise TargetError(_not_a_divergence(target, value))
    try:
        inspect.signature(value).bind()
    except TypeError:
        raise TargetError(
            f"{target} needs arguments; name a fastkd.Divergence, such as "
            f"fastkd.Divergence({name.strip('_')!r}, {name}), or a function without arguments that returns one"
        ) from None
    except ValueError:
        pass  # a callable without a signature; the call below raises if it needs arguments
    try:
        divergence = value()
    except Exception as error:
        raise TargetError(f"{target}() failed: {_describe(error)}") from error
    if not isinstance(divergence, fastkd.Divergence):
        raise TargetError(_not_a_divergence(f"{target}()", divergence))
    return divergence


def _not_a_divergence(what: str, value: object) -> str:
    return f"{what} is a {type(value).__name__}, not a fastkd.Divergence or a function that returns one"


def _describe(error: BaseException) -> str:
    """Return an exception's type and message, with the line that raised it."""
    where = traceback.extract_tb(error.__traceback__)
    line = f" (line {where[-1].lineno} of {Path(where[-1].filename).name})" if where else ""
    return f"{type(error).__name__}: {error}{line}"


def _evaluate(divergence: fastkd.Divergence, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate the definition without a policy for log 0; return (phi, g), expanded to the shape of log_p."""
    p, q = (log_p.exp(), log_q.exp()) if divergence.normalized else (torch.ones_like(log_p),) * 2
    phi, g, _ = derivatives(divergence, p, q, log_p, log_q, log_p - log_q)
    return phi.expand_as(log_p), g.expand_as(log_p)


def _projected(derivative: Tensor, log_p: Tensor, divergence: fastkd.Divergence) -> Tensor:
    """Return a derivative by tempered logits, from that by log_p; x - p sum(x) if the divergence normalizes."""
    if not divergence.normalized:
        return derivative
    return derivative - log_p.exp() * derivative.sum(-1, keepdim=True)


def _derivatives(f: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """Return the elementwise left and right derivatives of f, which differ where f has a kink."""

    def one_sided(h: float) -> Tensor:
        return (4.0 * f(at + h) - 3.0 * f(at) - f(at + 2.0 * h)) / (2.0 * h)

    return one_sided(-STEP), one_sided(STEP)


def _outside(value: Tensor, left: Tensor, right: Tensor, size: Tensor) -> Tensor:
    """Return where value is not between the two derivatives, within the tolerance; True for NaN.

    Values in between are allowed, because any subgradient is valid at a kink.
    """
    low, high = torch.minimum(left, right), torch.maximum(left, right)
    slack = CLOSE * (size + low.abs() + high.abs())
    return ~((value >= low - slack) & (value <= high + slack))


def _points(normalized: bool) -> tuple[Tensor, Tensor]:
    """Return all pairs of log p and log q from two interleaved grids, flattened; log p and log q are never equal."""
    low, high = (-18.0, -0.01) if normalized else (-9.0, 9.0)
    grid = torch.linspace(low, high, 60, dtype=torch.float64)
    log_p, log_q = torch.meshgrid(grid, grid - 0.29 * (grid[1] - grid[0]), indexing="ij")
    return log_p.flatten(), log_q.flatten()


def _rows(normalized: bool) -> tuple[Tensor, Tensor]:
    """Return log p and log q [6, 50], from nearly uniform to peaked rows."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64).unsqueeze(-1)
    log_p, log_q = (
        spread * torch.randn(6, 50, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return (log_p.log_softmax(-1), log_q.log_softmax(-1)) if normalized else (log_p, log_q)


class _Check:
    """The divergence under test and the findings so far."""

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
        """Check that the function can be called and returns finite (phi, g), which the other checks need."""
        log_p, log_q = _points(self.divergence.normalized)
        try:
            phi, g = _evaluate(self.divergence, log_p, log_q)
        except Exception as error:
            entry = arguments_of(self.divergence.function, *ENTRY, RATIO)
            arguments = ", ".join([*entry, *(f"{x:g}" for x in self.divergence.params)])
            self.bad(
                "definition", f"function({arguments}) does not return (phi, g): {_describe(error)}"
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
        """Format a pair of probabilities for a message."""
        if self.divergence.normalized:
            return f"p = {float(log_p.exp()):.4g}, q = {float(log_q.exp()):.4g}"
        return f"log_p = {float(log_p):.4g}, log_q = {float(log_q):.4g}"

    def student(self) -> None:
        """Check that g is the total derivative of phi with respect to log q."""
        log_p, log_q = _points(self.divergence.normalized)
        phi, g = _evaluate(self.divergence, log_p, log_q)
        left, right = _derivatives(lambda x: _evaluate(self.divergence, log_p, x)[0], log_q)
        # Allow for 32 units of rounding error in phi, which the finite difference divides by the step.
        size = phi.abs() * (32 * torch.finfo(torch.float64).eps / STEP / CLOSE)
        wrong = _outside(g, left, right, size)
        if wrong.any():
            at = int(torch.where(wrong, (g - left).abs(), -1.0).argmax())
            where = self.place(log_p[at], log_q[at])
            self.bad(
                "g",
                f"is not d phi / d log q at {int(wrong.sum())} of {wrong.numel()} pairs. At {where} it is "
                f"{float(g[at]):.6g}, but the derivative is {float(left[at]):.6g}",
            )
        else:
            self.good("g", f"is d phi / d log q, by finite differences at {g.numel()} pairs")

    def teacher(self) -> None:
        """Check that degree * phi - g gives the same teacher gradient as d phi / d log p."""
        divergence = self.divergence
        log_p, log_q = _rows(divergence.normalized)
        phi, g = _evaluate(divergence, log_p, log_q)
        left, right = _derivatives(lambda x: _evaluate(divergence, x, log_q)[0], log_p)

        def project(x: Tensor) -> Tensor:
            return _projected(x, log_p, divergence)

        exact = project((left + right) / 2)
        size = ((left.abs() + g.abs() + phi.abs()).amax(-1, keepdim=True)).expand_as(exact)
        # Fit the degree by least squares to exact = project(degree * phi - g).
        basis = project(phi)
        fit = round(
            float(((exact + project(g)) * basis).sum() / (basis * basis).sum().clamp(min=1e-300)), 6
        )
        fits = not _outside(project(fit * phi - g), exact, exact, size).any()
        if divergence.degree is None and has_teacher_derivative(divergence):
            p, q = (
                (log_p.exp(), log_q.exp())
                if divergence.normalized
                else (torch.ones_like(log_p),) * 2
            )
            h = derivatives(divergence, p, q, log_p, log_q, log_p - log_q)[2]
            if _outside(project(h), exact, exact, size).any():
                self.bad("h", "is not d phi / d log p, by finite differences")
            else:
                self.good("h", "gives the teacher's gradient, by finite differences")
            return
        if divergence.degree is None:
            hint = f" Set degree={fit:g}, which fits" if fits else " No degree fits"
            self.note("degree", f"not set, so a teacher that requires grad raises.{hint}")
            return
        implied = project(divergence.degree * phi - g)
        wrong = _outside(implied, exact, exact, size)
        if not wrong.any():
            self.good(
                "degree",
                f"{divergence.degree:g} gives the teacher's gradient, by finite differences",
            )
            return
        worst = float((implied - exact).abs().amax() / exact.abs().amax())
        advice = (
            f"degree={fit:g} fits"
            if fits
            else "no degree fits: set degree=None, and detach the teacher"
        )
        self.bad(
            "degree",
            f"degree {divergence.degree:g} implies a teacher's gradient that is off by {worst:.2g} of its largest "
            f"entry; {advice}",
        )

    def minimum(self) -> None:
        """Check that the divergence is smallest where the student equals the teacher."""
        divergence = self.divergence
        log_p, log_q = _rows(divergence.normalized)
        best, at_best = _evaluate(divergence, log_p, log_p)
        phi, g = _evaluate(divergence, log_p, log_q)
        gradient = _projected(at_best, log_p, divergence)
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
            self.good("minimum", "is where the student equals the teacher")

    def closed_form(self) -> None:
        """Check that the moments of the closed form give the sums of phi and g."""
        divergence, form = self.divergence, self.divergence.closed_form
        if form is None:
            self.note("closed form", "none")
            return
        if not divergence.normalized:
            self.bad("closed form", "needs probabilities, but normalized is False")
            return
        log_p, log_q = _rows(True)
        phi, g = _evaluate(divergence, log_p, log_q)
        p, q = log_p.exp(), log_q.exp()
        forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
        value = form.forward * forward + form.reverse * reverse - form.cross * (p * log_q).sum(-1)
        slope = -form.forward + form.reverse * (reverse + 1.0) - form.cross
        for name, closed, terms in (("phi", value, phi), ("g", slope, g)):
            summed = terms.sum(-1)
            error = (closed - summed).abs()
            if not bool((error <= 1e-10 * terms.abs().sum(-1).clamp(min=1e-3)).all()):
                at = int(error.argmax())
                self.bad(
                    "closed form",
                    f"its sum of {name} is {float(closed[at]):.8g}, but the entries add up to {float(summed[at]):.8g}",
                )
                return
        self.good("closed form", "gives the sums of phi and g")

    def log_zero(self) -> None:
        """Check infinite logits and probabilities that underflow, in float64 and float32 on the portable backend."""
        both, student, teacher = _row("both"), _row("student"), _row("teacher")
        for dtype in (torch.float64, torch.float32):
            loss, gradient = self.loss(*(x.to(dtype) for x in both))
            cut_loss, cut_gradient = self.loss(*(x[:, 2:].to(dtype) for x in both))
            padded = torch.nn.functional.pad(cut_gradient, (2, 0))
            if not (torch.allclose(loss, cut_loss) and torch.allclose(gradient, padded, atol=1e-7)):
                self.bad("-inf on both sides", "these columns change the loss or the gradient")
                return
        self.good("-inf on both sides", "changes neither loss nor gradient")
        for where, row in (("the student", student), ("the teacher", teacher)):
            self.finite(f"-inf in {where} alone", row)
        far = _row("far")
        self.finite("p and q underflow", far)

    def finite(self, what: str, row: tuple[Tensor, Tensor]) -> None:
        """Check that nothing is NaN, a finite loss has a finite gradient, and float32 is finite iff float64 is."""
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
                self.bad(what, f"the loss is finite in {dtype}, but its gradient is not")
                return
        if bool(exact.isfinite().all()) != bool(loss.isfinite().all()):
            self.bad(
                what, f"the loss is {float(exact):.6g} in float64, but {float(loss):.6g} in float32"
            )
            return
        if math.isfinite(float(exact)):
            self.good(what, f"loss {float(exact):.6g}, the gradient is finite")
        else:
            state = "finite" if exact_gradient.isfinite().all() else "not finite either"
            self.good(what, f"the loss is infinite, the gradient is {state}")

    def loss(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss, the student's gradient), computed in the dtype of the logits, unlike the reference."""
        student = student.detach().clone().requires_grad_()
        loss = fastkd.kd_loss(student, teacher, divergence=self.divergence, backend="portable")
        (gradient,) = torch.autograd.grad(loss, student)
        return loss.detach(), gradient

    def backends(self) -> None:
        """Compare every backend with float64, with the bars of `doctor`."""
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
    """Return float64 logits [1, 12] of student and teacher, with -inf in "student", "teacher" or "both", or "far"."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (
        2.0 * torch.randn(1, 12, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    if kind == "far":  # exp(-120) and exp(-130) are 0 in float32
        student[:, 6:] -= 120.0
        teacher[:, 6:] -= 130.0
    if kind in ("both", "student"):
        student[:, :2] = -math.inf
    if kind in ("both", "teacher"):
        teacher[:, :2] = -math.inf
    return student, teacher


def check(divergence: fastkd.Divergence) -> Report:
    """Run all checks of a divergence on this machine."""
    checks = _Check(divergence)
    with doctor.own_settings():
        if checks.definition():
            checks.student()
            checks.teacher()
            checks.minimum()
            checks.closed_form()
            checks.log_zero()
            checks.backends()
    checks.lines.append("all checks passed" if checks.ok else "something is wrong: see FAIL above")
    return Report(checks.ok, checks.lines)
