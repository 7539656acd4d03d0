"""Who is compared: fastkd's backends, plain PyTorch and other packages, each the mean over rows of a divergence.

What a package's own convention adds or leaves out is undone where its loss is made, and said in its `note`. One that
cannot be made to return the number (torchtune's forward KL leaves out the teacher's entropy) is verified against the
formula it does compute, `instead`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from contenders import LOSSES, Loss, Rows, eager_rows, fastkd_loss, from_definition, mean_of
from torch import Tensor

import fastkd
from fastkd.backends import registry

# (student, teacher), or (student, weight, teacher, teacher_weight): logits, or hidden states and heads -> scalar.
Call = Callable[..., Tensor]

BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # of the generalised JSD
KLS = ("forward_kl", "reverse_kl")


def loss_of(divergence: str) -> Loss:
    """A divergence of fastkd's table at temperature 1, with the published formula where contenders.py has one."""
    if divergence in LOSSES:
        return LOSSES[divergence]._replace(temperature=1.0)
    return from_definition(fastkd.DIVERGENCES[divergence]())


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)


def half_of_each(student: Tensor, teacher: Tensor) -> Tensor:
    reverse = LOSSES["reverse_kl"].formula(student, teacher)
    return 0.5 * (soft_cross_entropy(student, teacher) + reverse)


def first_label(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with label 0 in every row."""
    return student.logsumexp(-1) - student[..., 0]


def zeros_like_labels(rows: Tensor) -> Tensor:
    return torch.zeros(rows.shape[:-1], dtype=torch.int64, device=rows.device)


def eager_linear(formula: Rows) -> Call:
    """From hidden states, as people write it: whole logits in float32."""

    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.linear(teacher, teacher_weight).float()
        return formula(F.linear(student, weight).float(), target).mean()

    return loss


def fastkd_linear(divergence: fastkd.Divergence, **options: Any) -> Call:
    """From hidden states. The backend is named, "cpu" unless it is given, so that a missing one is an error."""
    options = {"divergence": divergence, "backend": "cpu", **options}

    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        value = fastkd.fused_linear_kd_loss(
            student, weight, fastkd.LinearTeacher(teacher, teacher_weight), **options
        )
        assert isinstance(value, Tensor)
        return value

    return loss


def trl_logits(divergence: str) -> Call:
    from trl.experimental.gkd import GKDTrainer

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return GKDTrainer.generalized_jsd_loss(student, teacher, beta=BETAS[divergence])

    return loss


def trl_chunked(divergence: str) -> Call:
    """Makes the logits again in the backward."""
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
    """Liger's chunked JSD in PyTorch, without the cross-entropy that it mixes in by default."""
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

    # Whole logits, as by default: in chunks of a few rows each it takes ten times as long on a CPU.
    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        return F.linear_cross_entropy(student, weight, zeros_like_labels(student))

    return loss


class Peer(NamedTuple):
    """A contender.

    Attributes:
        form: "logits" or "linear", from hidden states.
        make: Its loss, given the divergence's name and the dtype. ImportError where the package is not there.
        divergences: Those it has; None for all.
        package: The distribution it comes from.
        backend: Of fastkd, the one it asks for.
        device: "cpu" or "cuda" where it runs on that alone; None for any.
        triton: It is a Triton kernel, which its interpreter can verify without a GPU.
        instead: The formula that it is verified against, where that is not the divergence's.
        in_place: Its gradient overwrites the student's logits.
        note: What its own convention adds or leaves out.
    """

    name: str
    form: str
    make: Callable[[str, torch.dtype], Call]
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

    def logits(divergence: str, dtype: torch.dtype) -> Call:
        return fastkd_loss(loss_of(divergence), backend=backend)

    def linear(divergence: str, dtype: torch.dtype) -> Call:
        return fastkd_linear(loss_of(divergence).divergence, backend=backend)

    return [Peer(name, "logits", logits, **common), Peer(name, "linear", linear, **common)]


def _plain() -> list[Peer]:
    def eager(divergence: str, dtype: torch.dtype) -> Call:
        return mean_of(eager_rows(loss_of(divergence), torch.float32))

    def no_upcast(divergence: str, dtype: torch.dtype) -> Call:
        return mean_of(eager_rows(loss_of(divergence), dtype))

    def linear(divergence: str, dtype: torch.dtype) -> Call:
        return eager_linear(loss_of(divergence).formula)

    def compiled(make: Callable[[str, torch.dtype], Call]) -> Callable[[str, torch.dtype], Call]:
        # Fixed sizes, and a case starts afresh: the most favourable conditions there are.
        def make_compiled(divergence: str, dtype: torch.dtype) -> Call:
            torch.compiler.reset()
            return torch.compile(make(divergence, dtype), fullgraph=True, dynamic=False)

        return make_compiled

    return [
        Peer("eager", "logits", eager, note="operators on logits cast to float32"),
        Peer("eager, no upcast", "logits", no_upcast, note="operators in the logits' dtype"),
        Peer("torch.compile", "logits", compiled(eager), note="eager, compiled for fixed sizes"),
        Peer("eager", "linear", linear, note="whole logits, cast to float32"),
        Peer("torch.compile", "linear", compiled(linear), note="eager, compiled for fixed sizes"),
    ]


def _in_place(divergence: str, dtype: torch.dtype) -> Call:
    return fastkd_loss(loss_of(divergence), inplace=True)


def _named(make: Callable[[str], Call]) -> Callable[[str, torch.dtype], Call]:
    return lambda divergence, dtype: make(divergence)


def _fixed(make: Callable[[str], Call], name: str) -> Callable[[str, torch.dtype], Call]:
    return lambda divergence, dtype: make(name)


_GENERALISED = tuple(BETAS)
_TORCHTUNE: dict[str, Any] = {"package": "torchtune", "note": "wants labels: none is ignored"}
_TORCHTUNE_FORWARD: dict[str, Any] = {
    "package": "torchtune",
    "instead": soft_cross_entropy,
    "note": "leaves out the teacher's entropy, a constant; the gradient is forward KL's",
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
        "TRL generalized_jsd_loss", "logits", _named(trl_logits), _GENERALISED, "trl",
        note="in the logits' dtype; beta 0, 0.5, 1; batchmean",
    ),
    Peer(
        "TRL chunked divergence", "linear", _named(trl_chunked), _GENERALISED, "trl",
        note="a loss a row, of which the mean is taken",
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
        note="leaves out half of the teacher's entropy, a constant",
    ),
    Peer(
        "Model-Optimizer", "logits", _named(modelopt_logits), ("forward_kl",), "nvidia-modelopt",
        note="batchmean in place of its default, which divides by V",
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
        "Liger JSD", "logits", _named(liger_jsd), _GENERALISED, **_LIGER,
        note="takes log-probabilities, made here in float32; beta 0, 0.5, 1",
    ),
    Peer(
        "Liger TVD", "logits", _named(liger_tvd), ("tvd",), **_LIGER,
        note="takes probabilities, made here in float32; batchmean",
    ),
    Peer(
        "Liger chunked JSD", "linear", _named(liger_chunked), _GENERALISED, "liger-kernel",
        note="compiled by itself; weight 0 for the cross-entropy that it mixes in by default",
    ),
    Peer("Liger FusedLinearJSD", "linear", _named(liger_linear_jsd), _GENERALISED, **_LIGER),
    Peer(
        "Liger FusedLinearKLDiv", "linear", _named(liger_linear_kl), ("forward_kl",), **_LIGER,
        note="takes the teacher's probabilities, made here",
    ),
    Peer(
        "torch linear_cross_entropy", "linear", _named(linear_cross_entropy), None,
        instead=first_label,
        note="a yardstick: cross-entropy with labels, no teacher; whole logits, its default",
    ),
]  # fmt: skip

