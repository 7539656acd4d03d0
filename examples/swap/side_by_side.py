"""Code that the scripts in this folder share: a teacher, a student, measured runs and a table that compares them."""

import contextlib
import copy
import ctypes
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

EXAMPLES = Path(__file__).resolve().parents[1]
ASSETS = EXAMPLES.parent / "build" / "demo"
LAYERS = (0, 1, 2, 10, 20, 29)  # the layers of SmolLM2's 30 that the student keeps
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
PROVERBS = [
    ("A soft answer turneth away wrath:", "but grievous words stir up anger."),
    ("Pride goeth before destruction,", "and an haughty spirit before a fall."),
    ("Train up a child in the way he should go:", "and when he is old, he will not depart from it."),
    ("As cold waters to a thirsty soul,", "so is good news from a far country."),
    ("Iron sharpeneth iron;", "so a man sharpeneth the countenance of his friend."),
    ("Where no counsel is, the people fall:", "but in the multitude of counsellors there is safety."),
    ("A merry heart doeth good like a medicine:", "but a broken spirit drieth the bones."),
    ("Go to the ant, thou sluggard;", "consider her ways, and be wise."),
]  # fmt: skip

# Relative tolerances. Losses of the first step differ only by rounding: TRL's float32 loss is off by 5e-6 from float64.
# Later AdamW, which divides a gradient by its size, amplifies the rounding errors of earlier steps.
FIRST_STEP_TOLERANCE = 2e-5
CURVE_TOLERANCE = 5e-3

console = Console()

Batch = dict[str, Tensor]  # input_ids [B, S] and labels [B, S], which are -100 in the prompts
Note = Callable[[float], None]  # called with the loss at the end of each step
Training = Callable[[Note], None]


@dataclass
class Setting:
    """Models, tokenizer and text, the same for both runs."""

    teacher: LlamaForCausalLM
    student: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    text: Tensor  # token ids

    def new_student(self) -> LlamaForCausalLM:
        """Return a new student, always with the same weights."""
        return copy.deepcopy(self.student).train()

    def batches(self, steps: int, rows: int = 4, length: int = 64) -> list[Batch]:
        """Return batches of the text, which is repeated if necessary. Labels are shifted to the next token."""
        count = steps * rows * (length + 1)
        ids = self.text.repeat(-(-count // len(self.text)))[:count]
        return [_batch(batch) for batch in ids.view(steps, rows, length + 1)]


def _batch(ids: Tensor) -> Batch:
    """Make a batch of ids [B, S + 1]; labels are -100 in prompts of different lengths."""
    labels = ids[:, 1:].clone()
    for row, label in enumerate(labels):
        label[: 2 + row] = -100
    return {"input_ids": ids[:, :-1], "labels": labels}


def setting(tiny: bool, assets: Path) -> Setting:
    """Return SmolLM2-135M and a student with six of its layers, or two tiny models with random weights."""
    result = _tiny() if tiny else _smollm2(assets)
    result.tokenizer.chat_template = CHAT
    result.tokenizer.padding_side = "left"
    return result


def _smollm2(assets: Path) -> Setting:
    sys.path.append(str(EXAMPLES))
    import distill
    import smollm2

    teacher, tokenizer = distill.load_teacher("smollm2", assets)
    student = distill.keep_layers(teacher, LAYERS)
    distill.freeze_embeddings(student)
    text = distill.encode(smollm2.king_james(assets)[:40_000], tokenizer)
    return Setting(teacher.eval(), student, tokenizer, text)


def _tiny() -> Setting:
    words = ["<pad>", "<eos>", "<unk>", *dict.fromkeys(" ".join(map(" ".join, PROVERBS)).split())]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    torch.manual_seed(0)
    teacher, student = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.2,
                bos_token_id=None,
                eos_token_id=1,
                pad_token_id=0,
            )
        )
        for width in (48, 24)
    )
    text = torch.randint(len(special), len(words), (4096,))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    return Setting(teacher.eval(), student, wrapped, text)


@dataclass
class Run:
    """Measurements of one run."""

    losses: list[float]
    seconds: float  # per step, the median of all steps but the first
    peak_bytes: int | None


class _LossCallback(TrainerCallback):
    def __init__(self, note: Note) -> None:
        self._note = note

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:  # the last log is a summary
            self._note(logs["loss"])


def of_trainer(trainer: Any) -> Training:
    """Return a training with a transformers.Trainer that logs every step."""

    def train(note: Note) -> None:
        trainer.add_callback(_LossCallback(note))
        trainer.train()

    return train


def measured(training: Training) -> Run:
    """Train and measure; the peak is the increase of the process's resident memory (Linux only)."""
    gc.collect()
    # Return freed memory to the system, so that reusing it counts.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    before = _new_peak()
    losses: list[float] = []
    times = [time.perf_counter()]

    def note(loss: float) -> None:
        losses.append(loss)
        times.append(time.perf_counter())

    training(note)
    peak = None if before is None else _peak() - before
    steps = [end - start for start, end in itertools.pairwise(times)]
    return Run(losses, statistics.median(steps[1:] or steps), peak)


def _new_peak() -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current size
        return _peak()
    except OSError:
        return None


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def report(stock_name: str, stock: Run, ours: Run, tiny: bool) -> None:
    """Print both runs; exit with code 1 if the curves differ."""
    differences = [abs(b - a) / abs(a) for a, b in zip(stock.losses, ours.losses, strict=True)]
    table = Table()
    for column in ("step", stock_name, "fastkd", "difference"):
        table.add_column(column, justify="right")
    rows = zip(stock.losses, ours.losses, differences, strict=True)
    for step, (a, b, difference) in enumerate(rows, 1):
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{difference:.0e}")
    if not tiny:  # the costs of tiny models mean nothing
        table.add_section()
        ratio = f"{ours.seconds / stock.seconds:.2f} x"
        table.add_row("step time", f"{stock.seconds:.1f} s", f"{ours.seconds:.1f} s", ratio)
        if stock.peak_bytes and ours.peak_bytes is not None:
            sizes = (f"{run.peak_bytes / 2**20:.0f} MiB" for run in (stock, ours))
            table.add_row("peak memory", *sizes, f"{ours.peak_bytes / stock.peak_bytes:.2f} x")
        table.caption = "Time and memory include the models, which take most of both."
    console.print(table)
    agree = [d <= CURVE_TOLERANCE for d in differences]  # False for NaN
    if not (differences[0] <= FIRST_STEP_TOLERANCE and all(agree)):
        console.print(
            f"The curves differ by {differences[0]:.0e} in the first step (allowed: {FIRST_STEP_TOLERANCE}) and by up "
            f"to {max(differences):.0e} (allowed: {CURVE_TOLERANCE})."
        )
        raise typer.Exit(1)


def compare(
    stock_name: str, stock: Callable[[], Training], ours: Callable[[], Training], tiny: bool
) -> None:
    """Train with both losses and compare. fastkd runs first, so it bears the one-time costs of a first run."""
    after = measured(ours())
    report(stock_name, measured(stock()), after, tiny)
