"""What kernels/launcher.py launches, beside what Triton itself would launch. Nothing is compiled.

Each check is a function without arguments that raises. They need a process without Triton's interpreter;
tests/backends/triton/test_triton_launcher.py starts it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from fastkd.kernels.kernel import View
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fastkd
from fastkd import TopK
from fastkd.backends import sparse
from fastkd.backends.logprobs import Tempering
from fastkd.call import mutual as mutual_call
from fastkd.call.contract import Options, Result, Rows, Want
from fastkd.call.draft import Terms
from fastkd.engine.backend import with_measures
from fastkd.kernels import backend, draft, launcher, logprobs, measures, mutual, split
from fastkd.kernels import launch as kernels
from fastkd.kernels import sparse as sparse_kernels
from support.triton_aot import launch_nothing

COUNT, V = 6, 48
KERNELS = (
    kernels.kd_kernel,
    kernels.scale_kernel,
    measures.merge_kernel,
    draft.draft_kernel,
    logprobs.logprob_statistics_kernel,
    logprobs.logprob_gradient_kernel,
    mutual.mutual_kernel,
    sparse_kernels.mark_kernel,
    sparse_kernels.gather_kernel,
    sparse_kernels.spread_kernel,
)
Launches = list[tuple[Any, ...]]


class Fake(CompiledKernel):
    """Takes the place of a compiled kernel; a launch only records its arguments."""

    def __init__(self, key: Any, launches: Launches, backend: str) -> None:
        self.key, self.launches = key, launches
        self.module = None  # for __del__
        self.metadata = SimpleNamespace(target=SimpleNamespace(backend=backend))
        self.function, self.packed_metadata = 1, ()

    @property
    def run(self) -> Callable[..., None]:
        return lambda *launch: self.launches.append((self.key, launch[:4], launch[7:9], launch[9:]))

    def launch_metadata(self, *_: Any) -> None:
        return None


@contextmanager
def without_compiler(backend: str = "cuda") -> Iterator[Launches]:
    """Make Triton choose kernels as ever, without compiling them; yields (key, grid and stream, hooks, arguments)."""
    launch_nothing()
    launches: Launches = []

    def compiled(self: JITFunction, key: Any, signature: Any, device: int, *_: Any) -> Fake:
        cache = self.device_caches[device][0]
        cache[key] = Fake((id(self), device, key), launches, backend)
        return cache[key]

    with mock.patch.object(JITFunction, "_do_compile", compiled):
        for kernel in KERNELS:
            kernel.device_caches.clear()
        launcher.forget()
        yield launches


@contextmanager
def by_triton() -> Iterator[None]:
    """Every launch takes Triton's own path."""
    with mock.patch.object(launcher, "state", lambda kernel: None):
        yield


def named(value: Any, names: dict[int, str]) -> Any:
    """The arguments, with the name of each tensor in place of the tensor or its address; scratch memory is numbered."""
    if isinstance(value, tuple):
        return tuple(named(part, names) for part in value)
    where = value.data_ptr() if isinstance(value, Tensor) else value
    if type(where) is not int or where < 1 << 20:
        return value
    return names.setdefault(where, f"scratch {len(names)}")


def placed(shape: tuple[int, ...], dtype: torch.dtype, unaligned: bool) -> Tensor:
    """Memory that starts at a multiple of 16 bytes, or one element behind it."""
    size = torch.Size(shape).numel()
    return torch.ones(size + 1, dtype=dtype)[int(unaligned) :][:size].view(shape)


