"""Named tasks (same prompts everywhere, scores from a file's metadata) and prompt files (errors that say where)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from longtail.engine.errors import InvalidInputError
from longtail.engine.prompt_file import prompts_sha256, read_prompts
from longtail.engine.tasks import DEMO_TASKS, UNSTABLE_TASKS, extract_answer, load_task, score, task_names


@pytest.mark.parametrize("name", DEMO_TASKS)
def test_the_right_answer_scores_1_and_another_prompts_answer_less_also_after_a_trip_through_json(name: str) -> None:
    prompts = load_task(name, 8, seed=5)
    assert [p.group_id for p in prompts] == [f"{name}-{i}" for i in range(8)]
    answers = [p.metadata["entry"]["answer"] for p in prompts]
    for i, prompt in enumerate(prompts):
        metadata = msgspec.json.decode(msgspec.json.encode(prompt.metadata))
        assert metadata == prompt.metadata
        assert score(name, f"Let me think, 1 and 2.\n<answer>{answers[i]}</answer>", metadata) == 1.0
        assert score(name, f"The answer is\n{answers[i]}", metadata) == 1.0
        other = next(answer for answer in answers if answer != answers[i])
        assert score(name, f"<answer>{other}</answer>", metadata) < 1.0
        assert score(name, "", metadata) == score(name, None, metadata) == 0.0


def test_tasks_load_and_score_their_own_answers_or_say_that_they_cannot() -> None:
    slow = {"futoshiki", "knight_swap", "intermediate_integration", "puzzle24", "sokoban", "sudoku", "zebra_puzzles"}
    refused = []
    for name in set(task_names()) - slow:
        try:
            prompts = load_task(name, 1, seed=1)
        except InvalidInputError as error:
            assert error.field == "task"  # noqa: PT017
            refused.append(name)
            continue
        for prompt in prompts:
            answer = prompt.metadata["entry"]["answer"]
            if answer is not None:
                assert score(name, f"<answer>{answer}</answer>", prompt.metadata) > 0.9, (name, prompt)
    # Their verifiers compare with tuples.
    assert set(refused) <= {"arc_agi", "rearc"}


CHECKSUM = """
import sys
from longtail.engine.tasks import load_task
from longtail.engine.prompt_file import prompts_sha256
for name in sys.argv[2:]:
    print(prompts_sha256(load_task(name, int(sys.argv[1]), seed=3)[:4]))
