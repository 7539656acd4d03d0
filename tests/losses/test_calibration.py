"""Calibration: compared with a transcription of the definition, and with a minimizer that shares no code with
fastkd."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import logits
from torch import Tensor

import fastkd
from fastkd import calibration
from fastkd.calibration import expected_calibration_error, fit_temperature

INF, NAN = math.inf, math.nan


def problem(
    rows: int = 400, width: int = 12, too_sure: float = 3.0, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Labels drawn from softmax(z), and logits too_sure * z."""
    z = logits(rows, width, seed=seed, spread=1.5, dtype=torch.float64)
    labels = torch.multinomial(
        z.softmax(-1), 1, generator=torch.Generator().manual_seed(seed)
    ).squeeze(1)
    return too_sure * z, labels


def error_by_definition(z: Tensor, labels: Tensor, bins: int) -> float:
    total = 0.0
    confidence, predicted = z.softmax(-1).max(-1)
    for b in range(bins):
        inside = [i for i in range(len(z)) if b / bins < float(confidence[i]) <= (b + 1) / bins]
        if inside:
            accuracy = sum(int(predicted[i] == labels[i]) for i in inside) / len(inside)
            mean = sum(float(confidence[i]) for i in inside) / len(inside)
            total += len(inside) / len(z) * abs(accuracy - mean)
    return total


def golden_section_temperature(z: Tensor, labels: Tensor) -> float:
    """The temperature of the least negative log-likelihood, by golden-section search on log T in float64."""

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(z.double() / math.exp(log_t), labels))

    a, b, ratio = math.log(1e-3), math.log(1e3), (math.sqrt(5) - 1) / 2
    for _ in range(90):
        c, d = b - ratio * (b - a), a + ratio * (b - a)
        a, b = (a, d) if loss(c) < loss(d) else (c, b)
    return math.exp((a + b) / 2)


