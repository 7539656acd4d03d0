"""Replace the distillation loss of a Hugging Face Trainer: a class and its options.

    python examples/swap/hf_trainer.py          # SmolLM2-135M and a student of six of its layers
    python examples/swap/hf_trainer.py --tiny   # two tiny models with random weights, in seconds

    - trainer = PlainTrainer(student, args, train_dataset=data, teacher_model=teacher)
    + from fastkd.compat.transformers import KDTrainer
    + options = {"alpha": 0.9, "temperature": 2.0}
    + trainer = KDTrainer(student, args, train_dataset=data, teacher_model=teacher, loss_kwargs=options)

PlainTrainer, below, is written by hand. Both trainers start from the same weights and see the same batches, and their
losses must agree. `--fused` computes fastkd's loss from hidden states and lm_heads, without logits.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from side_by_side import ASSETS, PROVERBS, Training, compare, of_trainer, setting
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from fastkd.compat.transformers import KDTrainer

ALPHA, TEMPERATURE = 0.9, 2.0


class PlainTrainer(Trainer):
    """Distillation in eager PyTorch."""

    def __init__(self, *args: Any, teacher_model: torch.nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher_model = teacher_model.eval()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """alpha T^2 KL(teacher || student) + (1 - alpha) CE, over the tokens of the whole batch."""
        labels = inputs.pop("labels")[:, 1:]
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher_model(**inputs).logits[:, :-1]
        student_logits = outputs.logits[:, :-1]
        kd = F.kl_div(
            F.log_softmax(student_logits / TEMPERATURE, dim=-1),
            F.log_softmax(teacher_logits / TEMPERATURE, dim=-1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        kd = (kd * (labels != -100)).sum() * TEMPERATURE**2
        ce = F.cross_entropy(student_logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = (ALPHA * kd + (1 - ALPHA) * ce) / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def main(
    tiny: Annotated[bool, typer.Option(help="Use two tiny models; needs no download.")] = False,
    fused: Annotated[bool, typer.Option(help="Compute the loss without logits.")] = False,
    steps: Annotated[int, typer.Option(min=1)] = 3,
    assets: Annotated[Path, typer.Option(help="Folder with SmolLM2.")] = ASSETS,
) -> None:
    """Distil with a loss in PyTorch and with fastkd's, and compare."""
    models = setting(tiny, assets)
    proverbs = models.tokenizer([f"{start} {end}" for start, end in PROVERBS])
    dataset = [{"input_ids": ids} for ids in proverbs["input_ids"]]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            learning_rate=1e-4,
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )

        def training(trainer_class: type[Trainer], **options: Any) -> Training:
            trainer = trainer_class(
                models.new_student(),
                args,
                train_dataset=dataset,
                data_collator=DataCollatorForLanguageModeling(models.tokenizer, mlm=False),
                teacher_model=models.teacher,
                **options,
            )
            return of_trainer(trainer)

        loss = {"alpha": ALPHA, "temperature": TEMPERATURE}
        compare(
            "PyTorch",
            lambda: training(PlainTrainer),
            lambda: training(KDTrainer, loss_kwargs=loss, fused=fused),
            tiny,
        )


if __name__ == "__main__":
    typer.run(main)
