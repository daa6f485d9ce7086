from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from api.stand_ins import Backend


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def client(backend: Backend) -> Iterator[TestClient]:
    with TestClient(backend.app(), headers={"authorization": "Bearer good"}) as client:
        yield client


@pytest.fixture
def tutorial_body() -> str:
    """The body of the tutorial's curl command, trailing commas and all."""
    return Path(__file__).with_name("tutorial_body.txt").read_text()
