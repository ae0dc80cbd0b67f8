"""200 malformed requests against a server that is at work: each is refused by name, and nothing else changes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import pytest
from server_process import MAX_BODY_BYTES, MAX_MEMBERS, ServerProcess, read_lines

from longtail.engine.server.json_door import MAX_DEPTH

NUM_CASES = 200
VOCABULARY, MAX_MODEL_LEN = 512, 512
NAN, INFINITY, HUGE = float("nan"), float("inf"), 10**30
COMPLETIONS, CHAT, ROLLOUTS = "/v1/completions", "/v1/chat/completions", "/v1/rollouts"
JSON_TYPE = {"Content-Type": "application/json"}


class Case(NamedTuple):
    """A request, and the field that its refusal must name."""

    field: str
    method: str
    path: str
    body: bytes
    headers: dict[str, str] = JSON_TYPE
    chunked: bool = False


def plain_cases(model: str) -> Iterator[Case]:
    """vLLM's own routes."""
    wrong: dict[str, list[Any]] = {
        "temperature": [NAN, INFINITY, -1, "hot", HUGE, [1]],
        "top_p": [NAN, 0, 1.5, "x"],
        "min_p": [NAN, -INFINITY, 2],
        "presence_penalty": [NAN, 5],
        "frequency_penalty": [INFINITY, -5],
        "repetition_penalty": [NAN, -1, "x"],
        "top_k": [-2, 1.5, HUGE, "x"],
        "max_tokens": [0, -1, HUGE, "x", {}],
        "min_tokens": [-1, 2**40, NAN],
        "n": [0, -1, 2**31, "x"],
        "seed": [HUGE, "x", 0.5],
        "logprobs": [-2, 10**6, "x"],
        "stop": [[""], "half a surrogate \ud800", [1]],
        "stop_token_ids": [[VOCABULARY], [-1], [HUGE], ["a"]],
        "allowed_token_ids": [[VOCABULARY], [-1], []],
        "logit_bias": [{str(VOCABULARY): 1}, {"a": 1}, {"1": NAN}, [1]],
        "bad_words": [[""], 5],
        "structured_outputs": [5, {"regex": "("}, {"json": "{"}, {"grammar": "root ::= ("}],
        "response_format": [5, {"type": "x"}, {"type": "json_schema"}],
        "stream": ["x"],
        "cache_salt": ["", 5],
        "request_id": [5, "\ud800"],
        "priority": ["x", HUGE],
        "truncate_prompt_tokens": [-2, HUGE],
        "vllm_xargs": [5, [1], {"kv_transfer_params": 5}, {"a": {"b": 1}}, {"a": HUGE}],
        "model": ["another", 5],
    }
    sampling = {"model": model, "max_tokens": 4}
    for field, values in wrong.items():
        for value in values:
            yield Case(field, "POST", COMPLETIONS, dump({**sampling, "prompt": "hi", field: value}))
    for prompt in (
        "",
        [],
        [[]],
        [-1],
        [VOCABULARY],
        [HUGE],
        [1.5],
        [None],
        5,
        {"a": 1},
        "x" * 3000,
        [1] * 600,
        "\ud800",
    ):
        yield Case("prompt", "POST", COMPLETIONS, dump({**sampling, "prompt": prompt}))
    for messages in (
        [],
        None,
        5,
        "x",
        [5],
        [{}],
        [{"role": "user", "content": 5}],
        [{"role": 5, "content": "a"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}]}],
    ):
        yield Case("messages", "POST", CHAT, dump({**sampling, "messages": messages}))
    long = [{"role": "user", "content": "x" * 3000}]
    yield Case("input_tokens", "POST", CHAT, dump({**sampling, "messages": long}))
    for metadata, field in metadata_cases():
        value = metadata if isinstance(metadata, str) else json.dumps(metadata)
        xargs = {"vllm_xargs": {"rollout": value}}
        yield Case(field, "POST", COMPLETIONS, dump({**sampling, "prompt": "hi", **xargs}))
        messages = {"messages": [{"role": "user", "content": "hi"}]}
        yield Case(field, "POST", CHAT, dump({**sampling, **messages, **xargs}))
    nested = {"vllm_xargs": {"rollout": {"round": "r", "group": "g", "target_groups": 1}}}
    yield Case("rollout", "POST", COMPLETIONS, dump({**sampling, "prompt": "hi", **nested}))


