"""Members of a round through vLLM's own routes: metadata rides in `vllm_xargs`, as a JSON string."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from server_process import ServerProcess

ROUTES = {
    "/v1/completions": {"prompt": [10, 20, 30]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}


def member(server: ServerProcess, route: str, max_tokens: int, **metadata: Any) -> dict[str, Any]:
    rollout = {"target_groups": 1, **metadata}
    sampling = {"model": server.model, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    return {**ROUTES[route], **sampling, "vllm_xargs": {"rollout": json.dumps(rollout)}}


def choice_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice


@pytest.mark.parametrize("route", ROUTES)
def test_members_of_plain_routes_are_cut_together(http: httpx.Client, server: ServerProcess, route: str) -> None:
    round_id = f"plain{route}"
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(http.post, route, json=member(server, route, 400, round=round_id, group="long"))
        while http.get(f"/v1/rollouts/{round_id}").status_code == 404:
            assert not long.done(), long.result().text
        short = http.post(route, json=member(server, route, 4, round=round_id, group="short"))
        assert choice_of(short)["finish_reason"] == "length"
        assert choice_of(long.result())["finish_reason"] == "abort"
        assert long.result().json()["usage"]["completion_tokens"] < 400
    late = http.post(route, json=member(server, route, 4, round=round_id, group="late"))
    assert choice_of(late)["finish_reason"] == "abort"
    assert late.json()["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("route", ROUTES)
def test_what_only_the_scheduler_can_refuse_is_a_400_that_names_the_field(
    http: httpx.Client, server: ServerProcess, route: str
) -> None:
    round_id = f"refused{route}"
    first = http.post(route, json=member(server, route, 2, round=round_id, group="a", group_size=2, target_groups=2))
    assert choice_of(first)["finish_reason"] == "length"
    for field, wrong in (
        ("index", {"group": "a", "group_size": 2, "target_groups": 2}),
        ("group_size", {"group": "a", "group_size": 3, "index": 1, "target_groups": 2}),
        ("target_groups", {"group": "b", "target_groups": 3}),
    ):
        answer = http.post(route, json=member(server, route, 2, round=round_id, **wrong))
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == f"rollout.{field}"
        assert error["field"] == f"rollout.{field}"
        assert "expected" in error["message"]
    # Negative control: the same request with the right metadata is taken.
    right = member(server, route, 2, round=round_id, group="a", group_size=2, index=1, target_groups=2)
    assert choice_of(http.post(route, json=right))["finish_reason"] == "length"


def test_a_round_that_came_through_plain_routes_blocks_its_id(http: httpx.Client, server: ServerProcess) -> None:
    route = "/v1/completions"
    choice_of(http.post(route, json=member(server, route, 2, round="mixed", group="a", target_groups=5)))
    refused = http.post("/v1/rollouts", json={"prompts": [{"token_ids": [5]}], "round_id": "mixed"})
    assert (refused.status_code, refused.json()["error"]["field"]) == (409, "round_id")
