"""One process of a KDTrainer under DDP. tests/compat/test_compat_transformers.py starts two, and calls run() for one
alone."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from test_compat_transformers import LOSS, kd_trainer, losses, sentences, weights
from torch import Tensor
from transformers import TrainingArguments

from support import tiny_models


def run(fused: bool) -> tuple[list[float], Tensor]:
    """Losses and weights of two steps, whose batches are the same on any number of processes."""
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
            tiny_models.llama(seed=1),
            args,
            train_dataset=sentences(),
            teacher_model=tiny_models.llama(width=24, seed=2),
            loss_kwargs=LOSS,
            fused=fused,
        )
        trainer.train()
    return losses(trainer), weights(trainer.model)


if __name__ == "__main__":
    results = [run(fused) for fused in (False, True)]
    if os.environ["RANK"] == "0":
        torch.save(results, Path(sys.argv[1]))
