"""A state dict in a file of torch.save as a source. Its tensors are mapped; a file is written from memory."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.names import some
from .source import FLOATS, INTEGERS, Entry, Source, Values

_WORDS = {dtype: word for word, dtype in (FLOATS | INTEGERS).items()}


class TorchSource(Source):
    """A `.pt`, `.pth` or `.bin` file with a state dict. What is no tensor in it stays as it is.

    Raises ValueError for what cannot be read as weights alone, and for what is no state dict.
    """

    def __init__(self, path: Path, file: Path) -> None:
        self.path, self.files = path, [file]
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise ValueError(f"{str(file)!r} cannot be read as weights alone: {first}") from error
        if not isinstance(state, dict):
            raise ValueError(f"{str(file)!r} holds a {type(state).__name__}, not a state dict")
        self._state: dict[str, Any] = state
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if not tensors and state:
            raise ValueError(
                f"{str(file)!r} holds {some(map(str, state))} and no tensors: save its state dict by itself"
            )
        if sparse := [name for name, tensor in tensors.items() if tensor.layout != torch.strided]:
            raise ValueError(f"{str(file)!r} has sparse tensors: {some(sparse)}; make them dense")
        self.entries, self.ties = {}, {}
        first_names: dict[Any, str] = {}
        for name, tensor in tensors.items():
            first = first_names.setdefault(_place(tensor), name)
            if first != name:
                self.ties[name] = first
            else:
                self.entries[name] = Entry(tuple(tensor.shape), _word(tensor), tensor.nbytes)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        tensor: Tensor = self._state[name].detach()
        return tensor.reshape(-1)[start:stop].clone()

    def write(self, folder: Path, values: Values, progress: Callable[[int], object]) -> None:
        out = copy.copy(self._state)  # a shallow copy has the versions of modules too, for load_state_dict
        names: dict[str, list[str]] = {name: [name] for name in self.entries}
        for name, first in self.ties.items():
            names[first].append(name)
        for first, all_names in names.items():
            old = self._state[first].detach()
            if (pieces := values(first)) is not None:
                flat, start = torch.empty(old.numel(), dtype=old.dtype), 0
                for piece in pieces:
                    flat[start : start + piece.numel()] = piece
                    start += piece.numel()
                old = torch.empty_like(old).copy_(flat.view(old.shape))
            out.update(dict.fromkeys(all_names, old))
            progress(old.nbytes)
        torch.save(out, folder / self.files[0].name)


def _word(tensor: Tensor) -> str:
    return _WORDS.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def _place(tensor: Tensor) -> Any:
    """Equal for tensors that are the same memory. Empty ones have none."""
    if not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
