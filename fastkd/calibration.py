"""How far a model's probabilities can be believed, and the temperature at which they can (Guo et al. 2017).

A teacher that is too sure of itself is a poor target. With T_fit = :func:`fit_temperature` of the teacher's logits on
data that it was not trained on, softmax(t / T_fit) is the calibrated teacher, and to soften that by T is to take
T_fit * T, while the student's temperature, and T^2, stay T's:

    fastkd.kd_loss(student_logits, teacher_logits, temperature=T, teacher_temperature=T_fit * T)

Both functions go over the logits a chunk of rows at a time, in float64, and wait for the device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd.call.checks import check_choice, check_int, check_logits, check_number, prepare
from fastkd.call.contract import counted_rows
from fastkd.call.rows import take
from fastkd.core.scalars import plain

# Bytes of a chunk, and the float64 tensors of its size that are held at once.
CHUNK_BYTES, TEMPORARIES = 64 << 20, 4
# Newton's steps fall back to halving the interval, so this is never reached; an endless loop would be worse.
MOST_STEPS = 200

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
    """The expected calibration error (Guo et al. 2017): how far confidence is from accuracy.

        sum_b (n_b / n) |accuracy_b - confidence_b|

    over bins b of the rows by their confidence, the largest probability of softmax(logits / temperature). A row is
    right where the first of its largest logits is the label's.

    Args:
        logits: [..., V].
        labels: [...] int64; a row whose label is ignore_index is dropped.
        bins: their number.
        binning: "width": (0, 1/bins], (1/bins, 2/bins], ..., as in the paper. "mass": equally many rows in each, up
            to one, in the order of their confidence.
        temperature: T > 0, a number.
        ignore_index: the label that drops a row.
        mask: [...] bool; a row where it is False is dropped.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value, no row counts, or one that does
            has no softmax (NaN or inf, or nothing but -inf).

    Memory: one chunk of rows, and two float64 numbers a row.
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
    numbers = _checked(logits, labels, ignore_index, mask, temperature)
    confidences, gaps = [], []
    with torch.no_grad():
        for z, label in _chunks(logits, labels, numbers):
            right = z.argmax(-1) == label
            confidence = 1.0 / z.div_(temperature).exp_().sum(-1)  # the largest of z is 0
            confidences.append(confidence)
            gaps.append(right.to(torch.float64) - confidence)
        confidence, gap = torch.cat(confidences), torch.cat(gaps)
        if confidence.isnan().any():
            row = int(numbers[int(confidence.isnan().nonzero()[0])])
            raise ValueError(
                f"logits must have a softmax where they count; row {row} holds NaN, inf, or -inf alone"
            )
        if binning == "width":
            of_row = ((confidence * bins).ceil().to(torch.int64) - 1).clamp(0, bins - 1)
        else:
            rank = torch.arange(len(numbers), device=logits.device)
            order = confidence.argsort(stable=True)
            of_row = torch.empty_like(rank).scatter_(0, order, rank * bins // len(numbers))
        total = sum(torch.where(of_row == b, gap, 0.0).sum().abs() for b in range(bins))
    return float(total) / len(numbers)


def fit_temperature(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    bounds: tuple[float, float] = (0.01, 100.0),
    tolerance: float = 1e-8,
) -> float:
    """The T > 0 that minimises the negative log-likelihood of the labels under softmax(logits / T) (Guo et al. 2017).

    The likelihood is convex in b = 1 / T, with the derivative sum_n E[z] - z_label, E over softmax(b z), and the second
    derivative sum_n Var[z]: Newton's method, held between two points that have the minimum between them.

    Where the minimum is beyond the bounds, the bound comes back with a warning: a model that is right on every row has
    its minimum at T = 0, one that the labels contradict at infinity. Where every T is a minimum (all logits of each row
    are equal), 1, or the bound that is nearest to it.

    Args:
        logits: [..., V], of data that the model was not trained on, or log-probabilities, which give the same T;
            not probabilities. -inf has probability 0.
        labels: [...] int64; a row whose label is ignore_index is dropped.
        ignore_index: the label that drops a row.
        mask: [...] bool; a row where it is False is dropped.
        bounds: the smallest and the largest T.
        tolerance: relative, of T.

    Returns:
        T. The head of this page says what to do with it.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value, no row counts, logits hold NaN
            or inf, or the logit of a label is -inf, whose likelihood is 0 at every T.

    Memory: one chunk of rows.
    """
    low, high = _bounds(bounds)
    ignore_index = plain(ignore_index)
    tolerance = check_number("tolerance", tolerance, 0.0, 1.0, open_right=True)
    numbers = _checked(logits, labels, ignore_index, mask, 1.0)

    def derivatives(inverse: float) -> tuple[float, float]:
        return _derivatives(logits, labels, numbers, inverse)

    first, last = 1.0 / high, 1.0 / low
    inverse = min(max(1.0, first), last)
    slope, curvature = derivatives(inverse)
    if not math.isfinite(slope):
        raise ValueError(
            "logits must be finite where it matters: the rows that count hold NaN, inf, or -inf at their label"
        )
    if slope == 0.0:
        return 1.0 / inverse
    # The minimum is on the side to which the likelihood falls; that side's end tells whether it is within the bounds.
    end = last if slope < 0 else first
    # A slope that has underflowed to 0 there is one of the same sign.
    if inverse == end or math.copysign(1.0, slope) * derivatives(end)[0] >= 0:
        bound = low if slope < 0 else high
        warnings.warn(
            f"the likelihood has its maximum beyond the bounds [{low:g}, {high:g}] of the temperature; "
            f"returning {bound:g}",
            stacklevel=2,
        )
        return bound
    below, above = min(inverse, end), max(inverse, end)
    for _ in range(MOST_STEPS):
        step = inverse - slope / curvature if curvature > 0 else math.nan
        # Halved in logarithms where Newton leaves the interval.
        following = step if below < step < above else math.sqrt(below * above)
        if abs(following - inverse) <= tolerance * inverse:
            return 1.0 / following
        inverse = following
        slope, curvature = derivatives(inverse)
        if slope == 0.0:
            break
        below, above = (inverse, above) if slope < 0 else (below, inverse)
    return 1.0 / inverse


def _bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds must be two numbers, got {bounds!r}")
    low, high = (check_number("bounds", value, 1e-6, 1e6) for value in bounds)
    if low >= high:
        raise ValueError(f"bounds must be increasing, got {bounds!r}")
    return low, high


def _checked(
    logits: object, labels: object, ignore_index: int, mask: Tensor | None, temperature: float
) -> Tensor:
    """The numbers of the rows that count."""
    logits = check_logits("logits", logits)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    lead, width = logits.shape[:-1], logits.shape[-1]
    call = prepare(
        lead, logits.device, torch.float64, width, labels,
        ignore_index=ignore_index, mask=mask, temperature=temperature,
    )  # fmt: skip
    keep = counted_rows(call.rows, ignore_index)
    assert keep is not None  # there are labels
    numbers = keep.flatten().nonzero().squeeze(1)
    if not len(numbers):
        raise ValueError(
            f"labels must count at least one row, got {labels.numel()} that are dropped"
        )
    wrong = keep & ((labels < 0) | (labels >= width))
    if wrong.any():
        row = int(wrong.flatten().nonzero()[0])
        raise ValueError(
            f"labels must be in [0, {width}) or ignore_index ({ignore_index}); "
            f"row {row} has {int(labels.flatten()[row])}"
        )
    return numbers


def _chunks(logits: Tensor, labels: Tensor, numbers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits [C, V] less the largest of each row, labels [C]) in fresh float64 memory."""
    lead, width = logits.shape[:-1], logits.shape[-1]
    for at in numbers.split(max(CHUNK_BYTES // (8 * TEMPORARIES * width), 1)):
        z = take(logits.detach(), lead, at).to(torch.float64)
        yield z - z.amax(-1, keepdim=True), take(labels, lead, at)


@torch.no_grad()
def _derivatives(
    logits: Tensor, labels: Tensor, numbers: Tensor, inverse: float
) -> tuple[float, float]:
    """By b = 1 / T, of the summed negative log-likelihood at b."""
    slope = torch.zeros((), dtype=torch.float64, device=logits.device)
    curvature = torch.zeros_like(slope)
    for z, label in _chunks(logits, labels, numbers):
        q = (z * inverse).softmax(-1)
        own = z.gather(-1, label.unsqueeze(-1)).squeeze(-1)
        z.masked_fill_(z == -torch.inf, 0.0)  # of probability 0; NaN stays
        mean = (q * z).sum(-1)
        slope += (mean - own).sum()
        curvature += (q.mul_((z - mean.unsqueeze(-1)).square_())).sum()
    return float(slope), float(curvature)
