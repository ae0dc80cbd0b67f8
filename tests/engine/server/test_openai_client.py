"""The `openai` client, unchanged, against the server."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from server_process import API_KEY, ServerProcess

MESSAGES = [{"role": "user", "content": "the sea"}]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client


def test_the_model_is_listed(client: openai.OpenAI, server: ServerProcess) -> None:
    assert [model.id for model in client.models.list()] == [server.model]


def test_streaming_gives_the_text_of_the_whole_answer(client: openai.OpenAI, server: ServerProcess) -> None:
    whole = client.completions.create(model=server.model, prompt="the sea", max_tokens=24, temperature=0)
    chunks = list(
        client.completions.create(model=server.model, prompt="the sea", max_tokens=24, temperature=0, stream=True)
    )
    assert whole.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len(chunks) > 3
    chat = client.chat.completions.create(model=server.model, messages=MESSAGES, max_tokens=24, temperature=0)
    deltas = client.chat.completions.create(
        model=server.model, messages=MESSAGES, max_tokens=24, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == chat.choices[0].message.content


def test_chat_uses_the_template_of_the_checkpoint(client: openai.OpenAI, server: ServerProcess) -> None:
    rendered = "<|im_start|>user\nthe sea<|im_end|>\n<|im_start|>assistant\n"
    chat = client.chat.completions.create(model=server.model, messages=MESSAGES, max_tokens=16, temperature=0)
    plain = client.completions.create(
        model=server.model, prompt=rendered, max_tokens=16, temperature=0, extra_body={"add_special_tokens": False}
    )
    other = client.completions.create(model=server.model, prompt="the sea", max_tokens=16, temperature=0)
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.choices[0].message.content != other.choices[0].text


def test_n_seed_and_stop(client: openai.OpenAI, server: ServerProcess) -> None:
    def draw(seed: int) -> list[str]:
        answer = client.completions.create(
            model=server.model, prompt="the sea", max_tokens=16, temperature=1, n=3, seed=seed
        )
        return [choice.text for choice in answer.choices]

    first = draw(1)
    assert len(set(first)) == 3
    assert draw(1) == first
    assert draw(2) != first

    text = client.completions.create(model=server.model, prompt="the sea", max_tokens=24, temperature=0).choices[0].text
    stop = text[4:6]
    stopped = client.completions.create(
        model=server.model, prompt="the sea", max_tokens=24, temperature=0, stop=[stop]
    ).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]


def test_logprobs_are_those_of_the_distribution_that_was_sampled_from(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    """At temperature 0.5 the processed log-prob of the most likely token is above the raw one."""

    def first_logprob(temperature: float) -> float:
        answer = client.completions.create(
            model=server.model, prompt="the sea", max_tokens=1, temperature=temperature, logprobs=5, seed=3
        )
        tops = answer.choices[0].logprobs
        assert tops is not None
        assert tops.top_logprobs is not None
        return max(tops.top_logprobs[0].values())

    assert first_logprob(0.5) > first_logprob(1.0) + 0.01


def test_a_wrong_key_and_a_wrong_model_are_the_clients_own_errors(client: openai.OpenAI, server: ServerProcess) -> None:
    with pytest.raises(openai.NotFoundError, match="model"):
        client.completions.create(model="other", prompt="a")
    with (
        openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
