"""Replace the losses of other training stacks, each in the same plain loop.

    python examples/swap/losses.py                      # SmolLM2-135M teaches a student of six of its layers
    python examples/swap/losses.py --tiny               # random models, in seconds
    python examples/swap/losses.py --only verl --only axolotl

Most of these stacks train only on GPUs or a cluster, but their losses run on any machine. Each stack's loss and
fastkd's adapter are both called as the stack calls its loss. Both train the same student on the same batches; the run
fails if the curves differ by more than rounding errors.
"""

import importlib
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from originals import module_of
from side_by_side import ASSETS, Batch, Note, Setting, compare, console, setting
from torch import Tensor, nn

import fastkd
from fastkd import compat

K = 32  # tokens that a teacher lists, if the vocabulary has that many
T = 2.0


@dataclass
class Step:
    """What a stack's loss may ask for in a step: the student's outputs, the teacher's, and shifted labels [B, S]."""

    student: Any
    batch: Batch
    teacher_logits: Tensor

    @cached_property
    def logits(self) -> Tensor:
        """The student's logits [B, S, V]."""
        result: Tensor = self.student(self.batch["input_ids"], use_cache=False).logits
        return result

    @cached_property
    def hidden(self) -> Tensor:
        """The student's hidden states [B, S, H], for losses that compute the logits themselves."""
        result: Tensor = self.student.model(self.batch["input_ids"], use_cache=False)[0]
        return result

    @property
    def head(self) -> nn.Parameter:
        """The weight of the student's lm_head."""
        weight: nn.Parameter = self.student.lm_head.weight
        return weight

    @property
    def labels(self) -> Tensor:
        """The token that each position predicts; -100 in prompts."""
        return self.batch["labels"]

    @property
    def mask(self) -> Tensor:
        """1 for positions that count."""
        return (self.labels != -100).float()

    @cached_property
    def topk(self) -> tuple[Tensor, Tensor]:
        """(log-probabilities, ids) of the teacher's K most probable tokens."""
        logprobs = self.teacher_logits.log_softmax(-1)
        return logprobs.topk(min(K, logprobs.shape[-1]))


Loss = Callable[[Step], Tensor]


# Each function below takes the stack's module or fastkd's, and returns a loss that calls it as the stack does.


def nemo_automodel(module: Any) -> Loss:
    """NeMo AutoModel's KDLoss."""
    loss = module.KDLoss(temperature=T)
    return lambda step: loss(step.logits, step.teacher_logits, step.labels)


def torchtune(module: Any) -> Loss:
    """torchtune's symmetric KL, whose forward part is -sum p log q."""
    loss = module.SymmetricKLLoss()
    return lambda step: loss(step.logits, step.teacher_logits, step.labels)


def torchdistill(module: Any) -> Loss:
    """torchdistill's KDLoss, with the outputs that hooks would have captured."""
    loss = module.KDLoss("head", "output", "head", "output", temperature=T, alpha=0.9)

    def call(step: Step) -> Tensor:
        counted = step.labels != -100
        sides = (step.logits[counted], step.teacher_logits[counted])
        hooks = ({"head": {"output": side}} for side in sides)
        return loss(*hooks, targets=step.labels[counted])

    return call


def swift(module: Any) -> Loss:
    """ms-swift's gkd_loss on the teacher's top k."""
    teacher_output = module_of("swift.rlhf_trainers.gkd_loss").TeacherOutput

    def call(step: Step) -> Tensor:
        logprobs, ids = step.topk
        teacher = teacher_output(topk_logprobs=logprobs, topk_indices=ids, labels=step.labels)
        total, counted = module.gkd_loss(step.logits, teacher, step.labels, 0.5, T)
        return total / counted

    return call


def verl(module: Any) -> Loss:
    """verl's truncated forward KL, with all positions of the batch as one sequence."""
    options = SimpleNamespace(
        log_prob_min_clamp=None, use_chunked_topk=False, chunked_topk_chunk_size=4096
    )

    def call(step: Step) -> Tensor:
        counted = step.labels != -100
        logits, (logprobs, ids) = step.logits[counted].unsqueeze(0), step.topk
        if module is compat.verl:
            lists = (logprobs[counted][None], ids[counted][None])
            outputs = module.topk_losses(logits, *lists, fastkd.forward_kl(), "truncate")
        else:
            nested = (
                torch.nested.nested_tensor([x[counted]], layout=torch.jagged)
                for x in (logprobs, ids)
            )
            outputs = module.compute_forward_kl_topk(
                logits, *nested, SimpleNamespace(distillation_loss=options), "thd"
            )
        return outputs["distillation_losses"].mean()

    return call


def veomni(module: Any) -> Loss:
    """VeOmni's loss from hidden states, beside a policy loss that trains on log-probabilities and entropy."""

    def call(step: Step) -> Tensor:
        logprobs, ids = step.topk
        log_q, entropy, losses, _, _ = module.chunk_topk_distill_function(
            step.hidden, step.head, step.labels, ids, logprobs, shift_labels=step.labels
        )
        return (losses - 0.1 * log_q - 0.01 * entropy).sum() / step.mask.sum()

    return call


