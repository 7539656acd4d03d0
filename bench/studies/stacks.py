"""On-policy distillation: fastkd beside the losses that training stacks run, in parity, time, memory and error.

    python bench/studies/stacks.py

Each case is a function of another package. Where that package is not installed, a formula of ours stands in for it, and
its name begins with "formula of". Both compute the same value, and the gradients of the same leaves, with the same
operands. A step is forward and backward.

- Parity: the study fails unless value and gradients agree with float64 on the same operands within a tolerance for the
  dtype, for the other function as for fastkd. It compares a few rows of a small vocabulary.
- Times: contenders take turns in random order; the ratio is the median of the ratios within rounds.
- Memory: the peak of a step beyond its inputs, gradients included, in the process that has timed it.
- Error: of the gradients against float64, relative by norm, on the same few rows.

TRL and Liger take part if they are installed (`pip install 'fastkd[peers]'`); verl, VeOmni and speculators if their
unpacked wheels are on PYTHONPATH with what these import.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import study
import torch
import torch.nn.functional as F
from cases import DTYPES, TIMED
from measure import MIB, Contender, interleave, milliseconds, peak_extra, ratio
from study import emit, progress
from tables import Table
from torch import Tensor

import fastkd
from fastkd import TopK
from fastkd.response import draft_loss

WIDTH, K = 576, 64
# N x V: the head of SmolLM2, and that of Qwen3.
SHAPES = ((512, 49_152), (128, 151_936))
FEW = (24, 2048)
# The largest relative error of value and gradients, by norm. Some stacks compute a loss of bfloat16 logits in bfloat16.
TOLERANCE = {
    "fastkd": {"float32": 1e-5, "bfloat16": 5e-3},
    "stack": {"float32": 1e-4, "bfloat16": 1e-1},
}
COLUMNS = (
    "function", "N x V", "operands", "their ms", "fastkd's", "times as fast",
    "their MiB", "fastkd's", "share", "error: theirs", "fastkd's",
)  # fmt: skip


class Operands(NamedTuple):
    """What a step takes; leaves have gradients."""

    leaves: tuple[Tensor, ...]  # (hidden states [N, H], head [V, H]), or (student logits [N, V],)
    teacher: Tensor | None  # [N, V], logits
    ids: Tensor  # [N, K], the teacher's most probable tokens
    logprobs: Tensor  # [N, K], float32
    targets: Tensor  # [N]
    upstream: Tensor  # [2, N]


class Case(NamedTuple):
    """A function of a stack, and the calls that compute its value from hidden states or from logits."""

    name: str
    linear: bool
    teacher: bool  # whether the teacher is dense logits
    stack: Callable[[], Callable[[Operands], Tensor]]  # imports the package
    formula: Callable[[Operands], Tensor]  # in float64, or in place of a package that is missing
    fastkd: Callable[[Operands], Tensor]
    rounded: bool = False  # whether fastkd's logits have the operands' dtype, so that its errors may be a stack's


def operands(case: Case, shape: tuple[int, int], dtype: torch.dtype) -> Operands:
    """Random operands of the case. Teacher and student are close, as after some training."""
    rows, vocabulary = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=generator).mul_(scale)

    logits = normal(rows, vocabulary, scale=2.0)
    values, ids = logits.topk(K)
    logprobs = values - logits.logsumexp(-1, keepdim=True)
    if case.linear:
        leaves = (
            normal(rows, WIDTH).to(dtype),
            normal(vocabulary, WIDTH, scale=2 / WIDTH**0.5).to(dtype),
        )
    else:
        leaves = ((logits + normal(rows, vocabulary, scale=0.5)).to(dtype),)
    return Operands(
        tuple(leaf.requires_grad_() for leaf in leaves),
        logits.to(dtype) if case.teacher else None,
        ids,
        logprobs,
        torch.randint(vocabulary, (rows,), generator=generator),
        normal(2, rows),
    )


def logits_of(given: Operands) -> Tensor:
    """The student's logits, in float32 if the operands have lower precision."""
    logits = given.leaves[0] if len(given.leaves) == 1 else given.leaves[0] @ given.leaves[1].T
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# ---- formulas, in our words


def of_verl(given: Operands) -> Tensor:
    log_p = given.logprobs
    log_q = logits_of(given).log_softmax(-1).gather(-1, given.ids)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def with_tail(log_x: Tensor) -> Tensor:
    rest = -torch.expm1(log_x.logsumexp(-1, keepdim=True))
    return torch.cat([log_x, rest.clamp_min(1e-30).log()], -1)


