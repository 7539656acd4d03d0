"""Messages of adapters for shapes and dtypes that do not match: they use their stack's names and remedies."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd.compat import (
    axolotl,
    liger,
    mdistiller,
    megatron,
    modelopt,
    nemo_rl,
    skyrl,
    specforge,
    torchdistill,
    torchtune,
    trl,
)

# Options of fastkd's losses, which a message must not advise if the stack has no such argument.
OPTIONS = (
    "vocab_size", "ignore_index", "mask", "num_items", "teacher_temperature", "reduction", "alpha", "select",
    "find_logits",
)  # fmt: skip
ALONE = SimpleNamespace(tensor_model_parallel_size=1)


GENERATOR = torch.Generator().manual_seed(0)


def logits(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def log_p(*shape: int) -> Tensor:
    return logits(*shape).log_softmax(-1)


def p(*shape: int) -> Tensor:
    return logits(*shape).softmax(-1)


LABELS = torch.tensor([0, 1, 2, 3])
HEADS = {
    "student_input": logits(4, 3), "student_weight": logits(7, 3),
    "teacher_input": logits(4, 5), "teacher_weight": logits(7, 5),
}  # fmt: skip
PAIR = {"student_logits": logits(4, 7), "teacher_logits": logits(4, 7), "labels": LABELS}
CHUNKED = {
    "student_hidden_states": logits(2, 2, 3), "teacher_hidden_states": logits(2, 2, 5),
    "student_lm_head_weight": logits(7, 3), "teacher_lm_head_weight": logits(7, 5),
    "completion_mask": torch.ones(2, 2, dtype=torch.int64),
}  # fmt: skip


DRAFT = {
    "student_logits": logits(2, 4, 7),
    "teacher_logits": logits(2, 4, 7),
    "mask": torch.ones(2, 4),
}
SPEC = {"logits": logits(2, 4, 7), "position_mask": torch.ones(2, 4, 1)}
FORWARD = SimpleNamespace(kl_type="forward", mixed_kl_weight=0.5, zero_outside_topk=False)
TOKENS = {
    "teacher_topk_logits": logits(2, 4, 3), "teacher_topk_indices": torch.arange(3).expand(2, 4, 3),
    "token_mask": torch.ones(2, 4), "sample_mask": torch.ones(2),
}  # fmt: skip


def of_nemo_rl(logits: Tensor, **data: Tensor) -> Tensor:
    return nemo_rl.DistillationLossFn(FORWARD)(
        logits, data | {"input_ids": torch.zeros(2, 4)}, None, None
    )[0]


def loss_with_hooks(name: str, **options: Any) -> Callable[..., Tensor]:
    """A loss of torchdistill, called with the tensors that hooks would have captured."""
    loss = getattr(torchdistill, name)("head", "output", "head", "output", **options)

    def call(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        return loss({"head": {"output": student}}, {"head": {"output": teacher}}, targets)

    return call


# For each name: (the function, its arguments, signatures whose arguments a message may advise).
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Tensor], Callable[..., Any]]] = {
    "LigerJSD": (
        liger.LigerJSD(), {"log_q": log_p(4, 7), "log_p": log_p(4, 7), "shift_labels": LABELS}, liger.LigerJSD,
    ),
    "LigerKLDIVLoss": (liger.LigerKLDIVLoss(), {"y_pred": log_p(4, 7), "y_true": p(4, 7)}, liger.LigerKLDIVLoss),
    "LigerKLDIVLoss none": (
        liger.LigerKLDIVLoss(reduction="none"), {"y_pred": log_p(4, 7), "y_true": p(4, 7)}, liger.LigerKLDIVLoss,
    ),
    "LigerTVDLoss": (
        liger.LigerTVDLoss("mean"), {"p": p(4, 7), "q": p(4, 7), "shift_labels": LABELS}, liger.LigerTVDLoss,
    ),
    "LigerTVDLoss none": (
        liger.LigerTVDLoss("none"), {"p": p(4, 7), "q": p(4, 7), "shift_labels": LABELS}, liger.LigerTVDLoss,
    ),
    "LigerFusedCETVDLoss": (
        lambda **given: liger.LigerFusedCETVDLoss()(**given)[0],
        {"student_logits": logits(4, 7), "teacher_logits": logits(4, 7), "target": LABELS},
        liger.LigerFusedCETVDLoss,
    ),
    "LigerFusedLinearKLDivLoss": (
        liger.LigerFusedLinearKLDivLoss(),
        {"student_input": logits(4, 3), "student_weight": logits(7, 3), "target": p(4, 7), "shift_labels": LABELS},
        liger.LigerFusedLinearKLDivLoss,
    ),
    "ForwardKLLoss": (torchtune.ForwardKLLoss(), PAIR, torchtune.ForwardKLLoss),
    "ReverseKLLoss": (torchtune.ReverseKLLoss(), PAIR, torchtune.ReverseKLLoss),
    "SymmetricKLLoss": (torchtune.SymmetricKLLoss(), PAIR, torchtune.SymmetricKLLoss),
    "LogitsDistillationLoss": (
        modelopt.LogitsDistillationLoss(), {"logits_s": logits(4, 7), "logits_t": logits(4, 7)},
        modelopt.LogitsDistillationLoss,
    ),
    "MFTLoss": (
        modelopt.MFTLoss(), {"logits_s": logits(4, 7), "logits_t": logits(4, 7), "labels": LABELS}, modelopt.MFTLoss,
    ),
    "LogitsKLLoss": (
        modelopt.LogitsKLLoss(ALONE), {"predictions": logits(4, 2, 7), "targets": logits(4, 2, 7)},
        modelopt.LogitsKLLoss,
    ),
    "TopKLogitsKLLoss": (
        modelopt.TopKLogitsKLLoss(ALONE, top_k=3), {"predictions": logits(4, 2, 7), "targets": logits(4, 2, 7)},
        modelopt.TopKLogitsKLLoss,
    ),
    "mdistiller.kd_loss": (
        lambda **given: mdistiller.kd_loss(temperature=2.0, **given),
        {"logits_student": logits(4, 7), "logits_teacher": logits(4, 7)}, mdistiller.kd_loss,
    ),
    "mdistiller.kd_loss standardized": (
        lambda **given: mdistiller.kd_loss(temperature=2.0, logit_stand=True, **given),
        {"logits_student": logits(4, 7), "logits_teacher": logits(4, 7)}, mdistiller.kd_loss,
    ),
    "dkd_loss": (
        lambda **given: mdistiller.dkd_loss(alpha=1.0, beta=1.0, temperature=2.0, **given),
        {"logits_student": logits(4, 7), "logits_teacher": logits(4, 7), "target": LABELS}, mdistiller.dkd_loss,
    ),
    "torchdistill.KDLoss": (
        loss_with_hooks("KDLoss", temperature=2.0, alpha=0.5),
        {"student": logits(4, 7), "teacher": logits(4, 7), "targets": LABELS}, torchdistill.KDLoss,
    ),
    "DISTLoss": (
        loss_with_hooks("DISTLoss"), {"student": logits(4, 7), "teacher": logits(4, 7), "targets": LABELS},
        torchdistill.DISTLoss,
    ),
    "generalized_jsd_loss": (trl.generalized_jsd_loss, PAIR, trl.generalized_jsd_loss),
    "generalized_jsd_loss none": (
        lambda **given: trl.generalized_jsd_loss(reduction="none", **given), PAIR, trl.generalized_jsd_loss,
    ),
    "gold_jsd_loss": (trl.gold_jsd_loss, PAIR, trl.gold_jsd_loss),
    "gold_jsd_loss of probabilities": (
        lambda **given: trl.gold_jsd_loss(logits_are_probs=True, **given), PAIR, trl.gold_jsd_loss,
    ),
    "chunked_divergence_loss": (
        lambda **given: trl.chunked_divergence_loss(beta=0.5, **given), CHUNKED, trl.chunked_divergence_loss,
    ),
    "topk_kl_div": (
        lambda **given: megatron.topk_kl_div(tp_size=1, tp_rank=0, tp_group=None, **given),
        {
            "student_logits": logits(4, 2, 7), "teacher_topk_logprobs": log_p(4, 2, 3),
            "teacher_topk_indices": torch.arange(3).expand(4, 2, 3),
        }, megatron.topk_kl_div,
    ),
    "draft_soft_ce": (skyrl.draft_soft_ce, DRAFT, skyrl.draft_soft_ce),
    "draft_soft_ce_topk": (
        lambda **given: skyrl.draft_soft_ce_topk(k=3, **given), DRAFT, skyrl.draft_soft_ce_topk,
    ),
    "LogSoftmaxLoss": (
        lambda **given: specforge.LogSoftmaxLoss.apply(**given), SPEC | {"target": p(2, 4, 7)},
        specforge.LogSoftmaxLoss.apply,
    ),
    "compute_acceptance_rate": (
        specforge.compute_acceptance_rate, SPEC | {"target_probs": p(2, 4, 7)}, specforge.compute_acceptance_rate,
    ),
    "LigerFusedLinearKLTopKLogprobLoss": (
        axolotl.LigerFusedLinearKLTopKLogprobLoss(),
        {
            "lm_head_weight": logits(7, 5), "student_hidden_states": logits(2, 4, 5),
            "target_token_ids": torch.arange(3).expand(2, 4, 3), "target_logprobs": log_p(2, 4, 3),
            "target_mask": torch.ones(2, 4, 3), "true_labels": LABELS.expand(2, 4),
        }, axolotl.LigerFusedLinearKLTopKLogprobLoss,
    ),
    "DistillationLossFn": (of_nemo_rl, TOKENS | {"logits": logits(2, 4, 7)}, nemo_rl.DistillationLossFn.__call__),
    # Extra columns of one head are cut off, as the adapters of Liger's losses document.
    "LigerFusedLinearJSD": (liger.LigerFusedLinearJSD(), HEADS | {"shift_labels": LABELS}, liger.LigerFusedLinearJSD),
    "LigerFusedLinearJSDLoss": (
        liger.LigerFusedLinearJSDLoss(), HEADS | {"true_labels": LABELS}, liger.LigerFusedLinearJSDLoss,
    ),
}  # fmt: skip

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "a column more": lambda value: torch.cat([value, value[..., :1]], -1),
    "a row more": lambda value: torch.cat([value, value[:1]]),
    "a dimension more": lambda value: value.unsqueeze(0),
    "no dimension": lambda value: value.flatten()[0],
    "no row": lambda value: value[:0],
    "another kind of number": lambda value: value.long() if value.is_floating_point() else value.double(),
}  # fmt: skip

# Accepted arguments: labels of any shape or kind that become a mask; an unused argument; a vocabulary of which the
# teacher names a few tokens; padding columns that are cut off.
TAKEN = {
    *((f"{name}KLLoss", "labels", "a dimension more") for name in ("Forward", "Reverse", "Symmetric")),
    ("dkd_loss", "target", "a dimension more"), ("topk_kl_div", "student_logits", "a column more"),
    *((f"generalized_jsd_loss{name}", "labels", "another kind of number") for name in ("", " none")),
    *((f"gold_jsd_loss{name}", "labels", "another kind of number") for name in ("", " of probabilities")),
    ("chunked_divergence_loss", "completion_mask", "another kind of number"),
    *((f"draft_soft_ce{name}", "mask", "another kind of number") for name in ("", "_topk")),
    *((name, "position_mask", "another kind of number") for name in ("LogSoftmaxLoss", "compute_acceptance_rate")),
    *(("DistillationLossFn", f"{of}_mask", "another kind of number") for of in ("token", "sample")),
    ("DistillationLossFn", "logits", "a column more"), ("DistillationLossFn", "token_mask", "a column more"),
    ("LigerFusedLinearKLTopKLogprobLoss", "lm_head_weight", "a row more"),
    ("LigerFusedLinearKLTopKLogprobLoss", "target_mask", "another kind of number"),
    *(("DISTLoss", "targets", change) for change in CHANGES),
    *(
        (name, f"{side}_weight", "a row more")
        for name in ("LigerFusedLinearJSD", "LigerFusedLinearJSDLoss") for side in ("student", "teacher")
    ),
}  # fmt: skip


def advises(message: str, argument: str) -> bool:
    """Whether a message names an option as something to pass."""
    return re.search(rf"(?<![\w.]){argument}(?![\w])", message) is not None


@pytest.mark.parametrize("name", CALLS)
def test_messages(name: str) -> None:
    """The message names the argument and advises no option that the adapter lacks."""
    call, inputs, adapter = CALLS[name]
    call(**inputs)
    known = set(inspect.signature(adapter).parameters) | set(inputs)
    if inspect.isclass(adapter):
        known |= set(inspect.signature(adapter.forward).parameters)
    for argument, value in inputs.items():
        for change, function in CHANGES.items():
            if (name, argument, change) in TAKEN:
                call(**inputs | {argument: function(value)})
                continue
            with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
                call(**inputs | {argument: function(value)})
            message = str(caught.value)
            if "targets" in inputs and change == "another kind of number" and argument == "targets":
                assert (
                    "target" in message
                )  # torch's own message: CrossEntropyLoss takes class probabilities, and these are none
                continue
            assert not isinstance(caught.value, RuntimeError), message
            named = [n for n in inputs if advises(message, n)] or re.search(
                "'head' of the", message
            )
            assert named or "labels" in message, message
            assert " must " in message, message
            assert "broadcast" not in message
            for option in OPTIONS:
                assert option in known or not advises(message, option), (
                    f"{argument}, {change}: {message}"
                )


@pytest.mark.parametrize(
    "loss",
    [
        liger.LigerKLDIVLoss(),
        *(liger.LigerKLDIVLoss(reduction=r) for r in ("none", "sum", "batchmean")),
        *(liger.LigerTVDLoss(r) for r in ("none", "sum", "batchmean", "mean")),
        liger.LigerJSD(),
    ],
)
def test_tensors_without_a_dimension(loss: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=r"must have at least 1 dimension, .*; got \(\)"):
        loss(torch.zeros(()), torch.zeros(()))


def test_batchmean_of_more_dimensions() -> None:
    """With [rows, V], the only shape of Liger, rows are torch's size(0); with [B, S, V] each position is a row."""
    log_q, target = log_p(3, 4, 7), p(3, 4, 7)
    loss = liger.LigerKLDIVLoss(reduction="batchmean")
    total = torch.nn.functional.kl_div(log_q.double(), target.double(), reduction="sum")
    torch.testing.assert_close(loss(log_q, target).double(), total / 12, rtol=1e-6, atol=0)
    flat = (log_q.flatten(0, 1), target.flatten(0, 1))
    stock = torch.nn.functional.kl_div(*flat, reduction="batchmean")
    torch.testing.assert_close(loss(*flat), stock, rtol=1e-5, atol=0)


