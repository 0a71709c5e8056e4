"""Safetensors files as a source.

What is in a file is known from its header, and only what is asked for is read. The file that is written has the same
header, byte for byte. So names, order, shapes, dtypes and metadata are those of the old one.

The library writes a file from tensors that are all in memory, and reads by mapping the file, whose pages then count as
the process's memory. Here both are plain reads and writes at the offsets of the header, which the library has checked.
"""

import io
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.names import some
from .output import to_disk
from .source import FLOATS, Entry, Source, Values

PIECE = 2**22  # bytes that are copied at once


@dataclass(frozen=True)
class _Shard:
    """A file: its first bytes, up to those of its tensors, and where each tensor begins, in their order."""

    path: Path
    head: bytes
    begins: dict[str, int]


class SafetensorsSource(Source):
    """One safetensors file, or several.

    Raises ValueError for a file that is no safetensors file or is cut short, and for a name that is in two files.
    """

    def __init__(self, path: Path, files: Sequence[Path], index: Path | None = None) -> None:
        self.path, self.files, self._index = path, [*files, *([index] if index else [])], index
        self.entries, self.ties = {}, {}
        self._home: dict[str, _Shard] = {}
        self._shards = [self._shard(file) for file in files]
        self._open: dict[Path, io.BufferedReader] = {}
        self._stack = ExitStack()
        self._memory = torch.empty(0, dtype=torch.uint8)

    @classmethod
    def of_index(cls, path: Path, index: Path) -> "SafetensorsSource":
        """The files that an index names. Raises ValueError for an index that does not fit them."""
        try:
            where = json.loads(index.read_text())["weight_map"]
            names = sorted(set(where.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(index)!r} is no index of safetensors files") from error
        if strange := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{str(index)!r} names files in other folders: {some(strange)}")
        if missing := [name for name in names if not (index.parent / name).is_file()]:
            raise ValueError(f"{str(index)!r} names files that are not there: {some(missing)}")
        source = cls(path, [index.parent / name for name in names], index)
        homes = {name: shard.path.name for name, shard in source._home.items()}
        if astray := [name for name, file in where.items() if homes.get(name) != file]:
            raise ValueError(f"{str(index)!r} names tensors that are not in their files: {some(astray)}")
        return source

    def _shard(self, path: Path) -> _Shard:
        try:
            with safe_open(path, framework="pt"):  # holds the header against the file
                pass
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no safetensors file, or is cut short: {error}") from error
        with path.open("rb") as file:
            size = file.read(8)
            text = file.read(struct.unpack("<Q", size)[0])
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        if twice := header.keys() & self.entries.keys():
            raise ValueError(f"{path.name!r} and another file of {str(self.path)!r} both hold {some(sorted(twice))}")
        shard = _Shard(path, size + text, {})
        for name in sorted(header, key=lambda name: cast("list[int]", header[name]["data_offsets"])):
            begin, end = header[name]["data_offsets"]
            shard.begins[name] = len(shard.head) + begin
            self.entries[name] = Entry(tuple(header[name]["shape"]), header[name]["dtype"], end - begin)
            self._home[name] = shard
        # as safetensors.torch.save_model leaves the second names of tied weights
        self.ties |= {name: kept for name, kept in metadata.items() if kept in header and name not in header}
        return shard

    def read(self, name: str, start: int, stop: int) -> Tensor:
        dtype = FLOATS[self.entries[name].dtype]
        return self._bytes(name, start * dtype.itemsize, stop * dtype.itemsize).view(dtype)

    def _bytes(self, name: str, start: int, stop: int) -> Tensor:
        shard, size = self._home[name], stop - start
        if shard.path not in self._open:
            self._open[shard.path] = self._stack.enter_context(shard.path.open("rb"))
        if self._memory.numel() < size:
            self._memory = torch.empty(0, dtype=torch.uint8)  # so the old memory goes before the new comes
            self._memory = torch.empty(size, dtype=torch.uint8)
        into = self._memory[:size]
        file = self._open[shard.path]
        file.seek(shard.begins[name] + start)
        if file.readinto(into.numpy().data) != size:
            raise ValueError(f"{str(shard.path)!r} became shorter while it was read")
        return into

    def write(self, folder: Path, values: Values, progress: Callable[[int], object]) -> None:
        with ThreadPoolExecutor(1) as disk:  # takes a finished file while the next one is made
            waits = []
            for shard in self._shards:
                with (folder / shard.path.name).open("xb", buffering=0) as file:
                    _write(file, memoryview(shard.head))
                    for name in shard.begins:
                        new = values(name)
                        for piece in self._as_it_is(name) if new is None else new:
                            _write(file, piece.view(torch.uint8).numpy().data)
                            progress(piece.nbytes)
                waits.append(disk.submit(to_disk, folder / shard.path.name))
            for wait in waits:
                wait.result()
        if self._index is not None:
            (folder / self._index.name).write_bytes(self._index.read_bytes())

    def _as_it_is(self, name: str) -> Iterator[Tensor]:
        nbytes = self.entries[name].nbytes
        for start in range(0, nbytes, PIECE):
            yield self._bytes(name, start, min(start + PIECE, nbytes))

    def close(self) -> None:
        self._stack.close()


def _write(file: io.FileIO, data: memoryview) -> None:
    """Writes all of it. A file without a buffer may take a part."""
    while data:
        data = data[file.write(data) :]
