"""What gets through the door for JSON, and what a refusal says."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from longtail.engine.errors import InvalidInputError
from longtail.engine.server.bodies import parse_body
from longtail.engine.server.json_door import MAX_DEPTH, check_json
from longtail.engine.server.refusals import named


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":[1,2.5,"x",null,true]}',
        b' {"a":"[[[[{{{{"} ',
        '{"a":"\\ud83d\\ude00 ü"}'.encode(),
        b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
        b'["' + b'[\\"{' * 500 + b'"]',
        b"18446744073709551615",
        b"-9223372036854775808",
        b'"1234567890123456789012345"',
        b'{"vllm_xargs":null,"messages":[],"structured_outputs":null}',
    ],
)
def test_sane_json_gets_through_as_it_is(body: bytes) -> None:
    assert check_json(body) == json.loads(body)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b'{"a":', "body"),
        (b'{"a":1}x', "body"),
        (b'{"a":"\xff"}', "body"),
        (b"\xff\xfe\x00", "body"),
        (b"\xef\xbb\xbf{}", "body"),
        (b'{"a":"\\ud800"}', "body"),
        (b'{"a":"\\udc00\\ud800"}', "body"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "body"),
        (b"[" * 1_000_000, "body"),
        (b'{"a":' * 200_000, "body"),
        (b'{"a":{"b":[0,NaN]}}', "a.b[1]"),
        (b'{"a":-Infinity}', "a"),
        (b"NaN", "body"),
        (b'{"a":1e999}', "a"),
        (b'{"a":[18446744073709551616]}', "a[0]"),
        (b'{"a":' + b"9" * 5000 + b"}", "body"),
        (b'{"messages":5}', "messages"),
        (b'{"messages":null}', "messages"),
        (b'{"structured_outputs":[]}', "structured_outputs"),
        (b'{"vllm_xargs":"x"}', "vllm_xargs"),
        (b'{"vllm_xargs":{"kv_transfer_params":5}}', "vllm_xargs.kv_transfer_params"),
    ],
)
def test_a_refusal_names_the_field(body: bytes, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        check_json(body)
    assert caught.value.field == field
    assert len(caught.value.got) <= 120


def test_any_json_of_python_gets_through() -> None:
    """Random values, as Python writes them: no false alarm in 2,000."""
    source = random.Random(20)

    def value(depth: int) -> Any:
        kind = source.randrange(7 if depth else 5)
        if kind == 0:
            return source.randrange(-(2**63), 2**64)
        if kind == 1:
            return source.uniform(-1e300, 1e300)
        if kind == 2:
            return "".join(chr(source.choice([34, 91, 92, 123, 233, 0x1F600, 10])) for _ in range(source.randrange(5)))
        if kind in (3, 4):
            return source.choice([None, True, False])
        size = source.randrange(4)
        if kind == 5:
            return [value(depth - 1) for _ in range(size)]
        return {f'k{i}\\"[': value(depth - 1) for i in range(size)}

    for _ in range(2000):
        original = value(6)
        assert check_json(json.dumps(original, ensure_ascii=source.random() < 0.5).encode()) == original


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ([], "body"),
        ({}, "prompts"),
        ({"prompts": 5}, "prompts"),
        ({"prompts": [], "typo": 1}, "typo"),
        ({"prompts": [], "group_size": "2"}, "group_size"),
        ({"prompts": [], "group_size": 1.5}, "group_size"),
        ({"prompts": [], "group_size": True}, "group_size"),
        ({"prompts": [], "over_provision": "x"}, "over_provision"),
        ({"prompts": [], "round_id": 5}, "round_id"),
        ({"prompts": [], "sampling": []}, "sampling"),
    ],
)
def test_the_body_of_a_rollout_names_what_is_wrong(body: Any, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_body(body)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (5, "prompts[1]"),
        ({"tokens": [1]}, "prompts[1].tokens"),
        ({"token_ids": "a"}, "prompts[1].token_ids"),
        ({"text": 5}, "prompts[1].text"),
        ({"messages": [5]}, "prompts[1].messages[0]"),
        ({"text": "a", "metadata": 5}, "prompts[1].metadata"),
        ({"text": "a", "group_id": 5}, "prompts[1].group_id"),
    ],
)
def test_a_prompt_is_named_by_its_place(prompt: Any, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_body({"prompts": [{"text": "fine"}, prompt]}).checked_prompts()
    assert caught.value.field == field


def test_sampling_knows_its_fields() -> None:
    for sampling, field in (({"top_q": 1}, "sampling.top_q"), ({"top_p": 2}, "sampling.top_p")):
        with pytest.raises(InvalidInputError) as caught:
            parse_body({"prompts": [], "sampling": sampling}).checked_sampling()
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("message", "body", "param"),
    [
        ("min_p must be in [0, 1], got -5.0.", {"model": "a", "min_p": -5}, "min_p"),
        ("Token id 512 is out of vocabulary", {"model": "a", "prompt": [512]}, "prompt"),
        ("Grammar error: unclosed group", {"structured_outputs": {}}, "structured_outputs"),
        ("Cannot apply chat template to an empty conversation.", {"messages": []}, "messages"),
        ("argument of type 'int' is not iterable", 5, "body"),
        ("this is not a multimodal model", {"model": "a", "messages": []}, "messages"),
        ("something else", {"model": "a"}, None),
    ],
)
def test_refusals_of_vllm_get_the_name_of_the_field(message: str, body: Any, param: str | None) -> None:
    assert named({"message": message, "param": None}, body) == {"message": message, "param": param, "field": param}
    assert named({"message": message, "param": "its own"}, body)["param"] == "its own"
