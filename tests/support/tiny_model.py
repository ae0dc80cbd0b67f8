"""A random Llama that any test can afford: 2 layers, hidden size 64, vocabulary 512, byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

VOCAB_SIZE = 512
END_TOKEN, START_TOKEN = "<|im_end|>", "<|im_start|>"

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write checkpoint and tokenizer; equal seeds give equal weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=tokenizer.convert_tokens_to_ids(START_TOKEN),
        eos_token_id=tokenizer.convert_tokens_to_ids(END_TOKEN),
    )  # fmt: skip
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.12)  # the default 0.02 gives a nearly uniform model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer():  # type: ignore[no-untyped-def]
    """256 bytes, three special tokens, and pairs of letters up to the vocabulary size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "etaoinshrdlu "
    pairs = [(a, b) for a in letters.replace(" ", "Ġ") for b in letters.replace(" ", "Ġ")]
    merges = pairs[: VOCAB_SIZE - 3 - len(alphabet)]
    tokens = ["<|endoftext|>", START_TOKEN, END_TOKEN, *alphabet, *(a + b for a, b in merges)]
    tokens += [f"<|unused{i}|>" for i in range(VOCAB_SIZE - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in tokens if token.startswith("<|")]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START_TOKEN, eos_token=END_TOKEN, pad_token="<|endoftext|>"
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
