"""Losses on features: the published formulas in float64, edge cases, and the variants of common code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.features import (
    FeatureLoss,
    HintLoss,
    Regressor,
    attention_transfer_loss,
    cosine_loss,
    hint_loss,
)

NAN = float("nan")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


# The formulas, one example or position at a time


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.stack(
        [0.5 * (s - t).pow(2).sum() for s, t in zip(student, teacher, strict=True)]
    ).mean()


def attention_map(maps: Tensor, power: float) -> Tensor:
    return sum(maps[c].abs() ** power for c in range(maps.shape[0])).reshape(-1)


def attention(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Mean over examples of 1/2 ||Q_S/||Q_S|| - Q_T/||Q_T||||_2 (beta = 1)."""
    distances = []
    for s, t in zip(student, teacher, strict=True):
        q_s, q_t = attention_map(s, power), attention_map(t, power)
        distances.append(0.5 * torch.linalg.norm(q_s / q_s.norm() - q_t / q_t.norm()))
    return torch.stack(distances).mean()


def attention_code(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    def normalized(maps: Tensor) -> Tensor:
        return F.normalize(maps.abs().pow(power).mean(1).flatten(1))

    return F.mse_loss(normalized(student), normalized(teacher))


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    rows = zip(student.flatten(0, -2), teacher.flatten(0, -2), strict=True)
    return torch.stack([1 - (s @ t) / (s.norm() * t.norm()) for s, t in rows]).mean()


def two_layers(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over positions of sum_d (P h_S - h_T)^2 / D, summed over two layers with weights 1 and 0.5."""
    total = 0.0
    for weight, P in zip((1.0, 0.5), MATRICES, strict=True):
        squares = [
            sum(((P.to(s.dtype) @ s)[d] - t[d]) ** 2 for d in range(t.shape[0])) / t.shape[0]
            for s, t in zip(student.flatten(0, -2), teacher.flatten(0, -2), strict=True)
        ]
        total = total + weight * torch.stack(squares).mean()
    return total


MATRICES = [normal(5, 5, seed=seed).float().double() for seed in (90, 91)]


def fixed_feature_loss(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    matrices = [matrix.to(student.dtype) for matrix in MATRICES]
    loss = FeatureLoss([(0, 0), (-1, 1)], projection=matrices, weights=[1.0, 0.5])
    return loss((student, student), [teacher, teacher], **options)


# (fastkd's loss, its formula, shape)
LOSSES: dict[str, Any] = {
    "hint": (hint_loss, hint, (3, 4, 5)),
    "attention": (attention_transfer_loss, attention, (3, 4, 5, 2)),
    "attention, code": (
        lambda s, t: attention_transfer_loss(s, t, form="code"), attention_code, (3, 4, 5, 2),
    ),
    "attention, power": (
        lambda s, t: attention_transfer_loss(s, t, power=3), lambda s, t: attention(s, t, 3.0), (3, 4, 5),
    ),
    "cosine": (cosine_loss, cosine, (3, 4, 5)),
    "layers": (fixed_feature_loss, two_layers, (3, 4, 5)),
}  # fmt: skip
every_loss = pytest.mark.parametrize(("loss", "formula", "shape"), LOSSES.values(), ids=LOSSES)
MASKED = {"hint": hint_loss, "cosine": cosine_loss, "layers": fixed_feature_loss}
masked_losses = pytest.mark.parametrize("loss", MASKED.values(), ids=MASKED)


def value_and_gradients(loss: Any, *inputs: Tensor) -> list[Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    value = loss(*leaves)
    (3.0 * value**2).backward()  # an upstream gradient other than 1
    return [value.detach(), *(leaf.grad for leaf in leaves)]


@every_loss
def test_formula_and_gradients(loss: Any, formula: Any, shape: tuple[int, ...]) -> None:
    student, teacher = normal(*shape, seed=1), normal(*shape, seed=2)
    before = student.clone(), teacher.clone()
    exact = value_and_gradients(formula, student, teacher)
    torch.testing.assert_close(value_and_gradients(loss, student, teacher), exact)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    if len(shape) == 4:
        student, teacher = student[:2, :2, :2], teacher[:2, :2, :2]
    leaves = student[:2].clone().requires_grad_(), teacher[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_that_of_plain_float32(
    loss: Any, formula: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    shape = (shape[0] * 8, *shape[1:])
    if formula is two_layers:
        dtype = torch.float32  # a fixed matrix in half precision is rounded
    student, teacher = normal(*shape, seed=3, dtype=dtype), normal(*shape, seed=4, dtype=dtype)
    exact = value_and_gradients(formula, student.double(), teacher.double())
    plain = value_and_gradients(formula, student.float(), teacher.float())
    actual = value_and_gradients(loss, student, teacher)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    for which, value in enumerate(actual):
        largest = exact[which].abs().max()
        rounding = torch.finfo(dtype).eps / 2 if which else 0.0
        allowed = (plain[which].double() - exact[which]).abs().max() + largest * (
            4 * 2**-23 + rounding
        )
        assert (value.double() - exact[which]).abs().max() <= allowed


def test_half_precision_is_squared_and_summed_in_float32() -> None:
    """300^2 overflows float16, and a sum of 4096 ones stops at 256 in bfloat16."""
    big = torch.full((2, 64, 3, 3), 300.0, dtype=torch.float16)
    zero = torch.zeros_like(big)
    assert hint_loss(big, zero).item() == 0.5 * 300**2 * 64 * 9
    assert hint_loss(big, zero, reduction="mean_square").item() == 300**2
    assert attention_transfer_loss(big, big[:, :5]).item() == 0
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert hint_loss(ones, 0 * ones).item() == 2048


def test_hint_reductions() -> None:
    student, teacher = normal(3, 4, 5, seed=5), normal(3, 4, 5, seed=6)
    squares = (student - teacher) ** 2
    mask = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]])
    per_example = 0.5 * torch.stack([squares[b, mask[b]].sum() for b in range(3)])
    close = torch.testing.assert_close
    close(hint_loss(student, teacher, mask=mask, reduction="none"), per_example)
    close(hint_loss(student, teacher, mask=mask, reduction="sum"), per_example.sum())
    close(
        hint_loss(student, teacher, mask=mask), per_example.sum() / 2
    )  # one example has no position left
    close(hint_loss(student, teacher, mask=mask, reduction="mean_square"), squares[mask].mean())
    close(hint_loss(student, teacher, reduction="mean_square"), F.mse_loss(student, teacher))
    of_examples = torch.tensor([True, False, True])
    close(hint_loss(student, teacher, mask=of_examples), hint(student[::2], teacher[::2]))
    leaf, upstream = student.clone().requires_grad_(), torch.tensor([1.0, -2.0, 0.5]).double()
    hint_loss(leaf, teacher, reduction="none").backward(upstream)
    close(leaf.grad, upstream[:, None, None] * (student - teacher))


@masked_losses
def test_masked_positions_are_ignored(loss: Any) -> None:
    student, teacher = normal(2, 4, 5, seed=7), normal(2, 4, 5, seed=8)
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])
    if loss is hint_loss:  # of examples
        mask = mask[:, 1:2].logical_not().logical_or(torch.tensor([[True], [False]])).squeeze(1)
        short, short_teacher = student[mask], teacher[mask]
    else:
        short, short_teacher = student[mask].unsqueeze(0), teacher[mask].unsqueeze(0)
    student[~mask], teacher[~mask] = NAN, float("inf")
    value, gradient, _ = value_and_gradients(lambda s, t: loss(s, t, mask=mask), student, teacher)
    exact, exact_gradient, _ = value_and_gradients(loss, short, short_teacher)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(gradient[mask].reshape(short.shape), exact_gradient)
    assert (gradient[~mask] == 0).all()


@masked_losses
def test_an_empty_mask_gives_zero_with_a_graph(loss: Any) -> None:
    for student in (torch.full((2, 4, 5), NAN), torch.zeros(0, 4, 5), torch.zeros(2, 0, 5)):
        student.requires_grad_()
        mask = torch.zeros(student.shape[:2], dtype=torch.bool)
        value = loss(student, student.detach(), mask=mask)
        value.backward()
        assert value == 0 and (student.grad == 0).all()
        if not student.numel():
            assert loss(student, student.detach()) == 0
    assert attention_transfer_loss(torch.zeros(0, 2, 3), torch.zeros(0, 4, 3)) == 0


def test_masked_learned_projection_gets_no_nan() -> None:
    student, teacher = normal(2, 3, 4, seed=9).float(), normal(2, 3, 6, seed=10).float()
    mask = torch.tensor([[True, False, True], [True, True, False]])
    student[~mask], teacher[~mask] = NAN, NAN
    for loss in (FeatureLoss({0: 0}, 4, 6), HintLoss(Regressor(4, 6))):
        states = ((student,), (teacher,)) if isinstance(loss, FeatureLoss) else (student, teacher)
        value = loss(*states, mask=mask)
        value.backward()
        assert value.isfinite() and all(p.grad.isfinite().all() for p in loss.parameters())
    images = normal(2, 4, 3, 3, seed=11).float()
    images[1] = NAN
    convolved = HintLoss(Regressor(4, 6, "conv"))
    value = convolved(images, torch.zeros(2, 6, 3, 3), mask=torch.tensor([True, False]))
    value.backward()
    assert value.isfinite() and convolved.regressor.map.weight.grad.isfinite().all()


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_attention_where_a_map_is_zero_or_both_are_equal(form: str, power: float) -> None:
    maps, zero = normal(2, 3, 4, seed=12), torch.zeros(2, 3, 4, dtype=torch.float64)
    for student, teacher in ((maps, maps), (zero, maps), (maps, zero), (zero, zero)):
        value, *gradients = value_and_gradients(
            lambda s, t: attention_transfer_loss(s, t, form=form, power=power), student, teacher
        )
        one_is_zero = (student is zero) != (teacher is zero)
        assert value == pytest.approx({"paper": 0.5, "code": 0.25}[form] if one_is_zero else 0.0)
        assert all(gradient.isfinite().all() for gradient in gradients)
        if not one_is_zero:
            assert all((gradient == 0).all() for gradient in gradients)
        if student is zero:
            assert (gradients[0] == 0).all()


def test_attention_does_not_depend_on_scale() -> None:
    """Only directions matter: the squares of 1e-30 and of 1e30 neither underflow nor overflow in float32."""
    student, teacher = normal(2, 3, 4, seed=13).float(), normal(2, 3, 4, seed=14).float()
    expected = attention_transfer_loss(student, teacher)
    for scale in (1e-30, 1e30):
        leaf = (scale * student).requires_grad_()
        value = attention_transfer_loss(leaf, teacher / scale)
        value.backward()
        torch.testing.assert_close(value, expected)
        assert leaf.grad.isfinite().all() and (leaf.grad != 0).any()


def test_attention_of_several_layers() -> None:
    students = [normal(2, 3, 4, 4, seed=15), normal(2, 6, 2, 2, seed=16)]
    teachers = [normal(2, 5, 4, 4, seed=17), normal(2, 9, 2, 2, seed=18)]
    for form, formula, half in (("paper", attention, 1.0), ("code", attention_code, 1.0)):
        expected = sum(formula(s, t) for s, t in zip(students, teachers, strict=True)) * half
        actual = attention_transfer_loss(students, tuple(teachers), form=form, beta=7.0)
        torch.testing.assert_close(actual, 7.0 * expected)


@pytest.mark.parametrize("resize", ["interpolate", "pool"])
def test_maps_of_different_sizes(resize: str) -> None:
    def resized(maps: Tensor) -> Tensor:
        if resize == "pool":
            return F.adaptive_avg_pool2d(maps, (2, 3))
        return F.interpolate(maps, (2, 3), mode="bilinear")

    student, teacher = normal(2, 3, 4, 6, seed=19), normal(2, 5, 2, 3, seed=20)
    q = resized(student.square().sum(1, keepdim=True)).flatten(1)
    q, p = F.normalize(q), F.normalize(teacher.square().sum(1).flatten(1))
    torch.testing.assert_close(
        attention_transfer_loss(student, teacher, resize=resize), 0.5 * (q - p).norm(dim=1).mean()
    )
    loss = HintLoss(Regressor(3, 5, "conv", resize=resize).double(), reduction="mean_square")
    mapped = resized(F.conv2d(student, loss.regressor.map.weight, loss.regressor.map.bias))
    torch.testing.assert_close(loss(student, teacher), F.mse_loss(mapped, teacher))
    with pytest.raises(ValueError, match="4 x 6, and the teacher's 2 x 3.*resize='interpolate'"):
        HintLoss(Regressor(3, 5, "conv").double())(student, teacher)
    with pytest.raises(ValueError, match="resize='interpolate'"):
        attention_transfer_loss(student, teacher)


def test_cosine_keeps_its_digits_and_zero_vectors_give_1() -> None:
    vector = normal(1, 64, seed=21).float()
    near = vector * 3 + 1e-4 * normal(1, 64, seed=22).float()
    exact = cosine(near.double(), vector.double()).item()
    assert cosine_loss(near, vector).item() == pytest.approx(exact, rel=1e-2) and exact < 1e-8
    zero = torch.zeros(1, 64, requires_grad=True)
    for student, teacher in ((zero, vector), (vector, zero), (zero, zero)):
        value = cosine_loss(student, teacher)
        value.backward()
        assert value.item() == pytest.approx(1.0) and (zero.grad == 0).all()
    assert cosine_loss(vector, -vector).item() == pytest.approx(2.0)


@pytest.mark.parametrize("normalize", [None, "l2", "layer"])
def test_feature_loss_normalizes(normalize: str | None) -> None:
    student, teacher = normal(2, 3, 4, seed=23), normal(2, 3, 6, seed=24)
    loss = FeatureLoss({"a": "b"}, 4, 6, normalize=normalize, bias=True).double()
    P, b = loss.projections[0].weight, loss.projections[0].bias
    mapped = student @ P.T + b
    if normalize == "l2":
        mapped, wanted = (x / x.norm(dim=-1, keepdim=True) for x in (mapped, teacher))
    elif normalize == "layer":
        mapped, wanted = (
            (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            for x in (mapped, teacher)
        )
    else:
        wanted = teacher
    expected = ((mapped - wanted) ** 2).sum(-1).mean() / 6
    torch.testing.assert_close(loss({"a": student}, {"b": teacher}), expected)
    zero = torch.zeros(2, 3, 6, dtype=torch.float64, requires_grad=True)
    plain = FeatureLoss({0: 0}, projection="identity", normalize=normalize)
    plain([zero], [teacher]).backward()
    assert zero.grad.isfinite().all()


def test_feature_loss_projections() -> None:
    states, teacher_states = (
        (normal(2, 3, 4, seed=25).float(),) * 3,
        (normal(2, 3, 6, seed=26).float(),) * 3,
    )
    matrix = normal(6, 4, seed=27).float().requires_grad_()
    loss = FeatureLoss([(0, 1), (1, 1), (2, 0)], 4, 6, projection=["linear", "fixed", matrix])
    loss(states, teacher_states).backward()
    assert [name for name, _ in loss.named_parameters()] == ["projections.0.weight"]
    assert loss.projections[0].weight.grad is not None and matrix.grad is None
    fixed = loss.projections[1].weight
    torch.testing.assert_close(fixed.T @ fixed, torch.eye(4))
    assert set(loss.state_dict()) == {f"projections.{n}.weight" for n in range(3)}
    assert loss.student_layers == [0, 1, 2] and loss.teacher_layers == [1, 0]
    assert not list(FeatureLoss({0: 0}, projection="identity").parameters())


def test_feature_loss_of_channels_and_masks_of_examples() -> None:
    student, teacher = normal(3, 4, 5, 2, seed=28), normal(3, 6, 5, 2, seed=29)
    loss = FeatureLoss({0: 0}, 4, 6, dim=1).double()
    mapped = F.conv2d(student, loss.projections[0].weight[:, :, None, None])
    torch.testing.assert_close(loss((student,), (teacher,)), F.mse_loss(mapped, teacher))
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(
        loss((student,), (teacher,), mask=mask), F.mse_loss(mapped[mask], teacher[mask])
    )


@every_loss
def test_layouts(loss: Any, formula: Any, shape: tuple[int, ...]) -> None:
    student, teacher = normal(*shape, seed=30), normal(*shape, seed=31)
    turned = student.transpose(1, 2).contiguous().transpose(1, 2)
    one = teacher[:1].expand(shape)
    torch.testing.assert_close(loss(turned, one), loss(student, one.contiguous()))


@every_loss
def test_autocast(loss: Any, formula: Any, shape: tuple[int, ...]) -> None:
    student, teacher = normal(*shape, seed=32).float(), normal(*shape, seed=33).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(student, teacher).dtype == torch.float32
        assert loss(student.bfloat16(), teacher).dtype == torch.float32


def test_compiled() -> None:
    """All feature losses in one graph, so that the test compiles once; all its operators are torch's own."""

    def together(student: Tensor, teacher: Tensor) -> Tensor:
        mask = student[..., 0] > 0
        masked = [loss(student, teacher, mask=mask) for loss in MASKED.values()]
        return torch.stack(
            [*masked, *(loss(student, teacher) for loss, _, _ in LOSSES.values())]
        ).sum()

    student, teacher = normal(3, 4, 5, seed=34).float(), normal(3, 4, 5, seed=35).float()
    plain = value_and_gradients(together, student, teacher)
    compiled = torch.compile(together, fullgraph=True, backend="eager")
    torch.testing.assert_close(value_and_gradients(compiled, student, teacher), plain)


def test_half_precision_features_meet_float32_projections() -> None:
    student = normal(2, 4, 3, 3, seed=34).bfloat16()
    for module in (Regressor(4, 6, "conv"), Regressor(3, 6)):
        assert module(student).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(student.float()).dtype == torch.bfloat16
    teacher = torch.zeros(2, 4, 3, 6, dtype=torch.bfloat16)
    for projection in ("linear", "fixed"):
        loss = FeatureLoss({0: 0}, 3, 6, projection=projection)
        assert loss((student,), (teacher,)).dtype == torch.float32


def test_any_module_can_be_a_regressor() -> None:
    student, teacher = normal(2, 4, seed=35), normal(2, 6, seed=36)
    regressor = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double()
    torch.testing.assert_close(
        HintLoss(regressor)(student, teacher), hint(regressor(student), teacher)
    )


x, y = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)
maps = torch.zeros(2, 3, 4, 4)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "shapes": (lambda: hint_loss(x, y), ValueError, r"teacher must have the shape of student.*\(2, 3, 5\).*Regressor"),
    "no tensor": (lambda: cosine_loss(x, [1.0]), TypeError, "teacher must be a tensor, got list"),
    "integers": (lambda: cosine_loss(x.long(), x), TypeError, "student must be floating point, got torch.int64"),
    "reduction": (lambda: hint_loss(x, x, reduction="max"), ValueError, "reduction must be one of mean.*'max'"),
    "one dimension": (lambda: hint_loss(x[0, 0], x[0, 0]), ValueError, r"student must be \[B, ..\]"),
    "mask's dtype": (lambda: hint_loss(x, x, mask=torch.ones(2, 3)), TypeError, "mask must be bool"),
    "mask's type": (lambda: hint_loss(x, x, mask=[True]), TypeError, "mask must be a tensor, got list"),
    "mask's shape": (
        lambda: cosine_loss(x, x, mask=torch.ones(3, dtype=torch.bool)), ValueError, r"mask must have .*\(3,\)",
    ),
    "mask of features": (
        lambda: cosine_loss(x, x, mask=x.bool()), ValueError, r"mask must have the shape of the positions, \(2, 3\)",
    ),
    "device": (lambda: hint_loss(x, x.to("meta")), ValueError, "teacher must be on cpu"),
    "kind": (lambda: Regressor(3, 4, "conv3"), ValueError, "kind must be one of linear, conv"),
    "width": (lambda: Regressor(0, 4), ValueError, "student_width must be a positive int, got 0"),
    "resize": (lambda: Regressor(3, 4, resize="pool"), ValueError, "resize is for kind='conv'"),
    "regressor's features": (lambda: Regressor(3, 4)(x), ValueError, r"\[.., 3\], to match student_width"),
    "regressor's rank": (lambda: Regressor(3, 4, "conv")(x), ValueError, r"must be \[B, C, H, W\]"),
    "form": (lambda: attention_transfer_loss(maps, maps, form="x"), ValueError, "form must be one of paper, code"),
    "power": (lambda: attention_transfer_loss(maps, maps, power=0.5), ValueError, r"power must be in \[1, inf\)"),
    "beta": (lambda: attention_transfer_loss(maps, maps, beta=-1), ValueError, r"beta must be in \[0, inf\)"),
    "counts": (lambda: attention_transfer_loss([maps], [maps] * 2), ValueError, "as many layers as student_maps, 1"),
    "no maps": (lambda: attention_transfer_loss([], []), TypeError, "student_maps must be a tensor or a sequence"),
    "no positions": (lambda: attention_transfer_loss(x[0], x[0]), ValueError, r"student_maps\[0\] must be \[B, C"),
    "batches": (lambda: attention_transfer_loss(maps, maps[:1]), ValueError, r"batch size and device of student_maps"),
    "lengths": (lambda: attention_transfer_loss(x, y), ValueError, r"spatial size of teacher_maps\[0\], \(5,\)"),
    "layers": (lambda: FeatureLoss([0, 1], 3, 4), ValueError, "layers must map student layers"),
    "no layers": (lambda: FeatureLoss({}, 3, 4), ValueError, "layers must map student layers"),
    "widths": (lambda: FeatureLoss({0: 0}), ValueError, "student_width must be a positive int, got None"),
    "count of widths": (lambda: FeatureLoss({0: 0}, [1, 2], 3), ValueError, "one value per pair of layers, 1; got 2"),
    "projection": (lambda: FeatureLoss({0: 0}, 3, 4, projection="x"), ValueError, r"projection\[0\] must be one of"),
    "matrix": (lambda: FeatureLoss({0: 0}, projection=x), ValueError, "must be a floating-point tensor .teacher width"),
    "weights": (lambda: FeatureLoss({0: 0}, 3, 4, weights=[-1]), ValueError, r"weights\[0\] must be in \[0, inf\)"),
    "dim": (lambda: FeatureLoss({0: 0}, 3, 4, dim=2), ValueError, "dim must be one of -1, 1; got 2"),
    "no such index": (lambda: FeatureLoss({3: 0}, 4, 4)([x], [x]), ValueError, "layer 3; it has 1 layers"),
    "no such name": (lambda: FeatureLoss({"a": "b"}, 4, 4)({"c": x}, {"b": x}), ValueError, "'a'; it has 'c'"),
    "student's width": (lambda: FeatureLoss({0: 0}, 3, 4)([x], [x]), ValueError, r"student_states\[0\] must have 3"),
    "teacher's width": (lambda: FeatureLoss({0: 0}, 4, 4)([x], [y]), ValueError, r"teacher_states\[0\] must have the"),
    "positions": (lambda: FeatureLoss({0: 0}, 4, 4)([x], [x[:1]]), ValueError, "must have the positions of"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
