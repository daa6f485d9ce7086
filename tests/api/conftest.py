from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from api.stand_ins import Backend
from google_types import disagreements
from recording import RecordedApp, Recording


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def client(backend: Backend, tmp_path: Path) -> Iterator[TestClient]:
    """A client of the stand-ins; Google's own types must agree with all that it is answered."""
    app = RecordedApp(backend.app(), Recording(tmp_path / "answers"))
    with TestClient(app, headers={"authorization": "Bearer good"}) as client:
        yield client
    assert disagreements(tmp_path / "answers") == []


@pytest.fixture
def tutorial_body() -> str:
    """The body of the tutorial's curl command, trailing commas and all."""
    return Path(__file__).with_name("tutorial_body.txt").read_text()
