"""TRL's trainers for distillation: a whole step with TRL's loss and with fastkd's, in time and memory.

    python bench/studies/trl_trainers.py

A step is the trainer's compute_loss and the backward pass: both models run, but no text is generated and no server is
contacted. Both trainers of a pair have the same models and batch. The models have random weights and few layers. A
stand-in for the server returns the same random log-probabilities to both.

- Parity: the study fails unless the losses and the norms of the gradients agree.
- Times: the two take turns in random order; the ratio is the median of the ratios within rounds.
- Memory: the peak of a step beyond the models and the batch, gradients included.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import study
import torch
from accelerate import Accelerator
from datasets import Dataset
from measure import MIB, Contender, interleave, milliseconds, peak_extra, ratio
from study import emit, progress
from support import tiny_models
from tables import Table
from torch import Tensor

import fastkd.compat.trl as adapter

COLUMNS = ("trainer", "TRL's ms", "fastkd's", "times as fast", "TRL's MiB", "fastkd's", "share")
# The largest relative difference that is allowed, between the two losses and between the norms of their gradients.
TOLERANCE = 1e-3


class Sizes(NamedTuple):
    """The sizes of a batch and of both models."""

    sequences: int
    prompt: int
    completion: int
    vocabulary: int
    width: int
    layers: int


class Case(NamedTuple):
    """A trainer of TRL, and its options."""

    label: str
    package: str
    name: str
    config: str
    options: dict[str, Any]
    data: str = "messages"


TOP = {"loss_top_k": 20, "beta": 0.0}
SELF = {"num_generations": 2, "teacher_model_kind": "live"}
HYBRID = {"use_uld_loss": True, "uld_use_hybrid_loss": True}
CASES = (
    Case("GKDTrainer", "trl.experimental.gkd", "GKDTrainer", "GKDConfig", {"lmbda": 0.0}),
    Case(
        "GOLDTrainer, one tokenizer", "trl.experimental.gold", "GOLDTrainer", "GOLDConfig", {"lmbda": 0.0}
    ),
    Case(
        "GOLDTrainer, hybrid ULD", "trl.experimental.gold", "GOLDTrainer", "GOLDConfig",
        {"lmbda": 0.0} | HYBRID,
    ),
    Case("DistillationTrainer", "trl", "DistillationTrainer", "DistillationConfig", {}, "prompt"),
    Case("IWOPDTrainer", "trl.experimental.iw_opd", "IWOPDTrainer", "IWOPDConfig", {}),
    Case(
        "IWOPDTrainer, whole rows", "trl.experimental.iw_opd", "IWOPDTrainer", "IWOPDConfig",
        {"distillation_objective": "jsd", "loss_top_k": 0, "lmbda": 0.0},
    ),
    Case(
        "IWOPDTrainer, a server", "trl.experimental.iw_opd", "IWOPDTrainer", "IWOPDConfig",
        {"use_teacher_server": True, "teacher_model_server_url": "http://none"},
    ),
    Case(
        "ServerDistillationTrainer", "trl.experimental.server_distillation", "ServerDistillationTrainer",
        "ServerDistillationConfig", {"teacher_model_server_url": "http://none"} | TOP, "prompt",
    ),
    Case(
        "SDFTTrainer, whole rows", "trl.experimental.sdft", "SDFTTrainer", "SDFTConfig",
        SELF | {"distillation_mode": "full_logits"}, "contexts",
    ),
    Case(
        "SDPOTrainer, top 100", "trl.experimental.sdpo", "SDPOTrainer", "SDPOConfig",
        SELF | {"distillation_mode": "topk_logits", "distillation_topk": 100}, "rewards",
    ),
)  # fmt: skip


def byte_tokenizer(vocabulary: int, skipped: int = 0) -> Any:
    """A byte-level BPE tokenizer, which GOLD needs.

    The vocabulary contains all bytes. Pairs of bytes, in order and without the first `skipped` ones, fill the rest.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Digits and letters come first, so that the text contains many of the pairs that become tokens.
    alphabet.sort(key=lambda byte: not byte.isalnum())
    pairs = [(a, b) for a in alphabet for b in alphabet]
    names = ["<pad>", "<eos>", "<unk>", *alphabet]
    merges = pairs[skipped : skipped + vocabulary - len(names)]
    names += ["".join(pair) for pair in merges]
    words = {name: index for index, name in enumerate(names)}
    made = Tokenizer(models.BPE(words, merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **special)
    tokenizer.chat_template = tiny_models.CHAT
    return tokenizer


class Server:
    """A stand-in for TRL's client, with random log-probabilities that are the same in every call."""

    def __init__(self, *, vocabulary: int, **_: Any) -> None:
        self.vocabulary = vocabulary
        self.kept: dict[str, list[Any]] = {}

    def get_sequence_logprobs(
        self, sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, **_: Any
    ) -> dict[str, list[Any]]:
        """Random log-probabilities of the K most probable tokens and of the sampled one."""
        if self.kept:
            return self.kept
        self.kept = {"logprobs": [], "logprob_token_ids": [], "actual_logprobs": []}
        for sequence, start in zip(sequences, prompt_lengths, strict=True):
            rows = (3 * torch.randn(len(sequence) - start, self.vocabulary)).log_softmax(-1)
            top = rows.topk(top_logprobs)
            own = rows.gather(-1, torch.tensor(sequence[start:]).unsqueeze(-1))
            for name, value in zip(self.kept, (top.values, top.indices, own), strict=True):
                self.kept[name].append(value.tolist())
        return self.kept


def dataset(case: Case, sizes: Sizes) -> Dataset:
    """A data set with the examples of one batch."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        ids = torch.randint(30, sizes.vocabulary // 2, (count,), generator=generator)
        if case.name == "GOLDTrainer":  # its tokenizer splits a word into about four tokens
            ids = ids[: count // 4]
        return " ".join(f"w{i}" for i in ids.tolist())

    count = range(sizes.sequences)
    if case.data == "prompt":
        return Dataset.from_dict({"prompt": [words(sizes.prompt) for _ in count]})
    users = [[{"role": "user", "content": words(sizes.prompt)}] for _ in count]
    if case.data != "messages":
        columns: dict[str, Any] = {"prompt": users}
        if case.data == "contexts":
            columns["privileged_context"] = [words(sizes.completion) for _ in count]
        return Dataset.from_dict(columns)
    answers = [[{"role": "assistant", "content": words(sizes.completion)}] for _ in count]
    chats = [user + answer for user, answer in zip(users, answers, strict=True)]
    return Dataset.from_dict({"messages": chats})


def model(sizes: Sizes, seed: int, width: int) -> Any:
    """A model with enough positions for a batch, and for the teacher's prompts, which are longer in SDFT and SDPO."""
    return tiny_models.llama(
        sizes.vocabulary, width, seed, num_hidden_layers=sizes.layers, num_attention_heads=8, num_key_value_heads=4,
        initializer_range=0.05, max_position_embeddings=4 * (sizes.prompt + sizes.completion) + 64,
    )  # fmt: skip


def rewards(completions: Sequence[Any], **_: Any) -> list[float]:
    """The reward of each completion: 1 for every other one, 0 for the rest."""
    return [float(index % 2) for index in range(len(completions))]


def trainers(case: Case, sizes: Sizes, folder: Path) -> tuple[Any, Any, Any]:
    """TRL's trainer, fastkd's trainer, and a batch that TRL's has prepared."""
    import importlib

    from trl.generation import vllm_client

    vllm_client.VLLMClient = partial(Server, vocabulary=sizes.vocabulary)
    package = importlib.import_module(case.package)
    lengths = {"max_completion_length": sizes.completion}
    if case.name in ("GKDTrainer", "GOLDTrainer", "IWOPDTrainer"):
        lengths["max_length"] = sizes.prompt + sizes.completion + 8
    if case.name == "GKDTrainer":
        lengths["max_new_tokens"] = lengths.pop("max_completion_length")
    options = dict(case.options)
    words = tiny_models.tokenizer(sizes.vocabulary)
    if case.name == "GOLDTrainer":
        words = byte_tokenizer(sizes.vocabulary)
    if options.get("use_uld_loss"):
        byte_tokenizer(sizes.vocabulary, sizes.vocabulary // 8).save_pretrained(folder / "teacher")
        options["teacher_tokenizer_name_or_path"] = str(folder / "teacher")
    args = getattr(package, case.config)(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=sizes.sequences, gradient_checkpointing=False, max_steps=1, seed=3,
        **lengths, **options,
    )  # fmt: skip
    student = model(sizes, 1, sizes.width)
    given: dict[str, Any] = {
        "model": student, "args": args, "train_dataset": dataset(case, sizes), "processing_class": words,
    }  # fmt: skip
    if case.name in ("GKDTrainer", "GOLDTrainer", "DistillationTrainer", "IWOPDTrainer"):
        if options.get("use_teacher_server"):
            given["teacher_model"] = None
        else:
            words.save_pretrained(folder / "words")
            given["teacher_model"] = model(sizes, 2, 2 * sizes.width)
            given["teacher_model"].config._name_or_path = str(folder / "words")
    if case.data == "rewards":
        given["reward_funcs"] = rewards
    pair = [kind(**given) for kind in (getattr(package, case.name), getattr(adapter, case.name))]
    for trainer in pair:
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        if hasattr(trainer, "teacher_client"):
            trainer.teacher_client = pair[0].teacher_client
    torch.manual_seed(0)
    stock = pair[0]
    batch = stock._prepare_inputs(next(iter(stock.get_train_dataloader())))
    return stock, pair[1], batch


def asynchronous(sizes: Sizes) -> tuple[Any, Any, Any]:
    """TRL's AsyncDistillationTrainer, fastkd's, and a batch. The constructors need servers, so they are not called."""
    from trl.experimental.async_distillation import AsyncDistillationTrainer

    student = model(sizes, 1, sizes.width).train()
    length = sizes.sequences * (sizes.prompt + sizes.completion)
    ids = torch.randint(30, sizes.vocabulary, (1, length))
    top = (3 * torch.randn(1, length, sizes.vocabulary)).log_softmax(-1).topk(8)
    one = torch.arange(sizes.prompt + sizes.completion)
    counted = sizes.sequences * sizes.completion
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "completion_mask": (one >= sizes.prompt).long().repeat(sizes.sequences)[None],
        "position_ids": one.repeat(sizes.sequences)[None],
        "teacher_topk_ids": top.indices, "teacher_topk_logprobs": top.values,
        "global_n_tokens": torch.tensor([counted]), "global_n_forward_tokens": torch.tensor([length]),
        "mean_seq_len": torch.tensor([float(len(one))]),
    }  # fmt: skip
    pair = []
    for kind in (AsyncDistillationTrainer, adapter.AsyncDistillationTrainer):
        trainer = kind.__new__(kind)
        trainer.args = SimpleNamespace(beta=0.0, teacher_temperature=1.0, add_tail_bucket=True)
        trainer.accelerator, trainer.model = Accelerator(cpu=True), student
        trainer.current_gradient_accumulation_steps = 1
        trainer._teacher_ids = ["one"]
        for name in (
            "forward_tokens",
            "trained_tokens",
            "seq_len_weighted",
            "samples",
            "forward_s",
        ):
            setattr(trainer, f"_step_{name}", 0.0)
        trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        trainer.compute_loss = partial(_of_async, trainer)
        pair.append(trainer)
    return pair[0], pair[1], batch


def _of_async(trainer: Any, student: Any, batch: Any, num_items_in_batch: object = None) -> Tensor:
    loss: Tensor = trainer._compute_loss(student, batch)
    return loss


def step_of(trainer: Any, batch: Any) -> Contender:
    """Forward and backward of a batch."""

    def run() -> Tensor:
        loss: Tensor = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=None)
        loss.backward()
        return loss.detach()

    return Contender(run, partial(trainer.model.zero_grad, set_to_none=True))


