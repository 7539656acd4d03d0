"""Distil a causal language model into a smaller one on your own text.

    python examples/distill.py --teacher path/to/model --layers 0,4,8,12 --text corpus.txt
    python examples/distill.py --teacher path/to/large --student path/to/small --text corpus.txt
    python examples/distill.py              # SmolLM2-135M to six layers, on the King James text

`--loss reference` trains with the loss in plain PyTorch, `--loss fastkd` with `fastkd.kd_loss`;
only the call of the loss differs (see `make_loss`). With `--checkpoint FILE` an interrupted run
resumes, and its loss curve is the same as that of an uninterrupted run.
"""

import copy
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import safetensors
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

import fastkd

console = Console()
transformers_logging.disable_progress_bar()

# (student_logits [B, S, V], teacher_logits [B, S, V], labels [B, S]) -> scalar
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class LossName(str, Enum):
    """Implementation of the loss."""

    reference = "reference"
    fastkd = "fastkd"


class Precision(str, Enum):
    """Dtype in which the teacher computes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    to_teacher = F.kl_div(log_m, log_p, log_target=True, reduction="sum")
    return 0.5 * (to_teacher + F.kl_div(log_m, log_q, log_target=True, reduction="sum"))


def require(option: str, value: object, allowed: str, holds: bool) -> None:
    """Raise BadParameter for the value of an option unless the condition holds."""
    if not holds:
        raise typer.BadParameter(f"got {value}; allowed is {allowed}", param_hint=option)


def require_positive(**options: float) -> None:
    """Raise BadParameter for options that are not positive, finite numbers."""
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        require(option, value, "a positive number", 0 < value < math.inf)


# Divergences summed over all rows, as functions of the log-probabilities of teacher (p) and student (q).
EAGER_DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda log_p, log_q: F.kl_div(log_q, log_p, log_target=True, reduction="sum"),
    "reverse_kl": lambda log_p, log_q: F.kl_div(log_p, log_q, log_target=True, reduction="sum"),
    "jsd": _jensen_shannon,
    "tvd": lambda log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(),
}


def eager_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    divergence: str,
    temperature: float,
    alpha: float,
) -> Tensor:
    """The objective of `fastkd.kd_loss`, written in plain PyTorch.

    alpha T^2 D(teacher, student) + (1 - alpha) CE(student, labels), averaged over rows.
    """
    log_q = F.log_softmax(_tempered(student_logits, temperature), dim=-1, dtype=torch.float32)
    log_p = F.log_softmax(_tempered(teacher_logits, temperature), dim=-1, dtype=torch.float32)
    distance = EAGER_DIVERGENCES[divergence](log_p, log_q) / labels.numel()
    loss = alpha * temperature**2 * distance
    if alpha < 1:
        loss = loss + (1 - alpha) * F.cross_entropy(student_logits.flatten(0, -2), labels.flatten())
    return loss


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def make_loss(name: LossName, divergence: str, temperature: float, alpha: float) -> Loss:
    """Return the loss with these options, computed by plain PyTorch or by fastkd."""
    options: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "alpha": alpha}
    if name is LossName.fastkd:
        if divergence not in fastkd.DIVERGENCES:
            raise typer.BadParameter(
                f"got {divergence!r}; allowed are {', '.join(fastkd.DIVERGENCES)}",
                param_hint="--divergence",
            )
        return _on_common_columns(functools.partial(fastkd.kd_loss, **options))
    if divergence not in EAGER_DIVERGENCES:
        raise typer.BadParameter(
            f"got {divergence!r} with --loss reference, which has {', '.join(EAGER_DIVERGENCES)}; "
            "--loss fastkd has all of fastkd's",
            param_hint="--divergence",
        )
    return _on_common_columns(functools.partial(eager_loss, **options))


def _on_common_columns(loss: Loss) -> Loss:
    """Restrict a loss to the columns that both models have; the others are padding of the vocabulary."""

    def common(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        width = min(student_logits.shape[-1], teacher_logits.shape[-1])
        return loss(student_logits[..., :width], teacher_logits[..., :width], labels)

    return common


def load_teacher(name: str, assets: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and tokenizer from a local folder, or the packaged SmolLM2."""
    if name == "smollm2":
        import smollm2

        try:
            return smollm2.load(assets)
        except (FileNotFoundError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint="--assets") from error
    model = load_folder(name, "--teacher")
    return model, AutoTokenizer.from_pretrained(name, local_files_only=True)


def load_text(path: Path | None, assets: Path) -> str:
    """Read a text file, or the packaged King James text."""
    if path is not None:
        require("--text", path, "a UTF-8 text file", path.is_file())
        return path.read_text(encoding="utf-8")
    import smollm2

    try:
        return smollm2.king_james(assets)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--assets") from error


