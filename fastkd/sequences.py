"""Distillation on sequences that a model writes: the teacher (Kim and Rush 2016), or the student (Agarwal et al. 2024).

Models are those of transformers, or behave like them: ``model(input_ids=, attention_mask=).logits`` [B, S, V] of a
decoder, and ``model.generate(input_ids=, attention_mask=, ...)`` -> [B, S] ids that begin with the prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd.call.checks import check_alike, check_int, check_number
from fastkd.core.tensors import check_readable, savable
from fastkd.divergences import jsd
from fastkd.functional import kd_loss

IGNORED = -100


class Sequences(NamedTuple):
    """Prompts and completions, [B, S] each: padded on the right, as wide as the longest.

    Padding on the right leaves the positions of tokens what they are, so that no model needs position_ids.
    """

    input_ids: Tensor
    attention_mask: Tensor  # int64, 1 where there is a token
    labels: Tensor  # input_ids of the completion, and -100 elsewhere; not shifted


class Step(NamedTuple):
    """What :func:`gkd_step` returns."""

    loss: Tensor
    on_policy: bool  # whether the student wrote the completions


def shift(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [B, S - 1, V], labels [B, S - 1]), views: the logits of a position with the token that follows it.

    Labels as datasets and :class:`Sequences` have them are not shifted: labels[:, i] is the token at i, which the
    logits at i - 1 predict.

    Raises:
        TypeError, ValueError: an argument is no tensor, or has no dimension of tokens.
    """
    for argument, value in (("logits", logits), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
        if value.dim() < 2:
            raise ValueError(
                f"{argument} must be [sequences, tokens, ...], got shape {tuple(value.shape)}"
            )
    return logits[:, :-1], labels[:, 1:]


def teacher_targets(
    teacher: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    pad_token_id: int,
    eos_token_id: int | Sequence[int] | None = None,
    **generate: Any,
) -> Sequences:
    """What the teacher answers, as targets for sequence-level distillation (Kim and Rush 2016).

    The loss is plain cross-entropy, -log q(y^ | x), of the completions:

        targets = teacher_targets(teacher, prompts, mask, pad_token_id=0, num_beams=5, max_new_tokens=64)
        logits, labels = shift(student(targets.input_ids, targets.attention_mask).logits, targets.labels)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    The paper takes the best of a beam search (num_beams). The teacher runs without gradients and in eval mode, which
    is put back afterwards.

    Args:
        teacher: a decoder with ``generate``.
        input_ids: [B, P] prompts, padded on either side.
        attention_mask: [B, P], 0 (or False) at padding. None: there is none; no id is taken for padding.
        pad_token_id: what prompts and what ends early are padded with.
        eos_token_id: one or several, after which a completion ends, itself included; None: those of
            ``teacher.generation_config``, if it has some.
        **generate: passed to ``generate``: num_beams, max_new_tokens, do_sample, num_return_sequences, ... With
            several sequences a prompt they come one after the other, as ``generate`` has them.

    Returns:
        :class:`Sequences`, on the device of what ``generate`` returns.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value, or the teacher is an
            encoder-decoder.

    Memory: the sequences, and what ``generate`` holds.
    """
    _check_writes("teacher", teacher)
    input_ids, attention_mask = _prompts(input_ids, attention_mask)
    return _completed(teacher, input_ids, attention_mask, pad_token_id, eos_token_id, generate)


def gkd_step(
    student: Any,
    teacher: Any,
    batch: Mapping[str, Tensor],
    *,
    pad_token_id: int,
    on_policy_fraction: float = 0.5,
    beta: float = 0.5,
    temperature: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    generate: Mapping[str, Any] | None = None,
    **options: Any,
) -> Step:
    """The loss of one step of generalised knowledge distillation (GKD, Agarwal et al. 2024).

    With probability on_policy_fraction (the paper's lambda) the student completes the prompts of the batch, else the
    completions of the batch are used; then D(p, q) is taken over the completions' tokens, of the next token's
    distributions of both models. The student writes without gradients and in eval mode, which is put back: no gradient
    goes through the sampling.

    One number is drawn each step, whatever on_policy_fraction is. Processes of a data-parallel job that are given
    generators of one seed all take the same branch, so that none waits for another that is still writing. With a
    generator the step is deterministic: sampling is seeded from it (and the process's rank, so that processes do not
    write the same), and torch's own random numbers are left as they were.

    Args:
        student: a decoder; one that DistributedDataParallel has wrapped too.
        teacher: a decoder of the same tokenizer. It runs without gradients and in eval mode, which is put back.
        batch: "input_ids", "attention_mask" and "labels" [B, S] (-100 outside the completions; not shifted). Prompts
            are what comes before a row's first label, or "prompts" and "prompt_attention_mask" [B, P] where it has
            them.
        pad_token_id: as in :func:`teacher_targets`.
        on_policy_fraction: in [0, 1].
        beta: of :func:`fastkd.jsd`: 0 is KL(p || q), 1 is KL(q || p).
        temperature: T of kd_loss, which multiplies by T^2 unless scale_by_temperature=False. Not that of sampling,
            which is in generate.
        eos_token_id: as in :func:`teacher_targets`, of the student.
        generator: on the CPU; None: torch's own.
        generate: options of ``student.generate``; None: {"do_sample": True, "top_k": 0}, samples of the student's
            distribution as it is.
        **options: any of :func:`fastkd.kd_loss`: reduction, num_items, vocab_size (where widths differ), backend, ...

    Returns:
        (loss, whether the student wrote the completions). A batch without a label has loss 0, with a graph.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; KeyError: the batch lacks one.

    Memory: both models' logits, and kd_loss's gradient.
    """
    for name, model in (("student", student), ("teacher", teacher)):
        if not callable(model):
            raise TypeError(f"{name} must be a model, got {type(model).__name__}")
    writer = student if hasattr(student, "generate") else getattr(student, "module", student)
    _check_writes("student", writer)
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping of tensors by name, got {type(batch).__name__}")
    for name, value in (("generator", generator), ("generate", generate)):
        kind = torch.Generator if name == "generator" else Mapping
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__} or None, got {type(value).__name__}")
    pad_token_id = check_int("pad_token_id", pad_token_id)
    _ends(eos_token_id)
    fraction = check_number("on_policy_fraction", on_policy_fraction, 0.0, 1.0)
    divergence = jsd(beta)
    on_policy = bool(torch.rand((), generator=generator) < fraction)
    if on_policy:
        input_ids, mask = _prompts_of(batch)
        asked = {"do_sample": True, "top_k": 0} if generate is None else dict(generate)
        with _sampling(generator, input_ids.device):
            inputs = _completed(writer, input_ids, mask, pad_token_id, eos_token_id, asked)
    else:
        inputs = _sequences_of(
            batch, "where the student does not write (on_policy_fraction says how often it does)"
        )
    inputs = Sequences(*savable(*inputs))  # the student's graph saves ids
    given = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    with _evaluating(teacher), torch.no_grad():
        target, _ = shift(teacher(**given).logits, inputs.labels)
    logits, labels = shift(student(**given).logits, inputs.labels)
    loss = kd_loss(
        logits, target, labels, divergence=divergence, temperature=temperature, **options
    )
    return Step(loss, on_policy)


