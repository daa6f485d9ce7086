"""Fixtures of the tests that sign in with other people's programs."""

from collections.abc import Iterator

import pytest

from secure_site import Site, running_site


@pytest.fixture(scope="module")
def site(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A running server over https, with the account of a person."""
    with running_site(tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("data"), tiny) as site:
        yield site
