"""Tensors of every kind, as every loss and backend gets them: right, or an error that names the argument.

tests/support/every_loss.py lists the losses with all tensors that they take.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cuda_emulation import Emulation
from support.every_loss import LOSSES, Case, Tensors, leaf
from support.paths import ROOT
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd import TopK, calibration, kd_loss, online, sequences
from fastkd.core import tensors
from fastkd.parallel import collectives

# The interpreter computes with NumPy, which warns about infinities and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# The interpreter takes a second per loss; the other losses use the same kernels or none.
IN_TRITON = {
    "kd_loss, both trained": ("student", "teacher", "labels", "weight", "temperature", "all"),
    "kd_loss, summed": ("all",),
    "kd_loss, TopK": ("all",),
    "mutual_loss": ("student", "all"),
    "draft_loss": ("all",),
}


def run(
    case: Case, given: Tensors, backend: str, upstream: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The loss and its gradients, computed twice: the first backward keeps the graph, the second frees it."""
    of_backend = {"backend": backend} if case.with_backend else {}
    trained = [given[name] for name in case.trained]
    loss = case.loss(given, **of_backend)
    if upstream is None:
        upstream = upstream_of(loss)
    first = torch.autograd.grad(loss, trained, upstream, retain_graph=True)
    second = torch.autograd.grad(loss, trained, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return (loss.detach(), *first)


def upstream_of(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)


def changed(case: Case, given: Tensors, name: str, change: Callable[[Tensor], Tensor]) -> Tensors:
    """The arguments, of which one (or every one) is changed; those that are trained as leaves."""
    made = {
        key: change(value) if name in (key, "all") else value.clone()
        for key, value in given.items()
    }
    return {key: leaf_like(x) if key in case.trained else x for key, x in made.items()}


def leaf_like(tensor: Tensor) -> Tensor:
    """A trained tensor with the flags and strides of another."""
    return tensor.detach().requires_grad_()


def masked(case: Case) -> bool:
    return "mask" in case.tensors(torch.float32)


def without_weight(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(given: Tensors, **options: str) -> Tensor:
        return loss(given | {"weight": torch.ones(2, 3)}, **options)

    return call


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], of: object) -> None:
    for value, expected_value in zip(found, wanted, strict=True):
        assert torch.equal(value, expected_value), of
        assert expected_value.isfinite().all()


# ---- flags that are lost in a tensor's address


def negated(tensor: Tensor) -> Tensor:
    """The same values in a view that torch marks as negated; a bool, which has no sign, as it is."""
    return tensor.clone() if tensor.dtype == torch.bool else torch._neg_view(-tensor)


def imaginary(tensor: Tensor) -> Tensor:
    """The same values as the imaginary part of a conjugated tensor, where torch has a complex type for them."""
    if tensor.dtype not in (torch.float32, torch.float64):
        return negated(tensor)
    return torch.complex(torch.full_like(tensor, 7.0), -tensor).conj().imag


def test_the_views_have_the_intended_flags() -> None:
    values = torch.tensor([1.0, -2.0])
    for view in (negated(values), imaginary(values)):
        assert view.is_neg() and torch.equal(view, values)


