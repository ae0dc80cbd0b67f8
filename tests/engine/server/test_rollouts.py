"""`/v1/rollouts`: groups and a target in, trajectories out as they end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
from server_process import ServerProcess, read_lines

from longtail.engine.server.bodies import Line

PROMPT = [10, 20, 30]
LONG = {"max_tokens": 400, "ignore_eos": True, "temperature": 0}


def round_of(lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trajectories and the last line, which must be the round's."""
    *trajectories, last = lines
    assert last["type"] == "round", last
    assert {line["type"] for line in trajectories} == {"trajectory"}
    return trajectories, last


def pair(short: int, long: int, round_id: str) -> dict[str, Any]:
    """A round of two groups, one much longer than the other."""
    prompts = [{"token_ids": PROMPT, "max_tokens": max_tokens} for max_tokens in (short, long)]
    return {"prompts": prompts, "sampling": LONG, "round_id": round_id}


@contextmanager
def open_round(http: httpx.Client, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The lines of a round as they come; leaving the block early closes the connection."""
    with http.stream("POST", "/v1/rollouts", json=body) as response:
        assert response.status_code == 200, response.read()
        yield (json.loads(line) for line in response.iter_lines())


def until_unknown(http: httpx.Client, round_id: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while http.get(f"/v1/rollouts/{round_id}").status_code != 404:
        assert time.monotonic() < deadline, f"the round {round_id} is still there"
        time.sleep(0.05)


def test_tokens_in_are_tokens_out(http: httpx.Client, server: ServerProcess) -> None:
    """A greedy round gives the tokens and log-probs that vLLM's own route gives for the same ids."""
    body = {"prompts": [{"token_ids": PROMPT, "metadata": {"task": 7}}], "group_size": 2}
    response = http.post("/v1/rollouts", json=body | {"sampling": {"max_tokens": 12, "temperature": 0}})
    trajectories, last = round_of(read_lines(response))
    plain = http.post(
        "/v1/completions",
        json={"model": server.model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 1}
        | {"return_token_ids": True},
    ).json()["choices"][0]
    for trajectory in trajectories:
        assert trajectory["prompt_token_ids"] == PROMPT
        assert trajectory["output_token_ids"] == plain["token_ids"]
        differences = zip(trajectory["logprobs"], plain["logprobs"]["token_logprobs"], strict=True)
        assert max(abs(ours - theirs) for ours, theirs in differences) < 1e-4
        assert trajectory["metadata"] == {"task": 7}
    assert {trajectory["index"] for trajectory in trajectories} == {0, 1}
    assert last["stats"]["num_complete_groups"] == 1
    assert last["stats"]["num_output_tokens"] == sum(len(t["output_token_ids"]) for t in trajectories)


def test_every_line_decodes_as_the_struct_that_clients_use(http: httpx.Client) -> None:
    response = http.post(
        "/v1/rollouts", json={"prompts": [{"token_ids": PROMPT}], "sampling": {"max_tokens": 3}, "round_id": "a/b ü"}
    )
    decoded = [msgspec.json.decode(line, type=Line) for line in response.text.splitlines()]
    assert [type(line).__name__ for line in decoded] == ["TrajectoryLine", "RoundLine"]
    assert {line.round_id for line in decoded} == {"a/b ü"}
    assert response.headers["X-Longtail-Round"] == "a%2Fb%20%C3%BC"


def test_text_and_chat_prompts_are_tokenised_as_vllms_routes_do(http: httpx.Client, server: ServerProcess) -> None:
    messages = [{"role": "user", "content": "the sea"}]
    response = http.post(
        "/v1/rollouts",
        json={"prompts": [{"text": "the sea"}, {"messages": messages}], "sampling": {"max_tokens": 1}},
    )
    trajectories, _ = round_of(read_lines(response))
    ids = {trajectory["group_id"]: trajectory["prompt_token_ids"] for trajectory in trajectories}
    text = http.post("/tokenize", json={"model": server.model, "prompt": "the sea"}).json()["tokens"]
    chat = http.post("/tokenize", json={"model": server.model, "messages": messages}).json()["tokens"]
    assert ids == {"0": text, "1": chat}


def test_the_scheduler_cuts_the_round_at_its_target(http: httpx.Client) -> None:
    budgets = [[4, 8], [6, 10], [400, 12], [400, 400]]
    body = {
        "prompts": [{"token_ids": PROMPT, "max_tokens": budget} for budget in budgets],
        "group_size": 2,
        "target_groups": 2,
        "sampling": LONG,
    }
    trajectories, last = round_of(read_lines(http.post("/v1/rollouts", json=body)))
    by_place = {(int(t["group_id"]), t["index"]): t for t in trajectories}
    assert len(by_place) == 8
    for (group, index), trajectory in by_place.items():
        ran_out = budgets[group][index] <= 10
        assert trajectory["finish_reason"] == ("length" if ran_out else "abort")
        assert trajectory["stop_reason"] == (None if ran_out else "rollout_cut")
        assert len(trajectory["output_token_ids"]) <= budgets[group][index]
        # The step that ends the last kept member is the last one for all.
        assert len(trajectory["output_token_ids"]) <= 10
    assert last["stats"]["num_complete_groups"] == 2
    assert last["stats"]["num_cut_members"] == 4


def test_a_trajectory_comes_as_soon_as_it_ends(http: httpx.Client) -> None:
    body = {
        "prompts": [{"token_ids": PROMPT, "max_tokens": n} for n in (3, 400)],
        "sampling": LONG,
        "round_id": "early",
    }
    with open_round(http, **body) as lines:
        assert next(lines)["group_id"] == "0"
        numbers = http.get("/v1/rollouts/early").json()
        assert numbers["num_live_members"] == 1
        assert numbers["num_output_tokens"] < 400
        trajectories, _ = round_of(list(lines))
        assert [len(t["output_token_ids"]) for t in trajectories] == [400]


def test_a_deleted_round_ends_with_what_there_is(http: httpx.Client) -> None:
    body = pair(3, 400, "gone")
    with open_round(http, **body) as lines:
        next(lines)
        answer = http.delete("/v1/rollouts/gone")
        assert answer.status_code == 200
        assert answer.json()["closed"] is True
        trajectories, last = round_of(list(lines))
    assert trajectories[0]["stop_reason"] == "rollout_cut"
    assert 0 < len(trajectories[0]["output_token_ids"]) < 400
    assert last["stats"]["num_complete_groups"] == 1
    for method in ("GET", "DELETE"):
        answer = http.request(method, "/v1/rollouts/gone")
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "UnknownRoundError")