Case = dict[str, Any]
PLAIN: Case = {
    "rows": COUNT,
    "dtype": torch.float32,
    "teacher_dtype": torch.float32,
    "unaligned": (),
    "given": (),
    "options": {},
    "want": Want(True),
    "padding": 0,
}
# How programs share these numbers of rows; other rows have a program each.
PLANS = {7: split.Plan(3, 7), 8: split.Plan(3, 4), 9: split.Plan(2, 9)}
# Each differs from PLAIN in one fact that some launch depends on. One row and 16: Triton specializes on both numbers.
CHANGES: list[Case] = [
    {},
    {"rows": 1},
    {"rows": 16},
    {"dtype": torch.bfloat16},
    {"teacher_dtype": torch.float16},
    {"unaligned": ("student",)},
    {"unaligned": ("teacher",)},
    {"given": ("labels",), "options": {"alpha": 0.5}},
    {"given": ("labels",), "options": {"alpha": 0.5}, "unaligned": ("labels",)},
    {"given": ("weight",)},
    {"given": ("temperature",)},
    {"given": ("teacher_temperature",)},
    {"given": ("scale",)},
    {"given": ("labels",), "options": {"alpha": 0.0}},
    {"options": {"temperature": 2.0, "teacher_temperature": 2.0}},
    {"options": {"temperature": 3.0, "teacher_temperature": 2.0}},
    {"options": {"scale_by_temperature": False}},
    {"options": {"softcap": 3.0}},
    {"options": {"divergence": fastkd.reverse_kl()}},
    {"options": {"divergence": fastkd.jsd(0.5)}},
    {"options": {"divergence": fastkd.jsd(0.25)}},
    {"options": {"scale": 0.25}},
    {"options": {"vocab_size": V - 1}},
    {"want": Want(False)},
    {"want": Want(True, True)},
    {"want": Want(True, parts=True)},
    {"want": Want(True, inplace=True)},
    {"want": Want(True, measures=True)},
    {"padding": 1},
    {"padding": 16},
    {"rows": 7},
    {"rows": 8},
    {"rows": 8, "want": Want(measures=True)},
    {"rows": 9, "options": {"divergence": fastkd.jsd(0.5)}},
]  # fmt: skip


