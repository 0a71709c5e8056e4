"""From a path to the checkpoint there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.files import INDEX
from ..core.names import some
from .shards import SafetensorsSource
from .source import Source
from .torch_file import TorchSource

_TORCH = (".pt", ".pth", ".bin")


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """The checkpoint at a path, closed at the end.

    path: a safetensors file, the `.safetensors.index.json` of several, a folder with either, or a `.pt`, `.pth` or
        `.bin` file with a state dict.

    Raises ValueError for anything else, and for a checkpoint without tensors. Raises FileNotFoundError.
    """
    found = _in_folder(path) if path.is_dir() else path
    if not found.exists():
        raise FileNotFoundError(f"there is no {str(found)!r}")
    source: Source
    if found.name.endswith(".safetensors.index.json"):
        source = SafetensorsSource.of_index(path, found)
    elif found.suffix == ".safetensors":
        source = SafetensorsSource(path, [found])
    elif found.suffix in _TORCH:
        source = TorchSource(path, found)
    else:
        raise ValueError(f"{str(path)!r} is no checkpoint: give a folder, or a .safetensors, .pt or .bin file")
    try:
        if not source.entries:
            raise ValueError(f"{str(path)!r} holds no tensors")
        yield source
    finally:
        source.close()


def _in_folder(folder: Path) -> Path:
    """The index or file in a folder, as Hugging Face's libraries name them. Raises ValueError if there is none, or more
    than one."""
    for name in (INDEX, "model.safetensors"):
        if (folder / name).exists():
            return folder / name
    patterns = ("*.safetensors.index.json", "*.safetensors", "pytorch_model.bin")
    found = next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])
    if not found:
        raise ValueError(f"{str(folder)!r} holds no {INDEX}, .safetensors file or pytorch_model.bin")
    if len(found) > 1:
        raise ValueError(f"{str(folder)!r} holds several checkpoints: give {some(path.name for path in found)} by name")
    return found[0]
