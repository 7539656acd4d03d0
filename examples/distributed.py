r"""The demo's distillation on several processes, which must reproduce the loss curve of one process.

    python examples/distributed.py                    # all modes in turn, and a table
    torchrun --nproc-per-node 2 examples/distributed.py --mode tp --compare build/one.json

The teacher is SmolLM2-135M; the student has six of its layers and an lm_head of its own. Both run on the King James
text, on CPUs (gloo). In both modes every process runs both models on its part of a batch's sequences. The modes differ
in the lm_heads:

    tp      vocabulary-parallel: a process has some rows of both heads, and the hidden states of all sequences, which
            sequence_dim=0 gathers. No process holds a full head, or the logits of a full row.
    fsdp    data-parallel with the student's weights sharded by FSDP2: a process has the hidden states of its own
            sequences and, during the loss, the full head.

`--curve FILE` writes the loss of every step; `--compare FILE` fails unless the curve equals that of another run.
"""

import json
import os
import subprocess
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from distill import (
    Corpus,
    console,
    encode,
    keep_layers,
    load_teacher,
    load_text,
    require,
    require_positive,
)
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

import fastkd
from fastkd import parallel

LAYERS = (0, 1, 2, 10, 20, 29)
BATCH = 4  # sequences per step, over all processes
CHARACTERS = 400_000  # length of the text's beginning that is used, more than a run reads
RUNS = (("one", 1), ("tp", 2), ("tp", 4), ("fsdp", 2), ("fsdp", 4))

# Relative tolerances. The first losses differ only by the rounding of sums. The optimizer amplifies this from step to
# step: to 5e-7 in six steps, and to 1e-3 in about thirty (examples/demo.py).
FIRST_STEP_TOLERANCE = 1e-5
CURVE_TOLERANCE = 1e-4


class Mode(str, Enum):
    """How the lm_heads are distributed over the processes."""

    one = "one"
    tp = "tp"
    fsdp = "fsdp"


