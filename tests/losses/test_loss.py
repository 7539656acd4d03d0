"""The objective around a divergence: temperatures, labels, dropped rows, reductions, parts, padding."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import ULP, bars, check, labels_for, logits, ran_on, upstream_for
from support.options import ALL, prepared
from torch import Tensor

import fastkd
from fastkd import KDLoss, kd_loss


# forward_kl has a closed form of moments and takes two sweeps over a row, jsd takes three, squared_error needs no
# normalizer.
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "squared_error"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
def test_every_option(
    backend: str, options: dict[str, Any], dtype: torch.dtype, divergence: str
) -> None:
    # 43 columns: SIMD vectors of 4, 8 and 16 all leave a tail.
    labels, options = prepared(options, 4, 3, columns=41, seed=1)
    student, teacher = logits(4, 3, 43, seed=2, dtype=dtype), logits(4, 3, 43, seed=3, dtype=dtype)
    check(backend, student, teacher, labels, divergence=divergence, **options)


def test_the_requested_backend_runs(any_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = ran_on(monkeypatch, *{"reference", any_backend})
    check(any_backend, logits(2, 5, seed=4), logits(2, 5, seed=5))
    assert ran == [any_backend]


# Temperature


def test_t_squared_multiplies_value_and_gradient(any_backend: str) -> None:
    teacher = logits(3, 20, seed=6)
    results = []
    for scaled in (True, False):
        student = logits(3, 20, seed=7).requires_grad_()
        loss = kd_loss(
            student, teacher, temperature=4.0, scale_by_temperature=scaled, backend=any_backend
        )
        loss.backward()
        results.append((loss.detach(), student.grad))
    # A power of 2, which does not round.
    torch.testing.assert_close(results[0], tuple(16 * x for x in results[1]), rtol=0, atol=0)


def test_t_squared_does_not_scale_hard_labels(any_backend: str) -> None:
    student, labels = logits(3, 20, seed=8), labels_for(3, vocabulary=20, seed=9)
    loss = kd_loss(student, student, labels, alpha=0.25, temperature=4.0, backend=any_backend)
    assert loss.item() == pytest.approx(0.75 * F.cross_entropy(student, labels).item(), rel=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_one_temperature_per_row(backend: str, divergence: str) -> None:
    student, teacher = logits(2, 3, 19, seed=10), logits(2, 3, 19, seed=11)
    temperature = torch.tensor([[0.5, 1.0, 2.0], [4.0, 0.3, 7.0]])
    labels = labels_for(2, 3, vocabulary=19, seed=12)
    for dtype in (torch.float32, torch.bfloat16):  # NaN and wrong values among the temperatures
        t = temperature.to(dtype)
        arguments = {"divergence": divergence, "temperature": t, "alpha": 0.6}
        check(backend, student, teacher, labels, **arguments)
        check(backend, student, teacher, labels, **arguments, teacher_temperature=t.flip(1) * 2)
        check(backend, student, teacher, labels, **arguments, teacher_temperature=1.5)
    # A strided tensor of temperatures gives the same results.
    check(backend, student, teacher, temperature=temperature.t().contiguous().t())


# Hard labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_alpha_0_is_cross_entropy(backend: str, smoothing: float) -> None:
    teacher, labels = logits(6, 33, seed=13), labels_for(6, vocabulary=33, seed=14, ignored=0.3)
    results = []
    for actual in (True, False):
        student = logits(6, 33, seed=15).requires_grad_()
        if actual:
            loss = kd_loss(
                student, teacher, labels, alpha=0.0, label_smoothing=smoothing, backend=backend
            )
        else:
            loss = F.cross_entropy(student, labels, label_smoothing=smoothing)
        loss.backward()
        results.append((loss.detach(), student.grad))
    torch.testing.assert_close(*results)


def test_labels_at_both_ends_of_the_vocabulary(backend: str) -> None:
    # 33 and 2049: the last label is alone in the tail of the last vector, and of the last block.
    for columns in (33, 2049):
        student, teacher = logits(4, columns, seed=16), logits(4, columns, seed=17)
        labels = torch.tensor([0, columns - 1, 1, columns - 2])
        check(backend, student, teacher, labels, alpha=0.5)


def test_a_label_of_ignore_index_drops_its_row_whatever_alpha_is(any_backend: str) -> None:
    student, teacher = logits(3, 9, seed=18), logits(3, 9, seed=19)
    for ignored in (-100, -1, 5):
        labels = torch.tensor([2, ignored, 4])
        for alpha in (1.0, 0.5):
            measured = check(
                any_backend, student, teacher, labels, alpha=alpha, ignore_index=ignored
            )
            assert measured.loss[1] == 0 and measured.parts.counted == 2
            assert not measured.student_gradient[1].any()


# Rows that count


def test_a_dropped_row_is_not_read(any_backend: str) -> None:
    """NaN in a dropped row reaches neither loss, gradients nor parts, for each of the three ways to drop a row."""
    student, teacher = logits(6, 21, seed=20), logits(6, 21, seed=21)
    student[1:4], teacher[1:4] = torch.nan, torch.inf
    labels = torch.tensor([3, -100, 3, 3, 3, 3])
    mask = torch.tensor([True, True, False, True, True, True])
    weight = torch.tensor([2.0, 1.0, 1.0, 0.0, -0.5, 3.0])
    for divergence in ("forward_kl", "jsd"):
        measured = check(
            any_backend, student, teacher, labels,
            mask=mask, weight=weight, alpha=0.5, temperature=2.0, divergence=divergence,
        )  # fmt: skip
        for rows in (
            measured.loss,
            measured.student_gradient,
            measured.teacher_gradient,
            *measured.parts[:3],
        ):
            assert rows is not None and not rows[1:4].any()
        assert measured.parts.counted == 4  # a weight of 0 is still a row
        for reduction in ("sum", "mean", "batchmean"):
            check(
                any_backend, student, teacher, labels,
                mask=mask, weight=weight, alpha=0.5, divergence=divergence, reduction=reduction,
            )  # fmt: skip


def test_label_weight_and_temperature_of_a_dropped_row_are_ignored(any_backend: str) -> None:
    student, teacher = logits(4, 21, seed=22), logits(4, 21, seed=23)
    mask = torch.tensor([True, False, True, False])
    clean = {
        "labels": torch.tensor([3, 0, 5, 0]),
        "weight": torch.ones(4),
        "temperature": torch.full((4,), 2.0),
    }
    dirty = {
        "labels": torch.tensor([3, 10**12, 5, -7]),
        "weight": torch.tensor([1.0, torch.nan, 1.0, torch.inf]),
        "temperature": torch.tensor([2.0, -1.0, 2.0, torch.nan]),
    }
    results = []
    for arguments in (clean, dirty):
        leaf = student.clone().requires_grad_()
        loss = kd_loss(leaf, teacher, mask=mask, alpha=0.5, backend=any_backend, **arguments)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_weight_of_any_float_type(backend: str, dtype: torch.dtype) -> None:
    student, teacher = logits(2, 3, 13, seed=24), logits(2, 3, 13, seed=25)
    weight = torch.tensor([[0.5, 1.0, 2.0], [0.0, -1.0, 0.25]], dtype=dtype)
    check(backend, student, teacher, weight=weight)
    check(backend, student, teacher, weight=weight.t().contiguous().t(), reduction="mean")


# Reductions


def _batch(
    dtype: torch.dtype, with_labels: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Eight rows, of which five count if there are labels."""
    student, teacher = (logits(2, 4, 17, seed=seed, dtype=dtype) for seed in (26, 27))
    if not with_labels:
        return student, teacher, None
    labels = labels_for(2, 4, vocabulary=17, seed=28)
    labels[0, 1] = labels[1, 2] = labels[1, 3] = -100
    return student, teacher, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_labels", [True, False])
