"""schemathesis over the served OpenAPI schema: no 5xx, and no answer that the schema does not describe."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from imprompt.app.server.settings import Limits, Settings
from serving import start

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory):
    """The schema of a server without room for jobs, so that sound requests are answered 429 at once."""
    folder = tmp_path_factory.mktemp("server")
    running = start(Settings(folder=folder, devices=(), limits=Limits(queue=0)), ready=False)
    yield schemathesis.openapi.from_url(f"{running.url}/api/v1/openapi.json")
    running.stop()


def test_answers_are_as_described(described) -> None:
    seen = 0
    for found in described.get_all_operations():
        operation = found.ok()
        if operation.path == "/readyz":  # there is no worker
            continue

        @given(case=operation.as_strategy())
        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        def check(case) -> None:
            case.call_and_validate(checks=CHECKS)

        check()
        seen += 1
    assert seen > 30


def test_events_are_a_stream_and_their_errors_json(described) -> None:
    answers = described.raw_schema["paths"]["/api/v1/jobs/{job}/events"]["get"]["responses"]
    assert list(answers.pop("200")["content"]) == ["text/event-stream"]
    assert {tuple(answer["content"]) for answer in answers.values()} == {("application/json",)}
