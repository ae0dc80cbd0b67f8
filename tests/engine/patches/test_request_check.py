from __future__ import annotations

from http import HTTPStatus

import pytest

from longtail.engine.errors import InvalidInputError
from longtail.engine.patches.request_check import request_error_class
from longtail.scheduler.metadata import metadata_of


@pytest.fixture
def error() -> InvalidInputError:
    with pytest.raises(InvalidInputError) as caught:
        metadata_of({"rollout": {"round": "r", "target_groups": -1, "group": "g"}})
    return request_error_class()(caught.value)


def test_the_error_is_ours_and_a_request_error_of_vllm(error: InvalidInputError) -> None:
    from vllm.exceptions import VLLMClientError

    assert isinstance(error, VLLMClientError)
    assert error.field == "rollout.target_groups"
    assert str(error) == "rollout.target_groups: expected an integer in [1, 1048576], got -1"


def test_the_http_server_answers_400_and_names_the_field(error: InvalidInputError) -> None:
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.v1.engine.exceptions import EngineGenerateError

    answer = create_error_response(error).error
    assert (answer.code, answer.param) == (HTTPStatus.BAD_REQUEST, "rollout.target_groups")
    # What AsyncLLM.generate makes of any exception that is not vLLM's own request error.
    assert create_error_response(EngineGenerateError()).error.code == HTTPStatus.INTERNAL_SERVER_ERROR