def test_reductions(any_backend: str, with_labels: bool, dtype: torch.dtype) -> None:
    student, teacher, labels = _batch(dtype, with_labels)
    weight = torch.rand(2, 4, generator=torch.Generator().manual_seed(29))
    rows = kd_loss(student, teacher, labels, weight=weight, reduction="none", backend=any_backend)
    assert rows.shape == (2, 4)
    for reduction, denominator in (
        ("sum", 1),
        (
            "mean",
            5 if with_labels else 8,
        ),  # the number of counted rows, not V or the sum of weights
        ("batchmean", 2),
    ):
        call = {"reduction": reduction, "weight": weight}
        loss = kd_loss(student, teacher, labels, backend=any_backend, **call)
        assert loss.shape == () and loss.dtype == torch.float32
        total = rows.double().sum()
        torch.testing.assert_close(loss.double(), total / denominator, rtol=4 * ULP, atol=0)
        upstream = torch.tensor(-2.0)
        check(any_backend, student, teacher, labels, upstream=upstream, **call)


@pytest.mark.parametrize("with_labels", [True, False])
def test_num_items_is_the_denominator(backend: str, with_labels: bool) -> None:
    student, teacher, labels = _batch(torch.float32, with_labels)
    total = kd_loss(student, teacher, labels, reduction="sum", backend=backend).double()
    for reduction, items in (
        ("mean", 7),
        ("mean", 12.5),
        ("batchmean", 7),
        ("mean", torch.tensor(7)),
        ("mean", torch.tensor([7])),
        ("batchmean", torch.tensor(2.5)),
        ("mean", torch.tensor(7, dtype=torch.int32)),
    ):
        call = {"reduction": reduction, "num_items": items}
        loss = kd_loss(student, teacher, labels, backend=backend, **call)
        assert loss.shape == () and loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), total / float(items), rtol=4 * ULP, atol=0)
        check(backend, student, teacher, labels, **call)


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_sum_to_the_batch(backend: str, reduction: str, as_tensor: bool) -> None:
    """One batch of 8 rows against micro-batches with num_items, whose numbers of counted rows differ."""
    student, teacher = logits(8, 6, 35, seed=30), logits(8, 6, 35, seed=31)
    labels = labels_for(8, 6, vocabulary=35, seed=32, ignored=0.4)
    labels[3] = -100  # a micro-batch without a single row
    items: Any = (labels != -100).sum()
    items = items if as_tensor else int(items)
    options = {
        "alpha": 0.5,
        "temperature": 2.0,
        "reduction": reduction,
        "num_items": items,
        "backend": backend,
    }
    whole = student.clone().requires_grad_()
    kd_loss(whole, teacher, labels, **options).backward()
    parts = student.clone().requires_grad_()
    losses = []
    for row in range(8):
        micro = slice(row, row + 1)
        losses.append(kd_loss(parts[micro], teacher[micro], labels[micro], **options))
        losses[-1].backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=0)
    exact = bars(
        student, teacher, labels, alpha=0.5, temperature=2.0, reduction=reduction, num_items=items
    )
    assert (
        sum(losses).double() - exact.exact.loss
    ).abs() <= exact.loss + 8 * ULP * exact.exact.loss


