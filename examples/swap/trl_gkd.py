"""Replace the loss of TRL's GKDTrainer: one import.

    python examples/swap/trl_gkd.py          # SmolLM2-135M and a student of six of its layers
    python examples/swap/trl_gkd.py --tiny   # two tiny models with random weights, in seconds

    - from trl.experimental.gkd import GKDConfig, GKDTrainer
    + from trl.experimental.gkd import GKDConfig
    + from fastkd.compat.trl import GKDTrainer

Both are trained here from the same weights on the same batches, and their losses have to agree.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from datasets import Dataset
from side_by_side import ASSETS, PROVERBS, Training, compare, of_trainer, setting
from trl.experimental.gkd import GKDConfig, GKDTrainer

import fastkd.compat.trl


def main(
    tiny: Annotated[bool, typer.Option(help="Two tiny models, and nothing to install.")] = False,
    steps: Annotated[int, typer.Option(min=1)] = 3,
    assets: Annotated[Path, typer.Option(help="Where SmolLM2 lies.")] = ASSETS,
) -> None:
    """Distil with TRL's loss, then with fastkd's."""
    models = setting(tiny, assets)
    dataset = Dataset.from_dict(
        {
            "messages": [
                [{"role": "user", "content": begun}, {"role": "assistant", "content": ended}]
                for begun, ended in PROVERBS
            ]
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(
            output_dir=folder,
            lmbda=0.0,  # the share of batches that the student writes itself
            beta=0.5,
            max_length=48,
            learning_rate=1e-4,
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=False,
        )

        def training(trainer_class: type[GKDTrainer]) -> Training:
            trainer = trainer_class(
                model=models.new_student(),
                teacher_model=models.teacher,
                args=args,
                train_dataset=dataset,
                processing_class=models.tokenizer,
            )
            return of_trainer(trainer)

        compare(
            "TRL",
            lambda: training(GKDTrainer),
            lambda: training(fastkd.compat.trl.GKDTrainer),
            tiny,
        )


if __name__ == "__main__":
    typer.run(main)
