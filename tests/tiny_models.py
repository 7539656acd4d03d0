"""Real causal language models of transformers, with random weights, and a tokenizer: small enough for a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = (
    "in the beginning god created the heaven and the earth and the earth was without form and void"
)
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def llama(
    vocabulary: int = 61, width: int = 16, seed: int = 0, **config: object
) -> LlamaForCausalLM:
    """Two layers, with weights that make its distributions differ from uniform ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "vocab_size": vocabulary,
    }
    return LlamaForCausalLM(LlamaConfig(**(options | config)))


def tokenizer(vocabulary: int = 61) -> PreTrainedTokenizerFast:
    """A word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *dict.fromkeys(TEXT.split())]
    words += [f"w{i}" for i in range(vocabulary - len(words))]
    words_to_ids = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(words_to_ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    found = PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **special)
    found.chat_template = CHAT
    return found
