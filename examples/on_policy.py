"""On-policy distillation: the student writes, the teacher scores what it has written, and the student learns from that.

    python examples/on_policy.py           # SmolLM2-135M teaches six of its layers: a few minutes on two cores
    python examples/on_policy.py --tiny    # random models, in seconds

`Learner.step` is the whole method. It runs twice, with two equal students whose teachers differ in where they are:

    local     the teacher in this process (`LocalTeacher`)
    served    the same teacher behind HTTP, asked by fastkd.serving (`ServedTeacher`). No vLLM runs here: a stand-in
              speaks its JSON (vllm_stand_in.py)

Both return the teacher's K most probable tokens per position, and both students minimize the reverse KL
KL(student || teacher) over these tokens and one event for all others. The two runs must be equal: the run fails if
the students write different tokens, or if a loss differs by more than TOLERANCE.

At first the student, six of the teacher's 30 layers, writes noise. It therefore learns for a few steps from the King
James text (`warm_up`), as examples/demo.py does, before it learns from its own.
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from distill import (
    Corpus,
    Distiller,
    console,
    encode,
    freeze_embeddings,
    keep_layers,
    load_teacher,
    load_text,
    logits_of,
    progress_bar,
    require,
    require_positive,
)
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from vllm_stand_in import Position, StandIn

import fastkd
from fastkd.sampled import on_policy_loss
from fastkd.serving import Batch, Scored, ServedTeacher, collate

LAYERS = (0, 1, 2, 10, 20, 29)
CHARACTERS = 400_000  # length of the warm-up's text, and of the text from which prompts are taken
WARM_UP_TOKENS = 256  # per step of the warm-up
HELD_OUT = 32  # prompts that are not used for training

# Largest relative difference of two losses; on two cores of an Intel Xeon it is 0. Both teachers run the same pass over
# each sequence. JSON keeps their float32 log-probabilities exactly, because Python prints enough digits of a float to
# read the same float back. The tolerance allows for machines on which equal passes in two threads round differently.
TOLERANCE = 1e-5

# ---- the method


class Written(NamedTuple):
    """What the student has written."""

    ids: Tensor  # [B, P + N], prompts of P tokens and N sampled tokens
    logprobs: Tensor  # [B, N], the student's log-probabilities of the sampled tokens
    lengths: list[int]  # of each sequence with its prompt and its end-of-text token

    def sequences(self) -> list[Tensor]:
        """Return the token ids of each sequence without those after its end."""
        return [ids[:length] for ids, length in zip(self.ids, self.lengths, strict=True)]


def write(student: PreTrainedModel, prompts: Tensor, count: int, seed: int) -> Written:
    """Sample up to `count` tokens after each of the prompts [B, P], from the student's own distribution."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = student.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=count,
            do_sample=True,
            temperature=1.0,
            top_k=0,  # with generate's default, 50, the samples would not come from the student's distribution
            top_p=1.0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    new = output.sequences[:, prompts.shape[1] :]
    log_q = torch.stack(output.logits, 1).float().log_softmax(-1)
    logprobs = log_q.gather(-1, new.unsqueeze(-1)).squeeze(-1)
    is_end = new == student.config.eos_token_id
    after_end = is_end.cumsum(1) - is_end.long() > 0  # padding
    lengths = prompts.shape[1] + (~after_end).sum(1)
    return Written(output.sequences, logprobs, lengths.tolist())


class Learner:
    """A student that learns from what it writes; `score` is the teacher, local or served."""

    def __init__(
        self, student: PreTrainedModel, score: Callable[..., list[Scored]], lr: float, seed: int
    ) -> None:
        self.student, self.score = student, score
        self.trained = [weight for weight in student.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0, fused=True)
        self.seed = seed
        self.losses: list[float] = []
        self.teacher_kl: list[float] = []
        self.written: list[Tensor] = []
        self.seconds = 0.0

    def step(self, prompts: Tensor, count: int) -> float:
        """Make one training step from prompts [B, P], continued by up to `count` tokens; return the loss."""
        start = time.perf_counter()
        # 1. The student writes. These tokens are data: no gradient passes through the sampling.
        written = write(self.student, prompts, count, self.seed + len(self.losses))
        # 2. The teacher scores the new tokens. Row j of the batch belongs to the student's logits at position j.
        scored = self.score(written.sequences(), starts=prompts.shape[1])
        batch = collate(scored, width=written.ids.shape[1])
        # 3. The loss, on the positions that the teacher has scored; the mask is False for prompts and after the end.
        hidden = self.student.base_model(written.ids, use_cache=False).last_hidden_state
        loss = fastkd.fused_linear_kd_loss(
            hidden,
            self.student.lm_head.weight,
            batch.teacher,
            mask=batch.mask,
            divergence="reverse_kl",
        )
        # 4. As with any other loss.
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds += time.perf_counter() - start
        self.losses.append(loss.item())
        self.teacher_kl.append(policy_gradient_loss(written, batch).item())
        self.written.append(written.ids)
        return self.losses[-1]


