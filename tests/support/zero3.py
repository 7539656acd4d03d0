"""One process of a training under DeepSpeed ZeRO-3. tests/compat/test_compat_heads.py starts two."""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import spread_heads
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from fastkd.parallel import num_items

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
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


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="gloo")
    results = [train(tied, 20) for tied in (False, True)]
    if dist.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]))
