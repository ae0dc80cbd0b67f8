"""Packed scoring against row by row scoring of the same model, log-probs and gradients."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from grpo_examples import TablePolicy, TinyTransformer, make_group, make_trajectory
from torch import Tensor, nn

from longtail.engine.trajectory import Group
from longtail.trainer_bridge.errors import InvalidInputError
from longtail.trainer_bridge.grpo import GrpoConfig, build_batch, token_logprobs
from longtail.trainer_bridge.grpo_config import TrainerConfig
from longtail.trainer_bridge.grpo_trainer import GrpoTrainer
from longtail.trainer_bridge.prefix_packing import check_model, pack_prefixes, shared_first

VOCAB_SIZE = 61
CONFIG = GrpoConfig()


def llama(attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, attn_implementation=attention, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def tree_groups(seed: int, count: int = 3) -> list[Group]:
    """Groups over prompts of their own; members branch off others at random places."""
    rng = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(VOCAB_SIZE) for _ in range(length)]

    groups = []
    for _ in range(count):
        prompt = tokens(rng.randint(4, 20))
        outputs = [tokens(rng.randint(1, 30))]
        for _ in range(rng.randint(1, 6)):
            parent = rng.choice(outputs)
            outputs.append(parent[: rng.randint(0, len(parent))] + tokens(rng.randint(1, 12)))
        groups.append(make_group([make_trajectory(prompt, one, reward=rng.random()) for one in outputs]))
    return groups


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pad_left", [False, True])
def test_equal_to_row_by_row(attention: str, pad_left: bool) -> None:
    model = llama(attention)
    for seed in range(8):
        batch = build_batch(tree_groups(seed), CONFIG, 0, pad_left=pad_left, dtype=torch.float64)
        packing = pack_prefixes(batch.token_ids, batch.attention_mask)
        assert packing.num_tokens < packing.num_row_tokens == int(batch.attention_mask.sum())
        plainly = build_batch(tree_groups(seed), CONFIG, 0, dtype=torch.float64)
        plain = token_logprobs(model, plainly, CONFIG)[plainly.mask]
        packed = token_logprobs(model, batch, CONFIG, packing)[batch.mask]
        assert (plain - packed).abs().max() < 1e-5
        factors = torch.rand(plain.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for ours, theirs in zip(gradients(model, packed * factors), gradients(model, plain * factors), strict=True):
            # transformers computes norms in float32, whatever the model's dtype.
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def gradients(model: nn.Module, logprobs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(logprobs.sum(), list(model.parameters()), retain_graph=True))


def test_float32_is_within_the_bound() -> None:
    model = llama(dtype=torch.float32)
    batch = build_batch(tree_groups(1), CONFIG, 0)
    packing = pack_prefixes(batch.token_ids, batch.attention_mask)
    plain, packed = token_logprobs(model, batch, CONFIG), token_logprobs(model, batch, CONFIG, packing)
    assert (plain - packed).abs().max() < 1e-5


@pytest.mark.parametrize("what", ["mask", "positions"])
def test_it_would_be_noticed(what: str) -> None:
    """Negative control: with a plain causal mask, or positions in the packed sequence, log-probs are others."""
    model = llama()
    batch = build_batch(tree_groups(1), CONFIG, 0, dtype=torch.float64)
    packing = pack_prefixes(batch.token_ids, batch.attention_mask)
    if what == "mask":
        wrong = dataclasses.replace(packing, allowed=torch.ones_like(packing.allowed).tril())
    else:
        positions = torch.arange(packing.position_ids.shape[1]).expand_as(packing.position_ids)
        wrong = dataclasses.replace(packing, position_ids=positions)
    plain, packed = token_logprobs(model, batch, CONFIG), token_logprobs(model, batch, CONFIG, wrong)
    assert (plain - packed).abs().max() > 1e-3


def test_every_different_prefix_stands_once() -> None:
    """The number of places is that of different prefixes, where all rows share enough to be in one sequence."""
    num_whole = 0
    for seed in range(60):
        (group,) = tree_groups(seed, count=1)
        batch = build_batch([group], CONFIG, 0)
        rows = [t.prompt_token_ids + t.output_token_ids for t in group.trajectories]
        prefixes = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
        packing = pack_prefixes(batch.token_ids, batch.attention_mask)
        assert packing.num_tokens >= len(prefixes)
        if len(packing.token_ids) == 1:
            assert packing.num_tokens == len(prefixes)
            num_whole += 1
        for row, place in zip(rows, packing.place, strict=True):
            assert packing.token_ids.flatten()[place[: len(row)]].tolist() == row
    assert num_whole > 20


def test_rows_with_a_short_prefix_in_common_stay_apart() -> None:
    """A chat template before unrelated prompts does not make one long sequence of them."""
    rows = torch.randint(0, VOCAB_SIZE, (6, 40), generator=torch.Generator().manual_seed(0))
    rows[:, :10] = 1
    assert pack_prefixes(rows, torch.ones_like(rows)).token_ids.shape == (6, 40)
    rows[:, :30] = 1
    assert len(pack_prefixes(rows, torch.ones_like(rows)).token_ids) == 1


@pytest.mark.parametrize("budget", [1, 40, 90, 400, 10_000])
def test_lots_keep_to_the_budget_and_keep_siblings_together(budget: int) -> None:
    batch = build_batch(tree_groups(4, count=6), CONFIG, 0)
    rows = list(range(len(batch.mask)))
    lots = list(shared_first(batch.token_ids, batch.attention_mask, rows, budget))
    assert sorted(row for lot in lots for row in lot) == rows
    for lot in lots:
        micro = batch.rows(torch.tensor(lot))
        packing = pack_prefixes(micro.token_ids, micro.attention_mask)
        assert packing.token_ids.numel() <= budget or len(lot) == 1
    assert budget < 10_000 or len(lots) == 1


@pytest.mark.parametrize("settings", [{}, {"num_epochs": 2}, {"micro_batch_tokens": 70}])
def test_the_reference_trainer_makes_the_same_step(settings: dict[str, Any]) -> None:
    groups = tree_groups(7)
    stepped = {}
    for share in (False, True):
        trainer = GrpoTrainer(
            llama(), GrpoConfig(advantage="group"), TrainerConfig(learning_rate=1e-3, share_prefixes=share, **settings)
        )
        stats = trainer.step(groups, 0)
        assert (stats.saved_share > 0.1) is share
        stepped[share] = stats, [p.detach().clone() for p in trainer.model.parameters()]
    assert stepped[True][0].loss == pytest.approx(stepped[False][0].loss, abs=1e-6)
    assert stepped[True][0].grad_norm == pytest.approx(stepped[False][0].grad_norm, rel=1e-5)
    for ours, theirs in zip(stepped[True][1], stepped[False][1], strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_a_reference_model_is_packed_too() -> None:
    groups = tree_groups(7)
    losses = []
    for share in (False, True):
        settings = TrainerConfig(share_prefixes=share)
        trainer = GrpoTrainer(llama(), GrpoConfig(kl_coef=0.1), settings, reference=llama("eager"))
        losses.append(trainer.step(groups, 0).loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("model", [TablePolicy(VOCAB_SIZE), TinyTransformer(VOCAB_SIZE)], ids=["table", "no mask"])
def test_a_model_that_takes_no_mask_is_refused(model: nn.Module) -> None:
    with pytest.raises(InvalidInputError, match="forward takes `attention_mask`"):
        GrpoTrainer(model, GrpoConfig(), TrainerConfig(share_prefixes=True))
    with pytest.raises(InvalidInputError, match="reference: expected a model whose forward takes `attention_mask`"):
        GrpoTrainer(llama(), GrpoConfig(kl_coef=0.1), TrainerConfig(share_prefixes=True), reference=model)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sliding_window": 8}, "full attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "full attention"),
        ({"_attn_implementation_internal": "flash_attention_2"}, "eager or sdpa"),
    ],
)
def test_a_model_that_attends_by_more_than_the_mask_is_refused(changes: dict[str, Any], what: str) -> None:
    model = llama()
    vars(model.config).update(changes)
    with pytest.raises(InvalidInputError, match=what):
        check_model(model)


def test_rows_of_windows_that_are_not_used_are_taken() -> None:
    model = llama()
    vars(model.config).update({"sliding_window": 8, "use_sliding_window": False})
    check_model(model)
