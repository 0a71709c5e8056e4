"""Folders and files that appear whole or not at all, and never in the place of what is there unless that is asked."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.names import some
from .source import Source

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
_COPIED = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")  # configs, tokenizers, templates, code
_NOT_COPIED = ("trainer_state.json", ".index.json")


@contextmanager
def new_folder(out: Path, sources: Iterable[Source], nbytes: int, force: bool) -> Iterator[Path]:
    """Yields a temporary folder beside `out`, which becomes `out` at the end. After an error, nothing is left of it.

    sources: what is read, and must stay.
    nbytes: how much will be written.
    force: replace a folder that is there. It must hold files alone, and a checkpoint among them.

    Raises FileExistsError, ValueError for a folder that must not be replaced, FileNotFoundError if the folder that
    `out` is to be in is not there, and OSError if its disk has too little space.
    """
    out = out.absolute()
    _check_folder(out, sources, force)
    free = shutil.disk_usage(out.parent).free
    if free < nbytes:
        raise OSError(f"{nbytes / 1e9:.1f} GB are needed beside {str(out)!r}, and {free / 1e9:.1f} GB are free")
    made = out.with_name(f".{out.name}.{os.getpid()}.new")
    made.mkdir()
    try:
        yield made
        for path in made.iterdir():
            to_disk(path)
        to_disk(made)
        _put_in_place(made, out)
        to_disk(out.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`. What is written there becomes `path` at the end, unless there is an error.

    The suffix is that of `path`. It replaces a file: call `check_file` first.
    """
    made = path.with_name(f".{path.stem}.{os.getpid()}.new{path.suffix}")
    try:
        yield made
        os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)


def check_file(path: Path, force: bool) -> None:
    """Raises FileExistsError for a file that is there, unless forced, and FileNotFoundError without its folder."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r}")
    if path.is_dir() or (path.exists() and not force):
        raise FileExistsError(f"{str(path)!r} is there" + ("" if path.is_dir() else "; --force replaces it"))


def copy_beside(tuned: Source, folder: Path) -> list[str]:
    """Copies what lies beside the weights of a checkpoint that was given as a folder: configs, tokenizers, templates,
    code. Returns the names."""
    if not tuned.path.is_dir():
        return []
    found = [
        path
        for path in sorted(tuned.path.iterdir())
        if path.is_file() and path.suffix in _COPIED and not path.name.endswith(_NOT_COPIED)
    ]
    for path in found:
        shutil.copyfile(path, folder / path.name)
    return [path.name for path in found]


def _check_folder(out: Path, sources: Iterable[Source], force: bool) -> None:
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(out.parent)!r}")
    if not out.is_dir():
        if out.exists():
            raise FileExistsError(f"{str(out)!r} is a file; --out is a folder")
        return
    there = list(out.iterdir())
    if not there:
        return
    read = [path.resolve() for source in sources for path in (source.path, *source.files)]
    if any(out.resolve() in (path, *path.parents) for path in read):
        raise ValueError(f"{str(out)!r} has a checkpoint that is read; give another --out")
    if not force:
        raise FileExistsError(f"{str(out)!r} is there and not empty; --force replaces it")
    if foreign := [path.name for path in there if not path.is_file() or path.is_symlink()]:
        raise ValueError(f"--force replaces a folder of files alone, and {str(out)!r} has {some(foreign)}")
    if not any(path.suffix in WEIGHTS for path in there):
        raise ValueError(f"--force replaces a checkpoint, and {str(out)!r} has none")


def _put_in_place(made: Path, out: Path) -> None:
    """Renames the new folder to `out`. An old one is moved aside, and back if the new one does not come."""
    if not out.exists():
        made.rename(out)
        return
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    out.rename(old)
    try:
        made.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)


def to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk. A rename may otherwise come before its data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
