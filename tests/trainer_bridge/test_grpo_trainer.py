"""The step adds micro-batches up exactly, resumes bit for bit, and learns."""

from __future__ import annotations

import copy
import logging
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from grpo_examples import TablePolicy, TinyTransformer, make_group, make_trajectory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longtail.engine import RolloutEngine
from longtail.engine.config import SamplingConfig
from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Group
from longtail.trainer_bridge.errors import InvalidInputError
from longtail.trainer_bridge.grpo import GrpoConfig
from longtail.trainer_bridge.grpo_config import TrainerConfig
from longtail.trainer_bridge.grpo_stats import StepStats
from longtail.trainer_bridge.grpo_trainer import GrpoTrainer, TrainingDivergedError

torch.set_num_threads(1)
SIZE = 12


@pytest.fixture(autouse=True)
def _random_state() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)


def random_groups(seed: int, count: int = 3, size: int = 4, version: int = 0) -> list[Group]:
    """Outputs of 1 to 12 tokens; rewards, log-probabilities and versions of chance."""
    rng = random.Random(seed)

    def one() -> Any:
        length = rng.randint(1, 12)
        ages = sorted((rng.randint(0, 2) for _ in range(length)), reverse=True)
        return make_trajectory(
            [rng.randrange(SIZE) for _ in range(rng.randint(1, 5))], [rng.randrange(SIZE) for _ in range(length)],
            [math.log(rng.uniform(0.03, 0.5)) for _ in range(length)], rng.random(),
            versions=[max(0, version - age) for age in ages],
        )  # fmt: skip

    return [make_group([one() for _ in range(size)]) for _ in range(count)]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_bitwise(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def comparable(stats: StepStats) -> StepStats:
    return msgspec.structs.replace(stats, seconds=0.0)


def after_one_step(model: nn.Module, config: GrpoConfig, groups: list[Group], **settings: Any) -> dict[str, Tensor]:
    """Parameters after a step of plain gradient descent, whose size is the gradient's."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    GrpoTrainer(model, config, TrainerConfig(max_grad_norm=None, **settings), optimizer=optimizer).step(groups, 2)
    return parameters(model)


# Micro-batches.


@pytest.mark.parametrize(
    "config",
    [
        GrpoConfig(),
        GrpoConfig(aggregate="sequence_mean", ratio="sequence", old="behaviour", max_staleness=1),
        GrpoConfig(aggregate="fixed", weight_level="sequence"),
    ],
)
def test_micro_batches_add_up_to_the_batch(config: GrpoConfig) -> None:
    model, groups = TinyTransformer(SIZE), random_groups(1, version=2)
    whole = after_one_step(model, config, groups, micro_batch_tokens=10**6)
    assert any(not torch.equal(whole[name], before) for name, before in parameters(model).items())
    for budget in (1, 20, 64):
        parts = after_one_step(model, config, groups, micro_batch_tokens=budget)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-6)


def test_micro_batches_are_bitwise_equal_where_no_sum_is_reordered() -> None:
    """Each trajectory has tokens, and so rows of the table, of its own."""
    group = make_group([
        make_trajectory([3 * i], [3 * i + 1, 3 * i + 2, 3 * i + 2][: i + 1], reward=float(i % 3)) for i in range(4)
    ])  # fmt: skip
    model = TablePolicy(SIZE, dtype=torch.float32)
    whole = after_one_step(model, GrpoConfig(), [group], micro_batch_tokens=10**6)
    for budget in (1, 8):
        assert_bitwise(after_one_step(model, GrpoConfig(), [group], micro_batch_tokens=budget), whole)


def test_a_micro_batch_keeps_to_its_budget() -> None:
    shapes: list[torch.Size] = []

    class Watched(TinyTransformer):
        def forward(self, token_ids: Tensor) -> Tensor:
            shapes.append(token_ids.shape)
            return super().forward(token_ids)

    groups = random_groups(2)
    GrpoTrainer(Watched(SIZE), settings=TrainerConfig(micro_batch_tokens=40)).step(groups, 0)
    assert sum(shape[0] for shape in shapes) == 12
    assert all(shape.numel() <= 40 for shape in shapes)
    assert max(shape[1] for shape in shapes) == max(
        len(t.prompt_token_ids) + len(t.output_token_ids) for group in groups for t in group.trajectories
    )


# One step.


def test_a_step_is_the_optimizer_on_the_gradient_of_the_loss() -> None:
    """One token per trajectory, on-policy: new table row = row + lr * mean of A * (onehot - softmax)."""
    model = TablePolicy(3)
    row = model.table.detach()[0].clone()
    logprobs = row.log_softmax(0).tolist()
    group = make_group([make_trajectory([0], [y], [logprobs[y]], r) for y, r in ((0, 1.0), (1, 0.0), (2, 0.5))])
    config = GrpoConfig(divide_by_std=False)
    after = after_one_step(model, config, [group])["table"]
    onehot = torch.eye(3, dtype=torch.float64)
    advantages = torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64)
    wanted = row + (advantages.unsqueeze(1) * (onehot - row.softmax(0))).sum(0) / 3
    torch.testing.assert_close(after[0], wanted, rtol=0, atol=1e-7)  # log-probs travel as float32
    assert torch.equal(after[1:], model.table.detach()[1:])


def test_statistics_on_policy_and_off() -> None:
    model = TablePolicy(SIZE, dtype=torch.float32)
    logprobs = model.table.detach().log_softmax(1)
    rows = [
        make_trajectory([1], [2, 3], [logprobs[1, 2].item(), logprobs[2, 3].item()], 1.0, versions=[4, 5]),
        make_trajectory([1], [4], [logprobs[1, 4].item()], 0.0, versions=[3]),
    ]
    equal = [make_trajectory([1], [4, 5, 6], [-9.0] * 3, 0.5, source_mask=[0, 0, 1], versions=[1] * 3)] * 2
    config = GrpoConfig(max_staleness=2)
    stats = GrpoTrainer(model, config).step([make_group(rows), make_group(equal)], 5)
    assert (stats.version, stats.num_updates, stats.num_trajectories) == (5, 1, 4)
    assert (stats.num_model_tokens, stats.num_trained_tokens, stats.masked_share) == (5, 3, 1 - 3 / 5)
    assert stats.staleness == {0: 1, 1: 1, 2: 1, 4: 2}
    assert (stats.mean_reward, stats.mean_length, stats.zero_advantage_share) == (0.5, 9 / 4, 0.5)
    assert (stats.mean_ratio, stats.max_ratio, stats.clip_share_low, stats.clip_share_high) == (1, 1, 0, 0)
    assert stats.ess == pytest.approx(1.0)
    assert (stats.mean_lag, stats.max_lag, stats.lag_kl) == pytest.approx((1, 1, 0), abs=1e-6)
    assert stats.learning_rate == 1e-6
    assert stats.grad_norm > 0

    # The same tokens, had they been less probable by e, 1 and 1/e.
    for trajectory, shift in zip(rows, ([-1.0, 0.0], [1.0]), strict=True):
        for t, s in enumerate(shift):
            trajectory.logprobs[t] += s
    config = GrpoConfig(max_staleness=2, weight_cap=2.0)
    stats = GrpoTrainer(TablePolicy(SIZE, dtype=torch.float32), config).step([make_group(rows)], 5)
    lags = [math.e, 1.0, 1 / math.e]
    assert stats.mean_lag == pytest.approx(sum(lags) / 3)
    assert stats.max_lag == pytest.approx(math.e)
    assert stats.ess == pytest.approx(sum(lags) ** 2 / 3 / sum(lag**2 for lag in lags))
    assert stats.lag_kl == pytest.approx(sum(lag - 1 - math.log(lag) for lag in lags) / 3)
    assert stats.mean_weight == pytest.approx((2 + 1 + 1 / math.e) / 3)
    assert stats.truncated_share == pytest.approx(1 / 3)


def test_several_updates_are_clipped_around_where_the_step_began() -> None:
    settings = TrainerConfig(learning_rate=0.1, num_epochs=4, num_minibatches=2)
    trainer = GrpoTrainer(TinyTransformer(SIZE), GrpoConfig(), settings)
    stats = trainer.step(random_groups(3), 0)
    assert stats.num_updates == trainer.num_updates == 8
    assert stats.max_ratio > 1.28
    assert stats.clip_share_low > 0
    assert stats.clip_share_high > 0
    # a small step from the same place is not clipped
    calm = TrainerConfig(learning_rate=1e-5, num_epochs=4, num_minibatches=2)
    stats = GrpoTrainer(TinyTransformer(SIZE), GrpoConfig(), calm).step(random_groups(3), 0)
    assert stats.max_ratio == pytest.approx(1.0, abs=0.01)
    assert stats.clip_share_low == stats.clip_share_high == 0


def test_more_minibatches_than_trajectories() -> None:
    trainer = GrpoTrainer(TinyTransformer(SIZE), settings=TrainerConfig(num_minibatches=100))
    assert trainer.step(random_groups(3, count=1), 0).num_updates == 4


def test_nothing_to_train_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="longtail")
    trainer = GrpoTrainer(TinyTransformer(SIZE), GrpoConfig(max_staleness=1))
    before = parameters(trainer.model)
    stats = trainer.step(random_groups(4), 9)
    assert (stats.num_updates, stats.num_trained_tokens, stats.masked_share, stats.ess) == (0, 0, 1.0, 0.0)
    assert "no token of 12 trajectories" in caplog.text
    assert_bitwise(parameters(trainer.model), before)


def test_warm_up_and_gradient_clipping() -> None:
    settings = TrainerConfig(learning_rate=0.4, warmup_updates=4, max_grad_norm=0.01)
    trainer = GrpoTrainer(TinyTransformer(SIZE), settings=settings)
    rates = [trainer.step(random_groups(5), 0).learning_rate for _ in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    model = TinyTransformer(SIZE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = parameters(model)
    stats = GrpoTrainer(model, settings=TrainerConfig(max_grad_norm=0.01), optimizer=optimizer).step(
        random_groups(5), 0
    )
    moved = math.sqrt(sum((tensor - before[name]).square().sum().item() for name, tensor in parameters(model).items()))
    assert stats.grad_norm > 0.01
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_that_is_not_finite_is_not_followed() -> None:
    trainer = GrpoTrainer(TinyTransformer(SIZE))
    with torch.no_grad():
        trainer.model.head.bias[0] = math.inf
    before = parameters(trainer.model)
    with pytest.raises(TrainingDivergedError, match="update 1"):
        trainer.step(random_groups(6), 0)
    assert_bitwise(parameters(trainer.model), before)
    assert trainer.num_updates == 0


def test_the_penalty_draws_towards_the_reference() -> None:
    def divergence(kl_coef: float) -> float:
        reference = TinyTransformer(SIZE)
        trainer = GrpoTrainer(
            copy.deepcopy(reference), GrpoConfig(kl_coef=kl_coef, weight_cap=None),
            TrainerConfig(learning_rate=0.003), reference=reference,
        )  # fmt: skip
        return [trainer.step(random_groups(7), 0).reference_kl for _ in range(20)][-1]

    assert divergence(10.0) < 0.3 * divergence(1e-6)


def test_the_reference_comes_with_its_coefficient() -> None:
    model = TinyTransformer(SIZE)
    for config, reference in ((GrpoConfig(kl_coef=0.1), None), (GrpoConfig(), model)):
        with pytest.raises(InvalidInputError, match="reference"):
            GrpoTrainer(model, config, reference=reference)
    with pytest.raises(InvalidInputError, match="model"):
        GrpoTrainer(model.requires_grad_(False))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1.0), ("learning_rate", math.nan), ("betas", (0.9, 1.0)), ("betas", (0.9,)), ("eps", 0.0),
        ("weight_decay", math.inf), ("warmup_updates", -1), ("warmup_updates", 1.5), ("max_grad_norm", 0.0),
        ("num_epochs", 0), ("num_minibatches", 0), ("micro_batch_tokens", 0), ("seed", True),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        TrainerConfig(**{field: value})
    assert caught.value.field == field


# Checkpoints.


def new_trainer(seed: int = 0) -> GrpoTrainer:
    """Everything that a resume could forget: dropout, an order of mini-batches, moments, a warm-up."""
    settings = TrainerConfig(learning_rate=0.01, warmup_updates=9, num_epochs=2, num_minibatches=2)
    return GrpoTrainer(TinyTransformer(SIZE, seed, dropout=0.2), GrpoConfig(), settings)


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    path = tmp_path / "trainer.safetensors"
    trainer = new_trainer()
    for step in range(2):
        trainer.step(random_groups(step, version=step), step)
    cursor = {"epoch": "e-1", "seq": 17, "nested": [1, {"x": 0.1, "none": None}]}
    trainer.save(path, cursor)
    straight = [comparable(trainer.step(random_groups(step, version=step), step)) for step in range(2, 5)]

    resumed = new_trainer(seed=1)
    torch.manual_seed(99)
    assert resumed.load(path) == cursor
    assert (resumed.num_steps, resumed.num_updates) == (2, 8)
    again = [comparable(resumed.step(random_groups(step, version=step), step)) for step in range(2, 5)]
    assert again == straight
    assert_bitwise(parameters(resumed.model), parameters(trainer.model))

    trainer.save(tmp_path / "a")
    resumed.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("forgotten", ["random.cpu", "random.order", "optimizer", "num_updates"])
def test_each_part_of_a_checkpoint_matters(forgotten: str, tmp_path: Path) -> None:
    """Negative control: without it, resuming is not exact."""
    path = tmp_path / "checkpoint"
    trainer = new_trainer()
    trainer.step(random_groups(0), 0)
    trainer.save(path)
    other = new_trainer()
    torch.manual_seed(5)
    other.step(random_groups(1), 0)
    fresh = {"random.cpu": torch.get_rng_state(), "random.order": other._order.get_state()}
    other.load(path)
    if forgotten == "random.cpu":
        torch.set_rng_state(fresh[forgotten])
    elif forgotten == "random.order":
        other._order.set_state(torch.Generator().manual_seed(3).get_state())
    elif forgotten == "optimizer":
        other.optimizer.state.clear()
    else:
        other.num_updates = 0
    forgetful = comparable(other.step(random_groups(2), 0))

    faithful = new_trainer()
    faithful.load(path)
    assert comparable(faithful.step(random_groups(2), 0)) != forgetful


def test_a_resumed_optimizer_of_the_callers(tmp_path: Path) -> None:
    def make() -> GrpoTrainer:
        model = TinyTransformer(SIZE)
        return GrpoTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    trainer = make()
    trainer.step(random_groups(0), 0)
    trainer.save(tmp_path / "c")
    trainer.step(random_groups(1), 0)
    resumed = make()
    resumed.load(tmp_path / "c")
    resumed.step(random_groups(1), 0)
    assert_bitwise(parameters(resumed.model), parameters(trainer.model))
    with pytest.raises(InvalidInputError, match="optimizer"):
        new_trainer().load(tmp_path / "c")


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if how == "truncated":
        path.write_bytes(data[:-1])
    elif how == "header":
        path.write_bytes(data[:20])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "weights only":
        save_file(tensors, path)
    elif how == "version":
        rest = msgspec.json.decode(metadata["longtail"]) | {"format": "longtail trainer 2"}
        save_file(tensors, path, metadata | {"longtail": msgspec.json.encode(rest).decode()})
    else:
        name = {"missing": "model.head.bias", "shape": "optimizer.3.exp_avg", "random": "random.order"}[how]
        del tensors[name]
        if how == "shape":
            tensors[name] = torch.zeros(2, 3)
        save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "how", ["truncated", "header", "empty", "weights only", "version", "missing", "shape", "random"]
)
def test_a_damaged_checkpoint_changes_nothing(how: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    trainer = new_trainer()
    trainer.step(random_groups(0), 0)
    trainer.save(path)
    damaged(path, how)
    trainer.step(random_groups(1), 0)
    trainer.save(tmp_path / "before")
    with pytest.raises(InvalidInputError):
        trainer.load(path)
    trainer.save(tmp_path / "after")
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    new_trainer().save(tmp_path / "c")
    other = GrpoTrainer(TinyTransformer(SIZE + 1, dropout=0.2))
    with pytest.raises(
        InvalidInputError, match=r"model head.bias: expected torch.float32 \[13\], got 'torch.float32 \[12\]'"
    ):
        other.load(tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        other.load(tmp_path / "none")


def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint"
    trainer = new_trainer()
    (tmp_path / "checkpoint.writing").write_bytes(b"of a save that was killed")
    trainer.save(path, {"seq": 1})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint"]
    kept = path.read_bytes()
    trainer.step(random_groups(0), 0)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space"):
            trainer.save(path)
    assert path.read_bytes() == kept
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize("extra", [{"x": object()}, {"x": (1, 2)}, {"x": math.nan}, {1: "x"}])
def test_extra_is_what_json_gives_back(extra: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="extra"):
        new_trainer().save(tmp_path / "c", extra)
    assert not list(tmp_path.iterdir())


def test_tied_weights_are_one(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def tied() -> GrpoTrainer:
        config = LlamaConfig(
            vocab_size=SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, tie_word_embeddings=True,
        )  # fmt: skip
        return GrpoTrainer(LlamaForCausalLM(config).float(), settings=TrainerConfig(learning_rate=0.01))

    trainer = tied()
    trainer.model.save_pretrained(tmp_path / "model")
    names = [name for name, _ in trainer.named_tensors()]
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert sorted(names) == sorted(file.keys())  # what an engine on this checkpoint expects to be pushed
    trainer.step(random_groups(0), 0)
    trainer.save(tmp_path / "c")
    resumed = tied()
    resumed.load(tmp_path / "c")
    assert_bitwise(parameters(resumed.model), parameters(trainer.model))
    assert resumed.model.lm_head.weight is resumed.model.model.embed_tokens.weight


# An engine's own log-probabilities.


def test_what_the_engine_reports_is_what_the_trainer_computes(engine: RolloutEngine, tiny_model: Path) -> None:
    from transformers import LlamaForCausalLM

    sampling = SamplingConfig(temperature=0.7, max_tokens=30, seed=1)
    prompts = [Prompt(token_ids=list(range(5, 7 + i))) for i in range(3)]
    round_ = engine.rollout(prompts, group_size=3, sampling=sampling)
    groups = [
        msgspec.structs.replace(
            group,
            trajectories=[msgspec.structs.replace(t, reward=float(t.index)) for t in group.trajectories],
        )
        for group in round_.complete_groups
    ]
    assert len(groups) == 3

    def step(config: GrpoConfig) -> StepStats:
        return GrpoTrainer(LlamaForCausalLM.from_pretrained(tiny_model).float(), config).step(groups, 0)

    stats = step(GrpoConfig(sampling=sampling))
    assert stats.max_lag == pytest.approx(1.0, abs=1e-3)
    assert stats.ess == pytest.approx(1.0, abs=1e-6)
    # Negative control: at another temperature it is another policy.
    assert step(GrpoConfig()).ess < 0.99


# Learning.


def sample(models: list[nn.Module], prompts: list[int], versions: list[int], length: int, seed: int) -> Any:
    """Outputs whose token t comes of `models[t]`, as a partial rollout's do, with their log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(prompts).unsqueeze(1)
    logprobs = torch.zeros(len(prompts), 0)
    with torch.no_grad():
        for t in range(length):
            row = models[t](ids)[:, -1].log_softmax(1)
            drawn = torch.multinomial(row.exp(), 1, generator=generator)
            ids, logprobs = torch.cat([ids, drawn], 1), torch.cat([logprobs, row.gather(1, drawn)], 1)
    return ids[:, 1:].tolist(), logprobs.tolist()


def learning_curve(config: GrpoConfig, *, steps: int, informative: bool = True) -> list[float]:
    """Reward by step: the share of tokens that repeat the prompt. The first half is three updates old."""
    size, length, group_size = 8, 4, 16
    trainer = GrpoTrainer(TinyTransformer(size), config, TrainerConfig(learning_rate=0.01, micro_batch_tokens=512))
    snapshots = [copy.deepcopy(trainer.model)]
    curve: list[float] = []
    for version in range(steps):
        versions = [max(0, version - 3)] * 2 + [version] * 2
        models = [snapshots[max(0, len(snapshots) - 1 - version + v)] for v in versions]
        prompts = [prompt for prompt in range(size) for _ in range(group_size)]
        outputs, logprobs = sample(models, prompts, versions, length, seed=version)
        rng = random.Random(version)
        members = [
            make_trajectory(
                [p], y, lp,
                sum(token == p for t, token in enumerate(y)) / length if informative else rng.random(),
                versions=versions,
            )
            for p, y, lp in zip(prompts, outputs, logprobs, strict=True)
        ]  # fmt: skip
        groups = [make_group(members[i : i + group_size]) for i in range(0, len(members), group_size)]
        stats = trainer.step(groups, version)
        assert set(stats.staleness) == {0, min(3, version)}
        curve.append(sum(
            token == p for p, y in zip(prompts, outputs, strict=True) for t, token in enumerate(y)
        ) / len(prompts) / length)  # fmt: skip
        snapshots = [*snapshots[-3:], copy.deepcopy(trainer.model)]
    return curve


@pytest.mark.parametrize(
    "config",
    [
        GrpoConfig(),
        GrpoConfig(ratio="sequence", aggregate="sequence_mean", old="behaviour", clip_low=0.2, clip_high=0.2),
    ],
    ids=["recommended", "gspo"],
)
def test_it_learns_from_partial_rollouts(config: GrpoConfig) -> None:
    curve = learning_curve(config, steps=40)
    assert curve[0] < 0.25
    assert sum(curve[-5:]) / 5 > 0.9


def test_rewards_that_say_nothing_teach_nothing() -> None:
    curve = learning_curve(GrpoConfig(), steps=40, informative=False)
    assert sum(curve[-5:]) / 5 < 0.4
