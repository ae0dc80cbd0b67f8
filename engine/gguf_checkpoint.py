"""Turns one llama-architecture GGUF into the files of a normal checkpoint, without torch or transformers.

`write_checkpoint(gguf, folder, dtype)` fills an existing folder with `config.json`, `generation_config.json`,
`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and `model.safetensors`. Weights are
dequantised to float32, then rounded to nearest-even when bfloat16 is asked for; one tensor is in memory at
a time. Nothing here is atomic and nothing is checked against a checksum: that is `smollm2.py`.

It knows what SmolLM2 needs and refuses the rest: byte-level BPE (`gpt2`) with the `smollm` pre-tokenizer, tied
embeddings, no rope scaling. The pre-tokenizer is the reason not to take the tokenizer that transformers makes
of a GGUF: that one ignores `tokenizer.ggml.pre`, so that a digit after two blanks or newlines gets other
token ids than the model was trained with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from longtail.engine.errors import ModelSourceError

if TYPE_CHECKING:
    from gguf import GGUFReader

CheckpointDtype = Literal["float32", "bfloat16"]

#: Called with what is being done and how much of it is done, 0 to 1.
Progress = Callable[[str, float], None]

_SAFETENSORS_DTYPE = {"float32": "F32", "bfloat16": "BF16"}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}

_TOP_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

#: llama.cpp's `LLAMA_TOKEN_TYPE_CONTROL`.
_CONTROL_TOKEN = 3


def write_checkpoint(gguf_path: Path, folder: Path, dtype: CheckpointDtype, progress: Progress) -> None:
    """Write every file of the checkpoint into `folder`, which exists and is empty.

    Raises:
        ModelSourceError: the GGUF is of a kind that this module does not know.

    """
    from gguf import GGUFReader

    progress("reading the GGUF", 0.0)
    reader = GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _check_kind(fields, {tensor.name for tensor in reader.tensors}, gguf_path)

    config = _model_config(fields, dtype)
    _write_json(folder / "config.json", config)
    special_ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special_ids)
    progress("writing the tokenizer", 0.0)
    _write_tokenizer(fields, folder)
    _write_weights(reader, folder / "model.safetensors", config, dtype, progress)


def _check_kind(fields: dict[str, Any], tensor_names: set[str], gguf_path: Path) -> None:
    known = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    for key, value in known.items():
        if fields.get(key) != value:
            raise ModelSourceError(f"{gguf_path}: {key} is {fields.get(key)!r}, only {value!r} can be converted")
    unknown = tensor_names - set(_tensor_names(fields["llama.block_count"]))
    missing = set(_tensor_names(fields["llama.block_count"])) - tensor_names
    scaling = [key for key in fields if key.startswith("llama.rope.scaling")]
    if unknown or missing or scaling:
        raise ModelSourceError(
            f"{gguf_path}: not a plain llama with tied embeddings "
            f"(unknown {sorted(unknown)[:3]}, missing {sorted(missing)[:3]}, rope scaling {scaling})"
        )


def _tensor_names(num_layers: int) -> dict[str, str]:
    """GGUF tensor name -> checkpoint tensor name."""
    names = dict(_TOP_TENSORS)
    for layer in range(num_layers):
        for theirs, ours in _LAYER_TENSORS.items():
            names[f"blk.{layer}.{theirs}.weight"] = f"model.layers.{layer}.{ours}.weight"
    return names


def _model_config(fields: dict[str, Any], dtype: CheckpointDtype) -> dict[str, Any]:
    num_heads = fields["llama.attention.head_count"]
    hidden_size = fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields.get("llama.rope.dimension_count", hidden_size // num_heads),
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: GGUF stores 1e-5 as a float32, a config file means 1e-5."""
    return float(str(np.float32(value)))


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(
        folder / "tokenizer_config.json",
        {
            # The class that takes tokenizer.json as it is; GPT2Tokenizer may build its own pre-tokenizer.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
            "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
            "model_max_length": fields["llama.context_length"],
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def _write_weights(
    reader: GGUFReader, path: Path, config: dict[str, Any], dtype: CheckpointDtype, progress: Progress
) -> None:
    """Write a safetensors file (8 bytes of header length, JSON header, data) tensor by tensor."""
    from gguf.quants import dequantize

    names = _tensor_names(config["num_hidden_layers"])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in reader.tensors:
        start, end = end, end + int(tensor.n_elements) * _ITEM_BYTES[dtype]
        # GGUF counts dimensions from the fastest one.
        shape = [int(size) for size in reversed(tensor.shape)]
        header[names[tensor.name]] = {
            "dtype": _SAFETENSORS_DTYPE[dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    num_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in reader.tensors:
            weights = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            heads = num_heads.get(tensor.name.split(".")[-2])
            if heads is not None:
                weights = _unpermute(weights, heads)
            expected = header[names[tensor.name]]
            assert list(weights.shape) == expected["shape"], (tensor.name, weights.shape, expected)
            data = weights if dtype == "float32" else to_bfloat16(weights)
            data.tofile(file)
            progress("writing the weights", expected["data_offsets"][1] / end)


def _unpermute(weights: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Undo the row order of query and key weights: GGUF pairs rotary dimensions (0, 1), checkpoints (0, n/2)."""
    half = weights.shape[0] // num_heads // 2
    return weights.reshape(num_heads, half, 2, -1).swapaxes(1, 2).reshape(weights.shape)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even. For finite values; the weights of a model are."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounding = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return ((bits + rounding) >> np.uint32(16)).astype(np.uint16)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