def _prompts(
    input_ids: Tensor, attention_mask: Tensor | None, prompts: str = "prompts"
) -> tuple[Tensor, Tensor]:
    """The prompts padded on the left, which is where ``generate`` of a decoder wants it."""
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        raise TypeError(f"input_ids must be a tensor of ids, got {_kind(input_ids)}")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [prompts, tokens], got shape {tuple(input_ids.shape)}")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {_kind(attention_mask)}")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}; "
            f"got {tuple(attention_mask.shape)}"
        )
    if attention_mask.device != input_ids.device:
        raise ValueError(
            f"attention_mask must be on {input_ids.device}, where input_ids are; got {attention_mask.device}"
        )
    there = attention_mask != 0
    empty = (~there.any(-1)).nonzero()
    if len(empty):
        raise ValueError(
            f"{prompts} must have at least one token each, which the model goes on from; row {int(empty[0])} has none"
        )
    return _packed(there, input_ids, there.long(), last=True)


def _sequences_of(batch: Mapping[str, Tensor], why: str) -> Sequences:
    """The sequences of a batch, checked; why they are needed is for the error where the batch lacks a part of them."""
    lacking = [name for name in Sequences._fields if name not in batch]
    if lacking:
        raise KeyError(
            f"batch must have {', '.join(map(repr, Sequences._fields))} {why}; it lacks {lacking}"
        )
    found = Sequences(*(batch[name] for name in Sequences._fields))
    for name, value in found._asdict().items():
        is_mask = name == "attention_mask"  # which the model may take in any dtype
        if not isinstance(value, Tensor) or (value.is_floating_point() and not is_mask):
            raise TypeError(f"batch[{name!r}] must be a tensor of integers, got {_kind(value)}")
        check_alike(f"batch[{name!r}]", value, "batch['input_ids']", found.input_ids)
    if found.input_ids.dim() != 2:
        raise ValueError(
            f"batch['input_ids'] must be [sequences, tokens], got shape {tuple(found.input_ids.shape)}"
        )
    return found