def test_the_default_reduction_is_the_mean_over_counted_rows(any_backend: str) -> None:
    student, teacher = logits(4, 50, seed=33), logits(4, 50, seed=34)
    by_default = kd_loss(student, teacher, backend=any_backend)
    rows = kd_loss(student, teacher, reduction="none", backend=any_backend)
    torch.testing.assert_close(by_default, rows.mean())


# Padding of the vocabulary


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "squared_error"])
def test_padding_has_probability_0(backend: str, divergence: str) -> None:
    """Logits 45 and 40 wide for 37 tokens: neither zeros nor NaN in the padding change any result."""
    student, teacher = logits(3, 45, seed=35), logits(3, 40, seed=36)
    labels = labels_for(3, vocabulary=37, seed=37)
    options = {"divergence": divergence, "alpha": 0.5, "label_smoothing": 0.1}
    narrow = check(backend, student[:, :37], teacher[:, :37], labels, **options)
    for filler in (0.0, 1e4, torch.nan, torch.inf):
        student[:, 37:], teacher[:, 37:] = filler, filler
        wide = check(backend, student, teacher, labels, vocab_size=37, **options)
        torch.testing.assert_close(wide.loss, narrow.loss, rtol=4 * ULP, atol=ULP)
        assert wide.teacher_gradient is not None
        assert torch.equal(wide.student_gradient[:, 37:], torch.zeros(3, 8))
        assert torch.equal(wide.teacher_gradient[:, 37:], torch.zeros(3, 3))


