"""Named tasks with automatic scores.

A task is a generator of reasoning-gym: `load_task(name, size, seed)` gives the same prompts for the same arguments
in every process (`UNSTABLE_TASKS` do not), each a chat prompt whose metadata holds what `score` needs. Metadata is
made of JSON values, so a trajectory can be scored when it finishes or years later from its file.

`score` extracts an answer from free text and hands it to the task's own verifier. It is lenient on form, because
small models rarely keep to one: without an `<answer>` tag the last number counts where the right answer is a
number, and the last line elsewhere. A verifier that raises on what a model wrote counts as 0. Some verifiers
evaluate the answer as an expression: score the text of a model that you trust as far as running it.

Importing this module is free. The first use of a task imports reasoning-gym with sympy and matplotlib, between one
and two seconds of CPU.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from longtail.engine.errors import InvalidInputError, LongtailError
from longtail.engine.prompt_file import read_prompts
from longtail.engine.prompts import Prompt

__all__ = [
    "DEMO_TASKS",
    "UNSTABLE_TASKS",
    "TaskUnavailableError",
    "extract_answer",
    "load_task",
    "read_prompts",
    "score",
    "task_names",
]

MAX_TASK_SIZE = 1_000_000

#: Tasks that a model of 135M parameters attempts, with answers of very different length.
DEMO_TASKS = ("chain_sum", "calendar_arithmetic", "simple_equations")

_INSTRUCTION = "\n\nThink step by step, then write the final answer between <answer> and </answer>."
_INSTALL_HINT = 'the task generators need reasoning-gym; install it with `pip install "longtail[demo]"`'

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_PLAIN_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

#: Their generators iterate over sets, so they follow PYTHONHASHSEED; `acre` changes with the size asked for.
UNSTABLE_TASKS = frozenset(
    {"acre", "isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
)

#: Needs the generators that it is made of as an argument.
_NOT_A_TASK = frozenset({"composite"})


class TaskUnavailableError(LongtailError, RuntimeError):
    """The package with the task generators is not installed."""


def task_names() -> list[str]:
    """Every task that can be loaded by name, sorted."""
    return sorted(_generators().keys() - _NOT_A_TASK)


def load_task(name: str, size: int, seed: int) -> list[Prompt]:
    """The first `size` prompts of a task; a larger size only adds prompts at the end (not for `UNSTABLE_TASKS`).

    Raises:
        InvalidInputError: there is no such task (names close ones), or it cannot be scored from JSON metadata.

    """
    _check_name(name)
    for argument, value, low, high in (("size", size, 1, MAX_TASK_SIZE), ("seed", seed, 0, 2**32 - 1)):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidInputError(f"task.{argument}", f"an integer in [{low}, {high}]", value)
    import reasoning_gym  # type: ignore[import-untyped]

    dataset = reasoning_gym.create_dataset(name, size=size, seed=seed)
    prompts = []
    for index in range(size):
        entry = dataset[index]
        plain = _as_json(entry)
        # Some verifiers compare with tuples or types that JSON does not keep.
        answer = entry["answer"]
        if answer is not None and _verify(name, answer, plain) != _verify(name, answer, entry):
            raise InvalidInputError("task", "a task that can be scored from JSON metadata", name)
        prompts.append(
            Prompt(
                messages=[{"role": "user", "content": plain["question"] + _INSTRUCTION}],
                group_id=f"{name}-{index}",
                metadata={"task": name, "index": index, "entry": plain},
            )
        )
    return prompts


def score(task: str, text: str | None, metadata: Mapping[str, Any]) -> float:
    """How right `text` is, 0 to 1, as an answer to the prompt with this metadata.

    Raises:
        InvalidInputError: the metadata is not that of this task.

    """
    entry = metadata.get("entry")
    if metadata.get("task") != task or not isinstance(entry, Mapping):
        raise InvalidInputError("metadata", f"what load_task({task!r}) attached to the prompt", metadata)
    answer = extract_answer(text or "", entry.get("answer"))
    return 0.0 if answer is None else _verify(task, answer, entry)


def extract_answer(text: str, right_answer: object) -> str | None:
    """The part of a model's text that is its answer; of `right_answer` only the kind matters, number or not."""
    if tagged := _TAGGED.findall(text):
        return str(tagged[-1]).strip()
    if isinstance(right_answer, str) and _PLAIN_NUMBER.fullmatch(right_answer.strip()):
        numbers = _NUMBER.findall(text)
        return numbers[-1].replace(",", "") if numbers else None
    lines = [line.strip(" *`\t") for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), None)


def _verify(task: str, answer: str, entry: Mapping[str, Any]) -> float:
    try:
        return float(_verifier(task)(answer, dict(entry)))
    except Exception:  # verifiers parse what a model wrote and raise what they like
        return 0.0


@functools.cache
def _verifier(name: str) -> Callable[[str, dict[str, Any]], float]:
    _check_name(name)
    import reasoning_gym

    verify: Callable[[str, dict[str, Any]], float] = reasoning_gym.get_score_answer_fn(name)
    return verify


def _as_json(entry: dict[str, Any]) -> dict[str, Any]:
    try:
        plain = msgspec.json.decode(msgspec.json.encode(entry, enc_hook=_plain_value))
    except (TypeError, ValueError) as error:
        raise InvalidInputError("task", f"a task whose entries JSON can hold ({error})", entry) from error
    assert isinstance(plain, dict)
    return plain


def _plain_value(value: object) -> object:
    if isinstance(value, str):  # numpy's
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _generators() -> Mapping[str, Any]:
    try:
        import reasoning_gym.factory  # type: ignore[import-untyped]
    except ImportError as error:
        raise TaskUnavailableError(f"{_INSTALL_HINT} ({error})") from error
    generators: Mapping[str, Any] = reasoning_gym.factory.DATASETS
    return generators


def _check_name(name: str) -> None:
    names = task_names()
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=5, cutoff=0.5) or list(DEMO_TASKS)
        raise InvalidInputError("task", f"one of {len(names)} task names such as " + ", ".join(close), name)
