"""A server on the real base model."""

from collections.abc import Iterator

import pytest
from rich.console import Console

from servers import Server
from tunesmith.base_models.catalog import Catalog
from tunesmith.config import Settings
from tunesmith.terminal import fetch_weights


@pytest.fixture(scope="session")
def real_weights() -> None:
    """Fetch the default base model, once per machine (241 MB)."""
    settings = Settings.load()
    fetch_weights(Console(stderr=True), Catalog.load(settings).default, settings.cache_dir)


@pytest.fixture(scope="session")
def real_server(real_weights: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("real"), {}) as server:
        yield server