NOT_COMPARED = {
    "DistillKit": "not on PyPI, so there is no version to pin",
    "Megatron-LM": "its loss takes top-k log-probabilities and a tensor-parallel group: another question",
}


def anchor(form: str, device: str) -> Peer:
    """fastkd as it runs there by itself: what all are compared with."""
    name = "fastkd (cpu)" if device == "cpu" else "fastkd (triton)"
    return next(peer for peer in PEERS if peer.form == form and peer.name == name)


def of_case(form: str, divergence: str, dtype: torch.dtype, device: str) -> list[Peer]:
    """Those that have such a loss, whether or not they can run here."""

    def has(peer: Peer) -> bool:
        if peer.form != form or (device != "cpu" and peer.device == "cpu"):
            return False
        if peer.name == "eager, no upcast" and dtype == torch.float32:
            return False  # there is no upcast to leave out
        return peer.divergences is None or divergence in peer.divergences

    return [peer for peer in PEERS if has(peer)]


def installed(package: str) -> str | None:
    """Its version; None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def obstacle(peer: Peer, device: str) -> str | None:
    """Why it cannot run on that device; None where it can."""
    if peer.package != "fastkd" and installed(peer.package) is None:
        return "not installed"
    if device == "cpu" and peer.device == "cuda":
        return "needs a GPU"
    if peer.backend is None:
        return None
    call = registry.Call(device, torch.float32, torch.float32, fastkd.forward_kl())
    why = registry.obstacle(peer.backend, call, registry.available_backends())
    return why.reason if why else None