def call_of(case: Case) -> tuple[Callable[[], Result], dict[int, str]]:
    """(a call of kd_rows, the names of its inputs by their addresses)."""
    case = PLAIN | case
    count = case["rows"]

    def tensor(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        return placed(shape, dtype, name in case["unaligned"])

    width = V + case["padding"]
    student = tensor("student", case["dtype"], count, width)[:, :V]
    teacher = tensor("teacher", case["teacher_dtype"], count, width)[:, :V]
    given = {
        name: tensor(
            name,
            torch.int64 if name == "labels" else torch.float32,
            *(() if name == "scale" else (count,)),
        )
        for name in case["given"]
    }
    options = Options(**({"divergence": fastkd.forward_kl(), "vocab_size": V} | case["options"]))
    names = {student.data_ptr(): "student", teacher.data_ptr(): "teacher"}
    names |= {value.data_ptr(): name for name, value in given.items()}

    def call() -> Result:
        with mock.patch.object(kernels, "plan", lambda rows, *_: PLANS.get(rows)):
            return kernels.kd_rows(student, teacher, Rows(**given), options, case["want"])

    return call, names


def launched(call: Callable[[], Any], names: dict[int, str], launches: Launches) -> list[str]:
    """What a call launches, with names for its tensors: (kernel, grid and stream, arguments)."""
    launches.clear()
    result = call()
    names = dict(names)
    for name, value in zip(result._fields, result, strict=True):
        if value is not None:
            names.setdefault(value.data_ptr(), name)
    return [repr((key, grid, named(arguments, names))) for key, grid, _, arguments in launches]


def check_calls_in_any_order() -> None:
    """After any other call, and a second time, a call launches what Triton would: kernel, grid and arguments."""
    with without_compiler() as launches:
        for first, second in itertools.permutations(range(len(CHANGES)), 2):
            launcher.forget()
            call_of(CHANGES[first])[0]()
            for _ in range(2):
                call, names = call_of(CHANGES[second])
                with by_triton():
                    wanted = launched(call, names, launches)
                actual = launched(call, names, launches)
                assert wanted and actual == wanted, (CHANGES[first], CHANGES[second])


def check_replays() -> None:
    """A second call with equal facts builds no arguments, except where tensors occur twice or are copied."""
    with without_compiler() as launches:
        for case in CHANGES:
            prepared = mock.Mock(side_effect=kernels._prepare)
            with mock.patch.object(kernels, "_prepare", prepared):
                for number in range(2):
                    call, names = call_of(case)
                    launched(call, names, launches)
                    assert prepared.call_count == 1, (case, number)
        prepared = mock.Mock(side_effect=kernels._prepare)
        unaligned = SimpleNamespace(
            empty=lambda size, dtype, device: placed(size, dtype, True), version=torch.version
        )
        with mock.patch.object(kernels, "_prepare", prepared):
            for torch_or_not in (torch, unaligned):  # partial results whose alignment is another
                with mock.patch.object(launcher, "torch", torch_or_not):
                    call_of({"rows": 7})[0]()
            assert prepared.call_count == 1
        options = Options(fastkd.forward_kl(), vocab_size=V)
        scattered = torch.ones(3, 3, 3, 3, V)[
            ::2, ::2, ::2, ::2
        ]  # its rows have a tensor of offsets
        for _ in range(2):
            launches.clear()
            kernels.kd_rows(scattered, scattered.clone(), Rows(), options, Want(True))
            (launch,) = launches
            assert isinstance(launch[3][0].logits.offsets, Tensor)
        launcher.forget()
        logits = torch.ones(COUNT, V)
        for teacher in (
            logits,
            torch.ones(COUNT, V),
        ):  # a replay would give the student for the teacher
            launches.clear()
            kernels.kd_rows(logits, teacher, Rows(), options, Want(True))
            ((_, _, _, arguments),) = launches
            pointers = [side[0][0] for side in arguments[:2]]
            addresses = [p.data_ptr() if isinstance(p, Tensor) else p for p in pointers]
            assert addresses == [logits.data_ptr(), teacher.data_ptr()]


def check_measures_take_no_launch() -> None:
    """A call with measures has one launch, or that of another loss besides if its own sweeps do not have them."""
    with without_compiler() as launches:
        for options, count in (
            ({}, 1),
            ({"alpha": 0.0}, 1),
            ({"divergence": fastkd.squared_error()}, 2),
        ):
            for want in (Want(True, parts=True, measures=True), Want(parts=True, measures=True)):
                resolved = Options(**({"divergence": fastkd.jsd(), "vocab_size": V} | options))
                triton = with_measures(backend, resolved)
                launches.clear()
                triton.kd_rows(torch.ones(COUNT, V), torch.ones(COUNT, V), Rows(), resolved, want)
                assert len(launches) == count, (options, want)


def check_rows_that_start_alike() -> None:
    """Rows that start equally far past 16 bytes have another kernel than rows that do not, whichever came first."""
    options = Options(fastkd.forward_kl(), vocab_size=V)

    def launched_at(*starts: int) -> str:
        student, teacher = (
            torch.ones(COUNT * V + 8)[at:][: COUNT * V].view(COUNT, V) for at in starts
        )
        names = {student.data_ptr(): "student", teacher.data_ptr(): "teacher"}
        want = Want(True, inplace=True)
        call = partial(kernels.kd_rows, student, teacher, Rows(), options, want)
        with by_triton():
            wanted = launched(call, names, launches)
        assert launched(call, names, launches) == wanted, starts
        return wanted[0]

    with without_compiler() as launches, mock.patch.object(kernels, "NARROW", 0):
        for first, second in (((1, 1), (1, 2)), ((1, 2), (1, 1)), ((1, 1), (2, 2))):
            launcher.forget()
            alike = launched_at(*first) == launched_at(*second)
            assert alike == (first == (1, 1) and second == (2, 2))


def check_other_kernels() -> None:
    """Every launcher launches, the first and the second time, what Triton would."""
    options = Options(fastkd.forward_kl(), vocab_size=V, tail="bucket", alpha=0.5)
    top = TopK.from_logits(torch.randn(COUNT, V), 4)
    labels = torch.zeros(COUNT, dtype=torch.int64)

    def sparse_rows(dtype: torch.dtype) -> None:
        student = placed((COUNT, V), dtype, False)
        rows = Rows(labels, ids=top.ids, tail_logprob=top.tail_logprob)
        sparse.SparseRows(sparse_kernels_and_rows).kd_rows(
            student, top.logprobs, rows, options, Want(True)
        )

    def mutual_rows(count: int) -> None:
        logits = [placed((COUNT, V), torch.float32, False) for _ in range(count)]
        mutual.mutual_rows(logits, Rows(labels), mutual_call.Options(), [True] * count, False)

    def draft_rows(*names: str, columns: Tensor | None = None) -> None:
        student, teacher = (placed((COUNT, V), torch.float32, False) for _ in range(2))
        terms = Terms(dict.fromkeys(names, 1.0), 3.0, columns, measured=False)
        draft.draft_rows(student, teacher, Rows(), options, terms, Want(True))

    def log_probabilities(unaligned: bool, tempering: Tempering) -> None:
        logits = placed((COUNT, V), torch.float32, unaligned)
        statistics = logprobs.logprob_statistics(logits, tempering, True)
        logprobs.logprob_gradients(logits, tempering, statistics[:, 0], statistics[:, 1:])

    def scale(unaligned: bool, shape: tuple[int, ...]) -> None:
        gradient = placed((COUNT, V), torch.bfloat16, unaligned)
        kernels.scale_rows_(gradient, torch.ones(shape))

    sparse_kernels_and_rows = SimpleNamespace(
        gather_events=sparse_kernels.gather_events,
        spread_gradient=sparse_kernels.spread_gradient,
        kd_rows=kernels.kd_rows,
        scale_rows_=kernels.scale_rows_,
        empty=kernels.empty,
    )
    calls: list[Callable[[], None]] = [
        lambda: sparse_rows(torch.float32),
        lambda: sparse_rows(torch.bfloat16),
        lambda: mutual_rows(2),
        lambda: mutual_rows(3),
        lambda: draft_rows("forward_kl"),
        lambda: draft_rows("tvd", "jsd"),
        lambda: draft_rows("tvd", columns=torch.arange(V)),
        lambda: log_probabilities(False, Tempering()),
        lambda: log_probabilities(True, Tempering()),
        lambda: log_probabilities(False, Tempering(0.5, 3.0, temperatures=torch.ones(COUNT))),
        lambda: scale(False, ()),
        lambda: scale(True, ()),
        lambda: scale(False, (COUNT,)),
    ]
    with without_compiler() as launches:
        twin = JITFunction(kernels.scale_kernel.fn, do_not_specialize=["sizes"])
        view = View(torch.ones(1, V), (0, 0, V), None)
        scale_kernel, keys = kernels.scale_kernel, []
        for kernel, block, warps in (
            (scale_kernel, 64, 4), (twin, 64, 4), (scale_kernel, 128, 4), (scale_kernel, 64, 8),
        ):  # fmt: skip
            arguments = (view, V, torch.ones(()), 0, (1, 1), block)
            launcher.launch(kernel, (1, 1, 1), arguments, num_warps=warps)
            keys.append(launches.pop()[0])
        assert len(set(keys)) == 4
        for call in (*calls, *calls):
            launches.clear()
            with by_triton():
                call()
            wanted = [launch[:2] for launch in launches]
            launches.clear()
            call()
            assert wanted and [launch[:2] for launch in launches] == wanted


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def check_settings() -> None:
    """Hooks see the launches of a call that has been launched before, and settings of Triton choose its kernel."""
    call, _ = call_of({})
    hook = mock.Mock()
    with without_compiler() as launches:

        def key() -> Any:
            launches.clear()
            call()
            (launch,) = launches
            return launch[0]

        usual = key()
        assert key() == usual and launches[0][2] == (None, None)
        for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
            chain.add(hook)
            assert key() == usual and any(getattr(h, "calls", None) for h in launches[0][2])
            chain.remove(hook)
        with changed(knobs.runtime, "launch_enter_hook", hook):
            assert key() == usual and launches[0][2][0] is hook
        with changed(knobs.runtime, "debug", True):
            assert key() != usual
        with changed(knobs.compilation, "instrumentation_mode", "proton"):
            assert key() != usual
        if hasattr(knobs.compilation, "fpsan_homomorphic_casts"):
            with mock.patch.dict("os.environ", TRITON_FPSAN_HOMOMORPHIC_CASTS="1"):
                assert key() != usual
        with changed(knobs.runtime, "add_stages_inspection_hook", lambda: ("stage", "stage")):
            key()
            assert all(isinstance(side[0][0], Tensor) for side in launches[0][3][:2])
        kernels.kd_kernel.add_pre_run_hook(hook)
        key()
        kernels.kd_kernel.pre_run_hooks.clear()
        assert hook.call_count == 1
        with mock.patch.object(kernels.kd_kernel, "run", hook):
            call()
        with mock.patch.object(JITFunction, "run", hook):  # as the machine of support/ptx does
            call()
        assert hook.call_count == 3
        assert key() == usual


def check_devices() -> None:
    """A kernel is launched on the device and the stream that are current."""
    call, _ = call_of({})
    with without_compiler() as launches:
        for device, stream in ((0, 7), (1, 8), (0, 9), (1, 7)):
            driver.active.get_current_device = lambda device=device: device
            driver.active.get_current_stream = lambda device, stream=stream: 10 * stream + device
            launches.clear()
            call()
            (launch,) = launches
            assert launch[0][1] == device and launch[1] == (COUNT, 1, 1, 10 * stream + device)


def check_amd() -> None:
    """Kernels for other GPUs than NVIDIA's are launched by Triton."""
    with without_compiler("hip") as launches:
        for _ in range(2):
            launches.clear()
            call_of({})[0]()
            assert isinstance(launches[0][3][0][0][0], Tensor)


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in globals().copy().items()
    if name.startswith("check_")
}