def load_folder(folder: str, option: str) -> PreTrainedModel:
    """Load the causal language model of a local Hugging Face folder in float32."""
    if not (Path(folder) / "config.json").is_file():
        raise typer.BadParameter(
            f"got {folder!r}, which has no config.json; allowed is a local Hugging Face folder",
            param_hint=option,
        )
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


def keep_layers(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Return a copy of the teacher with only the given layers."""
    depth = teacher.config.num_hidden_layers
    inside = bool(layers) and all(0 <= layer < depth for layer in layers)
    require("--layers", list(layers), f"layers 0 to {depth - 1} of the teacher", inside)
    stack = next(
        name
        for name, module in teacher.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    )
    config = copy.deepcopy(teacher.config)
    for (
        key,
        value,
    ) in config.to_dict().items():  # lists with one entry per layer, such as layer_types
        if isinstance(value, list) and len(value) == depth:
            setattr(config, key, [value[layer] for layer in layers])
    config.num_hidden_layers = len(layers)

    state = {}
    for name, weight in teacher.state_dict().items():
        if not name.startswith(f"{stack}."):
            state[name] = weight.clone()
    for new, old in enumerate(layers):
        for name, weight in teacher.get_submodule(f"{stack}.{old}").state_dict().items():
            state[f"{stack}.{new}.{name}"] = weight.clone()
    return type(teacher).from_pretrained(None, config=config, state_dict=state)


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Exclude the token embedding and the lm_head from training."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(False)


class Corpus:
    """A text split into sequences of `length` + 1 tokens; inputs and labels are shifted views of them.

    Sequences at regular distances are held out. `batch(step)` depends only on the seed and the step,
    so a resumed run sees the same batches as an uninterrupted one.
    """

    def __init__(self, ids: Tensor, length: int, batch: int, held_out: int, seed: int) -> None:
        count = (len(ids) - 1) // length
        if count < held_out + batch:
            raise typer.BadParameter(
                f"got {len(ids)} tokens, {count} sequences of {length}; allowed is at least "
                f"{held_out} held out and {batch} for one batch (see --held-out, --batch)",
                param_hint="--text",
            )
        sequences = ids[: count * length + 1].unfold(0, length + 1, length)  # [count, length + 1]
        held_out_indices = (2 * torch.arange(held_out) + 1) * count // (2 * held_out)
        in_training = torch.ones(count, dtype=torch.bool)
        in_training[held_out_indices] = False
        self.held_out = sequences[held_out_indices]
        self.training = sequences[in_training]
        self._batch, self._seed = batch, seed
        self.fingerprint = hashlib.sha256(ids.numpy().tobytes()).hexdigest()

    def batch(self, step: int) -> Tensor:
        """Return the token ids [batch, length + 1] of one step; every epoch has a new permutation."""
        steps_per_epoch = len(self.training) // self._batch
        generator = torch.Generator().manual_seed(self._seed + step // steps_per_epoch)
        order = torch.randperm(len(self.training), generator=generator)
        first = step % steps_per_epoch * self._batch
        return self.training[order[first : first + self._batch]]


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the token ids [n] of a text. Passing a list of lines lets the tokenizer use every core."""
    lines = tokenizer(text.splitlines(keepends=True), add_special_tokens=False, verbose=False)
    return torch.tensor([token for line in lines["input_ids"] for token in line])


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: Tensor) -> Tensor:
    """Return the logits [B, S, V] of token ids [B, S], without gradients."""
    return model(inputs, use_cache=False).logits


