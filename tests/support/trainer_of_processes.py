"""One process of a KDTrainer under DDP or FSDP2.

tests/compat/test_compat_transformers.py starts two, and calls run() for one alone."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from test_compat_transformers import LOSS, kd_trainer, losses, sentences
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

from support import tiny_models

CASES = (
    (False, "ddp", False),
    (True, "ddp", False),
    (True, "fsdp", False),
    (True, "fsdp", True),
    (True, "fsdp, head", False),
)


def run(fused: bool, how: str = "ddp", tied: bool = False) -> tuple[list[float], Tensor]:
    """Losses and weights of two steps, whose batches are the same on any number of processes.

    how: on several processes, "ddp", "fsdp" (FSDP2 with the layers as units) or "fsdp, head" (the lm_head too).
    tied: whether the student's lm_head is its embedding.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            per_device_train_batch_size=2 // processes,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            remove_unused_columns=False,
            seed=5,
        )
        trainer = kd_trainer(
            tiny_models.llama(seed=1, tie_word_embeddings=tied),
            args,
            train_dataset=sentences(),
            teacher_model=tiny_models.llama(width=24, seed=2),
            loss_kwargs=LOSS,
            fused=fused,
        )
        if how != "ddp" and processes > 1:
            # accelerate uses FSDP on GPUs only, and would wrap the models by DDP here.
            trainer.accelerator.prepare_model = lambda model, **_: model
            for model in (trainer.model, trainer.teacher_model):
                shard(model, lm_head=how == "fsdp, head")
        trainer.train()
        trained = [getattr(p, "full_tensor", p.detach)() for p in trainer.model.parameters()]
    return losses(trainer), torch.cat([parameter.detach().flatten() for parameter in trained])


def shard(model: Any, lm_head: bool) -> None:
    """Apply FSDP2 to a model, its layers and its lm_head."""
    inner = getattr(model, "module", model)
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    for module in (*inner.model.layers, *([inner.lm_head] if lm_head else []), inner):
        fully_shard(module, mesh=mesh)


if __name__ == "__main__":
    results = [run(*case) for case in CASES]
    if os.environ["RANK"] == "0":
        torch.save(results, Path(sys.argv[1]))
