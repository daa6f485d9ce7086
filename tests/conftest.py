"""Fixtures that several folders of tests share."""

from pathlib import Path

import pytest

from servers import Server, tiny_catalog


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which Tunesmith's default base model is a tiny one with random weights."""
    return tiny_catalog(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory):
    """A running server with a worker, on the tiny model; shared by the tests of a module."""
    with Server(tmp_path_factory.mktemp("data"), tiny) as running:
        yield running


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"