def of_async(given: Operands) -> Tensor:
    log_q = logits_of(given).log_softmax(-1).gather(-1, given.ids)
    log_p, log_q = with_tail(given.logprobs.to(log_q.dtype)), with_tail(log_q)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def of_sdpo(given: Operands, tail: bool) -> Tensor:
    assert given.teacher is not None
    z = logits_of(given)
    # Of equal logits, student_topk takes the lower id first.
    exact = z.dtype == torch.float64
    ids = (
        z.sort(dim=-1, descending=True, stable=True).indices[:, :K] if exact else z.topk(K).indices
    )
    values = z.gather(-1, ids)
    teacher = given.teacher.to(z.dtype)
    log_q = values - z.logsumexp(-1, keepdim=True)
    log_p = teacher.gather(-1, ids) - teacher.logsumexp(-1, keepdim=True)
    if tail:
        log_q, log_p = with_tail(log_q), with_tail(log_p)
    else:
        log_q, log_p = (x - x.logsumexp(-1, keepdim=True) for x in (log_q, log_p))
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def of_speculators(given: Operands) -> Tensor:
    """0.1 cross-entropy + 0.9 total variation, each from its own softmax."""
    assert given.teacher is not None
    z = logits_of(given)
    teacher = given.teacher.to(z.dtype)
    overlap = torch.minimum(z.softmax(-1), teacher.softmax(-1)).sum(-1)
    return (
        0.1 * F.cross_entropy(z, teacher.argmax(-1), reduction="none") + 0.9 * (1 - overlap)
    ).mean()


def of_logprobs(given: Operands) -> Tensor:
    log_q = logits_of(given).log_softmax(-1)
    target = log_q.gather(-1, given.targets.unsqueeze(-1)).squeeze(-1)
    return weighted(given, target, -(log_q.exp() * log_q).sum(-1))


def weighted(given: Operands, target: Tensor, entropy: Tensor) -> Tensor:
    """A loss whose gradient takes both outputs."""
    return (target * given.upstream[0] + entropy * given.upstream[1]).sum()


# ---- the stacks


def verl(chunked: bool) -> Callable[[Operands], Tensor]:
    from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk

    loss = SimpleNamespace(
        log_prob_min_clamp=None, use_chunked_topk=chunked, chunked_topk_chunk_size=4096
    )

    def run(given: Operands) -> Tensor:
        # As verl's engine calls it: hidden states give the logits in the operands' dtype.
        logits = given.leaves[0] if len(given.leaves) == 1 else given.leaves[0] @ given.leaves[1].T
        nested = (
            torch.nested.nested_tensor([x], layout=torch.jagged)
            for x in (given.logprobs, given.ids)
        )
        outputs = compute_forward_kl_topk(
            logits.unsqueeze(0), *nested, SimpleNamespace(distillation_loss=loss), "thd"
        )
        return outputs["distillation_losses"].mean()

    return run


def trl_async() -> Callable[[Operands], Tensor]:
    from trl.experimental.async_distillation import async_distillation_trainer as trainer

    def run(given: Operands) -> Tensor:
        total, *_ = trainer._chunked_jsd_loss(
            *given.leaves, None, 1.0, None, given.ids, given.logprobs,
            torch.ones_like(given.ids, dtype=torch.bool), 0.0, 1.0, True, None, 1,
            trainer._CHUNKED_LM_HEAD_CHUNK_SIZE,
        )  # fmt: skip
        return total / len(given.ids)

    return run


def sdpo(tail: bool) -> Callable[[Operands], Tensor]:
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    def run(given: Operands) -> Tensor:
        losses = compute_topk_self_distillation_loss(
            given.leaves[0], given.teacher, distillation_topk=K, distillation_alpha=1.0,
            distillation_add_tail=tail,
        )  # fmt: skip
        return losses.mean()

    return run


