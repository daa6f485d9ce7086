"""A zip file that is written while it is sent."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from zipfile import ZIP64_LIMIT, ZIP_STORED, ZipFile, ZipInfo

_LOCAL, _CENTRAL, _EXTRA, _END, _LONG_END = 30, 46, 4, 22, 56 + 20
_SHORT, _LONG = 16, 24
"""Bytes of a zip file's parts: what stands before a file, in the directory, and at the end; then, after a file of
which the size was not known before, its checksum and sizes in 32 or in 64 bits."""


@dataclass(frozen=True)
class File:
    """A file in the making: its name, its size in bytes, and its bytes in pieces."""

    name: str
    size: int
    pieces: Iterable[bytes]

    @classmethod
    def of(cls, name: str, content: bytes) -> "File":
        """Return a file whose bytes are there."""
        return cls(name, len(content), (content,))


class _Sink:
    """What ZipFile writes to: it cannot go back in it, so sizes and checksums come after each file."""

    def __init__(self) -> None:
        self._written: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._written.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """Nothing is open."""

    def take(self) -> bytes:
        written, self._written = b"".join(self._written), []
        return written


def size_of(folder: str, files: Iterable[File]) -> int:
    """Return how many bytes `zipped` will yield."""
    total, directory, entries = 0, 0, 0
    for file in files:
        name = len(f"{folder}/{file.name}".encode())
        long = file.size * 1.05 > ZIP64_LIMIT  # as zipfile judges before it has seen the file
        places = [file.size] * 2 + [total]  # packed, unpacked, and where it begins
        extra = 8 * sum(place > ZIP64_LIMIT for place in places)
        directory += _CENTRAL + name + (_EXTRA + extra if extra else 0)
        total += _LOCAL + name + (_EXTRA + 16 if long else 0) + file.size + (_LONG if long else _SHORT)
        entries += 1
    is_long = total > ZIP64_LIMIT or directory > ZIP64_LIMIT or entries > 0xFFFF
    return total + directory + _END + (_LONG_END if is_long else 0)


def zipped(folder: str, files: Iterable[File], made: datetime) -> Iterator[bytes]:
    """Yield a zip file with the files in one folder, as they are: weights hardly get smaller by packing.

    Args:
        folder: The folder's name.
        files: In the order in which they are wanted.
        made: When, in the archive's words, they were made.
    """
    sink = _Sink()
    with ZipFile(sink, "x", ZIP_STORED) as archive:
        for file in files:
            entry = ZipInfo(f"{folder}/{file.name}", made.timetuple()[:6])
            entry.external_attr = 0o644 << 16
            entry.file_size = file.size  # more than 2 GiB take a longer header, which is written first
            with archive.open(entry, "w") as opened:
                for piece in file.pieces:
                    opened.write(piece)
                    yield sink.take()
    yield sink.take()
