"""Who is compared: fastkd's backends, plain PyTorch and other packages.

Each contender computes the mean of a divergence over rows. Where a package's own convention adds or omits a term, its
wrapper here undoes that, and its `note` says so. torchtune's forward KL cannot be corrected, because it omits the
teacher's entropy; it is verified against the formula it does compute, `instead`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd.backends import registry
from fastkd.divergences import derivatives

# (student, teacher) logits, or (student, weight, teacher, teacher_weight) hidden states and heads -> scalar.
Call = Callable[..., Tensor]
Rows = Callable[[Tensor, Tensor], Tensor]  # (student [..., V], teacher [..., V]) -> loss [...]

BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # of the generalized JSD


# The formulas of plain PyTorch, in the fastest form that we know of.


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    # log_target is the faster choice: a target of probabilities costs another logarithm.
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return forward_kl(teacher, student)


def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    from_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    from_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return 0.5 * (from_teacher + from_student).sum(-1)


def tvd(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)


class Loss(NamedTuple):
    """A loss to measure: T^2 times the formula of logits / T, with T the temperature."""

    name: str
    label: str
    divergence: fastkd.Divergence
    formula: Rows
    temperature: float = 1.0


LOSSES = {
    "forward_kl": Loss("forward_kl", "forward KL", fastkd.forward_kl(), forward_kl),
    "jsd": Loss("jsd", "jsd(0.5)", fastkd.jsd(0.5), jsd),
    "tvd": Loss("tvd", "tvd", fastkd.tvd(), tvd),
    "reverse_kl": Loss("reverse_kl", "reverse KL", fastkd.reverse_kl(), reverse_kl),
}


def loss_of(name: str) -> Loss:
    """The loss of that name at temperature 1. If it has no formula above, its formula is fastkd's definition."""
    if name in LOSSES:
        return LOSSES[name]
    divergence = fastkd.DIVERGENCES[name]()

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = student, teacher
        if divergence.normalized:
            log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
        phi, *_ = derivatives(divergence, log_p.exp(), log_q.exp(), log_p, log_q, log_p - log_q)
        return phi.sum(-1)

    return Loss(name, divergence.name, divergence, formula)


def published(name: str) -> Loss:
    """The loss at the temperature it was published with: Hinton's forward KL at 2, the others at 1."""
    if name == "forward_kl":
        return LOSSES[name]._replace(label="Hinton (T = 2)", temperature=2.0)
    return loss_of(name)


def at_temperature(call: Call, t: float) -> Call:
    """The loss of logits / t, times t^2."""
    if t == 1:
        return call
    return lambda student, teacher: t * t * call(student / t, teacher / t)


def eager_rows(loss: Loss, dtype: torch.dtype) -> Rows:
    """The loss of each row in plain PyTorch, computed in dtype."""
    formula = at_temperature(loss.formula, loss.temperature)
    return lambda student, teacher: formula(student.to(dtype), teacher.to(dtype))


def mean_of(rows: Rows) -> Call:
    """The mean over rows, which training minimizes."""
    return lambda student, teacher: rows(student, teacher).mean()


