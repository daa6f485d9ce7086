"""A base model's weights with an adapter merged into them, a block of rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tunesmith.errors import FailedPrecondition
from tunesmith.exports.adapter import Adapter
from tunesmith.exports.checkpoint import Rows, Tensor, TensorFile, known, stored

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Merged:
    """The weights of a tuned model.

    Attributes:
        path: Directory with the base model's safetensors.
        adapter: What is added to them.
    """

    path: Path
    adapter: Adapter

    @cached_property
    def files(self) -> dict[str, TensorFile]:
        """The base model's files by name.

        Raises:
            FailedPrecondition: The adapter belongs to weights that are not there.
        """
        files = {path.name: TensorFile.read(path) for path in sorted(self.path.glob("*.safetensors"))}
        shapes = {tensor.name: tensor.shape for file in files.values() for tensor in file.tensors}
        for path, (a, b) in self.adapter.factors.items():
            shape = shapes.get(path + _WEIGHT)
            if shape != (b.shape[0], a.shape[1]):
                raise FailedPrecondition(
                    f"The adapter changes {path}, which among the base model's weights has the shape {shape}, so "
                    "it cannot be merged; export it with format PEFT."
                )
        return files

    def blocks(self, file: TensorFile, tensor: Tensor, multiple: int = 1) -> Iterator[Rows]:
        """Yield a tensor's rows in fp32; see `TensorFile.blocks`."""
        path = tensor.name.removesuffix(_WEIGHT)
        first = 0
        for rows in file.blocks(tensor, multiple):
            yield rows + self.adapter.update(path, first, len(rows)) if self._changes(tensor) else rows
            first += len(rows)

    def safetensors(self, file: TensorFile) -> Iterator[bytes]:
        """Yield one of the base model's files with the adapter merged in: the same header, the same size."""
        yield file.header
        for tensor in file.tensors:
            if self._changes(tensor):
                yield from (stored(rows, tensor.dtype) for rows in self.blocks(file, tensor))
            else:
                yield from file.raw(tensor)

    def _changes(self, tensor: Tensor) -> bool:
        return known(tensor.dtype) and tensor.name.removesuffix(_WEIGHT) in self.adapter.factors
