"""Building a teacher cache from a causal language model."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """Return a digest of a Hugging Face tokenizer's vocabulary; equal digests mean equal token ids."""
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
    """Run a causal language model over token sequences and store its outputs; resumes an interrupted build.

    Args:
        path: the folder of the cache.
        model: a model in the style of Hugging Face: called with ids [1, S], it returns an object with logits [1, S, V].
            Kind "hidden" also needs base_model, whose last_hidden_state is the input of the lm_head, and
            get_output_embeddings; the scale and softcap of the logits are read from its config. The model runs in eval
            mode, one sequence at a time.
        sequences: token ids [S] each. Every process, and a resumed build, must pass the same sequences in the same
            order.
        kind: "hidden", "topk" or "dense".
        dtype: the dtype in which the teacher's outputs are stored.
        shard_examples: the number of sequences per shard.
        k: the number of entries per row, for kind "topk".
        temperature: the temperature of the log-probabilities, for kind "topk".
        tokenizer_sha256: see :func:`tokenizer_sha256`.
        teacher: a name for the teacher, for people.
        rank: the rank of this process among the `world_size` that build the cache. It runs the model over every
            `world_size`-th shard and does not communicate with the others.
        world_size: the number of processes.
        progress: function called after each sequence with the number of sequences finished so far, including those of
            other processes.

    Returns:
        The manifest of what this process has written.

    Raises:
        TypeError, ValueError: an argument is invalid, or the lm_head does not reproduce the model's logits.
        CacheError: there are no sequences, or they differ from those that the cache was started with; or an error of
            :class:`CacheWriter` or :class:`TeacherCache`.
    """
    first, sequences = at_least_one(sequences)
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
                unwritten = remaining(writer, sequences, shard_examples, rank, world_size)
                for index, input_ids in unwritten:
                    if input_ids is not None:
                        rows = _outputs(model, input_ids, kind, dtype, k, temperature)
                        writer.append(input_ids, **rows)
                    if progress is not None:
                        progress(index + 1)
    finally:
        model.train(was_training)
    return writer.manifest


def at_least_one(
    sequences: Iterable[Tensor | Sequence[int]],
) -> tuple[Tensor | Sequence[int], Iterable[Tensor | Sequence[int]]]:
    """Return the first sequence, and all of them; raise CacheError if there is none."""
    following = iter(sequences)
    first = next(following, None)
    if first is None:
        raise CacheError("sequences must be at least one, got none")
    return first, itertools.chain([first], following)


def remaining(
    writer: CacheWriter,
    sequences: Iterable[Tensor | Sequence[int]],
    shard_examples: int,
    rank: int,
    world_size: int,
) -> Iterator[tuple[int, Tensor | None]]:
    """Yield the index and the ids of each sequence that this process has to write next, in order.

    Instead of ids, None stands for a sequence that is in the cache already, or belongs to another process.

    Raises:
        CacheError: the cache was begun with other sequences, or with more.
    """
    done = writer.examples
    stored: TeacherCache | None = None
    if done:
        stored = TeacherCache(writer.folder, verify="header", allow_incomplete=True)
    count = 0
    for index, sequence in enumerate(sequences):
        if index // shard_examples % world_size != rank:
            yield index, None
            continue
        input_ids = _input_ids(sequence)
        known = stored[count].input_ids if stored is not None and count < done else None
        if known is not None and not torch.equal(known, input_ids):
            raise CacheError(
                f"{writer.folder} was begun with a different sequence {index}; pass the same "
                "sequences in the same order, or build into another folder"
            )
        count += 1
        yield index, input_ids if known is None else None
    if count < done:
        raise CacheError(
            f"{writer.folder} was begun with at least {done} sequences, got {count}; pass all of them"
        )


def _input_ids(sequence: Tensor | Sequence[int]) -> Tensor:
    ids = torch.as_tensor(sequence).cpu()
    if ids.dim() != 1 or not len(ids) or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"sequences must be int64 or int32 token ids [S] with S > 0, got {ids.dtype} {tuple(ids.shape)}"
        )
    return ids.long()


def _outputs(
    model: nn.Module, input_ids: Tensor, kind: str, dtype: torch.dtype, k: int, temperature: float
) -> dict[str, Any]:
    """Run the model and return the keyword arguments of CacheWriter.append."""
    if kind == "hidden":
        return {"hidden": _hidden(model, input_ids).to(dtype)}
    logits = _logits(model, input_ids)
    if kind == "dense":
        return {"logits": logits.to(dtype)}
    topk = TopK.from_logits(logits, k, temperature=temperature)
    assert topk.tail_logprob is not None  # because from_logits computes it
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
    """Return the writer's arguments that depend on the model.

    Raises:
        ValueError: the lm_head with the scale and softcap of the config does not reproduce the model's logits.
    """
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
    recomputed = F.linear(_hidden(model, input_ids), weight, bias).float() * scale
    if softcap is not None:
        recomputed = softcap * torch.tanh(recomputed / softcap)
    gap = (recomputed - logits.float()).abs().max().item()
    # Rounding errors of bfloat16 are about 1 % of the logits. A head with an unknown transformation is off by 100 %.
    if not gap <= 0.05 * logits.float().abs().max().item():
        raise ValueError(
            "kind 'hidden' needs logits that are linear in the hidden states, up to logit_scale and softcap of the "
            f"config; those of this model differ by {gap:.3g}. Use kind 'topk' or 'dense'"
        )
    return {
        "vocab_size": vocab_size,
        "weight": weight.to(dtype),
        "bias": None if bias is None else bias.detach().to(dtype),
        "logit_scale": scale,
        "softcap": softcap,
    }