def eager_linear(loss: Loss, dtype: torch.dtype = torch.float32) -> Call:
    """The loss from hidden states as people write it, with whole logits cast to dtype."""
    rows = eager_rows(loss, dtype)

    def mean(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.linear(teacher, teacher_weight)
        return rows(F.linear(student, weight), target).mean()

    return mean


def fastkd_loss(loss: Loss, **options: Any) -> Call:
    """The loss of logits in fastkd. The backend is always named ("cpu" by default), so a missing one is an error."""
    options = {"temperature": loss.temperature, "backend": "cpu", **options}
    return lambda s, t: fastkd.kd_loss(s, t, divergence=loss.divergence, **options)


def fastkd_linear(loss: Loss, **options: Any) -> Call:
    """The loss from hidden states in fastkd. The backend is named, as in `fastkd_loss`."""
    options = {"temperature": loss.temperature, "backend": "cpu", **options}

    def mean(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        target = fastkd.LinearTeacher(teacher, teacher_weight)
        return fastkd.fused_linear_kd_loss(
            student, weight, target, divergence=loss.divergence, **options
        )

    return mean


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)


def half_of_each(student: Tensor, teacher: Tensor) -> Tensor:
    reverse = reverse_kl(student, teacher)
    return 0.5 * (soft_cross_entropy(student, teacher) + reverse)


def first_label(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with label 0 in every row."""
    return student.logsumexp(-1) - student[..., 0]


def zeros_like_labels(rows: Tensor) -> Tensor:
    return torch.zeros(rows.shape[:-1], dtype=torch.int64, device=rows.device)


def trl_logits(divergence: str) -> Call:
    from trl.experimental.gkd import GKDTrainer

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return GKDTrainer.generalized_jsd_loss(student, teacher, beta=BETAS[divergence])

    return loss


def trl_chunked(divergence: str) -> Call:
    """Recomputes the logits in the backward."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        rows, _ = ChunkedDivergenceFunction.apply(
            student, weight, None, teacher, teacher_weight, None, BETAS[divergence]
        )
        return rows.mean()

    return loss


def torchtune_logits(name: str) -> Call:
    from torchtune.modules import loss as losses

    module = getattr(losses, name)()
    return lambda student, teacher: module(student, teacher, zeros_like_labels(student))


def torchtune_chunked(name: str, chunks: int = 8) -> Call:
    from torchtune.modules import loss as losses

    module = getattr(losses, name)(num_output_chunks=chunks)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        parts = (list(side.unsqueeze(0).chunk(chunks, 1)) for side in (student, teacher))
        return module(*parts, zeros_like_labels(student).unsqueeze(0))

    return loss


def modelopt_logits(divergence: str) -> Call:
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    return LogitsDistillationLoss(reduction="batchmean")


def torchdistill_logits(divergence: str) -> Call:
    from torchdistill.losses.mid_level import KDLoss

    module = KDLoss("", "", "", "", temperature=1.0, alpha=0.0)
    return lambda student, teacher: module({"": {"": student}}, {"": {"": teacher}})


def liger_kl(divergence: str) -> Call:
    from liger_kernel.transformers import LigerKLDIVLoss

    module = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda student, teacher: module(*log_probabilities(student, teacher))


def liger_jsd(divergence: str) -> Call:
    from liger_kernel.transformers import LigerJSD

    module = LigerJSD(beta=BETAS[divergence])
    return lambda student, teacher: module(*log_probabilities(student, teacher))


def liger_tvd(divergence: str) -> Call:
    from liger_kernel.transformers import LigerTVDLoss

    module = LigerTVDLoss(reduction="batchmean")
    return lambda student, teacher: module(student.float().softmax(-1), teacher.float().softmax(-1))


def log_probabilities(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return student.float().log_softmax(-1), teacher.float().log_softmax(-1)


def liger_chunked(divergence: str, compiled: bool = True) -> Call:
    """Liger's chunked JSD in PyTorch, without the cross-entropy that it adds by default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(0.0, 1.0, beta=BETAS[divergence], compiled=compiled)

    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        return module(student, weight, teacher, teacher_weight, zeros_like_labels(student))

    return loss


def liger_linear_jsd(divergence: str) -> Call:
    from liger_kernel.transformers import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=BETAS[divergence])
    return lambda student, weight, teacher, head: module(student, weight, teacher, head, None)


def liger_linear_kl(divergence: str) -> Call:
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    module = LigerFusedLinearKLDivLoss()

    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        target = F.linear(teacher, teacher_weight).float().softmax(-1)
        return module(student, weight, target)

    return loss


def linear_cross_entropy(divergence: str) -> Call:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("this torch has no linear_cross_entropy")

    # Whole logits, its default: chunks of a few rows take ten times as long on a CPU.
    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        return F.linear_cross_entropy(student, weight, zeros_like_labels(student))

    return loss


def soft_linear_cross_entropy(divergence: str) -> Call:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError("this torch has no linear_cross_entropy in chunks")
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        target = F.linear(teacher, teacher_weight).softmax(-1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch 2.13 ignores the options
            return F.linear_cross_entropy(student, weight, target, options=options)

    return loss


def _module_of(name: str, **modules: dict[str, Any]) -> Any:
    """A module of a stack, without what the package itself requires (examples/swap/originals.py)."""
    path = Path(__file__).parents[1] / "examples" / "swap" / "originals.py"
    spec = importlib.util.spec_from_file_location("swap_originals", path)
    assert spec is not None and spec.loader is not None
    helper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helper)
    return helper.module_of(name, **modules)


def nemo_automodel_logits(divergence: str) -> Call:
    module = _module_of("nemo_automodel.components.loss.kd_loss").KDLoss()
    return lambda student, teacher: module(student, teacher, zeros_like_labels(student))


def swift_logits(divergence: str) -> Call:
    file = _module_of("swift.rlhf_trainers.gkd_loss")

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        labels = zeros_like_labels(student).unsqueeze(0)
        output = file.TeacherOutput(full_logits=teacher.unsqueeze(0), labels=labels)
        total, count = file.gkd_loss(student.unsqueeze(0), output, labels, BETAS[divergence], 1.0)
        return total / count

    return loss


def skyrl_logits(chunk_size: int | None) -> Callable[[str], Call]:
    def make(divergence: str) -> Call:
        # Its file imports annotations of shapes only.
        shapes = dict.fromkeys(("Float", "Integer"), Annotated)
        file = _module_of("skyrl.backends.skyrl_train.mtp.soft_ce", jaxtyping=shapes)

        def loss(student: Tensor, teacher: Tensor) -> Tensor:
            pair, ones = (student.unsqueeze(0), teacher.unsqueeze(0)), torch.ones(1, len(student))
            return file.draft_soft_ce(*pair, ones.to(student.device), chunk_size=chunk_size)

        return loss

    return make


SPECULATORS = {"forward_kl": "kl_div", "reverse_kl": "rkl", "jsd": "jsd", "tvd": "tv"}


def speculators_logits(divergence: str) -> Call:
    utils = _module_of("speculators.losses.utils")
    ((function, _),) = utils.resolve_loss_config(SPECULATORS[divergence], "eager").values()
    return lambda student, teacher: function(student.unsqueeze(0), teacher.unsqueeze(0)).mean()


class Peer(NamedTuple):
    """A contender: who makes the loss, where it can run, and what it is verified against.

    Attributes:
        form: "logits", or "linear" for a loss from hidden states.
        make: Returns its loss, for a Loss and the dtype of the logits. Raises ImportError without the package.
        divergences: Names of the divergences it has; None for all.
        package: The distribution it comes from.
        backend: The backend of fastkd that it uses; None for other packages.
        device: "cpu" or "cuda" if it runs on that device alone; None for any.
        triton: Whether it is a Triton kernel, which Triton's interpreter can verify without a GPU.
        instead: The formula it is verified against, if that is not the divergence's.
        in_place: Whether its gradient overwrites the student's logits.
        note: What its own convention adds or omits.
    """

    name: str
    form: str
    make: Callable[[Loss, torch.dtype], Call]
    divergences: tuple[str, ...] | None = None
    package: str = "torch"
    backend: str | None = None
    device: str | None = None
    triton: bool = False
    instead: Rows | None = None
    in_place: bool = False
    note: str = ""


def _own(backend: str) -> list[Peer]:
    device = {"cpu": "cpu", "portable": None, "reference": None}.get(backend, "cuda")
    common: dict[str, Any] = {"package": "fastkd", "backend": backend, "device": device}
    common["triton"] = backend == "triton"
    name = f"fastkd ({backend})"
    return [
        Peer(name, "logits", lambda loss, _: fastkd_loss(loss, backend=backend), **common),
        Peer(name, "linear", lambda loss, _: fastkd_linear(loss, backend=backend), **common),
    ]


def _plain() -> list[Peer]:
    def eager(loss: Loss, dtype: torch.dtype) -> Call:
        return mean_of(eager_rows(loss, torch.promote_types(dtype, torch.float32)))

    def no_upcast(loss: Loss, dtype: torch.dtype) -> Call:
        return mean_of(eager_rows(loss, dtype))

    def linear(loss: Loss, dtype: torch.dtype) -> Call:
        return eager_linear(loss)

    def compiled(make: Callable[[Loss, torch.dtype], Call]) -> Callable[[Loss, torch.dtype], Call]:
        # The most favourable conditions: fixed sizes, and nothing left over from another case.
        def make_compiled(loss: Loss, dtype: torch.dtype) -> Call:
            torch.compiler.reset()
            return torch.compile(make(loss, dtype), fullgraph=True, dynamic=False)

        return make_compiled

    return [
        Peer("eager", "logits", eager, note="operators on logits cast to float32"),
        Peer("eager, no upcast", "logits", no_upcast, note="operators in the logits' dtype"),
        Peer("torch.compile", "logits", compiled(eager), note="eager, compiled for fixed sizes"),
        Peer("eager", "linear", linear, note="whole logits, cast to float32"),
        Peer("torch.compile", "linear", compiled(linear), note="eager, compiled for fixed sizes"),
    ]


def _in_place(loss: Loss, dtype: torch.dtype) -> Call:
    return fastkd_loss(loss, inplace=True)


def _named(make: Callable[[str], Call]) -> Callable[[Loss, torch.dtype], Call]:
    """A package's loss, made by the name of the divergence."""
    return lambda loss, dtype: at_temperature(make(loss.name), loss.temperature)


def _fixed(make: Callable[[str], Call], name: str) -> Callable[[Loss, torch.dtype], Call]:
    """A package's loss, made by its own name in the package."""
    return lambda loss, dtype: at_temperature(make(name), loss.temperature)


_BY_BETA = tuple(BETAS)
_TORCHTUNE: dict[str, Any] = {"package": "torchtune", "note": "takes labels; none is ignored here"}
_TORCHTUNE_FORWARD: dict[str, Any] = {
    "package": "torchtune",
    "instead": soft_cross_entropy,
    "note": "omits the teacher's entropy, a constant; the gradient is forward KL's",
}
_SKYRL: dict[str, Any] = {
    "package": "skyrl",
    "instead": soft_cross_entropy,
    "note": "adds the teacher's entropy, a constant; the gradient is forward KL's",
}
_LIGER: dict[str, Any] = {"package": "liger-kernel", "device": "cuda", "triton": True}

PEERS: list[Peer] = [
    *(peer for backend in ("cpu", "triton", "cuda", "portable", "reference") for peer in _own(backend)),
    Peer(
        "fastkd (cpu, in place)", "logits", _in_place, package="fastkd", backend="cpu", device="cpu",
        in_place=True,
        note="the gradient overwrites the student's logits",
    ),
    *_plain(),
    Peer(
        "TRL generalized_jsd_loss", "logits", _named(trl_logits), _BY_BETA, "trl",
        note="in the logits' dtype; beta 0, 0.5, 1; batchmean",
    ),
    Peer(
        "TRL chunked divergence", "linear", _named(trl_chunked), _BY_BETA, "trl",
        note="returns a loss per row; the mean is taken here",
    ),
    Peer(
        "torchtune ForwardKL", "logits", _fixed(torchtune_logits, "ForwardKLLoss"), ("forward_kl",),
        **_TORCHTUNE_FORWARD,
    ),
    Peer(
        "torchtune ForwardKL, chunked", "logits",
        _fixed(torchtune_chunked, "ForwardKLWithChunkedOutputLoss"), ("forward_kl",),
        **_TORCHTUNE_FORWARD,
    ),
    Peer(
        "torchtune ReverseKL", "logits", _fixed(torchtune_logits, "ReverseKLLoss"), ("reverse_kl",),
        **_TORCHTUNE,
    ),
    Peer(
        "torchtune ReverseKL, chunked", "logits",
        _fixed(torchtune_chunked, "ReverseKLWithChunkedOutputLoss"), ("reverse_kl",), **_TORCHTUNE,
    ),
    Peer(
        "torchtune SymmetricKL", "logits", _fixed(torchtune_logits, "SymmetricKLLoss"), ("mixture",),
        package="torchtune", instead=half_of_each,
        note="omits half of the teacher's entropy, a constant",
    ),
    Peer(
        "Model-Optimizer", "logits", _named(modelopt_logits), ("forward_kl",), "nvidia-modelopt",
        note="batchmean instead of its default, which divides by V",
    ),
    Peer(
        "torchdistill KDLoss", "logits", _named(torchdistill_logits), ("forward_kl",), "torchdistill",
        note="without the cross-entropy",
    ),
    Peer(
        "Liger KLDiv", "logits", _named(liger_kl), ("forward_kl",), **_LIGER,
        note="takes log-probabilities, made here in float32; batchmean",
    ),
    Peer(
        "Liger JSD", "logits", _named(liger_jsd), _BY_BETA, **_LIGER,
        note="takes log-probabilities, made here in float32; beta 0, 0.5, 1",
    ),
    Peer(
        "Liger TVD", "logits", _named(liger_tvd), ("tvd",), **_LIGER,
        note="takes probabilities, made here in float32; batchmean",
    ),
    Peer(
        "Liger chunked JSD", "linear", _named(liger_chunked), _BY_BETA, "liger-kernel",
        note="compiles itself; weight 0 for the cross-entropy that it adds by default",
    ),
    Peer("Liger FusedLinearJSD", "linear", _named(liger_linear_jsd), _BY_BETA, **_LIGER),
    Peer(
        "Liger FusedLinearKLDiv", "linear", _named(liger_linear_kl), ("forward_kl",), **_LIGER,
        note="takes the teacher's probabilities, made here",
    ),
    Peer(
        "torch linear_cross_entropy", "linear", _named(linear_cross_entropy), None,
        instead=first_label,
        note="a yardstick: cross-entropy with labels and no teacher; whole logits, its default",
    ),
    Peer(
        "torch linear_cross_entropy, probabilities", "linear", _named(soft_linear_cross_entropy), ("forward_kl",),
        instead=soft_cross_entropy,
        note="of the teacher, made here; with its options for chunks, which torch 2.13 ignores for probabilities",
    ),
    Peer(
        "NeMo AutoModel KDLoss", "logits", _named(nemo_automodel_logits), ("forward_kl",), "nemo-automodel",
        note="takes labels; none is ignored here",
    ),
    Peer(
        "ms-swift gkd_loss", "logits", _named(swift_logits), _BY_BETA, "ms-swift",
        note="beta 0, 0.5, 1; chunks of 512 rows, its default",
    ),
    Peer(
        "SkyRL draft_soft_ce", "logits", _named(skyrl_logits(None)), ("forward_kl",), **_SKYRL,
    ),
    Peer(
        "SkyRL draft_soft_ce, chunked", "logits", _named(skyrl_logits(64)), ("forward_kl",), **_SKYRL,
    ),
    Peer(
        "speculators, eager", "logits", _named(speculators_logits), tuple(SPECULATORS), "speculators",
        note="its other implementation is Triton's",
    ),
]  # fmt: skip

NOT_COMPARED = {
    "DistillKit": "not on PyPI, so there is no version to pin",
    "Megatron-LM": "its loss needs top-k log-probabilities and a tensor-parallel group, which answers another question",
}


def anchor(form: str, device: str) -> Peer:
    """fastkd with the backend it chooses for that device. Every contender is compared with it."""
    name = "fastkd (cpu)" if device == "cpu" else "fastkd (triton)"
    return next(peer for peer in PEERS if peer.form == form and peer.name == name)


def of_case(form: str, divergence: str, dtype: torch.dtype, device: str) -> list[Peer]:
    """The contenders that have such a loss, whether or not they can run here."""

    def has(peer: Peer) -> bool:
        if peer.form != form or (device != "cpu" and peer.device == "cpu"):
            return False
        if peer.name == "eager, no upcast" and torch.finfo(dtype).bits >= 32:
            return False  # "eager" does not cast these dtypes either
        return peer.divergences is None or divergence in peer.divergences

    return [peer for peer in PEERS if has(peer)]


def installed(package: str) -> str | None:
    """The package's version, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def obstacle(peer: Peer, device: str) -> str | None:
    """Why the contender cannot run on that device, or None if it can."""
    if peer.package != "fastkd" and installed(peer.package) is None:
        return "not installed"
    if device == "cpu" and peer.device == "cuda":
        return "needs a GPU"
    if peer.backend is None:
        return None
    call = registry.Request(device, torch.float32, torch.float32, fastkd.forward_kl())
    why = registry.obstacle(peer.backend, call, registry.available_backends())
    return why.reason if why else None


def failure(error: Exception) -> str:
    """An exception in one line."""
    return f"fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"
