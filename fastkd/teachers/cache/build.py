"""Building a teacher cache from a causal language model."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.teachers import TopK
from fastkd.teachers.cache.format import CacheError, Manifest
from fastkd.teachers.cache.reader import TeacherCache
from fastkd.teachers.cache.writer import CacheWriter


def tokenizer_sha256(tokenizer: Any) -> str:
    """The digest of a Hugging Face tokenizer's vocabulary: equal where token ids mean the same."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def build_cache(
    path: str | os.PathLike[str],
    model: nn.Module,
    sequences: Iterable[Tensor | Sequence[int]],
    *,
    kind: str = "hidden",
    dtype: torch.dtype = torch.float32,
    shard_examples: int = 64,
    k: int = 64,
    temperature: float = 1.0,
    tokenizer_sha256: str | None = None,
    teacher: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Run a causal language model over token sequences and keep what it says; goes on where a killed build was.

    Args:
        path: the folder of the cache.
        model: a Hugging Face style model: called with ids [1, S] it returns an object with logits [1, S, V]. Kind
            "hidden" also needs base_model, whose last_hidden_state the head is applied to, and get_output_embeddings;
            its config tells the head's scale and softcap. It runs in eval mode, a sequence at a time.
        sequences: token ids [S] each; the same ones, in the same order, when a build goes on, and in every process.
        kind: "hidden", "topk" or "dense".
        dtype: what the teacher's values are rounded to.
        shard_examples: sequences a shard.
        k: entries a row, for kind "topk".
        temperature: of the log-probabilities, for kind "topk".
        tokenizer_sha256: see :func:`tokenizer_sha256`.
        teacher: a name for the teacher.
        rank: this process is the rank-th of `world_size` that build the cache; it runs the model over every
            `world_size`-th shard's sequences, and needs no other process.
        world_size: the number of processes.
        progress: called with the number of sequences done, or left to other processes, after each.

    Returns:
        The manifest of what this process has written.

    Raises:
        TypeError, ValueError: an argument is wrong, or the head does not give the model's logits.
        CacheError: as :class:`CacheWriter` and :class:`TeacherCache` raise it; or the sequences are none, or not those
            that the cache was begun with.
    """
    remaining = iter(sequences)
    first = next(remaining, None)
    if first is None:
        raise CacheError("sequences must be at least one, got none")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            settings = _settings(model, _input_ids(first), kind, dtype)
            if kind == "topk":
                settings |= {"k": k, "temperature": temperature}
            writer = CacheWriter(
                path,
                kind=kind,
                dtype=dtype,
                shard_examples=shard_examples,
                tokenizer_sha256=tokenizer_sha256,
                teacher=teacher,
                rank=rank,
                world_size=world_size,
                **settings,
            )
            with writer:
                done = writer.examples
                stored: TeacherCache | None = None
                if done:
                    stored = TeacherCache(writer.folder, verify="header", allow_incomplete=True)
                count = 0
                for index, sequence in enumerate(itertools.chain([first], remaining)):
                    if index // shard_examples % world_size == rank:
                        input_ids = _input_ids(sequence)
                        if stored is not None and count < done:
                            if not torch.equal(stored[count].input_ids, input_ids):
                                raise CacheError(
                                    f"{writer.folder} was begun with another sequence {index}"
                                )
                        else:
                            rows = _outputs(model, input_ids, kind, dtype, k, temperature)
                            writer.append(input_ids, **rows)
                        count += 1
                    if progress is not None:
                        progress(index + 1)
                if count < done:
                    raise CacheError(
                        f"{writer.folder} was begun with {done} sequences or more, not {count}"
                    )
    finally:
        model.train(was_training)
    return writer.manifest


def _input_ids(sequence: Tensor | Sequence[int]) -> Tensor:
    ids = torch.as_tensor(sequence).cpu()
    if ids.dim() != 1 or not len(ids) or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"sequences must be of int64 or int32 tokens, [S] with S > 0; got {ids.dtype}, {tuple(ids.shape)}"
        )
    return ids.long()


def _outputs(
    model: nn.Module, input_ids: Tensor, kind: str, dtype: torch.dtype, k: int, temperature: float
) -> dict[str, Any]:
    """The arguments of append."""
    if kind == "hidden":
        return {"hidden": _hidden(model, input_ids).to(dtype)}
    logits = _logits(model, input_ids)
    if kind == "dense":
        return {"logits": logits.to(dtype)}
    topk = TopK.from_logits(logits, k, temperature=temperature)
    assert topk.tail_logprob is not None  # from_logits gives it
    logprobs, tail_logprob = topk.logprobs.to(dtype), topk.tail_logprob.to(dtype)
    return {"topk": replace(topk, logprobs=logprobs, tail_logprob=tail_logprob)}


def _on_device(model: nn.Module, input_ids: Tensor) -> Tensor:
    parameter = next(model.parameters(), None)
    return input_ids[None] if parameter is None else input_ids[None].to(parameter.device)


def _logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    return model(_on_device(model, input_ids)).logits[0]


def _hidden(model: Any, input_ids: Tensor) -> Tensor:
    return model.base_model(_on_device(model, input_ids)).last_hidden_state[0]


def _settings(model: Any, input_ids: Tensor, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """The writer's arguments that the model decides; raises ValueError where a head is not all of a linear one."""
    logits = _logits(model, input_ids)
    vocab_size = logits.shape[-1]
    if kind != "hidden":
        return {"vocab_size": vocab_size}
    head = model.get_output_embeddings()
    weight, bias = head.weight.detach(), getattr(head, "bias", None)
    config = model.config.get_text_config()
    # Cohere multiplies the logits, Granite divides them, Gemma caps them.
    scale = float(getattr(config, "logit_scale", None) or 1.0) / getattr(
        config, "logits_scaling", 1.0
    )
    softcap = getattr(config, "final_logit_softcapping", None)
    again = F.linear(_hidden(model, input_ids), weight, bias).float() * scale
    if softcap is not None:
        again = softcap * torch.tanh(again / softcap)
    gap = (again - logits.float()).abs().max().item()
    # A head that is not understood is wrong by the size of its logits; a right one in bfloat16 by a hundredth of it.
    if not gap <= 0.05 * logits.float().abs().max().item():
        raise ValueError(
            f"kind 'hidden' needs logits that are linear in the hidden states; those of this model differ by {gap:.3g}"
        )
    return {
        "vocab_size": vocab_size,
        "weight": weight.to(dtype),
        "bias": None if bias is None else bias.detach().to(dtype),
        "logit_scale": scale,
        "softcap": softcap,
    }