def unpacked(package: str, module: str, parents: Sequence[str]) -> Any:
    """A module of a wheel on the path, without the code of its parent packages, which import servers and models."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"No module named {package!r}")
    root = Path(next(iter(spec.submodule_search_locations)))
    for name in (package, *parents):
        parent = types.ModuleType(name)
        parent.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = parent
    return importlib.import_module(module)


def speculators() -> Callable[[Operands], Tensor]:
    utils = unpacked("speculators", "speculators.losses.utils", ["speculators.losses"])
    config = utils.resolve_loss_config('{"ce": 0.1, "tv": 0.9}', implementation="eager")

    def run(given: Operands) -> Tensor:
        assert given.teacher is not None
        rows = len(given.teacher)
        ones, zeros = torch.ones(1, rows), torch.zeros(1, rows, dtype=torch.long)
        pair = (given.leaves[0].unsqueeze(0), given.teacher.unsqueeze(0))
        return utils.compound_loss(*pair, ones, zeros, config)[0]

    return run


def veomni() -> Callable[[Operands], Tensor]:
    kernels = "veomni.ops.kernels"
    parents = ["veomni.ops", kernels, f"{kernels}.cross_entropy", "veomni.distributed"]
    # The only thing that the kernel asks of the package is whether sequences are sharded.
    state: Any = types.ModuleType("veomni.distributed.parallel_state")
    state.get_parallel_state = lambda: SimpleNamespace(sp_enabled=False)
    sys.modules[state.__name__] = state
    module = unpacked("veomni", f"{kernels}.cross_entropy.chunk_topk_distill", parents)

    def run(given: Operands) -> Tensor:
        outputs = module.chunk_topk_distill_function(
            *given.leaves, given.targets, given.ids, given.logprobs, shift_labels=given.targets
        )
        return outputs[2].mean()

    return run


def trl_logprobs() -> Callable[[Operands], Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def run(given: Operands) -> Tensor:
        target, entropy, *_ = ChunkedLogProbFunction.apply(
            *given.leaves, None, given.targets, 1.0, 32_768, None, 1.0, ("entropy",)
        )
        return weighted(given, target, entropy)

    return run


def liger_logprobs() -> Callable[[Operands], Tensor]:
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as ops

    def run(given: Operands) -> Tensor:
        loss, entropy = ops.LigerFusedLinearScaledCrossEntropyFunction.apply(
            *given.leaves, given.targets, 1.0, -100, 1, True
        )
        return weighted(given, -loss, entropy)

    return run


# ---- fastkd


def fastkd_topk(tail: str) -> Callable[[Operands], Tensor]:
    def run(given: Operands) -> Tensor:
        teacher = TopK(given.ids, given.logprobs, tail=tail)
        loss: Any = fastkd.kd_loss if len(given.leaves) == 1 else fastkd.fused_linear_kd_loss
        result: Tensor = loss(*given.leaves, teacher, divergence="forward_kl")
        return result

    return run


def fastkd_rounded(given: Operands) -> Tensor:
    """With logits in the dtype of the operands, as verl has them."""
    teacher = TopK(given.ids, given.logprobs, tail="truncate")
    result: Tensor = fastkd.fused_linear_kd_loss(
        *given.leaves, teacher, divergence="forward_kl", logits_dtype=given.leaves[0].dtype
    )
    return result


def log_sums(logits: Tensor, rows: int = 16) -> Tensor:
    """The float32 log-sum-exp [N, 1] of a teacher's logits, a few rows at a time."""
    return torch.cat([x.float().logsumexp(-1, keepdim=True) for x in logits.split(rows)])


def fastkd_sdpo(tail: str) -> Callable[[Operands], Tensor]:
    def run(given: Operands) -> Tensor:
        assert given.teacher is not None
        (student,) = given.leaves
        ids = fastkd.student_topk(student, k=K).ids
        log_p = given.teacher.gather(-1, ids).float()
        if tail == "bucket":  # which needs the mass of all other tokens
            log_p -= log_sums(given.teacher)
        return fastkd.kd_loss(student, TopK(ids, log_p, tail=tail), divergence="reverse_kl")

    return run


def fastkd_draft(given: Operands) -> Tensor:
    assert given.teacher is not None
    return draft_loss(given.leaves[0], given.teacher, {"cross_entropy": 0.1, "tvd": 0.9})


def fastkd_logprobs(given: Operands) -> Tensor:
    outputs = fastkd.fused_linear_logprobs(*given.leaves, given.targets)
    assert outputs.target is not None and outputs.entropy is not None
    return weighted(given, outputs.target, outputs.entropy)


CASES = (
    Case(
        "verl compute_forward_kl_topk",
        False,
        False,
        partial(verl, False),
        of_verl,
        fastkd_topk("truncate"),
    ),
    Case(
        "verl compute_forward_kl_topk, chunked",
        False,
        False,
        partial(verl, True),
        of_verl,
        fastkd_topk("truncate"),
    ),
    Case(
        "verl compute_forward_kl_topk, with the head",
        True,
        False,
        partial(verl, False),
        of_verl,
        fastkd_topk("truncate"),
    ),
    Case(
        "verl compute_forward_kl_topk, with the head, logits_dtype=",
        True,
        False,
        partial(verl, False),
        of_verl,
        fastkd_rounded,
        rounded=True,
    ),
    Case(
        "VeOmni chunk_topk_distill_function", True, False, veomni, of_verl, fastkd_topk("truncate")
    ),
    Case("TRL async _chunked_jsd_loss", True, False, trl_async, of_async, fastkd_topk("bucket")),
    Case(
        "TRL SDPO top-k, tail",
        False,
        True,
        partial(sdpo, True),
        partial(of_sdpo, tail=True),
        fastkd_sdpo("bucket"),
    ),
    Case(
        "TRL SDPO top-k, renormalized",
        False,
        True,
        partial(sdpo, False),
        partial(of_sdpo, tail=False),
        fastkd_sdpo("renormalize"),
    ),
    Case("speculators compound_loss", False, True, speculators, of_speculators, fastkd_draft),
    Case("TRL ChunkedLogProbFunction", True, False, trl_logprobs, of_logprobs, fastkd_logprobs),
    Case("Liger scaled cross-entropy", True, False, liger_logprobs, of_logprobs, fastkd_logprobs),
)