def _prompts_of(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    if "prompts" in batch:
        return _prompts(batch["prompts"], batch.get("prompt_attention_mask"))
    given = _sequences_of(batch, "where the student writes and there are no 'prompts'")
    before = (given.labels != IGNORED).cumsum(-1) == 0
    return _prompts(
        given.input_ids,
        (given.attention_mask != 0) & before,
        "prompts, which are the tokens before a row's first label,",
    )


def _packed(there: Tensor, *values: Tensor, last: bool) -> Any:
    """[B, S] tensors whose columns that are there come last (or first), in their order; no wider than need be."""
    order = there.to(torch.int8).argsort(dim=-1, descending=not last, stable=True)
    width = int(there.sum(-1).max()) if there.numel() else 0
    order = order[:, order.shape[1] - width :] if last else order[:, :width]
    return tuple(value.gather(-1, order) for value in values)


def _completed(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    pad_token_id: int,
    eos_token_id: int | Sequence[int] | None,
    generate: Mapping[str, Any],
) -> Sequences:
    """What the model makes of prompts that are padded on the left."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "the model must be a decoder, which goes on from its prompt; got an encoder-decoder"
        )
    pad_token_id = check_int("pad_token_id", pad_token_id)
    if eos_token_id is None:
        eos_token_id = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = _ends(eos_token_id)
    input_ids = input_ids.masked_fill(attention_mask == 0, pad_token_id)
    with _evaluating(model), torch.no_grad():
        written = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pad_token_id=pad_token_id,
            **({"eos_token_id": ends} if ends else {}),
            **generate,
        )
    ids = written if isinstance(written, Tensor) else written.sequences
    # An ordinary tensor: generate runs in inference mode in some models.
    ids = ids.clone()
    several = ids.shape[0] // max(input_ids.shape[0], 1)
    prompt = attention_mask.to(ids.device).repeat_interleave(several, 0)
    answer = _answers(ids[:, prompt.shape[1] :], ends, pad_token_id)
    there = torch.cat([prompt != 0, answer], -1)
    labels = ids.masked_fill(
        ~torch.cat([torch.zeros_like(prompt, dtype=torch.bool), answer], -1), IGNORED
    )
    ids = ids.masked_fill(~there, pad_token_id)
    return Sequences(*_packed(there, ids, there.long(), labels, last=False))


def _answers(ids: Tensor, ends: Sequence[int], pad_token_id: int) -> Tensor:
    """Which tokens of completions belong to them: up to the first end, and without padding at the end."""
    end = torch.isin(ids, torch.tensor(ends, dtype=ids.dtype, device=ids.device))
    there = end.cumsum(-1) - end.long() == 0
    if pad_token_id not in ends:  # a stop string, too, ends a completion early
        there &= (ids != pad_token_id).flip(-1).cumsum(-1).flip(-1) > 0
    return there


def _check_writes(argument: str, model: object) -> None:
    if not callable(getattr(model, "generate", None)):
        raise TypeError(f"{argument} must be a model that has generate, got {type(model).__name__}")


def _ends(eos_token_id: int | Sequence[int] | None) -> list[int]:
    """The ids after which a completion ends."""
    if eos_token_id is None:
        return []
    if isinstance(eos_token_id, Tensor):
        check_readable("eos_token_id", eos_token_id)
        eos_token_id = eos_token_id.flatten().tolist()
    several = isinstance(eos_token_id, Iterable) and not isinstance(eos_token_id, str)
    given = list(eos_token_id) if several else [eos_token_id]  # type: ignore[arg-type]  # several: iterable
    return [check_int("eos_token_id", value) for value in given]


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model in eval mode, and each of its modules in its own again."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _sampling(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Torch's random numbers seeded from the generator, and afterwards as they were."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator))
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed + (torch.distributed.get_rank() if distributed else 0))
        yield


def _kind(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