def test_a_padded_vocabulary_of_a_language_model(backend: str) -> None:
    # Qwen's 151936 columns against 152064, 151643 of them tokens; zeros as a padded lm_head writes them.
    student, teacher = logits(1, 152064, seed=38), logits(1, 151936, seed=39)
    student[:, 151643:], teacher[:, 151643:] = 0.0, 0.0
    measured = check(backend, student, teacher, vocab_size=151643)
    assert not measured.student_gradient[:, 151643:].any()


# Parts


def test_parts(any_backend: str) -> None:
    student = logits(5, 23, seed=40).requires_grad_()
    teacher, labels = logits(5, 23, seed=41), labels_for(5, vocabulary=23, seed=42)
    labels[2] = -100
    weight = torch.tensor([1.0, 2.0, 3.0, 0.5, 1.0])
    call = {"labels": labels, "weight": weight, "temperature": 2.0, "backend": any_backend}
    loss, parts = kd_loss(student, teacher, alpha=0.25, reduction="none", return_parts=True, **call)
    assert isinstance(parts, fastkd.Parts)
    assert not any(part.requires_grad for part in parts)
    assert parts.counted.shape == () and parts.counted == 4
    recombined = weight * (0.25 * parts.distillation + 0.75 * parts.cross_entropy)
    torch.testing.assert_close(loss.detach(), recombined, rtol=8 * ULP, atol=0)
    # The loss does not depend on whether parts are returned.
    assert torch.equal(
        loss.detach(), kd_loss(student, teacher, alpha=0.25, reduction="none", **call).detach()
    )
    _, parts = kd_loss(student, teacher, return_parts=True, **call)
    assert not parts.cross_entropy.any()


def test_parts_without_labels(any_backend: str) -> None:
    student, teacher = logits(2, 3, 23, seed=43), logits(2, 3, 23, seed=44)
    _, parts = kd_loss(student, teacher, return_parts=True, backend=any_backend)
    assert parts.counted == 6 and parts.counted.shape == ()
    assert [tuple(part.shape) for part in parts[:3]] == [(2, 3)] * 3


# Shapes


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 1, 2, 2)], ids=str)
def test_any_leading_shape(backend: str, lead: tuple[int, ...]) -> None:
    student, teacher = logits(*lead, 11, seed=45), logits(*lead, 11, seed=46)
    labels = labels_for(*lead, vocabulary=11, seed=47)
    mask = torch.ones(lead, dtype=torch.bool)
    weight = upstream_for(*lead)
    for reduction in ("none", "mean"):
        call = {
            "alpha": 0.5,
            "mask": mask,
            "weight": weight,
            "temperature": weight.abs(),
            "reduction": reduction,
        }
        measured = check(backend, student, teacher, labels, **call)
        assert measured.student_gradient.shape == (*lead, 11)


# The module


