"""What a checkpoint is to the commands: tensors known by name and form, read piece by piece, and written anew."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
INTEGERS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
}
Values = Callable[[str], Iterator[Tensor] | None]


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint, by what its file says of it.

    dtype: as safetensors writes it, such as "BF16".
    nbytes: in the file.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def kind(self) -> str:
        """Is "float", "integer" (bool too), or "other": codes of 8 bits or fewer, and complex numbers."""
        return "float" if self.dtype in FLOATS else "integer" if self.dtype in INTEGERS else "other"

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Source(ABC):
    """A checkpoint that is read.

    path: as it was given.
    files: what holds it, with the index of several.
    entries: its tensors by name, in the order of the files.
    ties: further names of tied tensors, each with the name that has an entry.
    """

    path: Path
    files: list[Path]
    entries: dict[str, Entry]
    ties: dict[str, str]

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Tensor:
        """The elements from `start` to `stop` of a tensor of floats, flat in the order of its indices. The caller may
        write them. They are valid until the next call, which may use their memory."""

    @abstractmethod
    def write(self, folder: Path, values: Values, progress: Callable[[int], object]) -> None:
        """Writes the same files into a folder.

        values: the new elements of a tensor by its name, flat and in order. None leaves it as it is.
        progress: is told of bytes as they are written.
        """

    def close(self) -> None:  # noqa: B027 - not all keep something open
        """Closes what is open."""

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())
