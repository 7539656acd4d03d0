"""The same distillation twice, side by side: with the loss in eager PyTorch and with fastkd.

    python examples/demo.py

SmolLM2-135M teaches a student of six of its layers on the King James text: 49,152 classes a token.
Both students start equal and see the same batches and the same teacher, one step of each in turn, so
whatever else the machine does falls on both. Their first gradients and their training curves have to
agree. `--teacher` says in which form the teacher comes: logits, hidden states and its head, its most
probable tokens, or hidden states that were written to disk first. What is measured, in the run itself:

- loss time: from the logits of both models (hidden states, where the form has them) to the gradient
  of the student's, once a step;
- extra loss memory: by how much that raises the peak of the process's resident memory, that
  gradient included. The system counts it (Linux only), so no allocation of either side escapes.
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

# Relative. In the first step weights and logits are equal, so the values and the gradients differ
# by rounding alone, which is eager PyTorch's: on this text both of its are 1e-5 from float64, those
# of fastkd 1e-7. From there on the rounding of every step goes through the model and AdamW, which
# divides by the gradient's own size and so enlarges it where the gradient is near 0: the curve of
# eager PyTorch with its loss in float64 leaves that in float32 by 1e-5 in 9 steps and 1e-3 in 28.
FIRST_STEP_TOLERANCE = 1e-4
CURVE_TOLERANCE = 2e-2


class _HandOn(torch.autograd.Function):
    """A loss whose gradient is already known."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream * ctx.saved_tensors[0], None, None


class TimedLoss:
    """A loss that notes how long its forward and backward take, up to the gradient of its input."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss
        self.seconds: list[float] = []

    def __call__(self, student: Tensor, teacher: Any, labels: Tensor) -> Tensor:
        """The loss, which hands the gradient on when the model's backward asks for it."""
        start = time.perf_counter()
        loss, gradient = loss_and_gradient(self.loss, student, teacher, labels)
        self.seconds.append(time.perf_counter() - start)
        return _HandOn.apply(student, loss, gradient)


