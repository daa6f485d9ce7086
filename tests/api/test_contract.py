"""Whatever the OpenAPI document lets a client send, a live server answers as the document says."""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks

from servers import Server, job

SECONDS = 40  # for all methods together; what is bad on purpose takes long to think of
EXAMPLES = {schemathesis.GenerationMode.POSITIVE: 15, schemathesis.GenerationMode.NEGATIVE: 4}  # of a method
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
REAL = {"tunedModel": "contract", "model": "tiny-gemma3"}
"""Ids that exist, for every other request; random ones meet only 403 and 404."""


@pytest.fixture(scope="module")
def contract(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a tuned model. It has no worker, which would fetch whatever base model a request names."""
    data_dir = tmp_path_factory.mktemp("data")
    with Server(data_dir, tiny) as server:
        server.finished(server.tune(job("contract"), tunedModelId="contract"))
    with Server(data_dir, tiny, "--workers", "0") as server:
        yield server


def operations(server: Server) -> Iterator[Any]:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for result in schema.get_all_operations():
        yield result.ok()


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_no_request_breaks_the_server_or_the_document(contract: Server, mode: schemathesis.GenerationMode):
    found = list(operations(contract))
    assert len(found) > 20
    over = time.monotonic() + SECONDS / 2
    for index, operation in enumerate(found):
        share = (over - time.monotonic()) / (len(found) - index)
        assert exercise(contract, operation, mode, time.monotonic() + share) > 0


class TimeIsOver(BaseException):
    """Ends Hypothesis at once; it takes an Exception for a failure of the test, and goes on."""


def exercise(server: Server, operation: Any, mode: schemathesis.GenerationMode, until: float) -> int:
    """Send requests to one method, at least one, until the time is over; return how many."""
    sent = 0

    @settings(
        max_examples=EXAMPLES[mode],
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        nonlocal sent
        sent += 1
        if sent % 2 and operation.method.upper() != "DELETE":
            case.path_parameters.update({name: REAL[name] for name in case.path_parameters if name in REAL})
        headers = {"authorization": server.http.headers["authorization"]}
        response = case.call(base_url=f"{server.url}/v1beta", headers=headers, timeout=30)
        case.validate_response(response, checks=CHECKS)
        if time.monotonic() > until:
            raise TimeIsOver

    with suppress(TimeIsOver):
        send()
    return sent
