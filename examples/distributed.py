r"""The demo's distillation over several processes: their curves are those of one process.

    python examples/distributed.py                    # all ways one after the other, and a table
    torchrun --nproc-per-node 2 examples/distributed.py --mode tp --compare build/one.json

SmolLM2-135M teaches six of its layers and a head of their own on the King James text, on CPUs (gloo). The two ways
have in common that every process runs both models on its share of a batch's sequences. They differ in the heads:

    tp      vocabulary-parallel: a process has some rows of both heads, and the hidden states of all sequences
            (sequence_dim=0 gathers them). No process has a whole head, nor logits of a whole row.
    fsdp    data-parallel, with the student's weights spread by FSDP2: a process has its own sequences and, while
            the loss is computed, the whole head.

`--curve FILE` writes the loss of every step, and `--compare FILE` fails where it is not that of another run.
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
BATCH = 4  # sequences a step, of all processes
CHARACTERS = 400_000  # of the text, which is more than a run reads
WAYS = (("one", 1), ("tp", 2), ("tp", 4), ("fsdp", 2), ("fsdp", 4))

# Relative. The first loss differs by the rounding of sums alone. The optimizer enlarges that from step to step: to 5e-7
# in six steps, and to 1e-3 in some thirty (examples/demo.py).
FIRST_STEP_TOLERANCE = 1e-5
CURVE_TOLERANCE = 1e-4


class Mode(str, Enum):
    """How the heads are spread over the processes."""

    one = "one"
    tp = "tp"
    fsdp = "fsdp"


class Learner:
    """The student of one process: its part of the weights, and its loss."""

    def __init__(self, teacher: PreTrainedModel, mode: Mode, lr: float) -> None:
        self.mode, self.lr, self.steps = mode, lr, 0
        self.teacher = teacher.base_model
        self.teacher_head = teacher.lm_head.weight.detach()
        self.body = keep_layers(teacher, LAYERS).model.train()
        self.body.embed_tokens.requires_grad_(False)
        # As a module, for FSDP; it starts as the teacher's, and is trained.
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
        # The head's forward is never called: its weight stays a DTensor, which the loss gathers.
        for module in (*self.body.layers, self.body, self.head):
            fully_shard(module, mesh=mesh)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Of this process's sequences and all labels [B, S]; its gradient is what the optimizer steps along."""
        hidden = self.body(ids, use_cache=False).last_hidden_state
        with torch.no_grad():
            states = self.teacher(ids, use_cache=False).last_hidden_state
        teacher = fastkd.LinearTeacher(states, self.teacher_head)
        options: dict[str, Any] = {}
        if self.mode is Mode.tp:  # labels of all sequences, rows of the heads
            options = {"process_group": dist.group.WORLD, "sequence_dim": 0}
        if (
            self.mode is Mode.fsdp
        ):  # the labels of these sequences, and how many count on all processes
            targets = share(targets)
            options = {"num_items": parallel.num_items(targets)}
        return fastkd.fused_linear_kd_loss(hidden, self.head.weight, teacher, targets, **options)

    def step(self, ids: Tensor, targets: Tensor) -> float:
        """Train on token ids and labels [B, S] of all processes; the loss over all of them."""
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, self.steps / 5)
        loss = self.loss(share(ids), targets)
        loss.backward()
        if self.mode is Mode.tp:  # of the body each process has its own sequences' gradient
            for weight in self.trained:
                dist.all_reduce(weight.grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss.detach()
        if self.mode is Mode.fsdp:  # a mean of losses, as the gradient is one of gradients
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        return float(loss)


def share(batch: Tensor) -> Tensor:
    """This process's part of a batch."""
    return batch.tensor_split(processes())[dist.get_rank()] if dist.is_initialized() else batch


def processes() -> int:
    """Of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def labels_of(batch: Tensor) -> Tensor:
    """[B, S] of token ids [B, S + 1]: the beginning of a sequence is a prompt, longer in each, and does not count."""
    labels = batch[:, 1:].clone()
    for row, sequence in enumerate(labels):
        sequence[: (row + 1) * len(sequence) // (2 * len(labels))] = -100
    return labels


def say(text: str) -> None:
    """On the first process."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def train(mode: Mode, steps: int, length: int, lr: float, seed: int, assets: Path) -> dict:
    """What --curve writes."""
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
    """The relative difference of each step; SystemExit where it passes the tolerance."""
    if run["settings"] != other["settings"]:
        raise SystemExit(f"other settings: {run['settings']} and {other['settings']}")
    found = [abs(a - b) / abs(b) for a, b in zip(run["curve"], other["curve"], strict=True)]
    for step, difference in enumerate(found, start=1):
        allowed = FIRST_STEP_TOLERANCE if step == 1 else tolerance
        if not difference <= allowed:  # a NaN fails too
            raise SystemExit(
                f"step {step} of {run['mode']} x {run['processes']}: {run['curve'][step - 1]}, on one process "
                f"{other['curve'][step - 1]}; they differ by {difference:.1e} of it, allowed is {allowed:.0e}"
            )
    return found


def run_all(output: Path, tolerance: float, arguments: list[str]) -> None:
    """Every way in processes of its own, and the table."""
    output.mkdir(parents=True, exist_ok=True)
    runs = []
    for mode, count in WAYS:
        curve = output / f"{mode}-{count}.json"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        own = ["--mode", mode, "--curve", str(curve)]
        subprocess.run(
            [sys.executable, *launch, __file__, *own, *arguments],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads(count))},  # or torchrun warns
        )
        runs.append(json.loads(curve.read_text(encoding="utf-8")))
    console.print(table(runs, tolerance))