def axolotl(module: Any) -> Loss:
    """Axolotl's loss from hidden states, at temperature 1, because its gradient lacks the factor T^2."""
    loss = module.LigerFusedLinearKLTopKLogprobLoss(0.1, 0.9, 1.0, 0.0, compiled=False)

    def call(step: Step) -> Tensor:
        logprobs, ids = step.topk
        counted = (step.labels != -100).unsqueeze(-1).expand_as(ids)
        # Axolotl shifts the labels itself, so this undoes the shift of step.labels.
        labels = torch.cat([torch.full_like(step.labels[:, :1], -100), step.labels[:, :-1]], 1)
        normalized = logprobs.log_softmax(-1)
        total = loss(step.head, step.hidden, ids, normalized, counted, labels)
        return total / step.mask.sum()

    return call


def skyrl(module: Any) -> Loss:
    """SkyRL's loss of a draft head, here the student."""
    return lambda step: module.draft_soft_ce(step.logits, step.teacher_logits, step.mask)


def skyrl_topk(module: Any) -> Loss:
    """SkyRL's loss of a draft head over the policy's top k."""
    return lambda step: module.draft_soft_ce_topk(step.logits, step.teacher_logits, step.mask, K)


def speculators(module: Any) -> Loss:
    """speculators' weighted sum of cross-entropy and TV for a draft model, here the student."""
    if module is compat.speculators:
        terms = [(module.ce_loss, 0.1), (module.tv_loss, 0.9)]
    else:
        terms = list(module.resolve_loss_config('{"ce": 0.1, "tv": 0.9}', "eager").values())

    def call(step: Step) -> Tensor:
        counted = step.labels != -100
        pair = (step.logits[counted].unsqueeze(0), step.teacher_logits[counted].unsqueeze(0))
        return torch.stack([weight * function(*pair) for function, weight in terms]).sum(0).mean()

    return call


def specforge(module: Any) -> Loss:
    """SpecForge's negative log of the acceptance (lk_loss_type: alpha); its other loss needs a GPU."""

    def call(step: Step) -> Tensor:
        _, log_acceptance = module.compute_acceptance_rate(
            logits=step.logits,
            target_probs=step.teacher_logits.softmax(-1),
            position_mask=step.mask.unsqueeze(-1),
        )
        return -log_acceptance

    return call


def _veomni() -> Any:
    """Import VeOmni's file with a stand-in for the module that tells it whether sequences are sharded."""
    state = "veomni.distributed.parallel_state"
    parents = ("veomni.distributed", state)
    for name in parents:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[state].get_parallel_state = lambda: SimpleNamespace(sp_enabled=False)  # type: ignore[attr-defined]
    return module_of("veomni.ops.kernels.cross_entropy.chunk_topk_distill")


_SHAPES = {"jaxtyping": dict.fromkeys(("Float", "Integer"), typing.Annotated)}
_SKYRL = "skyrl.backends.skyrl_train.mtp.soft_ce"

# The name on the command line: the loss, and how to import the stack's module.
SWAPS: dict[str, tuple[Callable[[Any], Loss], Callable[[], Any]]] = {
    "nemo_automodel": (
        nemo_automodel,
        lambda: module_of("nemo_automodel.components.loss.kd_loss"),
    ),
    "torchtune": (torchtune, lambda: importlib.import_module("torchtune.modules.loss")),
    "torchdistill": (
        torchdistill,
        lambda: importlib.import_module("torchdistill.losses.mid_level"),
    ),
    "swift": (swift, lambda: module_of("swift.rlhf_trainers.gkd_loss")),
    "verl": (verl, lambda: importlib.import_module("verl.trainer.distillation.fsdp.losses")),
    "veomni": (veomni, _veomni),
    "axolotl": (axolotl, lambda: module_of("axolotl.integrations.kd.kernels.liger")),
    "speculators": (speculators, lambda: module_of("speculators.losses.utils")),
    "specforge": (specforge, lambda: module_of("specforge.core.lk_loss")),
    "skyrl": (skyrl, lambda: module_of(_SKYRL, **_SHAPES)),
    "skyrl_topk": (skyrl_topk, lambda: module_of(_SKYRL, **_SHAPES)),
}


def train(models: Setting, batches: list[Batch], loss_of_step: Loss, note: Note) -> None:
    """Train a new student on all batches."""
    student: Any = models.new_student()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4)
    for batch in batches:
        with torch.no_grad():
            teacher_logits = models.teacher(batch["input_ids"], use_cache=False).logits
        loss = loss_of_step(Step(student, batch, teacher_logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        note(loss.item())


def main(
    tiny: Annotated[bool, typer.Option(help="Use two tiny models; needs no download.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="A stack; default: all.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 3,
    assets: Annotated[Path, typer.Option(help="Folder with SmolLM2.")] = ASSETS,
) -> None:
    """Train with the loss of each stack and with fastkd's, and compare."""
    for name in only or ():
        if name not in SWAPS:
            raise typer.BadParameter(f"--only must be one of {', '.join(SWAPS)}; got {name}")
    models = setting(tiny, assets)
    batches = models.batches(steps)
    for name in only or SWAPS:
        loss, original = SWAPS[name]
        console.print(f"{loss.__doc__}")
        ours, theirs = getattr(compat, name.removesuffix("_topk")), original()
        compare(
            name,
            partial(partial, train, models, batches, loss(theirs)),
            partial(partial, train, models, batches, loss(ours)),
            tiny,
        )


if __name__ == "__main__":
    typer.run(main)
