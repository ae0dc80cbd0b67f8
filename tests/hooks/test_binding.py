"""What is no hook is refused when it is handed over, by name."""

from __future__ import annotations

import functools

import msgspec
import pytest

from longtail.engine.errors import InvalidInputError
from longtail.hooks import Append, Continue, Decision, Fork, Hooks, Reject, RewardFunction, Stop
from longtail.hooks.binding import bind_hooks, is_coroutine_function


class Good:
    def on_weights(self, version):
        pass


def with_attributes(**attributes):
    return type("Given", (Good,), attributes)()


@pytest.mark.parametrize(
    ("hook", "field", "expected"),
    [
        (object(), "hooks[1]", "on_prompt, on_boundary, on_trajectory, on_group, on_weights"),
        (None, "hooks[1]", "an object with"),
        (lambda trajectory: 1.0, "hooks[1]", "an object with"),
        (Good, "hooks[1]", "Good()"),
        (with_attributes(on_trajectry=lambda self, one: one), "hooks[1].on_trajectry", "on_trajectory?"),
        (with_attributes(on_step=lambda self, one: one), "hooks[1].on_step", "a known method"),
        (with_attributes(on_group=5), "hooks[1].on_group", "a method"),
        (with_attributes(time_limit_s=0), "hooks[1].time_limit_s", "> 0"),
        (with_attributes(time_limit_s=float("inf")), "hooks[1].time_limit_s", "finite"),
        (with_attributes(time_limit_s=True), "hooks[1].time_limit_s", "seconds"),
        (with_attributes(time_limit_s="60"), "hooks[1].time_limit_s", "seconds"),
        (with_attributes(on_failure="retry"), "hooks[1].on_failure", "reject, ignore, raise"),
        (with_attributes(on_failure=None), "hooks[1].on_failure", "reject, ignore, raise"),
    ],
)
def test_a_bad_hook_is_refused_by_position_and_field(hook, field, expected) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Hooks([Good(), hook])
    assert caught.value.field == field
    assert expected in caught.value.expected


@pytest.mark.parametrize("hooks", [Good(), "on_group", None, {"a": Good()}])
def test_hooks_are_a_list(hooks) -> None:
    with pytest.raises(InvalidInputError, match="hooks: expected a list"):
        Hooks(hooks)


@pytest.mark.parametrize("name", ["max_threads", "max_stuck_threads"])
@pytest.mark.parametrize("value", [0, -1, 1025, 2.0, True, None])
def test_numbers_of_threads_are_checked(name, value) -> None:
    with pytest.raises(InvalidInputError, match=name):
        Hooks([], **{name: value})


def test_defaults_and_what_reject_means_without_a_group() -> None:
    class All:
        def on_prompt(self, prompt): ...

        async def on_trajectory(self, trajectory): ...

        async def on_group(self, group): ...

        on_weights = None

    calls = bind_hooks([All(), with_attributes(time_limit_s=5, on_failure="ignore", name="w", on_policy=True)])
    assert [(one.hook, one.point, one.is_async, one.time_limit_s, one.on_failure) for one in calls] == [
        ("hooks[0] (All)", "on_prompt", False, 60.0, "raise"),
        ("hooks[0] (All)", "on_trajectory", True, 60.0, "reject"),
        ("hooks[0] (All)", "on_group", True, 60.0, "reject"),
        ("hooks[1] (w)", "on_weights", False, 5.0, "ignore"),
    ]


def test_coroutine_functions_are_told_from_plain_ones() -> None:
    async def coroutine(one): ...

    class Callable:
        async def __call__(self, one): ...

    for function in (coroutine, functools.partial(coroutine, 1), Callable(), Callable().__call__):
        assert is_coroutine_function(function)
    for function in (len, lambda one: coroutine(one), Good().on_weights, RewardFunction):
        assert not is_coroutine_function(function)


@pytest.mark.parametrize("decision", [Continue(), Stop(), Fork(3), Append([1, 0])])
def test_decisions_survive_json(decision) -> None:
    assert msgspec.json.decode(msgspec.json.encode(decision), type=Decision) == decision


@pytest.mark.parametrize(
    "make",
    [lambda: Fork(0), lambda: Fork(True), lambda: Append([]), lambda: Append([-1]), lambda: Append([1.0]),
     lambda: Reject(""), lambda: Reject(None)],
)  # fmt: skip
def test_decisions_that_mean_nothing_cannot_be_built(make) -> None:
    with pytest.raises(InvalidInputError):
        make()
