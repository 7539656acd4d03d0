"""One process of a training under DeepSpeed ZeRO-3. tests/compat/test_compat_heads.py starts two."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from test_compat_transformers import batches_of, kd_trainer, sentences
from transformers import TrainingArguments

from fastkd.parallel import num_items
from support import spread_heads, tiny_models

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1e6,  # by default, DeepSpeed clips at a norm of 1
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def train(tied: bool, steps: int) -> dict[str, torch.Tensor]:
    """The student's parameters after some steps."""
    student, teacher = spread_heads.Model(1, tied=tied), spread_heads.Model(2, 40)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=CONFIG)
    target, *_ = deepspeed.initialize(model=teacher.requires_grad_(False), config=CONFIG)
    target.eval()
    weight = student.lm_head.weight
    assert weight.ds_status is ZeroParamStatus.NOT_AVAILABLE and weight.numel() == 0
    for step in range(steps):
        tokens, labels = (
            part.chunk(dist.get_world_size())[dist.get_rank()]
            for part in spread_heads.batch_of(step)
        )
        loss = spread_heads.of_hidden_states(engine, target, tokens, labels, num_items(labels))
        engine.backward(loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(student.parameters())):
        return {name: p.detach().clone() for name, p in student.named_parameters()}


def by_kd_trainer(tied: bool, folder: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The losses and parameters of three steps of KDTrainer's loss; alone, of the loss of logits.

    zero.Init has partitioned the teacher, as transformers does.
    """
    args = TrainingArguments(output_dir=folder, use_cpu=True, report_to=[])
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    (batch,) = batches_of(sentences(), 8)
    student = tiny_models.llama(seed=1, tie_word_embeddings=tied)
    teacher = tiny_models.llama(width=24, seed=2)
    runs = student
    if size > 1:
        deepspeed.zero.Init(module=teacher, config_dict_or_path=CONFIG)
    trainer = kd_trainer(student, args, teacher_model=teacher, fused=size > 1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3)
    if size > 1:
        runs, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=CONFIG)
        assert isinstance(trainer.teacher_model, deepspeed.DeepSpeedEngine)
    items = (batch["labels"][:, 1:] != -100).sum()  # of all processes, as the Trainer counts them
    losses = []
    for _ in range(3):
        inputs = {name: value.chunk(size)[rank] for name, value in batch.items()}
        loss = trainer.compute_loss(runs, inputs, num_items_in_batch=items)
        (runs.backward if size > 1 else torch.Tensor.backward)(loss)
        (runs if size > 1 else optimizer).step()
        student.zero_grad()
        loss = loss.detach().clone()
        if size > 1:
            dist.all_reduce(loss)
        losses.append(loss / size)
    gathered = (
        deepspeed.zero.GatheredParameters(list(student.parameters())) if size > 1 else nullcontext()
    )
    with gathered:
        return losses, {name: p.detach().clone() for name, p in student.named_parameters()}


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="gloo")
    results: list[Any] = [train(tied, 20) for tied in (False, True)]
    results += [by_kd_trainer(tied, sys.argv[1] + " of a Trainer") for tied in (False, True)]
    if dist.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]))
