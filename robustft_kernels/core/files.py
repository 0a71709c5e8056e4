"""Safetensors files. Their tensors are mapped into memory, and each knows its file, which can tell whether it is as it
was."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from weakref import finalize

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Path_ = str | os.PathLike[str]
DISK = "disk"  # the anchor_device of anchors that stay in their file
INDEX = "model.safetensors.index.json"


class MappedFile:
    """A file whose pages are the memory of tensors.

    It is kept open, and the open file is asked. So one that was renamed over or deleted counts as intact, as its pages
    are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        finalize(self, os.close, self._descriptor)
        self._was = self._now()

    def _now(self) -> tuple[int, ...]:
        found = os.fstat(self._descriptor)
        return found.st_ino, found.st_size, found.st_mtime_ns

    def is_intact(self) -> bool:
        """Whether nobody has written it since."""
        return self._now() == self._was

    def is_at_its_path(self) -> bool:
        """Whether its path still leads to it."""
        return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))

    def check(self) -> None:
        """Raises RuntimeError if somebody has written it since."""
        if not self.is_intact():
            raise RuntimeError(
                f"{str(self.path)!r} was written after anchors were mapped from it, so the anchors are gone; make the "
                "optimizer anew, or load a checkpoint that has the anchors"
            )


_files = WeakTensorKeyDictionary()  # of the tensors that are mapped


def file_of(tensor: Tensor) -> MappedFile | None:
    """The file that a tensor is mapped from, if `read` has mapped it."""
    return _files.get(tensor) if len(_files) else None


def files_of(tensors: Iterable[Tensor]) -> list[MappedFile]:
    """The files that any of these tensors are mapped from."""
    return list(dict.fromkeys(file for tensor in tensors if (file := file_of(tensor)) is not None))


def note(tensor: Tensor, file: MappedFile) -> None:
    """Notes that a tensor, too, lies in the pages of a file."""
    _files[tensor] = file


def read(path: Path_) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, mapped into memory. Their pages are those of the file. They are read
    when they are touched, and shared by all processes that map it.

    Args:
        path: a `.safetensors` file, the `.index.json` of several, or a directory. The directory has a
            `model.safetensors` or its index, as Hugging Face's `save_pretrained` makes it.

    Raises FileNotFoundError, ValueError for what is no such file, and ImportError without safetensors. Raises
    RuntimeError for a file that is replaced at this moment.
    """
    path = Path(path)
    if path.is_dir():
        path = path / INDEX if (path / INDEX).exists() else path / "model.safetensors"
    if not path.exists() and path.suffix not in (".safetensors", ".json"):
        raise ValueError(
            f"unknown anchor {str(path)!r}: use 'initial', 'zero', a list of tensors, a mapping by name, or the path "
            "of a safetensors file"
        )
    if path.name.endswith(".safetensors.index.json"):
        files = sorted({path.parent / name for name in json.loads(path.read_text())["weight_map"].values()})
    elif path.suffix == ".safetensors":
        files = [path]
    else:
        raise ValueError(f"anchors are read from .safetensors files, or their .index.json, not {path.name!r}")
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError("anchors in a file need safetensors: pip install safetensors") from error
    tensors: dict[str, Tensor] = {}
    for name in files:
        file = MappedFile(name)
        with safe_open(name, framework="pt") as opened:
            here = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            tied = opened.metadata() or {}  # second names of tied weights, as safetensors.torch.save_model leaves them
        if not file.is_at_its_path():
            raise RuntimeError(f"{str(name)!r} was replaced while anchors were read from it; try again")
        for tensor in here.values():
            note(tensor, file)
        tensors.update(here | {name: here[kept] for name, kept in tied.items() if kept in here})
    return tensors
