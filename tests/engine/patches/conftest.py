from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def vocab32_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a random one-layer llama with 32 tokens, small enough to compare whole distributions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("vocab32")
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        model.lm_head.weight.mul_(12.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chi_square_p():
    """`(counts, probabilities) -> p`; cells that expect fewer than 5 are one cell."""
    import numpy as np
    from scipy.stats import chi2

    def p_value(counts: object, probabilities: object) -> float:
        observed = np.asarray(counts, dtype=float).ravel()
        expected = np.asarray(probabilities, dtype=float).ravel() * observed.sum()
        large = expected >= 5
        observed = np.append(observed[large], observed[~large].sum())
        expected = np.append(expected[large], expected[~large].sum())
        if expected[-1] < 5:
            # A sample where there is no mass at all is impossible, not unlikely.
            if expected[-1] < 1e-6 and observed[-1] > 0:
                return 0.0
            expected = np.append(expected[:-2], expected[-2:].sum())
            observed = np.append(observed[:-2], observed[-2:].sum())
        statistic = ((observed - expected) ** 2 / expected).sum()
        return float(chi2.sf(statistic, len(expected) - 1))

    return p_value