class Learner:
    """The part of the student that one process holds, with its loss."""

    def __init__(self, teacher: PreTrainedModel, mode: Mode, lr: float) -> None:
        self.mode, self.lr, self.steps = mode, lr, 0
        self.teacher = teacher.base_model
        self.teacher_head = teacher.lm_head.weight.detach()
        self.body = keep_layers(teacher, LAYERS).model.train()
        self.body.embed_tokens.requires_grad_(False)
        # A module, because FSDP shards modules. It starts as a copy of the teacher's and is trained.
        self.head = nn.Linear(*reversed(self.teacher_head.shape), bias=False)
        self.head.weight.data = self.teacher_head.clone()
        if mode is Mode.tp:
            self._split_heads()
        if mode is Mode.fsdp:
            self._shard_weights()
        self.trained = [weight for weight in self.body.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [*self.trained, self.head.weight], lr=lr, weight_decay=0.0
        )

    def _split_heads(self) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        self.teacher_head = self.teacher_head.tensor_split(size)[rank].clone()
        self.head.weight.data = self.head.weight.data.tensor_split(size)[rank].clone()

    def _shard_weights(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        # The head's forward is never called, so FSDP does not gather its weight; the loss gathers the DTensor.
        for module in (*self.body.layers, self.body, self.head):
            fully_shard(module, mesh=mesh)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the loss from the ids of this process's sequences and the labels [B, S] of all sequences."""
        hidden = self.body(ids, use_cache=False).last_hidden_state
        with torch.no_grad():
            states = self.teacher(ids, use_cache=False).last_hidden_state
        teacher = fastkd.LinearTeacher(states, self.teacher_head)
        options: dict[str, Any] = {}
        if self.mode is Mode.tp:  # labels of all sequences, some rows of the heads
            options = {"process_group": dist.group.WORLD, "sequence_dim": 0}
        if (
            self.mode is Mode.fsdp
        ):  # labels of this process's sequences, averaged over those of all processes
            targets = local_part(targets)
            options = {"num_items": parallel.num_items(targets)}
        return fastkd.fused_linear_kd_loss(hidden, self.head.weight, teacher, targets, **options)

    def step(self, ids: Tensor, targets: Tensor) -> float:
        """Train on the token ids and labels [B, S] of all processes; return the loss over all of them."""
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, self.steps / 5)
        loss = self.loss(local_part(ids), targets)
        loss.backward()
        if self.mode is Mode.tp:  # each process has the body's gradient for its own sequences only
            for weight in self.trained:
                dist.all_reduce(weight.grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss.detach()
        if self.mode is Mode.fsdp:  # average the losses, as FSDP averages the gradients
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        return float(loss)


def local_part(batch: Tensor) -> Tensor:
    """Return this process's part of a batch."""
    return batch.tensor_split(processes())[dist.get_rank()] if dist.is_initialized() else batch


def processes() -> int:
    """Return the number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def labels_of(batch: Tensor) -> Tensor:
    """Return labels [B, S] of token ids [B, S + 1]; prompts at the beginnings, of different lengths, are dropped."""
    labels = batch[:, 1:].clone()
    for row, sequence in enumerate(labels):
        sequence[: (row + 1) * len(sequence) // (2 * len(labels))] = -100
    return labels


def say(text: str) -> None:
    """Print on the first process only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def train(mode: Mode, steps: int, length: int, lr: float, seed: int, assets: Path) -> dict:
    """Train and return the content of the --curve file."""
    title = f"{mode.value} x {processes()}"
    say(f"{title}: loading SmolLM2-135M and the King James text")
    teacher, tokenizer = load_teacher("smollm2", assets)
    text = load_text(None, assets)[:CHARACTERS]
    corpus = Corpus(encode(text, tokenizer), length, BATCH, 0, seed)
    learner = Learner(teacher, mode, lr)
    curve, seconds = [], []
    for step in range(steps):
        start = time.perf_counter()
        batch = corpus.batch(step)
        curve.append(learner.step(batch[:, :-1], labels_of(batch)))
        seconds.append(time.perf_counter() - start)
        say(f"{title}: step {step + 1} of {steps}, loss {curve[-1]:.6f}, {seconds[-1]:.1f} s")
    settings = {"steps": steps, "sequence_length": length, "lr": lr, "seed": seed}
    return {
        "mode": mode.value,
        "processes": processes(),
        "settings": settings,
        "curve": curve,
        "seconds": seconds,
    }


def differences(run: dict, other: dict, tolerance: float) -> list[float]:
    """Return the relative difference of each step; SystemExit if one exceeds the tolerance."""
    if run["settings"] != other["settings"]:
        raise SystemExit(
            f"the runs have different settings: {run['settings']} and {other['settings']}"
        )
    gaps = [abs(a - b) / abs(b) for a, b in zip(run["curve"], other["curve"], strict=True)]
    for step, difference in enumerate(gaps, start=1):
        allowed = FIRST_STEP_TOLERANCE if step == 1 else tolerance
        if not difference <= allowed:  # a NaN fails too
            raise SystemExit(
                f"step {step} of {run['mode']} x {run['processes']}: {run['curve'][step - 1]}, on one process "
                f"{other['curve'][step - 1]}; the relative difference is {difference:.1e}, allowed is {allowed:.0e}"
            )
    return gaps


def run_all(output: Path, tolerance: float, arguments: list[str]) -> None:
    """Run every mode in new processes, and print the table."""
    output.mkdir(parents=True, exist_ok=True)
    runs = []
    for mode, count in RUNS:
        curve = output / f"{mode}-{count}.json"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        own = ["--mode", mode, "--curve", str(curve)]
        subprocess.run(
            [sys.executable, *launch, __file__, *own, *arguments],
            check=True,
            # torchrun warns if OMP_NUM_THREADS is not set.
            env=os.environ | {"OMP_NUM_THREADS": str(threads(count))},
        )
        runs.append(json.loads(curve.read_text(encoding="utf-8")))
    console.print(table(runs, tolerance))


def table(runs: list[dict], tolerance: float) -> Table:
    """Return a table of the curves and their differences from the first."""
    result = Table("step", *(f"{run['mode']} x {run['processes']}" for run in runs))
    for step, values in enumerate(zip(*(run["curve"] for run in runs), strict=True), start=1):
        result.add_row(str(step), *(f"{value:.6f}" for value in values))
    result.add_section()
    largest = (max(differences(run, runs[0], tolerance)) for run in runs[1:])
    result.add_row("largest difference", "", *(f"{value:.1e}" for value in largest))
    medians = [sorted(run["seconds"])[len(run["seconds"]) // 2] for run in runs]
    result.add_row("median step", *(f"{median:.1f} s" for median in medians))
    result.caption = "relative differences from the run on one process"
    return result


def threads(count: int) -> int:
    """Return the number of threads for each of `count` processes on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // count)


def main(
    mode: Annotated[
        Mode | None, typer.Option(help="The mode; without it and without torchrun: all modes.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of training steps.")] = 6,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of the order of batches.")] = 0,
    curve: Annotated[
        Path | None, typer.Option(help="File to write the loss of every step to.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="A --curve file that this run must reproduce.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest relative difference of curves after the first step.")
    ] = CURVE_TOLERANCE,
    output: Annotated[
        Path, typer.Option(help="Folder for the curves if all modes are run.", file_okay=False)
    ] = Path("build/demo-distributed"),
    assets: Annotated[
        Path, typer.Option(help="Folder in which demo-requirements.txt was installed.")
    ] = Path("build/demo"),
) -> None:
    """Distil on several processes."""
    require_positive(steps=steps, sequence_length=sequence_length, lr=lr, tolerance=tolerance)
    launched = "RANK" in os.environ
    if mode is None and not launched:
        settings = {"steps": steps, "sequence-length": sequence_length, "lr": lr, "seed": seed}
        options = [f"--{name}={value}" for name, value in settings.items()]
        run_all(output, tolerance, [*options, f"--assets={assets}"])
        return
    mode = mode or Mode.tp
    count = int(os.environ.get("WORLD_SIZE", "1"))
    fits = count == 1 if mode is Mode.one else launched and BATCH % count == 0
    allowed = "one on 1 process, tp and fsdp on 1, 2 or 4 processes of torchrun"
    require("--mode", f"{mode.value} on {count} processes", allowed, fits)
    torch.set_num_threads(threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if mode is not Mode.one:
        dist.init_process_group("gloo")
    try:
        run = train(mode, steps, sequence_length, lr, seed, assets)
        if curve is not None and (mode is Mode.one or dist.get_rank() == 0):
            curve.parent.mkdir(parents=True, exist_ok=True)
            curve.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        if compare is not None:
            other = json.loads(compare.read_text(encoding="utf-8"))
            largest = max(differences(run, other, tolerance))
            say(f"the curve equals that of {compare} within {largest:.1e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
