"""Weights in safetensors files, read a block of rows at a time: memory stays small however large the model is."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 19
"""Numbers that are worked on at once: 2 MiB in fp32."""

Rows = NDArray[np.float32]
"""Some rows of a tensor, (rows, columns)."""

_STORED: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in a safetensors file.

    Attributes:
        name: As its file has it, such as `model.norm.weight`.
        dtype: In safetensors' words, such as `BF16`.
        shape: Its shape; one of one dimension is read as a column.
        start: Its first byte, counted from the file's.
        size: Its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def rows(self) -> int:
        """How many rows it is read in."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """How long its rows are."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file: its header as it stands, and its tensors in the order of their bytes."""

    source: Path | bytes
    header: bytes
    tensors: tuple[Tensor, ...]

    @classmethod
    def read(cls, source: Path | bytes) -> "TensorFile":
        """Read the header of a file, or of one in memory."""
        with _opened(source) as file:
            length = file.read(8)
            header = length + file.read(int.from_bytes(length, "little"))
        described: dict[str, dict[str, Any]] = json.loads(header[8:])
        described.pop("__metadata__", None)
        tensors = [
            Tensor(name, about["dtype"], tuple(about["shape"]), len(header) + begin, end - begin)
            for name, about in described.items()
            for begin, end in [about["data_offsets"]]
        ]
        return cls(source, header, tuple(sorted(tensors, key=lambda tensor: tensor.start)))

    @property
    def size(self) -> int:
        """The file's bytes."""
        return max((tensor.start + tensor.size for tensor in self.tensors), default=len(self.header))

    def blocks(self, tensor: Tensor, multiple: int = 1) -> Iterator[Rows]:
        """Yield a tensor's rows in fp32.

        Args:
            tensor: One of this file's.
            multiple: Each block but the last has a multiple of so many rows.
        """
        stored = np.dtype(_STORED[tensor.dtype]).newbyteorder("<")
        step = max(BLOCK // tensor.columns // multiple, 1) * multiple
        with _opened(self.source) as file:
            file.seek(tensor.start)
            for first in range(0, tensor.rows, step):
                rows = min(step, tensor.rows - first)
                read = np.frombuffer(file.read(rows * tensor.columns * stored.itemsize), stored)
                yield _widened(read, tensor.dtype).reshape(rows, tensor.columns)

    def raw(self, tensor: Tensor) -> Iterator[bytes]:
        """Yield a tensor's bytes as they stand."""
        with _opened(self.source) as file:
            file.seek(tensor.start)
            for done in range(0, tensor.size, 2 * BLOCK):
                yield file.read(min(2 * BLOCK, tensor.size - done))


def known(dtype: str) -> bool:
    """Whether tensors of a dtype hold numbers that can be read here."""
    return dtype in _STORED


def stored(rows: Rows, dtype: str) -> bytes:
    """Return numbers as bytes of a dtype, rounded to the nearest, and of two to the even one.

    Raises:
        OverflowError: One is too large for the dtype.
    """
    if dtype == "BF16":
        bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    with np.errstate(over="ignore"):
        narrow = rows.astype(np.dtype(_STORED[dtype]).newbyteorder("<"))
    if dtype == "F16" and not np.isfinite(narrow).all():
        raise OverflowError(f"{np.abs(rows).max():g} is too large for F16")
    return narrow.tobytes()


def _widened(read: NDArray[Any], dtype: str) -> Rows:
    if dtype != "BF16":
        return read.astype(np.float32)
    wide: Rows = (read.astype(np.uint32) << 16).view(np.float32)
    return wide


def _opened(source: Path | bytes) -> BinaryIO:
    return BytesIO(source) if isinstance(source, bytes) else source.open("rb")