"""


def test_a_task_has_the_same_prompts_in_every_process_and_a_larger_size_only_adds() -> None:
    unstable = "isomorphic_strings"
    assert unstable in UNSTABLE_TASKS
    found = []
    for hash_seed, size in (("1", "4"), ("2", "6")):
        done = subprocess.run(
            [sys.executable, "-c", CHECKSUM, size, *DEMO_TASKS, unstable],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        found.append(done.stdout.split())
    assert found[0][:-1] == found[1][:-1]
    assert len(set(found[0])) == len(DEMO_TASKS) + 1
    # Negative control: a generator that follows the hash seed is seen.
    assert found[0][-1] != found[1][-1]
    assert prompts_sha256(load_task(DEMO_TASKS[0], 4, seed=4)) != found[0][0]


def test_an_unknown_task_is_answered_with_close_names() -> None:
    with pytest.raises(InvalidInputError, match="gsm_symbolic") as caught:
        load_task("gsm_symbolc", 1, seed=0)
    assert caught.value.field == "task"
    for size, seed, field in ((0, 0, "task.size"), (1, -1, "task.seed"), (True, 0, "task.size")):
        with pytest.raises(InvalidInputError) as caught:
            load_task(DEMO_TASKS[0], size, seed)
        assert caught.value.field == field
    for metadata in ({}, {"task": "other", "entry": {}}, {"task": DEMO_TASKS[0]}):
        with pytest.raises(InvalidInputError) as caught:
            score(DEMO_TASKS[0], "4", metadata)
        assert caught.value.field == "metadata"


def test_importing_the_module_does_not_import_the_generators() -> None:
    code = "import sys, longtail.engine.tasks; sys.exit('reasoning_gym' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "right", "answer"),
    [
        ("1 + 1 is <answer> 2 </answer>, not <answer>3</answer> ", "9", "3"),
        ("so 1,234 and then **-56.5**.", "9", "-56.5"),
        ("total: 1,234 apples", "9", "1234"),
        ("no idea", "9", None),
        ("it was\n**Friday**\n\n", "Monday", "Friday"),
        ("", "Monday", None),
    ],
)
def test_an_answer_is_taken_from_its_tag_or_else_from_the_end(text: str, right: str, answer: str | None) -> None:
    assert extract_answer(text, right) == answer


def test_a_prompt_file_gives_its_prompts_in_order(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"token_ids": [1, 2], "id": "a", "metadata": {"x": [1]}}\n\n'
        '{"text": "héllo"}\r\n'
        '{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]}'
    )
    ids, text, chat = read_prompts(path)
    assert (ids.token_ids, ids.group_id, ids.metadata) == ([1, 2], "a", {"x": [1]})
    assert (text.text, text.group_id, text.token_ids, text.messages) == ("héllo", "line-3", None, None)
    assert chat.messages == [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ('{"messages": [{"role": "usr", "content": "x"}]}', ".messages[0].role"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "user"}]}', ".messages[1].content"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', ".messages[0].role"),
        ('{"messages": ["x"]}', ".messages[0]"),
        ('{"messages": []}', ".messages"),
        ('{"messages": "x"}', ".messages"),
        ('{"token_ids": [1, -1]}', ".token_ids[1]"),
        ('{"token_ids": [true]}', ".token_ids[0]"),
        ('{"token_ids": [1.0]}', ".token_ids[0]"),
        ('{"token_ids": []}', ".token_ids"),
        ('{"text": ""}', ".text"),
        ('{"text": null}', ".text"),
        ('{"text": "x", "token_ids": [1]}', ""),
        ('{"metadata": {}}', ""),
        ('{"text": "x", "metadata": []}', ".metadata"),
        ('{"text": "x", "id": 3}', ".id"),
        ('{"text": "x", "id": "first"}', ".id"),
        ('{"text": "x", "id": "' + "i" * 201 + '"}', ".id"),
        ('{"txt": "x"}', ".txt"),
        ('["x"]', ""),
        ("{", ""),
        (b'{"text": "\xff"}', ""),
    ],
)
def test_a_wrong_line_is_an_error_that_says_where(tmp_path: Path, line: Any, field: str) -> None:
    path = tmp_path / "prompts.jsonl"
    good = b'{"text": "x", "id": "first"}\n\n'
    path.write_bytes(good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + b'{"text": "y"}\n')
    with pytest.raises(InvalidInputError) as caught:
        read_prompts(path)
    assert caught.value.field == f"{path}:3{field}"
    # Negative control: the lines around it are good.
    path.write_bytes(good + b'{"text": "y"}\n')
    assert len(read_prompts(path)) == 2


def test_a_file_without_prompts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    for path in (tmp_path / "empty.jsonl", tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(InvalidInputError) as caught:
            read_prompts(path)
        assert caught.value.field == str(path)


def test_the_checksum_sees_every_part_of_a_prompt_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    checksums = []
    for content in (
        '{"text": "x", "metadata": {"a": 1, "b": 2}}',
        '{"metadata": {"b": 2, "a": 1},   "text": "x"}',
        '{"text": "y", "metadata": {"a": 1, "b": 2}}',
        '{"text": "x", "metadata": {"a": 1, "b": 3}}',
        '{"text": "x", "metadata": {"a": 1, "b": 2}, "id": "z"}',
    ):
        path.write_text(content)
        checksums.append(prompts_sha256(read_prompts(path)))
    assert checksums[0] == checksums[1]
    assert len(set(checksums)) == 4