@pytest.mark.parametrize("bins", [1, 7, 15])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_error_matches_the_definition(
    bins: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, labels = problem()
    expected = error_by_definition(z / temperature, labels, bins)
    actual = expected_calibration_error(z, labels, bins=bins, temperature=temperature)
    assert actual == pytest.approx(expected, abs=1e-12) and isinstance(actual, float)
    monkeypatch.setattr(calibration, "CHUNK_BYTES", 8 * 4 * 12 * 7)  # chunks of 7 rows
    assert expected_calibration_error(
        z, labels, bins=bins, temperature=temperature
    ) == pytest.approx(expected)


def test_bins_of_equal_mass() -> None:
    z, labels = problem(100)
    confidence, predicted = z.softmax(-1).max(-1)
    order = confidence.argsort()
    gap = ((predicted == labels).double() - confidence)[order]
    expected = sum(abs(float(gap[b * 10 : (b + 1) * 10].sum())) for b in range(10)) / 100
    assert expected_calibration_error(z, labels, bins=10, binning="mass") == pytest.approx(expected)
    assert 0 <= expected_calibration_error(z[:7], labels[:7], bins=15, binning="mass") <= 1


def test_bins_are_closed_on_the_right() -> None:
    """A bin is closed on its right: confidence 1 is in the last, 1/2 in the first of two."""
    z = torch.tensor([[0.0, 0.0], [0.0, -INF]], dtype=torch.float64)
    assert expected_calibration_error(z, torch.tensor([0, 0]), bins=2) == pytest.approx(0.25)
    assert expected_calibration_error(z, torch.tensor([0, 1]), bins=2) == pytest.approx(0.75)
    assert expected_calibration_error(z, torch.tensor([1, 0]), bins=1) == pytest.approx(
        0.25
    )  # the first logit is the largest


@pytest.mark.parametrize("too_sure", [0.2, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fitted_temperature(too_sure: float, dtype: torch.dtype) -> None:
    z, labels = problem(too_sure=too_sure)
    z = z.to(dtype)
    actual = fit_temperature(z, labels)
    # Rounding in the loss limits golden section to the square root of the machine epsilon.
    assert actual == pytest.approx(golden_section_temperature(z, labels), rel=1e-6)
    assert actual == pytest.approx(too_sure, rel=0.3)
    inverse = torch.tensor(1 / actual, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.cross_entropy(z.double() * inverse, labels), inverse)
    assert abs(float(slope)) < 1e-7


def test_derivatives() -> None:
    z, labels = problem(50)
    z[:, 5] = -INF
    labels = labels.masked_fill(labels == 5, 0)
    finite = z.masked_fill(z == -INF, -1e9)
    b = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(
        F.cross_entropy(finite * b, labels, reduction="sum"), b, create_graph=True
    )
    (second,) = torch.autograd.grad(first, b)
    numbers = torch.arange(50)
    assert calibration._derivatives(z, labels, numbers, 0.7) == pytest.approx(
        (float(first), float(second))
    )


def test_rows_and_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    z, labels = problem(60)
    drop = torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.3
    masked = torch.rand(60, generator=torch.Generator().manual_seed(2)) < 0.8
    keep = ~drop & masked
    expected = (
        fit_temperature(z[keep], labels[keep]),
        expected_calibration_error(z[keep], labels[keep]),
    )
    dirty = torch.where(keep.unsqueeze(-1), z, NAN).view(4, 15, 12).requires_grad_()
    marked = labels.masked_fill(drop, -7).view(4, 15)
    options = {"ignore_index": -7, "mask": masked.view(4, 15)}
    for size in (calibration.CHUNK_BYTES, 8 * 4 * 12 * 4):
        monkeypatch.setattr(calibration, "CHUNK_BYTES", size)
        actual = (
            fit_temperature(dirty, marked, **options),
            expected_calibration_error(dirty, marked, **options),
        )
        assert actual == pytest.approx(expected, rel=1e-9)
    strided = dirty.detach().transpose(0, 1)
    again = fit_temperature(strided, marked.T, ignore_index=-7, mask=options["mask"].T)
    assert again == pytest.approx(expected[0])


def test_properties() -> None:
    """Scaling the logits scales the temperature; shifting or permuting the vocabulary changes nothing."""
    z, labels = problem()
    fitted, error = fit_temperature(z, labels), expected_calibration_error(z, labels)
    assert fit_temperature(4 * z, labels) == pytest.approx(4 * fitted)
    assert fit_temperature(z + 1e3, labels) == pytest.approx(fitted)
    order = torch.randperm(12)
    place = order.argsort()
    assert fit_temperature(z[:, order], place[labels]) == pytest.approx(fitted)
    assert expected_calibration_error(z[:, order], place[labels]) == pytest.approx(error)
    assert expected_calibration_error(z, labels, temperature=fitted) < 0.5 * error


def test_a_minimum_outside_the_bounds() -> None:
    z = torch.eye(4, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"outside bounds=\(0.01, 100\); returning 0.01"):
        assert fit_temperature(z, torch.arange(4)) == 0.01
    with pytest.warns(UserWarning, match="returning 100"):
        assert fit_temperature(z, (torch.arange(4) + 1) % 4) == 100.0
    z, labels = problem()
    with pytest.warns(UserWarning, match="returning 2"):
        assert fit_temperature(z, labels, bounds=(0.5, 2.0)) == 2.0
    with pytest.warns(UserWarning, match="returning 5"):
        assert fit_temperature(z, labels, bounds=(5.0, 9.0)) == 5.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_temperature(torch.ones(3, 5), torch.zeros(3, dtype=torch.int64)) == 1.0


def test_a_fitted_teacher_in_kd_loss() -> None:
    """teacher_temperature = T_fit * T is the calibrated teacher, softened by T."""
    t, labels = problem(20)
    s = logits(20, 12, seed=5, dtype=torch.float64)
    fitted = fit_temperature(t, labels)
    a = fastkd.kd_loss(s, t, temperature=2.0, teacher_temperature=2.0 * fitted)
    torch.testing.assert_close(a, fastkd.kd_loss(s, t / fitted, temperature=2.0))


Z, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"labels": Y - 100},
            ValueError,
            "labels must leave at least one row that is not dropped, got 3 rows that all are",
        ),
        (
            {"labels": Y + 4},
            ValueError,
            r"labels must be in \[0, 4\) or ignore_index \(-100\); row 0 has 4",
        ),
        ({"labels": Y[:2]}, ValueError, "labels must have one value a row"),
        ({"labels": None}, TypeError, "labels must be a tensor, got NoneType"),
        ({"logits": [1.0]}, TypeError, "logits must be a tensor of logits, got list"),
        ({"logits": Y}, TypeError, "logits must be float32"),
    ],
)
def test_errors(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    for function in (expected_calibration_error, fit_temperature):
        with pytest.raises(error, match=message):
            function(**({"logits": Z, "labels": Y} | arguments))


def test_errors_of_options() -> None:
    for options, message in (
        ({"bins": 0}, "bins must be positive, got 0"),
        ({"binning": "all"}, "binning must be one of width, mass; got 'all'"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            expected_calibration_error(Z, Y, **options)
    for bounds, message in (
        ((2.0, 1.0), "bounds must be increasing"),
        ((0.0, 1.0), "bounds must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_temperature(Z, Y, bounds=bounds)
    for bad in (
        torch.tensor([[-INF, 0.0]]),
        torch.tensor([[NAN, 0.0]]),
        torch.tensor([[INF, 0.0]]),
    ):
        with pytest.raises(ValueError, match="logits must not hold NaN or inf in counted rows"):
            fit_temperature(bad, torch.tensor([0]))


@pytest.mark.parametrize("margin", [5.0, 20.0, 400.0])
def test_a_model_that_is_right_on_every_row(margin: float) -> None:
    """The slope underflows long before the bound, but that is not a minimum."""
    labels = torch.arange(10).repeat(4)
    logits = margin * torch.nn.functional.one_hot(labels, 10).float()
    with pytest.warns(UserWarning, match="outside bounds"):
        assert fit_temperature(logits, labels) == 0.01


def test_a_row_without_a_softmax_is_refused() -> None:
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 0.0]])
    with pytest.raises(ValueError, match="row 1 holds NaN"):
        expected_calibration_error(logits, torch.tensor([0, 1]))
