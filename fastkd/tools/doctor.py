"""The command python -m fastkd doctor, which compares the results of every backend that runs here with float64.

The allowed error, the bar, is not a fixed tolerance. For float32 it is the float32 error of the reference, which can be
0 by chance, plus one unit in the last place of the largest terms. For lower precisions it also includes one rounding of
the exact gradient. Each verdict is the largest ratio of error to bar; a ratio above 1 is a failure.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div

import fastkd
from fastkd.backends import registry
from fastkd.call.log_zero import evaluate
from fastkd.tools.info import columns, devices, obstacle

ULP = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100


class Case(NamedTuple):
    """Shape, dtype and options of one call of kd_loss on random logits."""

    rows: int
    columns: int
    dtype: torch.dtype
    temperature: float
    alpha: float  # below 1 the call has labels, the first of which drops its row
    spread: float = 3.0  # the standard deviation of the logits

    @property
    def dtype_name(self) -> str:
        """The dtype without the prefix "torch."."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        """The description used in failures."""
        objective = f"T={self.temperature:g}, alpha={self.alpha:g}"
        logits = f"{self.rows} x {self.columns} logits of spread {self.spread:g}"
        return f"{self.dtype_name}, {logits}, {objective}"


class Failure(NamedTuple):
    """A wrong result, or the exception that a call raised."""

    case: str
    result: str
    error: float
    bar: float
    raised: str = ""

    def __str__(self) -> str:
        if self.raised:
            return f"{self.case}: {self.raised}"
        return f"{self.case}: error of the {self.result} {self.error:.3g}, bar {self.bar:.3g}"


class Verdict(NamedTuple):
    """Result of a backend for one divergence."""

    # The largest error / bar by dtype; infinite for a wrong NaN or infinity, or an exception.
    worst: dict[str, float]
    failure: Failure | None  # the failure with the largest ratio


def ratios(worst: dict[str, float]) -> str:
    """Format the largest error / bar of each dtype."""
    return ", ".join(f"{dtype} {ratio:.2g}" for dtype, ratio in worst.items())


# 37 columns: two SIMD vectors of 16 elements and a remainder. 4097 columns: two blocks of the C++ kernel, 2048 columns
# each, and one column. 5 rows: not a multiple of usual thread counts.
GRID = [
    Case(5, width, dtype, temperature, alpha)
    for dtype in DTYPES
    for width in (37, 4097)
    for temperature, alpha in ((1.0, 1.0), (2.0, 0.6))
]
# A spread at which most probabilities underflow to 0 in float32.
FAR = Case(5, 37, torch.float32, 1.0, 1.0, spread=40.0)
GRID.append(FAR)
# For Triton's interpreter, which takes half a second per call. bfloat16 is omitted, because the interpreter truncates
# where a GPU rounds.
SMALL_GRID = [
    Case(2, 37, torch.float32, 2.0, 0.6),
    Case(2, 37, torch.float16, 1.0, 1.0),
    FAR._replace(rows=2),
]


def grid(device: str, backend: str) -> list[Case]:
    """Return the cases for a backend: fewer for Triton's interpreter."""
    return SMALL_GRID if backend == "triton" and device == "cpu" else GRID


def divergences() -> dict[str, fastkd.Divergence]:
    """Return the divergences of the table with default parameters, and the limits of alpha_beta, by name.

    The limits are included because each has its own definition.
    """
    limits = [fastkd.alpha_beta(*ab) for ab in ((0.4, 0.0), (0.0, 0.4), (0.3, -0.3), (0.0, 0.0))]
    listed = [make() for make in fastkd.DIVERGENCES.values()] + limits
    return {divergence.name: divergence for divergence in listed}