def test_a_client_that_goes_away_ends_its_round(http: httpx.Client, server: ServerProcess) -> None:
    before = server.metrics()
    body = {"prompts": [{"token_ids": PROMPT}] * 40, "group_size": 4, "sampling": LONG, "round_id": "left"}
    body["prompts"][0] = {"token_ids": PROMPT, "max_tokens": 2}
    with open_round(http, **body) as lines:
        next(lines)
        assert http.get("/v1/rollouts/left").json()["num_live_members"] > 100
    until_unknown(http, "left")
    after = server.wait_idle()
    assert after["longtail_free_kv_blocks"] == before["longtail_free_kv_blocks"]
    # Ended early: not one of the long ones can have run out.
    assert after["longtail_complete_groups_total"] <= before["longtail_complete_groups_total"] + 1


def test_a_round_id_is_taken_only_while_its_round_lives(http: httpx.Client, server: ServerProcess) -> None:
    body = pair(2, 300, "twin")
    with open_round(http, **body) as lines:
        next(lines)
        refused = http.post("/v1/rollouts", json=body)
        assert refused.status_code == 409
        assert refused.json()["error"]["field"] == "round_id"
        assert refused.json()["error"]["type"] == "RoundConflictError"
        round_of(list(lines))
    # The same id right after the last line, time and again.
    for _ in range(3):
        round_of(read_lines(http.post("/v1/rollouts", json=body | {"sampling": {"max_tokens": 2}})))


def test_a_round_of_many_members_lets_other_requests_through(http: httpx.Client, server: ServerProcess) -> None:
    """Negative control of the time: the round itself takes longer than the bound put on the other requests."""
    slowest_s = 0.0
    done = threading.Event()

    def ask() -> None:
        nonlocal slowest_s
        with server.client() as client:
            while not done.is_set():
                started = time.monotonic()
                assert client.get("/v1/models").status_code == 200
                slowest_s = max(slowest_s, time.monotonic() - started)

    asking = threading.Thread(target=ask)
    asking.start()
    started = time.monotonic()
    body = {"prompts": [{"token_ids": PROMPT}] * 128, "group_size": 4, "sampling": {"max_tokens": 8, "temperature": 0}}
    trajectories, last = round_of(read_lines(http.post("/v1/rollouts", json=body)))
    round_s = time.monotonic() - started
    done.set()
    asking.join()
    assert len(trajectories) == 512
    assert last["stats"]["num_complete_groups"] == 128
    assert slowest_s < round_s / 2


def test_trees_come_out_whole_and_leave_nothing(http: httpx.Client) -> None:
    tree = {"width": 6, "depth": 4, "segment_tokens": 5}
    body = {
        "prompts": [{"token_ids": PROMPT}, {"token_ids": [*PROMPT, 7]}],
        "sampling": {"temperature": 0, "ignore_eos": True, "max_tokens": 400, "tree": tree},
    }
    trajectories, last = round_of(read_lines(http.post("/v1/rollouts", json=body)))
    plain = {**body, "sampling": {"temperature": 0, "ignore_eos": True, "max_tokens": 20}}
    whole = {t["group_id"]: t for t in round_of(read_lines(http.post("/v1/rollouts", json=plain)))[0]}
    assert len(trajectories) == 12
    for trajectory in trajectories:
        same = whole[trajectory["group_id"]]
        assert trajectory["output_token_ids"] == same["output_token_ids"]
        assert trajectory["text"] == same["text"]
        assert trajectory["tokens"]["recomputed"] == 0
    branches = [t["branch"] for t in trajectories if t["branch"] is not None]
    assert len(branches) == 10
    assert {branch["at"] for branch in branches} <= {5, 10, 15}
    assert last["stats"]["num_complete_groups"] == 2
    assert last["stats"]["num_output_tokens"] < 12 * 20


def test_a_wrong_tree_is_named(http: httpx.Client) -> None:
    for sampling, field in (
        ({"tree": {"width": 6, "depth": 4}}, "sampling.tree.segment_tokens"),
        ({"tree": {"width": 6, "depth": 4, "segment_tokens": 0}}, "tree.segment_tokens"),
        ({"tree": 3}, "sampling.tree"),
        ({"stop_repetition": {"max_pattern": 0}}, "sampling.stop_repetition.max_pattern"),
    ):
        response = http.post("/v1/rollouts", json={"prompts": [{"token_ids": PROMPT}], "sampling": sampling})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == field
