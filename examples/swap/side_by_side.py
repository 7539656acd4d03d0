"""What the scripts here share: two models and batches to train on, and a table of two training curves."""

import copy
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

EXAMPLES = Path(__file__).resolve().parents[1]
ASSETS = EXAMPLES.parent / "build" / "demo"
LAYERS = (0, 1, 2, 10, 20, 29)  # of SmolLM2, that its student keeps
IGNORED = -100

Batch = dict[str, Tensor]  # input_ids [B, S] and labels [B, S], which are -100 in the prompts


@dataclass(frozen=True)
class Problem:
    """A teacher, a student to make as often as one wants, and batches."""

    teacher: PreTrainedModel
    new_student: Callable[[], PreTrainedModel]
    batches: list[Batch]


def problem(steps: int, tiny: bool) -> Problem:
    """SmolLM2 and six of its layers on the King James text; tiny: random models and random text."""
    if tiny:
        torch.manual_seed(0)
        teacher, student = _random_model(24, 3), _random_model(16, 2)
        ids = torch.randint(_VOCABULARY, (steps, 3, 12))
    else:
        sys.path.insert(0, str(EXAMPLES))
        import distill
        import smollm2

        teacher, tokenizer = smollm2.load(ASSETS)
        student = distill.keep_layers(teacher, LAYERS)
        distill.freeze_embeddings(student)
        text = smollm2.king_james(ASSETS)[: steps * 2000]
        ids = distill.encode(text, tokenizer)[: steps * 4 * 65].view(steps, 4, 65)
    return Problem(teacher.eval(), lambda: copy.deepcopy(student).train(), [_batch(x) for x in ids])


_VOCABULARY = 211


def _random_model(width: int, layers: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def _batch(ids: Tensor) -> Batch:
    """Of ids [B, S + 1]: the next token is the label, and prompts of different lengths have none."""
    labels = ids[:, 1:].clone()
    for row, label in enumerate(labels):
        label[: 2 + row] = IGNORED
    return {"input_ids": ids[:, :-1], "labels": labels}


@dataclass
class Run:
    """A training curve, and how long each step took."""

    losses: list[float]
    seconds: list[float]


def compare(stock: Run, ours: Run, tolerance: float) -> int:
    """Print both, step by step; 0, or 1 where a loss differs by more than the tolerance, relative."""
    table = Table("step", "stock", "fastkd", "difference")
    worst = 0.0
    for step, (a, b) in enumerate(zip(stock.losses, ours.losses, strict=True), 1):
        difference = abs(b - a) / abs(a)
        worst = difference if math.isnan(difference) else max(worst, difference)
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{difference:.1e}")
    console = Console()
    console.print(table)
    # The first step is the one that starts threads and fills caches, and is the stock loss's to begin with.
    times = [1e3 * statistics.median(run.seconds[1:] or run.seconds) for run in (stock, ours)]
    console.print(
        f"a whole step after the first, models included: {times[0]:.0f} ms and {times[1]:.0f} ms, "
        f"{times[0] / times[1]:.2f} times fastkd's"
    )
    if not worst <= tolerance:  # a NaN fails too
        console.print(f"[red]the curves differ by {worst:.1e}; {tolerance:.0e} is allowed[/red]")
        return 1
    console.print(f"the same curve: at most {worst:.1e} apart")
    return 0
