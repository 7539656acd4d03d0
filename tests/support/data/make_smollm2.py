"""How smollm2.npz was made: real logits, a few positions of the King James text under SmolLM2-135M-Instruct.

    python tests/support/data/make_smollm2.py build/demo        (the folder that `make demo` fills)

The teacher has read the 64 tokens before each position, the student only the last three of them: two distributions of
one model that agree as much as a trained student's do with its teacher's. float16 [8, 49152] each.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples"))

import smollm2

POSITIONS, CONTEXT, SHORT = 8, 64, 3


def main(folder: Path) -> None:
    model, tokenizer = smollm2.load(folder)
    tokens = tokenizer(smollm2.king_james(folder)[:100_000])["input_ids"]
    ends = torch.linspace(CONTEXT, len(tokens), POSITIONS).long().tolist()

    def logits(context: int) -> np.ndarray:
        windows = torch.tensor([tokens[end - context : end] for end in ends])
        with torch.no_grad():
            return model(windows).logits[:, -1].half().numpy()

    np.savez_compressed(
        Path(__file__).with_name("smollm2.npz"), teacher=logits(CONTEXT), student=logits(SHORT)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