class Distiller:
    """A student with its optimizer and loss; `step` makes one training step."""

    warm_up = 5  # steps over which the learning rate rises to its constant value

    def __init__(self, student: PreTrainedModel, loss: Loss, lr: float) -> None:
        self.student = student.train()
        self.loss = loss
        self.lr = lr
        self.trained = {
            name: weight for name, weight in student.named_parameters() if weight.requires_grad
        }
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=lr, weight_decay=0.0, fused=True
        )
        self.curve: list[float] = []

    def output(self, inputs: Tensor) -> Tensor:
        """Return the student's input of the loss: logits [B, S, V]."""
        return self.student(inputs, use_cache=False).logits

    def step(self, ids: Tensor, teacher: Any) -> float:
        """Train on token ids [B, S + 1] with the teacher's input of the loss; return the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (len(self.curve) + 1) / self.warm_up)
        loss = self.loss(self.output(ids[:, :-1]), teacher, ids[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.curve.append(loss.item())
        return self.curve[-1]


def save_checkpoint(path: Path, distiller: Distiller, settings: dict[str, Any]) -> None:
    """Write trained weights, optimizer and random state to one safetensors file, which is replaced atomically.

    Frozen weights are omitted, because a resumed run loads them from the teacher's or student's folder.
    """
    tensors = {f"weight.{name}": weight.detach() for name, weight in distiller.trained.items()}
    for index, state in distiller.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    notes = {"settings": settings, "curve": distiller.curve}
    scratch = path.with_name(path.name + ".partial")
    save_file(tensors, scratch, metadata={"fastkd-distill": json.dumps(notes)})
    with scratch.open("rb+") as file:
        os.fsync(file.fileno())
    scratch.replace(path)


def resume(path: Path, distiller: Distiller, settings: dict[str, Any]) -> None:
    """Restore the state that `save_checkpoint` saved."""

    def refuse(message: str) -> typer.BadParameter:
        return typer.BadParameter(f"{path}: {message}", param_hint="--checkpoint")

    try:
        with safetensors.safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {}).get("fastkd-distill", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise refuse(f"not a complete safetensors file ({error})") from error
    if not notes:
        raise refuse(
            "got a safetensors file that this script did not write; pass a checkpoint of it"
        )
    for name, value in settings.items():
        before = notes["settings"].get(name)
        if before != value:
            raise refuse(f"was saved with {name} = {before}, but this run has {value}")

    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, key = name.partition(".")
        if kind == "weight":
            distiller.trained[key].data.copy_(tensor)
        elif kind == "optimizer":
            index, _, key = key.partition(".")
            states.setdefault(int(index), {})[key] = tensor
    groups = distiller.optimizer.state_dict()["param_groups"]
    distiller.optimizer.load_state_dict({"state": states, "param_groups": groups})
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    distiller.curve = list(notes["curve"])


@dataclass(frozen=True)
class Quality:
    """Results of a student on the held-out sequences."""

    kl: float  # KL(teacher || student) in nats per token
    perplexity: float
    teacher_perplexity: float


@torch.no_grad()
def evaluate(
    students: Sequence[PreTrainedModel], teacher: PreTrainedModel, sequences: Tensor
) -> list[Quality]:
    """Evaluate each student on token ids [n, S + 1]; the teacher runs only once."""
    # Later columns are padding.
    width = min(model.config.vocab_size for model in (teacher, *students))
    modes = [student.training for student in students]
    divergence = torch.zeros(len(students), dtype=torch.float64)
    nll = torch.zeros(len(students), dtype=torch.float64)
    teacher_nll = 0.0
    for ids in sequences.to(teacher.device).split(1):
        inputs, labels = ids[:, :-1], ids[0, 1:]
        log_p = F.log_softmax(logits_of(teacher, inputs)[0, :, :width].float(), dim=-1)
        teacher_nll += F.nll_loss(log_p, labels, reduction="sum").item()
        for i, student in enumerate(students):
            log_q = F.log_softmax(logits_of(student.eval(), inputs)[0, :, :width].float(), dim=-1)
            divergence[i] += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
            nll[i] += F.nll_loss(log_q, labels, reduction="sum").item()
    for student, mode in zip(students, modes, strict=True):
        student.train(mode)
    tokens = sequences[:, 1:].numel()
    kl, perplexity = (divergence / tokens).tolist(), (nll / tokens).exp().tolist()
    of_teacher = math.exp(teacher_nll / tokens)
    return [
        Quality(*row, teacher_perplexity=of_teacher) for row in zip(kl, perplexity, strict=True)
    ]


def progress_bar() -> Progress:
    """Return a progress bar with the step, the time left and a text that the caller updates."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
    )


