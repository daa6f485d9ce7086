"""A server for tests of who may come in: nothing is tuned there."""

from collections.abc import Iterator

import pytest

from servers import Server


@pytest.fixture(scope="module")
def server(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server without a worker."""
    with Server(tmp_path_factory.mktemp("data"), tiny, "--workers", "0") as running:
        yield running