def policy_gradient_loss(written: Written, batch: Batch) -> Tensor:
    """Return the loss of a policy gradient, which needs the teacher's log-probability of the sampled token only.

    It estimates the same KL(student || teacher) from one token per position, so it is noisier. Here it is logged, under
    the name teacher_kl that several stacks use. To train on it, pass log-probabilities that have a gradient.
    """
    first = written.ids.shape[1] - written.logprobs.shape[1] - 1  # the row of the first new token
    return on_policy_loss(
        written.logprobs,
        batch.sampled_logprobs[:, first:-1],
        mask=batch.mask[:, first:-1],
    )


# ---- the two teachers


@torch.no_grad()
def logprobs_of(teacher: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the log-probabilities [S - 1, V] of tokens 1 to S - 1 of one sequence [S]."""
    return teacher(ids[None, :-1], use_cache=False).logits[0].float().log_softmax(-1)


class LocalTeacher:
    """The teacher in this process, with the method of fastkd.serving.ServedTeacher.

    It computes one sequence at a time, as the stand-in does, so that both round alike. If you need no comparison with a
    server, run the teacher on the whole batch, and pass all of its distribution instead of K tokens:
    `fastkd.LinearTeacher(hidden_states, lm_head.weight)`, as in `own_text_kl` below.
    """

    def __init__(self, teacher: PreTrainedModel, k: int) -> None:
        self.teacher, self.k = teacher, k

    def score(self, sequences: Sequence[Tensor], starts: int) -> list[Scored]:
        """Return the scores of the tokens from index `starts` of each sequence."""
        return [self._score(ids, starts) for ids in sequences]

    def _score(self, ids: Tensor, start: int) -> Scored:
        log_p = logprobs_of(self.teacher, ids)[start - 1 :]
        top = log_p.topk(self.k)
        own = log_p.gather(-1, ids[start:, None]).squeeze(-1)
        every_row = torch.ones(len(own), dtype=torch.bool)
        # The mass of all other tokens is derived from the K, as it must be with a server. TopK.from_logits computes it
        # from all logits, which is more exact.
        return Scored(fastkd.TopK(top.indices, top.values), own, every_row, start)


def score_for_stand_in(teacher: PreTrainedModel, ids: list[int], k: int) -> list[Position]:
    """Return the teacher's distributions as the stand-in takes them."""
    positions = []
    for row, token in zip(logprobs_of(teacher, torch.tensor(ids)), ids[1:], strict=True):
        top = row.topk(k)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        positions.append(Position(row[token].item(), int((row >= row[token]).sum()), list(pairs)))
    return positions


# ---- the comparison


class Setting(NamedTuple):
    """Models and data; the student has frozen embeddings, and an lm_head tied to them."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    text: Corpus  # of the warm-up
    prompts: Corpus


def smollm2(assets: Path, prompt_length: int, batch: int, seed: int) -> Setting:
    """Return SmolLM2-135M, six of its layers, and two parts of the King James text."""
    teacher, tokenizer = load_teacher("smollm2", assets)
    student = keep_layers(teacher, LAYERS)
    text = load_text(None, assets)
    parts = text[:CHARACTERS], text[CHARACTERS : 2 * CHARACTERS]
    ids, prompt_ids = (encode(part, tokenizer) for part in parts)
    return _setting(teacher, student, ids, prompt_ids, prompt_length, batch, seed)


def tiny(prompt_length: int, batch: int, seed: int) -> Setting:
    """Return two small models with random weights, and a random text."""
    torch.manual_seed(seed)
    teacher, student = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=101,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.2,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=1,
                pad_token_id=0,
            )
        )
        for width in (48, 24)
    )
    ids, prompt_ids = torch.randint(2, 101, (2, 5000))
    return _setting(teacher, student, ids, prompt_ids, prompt_length, batch, seed)


def _setting(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    ids: Tensor,
    prompt_ids: Tensor,
    prompt_length: int,
    batch: int,
    seed: int,
) -> Setting:
    freeze_embeddings(student)
    text = Corpus(ids, WARM_UP_TOKENS, 1, 0, seed)
    prompts = Corpus(prompt_ids, prompt_length - 1, batch, HELD_OUT, seed)
    return Setting(teacher.eval().requires_grad_(False), student, text, prompts)


def warm_up(setting: Setting, steps: int, lr: float) -> None:
    """Train the student on text, with the teacher's logits and forward KL."""

    def loss(student_logits: Tensor, teacher_logits: Tensor, _: Tensor) -> Tensor:
        return fastkd.kd_loss(student_logits, teacher_logits)

    distiller = Distiller(setting.student, loss, lr)
    with progress_bar() as progress:
        task = progress.add_task("warm-up on text", total=steps, figures="")
        for step in range(steps):
            ids = setting.text.batch(step)
            value = distiller.step(ids, logits_of(setting.teacher, ids[:, :-1]))
            progress.update(task, advance=1, figures=f"forward KL {value:.3f}")


def train(learners: Sequence[Learner], prompts: Corpus, steps: int, count: int) -> None:
    """Train the students in turn, so that other load on the machine affects both."""
    with progress_bar() as progress:
        task = progress.add_task("on-policy, both", total=steps, figures="")
        for step in range(steps):
            values = [learner.step(prompts.batch(step), count) for learner in learners]
            figures = " and ".join(f"{value:.4f}" for value in values)
            progress.update(task, advance=1, figures=f"reverse KL {figures}")


@torch.no_grad()
def own_text_kl(student: PreTrainedModel, setting: Setting, count: int, seed: int) -> float:
    """Return KL(student || teacher) over the whole vocabulary, on what the student writes after held-out prompts."""
    written = write(student, setting.prompts.held_out, count, seed)
    positions = torch.arange(written.ids.shape[1])
    last = torch.tensor(written.lengths)[:, None] - 2  # the position that predicts the last token
    mask = (positions >= setting.prompts.held_out.shape[1] - 1) & (positions <= last)
    hidden, states = (
        model.base_model(written.ids, use_cache=False).last_hidden_state
        for model in (student, setting.teacher)
    )
    teacher = fastkd.LinearTeacher(states, setting.teacher.lm_head.weight)
    loss = fastkd.fused_linear_kd_loss(
        hidden, student.lm_head.weight, teacher, mask=mask, divergence="reverse_kl"
    )
    return loss.item()


def differences(local: Sequence[float], served: Sequence[float]) -> list[float]:
    """Return the relative difference of each step."""
    return [abs(b - a) / abs(a) for a, b in zip(local, served, strict=True)]


def faults(local: Learner, served: Learner, before: float, after: Sequence[float]) -> list[str]:
    """Return what is wrong with the two runs."""
    found = []
    pairs = zip(local.written, served.written, strict=True)
    for step, (one, other) in enumerate(pairs, start=1):
        if not torch.equal(one, other):
            found.append(f"from step {step} on, the students write different tokens")
            break
    for step, difference in enumerate(differences(local.losses, served.losses), start=1):
        if not difference <= TOLERANCE:  # a NaN fails too
            found.append(
                f"the losses of step {step} are {local.losses[step - 1]} and {served.losses[step - 1]}: their relative "
                f"difference is {difference:.1e}, allowed is {TOLERANCE:.0e}"
            )
            break
    if not max(after) < before:
        values = " and ".join(f"{value:.3f}" for value in after)
        found.append(f"the KL on held-out prompts was {before:.3f} and is {values}")
    return found


def plot(
    path: Path, local: Learner, served: Learner, before: float, after: Sequence[float]
) -> None:
    """Plot the losses, the policy-gradient estimates and the held-out results to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels, colours = ["in process", "served"], ["#d98c3f", "#1f5fa8"]
    figure, axes = pyplot.subplots(
        1, 3, figsize=(13, 4), width_ratios=[2, 2, 1], layout="constrained"
    )
    curves = [
        ("training loss: reverse KL, nats per token", local.losses, served.losses),
        ("teacher_kl of the sampled tokens, nats", local.teacher_kl, served.teacher_kl),
    ]
    for panel, (title, one, other) in zip(axes, curves, strict=False):
        steps = range(1, len(one) + 1)
        panel.plot(steps, one, color=colours[0], label=labels[0], linewidth=5, alpha=0.6)
        panel.plot(steps, other, color=colours[1], label=labels[1], linewidth=1.5)
        panel.set(title=title, xlabel="step", ylim=(0, None))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.legend()
    bars = axes[2].bar(["before", *labels], [before, *after], color=["#9a9a9a", *colours])
    axes[2].bar_label(bars, fmt="{:.3f}")
    axes[2].set_title("held-out reverse KL")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def results_table(local: Learner, served: Learner, before: float, after: Sequence[float]) -> Table:
    """Return a table of both runs."""
    table = Table("", "in process", "served", "largest difference")
    rows = {
        "loss, first step": (local.losses[0], served.losses[0]),
        "loss, last step": (local.losses[-1], served.losses[-1]),
    }
    for name, pair in rows.items():
        table.add_row(name, *(f"{value:.4f}" for value in pair))
    gaps = differences(local.losses, served.losses)
    table.add_row("loss, all steps", "", "", f"{max(gaps):.1e}")
    # One token per position is a noisy estimate, so several steps are averaged.
    several = max(1, len(local.teacher_kl) // 4)
    for name, part in (("first", slice(several)), ("last", slice(-several, None))):
        means = (sum(run.teacher_kl[part]) / several for run in (local, served))
        table.add_row(f"teacher_kl, {name} {several} steps", *(f"{mean:.3f}" for mean in means))
    table.add_row(f"held-out reverse KL (was {before:.3f})", *(f"{value:.3f}" for value in after))
    times = (run.seconds / len(run.losses) for run in (local, served))
    table.add_row("time per step", *(f"{value:.2f} s" for value in times))
    return table


def main(
    tiny_models: Annotated[
        bool, typer.Option("--tiny", help="Use two tiny models; needs no download.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Number of on-policy steps.")] = 20,
    warm_up_steps: Annotated[int, typer.Option(help="Number of warm-up steps on text.")] = 30,
    batch: Annotated[int, typer.Option(help="Completions per step.")] = 8,
    prompt_length: Annotated[int, typer.Option(help="Tokens per prompt.")] = 16,
    completion_length: Annotated[int, typer.Option(help="Sampled tokens per completion.")] = 32,
    k: Annotated[int, typer.Option(help="Tokens per position that the teacher returns.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of the on-policy steps.")] = 3e-4,
    seed: Annotated[int, typer.Option(help="Seed of prompts and samples.")] = 0,
    output: Annotated[
        Path, typer.Option(help="Folder for on-policy.png and on-policy.json.", file_okay=False)
    ] = Path("build/demo-on-policy"),
    assets: Annotated[
        Path, typer.Option(help="Folder in which demo-requirements.txt was installed.")
    ] = Path("build/demo"),
) -> None:
    """Distil on the student's own text, with the teacher in this process and behind HTTP, and compare."""
    require_positive(
        steps=steps,
        warm_up_steps=warm_up_steps,
        batch=batch,
        completion_length=completion_length,
        k=k,
        lr=lr,
    )
    require("--prompt-length", prompt_length, "at least 2", prompt_length >= 2)
    start = time.perf_counter()
    with console.status("loading the models and the text"):
        setting = (
            tiny(prompt_length, batch, seed)
            if tiny_models
            else smollm2(assets, prompt_length, batch, seed)
        )
    vocabulary = setting.teacher.config.vocab_size
    require("--k", k, f"1 to {vocabulary}", k <= vocabulary)
    warm_up(setting, warm_up_steps, lr=1e-3)
    with console.status("held-out prompts, before"):
        before = own_text_kl(setting.student, setting, completion_length, seed)

    with ExitStack() as stack:
        url = stack.enter_context(StandIn(partial(score_for_stand_in, setting.teacher), k))
        teachers: list[Any] = [LocalTeacher(setting.teacher, k), ServedTeacher(url, k=k)]
        local, served = learners = [
            Learner(copy.deepcopy(setting.student), teacher.score, lr, seed) for teacher in teachers
        ]
        train(learners, setting.prompts, steps, completion_length)
    with console.status("held-out prompts, after"):
        after = [
            own_text_kl(learner.student, setting, completion_length, seed) for learner in learners
        ]

    output.mkdir(parents=True, exist_ok=True)
    plot(output / "on-policy.png", local, served, before, after)
    figures: dict[str, Any] = {
        name: {"losses": run.losses, "teacher_kl": run.teacher_kl, "held_out_kl": kl}
        for name, run, kl in zip(("local", "served"), learners, after, strict=True)
    }
    figures["before"] = {"held_out_kl": before}
    (output / "on-policy.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    console.print(results_table(local, served, before, after))
    console.print(
        f"{steps} steps of {batch} completions with up to {completion_length} tokens, K = {k}, "
        f"{torch.get_num_threads()} threads, {time.perf_counter() - start:.0f} s."
    )
    console.print(f"{output}: on-policy.png, on-policy.json")
    found = faults(local, served, before, after)
    if found:
        console.print(f"FAILED: {'; '.join(found)}.")
        raise typer.Exit(1)
    largest = max(differences(local.losses, served.losses))
    console.print(
        f"PASSED: both students wrote the same tokens, and their losses differ by {largest:.0e} at most (allowed: "
        f"{TOLERANCE:.0e})."
    )


if __name__ == "__main__":
    typer.run(main)
