"""The tensors of a fine-tuned model with their θ₀: two sides, paired by name, and what stands between."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.files import Path_, read
from ..core.names import some, under_one_prefix, unwrapped

Weights = nn.Module | Mapping[str, Any]
Pretrained = Weights | Path_
Buffers = Literal["finetuned", "interpolate", "pretrained"]


@dataclass(frozen=True)
class Pair:
    """A fine-tuned tensor with its names (several, if it is tied), and its θ₀. θ₀ is None if the tensor stays
    fine-tuned."""

    names: tuple[str, ...]
    theta_1: Tensor
    theta_0: Tensor | None
    interpolated: bool = True  # if not, it becomes θ₀

    def at(self, alpha: float, theta_1: Tensor) -> Tensor:
        return theta_1 if self.theta_0 is None else _blend(self.theta_0, theta_1, alpha if self.interpolated else 0.0)


@dataclass(frozen=True)
class _Side:
    """The tensors of one side by their names without wrappers, those names as given, and which are known to be
    buffers."""

    tensors: dict[str, Tensor]
    given: dict[str, str]
    buffers: set[str]

    def below(self, prefix: str) -> set[str]:
        """The names that start with `prefix`, which may be written with or without wrappers."""
        bare = unwrapped(prefix)
        return {
            name
            for name, given in self.given.items()
            if f"{name}.".startswith(f"{bare}.") or f"{given}.".startswith(f"{prefix}.")
        }

    def take_names(self, tied: Iterable[list[str]]) -> None:
        """Takes names of another side for the tensors that differ from them by one prefix. Each is of tied names."""
        alone = [names[0] for names in tied if self.tensors.keys().isdisjoint(names)]
        for name, other in (under_one_prefix(alone, self.tensors) or {}).items():
            self.tensors[name], self.given[name] = self.tensors.pop(other), self.given.pop(other)
            if other in self.buffers:
                self.buffers.add(name)


def _side(weights: Weights, label: str) -> _Side:
    tensors = {name: value for name, value in state_of(weights, label).items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{label} holds no tensors; if it is a checkpoint, give the state dict within")
    if sparse := [name for name, tensor in tensors.items() if tensor.layout != torch.strided]:
        raise ValueError(f"{label} has sparse tensors: {some(sparse)}; make them dense")
    bare = [unwrapped(name) for name in tensors]
    while all(name.startswith("module.") for name in bare):
        bare = [name.removeprefix("module.") for name in bare]
    if len(set(bare)) < len(bare):
        twice = [given for given, name in zip(tensors, bare, strict=True) if bare.count(name) > 1]
        raise ValueError(f"{label} has entries that differ by a wrapper's prefix alone: {some(twice)}; remove some")
    given = dict(zip(bare, tensors, strict=True))
    held = {id(buffer) for buffer in weights.buffers()} if isinstance(weights, nn.Module) else set()
    buffers = {name for name in bare if id(tensors[given[name]]) in held}
    return _Side({name: tensors[given[name]] for name in bare}, given, buffers)


def _tied(side: _Side) -> Collection[list[str]]:
    """The names of each tensor of a side: several, if it is tied."""
    names: dict[Any, list[str]] = {}
    for name, tensor in side.tensors.items():
        names.setdefault(_place(tensor), []).append(name)
    return names.values()


def match_own(pretrained: Pretrained, model: nn.Module, buffers: Buffers, exclude: str | Iterable[str]) -> list[Pair]:
    """The pairs that are to be written in `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a module; for a state dict there is wise_ft")
    pairs = [pair for pair in match(pretrained, model, "model", buffers, exclude, None) if pair.theta_0 is not None]
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    if foreign := [name for pair in pairs if id(pair.theta_1) not in own for name in pair.names]:
        raise ValueError(f"model's state_dict() holds copies of {some(foreign)}; use wise_ft and load_state_dict")
    return pairs


def match(
    pretrained: Pretrained,
    finetuned: Weights,
    label: str,
    buffers: Buffers,
    exclude: str | Iterable[str],
    parameters: Collection[str] | None,
) -> list[Pair]:
    """All tensors of `finetuned`, which messages call `label`, each with its θ₀. Makes every check there is."""
    if buffers not in ("finetuned", "interpolate", "pretrained"):
        raise ValueError(f"buffers must be 'finetuned', 'interpolate' or 'pretrained', got {buffers!r}")
    if isinstance(pretrained, str | PathLike):
        pretrained = read(pretrained)
    ours, theirs = _side(finetuned, label), _side(pretrained, "pretrained")
    excluded: set[str] = set()
    for prefix in (exclude,) if isinstance(exclude, str) else exclude:
        if not (found := ours.below(prefix) | theirs.below(prefix)):
            raise ValueError(f"exclude names {prefix!r}, which neither {label} nor pretrained has")
        excluded |= found
    theirs.take_names(of for of in _tied(ours) if excluded.isdisjoint(of))
    known_parameters, known_buffers = _roles(ours, theirs, parameters)

    pairs: list[Pair] = []
    untold: list[str] = []
    for names, theta_0 in _starts(ours, theirs, label, excluded):
        theta_1, given = ours.tensors[names[0]], tuple(ours.given[name] for name in names)
        interpolated = buffers == "interpolate" or not known_parameters.isdisjoint(names)
        if theta_0 is not None and not interpolated and known_buffers.isdisjoint(names):
            untold += given
        stays = not interpolated and buffers == "finetuned"
        pairs.append(Pair(given, theta_1, None if stays else theta_0, interpolated))
    if untold:
        raise ValueError(
            f"nothing tells whether {some(untold)} are parameters or buffers: give a module instead of a state dict, "
            f"the names of the parameters in parameters=, or buffers='interpolate' to interpolate both"
        )
    blended = [pair for pair in pairs if pair.theta_0 is not None and pair.interpolated]
    if blended and all(_place(pair.theta_0) == _place(pair.theta_1) for pair in blended):
        raise ValueError(f"pretrained is the memory of {label}, and moved along with it: copy it before fine-tuning")
    return pairs


def _roles(ours: _Side, theirs: _Side, parameters: Collection[str] | None) -> tuple[set[str], set[str]]:
    """The names known to be of parameters, and those known to be of buffers."""
    names = ours.tensors.keys() | theirs.tensors.keys()
    trained = {n for side in (ours, theirs) for n, tensor in side.tensors.items() if isinstance(tensor, nn.Parameter)}
    if parameters is None:
        return trained, ours.buffers | theirs.buffers
    if isinstance(parameters, str):
        raise TypeError(f"parameters is the string {parameters!r}; give a collection of names")
    meant = {given: name for side in (theirs, ours) for name, given in side.given.items()}
    listed = {given: meant.get(given, unwrapped(given)) for given in parameters}
    if strange := [given for given, name in listed.items() if name not in names]:
        raise ValueError(f"parameters names {some(strange)}, which neither side has")
    trained.update(listed.values())
    return trained, names - trained


def _starts(ours: _Side, theirs: _Side, label: str, excluded: set[str]) -> list[tuple[list[str], Tensor | None]]:
    """For each tensor of ours, all its names and its θ₀. θ₀ is None if the tensor is excluded or of integers."""
    starts: list[tuple[list[str], Tensor | None]] = []
    lacking: list[str] = []
    unfit: list[str] = []
    for names in _tied(ours):
        given = [ours.given[name] for name in names]
        apart = excluded.intersection(names)
        if apart and len(apart) < len(names):
            raise ValueError(f"{label} ties {some(given)}: exclude all of them, or none")
        candidates = [theirs.tensors[name] for name in names if name in theirs.tensors]
        if apart or not candidates:
            starts.append((names, None))
            lacking += [] if apart else given
            continue
        theta_0, theta_1 = candidates[0], ours.tensors[names[0]]
        if not all(_same(theta_0, other) for other in candidates[1:]):
            raise ValueError(f"{label} ties {some(given)}, which differ in pretrained: untie them, or exclude them")
        if _form(theta_0) != _form(theta_1):
            unfit.append(f"{given[0]!r} is {_described(theta_1)} in {label}, {_described(theta_0)} in pretrained")
        starts.append((names, None if _kind(theta_1) == "integer" else theta_0))

    used = {_place(theirs.tensors[name]) for name in ours.tensors if name in theirs.tensors}
    rest = {n: tensor for n, tensor in theirs.tensors.items() if n not in ours.tensors and n not in excluded}
    surplus = [theirs.given[name] for name, tensor in rest.items() if _place(tensor) not in used]
    objections = [f"pretrained lacks {some(lacking)}"] if lacking else []
    objections += [f"{label} lacks {some(surplus)}, which pretrained has"] if surplus else []
    objections += unfit[:10]
    if objections:
        raise ValueError(f"{'; '.join(objections)}. exclude= takes what is to stay fine-tuned, such as a fresh head")
    return starts


def state_of(weights: Weights, label: str) -> Mapping[str, Any]:
    if isinstance(weights, nn.Module):
        state: Mapping[str, Any] = weights.state_dict(keep_vars=True)
        return state
    if isinstance(weights, Mapping):
        return weights
    raise TypeError(f"{label} is a {type(weights).__name__}; give a module or a state dict")


def _blend(theta_0: Tensor, theta_1: Tensor, alpha: float) -> Tensor:
    """(1 − alpha)·theta_0 + alpha·theta_1. Alpha 0 and 1 give the tensors themselves. Elements that are equal on both
    sides, infinities too, stay as they are."""
    if alpha in (0, 1):
        return theta_1 if alpha else theta_0
    if theta_1.is_complex():
        start, end = (torch.view_as_real(theta.resolve_conj()) for theta in (theta_0, theta_1))
        return torch.view_as_complex(_blend(start, end, alpha))
    wide = torch.float64 if torch.float64 in (theta_0.dtype, theta_1.dtype) else torch.float32
    start, end = theta_0.to(theta_1.device, wide), theta_1.to(wide)
    return torch.where(start == end, end, start * (1 - alpha) + end * alpha)


def _place(tensor: Tensor | None) -> Any:
    """Equal for tensors that are the same memory. Tensor subclasses may hide theirs, and empty tensors have none."""
    if tensor is None or not tensor.data_ptr():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _same(a: Tensor, b: Tensor) -> bool:
    return _place(a) == _place(b) or (
        (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a.detach(), b.detach().to(a.device))
    )


def _kind(tensor: Tensor) -> str:
    return "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, _kind(tensor), _sharded(tensor)


def _sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")  # a DTensor, whose module is slow to import


def _described(tensor: Tensor) -> str:
    sharded = "sharded " if _sharded(tensor) else ""
    return f"{sharded}{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
