"""Zip files that are written while they are sent."""

import io
import zipfile
from collections.abc import Iterator
from datetime import datetime

import pytest

from tunesmith.exports import archive
from tunesmith.exports.archive import File, size_of, zipped

FILES = [File.of("small.txt", b"small"), File("large.bin", 3000, (b"x" * 1000,) * 3), File.of("ä.txt", b"")]


@pytest.mark.parametrize("limit", [zipfile.ZIP64_LIMIT, 2000, 10])
def test_it_opens_and_its_size_is_known_before(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Also beyond the limit of 2 GiB, from which on sizes take 64 bits; here it is lower."""
    for module in (zipfile, archive):
        monkeypatch.setattr(module, "ZIP64_LIMIT", limit)
    content = b"".join(zipped("folder", FILES, datetime(2026, 1, 2, 3, 4, 6)))
    assert len(content) == size_of("folder", FILES)
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        assert opened.testzip() is None
        assert opened.namelist() == ["folder/small.txt", "folder/large.bin", "folder/ä.txt"]
        assert opened.read("folder/large.bin") == b"x" * 3000


def test_it_comes_as_it_is_made() -> None:
    read = []

    def pieces() -> Iterator[bytes]:
        for number in range(5):
            read.append(number)
            yield b"y" * 100

    making = zipped("folder", [File("file", 500, pieces())], datetime(2026, 1, 1))
    next(making)
    assert read == [0]
    making.close()
    assert read == [0]
