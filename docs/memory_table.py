"""Prints the memory table of docs/teachers.md as Markdown: python docs/memory_table.py."""

import fastkd
import torch

# (model, vocabulary, width) from the models' configurations
MODELS = (
    ("SmolLM2-135M", 49_152, 576),
    ("Llama-3-8B", 128_256, 4_096),
    ("Qwen2.5-7B", 152_064, 3_584),
    ("Gemma-3-4B", 262_208, 2_560),
)
TOKENS = 8_192


def gib(size: int) -> str:
    """A size in bytes, formatted in GiB."""
    return f"{size / 2**30:.2f}"


def main() -> None:
    """Print the table."""
    print(
        "| model | V | whole logits, GiB | teacher | chunk, rows | held by the call, GiB | kept by the caller, GiB |"
    )
    print("|---|---:|---:|---|---:|---:|---:|")
    for model, vocabulary, width in MODELS:
        for form in ("dense", "linear", "topk"):
            plan = fastkd.memory_plan(
                TOKENS,
                vocabulary,
                width,
                teacher=form,
                dtype=torch.bfloat16,
                device="cuda",
            )
            cells = (f"{plan.chunk_size:,}", gib(plan.peak), gib(plan.teacher))
            first = (
                (model, f"{vocabulary:,}", gib(plan.dense))
                if form == "dense"
                else ("", "", "")
            )
            print("| " + " | ".join((*first, form, *cells)) + " |")


if __name__ == "__main__":
    main()
