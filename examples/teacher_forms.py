"""The forms of the demo's teacher, and for each form the loss in eager PyTorch and in fastkd.

`dense` and `topk` use the student's logits. `linear` and `cache` use its hidden states, so that fastkd
holds no [tokens, V] tensor, neither in memory nor on disk; eager PyTorch always computes full logits.
"""

import tempfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from distill import EAGER_DIVERGENCES, Corpus, Distiller, eager_loss, logits_of
from torch import Tensor
from transformers import PreTrainedModel

import fastkd
from fastkd.teachers.cache import TeacherCache, build_cache


class Form(str, Enum):
    """Form in which the loss receives the teacher."""

    dense = "dense"  # logits
    linear = "linear"  # hidden states and the lm_head
    topk = "topk"  # the most probable tokens, and the probability of the others
    cache = "cache"  # hidden states that are written to disk before training

    @property
    def on_hidden_states(self) -> bool:
        """Whether the losses take hidden states rather than logits."""
        return self in (Form.linear, Form.cache)


Losses = tuple[Callable[..., Tensor], Callable[..., Tensor]]


def losses(form: Form, divergence: str, temperature: float, head: Tensor) -> Losses:
    """Return the losses (eager, fastkd), functions of the student's logits or hidden states, teacher and labels."""
    options: dict[str, Any] = {"divergence": divergence, "temperature": temperature}

    def eager(student: Tensor, teacher: Any, labels: Tensor) -> Tensor:
        if form is Form.topk:
            return _eager_topk(student, teacher, **options)
        if form.on_hidden_states:
            student = F.linear(student, head)
            teacher = F.linear(teacher.hidden, teacher.weight)
        return eager_loss(student, teacher, labels, alpha=1.0, **options)

    def fused(student: Tensor, teacher: Any, labels: Tensor) -> Tensor:
        if form.on_hidden_states:
            return fastkd.fused_linear_kd_loss(student, head, teacher, **options)
        return fastkd.kd_loss(student, teacher, **options)

    return eager, fused


def _eager_topk(
    student: Tensor, teacher: fastkd.TopK, *, divergence: str, temperature: float
) -> Tensor:
    """Compute the divergence over K tokens and one event for all others."""
    log_q = F.log_softmax(student / temperature, dim=-1)
    others = log_q.scatter(-1, teacher.ids, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([log_q.gather(-1, teacher.ids), others], -1)
    log_p = torch.cat([teacher.logprobs, teacher.tail_logprob.unsqueeze(-1)], -1)
    impossible = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_p, log_q = log_p.masked_fill(impossible, -100.0), log_q.masked_fill(impossible, -100.0)
    distance = EAGER_DIVERGENCES[divergence](log_p, log_q) / log_q[..., 0].numel()
    return temperature**2 * distance


def on_hidden_states(distiller: Distiller) -> None:
    """Make a distiller pass the student's hidden states to the loss instead of its logits."""
    distiller.output = lambda inputs: (
        distiller.student.base_model(inputs, use_cache=False).last_hidden_state
    )


class Teacher:
    """Teacher for the batches of a corpus, in one of the forms."""

    def __init__(
        self,
        model: PreTrainedModel,
        form: Form,
        *,
        corpus: Corpus,
        steps: int,
        temperature: float,
        k: int,
        progress: Callable[[int], None],
    ) -> None:
        self._model, self._form, self._temperature, self._k = model, form, temperature, k
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if form is Form.cache:
            self._folder = tempfile.TemporaryDirectory(prefix="fastkd-demo-")
            path = Path(self._folder.name) / "cache"
            sequences = (
                sequence for step in range(steps) for sequence in corpus.batch(step)[:, :-1]
            )
            build_cache(path, model, sequences, kind="hidden", progress=progress)
            self._cache = TeacherCache(path)

    @torch.no_grad()
    def of(self, step: int, ids: Tensor) -> Any:
        """Return the teacher for the token ids [B, S] of a step."""
        if self._form is Form.cache:
            first = step * len(ids)
            batch = self._cache.collate([self._cache[first + i] for i in range(len(ids))])
            assert torch.equal(batch.input_ids, ids)
            return batch.teacher
        if self._form is Form.linear:
            states = self._model.base_model(ids, use_cache=False).last_hidden_state
            return fastkd.LinearTeacher(states, self._model.get_output_embeddings().weight.detach())
        logits = logits_of(self._model, ids)
        if self._form is Form.topk:
            return fastkd.TopK.from_logits(logits, self._k, temperature=self._temperature)
        return logits


def first_token(teacher: Any) -> Any:
    """Return the teacher restricted to the first token of each sequence."""
    if isinstance(teacher, fastkd.LinearTeacher):
        return fastkd.LinearTeacher(teacher.hidden[:, :1], teacher.weight)
    if isinstance(teacher, fastkd.TopK):
        return fastkd.TopK(
            teacher.ids[:, :1],
            teacher.logprobs[:, :1],
            tail_logprob=teacher.tail_logprob[:, :1],
            temperature=teacher.temperature,
        )
    return teacher[:, :1]
