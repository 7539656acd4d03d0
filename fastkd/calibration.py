"""Calibration of a teacher: its expected calibration error and the temperature that calibrates it (Guo et al. 2017).

An overconfident teacher is a poor target. Fit T_fit = :func:`fit_temperature` to the teacher's logits on data that it
was not trained on; softmax(t / T_fit) is then the calibrated teacher. To soften it by T, pass T_fit * T as the
teacher's temperature. The student's temperature, and the factor T^2, remain T:

    fastkd.kd_loss(student_logits, teacher_logits, temperature=T, teacher_temperature=T_fit * T)

Both functions process the logits a chunk of rows at a time in float64, and synchronize with the device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd.call.checks import check_choice, check_logits, prepare
from fastkd.call.contract import kept_rows
from fastkd.call.rows import take
from fastkd.core.scalars import check_int, check_number, plain

# Bytes held per chunk, and how many float64 tensors of the chunk's size are alive at once.
CHUNK_BYTES, TEMPORARIES = 64 << 20, 4
# Bisection takes over if Newton's method fails, so far fewer steps are enough. The limit rules out an endless loop.
MAX_STEPS = 200

BINNINGS = ("width", "mass")


def expected_calibration_error(
    logits: Tensor,
    labels: Tensor,
    *,
    bins: int = 15,
    binning: str = "width",
    temperature: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
) -> float:
    """Expected calibration error, the gap between confidence and accuracy (Guo et al. 2017).

        sum_b (n_b / n) |accuracy_b - confidence_b|

    The rows are sorted into bins b by confidence, the largest probability of softmax(logits / temperature). A row is
    correct if its largest logit is at the label; among equal logits the first decides.

    Args:
        logits: [..., V].
        labels: [...] int64; a row whose label is ignore_index is dropped.
        bins: the number of bins.
        binning: "width": bins of equal width, (0, 1/bins], (1/bins, 2/bins], ..., as in the paper. "mass": bins with
            equal numbers of rows (up to one), in order of confidence.
        temperature: T > 0, a number.
        ignore_index: the label that drops a row.
        mask: [...] bool; rows where it is False are dropped.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; every row is dropped; or a
            counted row has no softmax because it holds NaN or inf, or only -inf.

    Memory: one chunk of rows, and two float64 numbers per row.
    """
    bins, temperature, ignore_index = (
        check_int("bins", bins),
        plain(temperature),
        plain(ignore_index),
    )
    if bins < 1:
        raise ValueError(f"bins must be positive, got {bins}")
    check_choice("binning", binning, BINNINGS)
    if isinstance(temperature, Tensor):
        raise TypeError("temperature must be a number, got a tensor")
    rows = _kept_rows(logits, labels, ignore_index, mask, temperature)
    confidences, gaps = [], []
    with torch.no_grad():
        for z, label in _chunks(logits, labels, rows):
            correct = z.argmax(-1) == label
            confidence = 1.0 / z.div_(temperature).exp_().sum(-1)  # max(z) is 0
            confidences.append(confidence)
            gaps.append(correct.to(torch.float64) - confidence)
        confidence, gap = torch.cat(confidences), torch.cat(gaps)
        if confidence.isnan().any():
            row = int(rows[int(confidence.isnan().nonzero()[0])])
            raise ValueError(
                f"logits must have a softmax in counted rows; row {row} holds NaN or inf, or only -inf"
            )
        if binning == "width":
            bin_of_row = ((confidence * bins).ceil().to(torch.int64) - 1).clamp(0, bins - 1)
        else:
            rank = torch.arange(len(rows), device=logits.device)
            order = confidence.argsort(stable=True)
            bin_of_row = torch.empty_like(rank).scatter_(0, order, rank * bins // len(rows))
        total = sum(torch.where(bin_of_row == b, gap, 0.0).sum().abs() for b in range(bins))
    return float(total) / len(rows)


def fit_temperature(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    bounds: tuple[float, float] = (0.01, 100.0),
    tolerance: float = 1e-8,
) -> float:
    """Fit the T > 0 that minimizes the negative log-likelihood of labels under softmax(logits / T) (Guo et al. 2017).

    The negative log-likelihood is convex in b = 1 / T. With z the logits and expectations over softmax(b z), its
    derivative is sum_n (E[z] - z_label) and its second derivative sum_n Var[z]. The minimum is found by Newton's
    method within a bracket.

    If the minimum is outside the bounds, the nearer bound is returned with a warning. A model that is correct on every
    row has its minimum at T = 0; one whose predictions contradict the labels has it at infinity. If the likelihood is
    the same for every T, because the logits of each row are all equal, the value in bounds nearest to 1 is returned.

    Args:
        logits: [..., V] logits, or log-probabilities, which give the same T; not probabilities. They should be of data
            that the model was not trained on. -inf means probability 0.
        labels: [...] int64; a row whose label is ignore_index is dropped.
        ignore_index: the label that drops a row.
        mask: [...] bool; rows where it is False are dropped.
        bounds: the smallest and the largest T.
        tolerance: relative tolerance of T.

    Returns:
        T. The docstring of ``fastkd.calibration`` shows how to pass it to kd_loss.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; every row is dropped; logits
            hold NaN or inf; or the logit of a label is -inf, so that its likelihood is 0 at every T.

    Memory: one chunk of rows.
    """
    low, high = _bounds(bounds)
    ignore_index = plain(ignore_index)
    tolerance = check_number("tolerance", tolerance, 0.0, 1.0, open_right=True)
    rows = _kept_rows(logits, labels, ignore_index, mask, 1.0)

    def derivatives(inverse: float) -> tuple[float, float]:
        return _derivatives(logits, labels, rows, inverse)

    first, last = 1.0 / high, 1.0 / low
    inverse = min(max(1.0, first), last)
    slope, curvature = derivatives(inverse)
    if not math.isfinite(slope):
        raise ValueError(
            "logits must not hold NaN or inf in counted rows, nor -inf at a row's label; got at least one of them"
        )
    if slope == 0.0:
        return 1.0 / inverse
    # The minimum lies in the direction in which the negative log-likelihood falls. It is within the bounds only if the
    # slope changes sign before the bound in that direction.
    end = last if slope < 0 else first
    # A slope of exactly 0 at the bound has underflowed, so it counts as not changing sign.
    if inverse == end or math.copysign(1.0, slope) * derivatives(end)[0] >= 0:
        bound = low if slope < 0 else high
        warnings.warn(
            f"the best temperature is outside bounds=({low:g}, {high:g}); returning {bound:g}",
            stacklevel=2,
        )
        return bound
    lower, upper = min(inverse, end), max(inverse, end)
    for _ in range(MAX_STEPS):
        newton = inverse - slope / curvature if curvature > 0 else math.nan
        # If Newton's step leaves the bracket, bisect it on a logarithmic scale.
        new_inverse = newton if lower < newton < upper else math.sqrt(lower * upper)
        if abs(new_inverse - inverse) <= tolerance * inverse:
            return 1.0 / new_inverse
        inverse = new_inverse
        slope, curvature = derivatives(inverse)
        if slope == 0.0:
            break
        lower, upper = (inverse, upper) if slope < 0 else (lower, inverse)
    return 1.0 / inverse


def _bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds must be two numbers, got {bounds!r}")
    low, high = (check_number("bounds", value, 1e-6, 1e6) for value in bounds)
    if low >= high:
        raise ValueError(f"bounds must be increasing, got {bounds!r}")
    return low, high


def _kept_rows(
    logits: object, labels: object, ignore_index: int, mask: Tensor | None, temperature: float
) -> Tensor:
    """Check the arguments and return the indices of the rows that are not dropped."""
    logits = check_logits("logits", logits)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    lead, width = logits.shape[:-1], logits.shape[-1]
    call = prepare(
        lead, logits.device, torch.float64, width, labels,
        ignore_index=ignore_index, mask=mask, temperature=temperature,
    )  # fmt: skip
    kept = kept_rows(call.rows, ignore_index)
    assert kept is not None  # because there are labels
    rows = kept.flatten().nonzero().squeeze(1)
    if not len(rows):
        raise ValueError(
            f"labels must leave at least one row that is not dropped, got {labels.numel()} rows that all are"
        )
    wrong = kept & ((labels < 0) | (labels >= width))
    if wrong.any():
        row = int(wrong.flatten().nonzero()[0])
        raise ValueError(
            f"labels must be in [0, {width}) or ignore_index ({ignore_index}); "
            f"row {row} has {int(labels.flatten()[row])}"
        )
    return rows


def _chunks(logits: Tensor, labels: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (logits minus each row's largest [C, V], labels [C]). The logits are a float64 copy, free to overwrite."""
    lead, width = logits.shape[:-1], logits.shape[-1]
    for chunk in rows.split(max(CHUNK_BYTES // (8 * TEMPORARIES * width), 1)):
        z = take(logits.detach(), lead, chunk).to(torch.float64)
        yield z - z.amax(-1, keepdim=True), take(labels, lead, chunk)


@torch.no_grad()
def _derivatives(
    logits: Tensor, labels: Tensor, rows: Tensor, inverse: float
) -> tuple[float, float]:
    """Return the first two derivatives of the summed negative log-likelihood with respect to b = 1 / T at inverse."""
    slope = torch.zeros((), dtype=torch.float64, device=logits.device)
    curvature = torch.zeros_like(slope)
    for z, label in _chunks(logits, labels, rows):
        q = (z * inverse).softmax(-1)
        z_label = z.gather(-1, label.unsqueeze(-1)).squeeze(-1)
        z.masked_fill_(z == -torch.inf, 0.0)  # its q is 0, and 0 * -inf would be NaN
        mean = (q * z).sum(-1)
        slope += (mean - z_label).sum()
        curvature += (q.mul_((z - mean.unsqueeze(-1)).square_())).sum()
    return float(slope), float(curvature)