class Results(NamedTuple):
    """Results of kd_loss per row, on the CPU in float64."""

    loss: Tensor  # [N]
    student: Tensor  # [N, V], the student's gradient
    teacher: Tensor | None  # [N, V], the teacher's gradient; None if the divergence has no degree


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(case.columns)
    student, teacher = (
        (case.spread * torch.randn(case.rows, case.columns, generator=generator)).to(case.dtype)
        for _ in range(2)
    )
    if case.alpha == 1.0:
        return student, teacher, None
    labels = torch.randint(case.columns, (case.rows,), generator=generator)
    labels[0] = IGNORED
    return student, teacher, labels


def _run(
    case: Case,
    divergence: fastkd.Divergence,
    backend: str,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Results:
    student, teacher, labels = _inputs(case)
    student, teacher = (
        logits.to(device, dtype or case.dtype).detach() for logits in (student, teacher)
    )
    student.requires_grad_()
    teacher.requires_grad_(divergence.degree is not None)
    loss = fastkd.kd_loss(
        student,
        teacher,
        None if labels is None else labels.to(device),
        divergence=divergence,
        temperature=case.temperature,
        alpha=case.alpha,
        ignore_index=IGNORED,
        reduction="none",
        backend=backend,
    )
    assert isinstance(loss, Tensor)
    loss.backward(torch.ones_like(loss))
    results = (loss.detach(), student.grad, teacher.grad)
    loss64, student64, teacher64 = (None if x is None else x.cpu().double() for x in results)
    assert loss64 is not None and student64 is not None
    return Results(loss64, student64, teacher64)


def _terms(case: Case, divergence: fastkd.Divergence) -> tuple[Tensor, Tensor]:
    """Return the size [N, 1] of the terms that the loss and the gradient sum.

    If every log-probability x has a relative error of one unit in the last place, which is an absolute error of the
    order of max(1, |x|) units, the results change by about this size times one unit.
    """
    student, teacher, labels = _inputs(case)
    s, t = student.double(), teacher.double()
    log_q, log_p = s / case.temperature, t / case.temperature
    if divergence.normalized:
        log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
    phi, g, _ = evaluate(divergence, log_p, log_q)
    size = torch.maximum(log_p.abs(), log_q.abs()).clamp(min=1.0)
    terms = (phi.abs() + g.abs()) * size
    total = terms.sum(-1, keepdim=True)
    gradient = terms
    if divergence.normalized:
        gradient = terms + torch.maximum(log_p, log_q).exp() * total
    cross_entropy = torch.zeros_like(total)
    if labels is not None:
        cross_entropy = s.log_softmax(-1).abs().amax(-1, keepdim=True)
    loss_terms = case.alpha * case.temperature**2 * total + (1 - case.alpha) * cross_entropy
    largest = gradient.amax(-1, keepdim=True)
    return loss_terms, case.alpha * case.temperature * largest + (1 - case.alpha) * cross_entropy


class Truth:
    """Cache of the exact results and bars, which are computed once for all backends."""

    def __init__(self) -> None:
        self._cache: dict[tuple[Case, fastkd.Divergence], tuple[Results, Results]] = {}

    def of(self, case: Case, divergence: fastkd.Divergence) -> tuple[Results, Results]:
        """Return (exact results, bars): the float64 results, and the error allowed for each of their elements."""
        key = (case, divergence)
        if key not in self._cache:
            exact = _run(case, divergence, "reference", dtype=torch.float64)
            float32 = _run(case, divergence, "reference", dtype=torch.float32)
            loss_terms, gradient_terms = _terms(case, divergence)

            def gradient_bar(rounded: Tensor | None, exact: Tensor | None) -> Tensor | None:
                if rounded is None or exact is None:
                    return None
                lost = (rounded - exact).abs().amax(-1, keepdim=True)
                bar = (lost + ULP * gradient_terms).expand_as(exact)
                if (
                    case.dtype != torch.float32
                ):  # half a unit in the last place, also for subnormals
                    number = torch.finfo(case.dtype)
                    bar = bar + exact.abs() * number.eps / 2
                    bar = bar + number.smallest_normal * number.eps / 2
                return bar

            student = gradient_bar(float32.student, exact.student)
            assert student is not None
            loss = (float32.loss - exact.loss).abs() + ULP * loss_terms.squeeze(-1)
            self._cache[key] = (
                exact,
                Results(loss, student, gradient_bar(float32.teacher, exact.teacher)),
            )
        return self._cache[key]


def _judge(case: Case, results: Results, exact: Results, bars: Results) -> tuple[float, Failure]:
    """Return (the largest error / bar, the element where it occurs)."""
    worst, failure = -1.0, None
    named = zip(
        ("loss", "student's gradient", "teacher's gradient"), results, exact, bars, strict=True
    )
    for name, value, expected, bar in named:
        if value is None or expected is None or bar is None:
            continue
        error = (value - expected).abs().flatten()
        bar = bar.flatten()
        ratio = torch.where(error == 0, 0.0, error / bar).nan_to_num(nan=math.inf)
        at = int(ratio.argmax())
        if float(ratio[at]) > worst:
            worst, failure = (
                float(ratio[at]),
                Failure(case.label, name, float(error[at]), float(bar[at])),
            )
    assert failure is not None
    return worst, failure


def judge(
    divergence: fastkd.Divergence, backend: str, device: str = "cpu", truth: Truth | None = None
) -> Verdict:
    """Run the cases of a backend for a divergence and return the worst result of each dtype."""
    truth = truth or Truth()
    worst: dict[str, float] = {}
    failures: list[tuple[float, Failure]] = []
    for case in grid(device, backend):
        exact, bars = truth.of(case, divergence)
        try:
            ratio, failure = _judge(case, _run(case, divergence, backend, device), exact, bars)
        except (
            Exception
        ) as error:  # a broken installation can raise anything; report it as a failure
            message = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
            ratio, failure = math.inf, Failure(case.label, "", math.nan, math.nan, message)
        worst[case.dtype_name] = max(ratio, worst.get(case.dtype_name, 0.0))
        if ratio > 1.0:
            failures.append((ratio, failure))
    return Verdict(worst, max(failures, key=lambda failed: failed[0])[1] if failures else None)


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Unset the environment variables that affect backends, and silence NumPy's warnings in Triton's interpreter.

    NumPy warns about log 0, which is intended. The environment is restored afterwards.
    """
    switches = ("FASTKD_BACKEND", "FASTKD_STRICT", "FASTKD_CHECK")
    saved = {name: os.environ.pop(name) for name in switches if name in os.environ}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.")
            yield
    finally:
        os.environ.update(saved)


def _eager(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    if divergence == "forward_kl":
        return kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    halves = [
        kl_div(log_m, log_x, log_target=True, reduction="batchmean") for log_x in (log_p, log_q)
    ]
    return 0.5 * (halves[0] + halves[1])


def _seconds(step: Callable[[], None], device: str, repeats: int = 5) -> float:
    """Return the shortest time of several runs after a warm-up run."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        if device != "cpu":
            torch.accelerator.synchronize() if hasattr(
                torch, "accelerator"
            ) else torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def timings(backend: str, device: str) -> list[dict[str, Any]]:
    """Time loss and gradient in float32, with eager PyTorch for comparison."""
    rows, width = (64, 32768) if device == "cpu" else (2048, 32768)
    student = torch.randn(rows, width, device=device, requires_grad=True)
    teacher = torch.randn(rows, width, device=device)
    results = []
    for divergence in ("forward_kl", "jsd"):

        def fused(divergence: str = divergence) -> None:
            loss = fastkd.kd_loss(student, teacher, divergence=divergence, backend=backend)
            assert isinstance(loss, Tensor)
            torch.autograd.grad(loss, student)

        def eager(divergence: str = divergence) -> None:
            torch.autograd.grad(_eager(student, teacher, divergence), student)

        seconds, eager_seconds = _seconds(fused, device), _seconds(eager, device)
        results.append(
            {
                "backend": backend,
                "device": device,
                "divergence": divergence,
                "rows": rows,
                "columns": width,
                "ms": round(1e3 * seconds, 3),
                "eager_ms": round(1e3 * eager_seconds, 3),
                "times_eager": round(eager_seconds / seconds, 2),
            }
        )
    return results


def _chosen(device: str) -> dict[str, Any]:
    call = registry.Request(device, torch.float32, torch.float32, fastkd.forward_kl())
    chosen, fallback = registry.choose(call, registry.available_backends())
    return {"backend": chosen, "fallback": fallback}


def examine(only: str | None = None) -> dict[str, Any]:
    """Judge every backend, or only one, on every device it runs on; return the findings, ready for JSON."""
    names = [only] if only else list(registry.available_backends())
    verdicts, not_run, speed = [], [], []
    with own_settings():
        truth = Truth()
        for name in names:
            obstacles = {device: obstacle(name, device) for device in devices()}
            served = [device for device, why in obstacles.items() if why is None]
            why = list(obstacles.values())[-1]  # on a machine with a GPU, why it does not run there
            if not served and why is not None:
                not_run.append({"backend": name, "reason": why.reason, "remedy": why.remedy})
            for device in served:
                healthy = True
                for divergence in divergences().values():
                    verdict = judge(divergence, name, device, truth)
                    healthy = healthy and verdict.failure is None
                    verdicts.append(
                        {
                            "backend": name,
                            "device": device,
                            "divergence": divergence.name,
                            "passed": verdict.failure is None,
                            "error_over_bar": {  # JSON has no infinity
                                dtype: ratio if math.isfinite(ratio) else None
                                for dtype, ratio in verdict.worst.items()
                            },
                            "failure": str(verdict.failure) if verdict.failure else None,
                        }
                    )
                interpreted = name == "triton" and device == "cpu"
                if healthy and name != "reference" and not interpreted:
                    speed += timings(name, device)
    return {
        "ok": all(verdict["passed"] for verdict in verdicts) and not (only and not_run),
        "auto": {device: _chosen(device) for device in devices()},
        "verdicts": verdicts,
        "not_run": not_run,
        "timings": speed,
    }


def text(diagnosis: dict[str, Any]) -> str:
    """Format the result of :func:`examine` for people."""
    verdicts = diagnosis["verdicts"]
    lines = []
    places = dict.fromkeys((v["backend"], v["device"]) for v in verdicts)
    for backend, device in places:
        here = [v for v in verdicts if (v["backend"], v["device"]) == (backend, device)]
        dtypes = list(here[0]["error_over_bar"])
        rows = [[f"{backend} on {device}", "", *dtypes]]
        for v in here:
            ratios = v["error_over_bar"].values()
            cells = ("not finite" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
            rows.append([v["divergence"], "ok" if v["passed"] else "FAIL", *cells])
        lines += [*columns(rows, indent=""), ""]
    if verdicts:
        lines += [
            "Numbers: the largest error / bar over loss and gradients. Above 1 is a failure.",
            "",
        ]
    for skipped in diagnosis["not_run"]:
        lines.append(f"{skipped['backend']} was not run: {skipped['reason']}. {skipped['remedy']}")
    for device, chosen in diagnosis["auto"].items():
        because = f", because {chosen['fallback']}" if chosen["fallback"] else ""
        lines.append(f"backend='auto' chooses {chosen['backend']} for {device} tensors{because}")
    for t in diagnosis["timings"]:
        lines.append(
            f"{t['backend']}, {t['divergence']}, {t['rows']} x {t['columns']} float32 with gradient: {t['ms']:.1f} ms, "
            f"eager PyTorch {t['eager_ms']:.1f} ms, {t['times_eager']:.1f} times as long"
        )
    failures = [v for v in verdicts if not v["passed"]]
    lines += [""] + [
        f"FAIL {v['backend']} ({v['device']}), {v['divergence']}: {v['failure']}" for v in failures
    ]
    if diagnosis["ok"]:
        lines.append("all backends passed")
    elif failures:
        lines.append(f"{len(failures)} of {len(verdicts)} checks failed")
    return "\n".join(lines)
