"""Small models of many classes of transformers, with random weights, and a tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TEXT = (
    "in the beginning god created the heaven and the earth and the earth was without form and void"
)
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def llama(
    vocabulary: int = 61, width: int = 16, seed: int = 0, **config: object
) -> LlamaForCausalLM:
    """A model with two layers, whose weights give distributions that differ from uniform ones."""
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


def built(name: str, seed: int = 0, **config: object) -> PreTrainedModel:
    """A model of this class of transformers, with one layer that is wide enough to distinguish inputs."""
    import transformers

    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    model = kind(kind.config_class(**(SIZES.get(kind.config_class.model_type, {}) | config)))
    with torch.no_grad():  # so that distributions differ from uniform ones, and from each other
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    return model


_ENCODER = {
    "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32,
}  # fmt: skip
_DECODER = _ENCODER | {
    "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
_BART = {
    "vocab_size": 61, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1, "dropout": 0.0,
    "forced_eos_token_id": None,
}  # fmt: skip
SIZES: dict[str, dict[str, object]] = {
    "bert": _ENCODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": _ENCODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1},
    "distilbert": {
        "vocab_size": 61, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 32,
        "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
    },
    "gpt2": {
        "vocab_size": 61, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1,
    },
    "llama": _DECODER,
    "mixtral": _DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "t5": {
        "vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    },
    "switch_transformers": {
        "vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 2, "num_experts": 2, "dropout_rate": 0.0, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
        "router_jitter_noise": 0.0, "output_router_logits": True,
    },
    "bart": _BART,
    "vit": {
        "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "mamba2": {
        "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8, "state_size": 8,
        "n_groups": 1, "chunk_size": 4, "expand": 2,
    },
}  # fmt: skip


def tokenizer(vocabulary: int = 61) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *dict.fromkeys(TEXT.split())]
    words += [f"w{i}" for i in range(vocabulary - len(words))]
    words_to_ids = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(words_to_ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    actual = PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **special)
    actual.chat_template = CHAT
    return actual