def loss_and_gradient(
    loss: Callable[..., Tensor], student: Tensor, teacher: Any, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The value, and its gradient with respect to the student's logits or hidden states."""
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        value = loss(leaf, teacher, labels)
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def extra_memory(
    loss: Callable[..., Tensor], student: Tensor, teacher: Any, labels: Tensor
) -> int | None:
    """Bytes by which the loss and its gradient raise the peak of resident memory.

    Counted from before the loss first sees tensors of this size, so that buffers it keeps from call
    to call count as well. None where the system does not say.
    """
    # One row first: what it takes to load code and start threads is no cost of a step.
    loss_and_gradient(loss, student[:, :1], first_token(teacher), labels[:, :1])
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
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
    """All that was measured on one of the two sides."""

    curve: list[float]
    loss_seconds: list[float]
    extra_loss_bytes: int | None
    after: Quality

    @property
    def milliseconds(self) -> float:
        """Median loss time of a step."""
        return 1e3 * statistics.median(self.loss_seconds)


def check_curves(eager: Sequence[float], fused: Sequence[float]) -> list[float]:
    """The relative difference of each step; AssertionError where it passes the tolerance."""
    differences = [abs(b - a) / abs(a) for a, b in zip(eager, fused, strict=True)]
    for step, difference in enumerate(differences, start=1):
        allowed = FIRST_STEP_TOLERANCE if step == 1 else CURVE_TOLERANCE
        if not difference <= allowed:  # a NaN fails too
            raise AssertionError(
                f"step {step}: eager PyTorch has {eager[step - 1]}, fastkd {fused[step - 1]}; "
                f"they differ by {difference:.1e} of it, allowed is {allowed:.0e}"
            )
    return differences


def check_gradients(eager: Tensor, fused: Tensor) -> float:
    """The relative difference of two gradients; AssertionError where it passes the tolerance."""
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
    """Train all of them in step, on the same batches and the same teacher, with a bar."""
    with progress_bar() as progress:
        task = progress.add_task("training both", total=steps, figures="")
        for step in range(steps):
            ids = corpus.batch(step)
            targets = teacher.of(step, ids[:, :-1])
            values = [distiller.step(ids, targets) for distiller in distillers]
            figures = " and ".join(f"{value:.4f}" for value in values)
            progress.update(task, advance=1, figures=f"loss {figures}")


def plot(path: Path, eager: Outcome, fused: Outcome, before: Quality) -> None:
    """A PNG: both curves, what the held-out text says, loss time and extra memory."""
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
    curve.set(title="training loss, nats a token", xlabel="step", ylim=(0, None))
    curve.legend()

    sides = (eager, fused)
    kl = [before.kl, *(side.after.kl for side in sides)]
    perplexity = [before.perplexity, *(side.after.perplexity for side in sides)]
    times = [side.milliseconds for side in sides]
    sizes = [(side.extra_loss_bytes or 0) / MIB for side in sides]
    panels = [
        ("held-out KL, nats a token", kl, "{:.3f}"),
        (f"held-out perplexity (teacher {before.teacher_perplexity:.1f})", perplexity, "{:,.0f}"),
        ("loss time, ms a step", times, "{:.1f}"),
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
    """Everything the run measured."""

    def shift(eager: float, fused: float) -> str:
        return f"{fused / eager - 1:+.2%}"

    table = Table("", "start", "eager", "fastkd", "fastkd is")
    pair = (eager.after.kl, fused.after.kl)
    cells = [f"{value:.3f}" for value in (before.kl, *pair)]
    table.add_row("held-out KL, nats a token", *cells, shift(*pair))
    pair = (eager.after.perplexity, fused.after.perplexity)
    cells = [f"{value:,.0f}" for value in (before.perplexity, *pair)]
    table.add_row("held-out perplexity", *cells, shift(*pair))
    cells = [f"{value:.4f}" for value in (eager.curve[0], eager.curve[-1], fused.curve[-1])]
    table.add_row("training loss", *cells, f"within {max(differences):.3%}")
    pair = (eager.milliseconds, fused.milliseconds)
    cells = [f"{value:.1f} ms" for value in pair]
    table.add_row("loss time a step (median)", "", *cells, f"{pair[0] / pair[1]:.1f} x faster")
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
    temperature: Annotated[float, typer.Option(help="Divides the logits of both.")] = 1.0,
    teacher: Annotated[
        Form, typer.Option(help="The form in which the teacher comes to the loss.")
    ] = Form.dense,
    k: Annotated[int, typer.Option(help="Tokens of --teacher topk.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 30,
    sequence_length: Annotated[int, typer.Option(help="Tokens a step.")] = 256,
    held_out: Annotated[int, typer.Option(help="Sequences held out.")] = 4,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the batches' order.")] = 0,
    output: Annotated[
        Path, typer.Option(help="Gets demo.png and demo.json.", file_okay=False)
    ] = Path("build/demo-output"),
    assets: Annotated[Path, typer.Option(help="Where demo-requirements.txt was installed.")] = (
        Path("build/demo")
    ),
) -> None:
    """Distil with fastkd and with eager PyTorch in turn, and compare."""
    require_positive(
        temperature=temperature,
        k=k,
        steps=steps,
        sequence_length=sequence_length,
        held_out=held_out,
        lr=lr,
    )
    known = ", ".join(EAGER_DIVERGENCES)
    require("--divergence", divergence, f"one of {known}", divergence in EAGER_DIVERGENCES)
    began = time.perf_counter()
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
        f"{sequence_length} tokens, {megabytes:.0f} MiB of logits a model, "
        f"{torch.get_num_threads()} threads, {time.perf_counter() - began:.0f} s."
    )
    if fastkd.available_backends()["cpu"] is not None:
        console.print("fastkd ran in plain PyTorch: it was installed without a compiler.")
    console.print(f"{output}: demo.png, demo.json")


if __name__ == "__main__":
    typer.run(main)