def contender(case: Case, name: str) -> Callable[[Operands], Tensor]:
    """The call of a contender; the formula if the package is missing."""
    if name == "fastkd":
        return case.fastkd
    try:
        return case.stack()
    except ImportError as error:
        progress(case.name, f"{error}; the formula takes its place")
        return case.formula


def step(call: Callable[[Operands], Tensor], given: Operands) -> Contender:
    """Forward and backward."""

    def drop_gradients() -> None:
        for leaf in given.leaves:
            leaf.grad = None

    return Contender(lambda: call(given).backward(), drop_gradients)


def peak_of(contender: Contender) -> int:
    """The peak bytes of a step beyond its inputs."""
    run, clean_up = contender
    peak = peak_extra(run)
    clean_up()
    return peak


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def parity(
    case: Case, calls: dict[str, Callable[[Operands], Tensor]], dtype: str
) -> dict[str, float]:
    """The largest error of a gradient, by contender; fails if a value or a gradient is wrong."""
    given = operands(case, FEW, DTYPES[dtype])
    in_double = given._replace(
        leaves=tuple(leaf.detach().double().requires_grad_() for leaf in given.leaves)
    )
    exact = case.formula(in_double)
    gradients = torch.autograd.grad(exact, in_double.leaves)
    errors = {}
    for name, call in calls.items():
        value = call(given)
        found = torch.autograd.grad(value, given.leaves)
        of_value = off(value.detach(), exact.detach())
        errors[name] = max(off(a, b) for a, b in zip(found, gradients, strict=True))
        allowed = TOLERANCE["stack" if case.rounded else name][dtype]
        assert max(of_value, errors[name]) <= allowed, (
            f"{case.name}, {dtype}: {name} differs from float64 by {of_value:.1e} (value) and "
            f"{errors[name]:.1e} (gradient); allowed are {allowed}"
        )
    return errors


def main() -> None:
    """The command line."""
    parser = study.command_line(__doc__, rounds=3, dtypes=TIMED, shapes=SHAPES)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="only cases whose name contains a text",
    )
    parser.add_argument("--skip", nargs="+", choices=("time", "memory"), default=[])
    arguments = study.parsed(parser)
    table = Table("Losses of training stacks beside fastkd, forward and backward", COLUMNS)
    measurements: list[dict[str, Any]] = []
    for case in CASES:
        if not any(text.lower() in case.name.lower() for text in arguments.cases):
            continue
        calls = {"stack": contender(case, "stack"), "fastkd": case.fastkd}
        label = case.name if calls["stack"] is not case.formula else f"formula of {case.name}"
        for dtype in arguments.dtypes:
            errors = parity(case, calls, dtype)
            for shape in arguments.shapes:
                progress(label, dtype, "{}x{}".format(*shape))
                times = peaks = None
                given = operands(case, shape, DTYPES[dtype])
                steps = {name: step(call, given) for name, call in calls.items()}
                if "time" not in arguments.skip:
                    times = interleave(steps, arguments.rounds)
                if "memory" not in arguments.skip:
                    peaks = {name: peak_of(each) for name, each in steps.items()}
                del given, steps
                table.rows.append([
                    label, "{:,} x {:,}".format(*shape), dtype,
                    *(("-",) * 3 if times is None else (
                        milliseconds(times["stack"]), milliseconds(times["fastkd"]),
                        f"{ratio(times, 'stack', 'fastkd'):.1f}x",
                    )),
                    *(("-",) * 3 if peaks is None else (
                        f"{peaks['stack'] / MIB:,.0f}", f"{peaks['fastkd'] / MIB:,.0f}",
                        f"{peaks['fastkd'] / peaks['stack']:.2f}",
                    )),
                    *(f"{errors[name]:.1e}" for name in calls),
                ])  # fmt: skip
                progress(*table.rows[-1])
                measurements.append({
                    "function": label, "shape": shape, "dtype": dtype, "errors": errors, "peaks": peaks,
                    "median_seconds": times and {name: median(each) for name, each in times.items()},
                    "times_as_fast": times and ratio(times, "stack", "fastkd"),
                })  # fmt: skip
    emit(arguments, [table], measurements)


if __name__ == "__main__":
    main()