def check_parity(label: str, contenders: dict[str, Contender], student: Any) -> None:
    """Raise unless the losses and the norms of the gradients agree."""
    found = []
    for run, clean_up in contenders.values():
        loss: Any = run()
        squares = [
            p.grad.double().square().sum() for p in student.parameters() if p.grad is not None
        ]
        found.append((float(loss), float(torch.stack(squares).sum().sqrt())))
        clean_up()
    for one, other in zip(*found, strict=True):
        if not abs(one - other) <= TOLERANCE * abs(one):
            raise SystemExit(
                f"{label}: the loss and the gradient's norm are {found[0]} in TRL, and {found[1]} in fastkd"
            )


def measured(
    label: str, build: Callable[[], tuple[Any, Any, Any]], rounds: int
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """A row of the table, and the measurements."""
    progress(label)
    stock, ours, batch = build()
    contenders = {"TRL": step_of(stock, batch), "fastkd": step_of(ours, batch)}
    check_parity(label, contenders, ours.model)
    peaks = {}
    for name, (run, clean_up) in contenders.items():
        peaks[name] = peak_extra(run)
        clean_up()
    seconds = interleave(contenders, rounds)
    row = (
        label,
        milliseconds(seconds["TRL"]),
        milliseconds(seconds["fastkd"]),
        f"{ratio(seconds, 'TRL', 'fastkd'):.1f}x",
        *(f"{peaks[name] / MIB:.0f}" for name in contenders),
        f"{100 * peaks['fastkd'] / peaks['TRL']:.0f}%",
    )
    return row, {"trainer": label, "seconds": seconds, "peak_bytes": peaks}


def main() -> None:
    """The command line."""
    parser = study.command_line(__doc__, rounds=7)
    parser.add_argument(
        "--sizes", type=study.shape_of, default=(2, 64, 64, 49_152, 256, 2),
        metavar="SEQUENCESxPROMPTxCOMPLETIONxVxWIDTHxLAYERS", help="the teacher is twice as wide",
    )  # fmt: skip
    parser.add_argument(
        "--trainers", nargs="+", metavar="NAME", help="only trainers whose label contains a NAME"
    )
    arguments = study.parsed(parser)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    sizes = Sizes(*arguments.sizes)
    with tempfile.TemporaryDirectory() as folder:
        builds = {case.label: partial(trainers, case, sizes, Path(folder)) for case in CASES}
        builds["AsyncDistillationTrainer"] = partial(asynchronous, sizes)
        wanted = arguments.trainers or [""]
        results = [
            measured(label, build, arguments.rounds)
            for label, build in builds.items()
            if any(name in label for name in wanted)
        ]
    title = (
        f"A step of {sizes.sequences} sequences of {sizes.prompt} + {sizes.completion} tokens, "
        f"V = {sizes.vocabulary:,}, students of width {sizes.width} with {sizes.layers} layers, float32"
    )
    table = Table(title, COLUMNS)
    table.rows += [row for row, _ in results]
    emit(arguments, [table], [measurement for _, measurement in results])


if __name__ == "__main__":
    main()
