"""Quantization-aware distillation with NVIDIA Model-Optimizer: the student has fake-quantized weights and activations.

    python examples/swap/modelopt_qad.py          # SmolLM2-135M teaches a student of six of its layers, in 8 bits
    python examples/swap/modelopt_qad.py --tiny   # two tiny models with random weights, in seconds

    - from modelopt.torch.quantization.plugins.transformers_trainer import QADTrainer
    + from fastkd.compat.modelopt import QADTrainer

`mtq.quantize` inserts the quantizers and calibrates them on a few batches; a gradient passes through their rounding as
if it were not there. The student then learns from the unquantized teacher. Both trainers start from the same student
and see the same batches, and their losses must agree. For 4-bit weights, pass --format int4; other formats of
Model-Optimizer, such as NVFP4, need a GPU.
"""

import contextlib
import copy
import io
import tempfile
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from side_by_side import ASSETS, Training, compare, console, of_trainer, setting
from transformers import DataCollatorForLanguageModeling, TrainingArguments

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Model-Optimizer warns about optional packages
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.plugins.transformers_trainer import QADTrainer

import fastkd.compat.modelopt


class Format(str, Enum):
    """A numeric format of weights that Model-Optimizer simulates on a CPU."""

    INT8 = "int8"  # 8 bits, and activations too
    INT4 = "int4"  # 4 bits in blocks of 128, activations as they are


CONFIGS = {
    Format.INT8: mtq.INT8_DEFAULT_CFG,
    Format.INT4: mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
}


def quantized(student: Any, number_format: Format, batches: list[dict[str, Any]]) -> Any:
    """Insert fake quantizers into the student and calibrate them on the batches."""

    def calibrate(model: Any) -> None:
        for batch in batches:
            model(batch["input_ids"])

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it has inserted
        return mtq.quantize(student.eval(), CONFIGS[number_format], calibrate).train()


def main(
    tiny: Annotated[bool, typer.Option(help="Use two tiny models; needs no download.")] = False,
    number_format: Annotated[Format, typer.Option("--format")] = Format.INT8,
    steps: Annotated[int, typer.Option(min=1)] = 3,
    assets: Annotated[Path, typer.Option(help="Folder with SmolLM2.")] = ASSETS,
) -> None:
    """Distil into a quantized student with Model-Optimizer's loss and with fastkd's, and compare."""
    models = setting(tiny, assets)
    student = quantized(models.new_student(), number_format, models.batches(2))
    rows = [row for batch in models.batches(steps) for row in batch["input_ids"].tolist()]
    dataset = [{"input_ids": row} for row in rows]

    def training(trainer_class: Any, folder: str) -> Training:
        args = TrainingArguments(
            output_dir=folder,
            learning_rate=1e-4,
            max_steps=steps,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = trainer_class(
            model=copy.deepcopy(student),
            args=args,
            train_dataset=dataset,
            data_collator=DataCollatorForLanguageModeling(models.tokenizer, mlm=False),
            distill_args={"teacher_model": models.teacher, "temperature": 2.0},
        )
        return of_trainer(trainer)

    layers = sum(1 for name, _ in student.named_modules() if name.endswith("weight_quantizer"))
    console.print(f"{layers} layers have fake-quantized weights ({number_format.value}).")
    # Each run has its own folder: the trainer saves the state of the quantizers there, and would read the other's.
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        compare(
            "Model-Optimizer",
            lambda: training(QADTrainer, theirs),
            lambda: training(fastkd.compat.modelopt.QADTrainer, ours),
            tiny,
        )


if __name__ == "__main__":
    typer.run(main)