def plot_curve(path: Path, curves: dict[str, Sequence[float]], title: str) -> None:
    """Plot the training loss to a PNG file, with one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), curve, label=label)
    axes.set(title=title, xlabel="step", ylabel="training loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def quality_table(rows: dict[str, Quality]) -> Table:
    """Return a table of held-out results with one row per model."""
    table = Table("", "KL to the teacher", "perplexity", title="held out")
    for name, quality in rows.items():
        table.add_row(name, f"{quality.kl:.3f}", f"{quality.perplexity:.1f}")
    table.add_row("teacher", "0", f"{next(iter(rows.values())).teacher_perplexity:.1f}")
    return table


def parse_layers(layers: str) -> list[int]:
    """Parse comma-separated layer numbers such as 0,1,5."""
    try:
        return [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"got {layers!r}; allowed are numbers separated by commas, such as 0,1,5",
            param_hint="--layers",
        ) from None


def main(
    teacher: Annotated[
        str, typer.Option(help="A local Hugging Face folder, or smollm2.")
    ] = "smollm2",
    student: Annotated[
        str | None,
        typer.Option(help="A local Hugging Face folder; default: layers of the teacher."),
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Which of the teacher's layers the student keeps.")
    ] = "0,1,2,10,20,29",
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file; default: the King James text.")
    ] = None,
    loss: Annotated[LossName, typer.Option(help="Implementation of the loss.")] = LossName.fastkd,
    divergence: Annotated[
        str, typer.Option(help="forward_kl, reverse_kl, jsd, ...")
    ] = "forward_kl",
    temperature: Annotated[float, typer.Option(help="Divides the logits of both models.")] = 1.0,
    alpha: Annotated[
        float, typer.Option(help="Weight of the divergence; the cross-entropy gets 1 - alpha.")
    ] = 1.0,
    steps: Annotated[int, typer.Option(help="Number of training steps.")] = 100,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-3,
    teacher_dtype: Annotated[
        Precision, typer.Option(help="The teacher's dtype; the student's is float32.")
    ] = Precision.float32,
    train_head: Annotated[
        bool, typer.Option(help="Also train the embedding and the lm_head.")
    ] = False,
    held_out: Annotated[int, typer.Option(help="Sequences not used for training.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the order of batches.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cuda"
    if torch.cuda.is_available()
    else "cpu",
    checkpoint: Annotated[
        Path | None, typer.Option(help="File to save to, and to resume from if it exists.")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    output: Annotated[
        Path,
        typer.Option(help="Folder for the student, metrics.json and curve.png.", file_okay=False),
    ] = Path("build/distilled"),
    assets: Annotated[
        Path, typer.Option(help="Folder in which demo-requirements.txt was installed.")
    ] = Path("build/demo"),
) -> None:
    """Distil a teacher into a smaller student on a text."""
    require_positive(
        temperature=temperature,
        steps=steps,
        sequence_length=sequence_length,
        batch=batch,
        lr=lr,
        held_out=held_out,
        checkpoint_every=checkpoint_every,
    )
    require("--alpha", alpha, "0 to 1", 0 <= alpha <= 1)
    require("--seed", seed, "0 or more", seed >= 0)
    torch.manual_seed(seed)
    loss_function = make_loss(loss, divergence, temperature, alpha)
    with console.status("loading"):
        teacher_model, tokenizer = load_teacher(teacher, assets)
        if student is None:
            student_model = keep_layers(teacher_model, parse_layers(layers))
        else:
            student_model = load_folder(student, "--student")
        corpus = Corpus(
            encode(load_text(text, assets), tokenizer), sequence_length, batch, held_out, seed
        )
    teacher_model.to(device, getattr(torch, teacher_dtype.value)).eval()
    student_model.to(device)
    if not train_head:
        freeze_embeddings(student_model)

    distiller = Distiller(student_model, loss_function, lr)
    settings = {
        "teacher": teacher,
        "student": student or f"layers {layers}",
        "text": corpus.fingerprint,
        "loss": loss.value,
        "divergence": divergence,
        "temperature": temperature,
        "alpha": alpha,
        "sequence_length": sequence_length,
        "batch": batch,
        "lr": lr,
        "teacher_dtype": teacher_dtype.value,
        "train_head": train_head,
        "held_out": held_out,
        "seed": seed,
    }
    [before] = evaluate([student_model], teacher_model, corpus.held_out)
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None and checkpoint.exists():
        resume(checkpoint, distiller, settings)
        console.print(f"resuming after step {len(distiller.curve)} of {checkpoint}")

    with progress_bar() as progress:
        done = len(distiller.curve)
        task = progress.add_task(loss.value, total=steps, completed=done, figures="")
        while done < steps:
            ids = corpus.batch(done).to(device)
            value = distiller.step(ids, logits_of(teacher_model, ids[:, :-1]))
            done += 1
            progress.update(task, completed=done, figures=f"loss {value:.4f}")
            if checkpoint is not None and (done % checkpoint_every == 0 or done == steps):
                save_checkpoint(checkpoint, distiller, settings)

    [after] = evaluate([student_model], teacher_model, corpus.held_out)
    output.mkdir(parents=True, exist_ok=True)
    student_model.save_pretrained(output / "student")
    tokenizer.save_pretrained(output / "student")
    plot_curve(output / "curve.png", {loss.value: distiller.curve}, divergence)
    metrics = {
        "settings": settings,
        "before": asdict(before),
        "after": asdict(after),
        "curve": distiller.curve,
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    console.print(quality_table({"student before": before, "student after": after}))
    console.print(f"{output}: student/, metrics.json, curve.png")


if __name__ == "__main__":
    typer.run(main)