def metadata_cases() -> Iterator[tuple[Any, str]]:
    """Rollout metadata, and the field of it that is wrong."""
    right = {"round": "r", "group": "g", "target_groups": 1}
    yield "text", "rollout"
    yield "{", "rollout"
    yield "[" * 4000, "rollout"
    yield "[" * 5000, "rollout"
    yield "null", "rollout"
    yield {}, "round"
    for field, value in (
        ("round", ""),
        ("round", 5),
        ("round", "x" * 201),
        ("group", None),
        ("target_groups", -1),
        ("target_groups", 0),
        ("target_groups", 2**70),
        ("target_groups", "1"),
        ("group_size", 10**9),
        ("group_size", 1.5),
        ("index", -1),
        ("index", 1),
        ("typo", 1),
    ):
        yield right | {field: value}, field


def rollout_cases() -> Iterator[Case]:
    """The rollout routes."""
    right: dict[str, Any] = {"prompts": [{"token_ids": [1, 2]}]}
    for field, body in (
        ("prompts", {}),
        ("prompts", {"prompts": None}),
        ("prompts", {"prompts": []}),
        ("prompts", {"prompts": {"token_ids": [1]}}),
        ("typo", right | {"typo": 1}),
        ("group_size", right | {"group_size": 0}),
        ("group_size", right | {"group_size": -3}),
        ("group_size", right | {"group_size": 10**9}),
        ("group_size", right | {"group_size": MAX_MEMBERS + 1}),
        ("group_size", right | {"group_size": "2"}),
        ("group_size", right | {"group_size": HUGE}),
        ("target_groups", right | {"target_groups": -1}),
        ("target_groups", right | {"target_groups": 2}),
        ("target_groups", right | {"target_groups": 1.5}),
        ("over_provision", right | {"over_provision": NAN, "target_groups": 1}),
        ("over_provision", right | {"over_provision": 0.5, "target_groups": 1}),
        ("over_provision", right | {"over_provision": 2}),
        ("group_size", {"group_size": 65_536, "prompts": [{"token_ids": [1], "max_tokens": 1}] * 500}),
        ("target_groups", right | {"over_provision": 1.7e308, "target_groups": 2}),
        ("round_id", right | {"round_id": ""}),
        ("round_id", right | {"round_id": "x" * 201}),
        ("round_id", right | {"round_id": 5}),
        ("sampling", right | {"sampling": 5}),
        ("sampling.temperatur", right | {"sampling": {"temperatur": 1}}),
        ("sampling.temperature", right | {"sampling": {"temperature": NAN}}),
        ("sampling.temperature", right | {"sampling": {"temperature": -1}}),
        ("sampling.temperature", right | {"sampling": {"temperature": 50}}),
        ("sampling.top_p", right | {"sampling": {"top_p": INFINITY}}),
        ("sampling.top_p", right | {"sampling": {"top_p": 0}}),
        ("sampling.top_k", right | {"sampling": {"top_k": -1}}),
        ("sampling.max_tokens", right | {"sampling": {"max_tokens": 0}}),
        ("sampling.min_tokens", right | {"sampling": {"min_tokens": 9, "max_tokens": 5}}),
        ("sampling.stop", right | {"sampling": {"stop": [""]}}),
        ("sampling.stop", right | {"sampling": {"stop": "x"}}),
        ("sampling.stop_token_ids", right | {"sampling": {"stop_token_ids": [-1]}}),
        ("stop_token_ids", right | {"sampling": {"stop_token_ids": [VOCABULARY], "min_tokens": 2}}),
        ("sampling.seed", right | {"sampling": {"seed": -1}}),
        ("sampling.seed", right | {"sampling": {"seed": HUGE}}),
    ):
        yield Case(field, "POST", ROLLOUTS, dump(body))
    for field, prompt in (
        ("prompts[1]", 5),
        ("prompts[1]", {}),
        ("prompts[1]", {"text": "a", "token_ids": [1]}),
        ("prompts[1].ids", {"ids": [1]}),
        ("prompts[1].token_ids", {"token_ids": []}),
        ("prompts[1].token_ids", {"token_ids": [1] * MAX_MODEL_LEN}),
        ("prompts[1].token_ids[0]", {"token_ids": [VOCABULARY]}),
        ("prompts[1].token_ids[1]", {"token_ids": [1, -1]}),
        ("prompts[1].token_ids[0]", {"token_ids": ["1"]}),
        ("prompts[1].token_ids[0]", {"token_ids": [True]}),
        ("prompts[1].token_ids[0]", {"token_ids": [HUGE]}),
        ("prompts[1].text", {"text": 5}),
        ("prompts[1].text", {"text": "x" * 3000}),
        ("prompts[1].messages", {"messages": []}),
        ("prompts[1].messages[0].role", {"messages": [{"content": "a"}]}),
        ("prompts[1].messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
        ("prompts[1].group_id", {"token_ids": [1], "group_id": ""}),
        ("prompts[1].group_id", {"token_ids": [1], "group_id": "0"}),
        ("prompts[1].metadata", {"token_ids": [1], "metadata": 5}),
        ("prompts[1].max_tokens", {"token_ids": [1], "max_tokens": 0}),
    ):
        yield Case(field, "POST", ROLLOUTS, dump({"prompts": [{"token_ids": [1]}, prompt]}))
    yield Case("round_id", "GET", f"{ROLLOUTS}/unknown", b"")
    yield Case("round_id", "DELETE", f"{ROLLOUTS}/unknown", b"")
    yield Case("round_id", "DELETE", f"{ROLLOUTS}/", b"")
    yield Case("round_id", "GET", f"{ROLLOUTS}/%ff%fe", b"")


def transport_cases(model: str) -> Iterator[Case]:
    """What is wrong before anybody looks at fields."""
    start = dump({"model": model, "prompt": "hi"})[:-1]
    for path in (COMPLETIONS, CHAT, ROLLOUTS, "/tokenize"):
        yield Case("body", "POST", path, b'{"model":')
        yield Case("body", "POST", path, b'{"model":"\xff\xfe"}')
        yield Case("body", "POST", path, b"\xff\xfe{\x00}\x00")
        yield Case("body", "POST", path, start + b',"x":' + b"[" * 50_000)
        yield Case("body", "POST", path, start + b',"x":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}")
        yield Case("body", "POST", path, ('["\u0122",' + "[" * 2000 + '"').encode("utf-16-le"))
        yield Case("body", "POST", path, start + b',"seed":' + b"9" * 5000 + b"}")
        yield Case("body", "POST", path, b"[]" if path == ROLLOUTS else b"5")
        yield Case("body", "POST", path, b"")
        yield Case("body", "POST", path, b"x" * (MAX_BODY_BYTES + 1))
        yield Case("body", "POST", path, b" " * (MAX_BODY_BYTES + 1), JSON_TYPE, chunked=True)
        yield Case("Content-Type", "POST", path, start + b"}", {"Content-Type": "text/plain"})
        yield Case("Content-Type", "POST", path, start + b"}", {})
        yield Case("method", "PUT", path, start + b"}")
        yield Case("method", "GET", path, b"")
    yield Case("path", "POST", "/v1/rollout", start + b"}")


def dump(value: Any) -> bytes:
    """JSON as Python writes it: with `NaN`, and with half a surrogate pair as an escape."""
    return json.dumps(value).encode()


def cases(model: str) -> list[Case]:
    return [*plain_cases(model), *rollout_cases(), *transport_cases(model)]


def send(client: httpx.Client, case: Case) -> httpx.Response:
    content: Any = (
        iter([case.body[: MAX_BODY_BYTES // 2], case.body[MAX_BODY_BYTES // 2 :]]) if case.chunked else case.body
    )
    return client.request(case.method, case.path, content=content, headers=case.headers)


def refusal(response: httpx.Response, case: Case) -> str | None:
    """What is wrong with the answer to a malformed request, or `None`."""
    if not 400 <= response.status_code < 500:
        return f"status {response.status_code}: {response.text[:200]}"
    try:
        error = response.json()["error"]
        named = {str(error.get("field")), str(error.get("param"))}
        where = error["message"] + " ".join(named)
    except (ValueError, TypeError, KeyError):
        return f"no typed error: {response.text[:200]}"
    if not error["type"] or case.field not in where:
        return f"{case.field} is not named: {error}"
    return None


class Load:
    """Requests of others: greedy completions and a round, over and over, until told to stop."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.done = threading.Event()

    def completion(self, client: httpx.Client) -> Any:
        body = {"model": self.server.model, "prompt": [9, 8, 7], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        answer = client.post(COMPLETIONS, json=body | {"return_token_ids": True, "n": 1})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    def round(self, client: httpx.Client) -> Any:
        prompts = [{"token_ids": [5 + i, 6, 7], "max_tokens": 20 + 5 * i} for i in range(6)]
        sampling = {"temperature": 0, "ignore_eos": True}
        lines = read_lines(client.post(ROLLOUTS, json={"prompts": prompts, "group_size": 2, "sampling": sampling}))
        *trajectories, last = lines
        assert last["type"] == "round", last
        return sorted((t["group_id"], t["index"], t["output_token_ids"]) for t in trajectories)

    def once(self) -> list[Any]:
        with self.server.client() as client:
            return [self.completion(client), self.round(client)]

    def run(self, part: int) -> list[Any]:
        outputs = []
        with self.server.client() as client:
            while not self.done.is_set():
                outputs.append((self.completion, self.round)[part](client))
        return outputs


def test_there_are_enough_cases() -> None:
    all_cases = cases("m")
    assert len(all_cases) >= NUM_CASES
    assert len({(case.method, case.path, case.body, *case.headers.items()) for case in all_cases}) >= NUM_CASES


def test_each_is_refused_by_name_and_nothing_else_changes(server: ServerProcess) -> None:
    before = server.wait_idle()
    load = Load(server)
    undisturbed = load.once()
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(load.run, part) for part in (0, 1, 1)]
        wrong = []
        try:
            with server.client() as client:
                for case in cases(server.model):
                    try:
                        problem = refusal(send(client, case), case)
                    except httpx.TransportError as error:
                        problem = f"{type(error).__name__}: {error}"
                    if problem is not None:
                        wrong.append(f"{case.method} {case.path} {case.body[:120]!r}: {problem}")
        finally:
            load.done.set()
        outputs = [future.result() for future in running]
    assert not wrong, "\n".join([f"{len(wrong)} wrong answers", *wrong])
    assert all(len(part) >= 2 for part in outputs), "the load was not at work"
    for part, kind in zip(outputs, (0, 1, 1), strict=True):
        assert all(output == undisturbed[kind] for output in part)
    after = server.wait_idle()
    assert server.process.poll() is None
    assert after["longtail_free_kv_blocks"] == before["longtail_free_kv_blocks"]
    # No malformed request opened a round.
    assert after["longtail_rounds_total"] - before["longtail_rounds_total"] == 1 + len(outputs[1]) + len(outputs[2])
    assert load.once() == undisturbed


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(500, json={"error": {"message": "top_p", "type": "x"}}),
        httpx.Response(200, json={}),
        httpx.Response(400, json={"error": {"message": "wrong", "type": "x", "param": None}}),
        httpx.Response(400, text="top_p"),
        httpx.Response(400, json={"detail": "top_p"}),
    ],
)
def test_the_judge_sees_a_bad_answer(answer: httpx.Response) -> None:
    """Negative control."""
    case = Case("top_p", "POST", COMPLETIONS, b"")
    assert refusal(answer, case) is not None
    assert refusal(httpx.Response(400, json={"error": {"message": "top_p: no", "type": "x"}}), case) is None
