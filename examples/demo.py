"""Run the same distillation twice, side by side: with the loss in eager PyTorch and with fastkd.

    python examples/demo.py

The teacher is SmolLM2-135M, with a vocabulary of 49,152 tokens; the student has six of its layers. Both
train on the King James text. The two students start with equal weights and see the same batches and the
same teacher. They take steps in turn, so other load on the machine affects both. Their first gradients
and their training curves must agree. `--teacher` selects the form of the teacher: logits, hidden states
with its lm_head, its most probable tokens, or hidden states read from disk. The run measures:

- loss time: from the logits (or hidden states) of both models to the gradient with respect to the
  student's, per step;
- extra loss memory: the increase of the process's peak resident memory during this computation,
  including the gradient. It is measured by the system (Linux only), so it includes every allocation.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from distill import (
    EAGER_DIVERGENCES,
    Corpus,
    Distiller,
    Quality,
    console,
    encode,
    evaluate,
    freeze_embeddings,
    keep_layers,
    load_teacher,
    load_text,
    progress_bar,
    require,
    require_positive,
)
from rich.table import Table
from teacher_forms import Form, Teacher, first_token, losses, on_hidden_states
from torch import Tensor

import fastkd

LAYERS = (0, 1, 2, 10, 20, 29)
MIB = 2**20

# Relative tolerances. In the first step weights and logits are equal, so values and gradients differ
# only by rounding: on this text those of eager PyTorch are off by 1e-5 from float64, those of fastkd
# by 1e-7. Later the rounding errors pass through the model and AdamW. AdamW divides by the size of the
# gradient, which amplifies errors where the gradient is near 0: two runs of eager PyTorch with the loss
# in float64 and in float32 differ by 1e-5 after 9 steps and by 1e-3 after 28.
FIRST_STEP_TOLERANCE = 1e-4
CURVE_TOLERANCE = 2e-2


class _KnownGradient(torch.autograd.Function):
    """Loss with a gradient that has already been computed."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream * ctx.saved_tensors[0], None, None


class TimedLoss:
    """A loss that records how long its forward and backward take, up to the gradient of its input."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss
        self.seconds: list[float] = []

    def __call__(self, student: Tensor, teacher: Any, labels: Tensor) -> Tensor:
        """Compute the loss and its gradient at once; the model's backward receives the gradient."""
        start = time.perf_counter()
        loss, gradient = loss_and_gradient(self.loss, student, teacher, labels)
        self.seconds.append(time.perf_counter() - start)
        return _KnownGradient.apply(student, loss, gradient)


