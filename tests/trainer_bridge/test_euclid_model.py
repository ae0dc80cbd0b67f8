"""The small model: it is made whole and once, learns, and its tokenizer agrees with the task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longtail.engine.models import resolve_model
from longtail.trainer_bridge.demo import euclid_model, euclid_task


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGTAIL_CACHE", str(tmp_path))
    return tmp_path / "models"


def test_the_base_model_is_made_once_and_equal_arguments_make_equal_weights(cache: Path) -> None:
    losses: list[float] = []
    folder = euclid_model.base_model(5, 20, lambda _update, _of, loss: losses.append(loss))
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])
    assert euclid_model.base_model(5, 20, lambda *_: pytest.fail("made again")) == folder
    assert [path.name for path in cache.iterdir()] == [folder.name]
    again = euclid_model.new_model(5)
    euclid_model.warm_up(again, 20, seed=5)
    stored = euclid_model.load_model(folder).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in again.state_dict().items())


def test_a_killed_build_leaves_no_folder(cache: Path) -> None:
    def stop(update: int, _of: int, _loss: float) -> None:
        if update == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        euclid_model.base_model(6, 5, stop)
    assert not list(cache.iterdir())


def test_the_checkpoint_is_one_that_the_engine_takes(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    euclid_model.write_checkpoint(euclid_model.new_model(), tmp_path)
    assert resolve_model(str(tmp_path)) == tmp_path
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [*euclid_task.prompt_ids(euclid_task.Problem(48, 18)), *euclid_task.answer_ids(euclid_task.Problem(48, 18))]
    words = tokenizer.decode(ids)
    assert words == "".join(euclid_task.CHARACTERS[token] for token in ids)
    assert tokenizer.encode(words) == ids
    assert tokenizer.eos_token_id == euclid_task.EQUAL
