"""New weights through shared memory, in running engines: all of them, or none."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model

from longtail.engine import AsyncRolloutEngine, EngineConfig, Prompt, RolloutEngine, SamplingConfig, Trajectory
from longtail.engine.errors import EngineDeadError, InvalidInputError, WeightsApplyError
from longtail.engine.weight_answers import WeightsLostError
from longtail.engine.weight_manifest import Manifest, TensorEntry, stored_tensors
from longtail.engine.weight_segment import WeightSegment

GREEDY = SamplingConfig(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = [Prompt(token_ids=[5, 6, 7, 8, start]) for start in (9, 77, 300)]
FAULTS = [("layer", 0), ("layer", 3), ("packing", 0), ("packing", 5), ("finalize", 0), ("source", 7)]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("other-model"), seed=1)


def config_of(model: Path, **changes: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "core": "process", "block_size": 32, "max_model_len": 128, "max_num_seqs": 8, "kv_cache_gib": 0.05,
        "load_tokenizer": False, "vllm_args": {"worker_extension_cls": "faulty_loads.FaultyLoads"},
    }  # fmt: skip
    return EngineConfig(model=str(model), **(defaults | changes))


def segment_of(folder: Path, manifest: Manifest | None = None) -> WeightSegment:
    """The weights of a checkpoint in shared memory."""
    segment = WeightSegment.create(manifest or Manifest.of_checkpoint(folder))
    for entry, path, offset in stored_tensors(folder):
        if entry.name in segment.manifest.entries:
            with path.open("rb") as file:
                file.seek(offset)
                file.readinto(segment.bytes_of(entry.name)[: entry.num_bytes])  # type: ignore[arg-type]
    return segment


def info_of(segment: WeightSegment, base: WeightSegment | None = None, **more: Any) -> dict[str, Any]:
    info: dict[str, Any] = {"path": segment.path, "token": segment.token, **more}
    return info if base is None else info | {"base": {"path": base.path, "token": base.token}}


class Served:
    """A running engine, and the segment that its weights came from."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.base: WeightSegment | None = None

    def push(self, segment: WeightSegment, **more: Any) -> None:
        pause_s = self.engine.update_weights(info_of(segment, self.base, **more), self.engine.weight_version + 1)
        assert pause_s > 0
        self.base = segment

    def say(self) -> list[tuple[list[int], list[float]]]:
        return outputs(self.engine.rollout(PROMPTS, sampling=GREEDY, carry=False).trajectories)

    def fail(self, *args: Any) -> None:
        self.engine._driver.call_later(
            lambda link: link.call("collective_rpc", "longtail_test_fail", None, args, {})
        ).result()


def outputs(trajectories: list[Trajectory]) -> list[tuple[list[int], list[float]]]:
    ordered = sorted(trajectories, key=lambda one: one.prompt_token_ids)
    return [(one.output_token_ids, one.logprobs) for one in ordered]