def loss_and_gradient(
    loss: Callable[..., Tensor], student: Tensor, teacher: Any, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient with respect to the student's logits or hidden states."""
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        value = loss(leaf, teacher, labels)
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def extra_memory(
    loss: Callable[..., Tensor], student: Tensor, teacher: Any, labels: Tensor
) -> int | None:
    """Return the bytes by which the loss and its gradient raise the peak resident memory.

    The measurement starts before the loss first sees tensors of this size, so buffers that it caches
    between calls count too. None if the system does not report the peak.
    """
    # Run one row first, so that loading code and starting threads is not counted.
    loss_and_gradient(loss, student[:, :1], first_token(teacher), labels[:, :1])
    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current size
        before = _status_bytes("VmHWM")
        for _ in range(2):
            loss_and_gradient(loss, student, teacher, labels)
        return _status_bytes("VmHWM") - before
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


@dataclass(frozen=True)
class Outcome:
    """Measurements of one of the two students."""

    curve: list[float]
    loss_seconds: list[float]
    extra_loss_bytes: int | None
    after: Quality

    @property
    def milliseconds(self) -> float:
        """Median loss time per step."""
        return 1e3 * statistics.median(self.loss_seconds)


def check_curves(eager: Sequence[float], fused: Sequence[float]) -> list[float]:
    """Return the relative difference of each step; AssertionError if one exceeds the tolerance."""
    differences = [abs(b - a) / abs(a) for a, b in zip(eager, fused, strict=True)]
    for step, difference in enumerate(differences, start=1):
        allowed = FIRST_STEP_TOLERANCE if step == 1 else CURVE_TOLERANCE
        if not difference <= allowed:  # a NaN fails too
            raise AssertionError(
                f"step {step}: eager PyTorch has {eager[step - 1]}, fastkd {fused[step - 1]}; "
                f"the relative difference is {difference:.1e}, allowed is {allowed:.0e}"
            )
    return differences


def check_gradients(eager: Tensor, fused: Tensor) -> float:
    """Return the relative difference of two gradients; AssertionError if it exceeds the tolerance."""
    difference = float(torch.linalg.vector_norm(fused - eager) / torch.linalg.vector_norm(eager))
    if not difference <= FIRST_STEP_TOLERANCE:
        raise AssertionError(
            f"the gradients of eager PyTorch and fastkd on the same logits differ by "
            f"{difference:.1e} of their norm; allowed is {FIRST_STEP_TOLERANCE:.0e}"
        )
    return difference


def train_both(
    distillers: Sequence[Distiller], teacher: Teacher, corpus: Corpus, steps: int
) -> None:
    """Train the students in turn on the same batches and the same teacher, with a progress bar."""
    with progress_bar() as progress:
        task = progress.add_task("training both", total=steps, figures="")
        for step in range(steps):
            ids = corpus.batch(step)
            targets = teacher.of(step, ids[:, :-1])
            values = [distiller.step(ids, targets) for distiller in distillers]
            figures = " and ".join(f"{value:.4f}" for value in values)
            progress.update(task, advance=1, figures=f"loss {figures}")


def plot(path: Path, eager: Outcome, fused: Outcome, before: Quality) -> None:
    """Plot both curves, the held-out results, loss time and extra memory to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels, colours = ["eager PyTorch", "fastkd"], ["#d98c3f", "#1f5fa8"]
    figure, (curve, *bars) = pyplot.subplots(
        1, 5, figsize=(16, 4), width_ratios=[2.4, 1.2, 1.2, 1, 1], layout="constrained"
    )
    steps = range(1, len(eager.curve) + 1)
    curve.plot(steps, eager.curve, color=colours[0], label=labels[0], linewidth=5, alpha=0.6)
    curve.plot(steps, fused.curve, color=colours[1], label=labels[1], linewidth=1.5)
    curve.set(title="training loss, nats per token", xlabel="step", ylim=(0, None))
    curve.legend()

    sides = (eager, fused)
    kl = [before.kl, *(side.after.kl for side in sides)]
    perplexity = [before.perplexity, *(side.after.perplexity for side in sides)]
    times = [side.milliseconds for side in sides]
    sizes = [(side.extra_loss_bytes or 0) / MIB for side in sides]
    panels = [
        ("held-out KL, nats per token", kl, "{:.3f}"),
        (f"held-out perplexity (teacher {before.teacher_perplexity:.1f})", perplexity, "{:,.0f}"),
        ("loss time, ms per step", times, "{:.1f}"),
        ("extra loss memory, MiB", sizes, "{:.0f}"),
    ]
    for axes, (title, values, form) in zip(bars, panels, strict=True):
        names, fills = labels, colours
        if len(values) == 3:
            names, fills = ["before", *labels], ["#9a9a9a", *colours]
        axes.bar_label(axes.bar(names, values, color=fills), fmt=form)
        axes.set_title(title, fontsize="medium")
        axes.tick_params(axis="x", labelrotation=20)
    bars[1].set(yscale="log", ylim=(1, None))
    for axes in (curve, *bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def results_table(
    eager: Outcome, fused: Outcome, before: Quality, differences: Sequence[float]
) -> Table:
    """Return a table of all measurements."""

    def relative(eager: float, fused: float) -> str:
        return f"{fused / eager - 1:+.2%}"

    table = Table("", "start", "eager", "fastkd", "fastkd is")
    pair = (eager.after.kl, fused.after.kl)
    cells = [f"{value:.3f}" for value in (before.kl, *pair)]
    table.add_row("held-out KL, nats per token", *cells, relative(*pair))
    pair = (eager.after.perplexity, fused.after.perplexity)
    cells = [f"{value:,.0f}" for value in (before.perplexity, *pair)]
    table.add_row("held-out perplexity", *cells, relative(*pair))
    cells = [f"{value:.4f}" for value in (eager.curve[0], eager.curve[-1], fused.curve[-1])]
    table.add_row("training loss", *cells, f"within {max(differences):.3%}")
    pair = (eager.milliseconds, fused.milliseconds)
    cells = [f"{value:.1f} ms" for value in pair]
    table.add_row("loss time per step (median)", "", *cells, f"{pair[0] / pair[1]:.1f} x faster")
    if eager.extra_loss_bytes and fused.extra_loss_bytes:
        sizes = (eager.extra_loss_bytes, fused.extra_loss_bytes)
        cells = [f"{size / MIB:.0f} MiB" for size in sizes]
        table.add_row("extra loss memory", "", *cells, f"{sizes[0] / sizes[1]:.1f} x smaller")
    table.caption = f"the teacher's perplexity is {before.teacher_perplexity:.1f}"
    return table


def main(
    divergence: Annotated[str, typer.Option(help="forward_kl, reverse_kl, jsd or tvd.")] = (
        "forward_kl"
    ),
    temperature: Annotated[float, typer.Option(help="Divides the logits of both models.")] = 1.0,
    teacher: Annotated[Form, typer.Option(help="The form of the teacher.")] = Form.dense,
    k: Annotated[int, typer.Option(help="Tokens per row of --teacher topk.")] = 64,
    steps: Annotated[int, typer.Option(help="Number of training steps.")] = 30,
    sequence_length: Annotated[int, typer.Option(help="Tokens per step.")] = 256,
    held_out: Annotated[int, typer.Option(help="Sequences not used for training.")] = 4,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of the order of batches.")] = 0,
    output: Annotated[
        Path, typer.Option(help="Folder for demo.png and demo.json.", file_okay=False)
    ] = Path("build/demo-output"),
    assets: Annotated[
        Path, typer.Option(help="Folder in which demo-requirements.txt was installed.")
    ] = Path("build/demo"),
) -> None:
    """Distil with fastkd and with eager PyTorch side by side, and compare."""
    require_positive(
        temperature=temperature,
        k=k,
        steps=steps,
        sequence_length=sequence_length,
        held_out=held_out,
        lr=lr,
    )
    allowed = ", ".join(EAGER_DIVERGENCES)
    require("--divergence", divergence, f"one of {allowed}", divergence in EAGER_DIVERGENCES)
    start = time.perf_counter()
    with console.status("loading SmolLM2-135M and the King James text"):
        model, tokenizer = load_teacher("smollm2", assets)
        ids = encode(load_text(None, assets), tokenizer)
        corpus = Corpus(ids, sequence_length, 1, held_out, seed)
        students = [keep_layers(model, LAYERS) for _ in range(2)]
    require("--k", k, f"1 to {model.config.vocab_size}", k <= model.config.vocab_size)
    for student in students:
        freeze_embeddings(student)
    timed = [
        TimedLoss(both[side])
        for side, both in enumerate(
            losses(teacher, divergence, temperature, student.lm_head.weight) for student in students
        )
    ]
    distillers = [
        Distiller(student, loss, lr) for student, loss in zip(students, timed, strict=True)
    ]
    if teacher.on_hidden_states:
        for distiller in distillers:
            on_hidden_states(distiller)
    with console.status("held-out text, before"):
        [before] = evaluate(students[:1], model, corpus.held_out)
    with progress_bar() as progress:
        task = progress.add_task("writing the cache", total=steps, figures="", visible=False)
        targets = Teacher(
            model,
            teacher,
            corpus=corpus,
            steps=steps,
            temperature=temperature,
            k=k,
            progress=lambda done: progress.update(task, completed=done, visible=True),
        )
    with console.status("first gradients, extra loss memory"):
        inputs, labels = corpus.batch(0)[:, :-1], corpus.batch(0)[:, 1:]
        with torch.no_grad():
            first = distillers[0].output(inputs), targets.of(0, inputs), labels
        memory = [extra_memory(loss.loss, *first) for loss in timed]
        gradients = [loss_and_gradient(loss.loss, *first)[1] for loss in timed]
        gradient_difference = check_gradients(*gradients)
        megabytes = inputs.numel() * model.config.vocab_size * 4 / MIB
        del first, gradients
    train_both(distillers, targets, corpus, steps)
    with console.status("held-out text, after"):
        after = evaluate(students, model, corpus.held_out)

    eager, fused = (
        Outcome(distiller.curve, loss.seconds, size, quality)
        for distiller, loss, size, quality in zip(distillers, timed, memory, after, strict=True)
    )
    output.mkdir(parents=True, exist_ok=True)
    plot(output / "demo.png", eager, fused, before)
    figures = {"before": asdict(before), "eager": asdict(eager), "fastkd": asdict(fused)}
    (output / "demo.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    differences = check_curves(eager.curve, fused.curve)
    console.print(results_table(eager, fused, before, differences))
    console.print(
        f"The curves agree, and the first gradients to {gradient_difference:.0e}. {steps} steps of "
        f"{sequence_length} tokens, {megabytes:.0f} MiB of logits per model, "
        f"{torch.get_num_threads()} threads, {time.perf_counter() - start:.0f} s."
    )
    if fastkd.available_backends()["cpu"] is not None:
        console.print("fastkd ran in plain PyTorch, because its native extension is missing.")
    console.print(f"{output}: demo.png, demo.json")


if __name__ == "__main__":
    typer.run(main)