def test_the_module_equals_the_function(any_backend: str) -> None:
    student, teacher, labels = (
        logits(3, 13, seed=48),
        logits(3, 13, seed=49),
        labels_for(3, vocabulary=13, seed=50),
    )
    options: dict[str, Any] = {
        "divergence": fastkd.jsd(0.3),
        "temperature": 2.0,
        "alpha": 0.5,
        "backend": any_backend,
    }
    module = KDLoss(**options)
    batch: dict[str, Any] = {
        "mask": torch.tensor([True, False, True]),
        "weight": torch.rand(3),
        "num_items": 5,
    }
    assert torch.equal(
        module(student, teacher, labels, **batch),
        kd_loss(student, teacher, labels, **batch, **options),
    )
    assert torch.equal(
        module(student, teacher, labels), kd_loss(student, teacher, labels, **options)
    )
    assert not list(module.parameters()) and not module.state_dict()
    assert repr(module).startswith(
        "KDLoss(divergence=Divergence(name='jsd'"
    ) and "temperature=2.0" in repr(module)


def test_the_module_can_be_copied_and_pickled(any_backend: str) -> None:
    student, teacher = logits(3, 13, seed=51), logits(3, 13, seed=52)
    module = KDLoss(divergence=fastkd.jsd(0.3), temperature=2.0, backend=any_backend)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(student, teacher), module(student, teacher))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"alpha": 2.0}, ValueError, "alpha must be in [0, 1], got 2.0"),
        (
            {"divergence": "kl"},
            ValueError,
            f"divergence must be one of {', '.join([*fastkd.DIVERGENCES, 'dkd', 'nkd'])}; got 'kl'",
        ),
        (
            {"reduction": "avg"},
            ValueError,
            "reduction must be one of none, sum, mean, batchmean; got 'avg'",
        ),
        (
            {"vocab_size": 0},
            ValueError,
            "vocab_size must be in [1, 2], the narrowest of the widths; got 0",
        ),
        (
            {"backend": "gpu"},
            ValueError,
            f"backend must be 'auto' or one of {', '.join(fastkd.available_backends())}; got 'gpu'",
        ),
        (
            {"mask": None},
            TypeError,
            "mask belongs to a batch: pass it to the call, not to KDLoss()",
        ),
        (
            {"weight": None},
            TypeError,
            "weight belongs to a batch: pass it to the call, not to KDLoss()",
        ),
        (
            {"num_items": 4},
            TypeError,
            "num_items belongs to a batch: pass it to the call, not to KDLoss()",
        ),
    ],
)
def test_the_module_refuses_bad_options_in_its_constructor(
    options: dict[str, Any], kind: type, message: str
) -> None:
    with pytest.raises(kind) as error:
        KDLoss(**options)
    assert str(error.value) == message


def test_the_module_refuses_an_unknown_option() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'tau'"):
        KDLoss(tau=2.0)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.3, "label_smoothing": 0.1, "ignore_index": 0},
        {"alpha": 1.0, "reduction": "batchmean", "vocab_size": 11},
        {"inplace": True, "return_parts": True},
    ],
)
def test_the_module_accepts_what_the_function_accepts(options: dict[str, Any]) -> None:
    student, teacher, labels = (
        logits(3, 13, seed=53),
        logits(3, 13, seed=54),
        labels_for(3, vocabulary=11, seed=55),
    )
    result = KDLoss(**options)(student.clone(), teacher, labels)
    expected = kd_loss(student.clone(), teacher, labels, **options)
    pairs = (
        zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
    )
    flat: list[tuple[Tensor, Tensor]] = []
    for actual, reference in pairs:
        flat += (
            zip(actual, reference, strict=True)
            if isinstance(actual, tuple)
            else [(actual, reference)]
        )
    assert all(torch.equal(actual, reference) for actual, reference in flat)


def test_the_module_can_be_built_whatever_backend_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's trial run is not a call: FASTKD_BACKEND and FASTKD_STRICT do not apply to it."""
    monkeypatch.setenv("FASTKD_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("FASTKD_STRICT", "1")
    KDLoss(temperature=2.0)