@pytest.fixture(scope="module", params=["process", "inline"])
def served(tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    with RolloutEngine(config_of(tiny_model, core=request.param)) as engine:
        yield Served(engine)


@pytest.fixture(scope="module")
def expected(tiny_model: Path, other_model: Path) -> dict[Path, list[tuple[list[int], list[float]]]]:
    """Greedy outputs and log-probs of both models, by transformers."""
    return {folder: by_transformers(folder) for folder in (tiny_model, other_model)}


def by_transformers(folder: Path) -> list[tuple[list[int], list[float]]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for prompt in sorted(PROMPTS, key=lambda one: one.token_ids or []):
        ids = list(prompt.token_ids or [])
        logprobs = []
        for _ in range(GREEDY.max_tokens):
            with torch.no_grad():
                row = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(row.argmax()))
            logprobs.append(float(row.max()))
        found.append((ids[-GREEDY.max_tokens :], logprobs))
    return found


def check_says(said: list[tuple[list[int], list[float]]], wanted: list[tuple[list[int], list[float]]]) -> None:
    for (ids, logprobs), (wanted_ids, wanted_logprobs) in zip(said, wanted, strict=True):
        assert ids == wanted_ids
        assert logprobs == pytest.approx(wanted_logprobs, abs=1e-4)


# ---- what is right --------------------------------------------------------------------------------------------


def test_pushed_weights_are_what_is_sampled_from(
    served: Served, tiny_model: Path, other_model: Path, expected: dict[Path, Any]
) -> None:
    checksums = {}
    for folder in (other_model, tiny_model, other_model, tiny_model):
        served.push(segment_of(folder))
        check_says(served.say(), expected[folder])
        assert checksums.setdefault(folder, served.engine.weights_checksum()) == served.engine.weights_checksum()
    assert len(set(checksums.values())) == 2, "the checksum must tell models apart"
    assert expected[tiny_model] != expected[other_model], "the test must be able to fail"


def test_checksums_of_the_content_are_compared_where_there_are_some(served: Served, other_model: Path) -> None:
    import xxhash

    segment = segment_of(other_model)
    checksums = {e.name: xxhash.xxh3_128_hexdigest(segment.bytes_of(e.name)) for e in segment.manifest}
    served.push(segment, checksums=checksums)
    for wrong in ({**checksums, "model.norm.weight": "0" * 32}, {}):
        check_refused(served, info_of(segment, served.base, checksums=wrong), "update_info.checksums")


def test_weights_change_while_requests_run(served: Served, tiny_model: Path, other_model: Path) -> None:
    served.push(segment_of(tiny_model))
    long = SamplingConfig(temperature=0.0, max_tokens=100, ignore_eos=True)
    prompts = [Prompt(token_ids=[3, 4], max_tokens=[2]), *PROMPTS * 4]
    stream = served.engine.stream_trajectories(prompts, sampling=long, carry=False)
    assert len(next(stream).output_token_ids) == 2
    served.push(segment_of(other_model))
    trajectories = list(stream)
    assert len(trajectories) == 12
    assert sum(len(one.weight_versions) == 2 for one in trajectories) >= 4
    assert all(len(one.output_token_ids) == 100 for one in trajectories)


def test_load_weights_and_pushes_take_turns(
    served: Served, tiny_model: Path, other_model: Path, expected: dict[Path, Any]
) -> None:
    served.push(segment_of(other_model))
    served.engine.load_weights(tiny_model)
    check_says(served.say(), expected[tiny_model])
    served.base = None
    served.fail("layer", 4)
    with pytest.raises(WeightsApplyError, match="injected"):
        served.push(segment_of(other_model))
    check_says(served.say(), expected[tiny_model])
    served.push(segment_of(other_model))
    check_says(served.say(), expected[other_model])


# ---- what is refused ------------------------------------------------------------------------------------------


def check_refused(served: Served, info: dict[str, Any], field: str, version: int | None = None) -> InvalidInputError:
    """The push is refused, and changes nothing."""
    engine = served.engine
    before = engine.weights_checksum(), served.say(), engine.weight_version
    with pytest.raises(InvalidInputError) as caught:
        engine.update_weights(info, engine.weight_version + 1 if version is None else version)
    assert caught.value.field.startswith(field), caught.value
    assert (engine.weights_checksum(), served.say(), engine.weight_version) == before
    return caught.value


@pytest.mark.parametrize("fault", ["name", "missing", "shape", "dtype"])
def test_tensors_that_are_not_the_checkpoints_are_refused(served: Served, other_model: Path, fault: str) -> None:
    served.push(segment_of(other_model))
    entries = list(Manifest.of_checkpoint(other_model))
    first = entries[0]
    if fault == "name":
        entries.append(TensorEntry("model.extra.weight", "float32", (3,)))
        field = "update_info.tensors"
    elif fault == "missing":
        del entries[0]
        field = "update_info.tensors"
    elif fault == "shape":
        entries[0] = TensorEntry(first.name, first.dtype, first.shape[::-1])
        field = f"update_info.tensors[{first.name}].shape"
    else:
        entries[0] = TensorEntry(first.name, "float64", first.shape)
        field = f"update_info.tensors[{first.name}].dtype"
    segment = segment_of(other_model, Manifest(entries))
    error = check_refused(served, info_of(segment, served.base), field)
    assert "model.extra.weight" in str(error) or first.name in str(error)


def test_update_infos_that_name_no_segment_are_refused(served: Served, other_model: Path, tmp_path: Path) -> None:
    served.push(segment_of(other_model))
    good, base = segment_of(other_model), served.base
    (tmp_path / "file").write_bytes(bytes(8192))
    for info, field in [
        (info_of(good, base) | {"path": str(tmp_path / "file")}, "update_info.path"),
        (info_of(good, base) | {"path": "/proc/self/../1/fd/3"}, "update_info.path"),
        (info_of(good, base) | {"path": "/proc/1/fd/999999"}, "update_info.path"),
        (info_of(good, base) | {"token": "0" * 32}, "update_info.path"),
        (info_of(good, base) | {"token": 5}, "update_info"),
        (info_of(good, base) | {"more": 5}, "update_info"),
        ({"token": good.token, "base": {"path": base.path, "token": base.token}}, "update_info"),  # type: ignore[union-attr]
        (info_of(good), "update_info.base"),
        (info_of(good, good), "update_info.base"),
    ]:
        check_refused(served, info, field)
    served.push(good)


def test_a_version_never_goes_back(served: Served, other_model: Path) -> None:
    served.push(segment_of(other_model))
    segment = segment_of(other_model)
    for version in (served.engine.weight_version, 0, -1):
        check_refused(served, info_of(segment, served.base), "version", version)


def test_the_same_version_where_it_is_allowed(tiny_model: Path, other_model: Path, expected: dict[Path, Any]) -> None:
    """An engine that was started with weights that are not those of its version gets them."""
    with RolloutEngine(config_of(tiny_model, weight_version=7)) as engine:
        served = Served(engine)
        served.say()
        segment = segment_of(other_model)
        engine.update_weights(info_of(segment), 7, may_repeat=True)
        assert engine.weight_version == 7
        check_says(served.say(), expected[other_model])
        with pytest.raises(InvalidInputError, match="version"):
            engine.update_weights(info_of(segment, segment), 6, may_repeat=True)


def test_an_engine_with_vllms_backend_takes_no_segments(served: Served) -> None:
    with pytest.raises(InvalidInputError, match=r"engine\.weight_transfer"):
        served.engine.control_weights("start", {})
    with pytest.raises(InvalidInputError, match=r"engine\.weight_transfer: expected one of longtail, nccl, ipc"):
        EngineConfig(model="m", weight_transfer="mpi")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="op"):
        served.engine.control_weights("stop", {})  # type: ignore[arg-type]


