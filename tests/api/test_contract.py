"""Whatever the OpenAPI document lets a client send, a live server answers as the document says."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks

from servers import Server, job

SECONDS = 60  # for all methods together; what is bad on purpose takes long to think of
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
def contract(server: Server) -> Server:
    server.finished(server.tune(job("contract"), tunedModelId="contract"))
    return server


def operations(server: Server) -> Iterator[Any]:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for result in schema.get_all_operations():
        yield result.ok()


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_no_request_breaks_the_server_or_the_document(contract: Server, mode: schemathesis.GenerationMode):
    found = list(operations(contract))
    assert len(found) > 20
    until = time.monotonic() + SECONDS / 2
    sent = sum(exercise(contract, operation, mode, until) for operation in found)
    assert sent > 2 * len(found)


def exercise(server: Server, operation: Any, mode: schemathesis.GenerationMode, until: float) -> int:
    """Send requests to one method, three when the time is over; return how many."""
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
        if sent >= 3 and time.monotonic() > until:
            return
        sent += 1
        if sent % 2 and operation.method.upper() != "DELETE":
            case.path_parameters.update({name: REAL[name] for name in case.path_parameters if name in REAL})
        headers = {"authorization": server.http.headers["authorization"]}
        response = case.call(base_url=f"{server.url}/v1beta", headers=headers, timeout=30)
        case.validate_response(response, checks=CHECKS)

    send()
    return sent
