"""A hook may set reward, text and metadata and mask tokens; a change of anything else is a failure."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtail.engine.hook_points import Verdict
from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Boundary, Branch, KvSpan, Segment, TokenCounts, Trajectory, VersionSpan
from longtail.hooks import Accept, HookError, Reject
from longtail.hooks.checks import WrongAnswer, checked_trajectory, copied_trajectory


def answer(future: Future[Any]) -> Any:
    return future.result(20.0)


class Change:
    """Answers with what `change(item)` returns."""

    on_failure = "raise"

    def __init__(self, change) -> None:
        self.on_prompt = self.on_trajectory = self.on_group = self.on_weights = change


OTHER_VALUES: dict[str, Any] = {
    "trajectory_id": "r/g/9",
    "round_id": "s",
    "group_id": "h",
    "index": 9,
    "prompt_token_ids": [1],
    "output_token_ids": [4, 5, 7],
    "logprobs": [-0.1, -0.2, -0.4],
    "source_mask": [1, 1, 1],
    "weight_versions": [VersionSpan("a", 0, 3)],
    "segments": [Segment(start=0, end=3, kv_versions=[KvSpan("b", 0, 3)])],
    "finish_reason": "length",
    "stop_reason": "x",
    "seed": 1,
    "branch": Branch(of=1, at=2),
    "boundaries": [Boundary(start=0, end=1)],
    "tokens": TokenCounts(cached=1),
}


def test_the_list_of_other_values_names_every_field_that_stays(trajectory) -> None:
    free = {"reward", "loss_mask", "text", "metadata", "timings"}
    # A new field of the engine is protected without being named; only this test has to learn of it.
    assert OTHER_VALUES.keys() <= set(Trajectory.__struct_fields__) - free
    for name in set(Trajectory.__struct_fields__) - free - OTHER_VALUES.keys():
        pytest.fail(f"no other value for {name}")


@pytest.mark.parametrize("name", sorted(OTHER_VALUES))
def test_what_was_sampled_stays_replaced_or_changed_in_place(start, trajectory, name) -> None:
    # The loss mask is named, so that a change of source_mask is that alone.
    before = trajectory(loss_mask=[1, 0, 1])

    def replace(one):
        return msgspec.structs.replace(one, **{name: OTHER_VALUES[name]})

    def change_in_place(one):
        if isinstance(value := getattr(one, name), list):
            value[:] = OTHER_VALUES[name]
        else:
            msgspec.structs.force_setattr(one, name, OTHER_VALUES[name])
        return one

    for change in (replace, change_in_place):
        with pytest.raises(HookError, match=f"changed {name} "):
            answer(start(Change(change)).finish_trajectory(before))
    assert before == trajectory(loss_mask=[1, 0, 1])


def test_numpy_arrays_in_place_of_lists_are_refused(start, trajectory) -> None:
    change = Change(lambda one: msgspec.structs.replace(one, logprobs=np.array(one.logprobs)))
    with pytest.raises(HookError, match="changed logprobs"):
        answer(start(change).finish_trajectory(trajectory()))


def test_a_change_inside_a_segment_does_not_reach_the_trajectory(start, trajectory) -> None:
    def change(one):
        one.segments[0].kv_versions.clear()
        return one

    before = trajectory()
    with pytest.raises(HookError, match="changed segments"):
        answer(start(Change(change)).finish_trajectory(before))
    assert before == trajectory()


def test_what_may_change_does(start, trajectory) -> None:
    changes = {"reward": 2, "loss_mask": [0, 0, 1], "text": None, "metadata": {"k": "v"}}
    hooks = start(Change(lambda one: msgspec.structs.replace(one, **changes)))
    after = answer(hooks.finish_trajectory(trajectory()))
    assert after == trajectory(**changes)
    assert isinstance(after.reward, float)
    assert msgspec.json.decode(msgspec.json.encode(after), type=Trajectory) == after


def test_no_hook_can_change_the_trajectory_after_its_answer(start, trajectory) -> None:
    kept = []

    def keep(one):
        kept.append(one)
        return one

    after = answer(start(Change(keep)).finish_trajectory(trajectory()))
    kept[0].output_token_ids[0] = 7
    kept[0].loss_mask[0] = 0
    assert after == trajectory()


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf"), "1.0", [1.0], np.float32("nan")])
def test_a_reward_that_is_no_finite_number_is_refused(start, trajectory, reward) -> None:
    with pytest.raises(HookError, match=r"set reward to .*expected a finite number"):
        answer(start(Change(lambda one: msgspec.structs.replace(one, reward=reward))).finish_trajectory(trajectory()))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"loss_mask": [1, 1, 1]}, "unmasked token 1"),
        ({"loss_mask": [0, 0, 1.5]}, r"loss_mask\[2\] to 1.5, expected 0 or 1"),
        ({"loss_mask": [0, -1, 1]}, r"loss_mask\[1\] to -1"),
        ({"loss_mask": (1, 0, 1)}, "set loss_mask to tuple"),
        ({"text": 5}, "set text to int 5"),
        ({"metadata": [1]}, "set metadata to list"),
        ({"metadata": {7: "x"}}, "a dict with strings for keys"),
        ({"metadata": {"x": object()}}, "that a journal or a file can't hold"),
    ],
)
def test_other_bad_values_are_refused_by_name(start, trajectory, changes, what) -> None:
    with pytest.raises(HookError, match=what):
        answer(start(Change(lambda one: msgspec.structs.replace(one, **changes))).finish_trajectory(trajectory()))


def test_a_mask_that_lost_a_token_is_refused(start, trajectory) -> None:
    def shorten(one):
        one.loss_mask.pop()
        return one

    with pytest.raises(HookError, match="length 2 for 3"):
        answer(start(Change(shorten)).finish_trajectory(trajectory()))


def test_masking_adds_up_over_hooks_and_cannot_be_undone_by_a_later_one(start, trajectory) -> None:
    def mask(*values):
        return Change(lambda one: msgspec.structs.replace(one, loss_mask=list(values)))

    assert answer(start(mask(1, 0, 0), mask(0, 0, 0)).finish_trajectory(trajectory())).loss_mask == [0, 0, 0]
    with pytest.raises(HookError, match="unmasked token 2"):
        answer(start(mask(1, 0, 0), mask(1, 0, 1)).finish_trajectory(trajectory()))


masks = st.integers(1, 6).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 1), min_size=n, max_size=n)] * 2))


@given(masks)
def test_a_mask_is_taken_over_exactly_if_it_unmasks_nothing(trajectory, both: tuple[list[int], list[int]]) -> None:
    before, now = both
    size = len(before)
    base = trajectory(
        output_token_ids=[1] * size, logprobs=[0.0] * size, source_mask=[1] * size, loss_mask=before,
        weight_versions=[VersionSpan("a", 0, size)], segments=[],
    )  # fmt: skip
    after = msgspec.structs.replace(copied_trajectory(base), loss_mask=now)
    if any(new > old for new, old in zip(now, before, strict=True)):
        with pytest.raises(WrongAnswer):
            checked_trajectory(base, after)
    else:
        assert checked_trajectory(base, after) == after


# ---- prompts, groups, weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, "text", [1, 2], Prompt])
def test_every_point_names_what_it_expected_and_what_came(start, trajectory, group, wrong) -> None:
    hooks = start(Change(lambda item: wrong))
    came = "None" if wrong is None else type(wrong).__name__
    for future, expected in (
        (hooks.prepare(Prompt(text="x")), "a Prompt"),
        (hooks.finish_trajectory(trajectory()), "a Trajectory"),
        (hooks.finish_group(group()), r"Accept\(\) or Reject\(reason\)"),
        (hooks.change_weights(1), "None"),
    ):
        if wrong is None and expected == "None":
            answer(future)
            continue
        with pytest.raises(HookError, match=f"returned {came}.*, expected {expected}"):
            answer(future)


@pytest.mark.parametrize("wrong", [True, Accept, Reject])
def test_a_bool_or_a_class_is_no_verdict(start, group, wrong) -> None:
    with pytest.raises(HookError, match="expected Accept"):
        answer(start(Change(lambda group: wrong)).finish_group(group()))


def test_a_prompt_keeps_its_group_and_the_callers_lists(start) -> None:
    def change_in_place(prompt):
        prompt.token_ids.append(3)
        prompt.metadata["k"] = 1
        return prompt

    before = Prompt(token_ids=[1, 2], group_id="g")
    after = answer(start(Change(change_in_place)).prepare(before))
    assert after == Prompt(token_ids=[1, 2, 3], group_id="g", metadata={"k": 1})
    assert before == Prompt(token_ids=[1, 2], group_id="g")

    def change_message(prompt):
        prompt.messages[0]["content"] = "changed"
        return prompt

    chat = Prompt(messages=[{"role": "user", "content": "given"}])
    assert answer(start(Change(change_message)).prepare(chat)).messages[0]["content"] == "changed"
    assert chat.messages == [{"role": "user", "content": "given"}]

    with pytest.raises(HookError, match="changed group_id from 'g' to 'h'"):
        answer(start(Change(lambda prompt: Prompt(token_ids=[1], group_id="h"))).prepare(before))


def test_a_group_hook_may_set_what_a_trajectory_hook_may(start, group) -> None:
    def rank(given):
        ranked = [msgspec.structs.replace(one, reward=float(one.index)) for one in given.trajectories]
        return Accept(msgspec.structs.replace(given, trajectories=ranked, metadata={"ranked": True}))

    assert answer(start(Change(rank)).finish_group(group(3))) == Verdict(
        group=group([0.0, 1.0, 2.0], metadata={"ranked": True})
    )


def test_a_group_keeps_its_trajectories(start, trajectory, group) -> None:
    unmasked = trajectory(1, loss_mask=[1, 1, 1])
    for changes, what in (
        ({"trajectories": [trajectory(0)]}, "changed the trajectories"),
        ({"trajectories": [trajectory(1), trajectory(0)]}, "changed the trajectories"),
        ({"trajectories": [trajectory(0), trajectory(0)]}, "changed the trajectories"),
        ({"trajectories": [trajectory(0), unmasked]}, "unmasked token 1"),
        ({"trajectories": [trajectory(0), trajectory(1, reward=float("nan"))]}, "set reward to"),
        ({"trajectories": [trajectory(0), None]}, "raised AttributeError"),
        ({"group_id": "h"}, "changed group_id"),
        ({"complete": False}, "changed group_id or complete"),
        ({"metadata": None}, "set metadata to None"),
    ):
        given = group()
        hook = Change(lambda one, changes=changes: Accept(msgspec.structs.replace(one, **changes)))
        with pytest.raises(HookError, match=what):
            answer(start(hook).finish_group(given))
        assert given == group()
    with pytest.raises(HookError, match="accepted str 'g'"):
        answer(start(Change(lambda one: Accept("g"))).finish_group(group()))


def test_a_group_changed_in_place_is_left_as_it_was(start, group) -> None:
    def change_in_place(one):
        one.trajectories[0].output_token_ids[0] = 9
        one.trajectories.pop()
        return Accept()

    given = group()
    assert answer(start(Change(change_in_place)).finish_group(given)) == Verdict(group=group())
    assert given == group()