# ---- what fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_base", [True, False], ids=["base", "checkpoint"])
@pytest.mark.parametrize(("where", "number"), FAULTS)
def test_a_load_that_fails_in_the_middle_is_taken_back(
    served: Served, tiny_model: Path, other_model: Path, where: str, number: int, has_base: bool
) -> None:
    if has_base:
        served.push(segment_of(tiny_model))
    else:
        served.engine.load_weights(tiny_model)
        served.base = None
    before = served.engine.weights_checksum(), served.say(), served.engine.weight_version
    served.fail(where, number)
    with pytest.raises(WeightsApplyError, match="injected"):
        served.push(segment_of(other_model))
    assert (served.engine.weights_checksum(), served.say(), served.engine.weight_version) == before
    served.push(segment_of(other_model))
    assert served.engine.weights_checksum() != before[0]


def test_an_engine_with_neither_weights_is_dead(tiny_model: Path, other_model: Path) -> None:
    with RolloutEngine(config_of(tiny_model)) as engine:
        served = Served(engine)
        served.push(segment_of(tiny_model))
        served.fail("layer", 3, 2)
        long = SamplingConfig(max_tokens=100, ignore_eos=True)
        stream = engine.stream_trajectories(PROMPTS, sampling=long, carry=False)
        with pytest.raises(WeightsLostError, match="injected"):
            served.push(segment_of(other_model))
        with pytest.raises(EngineDeadError, match="change of weights"):
            list(stream)
        with pytest.raises(EngineDeadError):
            served.say()
        with pytest.raises(EngineDeadError):
            engine.weights_checksum()


def test_the_async_engine_has_the_same_calls(tiny_model: Path, other_model: Path, expected: dict[Path, Any]) -> None:
    async def main() -> None:
        async with AsyncRolloutEngine(config_of(tiny_model)) as engine:
            before = await engine.weights_checksum()
            segment = segment_of(other_model)
            assert await engine.update_weights(info_of(segment), 4) > 0
            assert engine.weight_version == 4
            assert await engine.weights_checksum() != before
            check_says(outputs((await engine.rollout(PROMPTS, sampling=GREEDY)).trajectories), expected[other_model])
            with pytest.raises(InvalidInputError):
                await engine.control_weights("init", {})

    asyncio.run(main())


# ---- tied weights -----------------------------------------------------------------------------------------------


def test_tied_weights_reach_the_output_layer(tmp_path: Path) -> None:
    """On a CPU the output layer has a packed copy, which stock vLLM forgets in a reload."""
    folders = [write_tied_model(tmp_path / str(seed), seed) for seed in (0, 1)]
    with RolloutEngine(config_of(folders[0])) as engine:
        served = Served(engine)
        first = engine.weights_checksum()
        served.push(segment_of(folders[1]))
        check_says(served.say(), by_transformers(folders[1]))
        engine.load_weights(folders[0])
        served.base = None
        check_says(served.say(), by_transformers(folders[0]))
        assert engine.weights_checksum() == first


def write_tied_model(folder: Path, seed: int) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.12)
    model.save_pretrained(folder)
    return folder
