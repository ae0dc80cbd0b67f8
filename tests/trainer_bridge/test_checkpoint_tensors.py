"""A model's weights under the names of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longtail.trainer_bridge.errors import InvalidInputError
from longtail.trainer_bridge.weights.checkpoint_tensors import checkpoint_tensors


def _model(*, tied: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("loaded", [True, False])
def test_names_and_values_are_those_that_are_saved(tmp_path: Path, tied: bool, loaded: bool) -> None:
    model = _model(tied=tied)
    model.save_pretrained(tmp_path)
    if loaded:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    tensors = dict(checkpoint_tensors(model))
    assert ("lm_head.weight" in tensors) == (not tied)
    assert tensors.keys() == saved.keys()
    for name, tensor in tensors.items():
        assert not tensor.requires_grad
        assert torch.equal(tensor, saved[name])


def test_nothing_is_copied_unless_the_dtype_changes() -> None:
    model = _model(tied=True)
    weight = model.model.embed_tokens.weight
    assert dict(checkpoint_tensors(model))["model.embed_tokens.weight"].data_ptr() == weight.data_ptr()
    cast = dict(checkpoint_tensors(model, "bfloat16"))
    assert {tensor.dtype for tensor in cast.values()} == {torch.bfloat16}
    assert torch.equal(cast["model.embed_tokens.weight"], weight.bfloat16())


def test_a_weight_that_was_untied_is_not_lost() -> None:
    model = _model(tied=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    assert "lm_head.weight" in dict(checkpoint_tensors(model))


@pytest.mark.parametrize(("name", "value"), [("peft_config", {"default": 1}), ("hf_quantizer", object())])
def test_weights_that_the_checkpoint_does_not_have_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match="SimpleNamespace"):
        next(checkpoint_tensors(SimpleNamespace(state_dict=dict, **{name: value})))


def test_a_tensor_that_is_not_here_is_refused() -> None:
    with torch.device("meta"):
        model = _model(tied=False)
    with pytest.raises(InvalidInputError, match=r"model\.model\.embed_tokens\.weight: expected a whole tensor"):
        next(checkpoint_tensors(model))