@pytest.mark.parametrize("cut", ["chunk", "tensor_split", "by hand"])
@pytest.mark.parametrize("name", ["Forward", "Reverse", "Symmetric"])
@pytest.mark.parametrize("tokens", [9, 10, 17])
def test_chunks_of_any_split(name: str, cut: str, tokens: int) -> None:
    """For 10 tokens in 8 chunks, torch.chunk gives five of two, and tensor_split two of two and six of one."""
    generator = torch.Generator().manual_seed(tokens)
    student, teacher = torch.randn(2, 2, tokens, 13, generator=generator)
    labels = torch.randint(13, (2, tokens), generator=generator)
    labels[0, :3] = -100
    parts = {
        "chunk": lambda x: x.chunk(8, 1),
        "tensor_split": lambda x: x.tensor_split(8, 1),
        "by hand": lambda x: x.split([1, tokens - 4, 3], 1),
    }[cut]
    loss = getattr(torchtune, f"{name}KLWithChunkedOutputLoss")(8)
    actual = loss(parts(student), parts(teacher), labels)
    s, t, rows = student.double().log_softmax(-1), teacher.double().log_softmax(-1), labels != -100
    forward, reverse = -(t.exp() * s).sum(-1)[rows].mean(), (s.exp() * (s - t)).sum(-1)[rows].mean()
    exact = {"Forward": forward, "Reverse": reverse, "Symmetric": (forward + reverse) / 2}[name]
    torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=0)


def test_chunks_of_different_tokens_raise() -> None:
    loss = torchtune.ForwardKLWithChunkedOutputLoss(3)
    student, labels = torch.randn(2, 9, 5), torch.zeros(2, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match="got 3 and 3 chunks, 9 tokens of the student and labels"):
        loss(student.chunk(3, 1), student.chunk(3, 1), labels[:, :8])
    with pytest.raises(
        ValueError, match="student_logits must be a list of chunks .* use ForwardKLLoss"
    ):
        loss(student, student, labels)
    with pytest.raises(ValueError, match="teacher_logits must have the shape of student_logits"):
        loss(student.chunk(3, 1), student.split([1, 4, 4], 1), labels)