def table(runs: list[dict], tolerance: float) -> Table:
    """Curves side by side, and how far each is from the first."""
    shown = Table("step", *(f"{run['mode']} x {run['processes']}" for run in runs))
    for step, values in enumerate(zip(*(run["curve"] for run in runs), strict=True), start=1):
        shown.add_row(str(step), *(f"{value:.6f}" for value in values))
    shown.add_section()
    largest = (max(differences(run, runs[0], tolerance)) for run in runs[1:])
    shown.add_row("largest difference", "", *(f"{value:.1e}" for value in largest))
    medians = [sorted(run["seconds"])[len(run["seconds"]) // 2] for run in runs]
    shown.add_row("median step", *(f"{median:.1f} s" for median in medians))
    shown.caption = "differences are relative, from one process"
    return shown


def threads(count: int) -> int:
    """Of each of that many processes on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // count)


def main(
    mode: Annotated[
        Mode | None, typer.Option(help="Of this run; without it and without torchrun: all.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 6,
    sequence_length: Annotated[int, typer.Option(help="Tokens in each of the sequences.")] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the batches' order.")] = 0,
    curve: Annotated[Path | None, typer.Option(help="Gets the loss of every step.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="A --curve of one process that this one has to equal.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="How far curves may be apart, relative, after the first step.")
    ] = CURVE_TOLERANCE,
    output: Annotated[
        Path, typer.Option(help="Gets the curves where all ways are run.", file_okay=False)
    ] = Path("build/demo-distributed"),
    assets: Annotated[Path, typer.Option(help="Where demo-requirements.txt was installed.")] = (
        Path("build/demo")
    ),
) -> None:
    """Distil on several processes."""
    require_positive(steps=steps, sequence_length=sequence_length, lr=lr, tolerance=tolerance)
    launched = "RANK" in os.environ
    if mode is None and not launched:
        given = {"steps": steps, "sequence-length": sequence_length, "lr": lr, "seed": seed}
        options = [f"--{name}={value}" for name, value in given.items()]
        run_all(output, tolerance, [*options, f"--assets={assets}"])
        return
    mode = mode or Mode.tp
    count = int(os.environ.get("WORLD_SIZE", "1"))
    fits = count == 1 if mode is Mode.one else launched and BATCH % count == 0
    allowed = "one on 1, tp and fsdp on 1, 2 or 4 of torchrun"
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
            say(f"the curve is that of {compare} within {largest:.1e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
