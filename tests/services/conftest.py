"""One server for the tests of all services: they name their people and models apart."""

from collections.abc import Iterator

import pytest

from servers import Server


@pytest.fixture(scope="session")
def server(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server with a worker, on the tiny model."""
    with Server(tmp_path_factory.mktemp("data"), tiny) as running:
        yield running