def each_flagged(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> None:
    inputs = case.tensors(dtype)
    wanted = run(case, changed(case, inputs, "none", torch.clone), backend)
    for change in (negated, imaginary):
        for name in [*inputs, "all"]:
            actual = run(case, changed(case, inputs, name, change), backend)
            assert_same(actual, wanted, (name, change.__name__))
        upstream = change(upstream_of(wanted[0]))
        actual = run(case, changed(case, inputs, "none", torch.clone), backend, upstream)
        assert_same(actual, wanted, ("upstream", change.__name__))


@pytest.mark.parametrize("loss", LOSSES)
def test_negated_views_of_every_argument(backend: str, loss: str) -> None:
    if not LOSSES[loss].with_backend and backend != "reference":
        return  # the same call for this backend
    each_flagged(LOSSES[loss], backend)


@pytest.mark.parametrize("loss", ["kd_loss", "kd_loss, TopK", "kd_loss, Ensemble", "mutual_loss"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_negated_views_of_half_precision(backend: str, loss: str, dtype: torch.dtype) -> None:
    each_flagged(LOSSES[loss], backend, dtype)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_negated_views_whose_copy_has_the_wrong_sign(any_backend: str, temperature: float) -> None:
    """Tensor.copy_ from float16 to float32 leaves the sign out where rows are next to each other: none is dropped."""
    pair = [torch.randn(3, 8, dtype=torch.float16) for _ in range(2)]
    topk = TopK.from_logits(pair[1], 2, temperature=temperature)
    options: dict[str, Any] = {"temperature": temperature, "backend": any_backend}

    def found(*given: Tensor | TopK) -> tuple[Tensor, ...]:
        trained = [x.detach().requires_grad_() for x in given if isinstance(x, Tensor)]
        rest = [x for x in given if not isinstance(x, Tensor)]
        loss = kd_loss(*trained, *rest, **options)
        return (loss.detach(), *torch.autograd.grad(loss, trained))

    assert_same(found(*map(negated, pair)), found(*pair), "dense")
    assert_same(found(negated(pair[0]), topk), found(pair[0], topk), "TopK")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that Triton launches; what they are given has to be what its memory holds."""
    from triton.runtime.interpreter import GridExecutor

    launch, launched = GridExecutor.__call__, []

    def spied(self: Any, *arguments: Any, **options: Any) -> Any:
        launched.append(self.fn.__name__)
        for tensor in filter(torch.is_tensor, leaves((arguments, options))):
            assert tensors.writable(tensor), launched[-1]
            assert tensor.data_ptr() or not tensor.numel()
        return launch(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", spied)
    yield launched


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value


@pytest.mark.parametrize("loss", IN_TRITON)
def test_negated_views_in_triton(launches: list[str], loss: str) -> None:
    case = LOSSES[loss]
    inputs = case.tensors(torch.float32)
    wanted = run(case, changed(case, inputs, "none", torch.clone), "triton")
    for name in IN_TRITON[loss]:
        upstream = negated(upstream_of(wanted[0])) if name == "all" else None
        actual = run(case, changed(case, inputs, name, negated), "triton", upstream)
        assert_same(actual, wanted, name)
    assert "scale_kernel" in launches and len(set(launches)) > 1


@pytest.mark.parametrize("loss", ["kd_loss", "kd_loss, both trained", "kd_loss, TopK"])
def test_negated_views_on_the_cuda_emulation(emulation: Emulation, loss: str) -> None:
    each_flagged(LOSSES[loss], "cuda")


def test_only_one_function_reads_an_address() -> None:
    results = []
    for path in [*(ROOT / "fastkd").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("data_ptr", "_unsafe_data_ptr"):
                results.append(path.name)
    assert set(results) == {"tensors.py"}


def test_every_launch_gets_readable_tensors() -> None:
    """Each function that launches a kernel makes its tensors readable, or is given what such a function has made."""
    makers = {"readable", "readable_rows", "unit_stride"}
    # These functions receive views and calls that other functions made, with unit strides, or the rows of `_call`.
    inputs = {"_launch_splits", "_launch_stage", "_launch_rows", "_mark_tokens", "launch"}
    for path in (ROOT / "kernels").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or function.name in inputs:
                continue
            calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
            named = {getattr(called, "id", getattr(called, "attr", "")) for called in calls}
            launching = {"launch", "replay"} & named
            if launching or any(isinstance(called, ast.Subscript) for called in calls):
                assert named & makers, (path.name, function.name)


def test_the_address_of_a_flagged_view_raises() -> None:
    with pytest.raises(TypeError, match="must be resolved before its address"):
        tensors.address(negated(torch.ones(2)))
    with pytest.raises(TypeError, match="a Tensor on meta has no memory"):
        tensors.address(torch.ones(2, device="meta"))
    assert tensors.address(None) == 0 and tensors.address(torch.empty(0)) == 0


@pytest.mark.parametrize("change", [negated, imaginary])
def test_an_in_place_gradient_is_never_written_through_a_negated_view(
    any_backend: str, change: Callable[[Tensor], Tensor]
) -> None:
    trained, teacher = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    view = change(trained.requires_grad_())
    before = view.detach().clone()
    with pytest.raises(ValueError, match="pass student_logits.resolve_neg\\(\\)"):
        kd_loss(view, teacher, inplace=True, backend=any_backend)
    assert torch.equal(view, before)
    kd_loss(view.resolve_neg(), teacher, inplace=True, backend=any_backend).backward()
    other = trained.detach().clone().requires_grad_()
    kd_loss(other, teacher, backend=any_backend).backward()
    assert trained.grad is not None and torch.equal(trained.grad, other.grad)


def test_negated_views_in_a_cache(tmp_path: Path) -> None:
    from fastkd.teachers.cache import CacheWriter, TeacherCache

    logits, ids = torch.randn(4, 9), torch.tensor([3, 1, 2, 5])
    hidden, weight, bias = torch.randn(4, 5), torch.randn(9, 5), torch.randn(9)
    top = TopK.from_logits(logits, 3)
    flagged = TopK(negated(top.ids), negated(top.logprobs), "bucket", negated(top.tail_logprob))
    actual, wanted = (
        [
            _cached(tmp_path / f"{which}-{kind}", CacheWriter, TeacherCache, kind, change(ids), **inputs)
            for kind, inputs in (
                ("dense", {"logits": change(logits)}),
                ("topk", {"topk": flagged if which else top}),
                ("hidden", {
                    "hidden": change(hidden), "weight": change(weight), "bias": change(bias),
                }),
            )
        ]
        for which, change in ((1, negated), (0, torch.clone))
    )  # fmt: skip
    assert actual == wanted


def _cached(
    path: Path, writer: Any, reader: Any, kind: str, ids: Tensor, **given: Any
) -> list[Any]:
    head = {name: given.pop(name) for name in ("weight", "bias") if name in given}
    k = {"k": 3} if kind == "topk" else {}
    with writer(path, kind=kind, vocab_size=9, **head, **k) as opened:
        opened.append(ids, **given)
    example = reader(path)[0]
    parts = vars(example.teacher).values() if kind != "dense" else [example.teacher]
    return [x.tolist() for x in [example.input_ids, *parts] if isinstance(x, Tensor)]


def test_tensors_that_processes_exchange_are_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo sends memory: a negated view would arrive with the other sign."""
    sent: list[Tensor] = []
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda group: 1)
    for name in ("_all_gather", "_reduce_scatter"):
        monkeypatch.setattr(collectives, name, lambda to, of, **options: sent.append(of))
    values = torch.tensor([[1.0, 2.0]])
    collectives.all_gather(negated(values), None, "a test")  # type: ignore[arg-type]
    collectives.reduce_scatter(negated(values), None, "a test")  # type: ignore[arg-type]
    assert [(x.is_neg(), x.tolist()) for x in sent] == [(False, [1.0, 2.0])] * 2


# ---- kinds of tensors


def test_expanded_and_zero_tensors(any_backend: str) -> None:
    student, teacher = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    zeros, one = torch._efficientzerotensor((2, 3, 9)), torch.tensor(1.5)
    for wide, plain in (
        (student[:1].expand(2, 3, 9), student[:1].repeat(2, 1, 1)),
        (student[..., :1].expand(2, 3, 9), student[..., :1].repeat(1, 1, 9)),
        (zeros, torch.zeros(2, 3, 9)),
    ):
        for arguments in ((wide, teacher), (teacher, wide)):
            wanted = [plain if x is wide else x for x in arguments]
            options = {"backend": any_backend, "reduction": "none"}
            assert torch.equal(kd_loss(*arguments, **options), kd_loss(*wanted, **options))
    many, options = one.expand(2, 3), {"weight": one.expand(2, 3), "temperature": one.expand(2, 3)}
    plain = {name: many.contiguous() for name in options}
    first, second = (
        kd_loss(student, teacher, backend=any_backend, **inputs) for inputs in (options, plain)
    )
    # torch adds up an expanded tensor in another order.
    torch.testing.assert_close(first, second, rtol=2**-22, atol=0)


class Subclass(Tensor):
    pass


def test_parameters_and_subclasses(any_backend: str) -> None:
    student, teacher = torch.randn(2, 9), torch.randn(2, 9)
    wanted = kd_loss(student, teacher, backend=any_backend)
    for made in (torch.nn.Parameter(student), student.as_subclass(Subclass)):
        assert kd_loss(made, teacher, backend=any_backend).item() == wanted.item()
    parameter = torch.nn.Parameter(student)
    kd_loss(parameter, teacher.as_subclass(Subclass), backend=any_backend).backward()
    assert parameter.grad is not None and parameter.grad.any()


def _nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (lambda x: x.to_sparse(), "must be dense, got a tensor of layout torch.sparse_coo"),
    "nested": (_nested, "must be dense, got a nested tensor"),
    "strided nested": (lambda x: torch.nested.as_nested_tensor(list(x)), "got a nested tensor"),
    "fake": (lambda x: FakeTensorMode().from_tensor(x), "must have values, got a FakeTensor"),
    "meta": (lambda x: x.to("meta"), "meta"),
}
# Arguments that messages name differently from every_loss.
SHOWN = {
    "student": r"student(_logits|_hidden)?|logits\[0\]|teacher must be on meta",
    "teacher": r"(teacher\.)?teachers\[0\]|logits\[1\]|(the )?teacher",
    "ids": r"(teacher\.)?(teachers\[.\]\.)?ids|logprobs must be on meta",
    "logprobs": r"(teacher\.)?(teachers\[.\]\.)?logprobs",
    "tail_logprob": r"(teacher\.)?(teachers\[.\]\.)?tail_logprob", "teacher_hidden": ".*hidden",
    "teacher_weight": ".*weight", "teacher_bias": ".*bias", "index": r"(teacher\.)?index",
    **{f"other_{name}": rf"(teacher\.teachers\[1\]\.)?{name}|logprobs must be on meta"
       for name in ("ids", "logprobs", "tail_logprob")},
    "lm_head": "weight",
}  # fmt: skip
OF_KERNELS = [name for name in LOSSES if name.startswith(("kd_loss", "fused", "mutual", "rkd"))]
OF_KERNELS += [name for name in LOSSES if name.split(",")[0].endswith("_kd_loss")]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", dict.fromkeys(OF_KERNELS))
def test_tensors_that_a_kernel_cannot_read_are_refused_by_name(loss: str, kind: str) -> None:
    case, (make, message) = LOSSES[loss], KINDS[kind]
    inputs = case.tensors(torch.float32)
    for name, value in inputs.items():
        if name == "gate" or (value.dim() < 2 and "nested" in kind):
            continue
        shown = SHOWN.get(name, name)
        of_backend = {"backend": "cpu"} if case.with_backend else {}
        with pytest.raises((TypeError, ValueError)) as caught:
            case.loss(inputs | {name: make(value)}, **of_backend)
        message_raised = str(caught.value)
        assert re.match(f"({shown})[ ,;]", message_raised) and (
            "must be" in message_raised or message in message_raised
        ), message_raised


def test_transforms_of_torch_func_are_refused(any_backend: str) -> None:
    student, teacher = torch.randn(3, 9), torch.randn(3, 9)

    def loss(x: Tensor) -> Tensor:
        return kd_loss(x, teacher, backend=any_backend)

    def weighted(weight: Tensor) -> Tensor:
        return kd_loss(student, teacher, weight=weight, backend=any_backend)

    for transformed, argument, name in (
        (torch.func.grad(loss), student, "student_logits"),
        (torch.func.vmap(loss), student.expand(2, 3, 9), "student_logits"),
        (lambda x: torch.func.jvp(loss, (x,), (x,)), student, "student_logits"),
        (torch.func.vmap(weighted), torch.ones(2, 3), "weight"),
    ):
        with pytest.raises(RuntimeError, match=f"{name} is being transformed by torch.func"):
            transformed(argument)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(student, torch.ones_like(student))
        for call in (loss, lambda x: online.mutual_loss([x, teacher], backend=any_backend)):
            with pytest.raises(RuntimeError, match="by forward-mode differentiation"):
                call(dual)
    loss(student)


# ---- padding

# The mask of every_loss drops [1, 1], and the label drops [0, 0] if the loss has labels.
DROPPED = (1, 1)


@pytest.mark.parametrize("hole", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("loss", [name for name, case in LOSSES.items() if masked(case)])
def test_dropped_rows_may_contain_anything(loss: str, hole: float) -> None:
    """Dropped rows have value 0 and gradient 0, whatever the arguments and the upstream gradient contain."""
    case = LOSSES[loss]
    inputs = case.tensors(torch.float32)
    if hole == float("inf"):
        inputs.pop("weight", None)  # an infinite weight does not drop its own row
        case = case._replace(loss=without_weight(case.loss))
    wanted = run(case, changed(case, inputs, "none", torch.clone), "auto")
    spoiled = {name: value.clone() for name, value in inputs.items()}
    for value in spoiled.values():
        if value.is_floating_point() and value.shape[:2] == (2, 3):
            value[DROPPED] = hole
    spoiled |= {name: leaf_like(spoiled[name]) for name in case.trained}
    upstream = upstream_of(wanted[0])
    if upstream.dim() == 2:
        upstream[DROPPED] = hole
        assert wanted[0][DROPPED] == 0
    actual = run(case, spoiled, "auto", upstream)
    for value, expected_value in zip(actual, wanted, strict=True):
        assert torch.equal(value, expected_value)
    for name, gradient in zip(case.trained, actual[1:], strict=True):
        if spoiled[name].shape[:2] == (2, 3):
            assert not gradient[DROPPED].any()


def test_estimates_over_padding() -> None:
    """Multiplying by the mask would give NaN, because 0 times infinity is NaN."""
    student = torch.tensor([[-1.0, -2.0, -float("inf")], [-0.5, float("nan"), 3.0]])
    teacher = torch.tensor([[-1.5, -2.5, -float("inf")], [-1.0, -1.0, -float("inf")]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for estimator in (fastkd.sampled.k1, fastkd.sampled.k2, fastkd.sampled.k3):
        assert (estimator(student, teacher) * mask).isnan().any()
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            trained = student.to(dtype).requires_grad_()
            actual = estimator(trained, teacher.to(dtype), mask=mask)
            kept = estimator(student.to(dtype)[mask], teacher.to(dtype)[mask])
            assert torch.equal(actual[mask], kept) and not actual[~mask].any()
            (gradient,) = torch.autograd.grad(actual.sum(), trained)
            assert gradient.isfinite().all() and not gradient[~mask].any()
        for wrong, message in (
            (mask.float(), "mask must be torch.bool, got torch.float32"),
            (mask[0], "mask must have the shape of student_logprobs"),
            (True, "mask must be a tensor, got bool"),
            (mask.to("meta"), "mask must be on cpu, where student_logprobs is; got meta"),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                estimator(student, teacher, wrong)  # type: ignore[arg-type]


# ---- tensors that were made in inference mode


def made_in_inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def constants(case: Case, given: Tensors) -> list[str]:
    return [name for name in given if name not in case.trained]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("loss", LOSSES)
def test_tensors_made_in_inference_mode(loss: str, dtype: torch.dtype) -> None:
    case = LOSSES[loss]
    backend = "reference" if dtype == torch.float64 else "auto"
    for trained in {case.trained, case.trained[:1]}:
        case = case._replace(trained=trained)
        inputs = case.tensors(dtype)
        wanted = run(case, changed(case, inputs, "none", torch.clone), backend)
        for name in [*constants(case, inputs), "upstream", "all"]:
            made = {
                key: made_in_inference(x) if key in (name, *[key] * (name == "all")) else x.clone()
                for key, x in inputs.items()
            }
            made |= {key: leaf(inputs[key]) for key in trained}
            upstream = upstream_of(wanted[0])
            if name in ("upstream", "all"):
                upstream = made_in_inference(upstream)
            assert_same(run(case, made, backend, upstream), wanted, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "loss", ["kd_loss", "kd_loss, TopK", "fused_linear_kd_loss", "hint_loss", "k2"]
)
def test_tensors_made_in_inference_mode_in_a_compiled_graph(loss: str, dtype: torch.dtype) -> None:
    case = LOSSES[loss]
    inputs = case.tensors(dtype)
    wanted = run(case, changed(case, inputs, "none", torch.clone), "auto")
    made = {key: made_in_inference(x) for key, x in inputs.items()}
    made |= {key: leaf(inputs[key]) for key in case.trained}
    torch._dynamo.reset()
    compiled = case._replace(
        loss=torch.compile(case.loss, backend="aot_eager", fullgraph=loss != "kd_loss, TopK")
    )
    for value, expected_value in zip(run(compiled, made, "auto"), wanted, strict=True):
        torch.testing.assert_close(value, expected_value)


def test_a_change_between_forward_and_backward_raises_or_has_no_effect() -> None:
    """A tensor with a version raises; one of inference mode has none, so the backward has a copy of its own."""
    student, teacher = torch.randn(2, 9).half(), torch.randn(2, 9).half()
    trained = leaf(student)
    (wanted,) = torch.autograd.grad(kd_loss(trained, teacher), trained)
    constant = made_in_inference(teacher)
    loss = kd_loss(trained, constant)
    with torch.inference_mode():
        constant.zero_()
    assert torch.equal(torch.autograd.grad(loss, trained)[0], wanted)
    loss = kd_loss(trained, teacher)
    teacher.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_made_in_inference_mode_gives_the_value(loss: str) -> None:
    case = LOSSES[loss]
    inputs = case.tensors(torch.float32)
    wanted = case.loss(inputs)
    made = {name: made_in_inference(value) for name, value in inputs.items()}
    actual = case.loss(made)
    assert torch.equal(actual, wanted) and not actual.requires_grad
    with torch.inference_mode():
        assert torch.equal(case.loss(inputs), wanted)


def test_inference_mode_in_place_and_in_parts(any_backend: str) -> None:
    student, teacher = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    wanted, parts = kd_loss(student, teacher, return_parts=True, backend=any_backend)
    made = [made_in_inference(x) for x in (student, teacher)]
    actual = kd_loss(*made, inplace=True, return_parts=True, backend=any_backend)
    assert torch.equal(actual[0], wanted)
    assert all(torch.equal(a, b) for a, b in zip(actual[1], parts, strict=True))
    trained = leaf(student)
    kd_loss(trained * 1.0, made[1], inplace=True, backend=any_backend).backward()
    other = leaf(student)
    kd_loss(other, teacher, backend=any_backend).backward()
    assert torch.equal(trained.grad, other.grad)


def test_calibration_of_logits_made_in_inference_mode() -> None:
    logits, labels = torch.randn(40, 9) * 3, torch.randint(9, (40,))
    mask = torch.rand(40) < 0.8
    made = [made_in_inference(x) for x in (logits, labels, mask)]
    for function in (calibration.expected_calibration_error, calibration.fit_temperature):
        assert function(*made[:2], mask=made[2]) == function(logits, labels, mask=mask)


class Decoder(torch.nn.Module):
    """Logits of a table, in inference mode where asked."""

    def __init__(self, infers: bool) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(9, 9)
        self.infers = infers

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        with torch.inference_mode(self.infers):
            logits = self.table(input_ids)
        return type("Output", (), {"logits": logits})()

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        with torch.inference_mode():
            return torch.cat([input_ids, input_ids.flip(-1)], -1)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_gkd_step_with_a_batch_and_a_teacher_in_inference_mode(fraction: float) -> None:
    ids = torch.randint(1, 9, (2, 5))
    labels = ids.clone()
    labels[:, :2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    torch.manual_seed(0)
    student, teachers = Decoder(False), [Decoder(False), Decoder(True)]
    teachers[1].load_state_dict(teachers[0].state_dict())
    results = []
    for teacher, change in zip(teachers, (torch.clone, made_in_inference), strict=True):
        inputs = {name: change(value) for name, value in batch.items()}
        step = sequences.gkd_step(
            student, teacher, inputs, pad_token_id=0, on_policy_fraction=fraction
        )
        results += [step.loss, *torch.autograd.grad(step.loss, list(student.parameters()))]
    torch.testing.assert_close(
        results[2:], results[:2]
    )  # an embedding's gradient is summed in no fixed order


def test_the_default_device_is_not_that_of_the_outputs(any_backend: str) -> None:
    student, teacher = torch.randn(2, 3, 9)
    expected = kd_loss(student, teacher, backend=any_backend)
    leaf = student.clone().requires_grad_()
    with torch.device("meta"):
        loss = kd_loss(leaf, teacher, backend=any_backend)
        (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.device == student.device
    assert torch.equal(loss.detach(), expected)
